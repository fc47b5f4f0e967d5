// Markdown inside a line: emphasis, code, links. Everything else, HTML included, is text.
//
// Two passes. The first cuts the line into nodes and runs of `*`, `_` and `~`, which may or may not turn out to be
// emphasis; the second pairs the runs, innermost first. Both are linear in the length of the line, whatever is in it:
// a model must not be able to hang the page. Unlike CommonMark, `**「强调」**的` is emphasis: Chinese and Japanese
// have no spaces around it.

import { make } from "./dom.js";

const LONGEST = 20_000; // characters of a paragraph; beyond it, plain text
const SPECIAL = /[\\`*_~[\]!<\n]|https?:\/\//g;
const BARE_URL = /https?:\/\/[^\s<>"'`，。；：！？、）】」』]{1,2000}/y; // bounded, as each that is none is read again
const URL_ENDS = ".,;:!?*_~)]"; // marks after a bare URL that are no part of it
const GAP = String.raw`\s{0,4}`; // bounded, as two of them may stand side by side
const PLACE = String.raw`<([^<>\n]*)>|([^\s()<>]*(?:\([^\s()]*\)[^\s()<>]*)*)`;
const TARGET = new RegExp(String.raw`\(${GAP}(?:${PLACE})(?:\s${GAP}(?:"[^"\n]*"|'[^'\n]*'))?${GAP}\)`, "y");
const ANGLE = /<(https?:\/\/[^\s<>]+)>/y;
const WORD = /[\p{L}\p{N}_]/u;

/** Append lines of Markdown to an element. */
export function appendInline(parent, text, { links = true } = {}) {
  if (text.length > LONGEST) parent.append(text);
  else parent.append(...pair(cut(text, links)));
}

/** Return the URL if it is one that a link may have (http and https), else null. */
function safeUrl(target) {
  try {
    const url = new URL(target);
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null; // relative or malformed: nothing of a model's should point into this server
  }
}

/** First pass: return DOM nodes and runs `{mark, count, opens, closes}`. */
function cut(text, links) {
  const pieces = [];
  const brackets = matchBrackets(text);
  const ticks = matchTicks(text);
  let plain = "";
  const add = (node) => {
    if (plain) pieces.push(document.createTextNode(plain));
    plain = "";
    if (node) pieces.push(node);
  };
  let at = 0;
  while (at < text.length) {
    const found = matchAt(SPECIAL, text, at);
    const next = found ? found.index : text.length;
    plain += text.slice(at, next);
    if (!found) break;
    at = next;
    const [mark] = found[0];
    let taken = 0;
    if (mark === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      taken = 2;
    } else if (mark === "\n" || (mark === "\\" && text[at + 1] === "\n")) {
      plain = plain.slice(0, endOf(plain, " "));
      add(make("br"));
      taken = mark === "\n" ? 1 : 2;
    } else if (mark === "`") {
      const run = runLength(text, at);
      const close = ticks.get(at);
      if (close === undefined) plain += "`".repeat(run);
      else add(make("code", {}, trimCode(text.slice(at + run, close))));
      taken = close === undefined ? run : close + run - at;
    } else if (mark === "*" || mark === "_" || mark === "~") {
      const run = readRun(text, at);
      add(run);
      taken = run.count;
    } else {
      const link = links ? readLink(text, at, brackets) : null;
      if (link) add(link.node);
      else plain += mark;
      taken = link ? link.length : 1;
    }
    at += taken;
  }
  add(null);
  return pieces;
}

/** Return what a sticky or global expression finds from a place on. */
function matchAt(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

/** Return `{node, length}` of the link, image or URL that begins here, or null. */
function readLink(text, at, brackets) {
  if (text[at] === "h") {
    const found = /\w/.test(text[at - 1] ?? "") ? null : matchAt(BARE_URL, text, at);
    const raw = found && trimUrl(found[0]);
    const url = found && safeUrl(raw);
    return url ? { node: anchor(url, raw), length: raw.length } : null;
  }
  if (text[at] === "<") {
    const found = matchAt(ANGLE, text, at);
    const url = found && safeUrl(found[1]);
    return url ? { node: anchor(url, found[1]), length: found[0].length } : null;
  }
  const open = text[at] === "!" ? at + 1 : at;
  const close = brackets.get(open);
  if (close === undefined) return null;
  const found = matchAt(TARGET, text, close + 1);
  const url = found && safeUrl(found[1] ?? found[2]);
  if (!url) return null;
  // An image would tell a foreign server that this text was read: it becomes a link.
  const node = anchor(url);
  appendInline(node, text.slice(open + 1, close) || url, { links: false });
  return { node, length: close + 1 + found[0].length - at };
}

function anchor(url, ...children) {
  return make("a", { href: url, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

/** Return where a text ends without these marks at its end. */
export function endOf(text, marks) {
  let end = text.length;
  while (end && marks.includes(text[end - 1])) end -= 1;
  return end;
}

/** Return a bare URL without the marks after it, but with a `)` that closes a bracket of its own. */
function trimUrl(url) {
  const end = endOf(url, URL_ENDS);
  const count = (text, mark) => text.split(mark).length - 1;
  const closes = url[end] === ")" && count(url, "(") >= count(url.slice(0, end + 1), ")");
  return url.slice(0, closes ? end + 1 : end);
}

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

function readRun(text, at) {
  const count = runLength(text, at);
  const before = text[at - 1] ?? " ";
  const after = text[at + count] ?? " ";
  const inWord = text[at] === "_" && WORD.test(before) && WORD.test(after); // snake_case
  const usable = !inWord && (text[at] !== "~" || count === 2);
  return { mark: text[at], count, opens: usable && /\S/.test(after), closes: usable && /\S/.test(before) };
}

/** Return where each `[` is closed. */
function matchBrackets(text) {
  const pairs = new Map();
  const open = [];
  for (let at = 0; at < text.length; at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === "[") open.push(at);
    else if (text[at] === "]" && open.length) pairs.set(open.pop(), at);
  }
  return pairs;
}

/** Return where each run of backticks finds the next run of the same length. */
function matchTicks(text) {
  const pairs = new Map();
  const last = new Map();
  const runs = [...text.matchAll(/`+/g)].reverse();
  for (const run of runs) {
    const length = run[0].length;
    if (last.has(length)) pairs.set(run.index, last.get(length));
    last.set(length, run.index);
  }
  return pairs;
}

function trimCode(code) {
  const line = code.replaceAll("\n", " ");
  return line.startsWith(" ") && line.endsWith(" ") && line.trim() ? line.slice(1, -1) : line;
}

const DEEPEST = 40; // emphasis within emphasis; beyond it marks are text

/** Second pass: return nodes only, with the paired runs turned into em, strong and del. */
function pair(pieces) {
  const frames = [{ run: null, nodes: [] }]; // one per run that waits for its partner, innermost last
  const waiting = { "*": 0, _: 0, "~": 0 };
  const dissolve = () => {
    const { run, nodes } = frames.pop();
    waiting[run.mark] -= 1;
    frames.at(-1).nodes.push(run.mark.repeat(run.count), ...nodes);
  };
  for (const piece of pieces) {
    if (piece instanceof Node) {
      frames.at(-1).nodes.push(piece);
      continue;
    }
    const { mark, opens, closes } = piece;
    let { count } = piece;
    while (closes && count && waiting[mark]) {
      const fits = ({ run }) => run?.mark === mark && run.count === count;
      const exact = frames.some(fits); // `**a *b**`: the inner run is no partner
      while (exact ? !fits(frames.at(-1)) : frames.at(-1).run.mark !== mark) dissolve();
      const frame = frames.at(-1);
      const width = mark === "~" ? 2 : Math.min(2, count, frame.run.count);
      const name = mark === "~" ? "del" : width === 2 ? "strong" : "em";
      const node = make(name, {}, ...frame.nodes);
      count -= width;
      frame.run.count -= width;
      frame.nodes = [node];
      if (frame.run.count === 0) {
        frames.pop();
        waiting[mark] -= 1;
        frames.at(-1).nodes.push(node);
      }
    }
    if (count && opens && frames.length < DEEPEST) {
      frames.push({ run: { mark, count }, nodes: [] });
      waiting[mark] += 1;
    } else if (count) {
      frames.at(-1).nodes.push(mark.repeat(count));
    }
  }
  while (frames.length > 1) dissolve();
  return frames[0].nodes;
}
