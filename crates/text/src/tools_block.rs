//! The part of the system prompt that tells a model which functions it may call, for checkpoints whose chat template does
//! not write it. Knows nothing of templates.

use minijinja::value::Serde;
use serde_json::{Value, json};

use crate::error::{Result, TextError};
use crate::python::{JsonStyle, push, to_json};
use crate::tools::ToolSyntax;

/// A form of the block, by the checkpoints that were trained on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolsBlock {
    /// R1, V3 and V3-0324: each function as its whole JSON.
    DeepSeekV3,
    /// V3.1: name, description and parameters, then how to call.
    DeepSeekV31,
}

/// What R1's system prompt is where a conversation with tools has none.
const DEFAULT_SYSTEM: &str = "You are a helpful assistant.";

const V31_FORMAT: &str = "IMPORTANT: ALWAYS adhere to this exact format for tool use:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>{additional_tool_calls}<｜tool▁calls▁end｜>

Where:
- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces
";

impl ToolsBlock {
    /// The block that goes with a call syntax.
    pub fn of_syntax(syntax: ToolSyntax) -> Self {
        match syntax {
            ToolSyntax::Fenced => Self::DeepSeekV3,
            ToolSyntax::Plain => Self::DeepSeekV31,
        }
    }

    /// The system prompt with the block behind it. `tools` are as OpenAI writes them.
    ///
    /// # Errors
    /// [`TextError::BadTool`] when one has no `function.name`.
    pub fn append(self, system: &str, tools: &[Value]) -> Result<String> {
        let mut out = match (self, system) {
            (Self::DeepSeekV3, "") => DEFAULT_SYSTEM.to_owned(),
            _ => system.to_owned(),
        };
        if !out.is_empty() {
            out.push_str("\n\n");
        }
        out.push_str(match self {
            Self::DeepSeekV3 => "## Tools\n\n### Function\n",
            Self::DeepSeekV31 => "## Tools\nYou have access to the following tools:\n",
        });
        for (i, tool) in tools.iter().enumerate() {
            let function = &tool["function"];
            let name = function["name"].as_str().ok_or(TextError::BadTool(i))?;
            match self {
                Self::DeepSeekV3 => {
                    push(&mut out, format_args!("\n- `{name}`:\n```json\n{}\n```\n", dumps(tool)?));
                }
                Self::DeepSeekV31 => {
                    let description = function["description"].as_str().unwrap_or_default();
                    let none = json!({"type": "object", "properties": {}});
                    let parameters = Some(&function["parameters"]).filter(|p| !p.is_null()).unwrap_or(&none);
                    push(&mut out, format_args!("\n### {name}\nDescription: {description}\n\n"));
                    push(&mut out, format_args!("Parameters: {}\n", dumps(parameters)?));
                }
            }
        }
        if self == Self::DeepSeekV31 {
            out.push('\n');
            out.push_str(V31_FORMAT);
        }
        Ok(out)
    }
}

/// Python's `json.dumps(value, ensure_ascii=False)`.
fn dumps(value: &Value) -> Result<String> {
    to_json(&minijinja::Value::from(Serde(value)), &JsonStyle::default())
        .map_err(|e| TextError::Template { message: e.to_string() })
}
