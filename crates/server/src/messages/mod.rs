//! Anthropic's Messages API: `/v1/messages` and `/v1/messages/count_tokens`. A request becomes a chat request, and a chat
//! reply becomes a message of blocks; errors are told in Anthropic's JSON under the names of Anthropic's fields.
//!
//! Where the two APIs differ, this decides:
//!
//! - Thinking is never lost: a request that does not speak of it gets what the template has the model think, as `thinking`
//!   blocks in front of the text, without a signature. `thinking: {type: disabled}` closes the thinking at once, `display:
//!   omitted` leaves its blocks out.
//! - A `tool_use` block's input is always a JSON object. A call whose arguments are not one (cut off, malformed) is given as a
//!   `text` block that holds what the model wrote, and does not count as a use of a tool. Streams hence keep a call back
//!   until its arguments are whole.
//! - Templates write the results of calls without their ids, so results are put into the order of the calls.
//! - A last message of the assistant is continued. One without text is left out: templates drop thoughts, so there is nothing
//!   to continue.
//! - Fields of the chat endpoint that Anthropic does not have (`seed`, `min_p`, `chat_template_kwargs`, …) mean what they
//!   mean there; those that ask for what a message has no place for are refused.
//!
//! Must not know the engine, or how prompts are rendered and replies taken apart.

mod conversation;
mod error;
mod render;
mod request;

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::json;

pub(crate) use error::{ANTHROPIC_REQUEST_ID, AnthropicPaths, reword};

use crate::access::RequestLog;
use crate::app::App;
use crate::convert::{self, Job, Names};
use crate::error::ApiError;
use crate::routes;

const NAMES: Names = Names { prompt: "messages", logprobs: "top_logprobs" };

/// Reads the body of `/v1/messages`.
pub(crate) fn convert(app: &Arc<App>, id: &str, body: &[u8]) -> Result<Job, ApiError> {
    let request::Asked { chat, origin } = request::read(body)?;
    let model = app.reply_name(chat.common.model.as_deref())?;
    let stream = chat.common.stream;
    let mut run = convert::chat_run(app, &chat, NAMES).map_err(|error| origin.rename(error))?;
    run.rules = run.rules.map(|rules| rules.reworded(move |error| origin.rename(error)));
    let num_prompt_tokens = run.prompt_tokens.iter().sum::<usize>() as u64;
    let render = render::MessageRender::new(id, model.clone(), num_prompt_tokens);
    Ok(Job { run, render: Box::new(render), model, stream })
}

/// `/v1/messages/count_tokens`.
pub(crate) async fn count_tokens(
    State(app): State<Arc<App>>,
    Extension(log): Extension<Arc<RequestLog>>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = routes::read_body(&app.config, request).await?;
    let _active = app.drain.enter().ok_or_else(ApiError::draining)?;
    let shared = app.clone();
    let counting = app
        .counting
        .run(move || tracing::debug_span!(parent: &log.span, "tokenize").in_scope(|| count(&shared, &body)));
    Ok(Json(json!({ "input_tokens": counting.await? })).into_response())
}

fn count(app: &App, body: &[u8]) -> Result<usize, ApiError> {
    let request::Asked { chat, origin } = request::read_to_count(body)?;
    app.reply_name(chat.common.model.as_deref())?;
    convert::count_tokens(app, &chat, NAMES).map_err(|error| origin.rename(error))
}
