// Markdown as DOM nodes. Text becomes text nodes and nothing else, so that no output of a model can become markup.
// Every pass is linear in its input, and nesting is bounded: a model may write anything.

const MAX_BLOCK_DEPTH = 12;
const MAX_INLINE_DEPTH = 8;
// A longer paragraph is no prose; it is shown as it stands.
const MAX_INLINE_LEN = 20_000;
// A longer list goes on as another one, so that finished parts of it are not built again while it grows.
const MAX_LIST_ITEMS = 200;
const MAX_TABLE_ROWS = 1000;
const MAX_MATH_LINES = 100;
const MAX_TABLE_COLUMNS = 64;

/** An element with attributes; children are nodes or text. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** One of the icons that the page's markup declares. */
function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A link that may be followed, or null. Only absolute addresses: the page's own are no business of a model's. */
function safeHref(text) {
  let url;
  try {
    url = new URL(text);
  } catch {
    return null;
  }
  return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
}

function anchor(href) {
  return el("a", { href, rel: "noopener noreferrer", target: "_blank", title: href });
}

// ---- Inside a paragraph ----

const SPECIAL = /[\\`*_~[<$\n!]|https?:\/\//g;
const LINK =
  /\[((?:[^[\]\\\n]|\\.){1,1000})\]\( {0,8}(?:<([^<>\n]{1,2000})>|([^\s()<>]{1,2000}(?:\([^\s()<>]{0,200}\)[^\s()<>]{0,500}){0,4}))(?: {1,8}(?:"[^"\n]{0,500}"|'[^'\n]{0,500}'))? {0,8}\)/y;
const AUTOLINK = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y;
const BARE_URL = /https?:\/\/[^\s<>"`\\|*]{1,2000}/y;
const RUN = { "`": /`+/y, "*": /\*+/y, _: /_+/y, "~": /~+/y };
const PUNCTUATION = /[\p{P}\p{S}]/u;
const ASCII_PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}_]/u;

function at(pattern, text, index) {
  pattern.lastIndex = index;
  return pattern.exec(text);
}

/** indexOf that does not look twice for what is not there. */
function finder(text) {
  const absent = new Set();
  return (needle, from) => {
    if (absent.has(needle)) return -1;
    const found = text.indexOf(needle, from);
    if (found < 0) absent.add(needle);
    return found;
  };
}

/** Where runs of backticks stand, by their length. */
function backtickRuns(text) {
  const runs = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!runs.has(run.length)) runs.set(run.length, { starts: [], next: 0 });
    runs.get(run.length).starts.push(index);
  }
  return runs;
}

/** The address without the punctuation that ends the sentence it stands in. */
function trimUrl(url) {
  let end = url.length;
  while (end > 0 && ".,:;!?'\")]}".includes(url[end - 1])) {
    if (url[end - 1] === ")" && url.slice(0, end).includes("(")) break;
    end -= 1;
  }
  return url.slice(0, end);
}

/** Text, nodes and delimiters in order. */
function tokenize(text, links) {
  const tokens = [];
  const find = finder(text);
  let runs = null;
  let plain = "";
  const push = (token) => {
    if (plain) tokens.push(plain);
    plain = "";
    tokens.push(token);
  };
  const link = (href, label, raw) => {
    const target = links ? safeHref(href) : null;
    if (!target) {
      plain += raw;
      return;
    }
    const node = anchor(target);
    inline(node, label, false);
    push(node);
  };
  const math = (open, close, index) => {
    const end = find(close, index + open.length);
    if (end < 0) return 0;
    const source = text.slice(index, end + close.length);
    push(el("span", { class: "math" }, source));
    return source.length;
  };

  let index = 0;
  for (;;) {
    const special = at(SPECIAL, text, index);
    plain += text.slice(index, special ? special.index : text.length);
    if (!special) break;
    index = special.index;
    const char = special[0];
    const next = text[index + 1] ?? "";
    let taken = 0;
    if (char === "\\") {
      if (next === "(") taken = math("\\(", "\\)", index);
      else if (next === "[") taken = math("\\[", "\\]", index);
      if (!taken && ASCII_PUNCTUATION.test(next)) {
        plain += next;
        taken = 2;
      }
    } else if (char === "`") {
      const { length } = at(RUN["`"], text, index)[0];
      runs ??= backtickRuns(text);
      const same = runs.get(length);
      while (same.starts[same.next] <= index) same.next += 1;
      const end = same.starts[same.next];
      if (end === undefined) {
        plain += text.slice(index, index + length);
        taken = length;
      } else {
        let code = text.slice(index + length, end).replaceAll("\n", " ");
        if (code.startsWith(" ") && code.endsWith(" ") && code.trim()) code = code.slice(1, -1);
        push(el("code", {}, code));
        taken = end + length - index;
      }
    } else if (char === "*" || char === "_" || char === "~") {
      const { length } = at(RUN[char], text, index)[0];
      const before = text[index - 1] ?? " ";
      const after = text[index + length] ?? " ";
      const [spaceBefore, spaceAfter] = [/\s/.test(before), /\s/.test(after)];
      const [pointBefore, pointAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
      let opens = !spaceAfter && (!pointAfter || spaceBefore || pointBefore);
      let closes = !spaceBefore && (!pointBefore || spaceAfter || pointAfter);
      if (char === "_") [opens, closes] = [opens && !WORD.test(before), closes && !WORD.test(after)];
      push({ char, left: length, opens, closes, opened: [], closed: [] });
      taken = length;
    } else if (char === "[" || (char === "!" && next === "[")) {
      const match = at(LINK, text, index + (char === "!"));
      if (match) {
        taken = match[0].length + (char === "!");
        link(match[2] ?? match[3], match[1], text.slice(index, index + taken));
      }
    } else if (char === "<") {
      const match = at(AUTOLINK, text, index);
      if (match) {
        link(match[1], match[1], match[0]);
        taken = match[0].length;
      }
    } else if (char === "$") {
      if (next === "$") taken = math("$$", "$$", index);
      else if (/[^\s$]/.test(next)) {
        const end = find("$", index + 2);
        // Prices are no formulas.
        const prose = end < 0 || /\s/.test(text[end - 1]) || /\d/.test(text[end + 1] ?? "");
        if (!prose && !text.slice(index, end).includes("\n")) taken = math("$", "$", index);
      }
    } else if (char === "\n") {
      plain = plain.trimEnd();
      push(el("br"));
      taken = 1;
    } else if (char !== "!" && !WORD.test(text[index - 1] ?? " ")) {
      const url = trimUrl(at(BARE_URL, text, index)?.[0] ?? "");
      const target = links ? safeHref(url) : null;
      if (target) {
        const node = anchor(target);
        node.append(url);
        push(node);
        taken = url.length;
      }
    }
    if (!taken) {
      plain += char;
      taken = char.length;
    }
    index += taken;
  }
  if (plain) tokens.push(plain);
  return tokens;
}

/** Finds for each closing delimiter the nearest one that opens; what stands between them unpaired stays text. */
function pairDelimiters(tokens) {
  const open = [];
  const waiting = { "*": 0, _: 0, "~": 0 };
  const least = (token) => (token.char === "~" ? 2 : 1);
  const drop = () => {
    waiting[open.pop().char] -= 1;
  };
  for (const token of tokens) {
    if (!token.char) continue;
    while (token.closes && token.left >= least(token) && waiting[token.char] > 0) {
      while (open.at(-1).char !== token.char) drop();
      const opener = open.at(-1);
      const size = Math.min(2, opener.left, token.left);
      const tag = token.char === "~" ? "s" : size === 2 ? "strong" : "em";
      opener.left -= size;
      opener.opened.push(tag);
      token.left -= size;
      token.closed.push(tag);
      if (opener.left < least(opener)) drop();
    }
    if (token.opens && token.left >= least(token)) {
      open.push(token);
      waiting[token.char] += 1;
    }
  }
}

/** Appends a paragraph's text to `parent`. */
function inline(parent, text, links = true) {
  if (text.length > MAX_INLINE_LEN) {
    parent.append(text);
    return;
  }
  const tokens = tokenize(text, links);
  pairDelimiters(tokens);
  const path = [parent];
  for (const token of tokens) {
    if (!token.char) {
      path.at(-1).append(token);
      continue;
    }
    for (let n = token.closed.length; n > 0; n -= 1) path.pop();
    if (token.left) path.at(-1).append(token.char.repeat(token.left));
    for (const tag of token.opened.reverse()) {
      let node = path.at(-1);
      if (path.length <= MAX_INLINE_DEPTH) {
        node = el(tag);
        path.at(-1).append(node);
      }
      path.push(node);
    }
  }
}

// ---- Blocks ----

// No tool writes longer fences; a line of a thousand backticks is text.
const FENCE = /^( *)(`{3,16}|~{3,16})(?![`~])([^`]*)$/;
const HEADING = /^ *(#{1,6})(?: +(.*))?$/;
const RULE = /^ *([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ *> ?/;
const ITEM = /^( *)([-*+]|(\d{1,9})([.)]))(?: +(?=\S)|$)/;
const MATH = /^ *(\\\[|\$\$)/;
const TABLE_RULE = /^[ |:-]+$/;

const isBlank = (line) => !/\S/.test(line);
const indentOf = (line) => line.length - line.trimStart().length;

function item(line) {
  const match = ITEM.exec(line);
  if (!match) return null;
  const [whole, indent, bullet, number, point] = match;
  return { indent: indent.length, end: Math.max(whole.length, indent.length + 2), kind: point ?? bullet, number };
}

/** Whether a table begins with line `i`. */
function startsTable(lines, i) {
  return lines[i].includes("|") && TABLE_RULE.test(lines[i + 1] ?? "");
}

/** Whether the line ends a paragraph that stands before it. */
function interrupts(line) {
  if (FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || RULE.test(line) || MATH.test(line)) return true;
  const start = item(line);
  // "1999. It was…" may be a wrapped sentence.
  return start !== null && (start.number === undefined || start.number === "1");
}

/** A table row's cells. */
function cells(line) {
  const row = line.trim();
  const found = [];
  let cell = "";
  for (let i = row.startsWith("|") ? 1 : 0; i < row.length; i += 1) {
    if (row[i] === "\\" && row[i + 1] === "|") {
      cell += "|";
      i += 1;
    } else if (row[i] === "|") {
      found.push(cell.trim());
      cell = "";
    } else cell += row[i];
  }
  if (cell || !row.endsWith("|")) found.push(cell.trim());
  return found;
}

/** A code block; what it shows is `text`'s data. */
function codeBlock(language, text) {
  const copy = el("button", { type: "button", class: "quiet copy-code" }, icon("copy"), el("span", {}, "Copy"));
  copy.setAttribute("aria-label", "Copy this code");
  const head = el("div", { class: "code-head" }, el("span", {}, language || "text"), copy);
  const pre = el("pre", { tabindex: "0", "aria-label": language ? `${language} code` : "Code" });
  pre.append(el("code", { dir: "ltr" }, text));
  return el("div", { class: "code" }, head, pre);
}

const closesFence = (fence) => new RegExp(`^ *\\${fence[0]}{${fence.length},} *$`);

function fenceBlock(lines, i) {
  const [, indent, fence, info] = FENCE.exec(lines[i]);
  const closing = closesFence(fence);
  const body = [];
  let next = i + 1;
  while (next < lines.length && !closing.test(lines[next])) {
    const line = lines[next];
    body.push(line.slice(Math.min(indentOf(line), indent.length)));
    next += 1;
  }
  const closed = next < lines.length;
  const text = document.createTextNode(body.join("\n"));
  const node = codeBlock(info.trim().split(/\s/, 1)[0].slice(0, 40), text);
  return { node, next: closed ? next + 1 : next, code: closed ? null : { text, closing, indent: indent.length } };
}

function listBlock(lines, i, depth) {
  const first = item(lines[i]);
  const node = el(first.number === undefined ? "ul" : "ol");
  if (first.number !== undefined && Number(first.number) !== 1) node.setAttribute("start", Number(first.number));
  let [next, loose] = [i, false];
  while (next < lines.length && node.childElementCount < MAX_LIST_ITEMS) {
    const here = item(lines[next]);
    if (!here || here.kind !== first.kind || RULE.test(lines[next])) break;
    const inner = [lines[next].slice(here.end)];
    let blank = false;
    for (next += 1; next < lines.length; next += 1) {
      const line = lines[next];
      if (isBlank(line)) {
        blank = true;
        continue;
      }
      const indent = indentOf(line);
      // Models do not wrap lines: what is not indented does not go on with the item.
      if (indent < first.indent + 2) break;
      if (blank) inner.push("");
      loose ||= blank;
      inner.push(line.slice(Math.min(indent, here.end)));
      blank = false;
    }
    loose ||= blank && next < lines.length && item(lines[next])?.kind === first.kind;
    node.append(el("li", {}, ...blocks(inner, depth + 1).map((block) => block.node)));
  }
  if (!loose) node.setAttribute("class", "tight");
  return { node, next };
}

function quoteBlock(lines, i, depth) {
  let next = i;
  const inner = [];
  while (next < lines.length && QUOTE.test(lines[next])) {
    inner.push(lines[next].replace(QUOTE, ""));
    next += 1;
  }
  return { node: el("blockquote", {}, ...blocks(inner, depth + 1).map((block) => block.node)), next };
}

function tableBlock(lines, i) {
  if (!startsTable(lines, i)) return null;
  const [head, rule] = [cells(lines[i]), cells(lines[i + 1])];
  if (head.length !== rule.length || head.length > MAX_TABLE_COLUMNS) return null;
  if (!rule.every((cell) => /^:?-+:?$/.test(cell))) return null;
  const align = rule.map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "end") : "start"));
  const row = (tag, texts) => {
    const tr = el("tr");
    for (const [column, side] of align.entries()) {
      const cell = el(tag, { class: side });
      inline(cell, texts[column] ?? "");
      tr.append(cell);
    }
    return tr;
  };
  const body = el("tbody");
  let next = i + 2;
  while (next < lines.length && next - i < MAX_TABLE_ROWS && lines[next].includes("|")) {
    body.append(row("td", cells(lines[next])));
    next += 1;
  }
  const table = el("table", {}, el("thead", {}, row("th", head)), body);
  return { node: el("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, table), next };
}

/** A formula on lines of its own; it ends at the latest before a blank line. */
function mathBlock(lines, i) {
  const [whole, open] = MATH.exec(lines[i]);
  const close = open === "$$" ? "$$" : "\\]";
  let next = i;
  let from = whole.length;
  for (; next < lines.length && !isBlank(lines[next]); next += 1, from = 0) {
    if (next - i >= MAX_MATH_LINES) return null;
    const end = lines[next].indexOf(close, from);
    if (end < 0) continue;
    if (!/^[\s.,;]*$/.test(lines[next].slice(end + 2))) return null;
    next += 1;
    break;
  }
  return { node: el("div", { class: "math", tabindex: "0" }, lines.slice(i, next).join("\n")), next };
}

function paragraphBlock(lines, i, flat) {
  let next = i + 1;
  while (next < lines.length && !isBlank(lines[next])) {
    if (!flat && (interrupts(lines[next]) || startsTable(lines, next))) break;
    next += 1;
  }
  const node = el("p", { dir: "auto" });
  const text = lines.slice(i, next).map((line) => line.trimStart());
  inline(node, text.join("\n").trimEnd());
  return { node, next };
}

function block(lines, i, depth) {
  const line = lines[i];
  if (FENCE.test(line)) return fenceBlock(lines, i);
  const heading = HEADING.exec(line);
  if (heading) {
    // The page's own headings come first.
    const node = el(`h${Math.min(6, heading[1].length + 2)}`, { dir: "auto" });
    inline(node, (heading[2] ?? "").trimEnd().replace(/(?:^| )#+$/, ""));
    return { node, next: i + 1 };
  }
  if (RULE.test(line)) return { node: el("hr"), next: i + 1 };
  const flat = depth >= MAX_BLOCK_DEPTH;
  if (!flat && QUOTE.test(line)) return quoteBlock(lines, i, depth);
  if (!flat && item(line)) return listBlock(lines, i, depth);
  return (MATH.test(line) && mathBlock(lines, i)) || tableBlock(lines, i) || paragraphBlock(lines, i, flat);
}

/** The blocks of some lines: where each starts, its node, and `code` where it is a fence that nothing closes. */
function blocks(lines, depth = 0) {
  const found = [];
  for (let i = 0; i < lines.length; ) {
    if (isBlank(lines[i])) {
      i += 1;
      continue;
    }
    const { node, next, code } = block(lines, i, depth);
    found.push({ start: i, node, code });
    i = next;
  }
  return found;
}

/** Lines without carriage returns; outside of code a tab at the beginning is as wide as four spaces. */
function normalized(raw) {
  let closing = null;
  return raw.map((line) => {
    const text = line.endsWith("\r") ? line.slice(0, -1) : line;
    if (closing) {
      if (closing.test(text)) closing = null;
      return text;
    }
    const fence = FENCE.exec(text);
    if (fence) closing = closesFence(fence[2]);
    return text.replace(/^\t+/, (tabs) => "    ".repeat(tabs.length));
  });
}

/** A text that grows: only the blocks that may still change are built again. */
class Markdown {
  #root;
  /** Source of the blocks that may still change; within an open fence, of the line that is not whole yet. */
  #tail = "";
  #open = [];
  /** The fence that is open at the end of the text. */
  #code = null;

  constructor(root) {
    this.#root = root;
  }

  append(text) {
    this.#tail += text;
  }

  /** Shows what was appended; `whole` when nothing follows. */
  render(whole = false) {
    if (this.#code && !this.#growCode(whole)) return;
    const raw = this.#tail.split("\n");
    const lines = normalized(raw);
    const found = blocks(lines);
    for (const node of this.#open) node.remove();
    this.#root.append(...found.map((block) => block.node));
    // What the last line is may change with its next character, so it ends no block yet.
    const settled = whole ? lines.length : lines.length - 1;
    const last = found.findLastIndex((block) => block.start < settled);
    this.#open = found.slice(Math.max(last, 0)).map((block) => block.node);
    if (last < 0) return;
    const { start, code } = found[last];
    if (code && !whole) {
      // From here on the block only grows; what was shown of its last line moves to a node of its own.
      const rest = lines.slice(start + 1, -1).map((line) => line.slice(Math.min(indentOf(line), code.indent)));
      code.text.data = rest.map((line) => `${line}\n`).join("");
      code.partial = document.createTextNode("");
      code.text.after(code.partial);
      this.#code = code;
      this.#tail = raw.at(-1);
      this.#open = [];
      this.#growCode(false);
    } else {
      this.#tail = raw.slice(start).join("\n");
    }
  }

  /** Appends to the open fence; true once it is closed and the tail is what follows it. */
  #growCode(whole) {
    const { text, partial, closing, indent } = this.#code;
    const lines = this.#tail.replaceAll("\r", "").split("\n");
    const end = lines.findIndex((line, i) => closing.test(line) && (whole || i < lines.length - 1));
    const shown = (line) => line.slice(Math.min(indentOf(line), indent));
    const body = lines.slice(0, end < 0 ? lines.length - 1 : end);
    text.appendData(body.map((line) => `${shown(line)}\n`).join(""));
    if (end < 0) {
      this.#tail = lines.at(-1);
      // It may become the closing fence.
      partial.data = !whole && /^ *(?:`+|~+)$/.test(this.#tail) ? "" : shown(this.#tail);
      return false;
    }
    partial.remove();
    this.#tail = lines.slice(end + 1).join("\n");
    this.#code = null;
    return true;
  }
}
