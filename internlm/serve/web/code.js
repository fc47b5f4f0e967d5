// A block of code: its language, a copy button, and lines coloured as they come.

import { copyButton } from "./copy.js";
import { make } from "./dom.js";
import { highlightLine } from "./highlight.js";

const PERHAPS_FENCE = /^ {0,3}(`+|~+)$/;

/** Return `{element, update(lines, closed)}`. Unless the block is closed, its last line is still being written. */
export function codeBlock(language, lines, closed) {
  const code = make("code");
  let now = lines;
  const head = make("div", { class: "code-head" }, make("span", {}, language), copyButton(() => now.join("\n")));
  const element = make("div", { class: "code" }, head, make("pre", { tabindex: "0" }, code));
  const name = language.toLowerCase();
  let done = 0; // complete lines, coloured for good
  let state = null;
  let partial = null;
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
