// The button that copies a text.

import { icon, make } from "./dom.js";
import { t } from "./i18n.js";

/** Return a button that copies what `text()` returns. */
export function copyButton(text) {
  const button = make("button", { type: "button", class: "quiet", "aria-label": t("copy"), title: t("copy") }, icon("copy"));
  button.addEventListener("click", async () => {
    const copied = await copy(text());
    button.replaceChildren(icon(copied ? "check" : "close"));
    button.title = t(copied ? "copied" : "copy_failed");
    button.setAttribute("aria-label", button.title);
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.title = t("copy");
      button.setAttribute("aria-label", button.title);
    }, 1500);
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
