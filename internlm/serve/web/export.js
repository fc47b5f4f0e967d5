// A conversation as a file.

import { make } from "./dom.js";
import { t } from "./i18n.js";
import { spoken } from "./store.js";

/** Save a conversation as JSON: `messages` as OpenAI's protocol and training data have them. */
export function exportJson(chat, model) {
  const messages = spoken(chat);
  const created = new Date(chat.created).toISOString();
  save(chat, "json", "application/json", `${JSON.stringify({ title: chat.title, created, model, messages }, null, 2)}\n`);
}

/** Save a conversation as Markdown. */
export function exportMarkdown(chat) {
  const names = { system: "system", user: "you", assistant: "assistant" };
  const parts = spoken(chat).map(({ role, content }) => `## ${t(names[role])}\n\n${content}`);
  parts.unshift(`# ${chat.title}`);
  save(chat, "md", "text/markdown", `${parts.join("\n\n")}\n`);
}

function save(chat, ending, type, text) {
  const name = chat.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "chat";
  const url = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: url, download: `${name}.${ending}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
