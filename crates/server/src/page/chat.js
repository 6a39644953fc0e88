
// ---- The chat ----

const $ = (id) => document.getElementById(id);

// The API lies beside the page, under whatever path a proxy gave it and whether or not that ends with a slash.
const base = new URL(location.href);
base.pathname = base.pathname.replace(/\/*$/, "/");
base.search = base.hash = base.username = base.password = "";

// Everything lives here and in the document, and ends with the page.
let apiKey = "";
let model = null;
let maxModelLen = null;
/** What was said: `{role: "user", text}`, `{role: "tool", id, text}` and `Reply`s. */
let turns = [];
/** The reply that is being generated. */
let running = null;

const number = (value, digits = 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const seconds = (ms) => number(ms / 1000, ms < 995 ? 2 : 1);
const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const say = (text) => $("status").replaceChildren(text);

// ---- Requests ----

/** What the server refused, in its own words. */
class Refusal extends Error {
  constructor(status, { message, code } = {}) {
    super(message || `The server answered with status ${status}.`);
    this.code = code;
  }
}

async function refusal(response) {
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    return new Refusal(response.status, typeof error === "string" ? { message: error } : (error ?? {}));
  } catch {
    // What a proxy says in the server's place.
    const { status } = response;
    return new Refusal(status, { message: `The server answered with status ${status}. ${text.slice(0, 300)}`.trim() });
  }
}

let asking = null;

/** Asks for the API key; true once one was given. Requests that need it at the same time share the question. */
function askKey() {
  asking ??= new Promise((resolve) => {
    const [dialog, input] = [$("key"), $("key-input")];
    $("key-why").textContent = apiKey ? "The key was not accepted." : "This server asks for an API key.";
    input.value = "";
    dialog.returnValue = "";
    dialog.onclose = () => {
      const given = dialog.returnValue === "given";
      if (given) apiKey = input.value.trim();
      input.value = "";
      asking = null;
      resolve(given);
    };
    dialog.showModal();
  });
  return asking;
}

/** A request to the API beside the page; asks for the key where the server does. */
async function request(path, options = {}) {
  for (;;) {
    const headers = { ...options.headers };
    if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
    const response = await fetch(new URL(path, base), { ...options, headers, cache: "no-store" });
    if (response.ok) return response;
    const error = await refusal(response);
    if (response.status !== 401 || !(await askKey())) throw error;
  }
}

/** The data of server-sent events as they come. */
async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let parts = [];
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const chunk = decoder.decode(value, { stream: true });
      parts.push(chunk);
      // A long line is put together once, not with each of its pieces.
      if (!chunk.includes("\n")) continue;
      const lines = parts.join("").split("\n");
      parts = [lines.pop()];
      for (const line of lines) {
        const text = line.replace(/\r$/, "");
        if (text.startsWith("data:")) data.push(text.slice(text[5] === " " ? 6 : 5));
        else if (text === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// ---- The server's state ----

const HEALTH = {
  draining: "The server is shutting down.",
  stuck: "The server is stuck: its last step does not end.",
  failed: "The server's engine has failed.",
  stopped: "The server has stopped.",
};

function showHealth({ status, progress, eta_s: eta, error }) {
  const loading = status === "loading";
  $("banner").hidden = status === "ready";
  $("banner-meter").hidden = !loading;
  if (loading) {
    const left = Number.isFinite(eta) ? `, about ${eta} s left` : "";
    $("banner-text").textContent = `The model is loading: ${number(100 * (progress ?? 0))}%${left}`;
    $("banner-meter").value = progress ?? 0;
  } else {
    $("banner-text").textContent = [HEALTH[status] ?? "The server is not ready.", error].filter(Boolean).join(" ");
  }
}

let watching = null;

/** Shows how far the server is until it is ready. */
function ready() {
  watching ??= (async () => {
    for (;;) {
      let health = { status: "unreachable", error: "It does not answer." };
      try {
        const response = await fetch(new URL("health", base), { cache: "no-store" });
        health = response.ok ? { status: "ready" } : await response.json().catch(() => ({ status: "unknown" }));
      } catch {
        // Asked again below.
      }
      showHealth(health);
      if (health.status === "ready") break;
      await pause(health.status === "loading" ? 500 : 3000);
    }
    watching = null;
  })();
  return watching;
}

/** Shows which model is served; gives what went wrong. */
async function loadModel() {
  try {
    const { data } = await (await request("v1/models")).json();
    model = data[0].id;
    maxModelLen = data[0].max_model_len ?? null;
    // Where there is little room, what stands before the last slash is left out.
    const [, organization, name] = /^(.*\/)?(.*)$/s.exec(model);
    $("model").replaceChildren(el("span", { class: "org" }, organization ?? ""), name);
    $("model").title = model;
    document.title = `${model} · r1-serve`;
    return null;
  } catch (error) {
    say(error.message);
    return error;
  }
}

async function loadVersion() {
  const response = await fetch(new URL("version", base));
  if (response.ok) $("version").textContent = `r1-serve ${(await response.json()).version}`;
}

/** How much of the context the last reply and all before it take. */
function showContext(usage) {
  $("context").hidden = !usage || !maxModelLen;
  if ($("context").hidden) return;
  $("context-text").textContent = `${number(usage.total_tokens)} / ${number(maxModelLen)}`;
  $("context-meter").value = usage.total_tokens / maxModelLen;
}

// ---- Scrolling: the end stays in view unless the reader has gone elsewhere ----

const scroller = $("scroller");
let following = true;

function follow(always = false) {
  following ||= always;
  if (following) scroller.scrollTop = scroller.scrollHeight;
}

scroller.addEventListener("scroll", () => {
  following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
  $("to-end").hidden = following;
});

// ---- What is shown ----

function button(kind, name, label, action) {
  const node = el("button", { type: "button", class: `quiet ${kind}`, title: label }, icon(name), el("span", {}, label));
  node.addEventListener("click", action);
  return node;
}

async function copy(text, node) {
  const label = node.querySelector("span");
  let copied = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without TLS there is no clipboard but this one.
    const area = el("textarea", { class: "hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    copied = document.execCommand("copy");
    area.remove();
    node.focus();
  }
  node.querySelector("use").setAttribute("href", copied ? "#i-done" : "#i-copy");
  label.textContent = copied ? "Copied" : "Not allowed";
  say(label.textContent);
  await pause(1500);
  node.querySelector("use").setAttribute("href", "#i-copy");
  label.textContent = "Copy";
}

function showUser(text) {
  const bubble = el("div", { class: "bubble", dir: "auto" }, text);
  const node = el("article", { class: "turn user", "aria-label": "You" }, bubble);
  $("log").append(node);
  return node;
}

/** A reply and its place in the conversation. */
class Reply {
  role = "assistant";
  content = "";
  calls = [];
  usage = null;
  node = el("article", { class: "turn assistant live", "aria-label": "Assistant", "aria-busy": "true" });
  #abort = new AbortController();
  #waiting = el("p", { class: "waiting" }, "Waiting for the first token…");
  #thinking = null;
  #answer = null;
  #times = { sent: 0, first: 0, answer: 0, last: 0 };
  #painting = false;
  #restUntil = 0;
  #live = true;

  constructor() {
    this.node.append(this.#waiting);
    $("log").append(this.node);
  }

  stop() {
    this.#abort.abort();
  }

  /** Runs to its end, whatever that is. */
  async run(body) {
    let [finish, notice] = [null, null];
    try {
      const response = await this.#send(body);
      for await (const data of events(response.body)) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Refusal(0, chunk.error);
        const choice = chunk.choices?.[0];
        if (choice?.delta) this.#take(choice.delta);
        finish = choice?.finish_reason ?? finish;
        this.usage = chunk.usage ?? this.usage;
      }
      if (!finish) notice = ["error", "The reply was broken off."];
      else if (finish === "length") notice = ["", "The reply ends here: it reached the limit of tokens."];
      else if (finish === "abort") notice = ["error", "The server ended the reply."];
    } catch (error) {
      if (this.#abort.signal.aborted) notice = ["", "Stopped."];
      else if (error instanceof Refusal) notice = ["error", error.message];
      else notice = ["error", `The server could not be reached, or the connection broke. (${error.message})`];
    }
    this.#end(notice, finish);
  }

  /** Sends the request; while the model loads, again once it has. */
  async #send(body) {
    const { signal } = this.#abort;
    const stopped = new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason)));
    // Nobody may be waiting for it.
    stopped.catch(() => {});
    const options = { method: "POST", headers: { "Content-Type": "application/json" }, body, signal };
    for (;;) {
      this.#times.sent = performance.now();
      try {
        return await Promise.race([request("v1/chat/completions", options), stopped]);
      } catch (error) {
        if (error.code !== "loading") throw error;
        this.#waiting.textContent = "Waiting for the model…";
        await Promise.race([ready(), stopped]);
      }
    }
  }

  #take(delta) {
    const reasoning = delta.reasoning_content ?? delta.reasoning;
    const calls = Array.isArray(delta.tool_calls) ? delta.tool_calls : [];
    if (!reasoning && !delta.content && !calls.length) return;
    this.#times.last = performance.now();
    this.#times.first ||= this.#times.last;
    if (reasoning) this.#think(reasoning);
    if (delta.content) this.#write(delta.content);
    for (const call of calls) this.#call(call);
    this.#paintSoon();
  }

  #think(text) {
    if (!this.#thinking) {
      const label = el("span", { class: "pulse" }, "Thinking…");
      const shown = el("div", { class: "md" });
      const node = el("details", { class: "thinking", open: "" }, el("summary", {}, icon("fold"), label), shown);
      this.#thinking = { node, label, markdown: new Markdown(shown), since: this.#times.last, ended: 0, begun: false, kept: false };
      // Whoever folds or unfolds it decides from then on.
      node.firstChild.addEventListener("click", () => (this.#thinking.kept = true));
      say("Thinking");
    }
    const thinking = this.#thinking;
    if (!thinking.begun) {
      // Blanks alone are no thoughts.
      text = text.trimStart();
      if (!text) return;
      thinking.begun = true;
      this.node.prepend(thinking.node);
    }
    thinking.markdown.append(text);
  }

  #thoughtEnds() {
    const thinking = this.#thinking;
    if (!thinking || thinking.ended) return;
    thinking.ended = this.#times.last;
    thinking.markdown.render(true);
    thinking.label.classList.remove("pulse");
    if (!thinking.kept) thinking.node.open = false;
  }

  #write(text) {
    this.#thoughtEnds();
    if (!this.content) {
      text = text.trimStart();
      if (!text) return;
      const shown = el("div", { class: "md" });
      this.#answer = new Markdown(shown);
      this.node.append(shown);
      say("Answering");
    }
    this.content += text;
    this.#answer.append(text);
  }

  #call({ index = 0, id, function: called = {} }) {
    this.#thoughtEnds();
    let call = this.calls.find((known) => known.index === index);
    if (!call) {
      const name = el("b");
      const text = document.createTextNode("");
      const head = el("div", { class: "code-head" }, el("span", {}, icon("tool"), name));
      const pre = el("pre", { tabindex: "0", "aria-label": "Arguments" }, el("code", { dir: "ltr" }, text));
      call = { index, id: "", name: "", arguments: "", view: { name, text, node: el("section", { class: "call code" }, head, pre) } };
      this.calls.push(call);
      this.node.append(call.view.node);
      say("Calling a tool");
    }
    if (id) call.id = id;
    call.name += called.name ?? "";
    call.arguments += called.arguments ?? "";
  }

  /** Shows what came since the last time, between frames and for no more than a quarter of the time. */
  #paintSoon() {
    if (this.#painting) return;
    this.#painting = true;
    const rest = this.#restUntil - performance.now();
    if (rest > 0) setTimeout(() => requestAnimationFrame(() => this.#paint()), rest);
    else requestAnimationFrame(() => this.#paint());
  }

  #paint() {
    this.#painting = false;
    if (!this.#live) return;
    const begun = performance.now();
    this.#waiting.remove();
    this.#labelThinking();
    if (this.#thinking && !this.#thinking.ended) this.#thinking.markdown.render();
    this.#answer?.render();
    for (const call of this.calls) this.#showCall(call);
    follow();
    // The layout is part of the cost.
    void this.node.offsetHeight;
    const ended = performance.now();
    this.#restUntil = ended + 3 * (ended - begun);
  }

  #labelThinking() {
    const thinking = this.#thinking;
    if (!thinking) return;
    const took = (thinking.ended || performance.now()) - thinking.since;
    if (!thinking.ended) {
      thinking.label.textContent = `Thinking… ${Math.floor(took / 1000)} s`;
      return;
    }
    const count = this.usage?.completion_tokens_details?.reasoning_tokens;
    thinking.label.textContent = `Thought for ${seconds(took)} s${count ? `, ${plural(count, "token")}` : ""}`;
  }

  #showCall(call, whole = false) {
    call.view.name.textContent = call.name;
    let shown = call.arguments;
    if (whole) {
      try {
        shown = JSON.stringify(JSON.parse(call.arguments), null, 2);
      } catch {
        // As the model wrote it.
      }
    }
    if (call.view.text.data !== shown) call.view.text.data = shown;
  }

  #end(notice, finish) {
    this.#live = false;
    this.#waiting.remove();
    this.#thoughtEnds();
    this.#labelThinking();
    this.#answer?.render(true);
    for (const call of this.calls) this.#showCall(call, true);
    this.node.classList.remove("live");
    this.node.removeAttribute("aria-busy");
    const [kind, text] = notice ?? [];
    if (text) this.node.append(el("p", { class: `notice ${kind}`, role: kind ? "alert" : "note" }, text));
    if (finish && this.calls.length) this.#askResults();
    const foot = el("div", { class: "turn-foot" });
    if (this.content) foot.append(button("copy", "copy", "Copy", ({ currentTarget }) => copy(this.content, currentTarget)));
    foot.append(button("again", "again", kind ? "Try again" : "Regenerate", () => regenerate()));
    const figures = this.#figures();
    if (figures) foot.append(el("p", { class: "figures" }, figures));
    this.node.append(foot);
    if (this.usage && this.node.isConnected) showContext(this.usage);
    say(text ?? "The answer is complete.");
    follow();
  }

  /** Tokens as the server counted them, over time as it passed here. */
  #figures() {
    const { sent, first, last } = this.#times;
    const parts = [];
    const count = this.usage?.completion_tokens;
    // The first token's time is the prompt's. What came all at once says nothing about the server's pace.
    if (count > 1 && last - first > 10) {
      const rate = (1000 * (count - 1)) / (last - first);
      parts.push(`${number(rate, rate < 100 ? 1 : 0)} tokens/s`);
    }
    if (first) parts.push(`first token after ${seconds(first - sent)} s`);
    if (count) parts.push(plural(count, "token"));
    return parts.join(" · ");
  }

  /** Whoever sees the page answers the calls in the tools' place. */
  #askResults() {
    const form = el("form", { class: "results" });
    for (const call of this.calls) {
      const input = el("input", { "aria-label": `Result of ${call.name}`, placeholder: "Result", autocomplete: "off" });
      call.input = input;
      call.view.node.append(el("div", { class: "result" }, input));
      input.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && !event.isComposing) this.#sendResults();
      });
    }
    form.append(el("button", { type: "submit", class: "primary" }, "Send results"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#sendResults();
    });
    this.node.append(form);
  }

  #sendResults() {
    if (running || turns.at(-1) !== this) return;
    for (const { id, input } of this.calls) turns.push({ role: "tool", id, text: input.value });
    generate();
  }

  /** The conversation goes on behind it: it can no longer be changed. */
  pass() {
    this.node.querySelector(".results")?.remove();
    this.node.querySelector(".again")?.remove();
    for (const { input } of this.calls) if (input) input.readOnly = true;
  }

  /** As the next request repeats it; thoughts are not repeated. Null when there is nothing to repeat. */
  message() {
    if (!this.content && !this.calls.length) return null;
    const message = { role: "assistant", content: this.content };
    if (this.calls.length) {
      message.tool_calls = this.calls.map(({ id, name, arguments: text }) => ({
        id,
        type: "function",
        function: { name, arguments: text },
      }));
    }
    return message;
  }
}

// ---- The conversation ----

/** The request for the next reply. */
function requestBody() {
  const messages = [];
  const system = $("system").value.trim();
  if (system) messages.push({ role: "system", content: system });
  for (const turn of turns) {
    if (turn.role === "user") messages.push({ role: "user", content: turn.text });
    else if (turn.role === "tool") messages.push({ role: "tool", tool_call_id: turn.id, content: turn.text });
    else messages.push(turn.message());
  }
  const body = { messages: messages.filter(Boolean), stream: true, stream_options: { include_usage: true } };
  if (model) body.model = model;
  if ($("temperature").value) body.temperature = Number($("temperature").value);
  if ($("max-tokens").value) body.max_tokens = Number($("max-tokens").value);
  body.chat_template_kwargs = { thinking: $("thinking").checked };
  if (tools.length) body.tools = tools;
  return JSON.stringify(body);
}

function showRunning() {
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  $("send").disabled = !$("input").value.trim();
  $("welcome").hidden = turns.length > 0;
}

async function generate() {
  const body = requestBody();
  for (const turn of turns) turn.pass?.();
  const reply = new Reply();
  turns.push(reply);
  running = reply;
  showRunning();
  follow(true);
  try {
    await reply.run(body);
  } finally {
    // Another conversation may have begun.
    if (running === reply) running = null;
    showRunning();
  }
  // The key may have come with this reply.
  if (!model && reply.usage) loadModel();
}

function send(text) {
  if (running || !text.trim()) return;
  turns.push({ role: "user", text, node: showUser(text) });
  generate();
}

function regenerate() {
  if (running || turns.at(-1)?.role !== "assistant") return;
  turns.pop().node.remove();
  $("input").focus();
  generate();
}

function newChat() {
  running?.stop();
  running = null;
  turns = [];
  $("log").replaceChildren();
  showContext(null);
  showRunning();
  $("input").focus();
}

function stop() {
  running?.stop();
  $("input").focus();
}

// ---- Input ----

const input = $("input");
// Where there is no keyboard to hold Shift on, Enter begins a line.
const touch = matchMedia("(hover: none) and (pointer: coarse)");

function fitInput() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  $("send").disabled = !input.value.trim();
}

input.addEventListener("input", fitInput);
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || touch.matches) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return;
  const text = input.value;
  input.value = "";
  fitInput();
  send(text);
});
$("stop").addEventListener("click", stop);
$("new-chat").addEventListener("click", newChat);
$("to-end").addEventListener("click", () => follow(true));
for (const chip of document.querySelectorAll(".chip")) {
  chip.addEventListener("click", () => {
    send(chip.textContent);
    input.focus();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && !document.querySelector("dialog[open]")) stop();
});
document.addEventListener("click", (event) => {
  const node = event.target.closest?.(".copy-code");
  if (node) copy(node.closest(".code").querySelector("code").textContent, node);
});

// ---- Dialogs ----

let tools = [];

/** Reads the tools; false, and why is shown, where they are no list. */
function readTools() {
  const text = $("tools").value.trim();
  try {
    const list = text ? JSON.parse(text) : [];
    if (!Array.isArray(list)) throw new TypeError("must be an array");
    tools = list;
    $("tools-error").textContent = "";
    return true;
  } catch (error) {
    $("tools-error").textContent = `Tools: ${error.message}`;
    $("tools").closest("details").open = true;
    $("tools").focus();
    return false;
  }
}

for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("submit", (event) => {
    event.preventDefault();
    if (dialog.id !== "settings" || readTools()) dialog.close("given");
  });
  for (const close of dialog.querySelectorAll(".close")) close.addEventListener("click", () => dialog.close());
}
// A click beside it closes it.
$("settings").addEventListener("pointerdown", (event) => {
  if (event.target === $("settings")) $("settings").close();
});
$("settings-open").addEventListener("click", () => $("settings").showModal());
$("settings").addEventListener("close", () => readTools());

// ---- Start ----

loadVersion().catch(() => {});
const loaded = loadModel();
// A server that starts may not have answered the first time; whoever was refused is not asked for the key again.
ready().then(async () => {
  const error = await loaded;
  if (error && !(error instanceof Refusal)) loadModel();
});
showRunning();
