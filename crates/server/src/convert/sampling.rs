//! How a request's tokens are drawn: the client's words, the model's advice, OpenAI's defaults.

use r1_core::{SamplingParams, TokenId};
use r1_engine::SubmitError;
use serde_json::{Map, Value};

use super::Names;
use crate::app::App;
use crate::config::SamplingDefaults;
use crate::decode::DecodeRules;
use crate::error::ApiError;
use crate::types::common::Common;

/// The request's sampling, the model's defaults where it is silent, OpenAI's where both are.
pub(super) fn sampling(
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
    // Where nothing is to be generated one token is drawn all the same.
    let wanted = asked.unwrap_or(1).max(1);
    if wanted > room {
        let error = SubmitError::TooLong { prompt_tokens, max_tokens: wanted, max_model_len };
        let param = if room == 0 { names.prompt } else { common.max_tokens_name };
        return Err(ApiError::context_length(param, error.to_string()));
    }
    let most = app.model.defaults.max_tokens.map_or(room, |most| room.min(most as usize));
    Ok(u32::try_from(asked.unwrap_or(most).max(1)).unwrap_or(u32::MAX))
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
        // One spelling each, so that no token stands there twice.
        let id: Option<u32> = key.parse().ok().filter(|id: &u32| id.to_string() == *key);
        let id = id.ok_or_else(|| ApiError::bad_field(param(), "keys must be token ids"))?;
        let value = value.as_f64().ok_or_else(|| ApiError::bad_field(param(), "values must be numbers"))?;
        let token = in_vocab(app, "logit_bias", &[id])?[0];
        biases.push((token, value as f32));
    }
    Ok(biases)
}

pub(super) fn in_vocab(app: &App, param: &'static str, ids: &[u32]) -> Result<Vec<TokenId>, ApiError> {
    let vocab_size = app.engine.info().vocab_size;
    match ids.iter().find(|id| **id as usize >= vocab_size) {
        None => {
            let mut ids: Vec<TokenId> = ids.iter().copied().map(TokenId).collect();
            ids.sort_unstable();
            ids.dedup();
            Ok(ids)
        }
        Some(&id) => {
            let error = SubmitError::UnknownToken { token: TokenId(id), vocab_size };
            Err(ApiError::bad_field(param, error))
        }
    }
}
