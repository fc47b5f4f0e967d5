// The list of conversations: open, rename, delete; on a phone it slides over the page.

import { byId, iconButton, make } from "./dom.js";
import { t } from "./i18n.js";
import * as store from "./store.js";

/** Draw the list. `actions` has open, renamed and removed; `running` is the conversation being answered. */
export function drawChats(current, running, actions) {
  const chats = store.list();
  byId("no-chats").hidden = chats.length > 0;
  byId("chats").replaceChildren(...chats.map((chat) => row(chat, chat.id === current.id, chat === running, actions)));
}

function row(chat, isCurrent, isRunning, actions) {
  const open = make(
    "button",
    { type: "button", class: "open", "aria-current": isCurrent ? "page" : null, onclick: () => actions.open(chat) },
    chat.title,
  );
  const edit = iconButton("edit", t("rename"), () => rename(item, chat, actions), "tool");
  const trash = iconButton("trash", t("delete"), () => askDelete(chat, actions), "tool");
  const item = make("li", { class: isRunning ? "running" : null }, open, edit, trash);
  return item;
}

function rename(item, chat, actions) {
  const input = make("input", { type: "text", "aria-label": t("rename"), maxlength: 120 });
  input.value = chat.title;
  let done = false;
  const finish = (keep) => {
    if (done) return;
    done = true;
    const title = input.value.trim();
    if (keep && title && title !== chat.title) {
      chat.title = title;
      store.save(chat, { touch: false });
    }
    actions.renamed(chat);
  };
  input.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter" || event.key === "Escape") finish(event.key === "Enter");
    event.stopPropagation();
  });
  input.addEventListener("blur", () => finish(true));
  item.replaceChildren(input);
  input.select();
}

function askDelete(chat, actions) {
  const dialog = byId("confirm");
  byId("confirm-question").textContent = t("delete_question", { title: chat.title });
  byId("confirm-delete").onclick = () => {
    dialog.close();
    store.remove(chat.id);
    actions.removed(chat);
  };
  dialog.showModal();
}

/** Slide the list in or out; only on a narrow page can one see a difference. */
export function showSidebar(open) {
  const wasOpen = document.body.classList.contains("sidebar-open");
  document.body.classList.toggle("sidebar-open", open);
  byId("main").inert = open;
  byId("open-sidebar").setAttribute("aria-expanded", String(open));
  if (open) byId("new-chat").focus();
  else if (wasOpen) byId("open-sidebar").focus();
}
