// The chat page against the real server and its bundled model.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { Cleanup, ask, eventually, metric, open, startBrowser, startServer } from "./support.js";

const STRAWBERRY = "how many rs are in strawberry";
const cleanup = new Cleanup();
let server;
let browser;

before(async () => {
  server = await startServer(cleanup);
  browser = await startBrowser(cleanup);
});
after(() => cleanup.run());

/** Greedy, so that the answer is known. */
async function greedy(page) {
  await page.click("#settings-open");
  await page.fill("#temperature", "0");
  await page.press("#temperature", "Enter");
  await page.waitForSelector("#settings", { state: "hidden" });
}

test("a question is thought about, answered and measured", async () => {
  const page = await open(browser, server.url);
  await page.waitForFunction(() => document.title === "tiny-r1 · r1-serve");
  assert.match(await page.textContent("#version"), /^r1-serve \d+\.\d+\.\d+$/);
  await greedy(page);
  await page.click(".chip");
  assert.equal(await page.textContent(".turn.user"), STRAWBERRY);
  await page.waitForSelector(".turn-foot");

  const reply = page.locator(".turn.assistant");
  assert.equal(await reply.locator(".thinking").getAttribute("open"), null, "thoughts are folded away");
  assert.match(await reply.locator("summary").innerText(), /^Thought for \d+\.\d+ s, 85 tokens$/);
  assert.equal(await reply.locator(":scope > .md").innerText(), 'The letter r appears 3 times in "strawberry".');
  assert.equal(await reply.locator(":scope > .md strong").innerText(), "3");
  assert.match(await reply.locator(".figures").innerText(), /^[\d,.]+ tokens\/s · first token after [\d.]+ s · 105 tokens$/);
  assert.equal(await page.textContent("#context-text"), "124 / 4,096");

  await reply.locator("summary").click();
  assert.match(await reply.locator(".thinking .md").innerText(), /^Let me spell strawberry/);
  assert.equal(await reply.locator(".thinking .md li").count(), 10);

  await page.click(".again");
  await page.waitForSelector(".turn-foot");
  assert.equal(await page.locator(".turn").count(), 2, "the new reply stands in the old one's place");
  await ask(page, "What is the capital of Norway?");
  assert.equal(await page.locator(".turn.assistant:last-child > .md strong").innerText(), "Oslo");

  await page.click("#new-chat");
  assert.equal(await page.locator(".turn").count(), 0);
  assert.ok(await page.isVisible("#welcome"));
  assert.ok(await page.isHidden("#context"));
  assert.deepEqual(page.complaints, []);
  await page.close();
});

test("thinking can be switched off, and a system prompt and a limit are sent", async () => {
  const page = await open(browser, server.url);
  const bodies = [];
  page.on("request", (request) => {
    if (request.method() === "POST") bodies.push(request.postDataJSON());
  });
  await page.click("#settings-open");
  await page.fill("#system", "Be brief.");
  await page.fill("#temperature", "0.5");
  await page.fill("#max-tokens", "7");
  await page.click(".switch");
  await page.click("#settings .primary");
  await ask(page, STRAWBERRY);
  assert.equal(await page.locator(".thinking").count(), 0);
  assert.match(await page.textContent(".notice"), /limit of tokens/);
  const [{ messages, temperature, max_tokens, chat_template_kwargs, stream_options }] = bodies;
  assert.deepEqual(messages.map((message) => message.role), ["system", "user"]);
  assert.deepEqual([temperature, max_tokens], [0.5, 7]);
  assert.deepEqual([chat_template_kwargs, stream_options], [{ thinking: false }, { include_usage: true }]);
  assert.deepEqual(page.complaints, []);
  await page.close();
});

test("what the server refuses is shown in its words", async () => {
  const page = await open(browser, server.url);
  await page.click("#settings-open");
  await page.fill("#max-tokens", "5000");
  await page.click("#settings .primary");
  await ask(page, STRAWBERRY);
  assert.match(await page.textContent(".notice.error"), /4096.*5000/s);
  assert.equal(await page.innerText(".again"), "Try again");
  // The browser's own line about the status.
  assert.deepEqual(page.complaints.filter((text) => !text.includes("400 (Bad Request)")), []);
  await page.close();
});

test("the model calls a tool, whoever sees the page answers, and the model uses the answer", async () => {
  const page = await open(browser, server.url);
  const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
  const tool = { type: "function", function: { name: "get_weather", description: "Get the current weather of a city", parameters } };
  await page.click("#settings-open");
  await page.fill("#temperature", "0");
  await page.click("#settings summary");
  await page.fill("#tools", JSON.stringify([tool]));
  await page.click("#settings .primary");
  await ask(page, "What is the weather in Oslo?");
  assert.equal(await page.textContent(".call b"), "get_weather");
  assert.deepEqual(JSON.parse(await page.textContent(".call pre")), { city: "Oslo" });
  await page.fill(".result input", "21 C");
  await page.press(".result input", "Enter");
  await page.waitForSelector(".turn.assistant:nth-child(3) .turn-foot");
  assert.equal(await page.locator(".turn.assistant:last-child > .md").innerText(), "The weather in Oslo is 21 C.");
  assert.equal(await page.locator(".results, .turn:not(:last-child) .again").count(), 0, "what was answered stands");
  assert.deepEqual(page.complaints, []);
  await page.close();
});

for (const [how, act] of [
  ["the button", (page) => page.click("#stop")],
  ["Escape", (page) => page.press("#input", "Escape")],
]) {
  test(`${how} stops a reply, and the server with it`, async () => {
    // A reply of the bundled model would be over before anything could be stopped; without end tokens it goes on.
    const page = await browser.newPage();
    try {
      await page.route("**/chat/completions", (route) => {
        const body = { ...route.request().postDataJSON(), ignore_eos: true, max_tokens: 4000 };
        return route.continue({ postData: JSON.stringify(body) });
      });
      await page.goto(server.url);
      const aborted = server.log.split("status=499").length;
      await page.fill("#input", STRAWBERRY);
      await page.press("#input", "Enter");
      await page.waitForSelector(".turn.assistant summary");
      assert.ok((await metric(server, "vllm:num_requests_running")) > 0, "it runs");
      await act(page);
      await page.waitForSelector(".turn-foot");
      assert.equal(await page.textContent(".notice"), "Stopped.");
      await eventually("nothing runs", async () => (await metric(server, "vllm:num_requests_running")) === 0);
      await eventually("the log says so", () => server.log.split("status=499").length > aborted);
      assert.ok(await page.isVisible("#send"));
    } finally {
      await page.close();
    }
  });
}

test("the key is asked for, works, and is kept nowhere", async () => {
  const own = new Cleanup();
  try {
    const key = "sk-only-in-memory";
    const locked = await startServer(own, "--api-key", key);
    const page = await open(browser, locked.url);
    await page.waitForSelector("#key[open]");
    await page.fill("#key-input", "wrong");
    await page.press("#key-input", "Enter");
    await page.waitForFunction(() => /not accepted/.test(document.getElementById("key-why").textContent));
    await page.waitForSelector("#key[open]");
    await page.fill("#key-input", key);
    await page.press("#key-input", "Enter");
    await page.waitForFunction(() => document.getElementById("model").textContent === "tiny-r1");
    await ask(page, STRAWBERRY);
    assert.equal(await page.locator(".notice").count(), 0);

    const kept = await page.evaluate(async () => [
      { ...localStorage },
      { ...sessionStorage },
      document.cookie,
      location.href,
      history.state,
      window.name,
      await indexedDB.databases(),
      await caches.keys(),
      document.documentElement.outerHTML,
      [...document.querySelectorAll("input, textarea")].map((field) => field.value),
    ]);
    assert.ok(!JSON.stringify(kept).includes(key), "the key was kept");
    assert.deepEqual(kept.slice(0, 3), [{}, {}, ""]);
    assert.deepEqual(await browser.cookies(), []);
    assert.ok(!locked.log.includes(key));

    await page.reload();
    await page.waitForSelector("#key[open]");
    await page.press("#key-input", "Escape");
    await page.waitForTimeout(500);
    assert.ok(await page.isHidden("#key"), "who does not give it is not asked again");
    await page.fill("#input", STRAWBERRY);
    await page.press("#input", "Enter");
    await page.waitForSelector("#key[open]");
    await page.click("#key .close");
    await page.waitForSelector(".notice.error");
    await page.click("text=Try again");
    await page.fill("#key-input", key);
    await page.press("#key-input", "Enter");
    await page.waitForSelector(".turn.assistant > .md");
    await page.waitForFunction(() => document.getElementById("model").textContent === "tiny-r1");
    assert.deepEqual(page.complaints.filter((text) => !text.includes("401 (Unauthorized)")), []);
    await page.close();
  } finally {
    await own.run();
  }
});

test("it works under a root path, with a slash at its end and without", async () => {
  const own = new Cleanup();
  try {
    const proxied = await startServer(own, "--root-path", "/proxy/models/main");
    for (const path of ["/proxy/models/main", "/proxy/models/main/", "/"]) {
      const page = await open(browser, proxied.url + path);
      const asked = [];
      page.on("request", (request) => request.method() === "POST" && asked.push(new URL(request.url()).pathname));
      await greedy(page);
      await ask(page, STRAWBERRY);
      assert.equal(await page.locator(".turn.assistant > .md strong").innerText(), "3");
      assert.deepEqual(asked, [`${path.replace(/\/$/, "")}/v1/chat/completions`]);
      assert.deepEqual(page.complaints, []);
      await page.close();
    }
  } finally {
    await own.run();
  }
});
