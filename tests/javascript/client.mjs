// OpenAI's client for JavaScript against a running server. tests/python/clients.py starts the server and this script.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { VERSION } from "openai/version";

const client = new OpenAI({ maxRetries: 30 });
const messages = [{ role: "user", content: "What is it?" }];
const tools = [{ type: "function", function: { name: "weather", parameters: { type: "object", properties: {} } } }];

async function failure(call) {
  try {
    await call();
  } catch (error) {
    return error;
  }
  assert.fail("expected an error");
}

// Completions, whole and streamed.
const asked = { model: "tiny", prompt: "ROMEO:", max_tokens: 12, temperature: 0 };
const whole = await client.completions.create({ ...asked, logprobs: 2 });
assert.equal(whole.usage.completion_tokens, 12);
assert.equal(whole.choices[0].logprobs.tokens.join(""), whole.choices[0].text);
let text = "";
let usage;
for await (const chunk of await client.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } })) {
  text += chunk.choices[0]?.text ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, whole.choices[0].text);
assert.deepEqual(usage, whole.usage);

// Chat, whole, streamed, and by the client's helper.
const chat = { model: "tiny", messages, tools, max_completion_tokens: 10, seed: 1 };
const answer = await client.chat.completions.create({ ...chat, logprobs: true, top_logprobs: 2 });
assert.equal(answer.choices[0].logprobs.content.length, 10);
let content = "";
for await (const chunk of await client.chat.completions.create({ ...chat, stream: true })) {
  content += chunk.choices[0].delta.content ?? "";
}
assert.equal(content, answer.choices[0].message.content);
const ending = { ...chat, stop: ["e"], max_completion_tokens: 400 };
const ended = await client.chat.completions.create(ending);
assert.equal(ended.choices[0].finish_reason, "stop");
assert.equal(await client.chat.completions.stream(ending).finalContent(), ended.choices[0].message.content);

// A client that goes away while it is answered.
const endless = await client.chat.completions.create({ model: "tiny", messages, stream: true });
for await (const _ of endless) {
  endless.controller.abort();
}

// Models and errors.
assert.deepEqual((await client.models.list()).data.map((model) => model.id), ["tiny"]);
const wrong = await failure(() => client.completions.create({ ...asked, temperature: "hot" }));
assert.ok(wrong instanceof OpenAI.BadRequestError);
assert.equal(wrong.param, "temperature");
const missing = await failure(() => client.completions.create({ ...asked, model: "other" }));
assert.ok(missing instanceof OpenAI.NotFoundError);
const stranger = await failure(() => new OpenAI({ apiKey: "another" }).models.list());
assert.ok(stranger instanceof OpenAI.AuthenticationError);

console.log(`openai ${VERSION} for JavaScript: all as expected`);
