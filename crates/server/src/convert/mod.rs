//! OpenAI's requests into the engine's: the only place that knows both. Runs off the async threads, because tokenizing a
//! long prompt takes a while.

mod chat;
mod completion;
mod rules;
mod sampling;

use r1_core::TokenId;
use r1_engine::Request;
use r1_text::{Constraint, ControlText, ParserConfig, ReplyRules, TextError};

pub(crate) use chat::{chat, chat_run, count_tokens, render_any_length};
pub(crate) use completion::completion;
pub(crate) use rules::Rules;

use crate::app::{App, unix_s};
use crate::decode::{DecodeRules, Decoder};
use crate::error::ApiError;
use crate::render::{Header, Render};
use crate::types::common::Common;

/// A request, ready to be submitted, and what writes its reply.
pub(crate) struct Job {
    pub(crate) run: Run,
    pub(crate) render: Box<dyn Render>,
    /// The name that the reply carries.
    pub(crate) model: String,
    pub(crate) stream: bool,
}

/// What the engine is to do for one request.
pub(crate) struct Run {
    /// Tokens of each prompt.
    pub(crate) prompt_tokens: Vec<usize>,
    /// In order of their index in the reply.
    pub(crate) choices: Vec<ChoiceJob>,
    /// More choices are generated than shown: of each prompt so many, the likeliest first.
    pub(crate) keep_best: Option<usize>,
    /// What every choice is held to, where anything is asked for; compiled by [`Run::constrain`].
    pub(crate) rules: Option<Rules>,
}

impl Run {
    /// Holds every choice to the constraint that was made of [`Run::rules`].
    pub(crate) fn constrain(&mut self, constraint: &Constraint) {
        for choice in &mut self.choices {
            choice.request.constraint = Some(Box::new(constraint.clone()));
        }
    }
}

/// One choice to generate.
pub(crate) struct ChoiceJob {
    /// Which of the prompts it continues.
    pub(crate) prompt: usize,
    pub(crate) request: Request,
    pub(crate) decoder: Decoder,
    /// Text that stands before what is generated.
    pub(crate) echo: String,
}

/// A tokenized prompt.
struct Tokenized {
    tokens: Vec<TokenId>,
    echo: String,
}

/// Where an endpoint's fields are named differently.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Names {
    pub(crate) prompt: &'static str,
    pub(crate) logprobs: &'static str,
}

/// What a run is made of beside the fields that endpoints share.
struct Parts {
    names: Names,
    /// Alternatives to report per generated token.
    logprobs: Option<u32>,
    /// Alternatives to report per token of the prompt.
    prompt_logprobs: Option<u32>,
    parser: ParserConfig,
    hide_reasoning: bool,
    /// Markup of calls does not show.
    hide_calls: bool,
    rules: ReplyRules,
    prompts: Vec<Tokenized>,
}

/// What every chunk of a reply repeats.
fn header(common: &Common, id: String, model: String, num_prompts: usize, logprobs: bool) -> Header {
    Header {
        id,
        created_unix_s: unix_s(),
        model,
        num_choices: num_prompts * common.n,
        include_usage: common.include_usage,
        logprobs,
        prompt_logprobs: common.prompt_logprobs.is_some(),
    }
}

/// Refuses before it is tokenized what cannot fit: so many bytes, and at least so many tokens.
fn check_size(app: &App, common: &Common, bytes: usize, tokens: usize) -> Result<(), TextError> {
    let at_least = bytes.div_ceil(app.model.tokenizer.max_bytes_per_token()).max(tokens);
    let max_tokens = max_text_tokens(app, common);
    if at_least > max_tokens { Err(TextError::TooLong { at_least, max_tokens }) } else { Ok(()) }
}

/// A prompt must leave room for one token.
fn max_prompt_tokens(app: &App) -> usize {
    app.engine.info().max_model_len.saturating_sub(1)
}

/// Tokens that a prompt may have before it is cut to what was asked for.
fn max_text_tokens(app: &App, common: &Common) -> usize {
    /// A text that is to be cut is read whole, which takes time.
    const CONTEXTS_TO_CUT: usize = 4;
    let factor = if common.truncate_prompt_tokens.is_some() { CONTEXTS_TO_CUT } else { 1 };
    max_prompt_tokens(app).saturating_mul(factor)
}

/// Keeps the end of a prompt, as long as was asked for.
fn truncate(app: &App, common: &Common, tokens: &mut Vec<TokenId>) {
    let keep = match common.truncate_prompt_tokens {
        None => return,
        Some(-1) => max_prompt_tokens(app),
        Some(tokens) => usize::try_from(tokens).unwrap_or(usize::MAX),
    };
    tokens.drain(..tokens.len().saturating_sub(keep));
}

fn check_num_choices(app: &App, common: &Common, prompts: usize) -> Result<(), ApiError> {
    let max = app.config.max_choices;
    if prompts > max {
        let problem = format!("{prompts} prompts are over this server's limit of {max} choices");
        return Err(ApiError::bad_field("prompt", problem));
    }
    let (name, per_prompt) =
        if common.best_of > common.n { ("best_of", common.best_of) } else { ("n", common.n) };
    if prompts.saturating_mul(per_prompt) > max {
        let problem = format!(
            "{prompts} prompts times {name} = {per_prompt} are over this server's limit of {max} choices"
        );
        return Err(ApiError::bad_field(name, problem));
    }
    Ok(())
}

fn check_logprobs(app: &App, param: &'static str, asked: Option<u32>) -> Result<(), ApiError> {
    let (asked, max) = (asked.unwrap_or(0), app.config.max_logprobs);
    if asked > max {
        let problem = format!("is {asked}; it must be at most {max} (--max-logprobs)");
        return Err(ApiError::bad_field(param, problem));
    }
    Ok(())
}

fn run(app: &App, common: &Common, parts: Parts) -> Result<Run, ApiError> {
    let Parts { names, logprobs, prompt_logprobs, parser, hide_reasoning, hide_calls, rules, prompts } =
        parts;
    check_num_choices(app, common, prompts.len())?;
    let shows_prompt = prompt_logprobs.is_some() || prompts.iter().any(|prompt| !prompt.echo.is_empty());
    if common.max_tokens == Some(0) && !shows_prompt {
        let problem = "is 0; it must be at least 1 (0 goes with `echo` and `prompt_logprobs`)";
        return Err(ApiError::bad_field(common.max_tokens_name, problem));
    }
    check_logprobs(app, names.logprobs, logprobs)?;
    check_logprobs(app, "prompt_logprobs", prompt_logprobs)?;
    let eos = if common.ignore_eos { Vec::new() } else { app.model.eos_token_ids.clone() };
    let control = if common.skip_special_tokens { ControlText::Hide } else { ControlText::Show };
    let decode = DecodeRules {
        parser,
        control,
        eos,
        stop_token_ids: sampling::in_vocab(app, "stop_token_ids", &common.stop_token_ids)?,
        token_ids_as_names: common.return_tokens_as_token_ids,
        logprobs: logprobs.is_some(),
        hide_reasoning,
        hide_calls: hide_calls && common.skip_special_tokens,
        discard: common.max_tokens == Some(0),
    };
    let keep_best = (common.best_of > common.n).then_some(common.n);
    let rules = rules::rules(app, common, rules)?;
    let prompt_tokens: Vec<usize> = prompts.iter().map(|prompt| prompt.tokens.len()).collect();
    let mut choices = Vec::with_capacity(prompts.len() * common.best_of);
    for (index, prompt) in prompts.into_iter().enumerate() {
        let mut params = sampling::sampling(app, common, &names, logprobs, &decode, prompt.tokens.len())?;
        if keep_best.is_some() {
            // The best is found by them.
            params.logprobs.get_or_insert(0);
        }
        for nth in 0..common.best_of {
            let mut params = params.clone();
            // With a seed a prompt gives the same choices alone and in a list.
            params.seed = common.seed.map_or_else(|| app.next_seed(), |seed| seed.wrapping_add(nth as u64));
            let decoder = Decoder::new(app.model.tokenizer.clone(), decode.clone())
                .map_err(|e| ApiError::bad_field("stop", e))?;
            let request = Request {
                priority: common.priority,
                cache_salt: common.cache_salt.clone(),
                prompt_logprobs,
                ..Request::new(prompt.tokens.clone(), params)
            };
            choices.push(ChoiceJob { prompt: index, request, decoder, echo: prompt.echo.clone() });
        }
    }
    Ok(Run { prompt_tokens, choices, keep_best, rules })
}

/// A client's fault names its field; a fault of the model's files is ours.
fn text_error(app: &App, error: TextError, names: &Names, max_tokens: Option<u64>) -> ApiError {
    match error {
        TextError::TooLong { at_least, .. } => {
            let max_model_len = app.engine.info().max_model_len;
            let message = format!(
                "this model's context is {max_model_len} tokens, but at least {at_least} in the prompt and {} to \
                 generate were asked for; shorten the prompt",
                max_tokens.unwrap_or(1)
            );
            ApiError::context_length(names.prompt, message)
        }
        TextError::Template { .. } | TextError::Arguments { .. } | TextError::Encode(_) => {
            ApiError::bad_field(names.prompt, error)
        }
        TextError::NoFimToken(_) => ApiError::bad_field("suffix", error),
        TextError::BadTool(_) => ApiError::bad_field("tools", error),
        TextError::NoReasoningToContinue(_) => ApiError::bad_field(names.prompt, error),
        TextError::ReservedKwarg(_) => ApiError::bad_field("chat_template_kwargs", error),
        TextError::EmptyStop(_) => ApiError::bad_field("stop", error),
        TextError::Io { .. } | TextError::BadFile { .. } | TextError::UnsupportedTokenizer { .. } => {
            ApiError::internal(error.to_string())
        }
    }
}
