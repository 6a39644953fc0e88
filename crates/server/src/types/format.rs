//! What form a reply must have, in the words of every server that has some. Must not know the engine or the tokenizer.

use r1_text::Format;
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::fields::{Fields, typed};

/// A form, and the field that asked for it.
#[derive(Clone, Debug)]
pub(crate) struct AskedFormat {
    pub(crate) param: String,
    pub(crate) format: Format,
}

/// Takes every field that asks for a form; at most one may.
pub(crate) fn take_format(fields: &mut Fields) -> Result<Option<AskedFormat>, ApiError> {
    let mut asked: Vec<AskedFormat> = Vec::new();
    let mut ask = |param: String, format: Format| asked.push(AskedFormat { param, format });
    if let Some(format) = fields.take::<Map<String, Value>>("response_format")? {
        read_response_format(format, &mut ask)?;
    }
    if let Some(outputs) = fields.take::<Map<String, Value>>("structured_outputs")? {
        read_structured_outputs(outputs, &mut ask)?;
    }
    // vLLM's, then SGLang's and llama-server's.
    for name in ["guided_json", "json_schema"] {
        if let Some(schema) = fields.take::<Value>(name)? {
            ask(name.to_owned(), read_schema(name, schema)?);
        }
    }
    for name in ["guided_regex", "regex"] {
        if let Some(regex) = fields.take::<String>(name)? {
            ask(name.to_owned(), Format::Regex(regex));
        }
    }
    for name in ["guided_grammar", "ebnf", "grammar"] {
        if let Some(grammar) = fields.take::<String>(name)? {
            ask(name.to_owned(), Format::Grammar(grammar));
        }
    }
    if let Some(choices) = fields.take::<Vec<String>>("guided_choice")?.filter(|choices| !choices.is_empty())
    {
        ask("guided_choice".to_owned(), Format::Choice(choices));
    }
    if fields.take::<bool>("guided_json_object")? == Some(true) {
        ask("guided_json_object".to_owned(), Format::JsonObject);
    }
    // How it is done is the server's affair.
    for name in ["guided_decoding_backend", "guided_whitespace_pattern"] {
        fields.take::<Value>(name)?;
    }
    if let [first, second, ..] = &asked[..] {
        let problem = format!("contradicts `{}`: a reply has one form", first.param);
        return Err(ApiError::bad_field(second.param.clone(), problem));
    }
    Ok(asked.pop())
}

fn read_response_format(
    mut format: Map<String, Value>,
    ask: &mut impl FnMut(String, Format),
) -> Result<(), ApiError> {
    const AT: &str = "response_format";
    let kind = format.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    match kind.as_str() {
        "text" => {}
        "json_object" => match format.remove("schema").filter(|schema| !schema.is_null()) {
            // As llama-server and others have it.
            Some(schema) => ask(format!("{AT}.schema"), read_schema("response_format.schema", schema)?),
            None => ask(AT.to_owned(), Format::JsonObject),
        },
        "json_schema" => {
            let at = format!("{AT}.json_schema");
            let outer =
                format.remove("json_schema").ok_or_else(|| ApiError::bad_field(at.clone(), "missing"))?;
            let mut outer: Map<String, Value> = typed(at.clone(), outer)?;
            let at = format!("{at}.schema");
            let schema = outer.remove("schema").filter(|schema| !schema.is_null());
            let schema = schema.ok_or_else(|| ApiError::bad_field(at.clone(), "missing"))?;
            let format = read_schema(&at, schema)?;
            ask(at, format);
        }
        "structural_tag" => {
            return Err(ApiError::not_supported(
                format!("{AT}.type"),
                "`tools` with `tool_choice` constrain calls, `json_schema` the answer",
            ));
        }
        _ => {
            let problem = "must be \"text\", \"json_object\" or \"json_schema\"";
            return Err(ApiError::bad_field(format!("{AT}.type"), problem));
        }
    }
    Ok(())
}

fn read_structured_outputs(
    outputs: Map<String, Value>,
    ask: &mut impl FnMut(String, Format),
) -> Result<(), ApiError> {
    for (name, value) in outputs {
        let at = format!("structured_outputs.{name}");
        if value.is_null() {
            continue;
        }
        match name.as_str() {
            "json" => {
                let format = read_schema(&at, value)?;
                ask(at, format);
            }
            "regex" => ask(at.clone(), Format::Regex(typed(at, value)?)),
            "choice" => ask(at.clone(), Format::Choice(typed(at, value)?)),
            "grammar" => ask(at.clone(), Format::Grammar(typed(at, value)?)),
            "json_object" => {
                if typed::<bool>(at.clone(), value)? {
                    ask(at, Format::JsonObject);
                }
            }
            "structural_tag" => {
                return Err(ApiError::not_supported(at, "`tools` with `tool_choice` constrain calls"));
            }
            // Preferences about how.
            _ => tracing::debug!(name, "unknown field of structured_outputs ignored"),
        }
    }
    Ok(())
}

/// A schema as an object or as its text.
fn read_schema(at: &str, schema: Value) -> Result<Format, ApiError> {
    let schema = match schema {
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| ApiError::bad_field(at.to_owned(), format!("is no JSON: {error}")))?,
        schema => schema,
    };
    match schema {
        Value::Object(_) | Value::Bool(_) => Ok(Format::JsonSchema(schema)),
        _ => Err(ApiError::bad_field(at.to_owned(), "must be a JSON schema, which is an object")),
    }
}
