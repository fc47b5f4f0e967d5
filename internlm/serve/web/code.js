// A block of code: its language, a copy button, and lines coloured as they come.
//
// Colours are for any language: comments, strings, numbers, words that most languages reserve. They come one line at a
// time; what reaches over lines (block comments, triple quotes) is the state that one line hands to the next.

import { copyButton, make } from "./dom.js";

const PERHAPS_FENCE = /^ {0,3}(`+|~+)$/;
const words = (text) => new Set(text.split(/\s+/));
const RESERVED = words(
  `abstract and as assert async await begin break case catch class const continue def default defer del delete do elif
  else elseif end enum except export extends extern false False final finally fn for foreach from func function global
  go goto if impl implements import in include instanceof interface is lambda let local loop match mod module mut
  namespace new nil None nonlocal not null nullptr of or override package pass private protected pub public raise
  readonly ref require return self Self static struct super switch template then this throw throws trait true True try
  type typedef typeof undefined union unless unsafe until use using val var virtual void volatile when where while with
  yield bool boolean byte char double float int integer list long map number short string str object`,
);
const SQL = words(
  `add all alter and as asc begin between by case commit create default delete desc distinct drop else end exists
  foreign from full group having in index inner insert into is join key left like limit not null offset on or order
  outer primary references right rollback select set table then union unique update values view when where with`,
);
const TOKENS = [
  /(?<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|`(?:[^`\\]|\\.)*`)/,
  /(?<number>\b(?:0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b)/,
  /(?<word>[\p{L}_$][\p{L}\p{N}_$]*)/u,
  /[\s\S]/,
];
/** Languages, what opens a block in them and how a comment begins → the one expression that matches at any place. */
const RULES = [
  [/^(html|xml|svg|vue)$/, /<!--/, /(?!)/],
  [
    /^(py|python|sh|bash|shell|zsh|console|rb|ruby|r|perl|pl|ya?ml|toml|make|makefile|dockerfile|julia|jl)?$/,
    /"""|'''/,
    /(?<![\w$])#.*/,
  ],
  [/^(sql|lua|haskell|hs|ada)$/, /\/\*/, /--.*/],
  [/^/, /\/\*/, /\/\/.*/],
].map(([languages, open, comment]) => {
  const parts = [`(?<open>${open.source})`, `(?<comment>${comment.source})`, ...TOKENS.map((token) => token.source)];
  return [languages, new RegExp(parts.join("|"), "yu")];
});
const CLOSING = { "/*": "*/", "<!--": "-->", '"""': '"""', "'''": "'''" };
const LONGEST = 2000; // characters; data rather than code
const PLAIN = /^(text|txt|plain|plaintext|output|log|md|markdown)$/;

/** Return `{element, update(lines, closed)}`. Unless the block is closed, its last line is still being written. */
export function codeBlock(language, lines, closed) {
  const code = make("code");
  let now;
  const head = make("div", { class: "code-head" }, make("span", {}, language), copyButton(() => now.join("\n")));
  const element = make("div", { class: "code" }, head, make("pre", { tabindex: "0" }, code));
  const name = language.toLowerCase();
  let done = 0; // complete lines, coloured for good
  let state = null;
  let partial;
  const update = (more, isClosed) => {
    now = more;
    partial?.remove();
    const complete = isClosed ? more.length : more.length - 1;
    for (; done < complete; done += 1) {
      const [nodes, after] = highlightLine(more[done], name, state);
      state = after;
      code.append(...nodes, "\n");
    }
    const rest = isClosed ? "" : (more.at(-1) ?? "");
    partial = make("span", {}, ...(PERHAPS_FENCE.test(rest) ? [] : highlightLine(rest, name, state)[0]));
    code.append(partial);
  };
  update(lines, closed);
  return { element, update };
}

/** Return `[nodes, state]` of one line of code; hand the state to the next line, and null to the first. */
function highlightLine(line, language, state) {
  if (PLAIN.test(language) || line.length > LONGEST) return [[line], state];
  const [, rules] = RULES.find(([languages]) => languages.test(language));
  const nodes = [];
  let plain = "";
  const paint = (kind, text) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(make("span", { class: `code-${kind}` }, text));
  };
  let at = 0;
  while (at < line.length) {
    if (state) {
      const end = line.indexOf(state.end, at);
      const to = end < 0 ? line.length : end + state.end.length;
      paint(state.kind, line.slice(at, to));
      at = to;
      if (end >= 0) state = null;
      continue;
    }
    rules.lastIndex = at;
    const found = rules.exec(line);
    const { open, comment, string, number, word } = found.groups;
    if (open) {
      state = { end: CLOSING[open], kind: open[0] === '"' || open[0] === "'" ? "string" : "comment" };
      paint(state.kind, open);
    } else if (comment) paint("comment", comment);
    else if (string) paint("string", string);
    else if (number) paint("number", number);
    else if (word && isReserved(word, language)) paint("word", word);
    else if (word && line[at + word.length] === "(") paint("call", word);
    else plain += found[0];
    at += found[0].length;
  }
  if (plain) nodes.push(plain);
  return [nodes, state];
}

function isReserved(word, language) {
  return language === "sql" ? SQL.has(word.toLowerCase()) : RESERVED.has(word);
}
