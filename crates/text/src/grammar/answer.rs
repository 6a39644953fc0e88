//! The grammar of what comes behind the reasoning: the format, the calls, or either.

use std::fmt::Write;

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use r1_core::TokenId;
use serde_json::{Value, json};

use super::error::{Fault, GrammarError};
use super::vocabulary::{ToolTokens, Vocabulary};
use super::{Format, ToolChoice, ToolRule, ToolSyntax, Tools, ebnf, lark, regex, schema};

/// Most strings of a choice.
const MAX_CHOICES: usize = 2_500;
/// Most bytes of all strings of a choice.
const MAX_CHOICE_BYTES: usize = 256 << 10;
/// Most functions of a request.
const MAX_TOOLS: usize = 256;
/// Longest name of a function, in bytes.
const MAX_NAME_BYTES: usize = 256;
/// Between two tokens of JSON: nothing, a space, or one line break with its indent. The model cannot loop in it.
const WHITE_SPACE: &str = r" |\r?\n[ \t]{0,32}";

/// When the grammar takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begins {
    /// At once.
    AtOnce,
    /// Behind this token; until then any text may come.
    Behind(TokenId),
}

/// A grammar ready to be compiled.
pub(super) struct Answer {
    pub(super) begins: Begins,
    pub(super) grammar: TopLevelGrammar,
    /// Whose fault it is when the compiler refuses.
    pub(super) field: &'static str,
}

/// The grammar of a request, if it has one.
pub(super) fn answer(
    vocabulary: &Vocabulary,
    format: Option<&Format>,
    tools: Option<&Tools>,
) -> Result<Option<Answer>, GrammarError> {
    let format = format.map(format_grammar).transpose().map_err(|fault| fault.of("format"))?;
    let Some(tools) = tools else {
        return Ok(format.map(|grammar| Answer {
            begins: Begins::AtOnce,
            grammar: TopLevelGrammar::from_grammar(grammar),
            field: "format",
        }));
    };
    let tokens = vocabulary.tool_tokens.as_ref().map_err(|missing| {
        let reason =
            format!("this model's tokenizer has no token {}; it cannot call functions", missing.join(", "));
        GrammarError::new("tools", reason)
    })?;
    let called = called(tools)?;
    let mut grammars = Vec::new();
    let mut text = calls(tokens, tools, &called);
    let begins = match (&tools.choice, format) {
        (ToolChoice::Auto, None) => {
            text.push_str("start: calls\n");
            Begins::Behind(tokens.calls_begin)
        }
        (ToolChoice::Auto, Some(format)) => {
            let _ = writeln!(text, "start: <[{}]> calls | @format", tokens.calls_begin.0);
            grammars.push(GrammarWithLexer { name: Some("format".into()), ..format });
            Begins::AtOnce
        }
        (ToolChoice::Required | ToolChoice::Named(_), _) => {
            let _ = writeln!(text, "start: <[{}]> calls", tokens.calls_begin.0);
            Begins::AtOnce
        }
    };
    grammars.insert(0, GrammarWithLexer { name: Some("reply".into()), ..GrammarWithLexer::from_lark(text) });
    let mut schemas = 0;
    for &(i, rule) in &called {
        let held = rule.strict || tools.choice != ToolChoice::Auto;
        let arguments = arguments(&rule.parameters, held);
        let (arguments, size) = arguments.map_err(|fault| fault.of(format!("tools[{i}].parameters")))?;
        schemas += size;
        if schemas > schema::MAX_NODES {
            let reason = format!(
                "with these, the parameters of all functions are more than {} schemas",
                schema::MAX_NODES
            );
            return Err(GrammarError::new(format!("tools[{i}].parameters"), reason));
        }
        grammars.push(GrammarWithLexer { name: Some(format!("arguments{i}")), ..arguments });
    }
    let field = if grammars.iter().any(|g| g.name.as_deref() == Some("format")) {
        "format or tools"
    } else {
        "tools"
    };
    Ok(Some(Answer { begins, grammar: TopLevelGrammar { grammars, max_tokens: None }, field }))
}

/// The functions that may be called, with their places in the request.
fn called(tools: &Tools) -> Result<Vec<(usize, &ToolRule)>, GrammarError> {
    if tools.rules.is_empty() || tools.rules.len() > MAX_TOOLS {
        let reason = format!("{} functions; 1 to {MAX_TOOLS} are supported", tools.rules.len());
        return Err(GrammarError::new("tools", reason));
    }
    for (i, rule) in tools.rules.iter().enumerate() {
        let field = || format!("tools[{i}].name");
        let usable = !rule.name.is_empty() && rule.name.len() <= MAX_NAME_BYTES;
        if !usable || rule.name.chars().any(char::is_control) {
            let reason = format!("a name has 1 to {MAX_NAME_BYTES} bytes and no control characters");
            return Err(GrammarError::new(field(), reason));
        }
        if tools.rules[..i].iter().any(|other| other.name == rule.name) {
            return Err(GrammarError::new(field(), format!("there are two functions {:?}", rule.name)));
        }
    }
    let all = tools.rules.iter().enumerate();
    let ToolChoice::Named(name) = &tools.choice else { return Ok(all.collect()) };
    let named: Vec<_> = all.filter(|(_, rule)| rule.name == *name).collect();
    if named.is_empty() {
        let names: Vec<&str> = tools.rules.iter().map(|rule| rule.name.as_str()).collect();
        let reason = format!("there is no function {name:?}; there are {}", names.join(", "));
        return Err(GrammarError::new("tools.choice", reason));
    }
    Ok(named)
}

/// Lark of everything behind `<｜tool▁calls▁begin｜>`: the rule `calls`.
fn calls(tokens: &ToolTokens, tools: &Tools, called: &[(usize, &ToolRule)]) -> String {
    let mut text = String::new();
    let more = if tools.parallel { "(\"\\n\"? call)*" } else { "" };
    let _ = writeln!(text, "calls: call {more} <[{}]>", tokens.calls_end.0);
    let options: Vec<String> = called.iter().map(|(i, _)| format!("function{i}")).collect();
    let (begin, end) = (tokens.call_begin.0, tokens.call_end.0);
    let _ = writeln!(text, "call: <[{begin}]> ({}) <[{end}]>", options.join(" | "));
    for &(i, rule) in called {
        let sep = tokens.sep.0;
        let _ = match tools.syntax {
            ToolSyntax::Fenced => {
                let head = quoted(&format!("{}\n```json\n", rule.name));
                writeln!(text, "function{i}: \"function\" <[{sep}]> {head} @arguments{i} \"\\n```\"")
            }
            ToolSyntax::Plain => {
                writeln!(text, "function{i}: {} <[{sep}]> @arguments{i}", quoted(&rule.name))
            }
        };
    }
    text
}

/// A Lark string.
pub(super) fn quoted(text: &str) -> String {
    let json = Value::from(text).to_string();
    // Lark refuses DEL as it is.
    json.replace('\u{7f}', "\\u007f")
}

/// The grammar of a call's arguments, and how many schemas it is made of.
fn arguments(parameters: &Value, held: bool) -> Result<(GrammarWithLexer, usize), Fault> {
    let any = json!({"type": "object"});
    let empty = parameters.is_null() || parameters.as_object().is_some_and(serde_json::Map::is_empty);
    if empty || !held {
        return Ok((json_grammar(any), 1));
    }
    let Value::Object(map) = parameters else {
        return Err(Fault::new("the parameters are a JSON schema: an object"));
    };
    let mut map = map.clone();
    let of_type = map.entry("type").or_insert_with(|| "object".into());
    if of_type != "object" {
        return Err(Fault::at("/type", "arguments are an object: `type` must be \"object\""));
    }
    let (prepared, size) = schema::prepare(&Value::Object(map))?;
    Ok((json_grammar(prepared), size))
}

fn format_grammar(format: &Format) -> Result<GrammarWithLexer, Fault> {
    match format {
        Format::JsonObject => Ok(json_grammar(json!({"type": "object"}))),
        Format::JsonSchema(schema) => schema::prepare(schema).map(|(prepared, _)| json_grammar(prepared)),
        Format::Regex(text) => {
            regex::check(text)?;
            if text.is_empty() {
                return Err(Fault::new("the regex is empty"));
            }
            Ok(GrammarWithLexer::from_regex(text))
        }
        Format::Choice(strings) => choice(strings),
        Format::Grammar(text) => {
            let text = if ebnf::is_gbnf(text) {
                ebnf::to_lark(text)?
            } else {
                lark::check(text).map(|()| text.clone())?
            };
            Ok(GrammarWithLexer::from_lark(text))
        }
    }
}

fn json_grammar(mut schema: Value) -> GrammarWithLexer {
    if schema == Value::Bool(true) {
        schema = json!({});
    }
    if let Value::Object(map) = &mut schema {
        let options = json!({"whitespace_pattern": WHITE_SPACE, "coerce_one_of": true});
        map.insert("x-guidance".into(), options);
    }
    GrammarWithLexer::from_json_schema(schema)
}

fn choice(strings: &[String]) -> Result<GrammarWithLexer, Fault> {
    if strings.is_empty() || strings.len() > MAX_CHOICES {
        return Err(Fault::new(format!("{} choices; 1 to {MAX_CHOICES} are supported", strings.len())));
    }
    let mut bytes = 0;
    for (i, string) in strings.iter().enumerate() {
        bytes += string.len();
        if string.is_empty() {
            return Err(Fault::at(format!("choice {i}"), "a choice must not be empty"));
        }
        if bytes > MAX_CHOICE_BYTES {
            let reason = format!("the choices are longer than {} KiB in all", MAX_CHOICE_BYTES >> 10);
            return Err(Fault::at(format!("choice {i}"), reason));
        }
    }
    let options: Vec<String> = strings.iter().map(|s| quoted(s)).collect();
    Ok(GrammarWithLexer::from_lark(format!("start: CHOICE\nCHOICE: {}\n", options.join(" | "))))
}
