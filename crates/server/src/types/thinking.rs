//! How much a model shall think, in the words of every server that has some. Must not know the engine or the tokenizer.

use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::fields::{Fields, typed};
use crate::types::value::{Field, must_be};

/// What a chat request says about thinking.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Thinking {
    /// On or off; `None` leaves it to the template.
    pub(crate) on: Option<bool>,
    /// Most tokens of it.
    pub(crate) budget: Option<u32>,
    /// How hard; the model's table says how many tokens that is.
    pub(crate) effort: Option<Effort>,
    /// The reply leaves it out.
    pub(crate) hidden: bool,
}

/// OpenAI's `reasoning_effort`, without `none`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effort {
    Minimal,
    Low,
    Medium,
    High,
}

/// `none` or an effort.
struct MaybeEffort(Option<Effort>);

impl Field for MaybeEffort {
    fn read(value: Value) -> Result<Self, String> {
        match value.as_str() {
            Some("none") => Ok(Self(None)),
            Some("minimal") => Ok(Self(Some(Effort::Minimal))),
            Some("low") => Ok(Self(Some(Effort::Low))),
            Some("medium") => Ok(Self(Some(Effort::Medium))),
            Some("high" | "xhigh" | "max") => Ok(Self(Some(Effort::High))),
            _ => Err("must be \"none\", \"minimal\", \"low\", \"medium\", \"high\" or \"xhigh\"".to_owned()),
        }
    }
}

/// Templates call the switch `thinking` (DeepSeek) or `enable_thinking` (Qwen).
const SWITCHES: [&str; 2] = ["thinking", "enable_thinking"];

impl Thinking {
    /// Takes every field that speaks of thinking, the switches of `chat_template_kwargs` among them, which afterwards say what
    /// was settled.
    pub(crate) fn take(fields: &mut Fields, kwargs: &mut Map<String, Value>) -> Result<Self, ApiError> {
        let mut thinking = Self::default();
        kwargs.retain(|name, value| !(SWITCHES.contains(&name.as_str()) && value.is_null()));
        for name in SWITCHES {
            if let Some(value) = kwargs.get(name) {
                let param = format!("chat_template_kwargs.{name}");
                let on =
                    value.as_bool().ok_or_else(|| ApiError::bad_field(param, "must be true or false"))?;
                thinking.switch("chat_template_kwargs", on)?;
            }
        }
        if let Some(on) = fields.take::<bool>("enable_thinking")? {
            thinking.switch("enable_thinking", on)?;
        }
        if let Some(value) = fields.take::<Value>("thinking")? {
            thinking.take_anthropic(&value)?;
        }
        let mut efforts = Vec::new();
        if let Some(effort) = fields.take::<MaybeEffort>("reasoning_effort")? {
            efforts.push(("reasoning_effort", effort));
        }
        if let Some(reasoning) = fields.take::<Map<String, Value>>("reasoning")? {
            thinking.take_reasoning(reasoning, &mut efforts)?;
        }
        for name in ["thinking_budget", "thinking_token_budget"] {
            if let Some(budget) = fields.take::<u32>(name)? {
                thinking.limit(name, budget)?;
            }
        }
        if let Some(include) = fields.take::<bool>("include_reasoning")? {
            thinking.hidden |= !include;
        }
        for (param, MaybeEffort(effort)) in efforts {
            match effort {
                None => thinking.switch(param, false)?,
                // A template that thinks only when it is told to is told to; one that was told not to keeps silent.
                Some(effort) => {
                    thinking.on.get_or_insert(true);
                    thinking.effort = Some(effort);
                }
            }
        }
        if let Some(on) = thinking.on {
            // Clients do not know which name the template has.
            for name in SWITCHES {
                kwargs.insert(name.into(), on.into());
            }
        }
        Ok(thinking)
    }

    /// `{"type": "enabled", "budget_tokens": 1024}`, as Anthropic and DeepSeek have it.
    fn take_anthropic(&mut self, value: &Value) -> Result<(), ApiError> {
        if let Value::Bool(on) = value {
            return self.switch("thinking", *on);
        }
        let Some(kind) = value.get("type") else {
            return Err(ApiError::bad_field("thinking", must_be("an object with a `type`", value)));
        };
        match kind.as_str() {
            Some("enabled") => self.switch("thinking", true)?,
            Some("disabled") => self.switch("thinking", false)?,
            Some("auto" | "adaptive") => {}
            _ => {
                return Err(ApiError::bad_field("thinking", "`type` must be \"enabled\" or \"disabled\""));
            }
        }
        match value.get("budget_tokens").filter(|budget| !budget.is_null()) {
            Some(budget) => self.limit("thinking", typed("thinking.budget_tokens", budget.clone())?),
            None => Ok(()),
        }
    }

    /// `{"effort": …, "max_tokens": …, "enabled": …, "exclude": …}`, as OpenRouter and OpenAI's Responses have it.
    fn take_reasoning(
        &mut self,
        mut reasoning: Map<String, Value>,
        efforts: &mut Vec<(&'static str, MaybeEffort)>,
    ) -> Result<(), ApiError> {
        let mut take = |name: &str| reasoning.remove(name).filter(|value| !value.is_null());
        if let Some(effort) = take("effort") {
            efforts.push(("reasoning.effort", typed("reasoning.effort", effort)?));
        }
        if let Some(budget) = take("max_tokens") {
            self.limit("reasoning", typed("reasoning.max_tokens", budget)?)?;
        }
        if let Some(on) = take("enabled") {
            self.switch("reasoning", typed("reasoning.enabled", on)?)?;
        }
        if let Some(hidden) = take("exclude") {
            self.hidden |= typed::<bool>("reasoning.exclude", hidden)?;
        }
        Ok(())
    }

    fn switch(&mut self, param: &'static str, on: bool) -> Result<(), ApiError> {
        if self.on.is_some_and(|already| already != on) {
            return Err(ApiError::bad_field(
                param,
                "contradicts what the request says elsewhere about thinking (`chat_template_kwargs`, `thinking`, \
                 `reasoning`, `reasoning_effort`)",
            ));
        }
        self.on = Some(on);
        Ok(())
    }

    fn limit(&mut self, param: &'static str, budget: u32) -> Result<(), ApiError> {
        if self.budget.is_some_and(|already| already != budget) {
            return Err(ApiError::bad_field(param, "is another limit than the request gives elsewhere"));
        }
        self.budget = Some(budget);
        Ok(())
    }
}
