// The server: OpenAI's protocol, same origin. Answers come as server-sent events.

/** What went wrong: `kind` is offline, key, busy, refused, failed or cut; `detail` is the server's own sentence. */
export class ApiError extends Error {
  constructor(kind, detail = "", status = 0) {
    super(detail || kind);
    Object.assign(this, { kind, detail, status });
  }
}

/** Return the names of the models. */
export async function listModels(key) {
  const response = await request("v1/models", { key });
  const body = parse(await textOf(response));
  if (!Array.isArray(body.data)) throw new ApiError("failed", messageOf(body), response.status);
  return body.data.map((model) => String(model?.id));
}

/**
 * Yield `{text}`, and at the end `{finish}` and `{usage}`, of one answer.
 *
 * Throws an ApiError; an AbortError when the signal stops it, which also tells the server to stop.
 */
export async function* streamChat(body, { key, signal }) {
  const response = await request("v1/chat/completions", {
    key,
    signal,
    body: { ...body, stream: true, stream_options: { include_usage: true } },
  });
  let finished = false;
  for await (const data of readEvents(response, signal)) {
    if (data === "[DONE]") return;
    const chunk = parse(data);
    if (chunk.error) throw new ApiError("failed", messageOf(chunk), 200);
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) {
      finished = true;
      yield { finish: choice.finish_reason };
    }
    if (chunk.usage) yield { usage: chunk.usage };
  }
  if (!finished) throw new ApiError("cut");
}

async function request(path, { key, signal, body }) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${inBytes(key)}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    const method = body ? "POST" : "GET";
    response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body), cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError("offline");
  }
  if (response.ok) return response;
  const text = await textOf(response);
  const kinds = { 401: "key", 403: "key", 429: "busy", 503: "busy" };
  const kind = kinds[response.status] ?? (response.status < 500 ? "refused" : "failed");
  throw new ApiError(kind, messageOf(parse(text)) || response.statusText, response.status);
}

/** Return a text whose characters are its bytes in UTF-8: a header can hold no others. */
function inBytes(text) {
  return String.fromCharCode(...new TextEncoder().encode(text));
}

/** Return the body, "" of a response that breaks off. */
function textOf(response) {
  return response.text().catch(() => "");
}

function parse(text) {
  try {
    return JSON.parse(text) ?? {};
  } catch {
    return {}; // a proxy's page, not the server's own answer
  }
}

function messageOf(body) {
  const error = body?.error?.message ?? body?.error ?? body?.message ?? "";
  return typeof error === "string" ? error : JSON.stringify(error);
}

/** Yield the data of each event; lines may end in any way and arrive in any pieces. */
async function* readEvents(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        throw signal?.aborted ? error : new ApiError("cut");
      }
      if (part.done) return;
      const lines = (rest + part.value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
