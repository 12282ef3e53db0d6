// Runs the cases of stdin with the official `openai` package, and prints what it saw of each, one JSON a line.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const { url, keys, cases } = JSON.parse(readFileSync(0, "utf8"));

function call(client, kind, body, options) {
  const { id, path, ...rest } = body;
  switch (kind) {
    case "chat":
      return client.chat.completions.create(rest, options);
    case "completions":
      return client.completions.create(rest, options);
    case "responses":
      return client.responses.create(rest, options);
    case "responses.retrieve":
      return client.responses.retrieve(id, {}, options);
    case "responses.delete":
      return client.responses.delete(id, options);
    case "models.list":
      return client.models.list(options);
    case "models.retrieve":
      return client.models.retrieve(id, options);
    case "embeddings":
      return client.embeddings.create(rest, options);
    case "post":
      return client.post(path, { body: {}, ...options });
  }
}

async function observe(one) {
  const seen = { name: one.name, requests: 0, status: null, headers: {}, answer: null, events: [], error: null };
  const client = new OpenAI({
    baseURL: one.base_url ?? `${url}/v1`,
    apiKey: keys[one.key ?? "admin"],
    maxRetries: one.retries ?? 0,
    timeout: one.timeout_ms ?? 20000,
    fetch: async (target, init) => {
      seen.requests += 1;
      const response = await fetch(target, init);
      seen.status = response.status;
      seen.headers = Object.fromEntries(response.headers);
      return response;
    },
  });
  try {
    const body = { ...one.with, ...one.extra };
    const { data } = await call(client, one.call, body, { headers: one.headers ?? {} }).withResponse();
    if (body.stream) {
      for await (const event of data) {
        seen.events.push(event);
        if (seen.events.length === one.leave_after) break;
      }
    } else {
      seen.answer = one.call === "models.list" ? { data: data.data } : data;
    }
  } catch (error) {
    const { status, code, param, type, message } = error;
    seen.error = { class: error.constructor.name, status, code, param, type, message };
  }
  return seen;
}

for (const one of cases) console.log(JSON.stringify(await observe(one)));
