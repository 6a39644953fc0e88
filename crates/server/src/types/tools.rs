//! Tools that a model may call. Must not know the engine or the tokenizer.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::fields::{Fields, typed};
use crate::types::value::Field;

/// Most tools of one request.
const MAX_TOOLS: usize = 128;
/// Longest name of a function, in bytes.
const MAX_NAME_BYTES: usize = 64;

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tool {
    pub(crate) name: String,
    /// A JSON schema; null where any object will do.
    pub(crate) parameters: Value,
    pub(crate) strict: bool,
    /// As the client sent it, for the template.
    pub(crate) json: Value,
}

/// Whether the model must, may or must not call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    None,
    Auto,
    Required,
    Named(String),
}

/// What a chat request says about tools.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tools {
    /// Those that may be called; none where the choice is none.
    pub(crate) offered: Vec<Tool>,
    pub(crate) choice: ToolChoice,
    /// Several calls in one reply.
    pub(crate) parallel: bool,
}

impl Tools {
    /// Takes `tools`, `tool_choice` and `parallel_tool_calls`.
    pub(crate) fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let tools = fields.take::<Vec<Value>>("tools")?.unwrap_or_default();
        if tools.len() > MAX_TOOLS {
            let problem = format!("{} tools; at most {MAX_TOOLS} are allowed", tools.len());
            return Err(ApiError::bad_field("tools", problem));
        }
        let tools: Vec<Tool> =
            tools.into_iter().enumerate().map(|(i, tool)| read_tool(i, tool)).collect::<Result<_, _>>()?;
        let mut names = HashSet::new();
        if let Some(twice) = tools.iter().find(|tool| !names.insert(tool.name.as_str())) {
            return Err(ApiError::bad_field(
                "tools",
                format!("the function {:?} stands there twice", twice.name),
            ));
        }
        let choice = fields.take::<ToolChoice>("tool_choice")?;
        let parallel = fields.take("parallel_tool_calls")?.unwrap_or(true);
        let choice = match choice {
            None | Some(ToolChoice::Auto) if tools.is_empty() => ToolChoice::None,
            None => ToolChoice::Auto,
            Some(choice) => choice,
        };
        let problem = match &choice {
            ToolChoice::Required if tools.is_empty() => "\"required\" needs `tools`".to_owned(),
            ToolChoice::Named(name) if !tools.iter().any(|tool| tool.name == *name) => {
                format!("the function {name:?} is not among `tools`")
            }
            // Tools that must not be called are not shown to the model.
            ToolChoice::None => return Ok(Self { offered: Vec::new(), choice, parallel }),
            _ => return Ok(Self { offered: tools, choice, parallel }),
        };
        Err(ApiError::bad_field("tool_choice", problem))
    }
}

fn read_tool(index: usize, tool: Value) -> Result<Tool, ApiError> {
    let at = |field: &str| format!("tools[{index}].{field}");
    let mut outer: Map<String, Value> = typed(format!("tools[{index}]"), tool)?;
    match outer.get("type").and_then(Value::as_str) {
        Some("function") => {}
        Some(other) => {
            return Err(ApiError::bad_field(
                at("type"),
                format!("is {other:?}; only functions can be called: \"function\""),
            ));
        }
        None => return Err(ApiError::bad_field(at("type"), "must be \"function\"")),
    }
    let function = outer.remove("function").ok_or_else(|| ApiError::bad_field(at("function"), "missing"))?;
    let function: Map<String, Value> = typed(at("function"), function)?;
    let take = |field: &str| function.get(field).filter(|value| !value.is_null()).cloned();
    let name = take("name").ok_or_else(|| ApiError::bad_field(at("function.name"), "missing"))?;
    let name: String = typed(at("function.name"), name)?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.bytes().all(plain) {
        let problem = format!("must be 1 to {MAX_NAME_BYTES} letters, digits, underscores, dashes and dots");
        return Err(ApiError::bad_field(at("function.name"), problem));
    }
    if let Some(description) = take("description") {
        typed::<String>(at("function.description"), description)?;
    }
    let parameters = take("parameters").unwrap_or(Value::Null);
    if !parameters.is_null() && !parameters.is_object() {
        return Err(ApiError::bad_field(
            at("function.parameters"),
            "must be a JSON schema, which is an object",
        ));
    }
    let strict = take("strict").map_or(Ok(false), |strict| typed(at("function.strict"), strict))?;
    let json = json!({ "type": "function", "function": function });
    Ok(Tool { name, parameters, strict, json })
}

impl Field for ToolChoice {
    fn read(value: Value) -> Result<Self, String> {
        const FORMS: &str = "must be \"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": …}}";
        match &value {
            Value::String(word) => match word.as_str() {
                "none" => Ok(Self::None),
                "auto" => Ok(Self::Auto),
                "required" | "any" => Ok(Self::Required),
                _ => Err(FORMS.to_owned()),
            },
            Value::Object(choice) if choice.get("type").and_then(Value::as_str) == Some("function") => {
                let name = value["function"]["name"].as_str().ok_or_else(|| FORMS.to_owned())?;
                Ok(Self::Named(name.to_owned()))
            }
            _ => Err(FORMS.to_owned()),
        }
    }
}
