//! OpenAI's requests into the engine's: the only place that knows both. Runs off the async threads, because tokenizing a
//! long prompt takes a while.

use r1_core::{SamplingParams, TokenId};
use r1_engine::{Request, SubmitError};
use r1_text::{ChatInput, ControlText, ParserConfig, PromptEnd, TextError};
use serde_json::{Map, Value};

use crate::app::{App, unix_s};
use crate::config::{ReasoningParser, SamplingDefaults};
use crate::decode::{DecodeRules, Decoder};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::render::{Header, Shape};
use crate::types::chat::{ChatMessage, ChatRequest, Role};
use crate::types::common::Common;
use crate::types::completion::{CompletionRequest, Prompt};

/// A request, ready to be submitted.
pub(crate) struct Job {
    pub(crate) header: Header,
    pub(crate) stream: bool,
    /// Tokens of each prompt.
    pub(crate) prompt_tokens: Vec<usize>,
    /// In order of their index in the reply.
    pub(crate) choices: Vec<ChoiceJob>,
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
struct Names {
    prompt: &'static str,
    logprobs: &'static str,
}

/// Reads the body of `/v1/chat/completions`.
pub(crate) fn chat(app: &App, body: &[u8]) -> Result<Job, ApiError> {
    const NAMES: Names = Names { prompt: "messages", logprobs: "top_logprobs" };
    let request = ChatRequest::parse(Fields::parse(body)?)?;
    let model = app.reply_name(request.common.model.as_deref())?;
    let Some(template) = &app.model.template else {
        return Err(ApiError::bad_field(
            "messages",
            "this model has no chat template; it continues text: use /v1/completions with `prompt`",
        ));
    };
    let input = ChatInput {
        messages: request.messages.iter().map(template_message).collect(),
        tools: None,
        add_generation_prompt: request.add_generation_prompt,
        continue_final_message: false,
        kwargs: request.template_kwargs,
    };
    let text_error = |error| text_error(app, error, &NAMES, request.common.max_tokens);
    check_messages(app, &request.messages).map_err(text_error)?;
    let rendered = template.render(&input).map_err(text_error)?;
    let tokens = app.model.tokenizer.encode_prompt(&rendered, max_prompt_tokens(app)).map_err(text_error)?;
    let separate = request.separate_reasoning && app.model.reasoning_parser == ReasoningParser::DeepSeekR1;
    let open_think = rendered.end() == PromptEnd::OpenThink;
    // Whoever takes the tags apart needs the opening one too, which the prompt holds.
    let echo = if open_think && !separate { from_think(&rendered.text()) } else { String::new() };
    let parser = ParserConfig {
        start_inside_reasoning: open_think,
        separate_reasoning: separate,
        stop: request.common.stop.clone(),
        include_stop: request.common.include_stop_str_in_output,
        ..ParserConfig::default()
    };
    let logprobs = request.logprobs.then(|| request.top_logprobs.unwrap_or(0));
    let prompts = vec![Tokenized { tokens, echo }];
    job(app, &request.common, Shape::Chat, &NAMES, model, logprobs, parser, prompts)
}

/// Refuses before it is rendered what cannot fit. Templates drop an assistant's old thoughts and blanks around a text, but
/// none of the rest, and no template runs what a user said twice into one token.
fn check_messages(app: &App, messages: &[ChatMessage]) -> Result<(), TextError> {
    let kept = messages.iter().filter(|message| message.role != Role::Assistant);
    let bytes: usize = kept.map(|message| message.content.trim().len()).sum();
    let said =
        messages.iter().filter(|message| message.role == Role::User && !message.content.trim().is_empty());
    check_size(app, bytes, said.count())
}

/// Refuses before it is tokenized what cannot fit: so many bytes, and at least so many tokens.
fn check_size(app: &App, bytes: usize, tokens: usize) -> Result<(), TextError> {
    let at_least = bytes.div_ceil(app.model.tokenizer.max_bytes_per_token()).max(tokens);
    let max_tokens = max_prompt_tokens(app);
    if at_least > max_tokens { Err(TextError::TooLong { at_least, max_tokens }) } else { Ok(()) }
}

/// The end of a prompt from its last `<think>` on.
fn from_think(prompt: &str) -> String {
    prompt.rfind("<think>").map_or_else(String::new, |at| prompt[at..].to_owned())
}

/// Reads the body of `/v1/completions`.
pub(crate) fn completion(app: &App, body: &[u8]) -> Result<Job, ApiError> {
    const NAMES: Names = Names { prompt: "prompt", logprobs: "logprobs" };
    let request = CompletionRequest::parse(Fields::parse(body)?)?;
    let model = app.reply_name(request.common.model.as_deref())?;
    check_num_choices(app, request.prompts.len(), request.common.n)?;
    let prompts = request.prompts.into_iter().map(|prompt| {
        let tokenized = tokenize(app, prompt, request.echo);
        tokenized.map_err(|error| text_error(app, error, &NAMES, request.common.max_tokens))
    });
    let parser = ParserConfig {
        start_inside_reasoning: false,
        separate_reasoning: false,
        stop: request.common.stop.clone(),
        include_stop: request.common.include_stop_str_in_output,
        ..ParserConfig::default()
    };
    let prompts = prompts.collect::<Result<Vec<_>, _>>()?;
    job(app, &request.common, Shape::Completion, &NAMES, model, request.logprobs, parser, prompts)
}

fn tokenize(app: &App, prompt: Prompt, echo: bool) -> Result<Tokenized, TextError> {
    let tokenizer = &app.model.tokenizer;
    match prompt {
        Prompt::Text(text) => {
            check_size(app, text.len(), 0)?;
            let tokens = tokenizer.encode_completion(&text, max_prompt_tokens(app))?;
            Ok(Tokenized { tokens, echo: if echo { text } else { String::new() } })
        }
        Prompt::Tokens(ids) => {
            let tokens: Vec<TokenId> = ids.into_iter().map(TokenId).collect();
            let echo = if echo { tokenizer.decode(&tokens, ControlText::Hide) } else { String::new() };
            Ok(Tokenized { tokens, echo })
        }
    }
}

/// A message as templates know it.
fn template_message(message: &ChatMessage) -> Value {
    let mut fields = Map::new();
    fields.insert("role".into(), message.role.name().into());
    fields.insert("content".into(), message.content.as_str().into());
    if !message.tool_calls.is_empty() {
        fields.insert("tool_calls".into(), message.tool_calls.clone().into());
    }
    for (name, value) in [("tool_call_id", &message.tool_call_id), ("name", &message.name)] {
        if let Some(value) = value {
            fields.insert(name.into(), value.as_str().into());
        }
    }
    Value::Object(fields)
}

/// A prompt must leave room for one token.
fn max_prompt_tokens(app: &App) -> usize {
    app.engine.info().max_model_len.saturating_sub(1)
}

fn check_num_choices(app: &App, prompts: usize, n: usize) -> Result<(), ApiError> {
    let max = app.config.max_choices;
    if prompts.saturating_mul(n) > max {
        let problem =
            format!("{prompts} prompts times n = {n} are over this server's limit of {max} choices");
        return Err(ApiError::bad_field("n", problem));
    }
    Ok(())
}

fn job(
    app: &App,
    common: &Common,
    shape: Shape,
    names: &Names,
    model: String,
    logprobs: Option<u32>,
    parser: ParserConfig,
    prompts: Vec<Tokenized>,
) -> Result<Job, ApiError> {
    check_num_choices(app, prompts.len(), common.n)?;
    let eos = if common.ignore_eos { Vec::new() } else { app.model.eos_token_ids.clone() };
    let control = if common.skip_special_tokens { ControlText::Hide } else { ControlText::Show };
    let rules = DecodeRules {
        parser,
        control,
        eos,
        stop_token_ids: in_vocab(app, "stop_token_ids", &common.stop_token_ids)?,
        token_ids_as_names: common.return_tokens_as_token_ids,
    };
    let prompt_tokens: Vec<usize> = prompts.iter().map(|prompt| prompt.tokens.len()).collect();
    let mut choices = Vec::with_capacity(prompts.len() * common.n);
    for (index, prompt) in prompts.into_iter().enumerate() {
        let params = sampling(app, common, names, logprobs, &rules, prompt.tokens.len())?;
        for nth in 0..common.n {
            let mut params = params.clone();
            // With a seed a prompt gives the same choices alone and in a list.
            params.seed = common.seed.map_or_else(|| app.next_seed(), |seed| seed.wrapping_add(nth as u64));
            let decoder = Decoder::new(app.model.tokenizer.clone(), rules.clone())
                .map_err(|e| ApiError::bad_field("stop", e))?;
            let request = Request {
                prompt: prompt.tokens.clone(),
                params,
                priority: common.priority,
                constraint: None,
                cache_salt: common.cache_salt.clone(),
            };
            choices.push(ChoiceJob { prompt: index, request, decoder, echo: prompt.echo.clone() });
        }
    }
    let header = Header {
        id: String::new(),
        created_unix_s: unix_s(),
        model,
        shape,
        include_usage: common.include_usage,
        logprobs: logprobs.is_some(),
    };
    Ok(Job { header, stream: common.stream, prompt_tokens, choices })
}

/// The request's sampling, the model's defaults where it is silent, OpenAI's where both are.
fn sampling(
    app: &App,
    common: &Common,
    names: &Names,
    logprobs: Option<u32>,
    rules: &DecodeRules,
    prompt_tokens: usize,
) -> Result<SamplingParams, ApiError> {
    let defaults: &SamplingDefaults = &app.model.defaults;
    let openai = SamplingParams::default();
    let max_tokens = max_tokens(app, common, names, prompt_tokens)?;
    if common.min_tokens > max_tokens {
        let problem = format!("is {}; it must be at most max_tokens, {max_tokens}", common.min_tokens);
        return Err(ApiError::bad_field("min_tokens", problem));
    }
    let mut stop_token_ids = rules.eos.clone();
    stop_token_ids.extend(rules.stop_token_ids.iter().filter(|token| !rules.eos.contains(token)));
    let params = SamplingParams {
        temperature: common.temperature.or(defaults.temperature).unwrap_or(openai.temperature),
        top_p: common.top_p.or(defaults.top_p).unwrap_or(openai.top_p),
        top_k: top_k(common.top_k, defaults.top_k)?,
        min_p: common.min_p.or(defaults.min_p).unwrap_or(openai.min_p),
        repetition_penalty: common
            .repetition_penalty
            .or(defaults.repetition_penalty)
            .unwrap_or(openai.repetition_penalty),
        presence_penalty: common.presence_penalty.unwrap_or(openai.presence_penalty),
        frequency_penalty: common.frequency_penalty.unwrap_or(openai.frequency_penalty),
        logit_bias: logit_bias(app, common.logit_bias.as_ref())?,
        seed: openai.seed,
        max_tokens,
        min_tokens: common.min_tokens,
        stop_token_ids,
        logprobs,
    };
    params.validate().map_err(|invalid| {
        let param = if invalid.param == "logprobs" { names.logprobs } else { invalid.param };
        ApiError::bad_field(param, format_args!("is {}; it must be {}", invalid.value, invalid.range))
    })?;
    Ok(params)
}

/// What was asked for, or what is left of the context.
fn max_tokens(app: &App, common: &Common, names: &Names, prompt_tokens: usize) -> Result<u32, ApiError> {
    let max_model_len = app.engine.info().max_model_len;
    let room = max_model_len.saturating_sub(prompt_tokens);
    let asked = common.max_tokens.map(|asked| usize::try_from(asked).unwrap_or(usize::MAX));
    let wanted = asked.unwrap_or(1);
    if wanted > room {
        let error = SubmitError::TooLong { prompt_tokens, max_tokens: wanted, max_model_len };
        let param = if room == 0 { names.prompt } else { common.max_tokens_name };
        return Err(ApiError::context_length(param, error.to_string()));
    }
    let most = app.model.defaults.max_tokens.map_or(room, |most| room.min(most as usize));
    Ok(u32::try_from(asked.unwrap_or(most)).unwrap_or(u32::MAX))
}

fn top_k(asked: Option<i64>, default: Option<u32>) -> Result<Option<u32>, ApiError> {
    match asked {
        None => Ok(default.filter(|k| *k > 0)),
        Some(-1 | 0) => Ok(None),
        Some(k) if k > 0 => Ok(Some(u32::try_from(k).unwrap_or(u32::MAX))),
        Some(k) => Err(ApiError::bad_field(
            "top_k",
            format!("is {k}; it must be at least 1, or -1 or 0 to keep all"),
        )),
    }
}

fn logit_bias(app: &App, bias: Option<&Map<String, Value>>) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let mut biases = Vec::new();
    for (key, value) in bias.into_iter().flatten() {
        let param = || format!("logit_bias.{key}");
        let id: u32 = key.parse().map_err(|_| ApiError::bad_field(param(), "keys must be token ids"))?;
        let value = value.as_f64().ok_or_else(|| ApiError::bad_field(param(), "values must be numbers"))?;
        let token = in_vocab(app, "logit_bias", &[id])?[0];
        biases.push((token, value as f32));
    }
    Ok(biases)
}

fn in_vocab(app: &App, param: &'static str, ids: &[u32]) -> Result<Vec<TokenId>, ApiError> {
    let vocab_size = app.engine.info().vocab_size;
    match ids.iter().find(|id| **id as usize >= vocab_size) {
        None => Ok(ids.iter().copied().map(TokenId).collect()),
        Some(&id) => {
            let error = SubmitError::UnknownToken { token: TokenId(id), vocab_size };
            Err(ApiError::bad_field(param, error))
        }
    }
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
        TextError::ReservedKwarg(_) => ApiError::bad_field("chat_template_kwargs", error),
        TextError::EmptyStop(_) => ApiError::bad_field("stop", error),
        TextError::BadTool(_) => ApiError::bad_field("tools", error),
        TextError::NoReasoningToContinue(_) => ApiError::bad_field("messages", error),
        TextError::NoFimToken(_) => ApiError::bad_field("suffix", error),
        TextError::Io { .. } | TextError::BadFile { .. } | TextError::UnsupportedTokenizer { .. } => {
            ApiError::internal(error.to_string())
        }
    }
}
