// Building the page: elements and text nodes, never HTML source.

import { t } from "./i18n.js";

/** Return an element with attributes (`onclick` and the like: listeners) and children (elements or strings). */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

/** Return the element of index.html with this id. */
export const byId = (id) => document.getElementById(id);

/** Return one of the icons of icons.svg, hidden from screen readers: the button around it has the name. */
export function icon(name) {
  const [svg, use] = ["svg", "use"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `icons.svg#${name}`);
  svg.append(use);
  return svg;
}

/** Give a button an icon, and a name for screen readers and for who points at it; return it. */
export function dress(button, name, label) {
  button.replaceChildren(icon(name));
  button.setAttribute("aria-label", label);
  button.title = label;
  return button;
}

/** Return a button that shows an icon. */
export function iconButton(name, label, onclick, kind = "") {
  return dress(make("button", { type: "button", class: `quiet ${kind}`, onclick }), name, label);
}

/** Return a button that copies what `text()` returns. */
export function copyButton(text) {
  const button = iconButton("copy", t("copy"), async () => {
    if (await copy(text())) dress(button, "check", t("copied"));
    else dress(button, "close", t("copy_failed"));
    setTimeout(() => dress(button, "copy", t("copy")), 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Plain http on another host than localhost has no clipboard: the old way through a selection.
    const area = make("textarea", { class: "unseen" });
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}
