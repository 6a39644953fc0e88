// The chat page against servers that say what a test wants: what no model should send, of which nothing may run and under
// which the page must stay usable, and what the bundled model does not do on demand.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { Cleanup, ask, eventually, open, startBrowser, startFake, startServer, stream } from "./support.js";

const cleanup = new Cleanup();
let server;
let browser;

before(async () => {
  server = await startServer(cleanup);
  browser = await startBrowser(cleanup);
});
after(() => cleanup.run());

/** Runs `check(page)` on a page whose server answers with `reply`. */
async function withFake(reply, check, options) {
  const own = new Cleanup();
  try {
    const fake = await startFake(own, server, reply, options);
    const page = await open(browser, fake.url);
    await check(page);
    await page.close();
  } finally {
    await own.run();
  }
}

/** The text in pieces, as tokens cut it. */
function pieces(text, size = 7) {
  const found = [];
  for (let at = 0; at < text.length; at += size) found.push({ content: text.slice(at, at + size) });
  return found;
}

/** Nothing that could run or load came of what was shown. */
async function assertHarmless(page) {
  const found = await page.evaluate(() => {
    const places = [...document.querySelectorAll("#log, header, #banner")];
    const all = places.flatMap((place) => [...place.querySelectorAll("*")]);
    return {
      elements: all.filter((node) => node.matches("img, script, iframe, object, embed, style, link, meta, base, video, audio, svg image, form[action], input[type=image]")).length,
      handlers: all.filter((node) => [...node.attributes].some(({ name }) => name.startsWith("on") || name === "style" || name === "src")).length,
      links: all.filter((node) => node.matches("a") && !/^(https?|mailto):/.test(node.href)).length,
      rel: all.filter((node) => node.matches("a") && node.rel !== "noopener noreferrer").length,
      ran: window.ran,
    };
  });
  assert.deepEqual(found, { elements: 0, handlers: 0, links: 0, rel: 0, ran: undefined });
  assert.deepEqual(page.complaints, []);
}

const MARKUP = [
  `<img src=x onerror="window.ran=1;alert(1)">`,
  `<script>window.ran=1;alert(1)</script>`,
  `<svg onload=alert(1)><iframe srcdoc="<script>parent.ran=1</script>"></iframe>`,
  `<a href="javascript:alert(1)">raw</a>`,
  `[x](javascript:alert(1)) [x](JaVaScRiPt:alert(1)) [x](\tjavascript:alert(1)) [x](data:text/html,<script>alert(1)</script>)`,
  `[x](vbscript:x) [x](//evil.example) [x](/v1/models) [x](blob:http://x/y) <javascript:alert(1)>`,
  `![picture](https://evil.example/pixel.png) ![x](javascript:alert(1))`,
  `[ok](https://example.com/a_(b) "title") <mailto:a@example.com> https://example.com/?a=1&b=2.`,
  "`<img src=x onerror=alert(1)>`",
  "```<img src=x onerror=alert(1)>\n<script>window.ran=1</script>\n```",
  `| <img src=x onerror=alert(1)> | <script>alert(1)</script> |\n|---|---|\n| </td></table><script>alert(1)</script> | x |`,
  `> # <b onmouseover=alert(1)>quoted</b>`,
  `- <style>*{display:none}</style>`,
  `</div></main><h1>outside</h1>`,
].join("\n\n");

test("markup in a reply is text", async () => {
  const deltas = [{ role: "assistant", content: "" }, ...pieces(MARKUP).map(({ content }) => ({ reasoning_content: content })), ...pieces(MARKUP)];
  deltas.push({ tool_calls: [{ index: 0, id: "<b>", type: "function", function: { name: MARKUP, arguments: MARKUP } }] });
  await withFake((_, response) => stream(response, deltas), async (page) => {
    await page.setViewportSize({ width: 360, height: 640 });
    await ask(page, MARKUP);
    await assertHarmless(page);
    const wide = await page.evaluate(() => [document.documentElement, document.getElementById("scroller")].map((node) => node.scrollWidth - node.clientWidth));
    assert.deepEqual(wide, [0, 0], "a phone's width is enough");
    const shown = await page.locator(".turn.assistant > .md").innerText();
    for (const text of ["<img src=x onerror=", "<script>window.ran=1;alert(1)</script>", "[x](javascript:alert(1))", "<style>", "</main><h1>outside</h1>"]) {
      assert.ok(shown.includes(text), `${text} in ${shown}`);
    }
    const links = await page.locator(".turn.assistant > .md a").evaluateAll((all) => all.map((a) => a.href));
    assert.deepEqual(links, [
      "https://evil.example/pixel.png",
      "https://example.com/a_(b)",
      "mailto:a@example.com",
      "https://example.com/?a=1&b=2",
    ]);
    assert.equal((await page.textContent(".turn.user")).includes("<script>"), true);
  });
});

test("names and errors of a server are text", async () => {
  const refuse = (_, response) => {
    response.writeHead(400, { "Content-Type": "application/json" });
    response.end(JSON.stringify({ error: { message: MARKUP } }));
  };
  await withFake(refuse, async (page) => {
    await ask(page, "hi");
    assert.equal(await page.textContent("#model"), MARKUP);
    assert.ok((await page.textContent("#version")).includes(MARKUP));
    assert.equal(await page.textContent(".notice.error"), MARKUP);
    page.complaints = page.complaints.filter((text) => !text.includes("400 (Bad Request)"));
    await assertHarmless(page);
  }, { model: MARKUP, version: MARKUP });
});

const K10 = 10_000;
// Short enough to be taken apart as a paragraph.
const whole = (unit) => unit.repeat(Math.floor(19_000 / unit.length));
for (const [name, text, tail] of [
  ["backticks", "`".repeat(K10)],
  ["lines of backticks", "```\n".repeat(K10)],
  ["runs of backticks", Array.from({ length: 190 }, (_, n) => "`".repeat(n + 1)).join(" a ")],
  ["brackets", "[".repeat(K10)],
  ["links begun", whole("[a](")],
  ["links begun on one line of blanks", `[a](${" ".repeat(900)}`.repeat(20)],
  ["images in images", "![".repeat(1400) + "](https://a)".repeat(1400)],
  ["quotes in quotes", "> ".repeat(K10)],
  ["lists in lists", "- ".repeat(K10)],
  ["deeper and deeper lists", Array.from({ length: 1000 }, (_, n) => `${" ".repeat(2 * n)}- a`).join("\n")],
  ["stars", "*".repeat(K10)],
  ["words in stars", "*a ".repeat(3000) + "a* ".repeat(3000)],
  ["bold in bold", "**a ".repeat(2400) + "a** ".repeat(2400)],
  ["mixed delimiters", "*_~~".repeat(2400) + "a" + "~~_*".repeat(2400)],
  ["dollars", whole("$a")],
  ["formulas begun", "\\(".repeat(K10) + "\\[\n".repeat(K10) + "\\] x"],
  ["escapes", "\\".repeat(K10)],
  ["pipes", `${"|".repeat(K10)}\n${"|-".repeat(K10)}|\n${"|".repeat(K10)}`],
  ["a rule that is none", `${"- ".repeat(K10)}x\n${"-".repeat(1e6)}x`],
  ["a heading of blanks", `# a${" ".repeat(1e6)}x`],
  ["addresses", whole("https://a ") + whole("https://")],
  ["a line of a megabyte", "x".repeat(1e6)],
  ["words of a megabyte", "word ".repeat(2e5)],
  ["code of a megabyte", `\`\`\`js\n${"let x = 1;\n".repeat(1e5)}\`\`\``],
  ["a list of 20,000 items", "- item\n".repeat(2 * K10)],
  ["a megabyte of paragraphs", "Some *words* and `code`.\n\n".repeat(4e4)],
]) {
  test(`the page bears ${name}`, async () => {
    const deltas = pieces(`Before.\n\n${text}`, Math.max(50, Math.ceil(text.length / 2000)));
    deltas.push({ content: "\n\n```\n```\n\nafter the end" });
    await withFake((_, response) => stream(response, deltas), async (page) => {
      const begun = Date.now();
      await ask(page, "hi");
      // The page answers at once again.
      await page.fill("#input", "still here");
      assert.equal(await page.inputValue("#input"), "still here");
      const took = Date.now() - begun;
      await assertHarmless(page);
      const shown = await page.locator(".turn.assistant > .md").evaluate((node) => node.textContent);
      assert.ok(shown.startsWith("Before.") && shown.includes("after the end"));
      assert.ok(shown.length >= text.replace(/[^a-z]/g, "").length, "no text is lost");
      if (process.env.R1_TIMES) console.log(`${name}: ${took} ms`);
      assert.ok(took < 30_000, `${took} ms`);
    });
  });
}

test("a broken stream, an error in a stream, and a proxy's page are told", async () => {
  const replies = [
    [(response) => response.end('data: {"choices":[{"delta":{"content":"half"}}]}\n\n'), /broken off/],
    [(response) => response.end('data: {"error":{"message":"out of <b>luck</b>"}}\n\n'), /^out of <b>luck<\/b>$/],
    [(response) => response.end("data: {nonsense\n\n"), /connection broke/],
    [(response) => response.destroy(), /could not be reached/],
  ];
  let next = 0;
  const reply = (_, response) => {
    response.writeHead(200, { "Content-Type": "text/event-stream" });
    response.flushHeaders();
    replies[next][0](response);
  };
  await withFake(reply, async (page) => {
    for (; next < replies.length; next += 1) {
      await ask(page, "hi");
      assert.match(await page.locator(".turn.assistant:last-child .notice.error").textContent(), replies[next][1]);
    }
  });
  const badGateway = (_, response) => {
    response.writeHead(502, { "Content-Type": "text/html" });
    response.end("<h1>Bad gateway</h1>");
  };
  await withFake(badGateway, async (page) => {
    await ask(page, "hi");
    assert.match(await page.textContent(".notice.error"), /status 502\. <h1>Bad gateway/);
  });
});

test("while the model loads its progress is shown, and the question is asked again after it", async () => {
  let progress = 0.41;
  const health = () => (progress < 1 ? { status: "loading", progress, eta_s: 12 } : { status: "ready" });
  const reply = (_, response) => {
    if (progress < 1) {
      response.writeHead(503, { "Content-Type": "application/json" });
      response.end(JSON.stringify({ error: { message: "loading", code: "loading" } }));
    } else stream(response, [{ content: "At last." }]);
  };
  await withFake(reply, async (page) => {
    await page.waitForSelector("#banner:not([hidden])");
    assert.equal(await page.textContent("#banner-text"), "The model is loading: 41%, about 12 s left");
    await page.fill("#input", "hi");
    await page.press("#input", "Enter");
    await page.waitForFunction(() => document.querySelector(".waiting")?.textContent === "Waiting for the model…");
    progress = 1;
    await page.waitForSelector(".turn-foot");
    assert.equal(await page.textContent(".turn.assistant > .md"), "At last.");
    assert.ok(await page.isHidden("#banner"));
  }, { health });
});

for (const [name, clicks, opens] of [
  ["fold away when the answer begins", 0, false],
  ["stay folded once the reader folded them", 1, false],
  ["stay open once the reader unfolded them", 2, true],
]) {
  test(`thoughts are shown as they come, and ${name}`, async () => {
    let goOn;
    const reply = (_, response) => {
      response.writeHead(200, { "Content-Type": "text/event-stream" });
      const send = (delta, finish_reason = null) => response.write(`data: ${JSON.stringify({ choices: [{ delta, finish_reason }] })}\n\n`);
      send({ reasoning_content: "Hm. " });
      goOn = () => {
        send({ content: "So." }, "stop");
        response.end("data: [DONE]\n\n");
      };
    };
    await withFake(reply, async (page) => {
      await page.fill("#input", "hi");
      await page.press("#input", "Enter");
      await page.waitForSelector(".thinking[open] .md p");
      assert.match(await page.textContent("summary .pulse"), /^Thinking… \d s$/);
      for (let n = 0; n < clicks; n += 1) await page.click(".thinking summary");
      goOn();
      await page.waitForSelector(".turn-foot");
      assert.equal(await page.locator(".thinking").evaluate((node) => node.open), opens);
      assert.match(await page.textContent(".thinking summary"), /^Thought for [\d.]+ s$/);
      assert.deepEqual(page.complaints, []);
    });
  });
}

test("messages and code can be copied, and Shift+Enter begins a line", async () => {
  const reply = "Use `ls`:\n\n```sh\nls -l\n```";
  await withFake((_, response) => stream(response, [{ content: reply }]), async (page) => {
    await page.context().grantPermissions(["clipboard-read", "clipboard-write"]);
    await page.focus("#input");
    await page.keyboard.type("one");
    await page.keyboard.press("Shift+Enter");
    await page.keyboard.type("two");
    await page.keyboard.press("Enter");
    await page.waitForSelector(".turn-foot");
    assert.equal(await page.textContent(".turn.user"), "one\ntwo");
    const copied = () => page.evaluate(() => navigator.clipboard.readText());
    await page.click(".turn-foot .copy");
    await eventually("the message", async () => (await copied()) === reply);
    await page.click(".copy-code");
    await eventually("the code", async () => (await copied()) === "ls -l");
    assert.deepEqual(page.complaints, []);
  });
});

test("tool calls are shown as cards and their results are sent", async () => {
  const bodies = [];
  const reply = (body, response) => {
    bodies.push(body);
    if (bodies.length > 1) return stream(response, [{ content: "Sunny." }]);
    const call = (fields) => ({ tool_calls: [{ index: 0, ...fields }] });
    const deltas = [
      { reasoning_content: "I call." },
      call({ id: "call_1", type: "function", function: { name: "get_weather", arguments: "" } }),
      call({ function: { arguments: '{"city":' } }),
      call({ function: { arguments: ' "Oslo"}' } }),
      { tool_calls: [{ index: 1, id: "call_2", type: "function", function: { name: "get_time", arguments: "{}" } }] },
    ];
    return stream(response, deltas, { finish: "tool_calls" });
  };
  await withFake(reply, async (page) => {
    await page.click("#settings-open");
    await page.click("#settings summary");
    await page.fill("#tools", "{}");
    await page.click("#settings .primary");
    assert.match(await page.textContent("#tools-error"), /array/);
    const tools = [{ type: "function", function: { name: "get_weather" } }];
    await page.fill("#tools", JSON.stringify(tools));
    await page.click("#settings .primary");
    await ask(page, "How is Oslo?");
    assert.deepEqual(await page.locator(".call b").allTextContents(), ["get_weather", "get_time"]);
    assert.deepEqual(await page.locator(".call pre").allTextContents(), ['{\n  "city": "Oslo"\n}', "{}"]);
    await page.locator(".result input").first().fill("sun");
    await page.locator(".result input").last().fill("noon");
    await page.click("text=Send results");
    await eventually("the answer", async () => (await page.locator(".turn.assistant").count()) === 2 && page.locator(".turn.assistant:last-child .turn-foot").count());
    assert.deepEqual(bodies[0].tools, tools);
    const messages = bodies[1].messages;
    assert.deepEqual(messages.map((message) => message.role), ["user", "assistant", "tool", "tool"]);
    assert.deepEqual(messages[1].tool_calls[0], { id: "call_1", type: "function", function: { name: "get_weather", arguments: '{"city": "Oslo"}' } });
    assert.deepEqual(messages[2], { role: "tool", tool_call_id: "call_1", content: "sun" });
    assert.deepEqual(page.complaints, []);
  });
});
