//! Grammars over a vocabulary of DeepSeek-V3's size: what compiling costs, what a mask costs on the way through a reply,
//! cold and warm, and what a constraint holds in memory.
//!
//! `R1_TOKENIZER_DIR` names a directory with a `tokenizer.json`; without it a vocabulary of 129,280 tokens is made up.
#![forbid(unsafe_code)]

use std::collections::{BTreeSet, HashMap};
use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use r1_core::{Allowed, TokenConstraint, TokenId};
use r1_text::{Constraint, Format, Grammars, ReplyRules, Tokenizer, ToolChoice, ToolRule, ToolSyntax, Tools};
use serde_json::{Map, Value, json};

/// Walks of each reply after the first.
const WARM_WALKS: usize = 20;
/// Constraints alive at once, to measure one.
const HELD: usize = 64;
const V3_VOCAB: usize = 129_280;

fn main() {
    let (tokenizer, what) = match std::env::var_os("R1_TOKENIZER_DIR") {
        Some(dir) => (
            Tokenizer::from_dir(Path::new(&dir)).expect("R1_TOKENIZER_DIR holds a tokenizer"),
            "R1_TOKENIZER_DIR's",
        ),
        None => (synthetic(), "a made-up"),
    };
    let eos = tokenizer.token_to_id("<｜end▁of▁sentence｜>").expect("DeepSeek's EOS");
    let vocab_size = tokenizer.vocab_size().max(V3_VOCAB);
    println!("git {}; {what} vocabulary, {} tokens, {vocab_size} logits", git_hash(), tokenizer.vocab_size());
    let start = Instant::now();
    let grammars = Grammars::new(&tokenizer, &[eos], vocab_size).expect("grammars");
    println!("Grammars::new: {:.0} ms\n", start.elapsed().as_secs_f64() * 1e3);
    let bench = Bench { words: Words::new(&tokenizer), tokenizer, grammars, eos, vocab_size };
    println!(
        "| reply | compile ms | begin us | tokens | cold mask us: median, p99, max | warm mask us: median, p99, max | accept us | KiB each |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for (name, rules, text) in replies() {
        bench.run(name, &rules, &text);
    }
    println!();
    for (name, format) in large() {
        bench.compile(name, format);
    }
}

struct Bench {
    tokenizer: Tokenizer,
    words: Words,
    grammars: Grammars,
    eos: TokenId,
    vocab_size: usize,
}

impl Bench {
    fn run(&self, name: &str, rules: &ReplyRules, text: &str) {
        let start = Instant::now();
        let first = self.constraint(rules);
        let compile = start.elapsed();
        let mut cold = Times::default();
        let mut accepts = Times::default();
        let tokens = self.walk(first, text, &mut cold, &mut accepts);
        let mut warm = Times::default();
        let mut begin = Times::default();
        for _ in 0..WARM_WALKS {
            let start = Instant::now();
            let constraint = self.constraint(rules);
            begin.0.push(start.elapsed());
            self.walk(constraint, text, &mut warm, &mut accepts);
        }
        let before = resident_kib();
        let held: Vec<Constraint> = (0..HELD)
            .map(|_| {
                let mut constraint = self.constraint(rules);
                self.advance(&mut constraint, text, &mut Times::default(), &mut Times::default());
                constraint
            })
            .collect();
        let each = (resident_kib() - before) / HELD as f64;
        black_box(held);
        println!(
            "| {name} | {:.1} | {:.0} | {tokens} | {cold} | {warm} | {:.1} | {each:.0} |",
            compile.as_secs_f64() * 1e3,
            begin.median(),
            accepts.median()
        );
    }

    /// Only the compiling, of what is as large as is let in.
    fn compile(&self, name: &str, format: Format) {
        let rules = ReplyRules { format: Some(format), ..ReplyRules::default() };
        let (start, cpu) = (Instant::now(), cpu_ms());
        let result = self.grammars.constraint(&rules);
        let (elapsed, cpu) = (start.elapsed().as_secs_f64() * 1e3, cpu_ms() - cpu);
        match result {
            Ok(_) => println!("{name}: compiled in {elapsed:.1} ms ({cpu:.0} ms of CPU)"),
            Err(error) => println!("{name}: refused in {elapsed:.1} ms ({cpu:.0} ms of CPU): {error}"),
        }
    }

    fn constraint(&self, rules: &ReplyRules) -> Constraint {
        self.grammars
            .constraint(rules)
            .unwrap_or_else(|e| panic!("{e}"))
            .expect("rules that demand something")
    }

    fn walk(&self, mut constraint: Constraint, text: &str, masks: &mut Times, accepts: &mut Times) -> usize {
        let (tokens, mask) = self.advance(&mut constraint, text, masks, accepts);
        assert!(bit(&mask, self.eos), "the reply may end: {text}");
        tokens
    }

    /// Goes along the text by the longest tokens that the mask allows; gives the last mask.
    fn advance(
        &self,
        constraint: &mut Constraint,
        text: &str,
        masks: &mut Times,
        accepts: &mut Times,
    ) -> (usize, Vec<u32>) {
        let mut mask = vec![0; self.vocab_size.div_ceil(32)];
        let mut rest = text;
        let mut tokens = 0;
        loop {
            mask.fill(0);
            let start = Instant::now();
            let allowed = constraint.fill_mask(&mut mask).unwrap_or_else(|e| panic!("{e}"));
            masks.0.push(start.elapsed());
            if allowed == Allowed::Any {
                mask.fill(u32::MAX);
            }
            if rest.is_empty() {
                return (tokens, mask);
            }
            let token = self.words.longest(&self.tokenizer, rest, &mask);
            rest = &rest[self.tokenizer.token_bytes(token).len()..];
            let start = Instant::now();
            constraint.accept(token).unwrap_or_else(|e| panic!("{e}"));
            accepts.0.push(start.elapsed());
            tokens += 1;
        }
    }
}

/// Tokens by their text.
struct Words(HashMap<Vec<u8>, TokenId>);

impl Words {
    fn new(tokenizer: &Tokenizer) -> Self {
        let ids = (0..tokenizer.vocab_size() as u32).map(TokenId);
        // Only whole characters, so that the rest of a text stays one.
        let whole =
            ids.filter(|&id| std::str::from_utf8(tokenizer.token_bytes(id)).is_ok_and(|s| !s.is_empty()));
        Self(whole.map(|id| (tokenizer.token_bytes(id).to_vec(), id)).collect())
    }

    fn longest(&self, tokenizer: &Tokenizer, text: &str, mask: &[u32]) -> TokenId {
        let added = tokenizer.added_tokens().iter().find(|t| text.starts_with(&t.content) && bit(mask, t.id));
        if let Some(token) = added {
            return token.id;
        }
        let lens = (1..=text.len().min(32)).rev();
        let found =
            lens.filter_map(|len| self.0.get(&text.as_bytes()[..len]).copied()).find(|&id| bit(mask, id));
        found.unwrap_or_else(|| panic!("no token of {:?} is allowed", &text[..text.len().min(40)]))
    }
}

fn bit(mask: &[u32], token: TokenId) -> bool {
    mask[token.0 as usize / 32] >> (token.0 % 32) & 1 == 1
}

#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    fn at(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let index = (share * (sorted.len() - 1) as f64).ceil() as usize;
        sorted[index].as_secs_f64() * 1e6
    }

    fn median(&self) -> f64 {
        self.at(0.5)
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.0}, {:.0}, {:.0}", self.median(), self.at(0.99), self.at(1.0))
    }
}

fn git_hash() -> String {
    let output = Command::new("git").args(["rev-parse", "--short", "HEAD"]).output();
    let hash = output.ok().filter(|o| o.status.success()).and_then(|o| String::from_utf8(o.stdout).ok());
    hash.map_or_else(|| "unknown".into(), |hash| hash.trim().to_owned())
}

/// Resident memory of this process, from Linux's accounts.
fn resident_kib() -> f64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|n| n.parse::<f64>().ok());
    pages.map_or(f64::NAN, |pages| pages * 4.0)
}

/// CPU time of this process, from Linux's accounts, in steps of 10 ms: what a compile costs on a machine that is busy.
fn cpu_ms() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|n| n.parse::<f64>().ok()).unwrap_or(f64::NAN);
    (ticks(11) + ticks(12)) * 10.0
}

fn of_format(format: Format) -> ReplyRules {
    ReplyRules { format: Some(format), ..ReplyRules::default() }
}

const STORY: &str = "The lighthouse keeper counted seven ships before dawn, and wrote each name in the ledger with care. \
    None of them answered his signal, so he lit the second lamp and waited for the fog to lift over the harbour.";

fn replies() -> Vec<(&'static str, ReplyRules, String)> {
    let person = json!({"name": "Ada Lovelace", "age": 36, "email": "ada@example.org", "tags": ["first", "poet"],
        "address": {"street": "12 St James's Square", "city": "London", "zip": "SW1Y"}, "bio": STORY, "active": true});
    let text = json!({"type": "string"});
    let schema = json!({
        "$defs": {"Address": {"type": "object", "properties": {"street": text, "city": text, "zip": {"type": "string", "pattern": "^[A-Z0-9 ]{3,8}$"}},
                  "required": ["street", "city", "zip"], "additionalProperties": false}},
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 80}, "age": {"type": "integer", "minimum": 0, "maximum": 150}, "email": {"type": "string", "format": "email"},
            "tags": {"type": "array", "items": {"enum": ["first", "poet", "analyst", "countess"]}}, "address": {"$ref": "#/$defs/Address"}, "bio": text, "active": {"type": "boolean"}},
        "required": ["name", "age", "email", "tags", "address", "bio", "active"], "additionalProperties": false
    });
    let rule = |i: usize| {
        let names = ["city", "country", "units", "days", "query", "limit"];
        let list: Map<String, Value> = names
            .iter()
            .map(|n| ((*n).to_owned(), json!({"type": if *n == "days" { "integer" } else { "string" }})))
            .collect();
        let parameters =
            json!({"type": "object", "properties": list, "required": names, "additionalProperties": false});
        ToolRule { name: format!("function_{i}"), parameters, strict: true }
    };
    let tools = Tools {
        rules: (0..8).map(rule).collect(),
        choice: ToolChoice::Auto,
        parallel: true,
        syntax: ToolSyntax::Fenced,
    };
    let arguments = r#"{"city": "Reykjavik", "country": "Iceland", "units": "metric", "days": 5, "query": "how strong is the wind today", "limit": "ten"}"#;
    let call = |i: usize| {
        format!(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>function_{i}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"
        )
    };
    let calls = format!("<｜tool▁calls▁begin｜>{}\n{}<｜tool▁calls▁end｜>", call(3), call(7));
    let spaced = |value: &Value| value.to_string().replace("\":", "\": ").replace(",\"", ", \"");
    let json_gbnf = "root ::= object\nvalue ::= object | array | string | number | (\"true\" | \"false\" | \"null\") ws\n\
        object ::= \"{\" ws ( string \":\" ws value (\",\" ws string \":\" ws value)* )? \"}\" ws\n\
        array ::= \"[\" ws ( value (\",\" ws value)* )? \"]\" ws\n\
        string ::= \"\\\"\" ( [^\"\\\\\\x7F\\x00-\\x1F] | \"\\\\\" ([\"\\\\bfnrt] | \"u\" [0-9a-fA-F]{4}) )* \"\\\"\" ws\n\
        number ::= (\"-\"? ([0-9] | [1-9] [0-9]{0,15})) (\".\" [0-9]+)? ws\nws ::= | \" \" | \"\\n\" [ \\t]{0,20}\n";
    let cities: Vec<String> = (0..1000).map(|i| format!("city number {i} of the coast")).collect();
    vec![
        ("json_object", of_format(Format::JsonObject), spaced(&person)),
        ("json_schema", of_format(Format::JsonSchema(schema)), spaced(&person)),
        (
            "regex: sentences",
            of_format(Format::Regex(r"([A-Z][a-z ,]+\. )*[A-Z][a-z ,]+\.".into())),
            STORY.into(),
        ),
        (
            "regex: date and mail",
            of_format(Format::Regex(r"\d{4}-\d{2}-\d{2} [\w.]{1,64}@[a-z]{1,63}\.[a-z]{2,6}".into())),
            "2026-11-22 ada.lovelace@example.org".into(),
        ),
        ("choice of 1000", of_format(Format::Choice(cities)), "city number 777 of the coast".into()),
        ("tool calls, 8 strict functions", ReplyRules { tools: Some(tools), ..ReplyRules::default() }, calls),
        ("gbnf: JSON", of_format(Format::Grammar(json_gbnf.into())), spaced(&person)),
    ]
}

/// Near the limits, and beyond them.
fn large() -> Vec<(&'static str, Format)> {
    let schema = Format::JsonSchema;
    let properties = |n: usize, required: bool| {
        let list: Map<String, Value> =
            (0..n).map(|i| (format!("property{i}"), json!({"type": "string"}))).collect();
        let names: Vec<String> = list.keys().filter(|_| required).cloned().collect();
        schema(
            json!({"type": "object", "properties": list, "required": names, "additionalProperties": false}),
        )
    };
    let values = |n: usize| -> Vec<String> { (0..n).map(|i| format!("value number {i}")).collect() };
    let objects = |n: usize| -> Value {
        let one = |i: usize| {
            let list: Map<String, Value> = (0..20)
                .map(|j| (format!("p{i}_{j}"), json!({"type": ["string", "null"], "maxLength": 10 + j})))
                .collect();
            json!({"type": "object", "properties": list, "required": ["p0_0"]})
        };
        json!({"type": "object", "properties": (0..n).map(|i| (format!("o{i}"), one(i))).collect::<Map<String, Value>>()})
    };
    vec![
        ("100 optional properties", properties(100, false)),
        ("250 optional properties", properties(250, false)),
        ("500 optional properties", properties(500, false)),
        ("500 required properties", properties(500, true)),
        ("1000 required properties", properties(1000, true)),
        ("enum of 1000", schema(json!({"enum": values(1000)}))),
        ("enum of 2500", schema(json!({"enum": values(2500)}))),
        ("enum of 5000", schema(json!({"enum": values(5000)}))),
        ("choice of 5000", Format::Choice(values(5000))),
        ("20 objects of 20", schema(objects(20))),
        ("50 objects of 20", schema(objects(50))),
        ("200 objects of 20", schema(objects(200))),
        ("500 objects of 20", schema(objects(500))),
        ("minItems 10000", schema(json!({"type": "array", "minItems": 10_000}))),
        ("maxLength 1000000", schema(json!({"type": "string", "maxLength": 1_000_000}))),
        (
            "16 patterns",
            schema(
                json!({"type": "object", "patternProperties": (0..16).map(|i| (format!("^key{i}_[a-z]+$"), json!({}))).collect::<Map<String, Value>>()}),
            ),
        ),
        ("letters of every script", Format::Regex(r"[\w\s]{1,2000}(\p{Greek}|\p{Han}){1,500}".into())),
        ("ambiguous repetition", Format::Regex("(a|b|ab){1,1000}c".into())),
        ("repetition in repetition", Format::Regex("(a{1,1000}){1,1000}".into())),
        (
            "enum of 10 MB",
            schema(
                json!({"enum": (0..200_000).map(|i| format!("a rather long value {i:030}")).collect::<Vec<_>>()}),
            ),
        ),
        ("itself", schema(json!({"$ref": "#"}))),
    ]
}

/// A byte-level vocabulary: bytes, then pieces of made-up words, digits and punctuation; the same on every machine.
fn synthetic() -> Tokenizer {
    let added = [
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜▁pad▁｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<think>",
        "</think>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    ];
    // GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100 on.
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 0x100;
    let alphabet: Vec<char> = (0..=255)
        .map(|b| {
            if printable(b) {
                return char::from(b);
            }
            next += 1;
            char::from_u32(next - 1).expect("a character")
        })
        .collect();
    let mut seen: BTreeSet<String> = BTreeSet::new();
    let mut pieces: Vec<String> = Vec::new();
    let mut push = |piece: String, pieces: &mut Vec<String>| {
        if seen.insert(piece.clone()) {
            pieces.push(piece);
        }
    };
    for c in &alphabet {
        push(c.to_string(), &mut pieces);
    }
    let mut state = 1u64;
    let mut random = |n: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 33) as usize) % n
    };
    let syllables = [
        "th", "e", "an", "in", "er", "on", "re", "st", "al", "or", "ing", "ed", "it", "le", "us", "ca", "po",
        "mi", "sh", "ou",
    ];
    let marks = [
        "\"", "\":", "\",", "{\"", "\"}", "},", "[", "]", "()", ");", "->", "=", ".\"", " \"", "\n", "\n\n",
        "  ", "    ",
    ];
    let wanted = V3_VOCAB - added.len();
    while pieces.len() < wanted {
        let mut piece = String::new();
        if random(2) == 0 {
            piece.push(' ');
        }
        match random(12) {
            0 => (0..=random(3)).for_each(|_| piece.push_str(marks[random(marks.len())])),
            1 => (0..=random(3)).for_each(|_| piece.push(char::from(b'0' + random(10) as u8))),
            2 => (0..=random(2))
                .for_each(|_| piece.push(char::from_u32(0x4E00 + random(20_000) as u32).unwrap_or('x'))),
            _ => (0..=random(5)).for_each(|_| piece.push_str(syllables[random(syllables.len())])),
        }
        let spelled = piece.bytes().map(|b| alphabet[b as usize]).collect();
        push(spelled, &mut pieces);
    }
    let id = |i: usize| Value::from(i);
    let vocab: Map<String, Value> =
        pieces.into_iter().enumerate().map(|(i, p)| (p, id(i + added.len()))).collect();
    let tokens: Vec<Value> =
        added.iter().enumerate().map(|(i, t)| json!({"id": i, "content": t, "special": true})).collect();
    let file = json!({
        "version": "1.0", "added_tokens": tokens, "normalizer": null, "post_processor": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": []}
    });
    Tokenizer::from_bytes(file.to_string().as_bytes(), None).expect("the vocabulary is well formed")
}
