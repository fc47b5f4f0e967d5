// The settings sheet, and the dialog that asks for a key.

import { ApiError, listModels } from "./api.js";
import { byId, make } from "./dom.js";
import { LANGUAGES, t } from "./i18n.js";
import * as store from "./store.js";

const SLIDERS = ["temperature", "top_p", "max_tokens"];

/** Let the sheet change the settings. `actions` has system(text) and language(name). */
export function startSettings(actions) {
  for (const name of SLIDERS) {
    const slider = byId(name);
    slider.value = store.settings[name];
    const show = () => (document.querySelector(`output[for=${name}]`).textContent = slider.value);
    slider.addEventListener("input", () => {
      store.set(name, Number(slider.value));
      show();
    });
    show();
  }
  byId("system").addEventListener("input", (event) => actions.system(event.target.value));
  const languages = Object.entries(LANGUAGES).map(([value, name]) => make("option", { value }, name));
  byId("language").append(...languages);
  byId("language").addEventListener("change", (event) => actions.language(event.target.value));
  byId("theme").value = store.settings.theme;
  byId("theme").addEventListener("change", (event) => {
    store.set("theme", event.target.value);
    applyTheme();
  });
  byId("model").addEventListener("change", (event) => store.set("model", event.target.value));
  byId("open-settings").addEventListener("click", () => byId("settings").showModal());
  for (const button of document.querySelectorAll("[data-close]")) {
    button.addEventListener("click", () => byId(button.dataset.close).close());
  }
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it
  }
}

/** Make the page light or dark, or as the system is. */
export function applyTheme() {
  document.documentElement.dataset.theme = store.settings.theme;
}

/** Fill the list of models. Throws an ApiError. */
export async function loadModels() {
  const names = await listModels(store.readKey());
  if (!names.includes(store.settings.model)) store.set("model", names[0] ?? "");
  const options = names.map((name) => make("option", { value: name, selected: name === store.settings.model }, name));
  byId("model").replaceChildren(...options);
}

/** Ask for a key until one works; then call `done`. */
export function askKey(done) {
  const trouble = byId("key-trouble");
  trouble.hidden = true;
  byId("key-form").onsubmit = async (event) => {
    event.preventDefault();
    store.keepKey(byId("key").value.trim());
    try {
      await loadModels();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      trouble.textContent = error.detail || t(`error_${error.kind}`, error);
      trouble.hidden = false;
      return;
    }
    byId("key").value = "";
    byId("ask-key").close();
    done();
  };
  if (!byId("ask-key").open) byId("ask-key").showModal();
}
