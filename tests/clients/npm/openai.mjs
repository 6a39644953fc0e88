// The `openai` npm client against a running server: a chat, a stream, tools, structured output. The server's URL is the argument.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "unused", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const ask = (content, options = {}) =>
  client.chat.completions.create({ model, temperature: 0, messages: [{ role: "user", content }], ...options });

const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "Get the current weather of a city",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];

const checks = {
  async chat() {
    const reply = await ask("how many rs are in strawberry");
    assert.match(reply.choices[0].message.content, /\*\*3\*\*/);
    assert.ok(reply.choices[0].message.reasoning_content);
    assert.equal(reply.usage.total_tokens, reply.usage.prompt_tokens + reply.usage.completion_tokens);
  },
  async stream() {
    const whole = await ask("hello");
    let content = "";
    let usage;
    for await (const chunk of await ask("hello", { stream: true, stream_options: { include_usage: true } })) {
      content += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(content, whole.choices[0].message.content);
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
  },
  async tools() {
    const question = "What is the weather in Oslo?";
    const first = await ask(question, { tools });
    assert.equal(first.choices[0].finish_reason, "tool_calls");
    const [call] = first.choices[0].message.tool_calls;
    assert.deepEqual(JSON.parse(call.function.arguments), { city: "Oslo" });
    const messages = [
      { role: "user", content: question },
      first.choices[0].message,
      { role: "tool", tool_call_id: call.id, content: "21 C" },
    ];
    const last = await client.chat.completions.create({ model, temperature: 0, messages, tools });
    assert.match(last.choices[0].message.content, /21 C/);
  },
  async runTools() {
    const asked = [];
    const runnable = structuredClone(tools);
    runnable[0].function.parse = JSON.parse;
    runnable[0].function.function = ({ city }) => {
      asked.push(city);
      return "21 C";
    };
    const messages = [{ role: "user", content: "What is the weather in Oslo?" }];
    const runner = client.chat.completions.runTools({ model, temperature: 0, stream: true, messages, tools: runnable });
    assert.match(await runner.finalContent(), /21 C/);
    assert.deepEqual(asked, ["Oslo"]);
  },
  async structured() {
    const schema = {
      type: "object",
      properties: { name: { type: "string" }, age: { type: "integer" } },
      required: ["name", "age"],
      additionalProperties: false,
    };
    const reply = await ask("Ada is 36 years old and lives in Oslo. Answer with a JSON object with the keys name and age.", {
      response_format: { type: "json_schema", json_schema: { name: "person", strict: true, schema } },
    });
    assert.deepEqual(Object.keys(JSON.parse(reply.choices[0].message.content)), ["name", "age"]);
  },
  async errors() {
    await assert.rejects(ask("hi", { temperature: 9 }), (error) => {
      assert.equal(error.status, 400);
      assert.equal(error.param, "temperature");
      return true;
    });
  },
  async abort() {
    const stream = await ask("how many rs are in strawberry", { stream: true });
    for await (const _ of stream) {
      stream.controller.abort();
      break;
    }
  },
  async responses() {
    const reply = await client.responses.create({ model, input: "how many rs are in strawberry", temperature: 0 });
    assert.match(reply.output_text, /\*\*3\*\*/);
    const next = await client.responses.create({ model, input: "hello", previous_response_id: reply.id, temperature: 0 });
    assert.equal(next.previous_response_id, reply.id);
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(`ok ${name}`);
}
