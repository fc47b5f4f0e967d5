// Markdown blocks: paragraphs, headings, lists, quotes, tables, fenced code.
//
// `blocks(text)` says where the blocks of a text are; `renderBlock` makes the element of one. A block ends where the
// first line of the next begins, so text that comes later never changes a block that has a successor: this is what
// lets `Growing` leave finished blocks alone. Output is made of elements and text nodes; HTML in the text stays text.

import { codeBlock } from "./code.js";
import { make } from "./dom.js";
import { appendInline, endOf } from "./inline.js";

// A model must not be able to hang the page: no two neighbours in these can take the same characters, so that each
// takes time linear in the line. What would need two is cut off by hand.
const FENCE = /^( {0,3})(`{3,}(?!`)|~{3,}(?!~))([^`\n]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const DIVIDER = /^[ |:-]+$/; // and each cell as `SIDE`
const SIDE = /^:?-+:?$/;
const BLANK = /^[ \t]*$/;
const DEEPEST = 12; // quotes and lists within each other; deeper ones are paragraphs

/** Return the blocks of a text: `{kind, start, lines, …}`, each with where it begins. */
function blocks(text, depth = 0) {
  const lines = text.split("\n");
  const starts = [0];
  for (const line of lines) starts.push(starts.at(-1) + line.length + 1);
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (BLANK.test(lines[at])) {
      at += 1;
      continue;
    }
    const { kind, to, ...more } = readBlock(lines, at, depth);
    found.push({ kind, start: starts[at], lines: lines.slice(at, to), ...more });
    at = to;
  }
  return found;
}

/** Return what begins at a line, and the line after it. */
function readBlock(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return readFence(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return { kind: "heading", to: at + 1, level: heading[1].length, text: headingText(heading[2]) };
  if (RULE.test(line)) return { kind: "rule", to: at + 1 };
  if (isTable(lines, at)) {
    let to = at + 2;
    while (to < lines.length && lines[to].includes("|") && !BLANK.test(lines[to])) to += 1;
    return { kind: "table", to };
  }
  if (depth < DEEPEST && QUOTE.test(line)) {
    let to = at + 1;
    while (to < lines.length && QUOTE.test(lines[to])) to += 1;
    return { kind: "quote", to };
  }
  const item = ITEM.exec(line);
  if (depth < DEEPEST && item) return readList(lines, at, item);
  let to = at + 1;
  while (to < lines.length && !BLANK.test(lines[to]) && !interrupts(lines, to, depth)) to += 1;
  return { kind: "paragraph", to };
}

function readFence(lines, at, [, indent, marks, language]) {
  const close = new RegExp(`^ {0,3}${marks[0]}{${marks.length},}[ \\t]*$`);
  let to = at + 1;
  while (to < lines.length && !close.test(lines[to])) to += 1;
  const closed = to < lines.length;
  const shift = new RegExp(`^ {0,${indent.length}}`);
  const code = lines.slice(at + 1, to).map((line) => line.replace(shift, ""));
  return { kind: "code", to: closed ? to + 1 : to, closed, code, language: language.trim().split(/\s/)[0] };
}

function readList(lines, at, [, indent, mark]) {
  const family = /\d/.test(mark) ? mark.at(-1) : mark;
  const isItem = (line) => {
    const found = ITEM.exec(line);
    return found && !RULE.test(line) && found[1].length <= indent.length + 1 && found[2].at(-1) === family;
  };
  const heads = [];
  let to = at;
  while (to < lines.length) {
    const line = lines[to];
    if (isItem(line)) heads.push(to);
    else if (BLANK.test(line)) {
      let next = to;
      while (next < lines.length && BLANK.test(lines[next])) next += 1;
      const goes = next < lines.length && (isItem(lines[next]) || indentOf(lines[next]) > indent.length + 1);
      if (!goes) break;
      to = next;
      continue;
    } else if (indentOf(line) <= indent.length + 1 && (BLANK.test(lines[to - 1]) || interrupts(lines, to, 0))) break;
    to += 1;
  }
  return { kind: "list", to, heads: heads.map((head) => head - at), ordered: /\d/.test(mark), first: parseInt(mark, 10) };
}

const indentOf = (line) => /^ */.exec(line)[0].length;

/** Say whether a line ends the paragraph before it. */
function interrupts(lines, at, depth) {
  const line = lines[at];
  const item = ITEM.exec(line);
  const begins = item && item[3] && (!/\d/.test(item[2]) || parseInt(item[2], 10) <= 1 || item[1].length > 0);
  return (
    FENCE.test(line) ||
    HEADING.test(line) ||
    RULE.test(line) ||
    (depth < DEEPEST && (QUOTE.test(line) || begins)) ||
    isTable(lines, at)
  );
}

/** Return the text of a heading without the `#` that may close it. */
function headingText(rest) {
  const text = rest.trimEnd();
  const end = endOf(text, "#");
  return end === 0 || /[ \t]/.test(text[end - 1]) ? text.slice(0, end).trimEnd() : text;
}

function isTable(lines, at) {
  const divider = lines[at + 1];
  if (divider === undefined || !lines[at].includes("|") || !DIVIDER.test(divider)) return false;
  const sides = cells(divider);
  return sides.every((side) => SIDE.test(side)) && cells(lines[at]).length === sides.length;
}

/** Return the cells of a table row; `\|` is a bar within a cell. */
function cells(row) {
  const inner = row.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/** Return the element of one block. */
function renderBlock(block, depth = 0) {
  switch (block.kind) {
    case "heading":
      return inline(`h${Math.min(6, block.level + 2)}`, block.text, { class: `heading-${block.level}` });
    case "rule":
      return make("hr");
    case "code":
      return codeBlock(block.language, block.code, block.closed).element;
    case "quote": {
      const quote = make("blockquote");
      appendBlocks(quote, block.lines.map((line) => line.replace(QUOTE, "")).join("\n"), depth + 1);
      return quote;
    }
    case "table":
      return renderTable(block.lines);
    case "list":
      return renderList(block, depth);
    default:
      return inline("p", block.lines.map((line) => line.replace(/^ +/, "")).join("\n"));
  }
}

/** Append a whole Markdown text to an element. */
export function appendBlocks(parent, text, depth = 0) {
  for (const block of blocks(text, depth)) parent.append(renderBlock(block, depth));
}

function inline(name, text, attributes = {}) {
  const element = make(name, attributes);
  appendInline(element, text.trimEnd());
  return element;
}

function renderTable(lines) {
  const sides = cells(lines[1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
  const row = (line, name) => {
    const texts = cells(line);
    return make("tr", {}, ...sides.map((side, i) => inline(name, texts[i] ?? "", { class: `side-${side}` })));
  };
  const head = make("thead", {}, row(lines[0], "th"));
  const body = make("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  // A wide table scrolls by itself; with tabindex the keyboard can do it too.
  return make("div", { class: "table", tabindex: "0" }, make("table", {}, head, body));
}

function renderList({ lines, heads, ordered, first }, depth) {
  const list = make(ordered ? "ol" : "ul", ordered && first !== 1 ? { start: first } : {});
  heads.forEach((head, i) => {
    const own = lines.slice(head, heads[i + 1] ?? lines.length);
    const [mark, , , gap] = ITEM.exec(own[0]);
    const width = gap.length > 4 ? mark.length - gap.length + 1 : mark.length;
    const shift = new RegExp(`^ {0,${Math.max(width, 2)}}`);
    const text = [own[0].slice(width), ...own.slice(1).map((line) => line.replace(shift, ""))].join("\n");
    const item = make("li");
    appendBlocks(item, text, depth + 1);
    const paragraphs = [...item.children].filter((child) => child.tagName === "P");
    // A single text before nested lists needs no paragraph around it.
    if (paragraphs.length === 1 && item.firstChild === paragraphs[0]) paragraphs[0].replaceWith(...paragraphs[0].childNodes);
    list.append(item);
  });
  return list;
}

/** Shows a text that grows in an element: finished blocks are made once and stay, only the last ones are made again. */
export class Growing {
  #done = 0; // offset up to which blocks are final
  #tail = []; // elements of the blocks after it
  #code = null; // the code that is being written, if the first of those blocks is code: it only gets more lines

  constructor(element) {
    this.element = element;
  }

  /** Show `text`; what was shown before is its beginning. */
  grow(text) {
    const base = this.#done;
    const open = blocks(text.slice(base));
    for (const element of this.#tail) element.remove();
    this.#tail = [];
    let wasFinal = true;
    open.forEach((block, i) => {
      const next = open[i + 1];
      const isFinal = wasFinal && next !== undefined && hasTwoLines(text, base + next.start);
      if (i === 0 && this.#code) {
        this.#code.update(block.code, block.closed);
      } else if (wasFinal && !isFinal && block.kind === "code" && block.lines.length > 1) {
        this.#code = codeBlock(block.language, block.code, block.closed);
        this.element.append(this.#code.element);
      } else {
        const element = renderBlock(block);
        this.element.append(element);
        if (!isFinal) this.#tail.push(element);
      }
      if (isFinal) {
        this.#done = base + next.start;
        this.#code = null;
      }
      wasFinal = isFinal;
    });
  }
}

/** Say whether what begins here can no longer change: a table is known by its second line, all else by its first. */
function hasTwoLines(text, start) {
  const end = text.indexOf("\n", start);
  return end >= 0 && text.indexOf("\n", end + 1) >= 0;
}
