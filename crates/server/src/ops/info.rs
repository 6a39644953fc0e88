//! `/get_model_info` and `/get_server_info`, in SGLang's words: what is served and how. Must never hold a key.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use crate::app::App;
use crate::config::{Cors, ReasoningParser};
use crate::health;

/// Answers `/get_model_info`.
pub(crate) async fn get_model(State(app): State<Arc<App>>) -> Json<Value> {
    let (name, engine) = (&app.model.names[0], app.engine.info());
    let defaults = &app.model.defaults;
    Json(json!({
        "model_path": name,
        "tokenizer_path": name,
        "is_generation": true,
        "preferred_sampling_params": {
            "temperature": defaults.temperature,
            "top_p": defaults.top_p,
            "top_k": defaults.top_k,
            "min_p": defaults.min_p,
            "repetition_penalty": defaults.repetition_penalty,
            "max_tokens": defaults.max_tokens,
        },
        "weight_version": "default",
        "has_image_understanding": false,
        "has_audio_understanding": false,
        "has_chat_template": app.model.template.is_some(),
        "served_model_names": app.model.names,
        "max_model_len": engine.max_model_len,
        "vocab_size": engine.vocab_size,
        "eos_token_ids": app.model.eos_token_ids.iter().map(|token| token.0).collect::<Vec<_>>(),
    }))
}

/// Answers `/get_server_info`. What is configured stands under the names of the flags.
pub(crate) async fn get_server(State(app): State<Arc<App>>) -> Json<Value> {
    let (config, engine, stats) = (&app.config, app.engine.info(), app.engine.stats());
    let name = &app.model.names[0];
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "status": health::of(&app.engine, app.drain.is_draining(), config.watchdog_timeout),
        "started": app.started_unix_s,
        "model_path": name,
        "tokenizer_path": name,
        "served_model_name": app.model.names,
        "context_length": engine.max_model_len,
        "max_model_len": engine.max_model_len,
        "max_running_requests": engine.max_num_seqs,
        "max_num_seqs": engine.max_num_seqs,
        "max_queued_requests": engine.max_queued,
        "max_total_num_tokens": stats.kv_blocks_total * stats.kv_block_size_tokens,
        "page_size": stats.kv_block_size_tokens,
        "reasoning_parser": match app.model.reasoning_parser {
            ReasoningParser::DeepSeekR1 => "deepseek-r1",
            ReasoningParser::None => "none",
        },
        "root_path": config.root_path,
        "api_key_required": !config.api_keys.is_empty(),
        "cors": match &config.cors {
            Cors::AnyOrigin => json!("*"),
            Cors::Origins { origins, .. } => {
                json!(origins.iter().map(|origin| String::from_utf8_lossy(origin.0.as_bytes())).collect::<Vec<_>>())
            }
            Cors::Off => Value::Null,
        },
        "strict_model_name": config.strict_model_name,
        "seed": config.seed,
        "max_choices": config.max_choices,
        "max_body_bytes": config.max_body_bytes,
        "shutdown_timeout": seconds(config.shutdown_timeout),
        "watchdog_timeout": seconds(config.watchdog_timeout),
        "request_timeout": config.request_timeout.map(seconds),
        "idle_timeout": seconds(config.idle_timeout),
        "internal_states": [{
            "num_running_reqs": stats.running,
            "num_queue_reqs": stats.waiting,
            "kv_blocks_total": stats.kv_blocks_total,
            "kv_blocks_used": stats.kv_blocks_used,
            "kv_blocks_cached": stats.kv_blocks_cached,
            "prompt_tokens_total": stats.prompt_tokens_total,
            "generation_tokens_total": stats.generation_tokens_total,
            "steps_total": stats.steps_total,
            "failed_steps_total": stats.failed_steps_total,
            "preemptions_total": stats.preemptions_total,
            "last_gen_throughput": stats.gen_throughput_tokens_per_s,
        }],
    }))
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}
