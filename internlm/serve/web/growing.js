// A Markdown text that grows: finished blocks are made once and stay, only the last ones are made again.

import { codeBlock } from "./code.js";
import { blocks, renderBlock } from "./markdown.js";

/** Shows a text in an element. */
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
