// The button that copies a text.

import { dress, iconButton, make } from "./dom.js";
import { t } from "./i18n.js";

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
