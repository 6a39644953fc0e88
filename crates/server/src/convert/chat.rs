//! `/v1/chat/completions` into the engine's requests. Other endpoints that hold a conversation come here too, by
//! [`chat_run`].

use std::sync::Arc;

use r1_text::{ChatInput, ChatTemplate, ParserConfig, PromptEnd, RenderedPrompt, TextError};
use serde_json::{Map, Value};

use super::rules;
use super::{
    Job, Names, Parts, Run, Tokenized, check_size, header, max_text_tokens, run, text_error, truncate,
};
use crate::app::App;
use crate::config::ReasoningParser;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::render::ChatRender;
use crate::types::chat::{ChatMessage, ChatRequest, Role};
use crate::types::common::Common;
use crate::types::tools::ToolChoice;

const NAMES: Names = Names { prompt: "messages", logprobs: "top_logprobs" };

/// Reads the body of `/v1/chat/completions`.
pub(crate) fn chat(app: &Arc<App>, id: &str, body: &[u8]) -> Result<Job, ApiError> {
    let request = ChatRequest::parse(Fields::parse(body)?)?;
    let model = app.reply_name(request.common.model.as_deref())?;
    let header = header(&request.common, format!("chatcmpl-{id}"), model.clone(), 1, request.logprobs);
    let stream = request.common.stream;
    let run = chat_run(app, &request, NAMES)?;
    Ok(Job { run, render: Box::new(ChatRender::new(header)), model, stream })
}

/// What the engine is to do for a conversation; `names` are the endpoint's for fields that complaints name.
pub(crate) fn chat_run(app: &App, request: &ChatRequest, names: Names) -> Result<Run, ApiError> {
    let common = &request.common;
    let text_error = |error| text_error(app, error, &names, common.max_tokens);
    let rendered = render(app, request, names)?;
    let mut tokens =
        app.model.tokenizer.encode_prompt(&rendered, max_text_tokens(app, common)).map_err(text_error)?;
    truncate(app, common, &mut tokens);
    let separate = request.separate_reasoning && app.model.reasoning_parser == ReasoningParser::DeepSeekR1;
    let open_think = rendered.end() == PromptEnd::OpenThink;
    let mut echo = String::new();
    if request.echo && request.continue_final_message {
        echo.push_str(&request.messages.last().expect("a conversation has messages").content);
    } else if open_think && !separate {
        // Whoever takes the tags apart needs the opening one too, which the prompt holds.
        echo.push_str(&from_think(&rendered.text()));
    }
    let rules = rules::for_chat(app, request, open_think)?;
    let parser = ParserConfig {
        start_inside_reasoning: open_think,
        separate_reasoning: separate,
        stop: common.stop.clone(),
        include_stop: common.include_stop_str_in_output,
        min_tokens: common.min_tokens as usize,
        tools: rules::tool_parser(app, common, &request.tools),
    };
    let parts = Parts {
        names,
        logprobs: request.logprobs.then(|| request.top_logprobs.unwrap_or(0)),
        prompt_logprobs: common.prompt_logprobs,
        parser,
        hide_reasoning: request.thinking.hidden,
        // No call was asked for, so markup of one is no text for a reader.
        hide_calls: request.tools.choice == ToolChoice::None,
        rules,
        prompts: vec![Tokenized { tokens, echo }],
    };
    run(app, common, parts)
}

/// Tokens of a conversation's prompt.
pub(crate) fn count_tokens(app: &App, request: &ChatRequest, names: Names) -> Result<usize, ApiError> {
    let rendered = render(app, request, names)?;
    let tokens = app.model.tokenizer.encode_prompt(&rendered, max_text_tokens(app, &request.common));
    tokens
        .map(|tokens| tokens.len())
        .map_err(|error| text_error(app, error, &names, request.common.max_tokens))
}

/// The conversation as the model reads it.
pub(crate) fn render(app: &App, request: &ChatRequest, names: Names) -> Result<RenderedPrompt, ApiError> {
    let Some(template) = &app.model.template else {
        return Err(ApiError::bad_field(
            names.prompt,
            "this model has no chat template; it continues text: use /v1/completions with `prompt`",
        ));
    };
    let text_error = |error| text_error(app, error, &names, request.common.max_tokens);
    check_messages(app, &request.common, &request.messages).map_err(text_error)?;
    render_any_length(app, template, request).map_err(text_error)
}

/// The conversation as the model would read it if it fitted.
pub(crate) fn render_any_length(
    app: &App,
    template: &ChatTemplate<'_>,
    request: &ChatRequest,
) -> Result<RenderedPrompt, TextError> {
    let tools = &request.tools.offered;
    let input = ChatInput {
        messages: request.messages.iter().map(template_message).collect(),
        tools: (!tools.is_empty()).then(|| tools.iter().map(|tool| tool.json.clone()).collect()),
        add_generation_prompt: request.add_generation_prompt,
        continue_final_message: request.continue_final_message,
        kwargs: app.template_kwargs(request.template_kwargs.clone()),
    };
    template.render(&input)
}

/// Refuses before it is rendered what cannot fit. Templates drop an assistant's old thoughts and blanks around a text, but
/// none of the rest, and no template runs what a user said twice into one token.
fn check_messages(app: &App, common: &Common, messages: &[ChatMessage]) -> Result<(), TextError> {
    let kept = messages.iter().filter(|message| message.role != Role::Assistant);
    let bytes: usize = kept.map(|message| message.content.trim().len()).sum();
    let said =
        messages.iter().filter(|message| message.role == Role::User && !message.content.trim().is_empty());
    check_size(app, common, bytes, said.count())
}

/// The end of a prompt from its last `<think>` on.
fn from_think(prompt: &str) -> String {
    prompt.rfind("<think>").map_or_else(String::new, |at| prompt[at..].to_owned())
}

/// A message as templates know it.
fn template_message(message: &ChatMessage) -> Value {
    let mut fields = Map::new();
    fields.insert("role".into(), message.role.name().into());
    fields.insert("content".into(), message.content.as_str().into());
    if !message.tool_calls.is_empty() {
        fields.insert("tool_calls".into(), message.tool_calls.clone().into());
    }
    let texts = [
        ("tool_call_id", &message.tool_call_id),
        ("name", &message.name),
        ("reasoning_content", &message.reasoning),
    ];
    for (name, value) in texts {
        if let Some(value) = value {
            fields.insert(name.into(), value.as_str().into());
        }
    }
    if message.prefix {
        fields.insert("prefix".into(), true.into());
    }
    Value::Object(fields)
}
