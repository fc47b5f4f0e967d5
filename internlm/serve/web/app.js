// The page: which conversation is shown, and the one answer that may be on its way.

import { ApiError, streamChat } from "./api.js";
import { byId, dress, make } from "./dom.js";
import { firstLanguage, t, useLanguage } from "./i18n.js";
import { AnswerView, isEnter, userView } from "./messages.js";
import { applyTheme, askKey, loadModels, startSettings } from "./settings.js";
import { drawChats, showSidebar } from "./sidebar.js";
import * as store from "./store.js";

let chat; // the conversation on the page
let turn = null; // the answer being written: {chat, message, view, controller}
let views = new WeakMap(); // message of the conversation → its element: a long one is not drawn anew for each question

// ---- showing ----

function openChat(next) {
  if (chat !== next) views = new WeakMap();
  chat = next;
  history.replaceState(null, "", store.get(chat.id) ? `#${chat.id}` : location.pathname + location.search);
  showSidebar(false);
  draw();
  scrollToEnd();
  if (matchMedia("(hover: hover)").matches) byId("input").focus(); // no keyboard that jumps up on a phone
}

function newChat() {
  openChat(store.create(store.settings.system));
}

function draw() {
  drawLog();
  byId("welcome").hidden = chat.messages.length > 0;
  byId("open-export").disabled = chat.messages.length === 0;
  byId("system").value = chat.system;
  drawTitle();
  drawSend();
}

/** Show the messages. Elements that are in their place stay there, so that the browser lays out the new ones only. */
function drawLog() {
  const log = byId("log");
  chat.messages.map(viewOf).forEach((element, i) => {
    if (log.children[i] !== element) log.insertBefore(element, log.children[i] ?? null);
  });
  while (log.children.length > chat.messages.length) log.lastChild.remove();
}

function drawTitle() {
  document.title = chat.title ? `${chat.title} · InternLM` : "InternLM";
  drawList();
}

function viewOf(message, index) {
  if (!views.has(message)) views.set(message, newView(message, index));
  return views.get(message);
}

function newView(message, index) {
  if (message === turn?.message) return turn.view.element;
  if (message.role === "user") return userView(message, (text) => ask(text, index));
  return new AnswerView(message, again).finish().element;
}

function drawList() {
  drawChats(chat, turn?.chat, {
    open: openChat,
    renamed: drawTitle,
    removed(gone) {
      if (gone === turn?.chat) stop();
      if (gone.id === chat.id) newChat();
      else drawList();
    },
  });
}

function drawSend() {
  const word = turn ? "stop" : "send";
  const button = dress(byId("send"), word, t(word));
  button.disabled = !turn && !byId("input").value.trim();
}

/** Scroll to the end, and for some frames again: messages that come into sight get their true height then. */
function scrollToEnd(frames = 2) {
  byId("scroll").scrollTop = byId("scroll").scrollHeight;
  if (frames) requestAnimationFrame(() => scrollToEnd(frames - 1));
}

/** Follow the end of the conversation, unless the reader has scrolled away from it. */
function follower() {
  const scroll = byId("scroll");
  const atEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
  return () => {
    if (atEnd) scroll.scrollTop = scroll.scrollHeight;
  };
}

// ---- asking and answering ----

/** Say something as message `index`; what followed it before is gone. */
function ask(text, index = chat.messages.length) {
  if (turn) return;
  chat.messages.length = index;
  chat.messages.push({ role: "user", content: text });
  chat.title ||= text.split("\n")[0].slice(0, 60);
  answer();
}

/** Answer the last message of the user again. */
function again() {
  if (turn) return;
  if (chat.messages.at(-1)?.role === "assistant") chat.messages.pop();
  answer();
}

function stop() {
  turn?.controller.abort();
}

async function answer() {
  const { model, temperature, top_p, max_tokens } = store.settings;
  const body = { messages: store.spoken(chat), temperature, top_p, max_tokens, ...(model && { model }) };
  const message = { role: "assistant", content: "" };
  const view = new AnswerView(message, again).begin();
  const mine = { chat, message, view, controller: new AbortController() };
  chat.messages.push(message);
  store.save(chat);
  turn = mine;
  openChat(chat);
  byId("status").textContent = t("announce_writing");
  try {
    await receive(body, mine);
  } catch (error) {
    if (error.name === "AbortError") message.stopped = true;
    else if (error instanceof ApiError) message.error = { kind: error.kind, detail: error.detail, status: error.status };
    else throw error;
  } finally {
    turn = null;
    if (store.get(mine.chat.id)) store.save(mine.chat);
    const follow = follower();
    view.finish();
    if (chat === mine.chat) follow();
    drawList();
    drawSend();
    byId("status").textContent = message.error ? t(`error_${message.error.kind}`, message.error) : t("announce_done");
  }
  if (message.error?.kind === "key" && chat === mine.chat) askKey(again);
  if (message.error?.status === 404) connect(); // it serves another model now: "try again" is to name that
}

async function receive(body, { chat: own, message, view, controller }) {
  let first = 0;
  for await (const event of streamChat(body, { key: store.readKey(), signal: controller.signal })) {
    if (event.text) {
      first ||= performance.now();
      message.content += event.text;
      const follow = follower();
      view.grow(() => chat === own && follow());
    }
    if (event.finish) message.finish = event.finish;
    if (event.usage?.completion_tokens > 1 && first) {
      const tokens = event.usage.completion_tokens;
      const speed = (tokens - 1) / Math.max(0.001, (performance.now() - first) / 1000);
      message.stats = { tokens, speed: speed < 10 ? speed.toFixed(1) : Math.round(speed) };
    }
  }
}

// ---- a conversation as a file ----

/** Save the conversation as JSON: `messages` as OpenAI's protocol and training data have them. */
function exportJson() {
  const created = new Date(chat.created).toISOString();
  const file = { title: chat.title, created, model: store.settings.model, messages: store.spoken(chat) };
  download("json", "application/json", JSON.stringify(file, null, 2));
}

function exportMarkdown() {
  const parts = store.spoken(chat).map(({ role, content }) => `## ${t(role === "user" ? "you" : role)}\n\n${content}`);
  download("md", "text/markdown", [`# ${chat.title}`, ...parts].join("\n\n"));
}

function download(ending, type, text) {
  byId("export").hidePopover();
  const name = chat.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "chat";
  const url = URL.createObjectURL(new Blob([text, "\n"], { type }));
  make("a", { href: url, download: `${name}.${ending}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// ---- starting ----

function speak(language) {
  store.set("language", language);
  useLanguage(language);
  views = new WeakMap();
  draw();
}

function fitInput() {
  const input = byId("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  drawSend();
}

function submit(event) {
  event.preventDefault();
  const text = byId("input").value.trim();
  if (turn) {
    if (event.type === "submit") stop(); // the button says Stop now; Enter does not
  } else if (text) {
    byId("input").value = "";
    fitInput();
    ask(text);
  }
}

async function connect() {
  byId("trouble").hidden = true;
  try {
    await loadModels();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.kind === "key") askKey(() => {});
    else showTrouble([t(`error_${error.kind}`, error), error.detail].join(" "), true);
  }
}

/** Show above the conversation what is wrong with the page as a whole. */
function showTrouble(sentence, canConnect) {
  byId("trouble").firstElementChild.textContent = sentence;
  byId("connect").hidden = !canConnect;
  byId("trouble").hidden = false;
}

function listen() {
  byId("composer").addEventListener("submit", submit);
  byId("input").addEventListener("input", fitInput);
  byId("input").addEventListener("keydown", (event) => isEnter(event) && submit(event));
  byId("connect").addEventListener("click", connect);
  byId("new-chat").addEventListener("click", newChat);
  byId("open-sidebar").addEventListener("click", () => showSidebar(true));
  byId("shade").addEventListener("click", () => showSidebar(false));
  byId("export-json").addEventListener("click", exportJson);
  byId("export-markdown").addEventListener("click", exportMarkdown);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open], :popover-open")) return;
    if (document.body.classList.contains("sidebar-open")) showSidebar(false);
    else stop();
  });
  window.addEventListener("pagehide", () => {
    if (!turn) return;
    turn.message.stopped = true;
    store.save(turn.chat);
  });
}

store.readSettings();
applyTheme();
const language = firstLanguage(store.settings.language);
useLanguage(language);
store.open(() => showTrouble(t("error_storage"), false));
startSettings({
  system(text) {
    chat.system = text;
    store.set("system", text);
    if (store.get(chat.id)) store.save(chat, { touch: false });
  },
  language: speak,
});
byId("language").value = language;
listen();
store.watch((id) => {
  if (id === chat.id && !turn) {
    chat = store.get(id) ?? chat;
    draw();
  } else drawList();
});
openChat(store.get(location.hash.slice(1)) ?? store.create(store.settings.system));
connect();
