// One message on the page.

import { copyButton, icon, iconButton, make } from "./dom.js";
import { t } from "./i18n.js";
import { Growing } from "./markdown.js";

/** Return the element of what the user said; `onEdit(text)` gets it changed. */
export function userView(message, onEdit) {
  const body = make("div", { class: "said" }, message.content);
  const show = (...children) => article.replaceChildren(heading("you"), ...children);
  const edit = iconButton("edit", t("edit"), () => show(editor(message.content, close, onEdit)));
  const tools = make("div", { class: "tools" }, copyButton(() => message.content), edit);
  const article = make("article", { class: "user" });
  const close = () => {
    show(body, tools);
    edit.focus();
  };
  show(body, tools);
  return article;
}

function editor(text, close, onEdit) {
  const area = make("textarea", { "aria-label": t("edit_label"), rows: Math.min(12, text.split("\n").length + 1) });
  area.value = text;
  const submit = (event) => {
    event.preventDefault();
    if (area.value.trim()) onEdit(area.value.trim());
  };
  area.addEventListener("keydown", (event) => {
    if (isEnter(event)) submit(event);
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    }
  });
  requestAnimationFrame(() => area.focus());
  return make(
    "form",
    { class: "editor", onsubmit: submit },
    area,
    make(
      "div",
      { class: "buttons" },
      make("button", { type: "button", class: "wide", onclick: close }, t("cancel")),
      make("button", { type: "submit", class: "wide strong" }, t("resend")),
    ),
  );
}

/** Say whether this is the Enter that sends: not with Shift, and not the one that ends Chinese or Japanese input. */
export function isEnter(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

/** What the model answers, while it grows and after. */
export class AnswerView {
  #frame = 0;

  constructor(message, onAgain) {
    this.message = message;
    this.onAgain = onAgain;
    this.body = make("div", { class: "prose" });
    this.foot = make("div", { class: "foot" });
    this.element = make("article", { class: "assistant" }, heading("assistant"), this.body, this.foot);
    this.growing = new Growing(this.body);
  }

  /** Show that the answer is being written. */
  begin() {
    this.element.setAttribute("aria-busy", "true"); // read out when it is complete, not word by word
    this.foot.replaceChildren(make("span", { class: "waiting", title: t("thinking") }, make("i"), make("i"), make("i")));
    this.grow();
    return this;
  }

  /** Show the text as it is now, at most once per frame; then call `after`. */
  grow(after = () => {}) {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#show();
      after();
    });
  }

  /** Show the complete answer, and what became of it. */
  finish() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    this.#show();
    const { error, stopped, finish, stats, content } = this.message;
    const tools = make("div", { class: "tools" });
    if (content) tools.append(copyButton(() => content));
    const parts = [];
    if (error) {
      const sentence = t(`error_${error.kind}`, { status: error.status });
      const detail = error.detail ? [make("span", { class: "detail" }, error.detail)] : [];
      const retry = make("button", { type: "button", class: "wide again", onclick: this.onAgain }, icon("again"), t("retry"));
      parts.push(make("div", { class: "trouble" }, make("span", {}, sentence), ...detail, retry));
    } else tools.append(iconButton("again", t("regenerate"), this.onAgain, "again"));
    if (stopped) parts.push(make("span", { class: "note" }, t("stopped")));
    if (finish && finish !== "stop") {
      const word = finish === "length" ? "cut_length" : "cut_server";
      parts.push(make("span", { class: "note" }, t(word, { why: finish })));
    }
    if (stats) tools.append(make("span", { class: "note stats" }, t("stats", stats)));
    this.foot.replaceChildren(...parts, tools);
    this.element.setAttribute("aria-busy", "false");
    return this;
  }

  #show() {
    if (this.message.content) this.growing.grow(this.message.content);
  }
}

function heading(who) {
  return make("h2", { class: "unseen" }, t(who));
}

