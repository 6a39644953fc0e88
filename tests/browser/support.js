// A browser, servers to point it at, and what is asked of every page: no errors, no violations of its policy.
import { spawn } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import http from "node:http";
import net from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import assert from "node:assert/strict";
import { chromium } from "playwright-core";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const BINARY = process.env.R1_SERVE_BIN ?? join(ROOT, "target/release/r1-serve");
const CHROMIUM = process.env.CHROMIUM ?? "/usr/bin/chromium";
const START_TIMEOUT_MS = 120_000;

/** Cleans up behind a test, last things first. */
export class Cleanup {
  #tasks = [];
  add(task) {
    this.#tasks.unshift(task);
  }
  async run() {
    for (const task of this.#tasks.splice(0)) await task();
  }
}

async function freePort() {
  const probe = net.createServer().listen(0, "127.0.0.1");
  await new Promise((done) => probe.once("listening", done));
  const { port } = probe.address();
  await new Promise((done) => probe.close(done));
  return port;
}

/** Starts r1-serve with its bundled model. */
export async function startServer(cleanup, ...flags) {
  const port = await freePort();
  const child = spawn(BINARY, ["--port", String(port), "--threads", "2", ...flags], { stdio: ["ignore", "pipe", "pipe"] });
  const server = { url: `http://127.0.0.1:${port}`, log: "" };
  child.stdout.on("data", (data) => (server.log += data));
  child.stderr.on("data", (data) => (server.log += data));
  const ended = new Promise((done) => child.once("close", done));
  cleanup.add(async () => {
    child.kill("SIGTERM");
    await ended;
  });
  const deadline = Date.now() + START_TIMEOUT_MS;
  for (;;) {
    if (await fetch(`${server.url}/health`).then((r) => r.ok, () => false)) return server;
    assert.ok(child.exitCode === null && Date.now() < deadline, `r1-serve did not come up:\n${server.log}`);
    await new Promise((done) => setTimeout(done, 100));
  }
}

/** The sum of a metric's series. */
export async function metric(server, name) {
  const text = await (await fetch(`${server.url}/metrics`)).text();
  const values = [...text.matchAll(new RegExp(`^${name}(?:\\{[^}]*\\})? (\\S+)$`, "gm"))].map((found) => Number(found[1]));
  assert.ok(values.length, `/metrics has no ${name}`);
  return values.reduce((sum, value) => sum + value);
}

/** Until `check` gives something true. */
export async function eventually(what, check, timeoutMs = 20_000) {
  const deadline = Date.now() + timeoutMs;
  for (;;) {
    const found = await check();
    if (found) return found;
    assert.ok(Date.now() < deadline, `not within ${timeoutMs} ms: ${what}`);
    await new Promise((done) => setTimeout(done, 50));
  }
}

/** A server that sends the page of a real one, and to every chat what `reply(body, response)` writes. */
export async function startFake(cleanup, real, reply, options = {}) {
  const page = await fetch(`${real.url}/`);
  const html = await page.text();
  const policy = page.headers.get("content-security-policy");
  const json = (response, status, body) => {
    response.writeHead(status, { "Content-Type": "application/json" });
    response.end(JSON.stringify(body));
  };
  const fake = http.createServer(async (request, response) => {
    if (request.url === "/v1/chat/completions") {
      let body = "";
      for await (const data of request) body += data;
      reply(JSON.parse(body), response);
    } else if (request.url === "/v1/models") {
      json(response, 200, { data: [{ id: options.model ?? "fake", max_model_len: 4096 }] });
    } else if (request.url === "/version") {
      json(response, 200, { version: options.version ?? "0" });
    } else if (request.url === "/health") {
      const health = options.health?.() ?? { status: "ready" };
      json(response, health.status === "ready" ? 200 : 503, health);
    } else {
      response.writeHead(200, { "Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy });
      response.end(html);
    }
  });
  fake.listen(0, "127.0.0.1");
  await new Promise((done) => fake.once("listening", done));
  cleanup.add(async () => {
    fake.closeAllConnections();
    await new Promise((done) => fake.close(done));
  });
  return { url: `http://127.0.0.1:${fake.address().port}` };
}

/** Streams deltas as the API does. */
export function stream(response, deltas, { finish = "stop", usage = null } = {}) {
  response.writeHead(200, { "Content-Type": "text/event-stream" });
  const send = (data) => response.write(`data: ${JSON.stringify(data)}\n\n`);
  for (const delta of deltas) send({ choices: [{ index: 0, delta, finish_reason: null }] });
  send({ choices: [{ index: 0, delta: {}, finish_reason: finish }] });
  if (usage) send({ choices: [], usage });
  response.end("data: [DONE]\n\n");
}

/** Chromium with a profile of its own, which goes with it. */
export async function startBrowser(cleanup, context = {}) {
  const profile = await mkdtemp(join(tmpdir(), "r1-browser-"));
  const browser = await chromium.launchPersistentContext(profile, {
    executablePath: CHROMIUM,
    headless: true,
    args: [
      "--no-sandbox",
      "--disable-gpu",
      "--disable-quic",
      "--no-first-run",
      "--disable-background-networking",
      "--disable-component-update",
      "--disable-sync",
    ],
    ...context,
  });
  cleanup.add(async () => {
    await browser.close();
    await rm(profile, { recursive: true, force: true });
  });
  return browser;
}

/** The page, watched: `complaints` gathers errors, dialogs, and requests to anywhere else. */
export async function open(browser, url) {
  const page = await browser.newPage();
  page.complaints = [];
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) page.complaints.push(message.text());
  });
  page.on("pageerror", (error) => page.complaints.push(String(error)));
  page.on("dialog", async (dialog) => {
    page.complaints.push(`dialog: ${dialog.message()}`);
    await dialog.dismiss();
  });
  page.on("request", (request) => {
    const to = new URL(request.url());
    if (to.protocol !== "data:" && to.origin !== new URL(url).origin) page.complaints.push(`request to ${to}`);
  });
  await page.goto(url);
  return page;
}

/** Asks, and waits until the reply has ended. */
export async function ask(page, text, timeout = 60_000) {
  await page.fill("#input", text);
  await page.press("#input", "Enter");
  await page.waitForSelector(".turn.assistant:last-child .turn-foot", { timeout });
}
