//! `/v1/completions` into the engine's requests.

use std::sync::Arc;

use r1_core::TokenId;
use r1_text::{ControlText, ParserConfig, TextError};

use super::{Job, Names, Parts, Tokenized, check_num_choices, check_size, header, max_prompt_tokens};
use super::{max_text_tokens, rules, run, text_error, truncate};
use crate::app::App;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::render::CompletionRender;
use crate::types::completion::{CompletionRequest, Prompt};

const NAMES: Names = Names { prompt: "prompt", logprobs: "logprobs" };

/// Reads the body of `/v1/completions`.
pub(crate) fn completion(app: &Arc<App>, id: &str, body: &[u8]) -> Result<Job, ApiError> {
    let mut request = CompletionRequest::parse(Fields::parse(body)?)?;
    let model = app.reply_name(request.common.model.as_deref())?;
    let prompts = std::mem::take(&mut request.prompts);
    check_num_choices(app, &request.common, prompts.len())?;
    let num_prompts = prompts.len();
    let prompts = prompts.into_iter().map(|prompt| {
        let tokenized = tokenize(app, &request, prompt);
        tokenized.map_err(|error| text_error(app, error, &NAMES, request.common.max_tokens))
    });
    let prompts = prompts.collect::<Result<Vec<_>, _>>()?;
    let common = &request.common;
    let parser = ParserConfig {
        start_inside_reasoning: false,
        separate_reasoning: false,
        stop: common.stop.clone(),
        include_stop: common.include_stop_str_in_output,
        min_tokens: common.min_tokens as usize,
        tools: None,
    };
    let parts = Parts {
        names: NAMES,
        logprobs: request.logprobs,
        // Log-probabilities of what is echoed.
        prompt_logprobs: common.prompt_logprobs.or(request.logprobs.filter(|_| request.echo)),
        parser,
        hide_reasoning: false,
        hide_calls: false,
        rules: rules::for_completion(app, &prompts),
        prompts,
    };
    let header = header(common, format!("cmpl-{id}"), model.clone(), num_prompts, request.logprobs.is_some());
    let render = CompletionRender { header, echo: request.echo };
    Ok(Job { run: run(app, common, parts)?, render: Box::new(render), model, stream: common.stream })
}

fn tokenize(app: &App, request: &CompletionRequest, prompt: Prompt) -> Result<Tokenized, TextError> {
    let tokenizer = &app.model.tokenizer;
    let max_tokens = max_text_tokens(app, &request.common);
    let (mut tokens, mut echo) = match (prompt, &request.suffix) {
        (Prompt::Text(text), None) => {
            check_size(app, &request.common, text.len(), 0)?;
            (tokenizer.encode_completion(&text, max_tokens)?, text)
        }
        (Prompt::Text(text), Some(suffix)) => {
            check_size(app, &request.common, text.len() + suffix.len(), 0)?;
            (tokenizer.encode_fim(&text, suffix, max_prompt_tokens(app))?, String::new())
        }
        (Prompt::Tokens(ids), _) => {
            check_size(app, &request.common, 0, ids.len())?;
            let tokens: Vec<TokenId> = ids.into_iter().map(TokenId).collect();
            let echo =
                if request.echo { tokenizer.decode(&tokens, ControlText::Hide) } else { String::new() };
            (tokens, echo)
        }
    };
    let before = tokens.len();
    truncate(app, &request.common, &mut tokens);
    if !request.echo {
        echo.clear();
    } else if tokens.len() < before {
        echo = tokenizer.decode(&tokens, ControlText::Hide);
    }
    Ok(Tokenized { tokens, echo })
}
