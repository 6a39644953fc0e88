// The page's Markdown: what becomes of it, and that a stream of it ends as the whole would.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { Cleanup, ask, open, startBrowser, startFake, startServer } from "./support.js";

const cleanup = new Cleanup();
let page;
/** How the next reply is cut, and the pause between its pieces. */
let cut = { size: 1e6, pauseMs: 0 };

before(async () => {
  const server = await startServer(cleanup);
  const browser = await startBrowser(cleanup);
  // Its answer is the question.
  const echo = async (body, response) => {
    const text = body.messages.at(-1).content;
    response.writeHead(200, { "Content-Type": "text/event-stream" });
    for (let at = 0; at < text.length; at += cut.size) {
      const delta = { content: text.slice(at, at + cut.size) };
      response.write(`data: ${JSON.stringify({ choices: [{ delta }] })}\n\n`);
      if (cut.pauseMs) await new Promise((done) => setTimeout(done, cut.pauseMs));
    }
    response.end('data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n');
  };
  page = await open(browser, (await startFake(cleanup, server, echo)).url);
});
after(() => cleanup.run());

/** The reply's nodes as HTML without what only dresses them. */
async function rendered(text) {
  await page.click("#new-chat");
  await ask(page, text);
  return page.locator(".turn.assistant > .md").evaluate((root) => {
    const copy = root.cloneNode(true);
    for (const node of copy.querySelectorAll("button")) node.remove();
    for (const node of copy.querySelectorAll("*")) {
      for (const { name } of [...node.attributes]) if (!["href", "class", "start"].includes(name)) node.removeAttribute(name);
    }
    return copy.innerHTML;
  });
}

const CODE = (language, text) => `<div class="code"><div class="code-head"><span>${language}</span></div><pre><code>${text}</code></pre></div>`;

for (const [markdown, html] of [
  ["one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"],
  ["# A\n\n### *B* ##\n####### no", "<h3>A</h3><h5><em>B</em></h5><p>####### no</p>"],
  ["**b** *i* ***bi*** __b__ _i_ ~~s~~ `c`", "<p><strong>b</strong> <em>i</em> <em><strong>bi</strong></em> <strong>b</strong> <em>i</em> <s>s</s> <code>c</code></p>"],
  ["**The `a*b` and *c* d** 2 * 3 * 4 snake_case_name **open", "<p><strong>The <code>a*b</code> and <em>c</em> d</strong> 2 * 3 * 4 snake_case_name **open</p>"],
  ["``a ` b`` ` open \\*no\\*", "<p><code>a ` b</code> ` open *no*</p>"],
  ["- a\n- b\n  - c\n    1. d\n    2. e\n- f", '<ul class="tight"><li><p>a</p></li><li><p>b</p><ul class="tight"><li><p>c</p><ol class="tight"><li><p>d</p></li><li><p>e</p></li></ol></li></ul></li><li><p>f</p></li></ul>'],
  ["3. a\n4. b\nafter", '<ol start="3" class="tight"><li><p>a</p></li><li><p>b</p></li></ol><p>after</p>'],
  ["1. a\n\n   more\n\n2. b", "<ol><li><p>a</p><p>more</p></li><li><p>b</p></li></ol>"],
  ["text\n- a\n* b", '<p>text</p><ul class="tight"><li><p>a</p></li></ul><ul class="tight"><li><p>b</p></li></ul>'],
  ["in\n1999. no list", "<p>in<br>1999. no list</p>"],
  ["1. a\n   ```py\n   x = 1\n     y\n   ```\n2. b", `<ol class="tight"><li><p>a</p>${CODE("py", "x = 1\n  y")}</li><li><p>b</p></li></ol>`],
  ["```rust ignore\nfn a() {}\n\n\tb\n```\nafter", `${CODE("rust", "fn a() {}\n\n\tb")}<p>after</p>`],
  ["~~~\n```\n~~~", CODE("text", "```")],
  ["```\nopen", CODE("text", "open")],
  ["> a\n> > b\n> - c", '<blockquote><p>a</p><blockquote><p>b</p></blockquote><ul class="tight"><li><p>c</p></li></ul></blockquote>'],
  ["a\n\n---\n***\n\nb", "<p>a</p><hr><hr><p>b</p>"],
  ["| a | b\\|c |\n|:-:|--:|\n| `x` | **y** |\n| z |\n\nafter", '<div class="table"><table><thead><tr><th class="center">a</th><th class="end">b|c</th></tr></thead><tbody><tr><td class="center"><code>x</code></td><td class="end"><strong>y</strong></td></tr><tr><td class="center">z</td><td class="end"></td></tr></tbody></table></div><p>after</p>'],
  ["a | b\nc", "<p>a | b<br>c</p>"],
  ["[t *i*](https://a.b/c_(d)) ![alt](http://x.y/z.png) [no](ftp://x)", '<p><a href="https://a.b/c_(d)">t <em>i</em></a> <a href="http://x.y/z.png">alt</a> [no](ftp://x)</p>'],
  ["(see https://a.b/c_d?e=f.) **https://a.b**", '<p>(see <a href="https://a.b/c_d?e=f">https://a.b/c_d?e=f</a>.) <strong><a href="https://a.b/">https://a.b</a></strong></p>'],
  ["\\(a_1 * b_1\\) and $x_1*y_1*z$ cost $5 and $6", '<p><span class="math">\\(a_1 * b_1\\)</span> and <span class="math">$x_1*y_1*z$</span> cost $5 and $6</p>'],
  ["\\[\n- x\n= *y*\n\\]\n$$a$$", '<div class="math">\\[\n- x\n= *y*\n\\]</div><div class="math">$$a$$</div>'],
  ["<b>a</b> &amp; <br>", "<p>&lt;b&gt;a&lt;/b&gt; &amp;amp; &lt;br&gt;</p>"],
]) {
  test(`renders ${JSON.stringify(markdown)}`, async () => {
    assert.equal(await rendered(markdown), html);
  });
}

const LONG = `## Title

A *paragraph* of **two**
lines with \`code\` and [a link](https://example.com).
- item one
- item **two**
  1. nested
  2. again

  \`\`\`sh
  echo "in a list"
  \`\`\`
- last

\`\`\`js
const a = \`
  b\`;

\`\`
# no heading
\`\`\`
text right after
| a | b |
|---|---|
| 1 | 2 |

> quote
> - with a list

\\[ x
= y \\]

~~~
open to the end
  \``;

for (const size of [1, 2, 5, 40]) {
  test(`a stream in pieces of ${size} ends as the whole does`, async () => {
    cut = { size: 1e6, pauseMs: 0 };
    const whole = await rendered(LONG);
    // Frames come between the pieces, so that most of them are shown one by one.
    cut = { size, pauseMs: 4 };
    const streamed = await rendered(LONG);
    cut = { size: 1e6, pauseMs: 0 };
    // A block that grew keeps the newline before its closing fence.
    const level = (html) => html.replaceAll("\n</code>", "</code>");
    assert.equal(level(streamed), level(whole));
  });
}

test("nothing of it was complained about", () => {
  assert.deepEqual(page.complaints, []);
});
