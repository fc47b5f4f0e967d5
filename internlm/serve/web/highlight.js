// Colours for code of any language: comments, strings, numbers, words that most languages reserve.
//
// One line at a time, so that code can be coloured while it is written; what reaches over lines (block comments,
// triple quotes) is the state that one line hands to the next.

import { make } from "./dom.js";

const WORDS = new Set(
  `abstract and as assert async await begin break case catch class const continue def default defer del delete do elif
  else elseif end enum except export extends extern false False final finally fn for foreach from func function global
  go goto if impl implements import in include instanceof interface is lambda let local loop match mod module mut
  namespace new nil None nonlocal not null nullptr of or override package pass private protected pub public raise
  readonly ref require return self Self static struct super switch template then this throw throws trait true True try
  type typedef typeof undefined union unless unsafe until use using val var virtual void volatile when where while with
  yield bool boolean byte char double float int integer list long map number short string str object`.split(/\s+/),
);
const SQL = new Set(
  `add all alter and as asc begin between by case commit create default delete desc distinct drop else end exists
  foreign from full group having in index inner insert into is join key left like limit not null offset on or order
  outer primary references right rollback select set table then union unique update values view when where with`.split(
    /\s+/,
  ),
);
const HASH = /^(py|python|sh|bash|shell|zsh|console|rb|ruby|r|perl|pl|ya?ml|toml|make|makefile|dockerfile|julia|jl)?$/;
const DASHES = /^(sql|lua|haskell|hs|ada)$/;
const MARKUP = /^(html|xml|svg|vue)$/;
const LONGEST = 2000; // characters; data rather than code
const PLAIN = /^(text|txt|plain|plaintext|output|log|md|markdown)$/;

/** Return `[nodes, state]` of one line of code; hand the state to the next line, and null to the first. */
export function highlightLine(line, language, state) {
  if (PLAIN.test(language) || line.length > LONGEST) return [[line], state];
  const rules = rulesOf(language);
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

const CLOSING = { "/*": "*/", "<!--": "-->", '"""': '"""', "'''": "'''" };

function isReserved(word, language) {
  return language === "sql" ? SQL.has(word.toLowerCase()) : WORDS.has(word);
}

const compiled = new Map();

/** Return the one expression that always matches something at its position. */
function rulesOf(language) {
  const [open, comment] = MARKUP.test(language)
    ? ["<!--", "(?!)"]
    : HASH.test(language)
      ? ["\"\"\"|'''", "(?<![\\w$])#.*"]
      : ["\\/\\*", DASHES.test(language) ? "--.*" : "\\/\\/.*"];
  if (!compiled.has(open + comment)) {
    const source = [
      `(?<open>${open})`,
      `(?<comment>${comment})`,
      "(?<string>\"(?:[^\"\\\\]|\\\\.)*\"|'(?:[^'\\\\]|\\\\.)*'|`(?:[^`\\\\]|\\\\.)*`)",
      "(?<number>\\b(?:0[xXbBoO][\\da-fA-F_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)\\b)",
      "(?<word>[\\p{L}_$][\\p{L}\\p{N}_$]*)",
      "[\\s\\S]",
    ];
    compiled.set(open + comment, new RegExp(source.join("|"), "yu"));
  }
  return compiled.get(open + comment);
}
