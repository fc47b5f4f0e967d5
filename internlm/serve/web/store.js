// What the browser keeps: conversations and settings, in localStorage; the key only as long as the tab is open.
//
// Each conversation has an entry of its own, so two tabs do not overwrite each other's. Where the browser keeps
// nothing (private windows, storage full) everything works until the page is closed, and `onTrouble` is told once.

const CHAT = "internlm.chat.";
const SETTINGS = "internlm.settings";
const KEY = "internlm.key";

const DEFAULTS = {
  temperature: 0.8,
  top_p: 0.8,
  max_tokens: 2048,
  system: "",
  model: "",
  language: "",
  theme: "system",
};

let onTrouble = () => {};
const chats = new Map();

/** Read everything; `trouble()` is called when something can no longer be kept. */
export function open(trouble) {
  onTrouble = () => {
    onTrouble = () => {};
    trouble();
  };
  for (const name of attempt(() => Object.keys(localStorage)) ?? []) {
    const chat = name.startsWith(CHAT) && readJson(name);
    if (isChat(chat)) chats.set(chat.id, chat);
  }
}

/** Return the conversations, the last changed first. */
export function list() {
  return [...chats.values()].sort((a, b) => b.changed - a.changed);
}

/** Return a conversation, or undefined. */
export const get = (id) => chats.get(id);

/** Return a new conversation; it is kept from its first message on. */
export function create(system) {
  const now = Date.now();
  const random = Math.random().toString(36).slice(2, 10);
  return { id: `${now.toString(36)}-${random}`, title: "", system, created: now, changed: now, messages: [] };
}

/** Keep a conversation as it is now. */
export function save(chat, { touch = true } = {}) {
  if (touch) chat.changed = Date.now();
  chats.set(chat.id, chat);
  write(CHAT + chat.id, chat);
}

/** Forget a conversation. */
export function remove(id) {
  chats.delete(id);
  attempt(() => localStorage.removeItem(CHAT + id));
}

/** Tell `changed(id)` when another tab changed a conversation. */
export function watch(changed) {
  window.addEventListener("storage", (event) => {
    if (!event.key?.startsWith(CHAT)) return;
    const chat = event.newValue && attempt(() => JSON.parse(event.newValue));
    const id = event.key.slice(CHAT.length);
    if (isChat(chat)) chats.set(id, chat);
    else chats.delete(id);
    changed(id);
  });
}

/** The settings; change with `set`. */
export const settings = { ...DEFAULTS };

/** Read the settings; unknown or damaged ones keep their default. */
export function readSettings() {
  const found = readJson(SETTINGS) ?? {};
  for (const [name, usual] of Object.entries(DEFAULTS)) {
    if (typeof found[name] === typeof usual) settings[name] = found[name];
  }
}

/** Change a setting and keep it. */
export function set(name, value) {
  settings[name] = value;
  write(SETTINGS, settings);
}

/** Return the API key of this tab. */
export const readKey = () => attempt(() => sessionStorage.getItem(KEY)) ?? "";

/** Keep the API key until the tab is closed. */
export function keepKey(key) {
  attempt(() => sessionStorage.setItem(KEY, key));
}

function isChat(value) {
  const texts = [value?.id, value?.title, value?.system].every((text) => typeof text === "string");
  const times = [value?.created, value?.changed].every((time) => typeof time === "number" && !isNaN(new Date(time)));
  return texts && times && Array.isArray(value.messages) && value.messages.every(isMessage);
}

function isMessage(value) {
  return typeof value?.content === "string" && (value.role === "user" || value.role === "assistant");
}

/** Return what was said, as the server is to see it: without questions that got no answer, because templates want pairs. */
export function spoken({ system, messages }) {
  const kept = messages.filter((message, i) => message.content && (message.role !== "user" || messages[i + 1]?.content !== ""));
  const said = kept.map(({ role, content }) => ({ role, content }));
  return system.trim() ? [{ role: "system", content: system.trim() }, ...said] : said;
}

const readJson = (name) => attempt(() => JSON.parse(localStorage.getItem(name)));

function write(name, value) {
  if (attempt(() => (localStorage.setItem(name, JSON.stringify(value)), true)) === undefined) onTrouble();
}

function attempt(action) {
  try {
    return action();
  } catch {
    return undefined;
  }
}
