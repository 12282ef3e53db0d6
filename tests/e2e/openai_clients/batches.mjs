// Uploads a batch, polls it, reads its answers and errors, lists and cancels: with the official package for Node.
// Reads {url, key, input} and writes what it saw as one line of JSON.
import OpenAI, { toFile } from "openai";
import { text } from "node:stream/consumers";

const { url, key, input, wrong } = JSON.parse(await text(process.stdin));
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0, timeout: 20000 });

async function ended(id) {
  for (;;) {
    const batch = await client.batches.retrieve(id);
    if (["completed", "failed", "expired", "cancelled"].includes(batch.status)) return batch;
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

async function run(content) {
  // The file first, as its guide has it.
  const file = await client.files.create({ file: await toFile(Buffer.from(content), "in.jsonl"), purpose: "batch" });
  const batch = await client.batches.create({
    input_file_id: file.id,
    endpoint: "/v1/chat/completions",
    completion_window: "24h",
    metadata: { from: "node" },
  });
  return ended(batch.id);
}

async function lines(id) {
  if (!id) return [];
  const response = await client.files.content(id);
  return (await response.text()).trim().split("\n").map((line) => JSON.parse(line));
}

const batch = await run(input);
const listed = [];
for await (const each of client.batches.list({ limit: 1 })) listed.push(each.id);
const seen = {
  batch,
  output: await lines(batch.output_file_id),
  errors: await lines(batch.error_file_id),
  listed: listed.includes(batch.id),
  wrong: await run(wrong),
};
const deleted = await client.files.delete(batch.input_file_id);
seen.deleted = deleted.deleted;
try {
  await client.files.retrieve(batch.input_file_id);
} catch (error) {
  seen.gone = error.constructor.name;
}
try {
  await client.batches.cancel(batch.id);
} catch (error) {
  seen.conflict = error.constructor.name;
}
console.log(JSON.stringify(seen));
