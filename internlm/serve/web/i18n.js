// The page's own words, in the reader's language.

/** The languages and how each calls itself. */
export const LANGUAGES = { en: "English", zh: "中文", ja: "日本語" };

/** Every sentence, in each of them. */
export const WORDS = {
  new_chat: ["New chat", "新对话", "新しい会話"],
  chats: ["Conversations", "对话", "会話"],
  no_chats: ["Nothing yet", "暂无对话", "まだありません"],
  open_chats: ["Conversations", "对话列表", "会話の一覧"],
  rename: ["Rename", "重命名", "名前を変更"],
  delete: ["Delete", "删除", "削除"],
  delete_question: [
    "Delete “{title}”? It cannot be brought back.",
    "删除“{title}”？删除后无法恢复。",
    "「{title}」を削除しますか？元に戻せません。",
  ],
  cancel: ["Cancel", "取消", "キャンセル"],
  settings: ["Settings", "设置", "設定"],
  close: ["Close", "关闭", "閉じる"],
  export: ["Export", "导出", "書き出し"],
  export_json: ["As JSON", "导出为 JSON", "JSON で書き出す"],
  export_markdown: ["As Markdown", "导出为 Markdown", "Markdown で書き出す"],
  model: ["Model", "模型", "モデル"],
  system: ["System prompt", "系统提示词", "システムプロンプト"],
  system_hint: ["How the model should behave", "希望模型如何回答", "モデルの振る舞い"],
  system_note: ["For this conversation and new ones.", "用于当前对话和新对话。", "この会話と新しい会話に使われます。"],
  temperature: ["Temperature", "温度", "温度"],
  temperature_note: [
    "0 always takes the likeliest word; higher is more varied.",
    "0 总是选择概率最高的词；越高越多样。",
    "0 は常に最も確率の高い語を選び、高いほど多様になります。",
  ],
  top_p: ["Top p", "Top p", "Top p"],
  top_p_note: [
    "Only the likeliest words that together have this probability.",
    "只从累计概率达到此值的词中选择。",
    "累積確率がこの値に達するまでの語から選びます。",
  ],
  max_tokens: ["Max tokens", "最大 token 数", "最大トークン数"],
  max_tokens_note: ["The longest an answer may get.", "单次回答的长度上限。", "一回の回答の長さの上限です。"],
  language: ["Language", "语言", "言語"],
  theme: ["Appearance", "外观", "外観"],
  theme_system: ["As the system", "跟随系统", "システムに合わせる"],
  theme_light: ["Light", "浅色", "ライト"],
  theme_dark: ["Dark", "深色", "ダーク"],
  key: ["API key", "API 密钥", "API キー"],
  key_note: ["Kept until this tab is closed.", "仅保留到关闭此标签页为止。", "このタブを閉じるまで保持されます。"],
  use_key: ["Use this key", "使用此密钥", "このキーを使う"],
  write: ["Message", "消息", "メッセージ"],
  write_hint: ["Ask something", "输入问题", "質問を入力"],
  keys_note: [
    "Enter sends, Shift+Enter starts a new line, Esc stops",
    "Enter 发送，Shift+Enter 换行，Esc 停止",
    "Enter で送信、Shift+Enter で改行、Esc で停止",
  ],
  send: ["Send", "发送", "送信"],
  stop: ["Stop", "停止", "停止"],
  copy: ["Copy", "复制", "コピー"],
  copied: ["Copied", "已复制", "コピーしました"],
  copy_failed: ["The browser did not let us copy", "浏览器不允许复制", "ブラウザーがコピーを許可しませんでした"],
  edit: ["Edit", "编辑", "編集"],
  edit_label: ["Edit your message", "编辑消息", "メッセージを編集"],
  resend: ["Send again", "重新发送", "送信し直す"],
  regenerate: ["Answer again", "重新回答", "もう一度回答"],
  retry: ["Try again", "重试", "再試行"],
  conversation: ["Conversation", "对话内容", "会話の内容"],
  you: ["You", "你", "あなた"],
  assistant: ["Model", "模型", "モデル"],
  welcome: ["What would you like to know?", "想了解些什么？", "何を知りたいですか？"],
  welcome_note: [
    "The model runs on the machine that serves this page. It can be wrong.",
    "模型运行在提供本页面的机器上，回答可能有误。",
    "モデルはこのページを配信している機械で動いています。回答は誤ることがあります。",
  ],
  thinking: ["The model is reading", "模型正在阅读", "モデルが読んでいます"],
  announce_writing: ["The answer is being written", "正在回答", "回答を書いています"],
  announce_done: ["The answer is complete", "回答完毕", "回答が完了しました"],
  stopped: ["Stopped.", "已停止。", "停止しました。"],
  cut_length: ["The answer reached the token limit.", "回答已达到 token 上限。", "回答がトークン数の上限に達しました。"],
  cut_server: [
    "The server ended the answer early ({why}).",
    "服务器提前结束了回答（{why}）。",
    "サーバーが回答を途中で終えました（{why}）。",
  ],
  stats: [
    "{tokens} tokens · {speed} per second",
    "{tokens} 个 token · 每秒 {speed} 个",
    "{tokens} トークン · 毎秒 {speed}",
  ],
  error_offline: ["The server cannot be reached.", "无法连接服务器。", "サーバーに接続できません。"],
  error_key: ["The server asks for an API key.", "服务器需要 API 密钥。", "サーバーが API キーを求めています。"],
  error_busy: [
    "The server is busy. Wait a moment and try again.",
    "服务器繁忙，请稍后重试。",
    "サーバーが混み合っています。少し待って再試行してください。",
  ],
  error_refused: [
    "The server refused the request ({status}).",
    "服务器拒绝了请求（{status}）。",
    "サーバーが要求を拒否しました（{status}）。",
  ],
  error_failed: ["The server failed while answering.", "服务器在回答时出错。", "回答中にサーバーでエラーが起きました。"],
  error_cut: [
    "The connection broke before the answer was complete.",
    "回答完成之前连接已中断。",
    "回答が完了する前に接続が切れました。",
  ],
  error_storage: [
    "The browser keeps no more: this conversation lasts until the page is closed.",
    "浏览器无法再保存：此对话只保留到页面关闭。",
    "ブラウザーにこれ以上保存できません。この会話はページを閉じるまで残ります。",
  ],
};
let column = 0;

/** Return the language to start with: the one chosen before, else the first that the browser asks for and we have. */
export function firstLanguage(chosen) {
  const wanted = [chosen, ...navigator.languages].map((language) => language.slice(0, 2).toLowerCase());
  return wanted.find((language) => language in LANGUAGES) ?? "en";
}

/** Speak a language from now on, in everything of the document that is marked. */
export function useLanguage(language) {
  column = Object.keys(LANGUAGES).indexOf(language);
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
  return (WORDS[name]?.[column] ?? name).replace(/\{(\w+)\}/g, (_, key) => values[key]);
}
