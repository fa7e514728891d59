// What this page asks the gateway for, and what can come of it. The API key lives in this tab's sessionStorage alone.

const KEY = "splitserve.api-key";
const WITHIN_MS = 8000;

export class Refused extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status; // 0: nothing answered
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

// Paths are relative to where the page is, so that it works behind a proxy's prefix.
const here = (path) => new URL(path, document.baseURI);

function headers(more = {}) {
  const value = key.get();
  return value ? { ...more, Authorization: `Bearer ${value}` } : more;
}

async function refusal(response) {
  let sentence = `the gateway answered ${response.status}`;
  try {
    sentence = (await response.json()).error.message;
  } catch {
    // not the gateway's own words: a proxy's page
  }
  return new Refused(response.status, sentence);
}

async function answered(path, options) {
  let response;
  try {
    response = await fetch(here(path), { cache: "no-store", credentials: "omit", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, error.name === "TimeoutError" ? `no answer within ${WITHIN_MS / 1000} s` : "no answer");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

export async function state(router, requests) {
  const query = new URLSearchParams({ requests, ...(router ? { router } : {}) });
  const response = await answered(`console/api/state?${query}`, {
    headers: headers(),
    signal: AbortSignal.timeout(WITHIN_MS),
  });
  return response.json();
}

// Yields {text, tokens, timings} as the answer comes, over the same API as every client's.
export async function* generate({ mode, prompt, maxTokens, temperature, sloClass }, signal) {
  const asked = {
    max_tokens: maxTokens,
    temperature,
    slo_class: sloClass || undefined,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true, include_timings: true },
  };
  const chat = mode === "chat";
  const body = chat ? { ...asked, messages: [{ role: "user", content: prompt }] } : { ...asked, prompt };
  const response = await answered(chat ? "v1/chat/completions" : "v1/completions", {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify(body),
    signal,
  });
  yield { id: response.headers.get("x-request-id") };
  for await (const event of events(response.body)) yield heard(event);
}

function heard(event) {
  if (event.error) throw new Refused(event.error.code ?? 500, event.error.message);
  const choice = event.choices?.[0];
  return {
    text: choice?.text ?? choice?.delta?.content ?? "",
    reasoning: choice?.delta?.reasoning ?? "",
    finish: choice?.finish_reason ?? null,
    tokens: event.usage?.completion_tokens,
    promptTokens: event.usage?.prompt_tokens,
    timings: event.timings ?? null,
  };
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.replace(/^data: /, "");
        if (data && data !== "[DONE]") yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
