// The page's own words, in the reader's language.

import en from "./i18n/en.js";
import ja from "./i18n/ja.js";
import zh from "./i18n/zh.js";

const TABLES = { en, zh, ja };
let words = en;

/** The languages and how each calls itself. */
export const LANGUAGES = { en: "English", zh: "中文", ja: "日本語" };

/** Return the language to start with: the one chosen before, else the first that the browser asks for and we have. */
export function firstLanguage(chosen) {
  const wanted = [chosen, ...navigator.languages].map((language) => language.slice(0, 2).toLowerCase());
  return wanted.find((language) => language in TABLES) ?? "en";
}

/** Speak a language from now on, in everything of the document that is marked. */
export function useLanguage(language) {
  words = TABLES[language];
  document.documentElement.lang = language === "zh" ? "zh-Hans" : language;
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = t(element.dataset.text);
  for (const element of document.querySelectorAll("[data-hint]")) element.placeholder = t(element.dataset.hint);
  for (const element of document.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", t(element.dataset.label));
    if (element.tagName === "BUTTON") element.title = t(element.dataset.label);
  }
}

/** Return a sentence; `{name}` in it stands for a value. One that is not known (kept by another version) is its name. */
export function t(name, values = {}) {
  return (words[name] ?? name).replace(/\{(\w+)\}/g, (_, key) => values[key]);
}
