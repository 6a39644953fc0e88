//! What a reply may be: forms, tools, thinking, single tokens, as the constraint that the sampler is held to.

use r1_core::TokenId;
use r1_text::{
    Constraint, GrammarError, Grammars, ReplyRules, THINK_CLOSE, THINK_OPEN, Thinking as Phase,
    ToolChoice as MustCall, ToolParser, ToolRule, Tools as CallRules, bad_word_tokens,
};

use super::{Tokenized, sampling};
use crate::app::App;
use crate::error::ApiError;
use crate::types::chat::ChatRequest;
use crate::types::common::Common;
use crate::types::thinking::{Effort, Thinking};
use crate::types::tools::{ToolChoice, Tools};

/// The rules of a chat reply; `open_think`: the prompt left the reasoning open.
pub(super) fn for_chat(app: &App, request: &ChatRequest, open_think: bool) -> Result<ReplyRules, ApiError> {
    let thinking = match (open_think, request.thinking.on) {
        (true, _) => Phase::Open,
        (false, Some(false)) => Phase::None,
        (false, _) => Phase::MayOpen,
    };
    let rules = ReplyRules {
        thinking,
        thinking_budget: budget(app, &request.thinking, open_think),
        tools: call_rules(app, &request.tools)?,
        ..ReplyRules::default()
    };
    Ok(rules)
}

/// The rules of a text completion. A prompt that ends inside the reasoning was rendered by a client for a model that reasons:
/// what the answer must be, it must be behind the reasoning.
pub(super) fn for_completion(app: &App, prompts: &[Tokenized]) -> ReplyRules {
    let tokenizer = &app.model.tokenizer;
    let [open, close] = [THINK_OPEN, THINK_CLOSE].map(|tag| tokenizer.token_to_id(tag));
    let last = |tokens: &[TokenId], tag: Option<TokenId>| {
        tag.and_then(|tag| tokens.iter().rposition(|token| *token == tag))
    };
    let is_open = |prompt: &Tokenized| last(&prompt.tokens, open) > last(&prompt.tokens, close);
    let thinking = if prompts.iter().all(is_open) { Phase::Open } else { Phase::None };
    ReplyRules { thinking, ..ReplyRules::default() }
}

/// Most tokens of thinking. A template that opens the reasoning whatever it is told is overruled.
fn budget(app: &App, thinking: &Thinking, open_think: bool) -> Option<u32> {
    if thinking.on == Some(false) {
        return open_think.then_some(0);
    }
    let budgets = &app.model.thinking_budgets;
    thinking.budget.or_else(|| match thinking.effort? {
        Effort::Minimal => budgets.minimal,
        Effort::Low => budgets.low,
        Effort::Medium => budgets.medium,
        Effort::High => budgets.high,
    })
}

fn call_rules(app: &App, tools: &Tools) -> Result<Option<CallRules>, ApiError> {
    let choice = match &tools.choice {
        ToolChoice::None => return Ok(None),
        ToolChoice::Auto => MustCall::Auto,
        ToolChoice::Required => MustCall::Required,
        ToolChoice::Named(name) => MustCall::Named(name.clone()),
    };
    let Some(syntax) = app.model.tool_syntax else {
        return Err(ApiError::not_supported(
            "tools",
            "it is not known how this model writes calls; --tool-call-parser says it",
        ));
    };
    let rule = |tool: &crate::types::tools::Tool| ToolRule {
        name: tool.name.clone(),
        parameters: tool.parameters.clone(),
        strict: tool.strict,
    };
    let rules = tools.offered.iter().map(rule).collect();
    Ok(Some(CallRules { rules, choice, parallel: tools.parallel, syntax }))
}

/// How calls are found in the reply.
pub(super) fn tool_parser(app: &App, common: &Common, tools: &Tools) -> Option<ToolParser> {
    if tools.choice == ToolChoice::None {
        return None;
    }
    let names = tools.offered.iter().map(|tool| tool.name.clone()).collect();
    let parser = ToolParser::new(&app.model.tokenizer, app.model.tool_syntax, names);
    Some(ToolParser { hide_cut: common.skip_special_tokens, ..parser })
}

/// The rules of a request's replies, not compiled yet.
pub(crate) struct Rules {
    of_reply: ReplyRules,
    /// What the client calls the form's field.
    format: Option<String>,
    /// Puts the client's words where the chat's stand.
    reword: Option<Box<Reword>>,
}

type Reword = dyn FnOnce(ApiError) -> ApiError + Send;

impl Rules {
    /// An endpoint that names fields differently says how.
    pub(crate) fn reworded(self, reword: impl FnOnce(ApiError) -> ApiError + Send + 'static) -> Self {
        Self { reword: Some(Box::new(reword)), ..self }
    }

    /// Compiles the rules, which may take seconds; `None` where nothing is asked for.
    pub(crate) fn constraint(self, grammars: &Grammars) -> Result<Option<Constraint>, ApiError> {
        grammars.constraint(&self.of_reply).map_err(|error| {
            let error = grammar_error(self.format, &error);
            match self.reword {
                Some(reword) => reword(error),
                None => error,
            }
        })
    }
}

/// The rules with what both endpoints add to them; `None` where nothing is asked for.
pub(super) fn rules(app: &App, common: &Common, mut rules: ReplyRules) -> Result<Option<Rules>, ApiError> {
    if let Some(ids) = &common.allowed_token_ids {
        rules.allowed_token_ids = Some(sampling::in_vocab(app, "allowed_token_ids", ids)?);
    }
    let format = common.format.as_ref().map(|asked| asked.param.clone());
    rules.bad_words = bad_word_tokens(&app.model.tokenizer, &common.bad_words)
        .map_err(|error| grammar_error(format.clone(), &error))?;
    rules.format = common.format.as_ref().map(|asked| asked.format.clone());
    Ok((!rules.demand_nothing()).then_some(Rules { of_reply: rules, format, reword: None }))
}

/// Names the field as the client did.
fn grammar_error(format: Option<String>, error: &GrammarError) -> ApiError {
    let param = match (error.field.as_str(), format) {
        ("format", Some(param)) => param,
        (field, _) => {
            field.replace("].parameters", "].function.parameters").replace("].name", "].function.name")
        }
    };
    let place = error.place.as_ref().map_or_else(String::new, |place| format!("at {place}: "));
    ApiError::bad_field(param, format!("{place}{}", error.reason))
}
