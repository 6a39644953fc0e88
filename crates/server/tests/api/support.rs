//! A scripted engine behind a real handle, and a client for the router.
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Method, Request, StatusCode, header};
use http_body_util::BodyExt;
use r1_core::{Allowed, FinishReason, SamplingParams, SeqId, TokenConstraint, TokenId};
use r1_engine::EventSender;
use r1_engine::{Command, EngineInfo, Event, Handle, Inbox, Status, TokenLogprobs};
use r1_server::{ReasoningParser, SamplingDefaults, ServedModel, ServerConfig, ThinkingBudgets, router};
use r1_text::{ChatTemplate, Grammars, Tokenizer, ToolSyntax};
use serde_json::Value;
use tower::ServiceExt;

/// End of sequence in the bundled model's vocabulary.
pub(crate) const EOS: TokenId = TokenId(1);
pub(crate) const MAX_MODEL_LEN: usize = 256;

pub(crate) fn tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    let read = || {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cli/model");
        Arc::new(Tokenizer::from_dir(&dir).unwrap())
    };
    TOKENIZER.get_or_init(read).clone()
}

pub(crate) fn model() -> ServedModel {
    static TEMPLATE: OnceLock<String> = OnceLock::new();
    let tokenizer = tokenizer();
    let template = ChatTemplate::new(
        TEMPLATE.get_or_init(|| tokenizer.chat_template().unwrap().to_owned()),
        tokenizer.bos_text(),
        tokenizer.eos_text(),
        tokenizer.control_tokens().clone(),
    );
    ServedModel {
        names: vec!["tiny-r1".into(), "org/alias".into()],
        tokenizer,
        template: Some(Arc::new(template.unwrap())),
        defaults: SamplingDefaults {
            temperature: Some(0.6),
            top_p: Some(0.95),
            ..SamplingDefaults::default()
        },
        eos_token_ids: vec![EOS],
        reasoning_parser: ReasoningParser::DeepSeekR1,
        grammars: grammars().into(),
        tool_syntax: Some(ToolSyntax::Fenced),
        thinking_budgets: ThinkingBudgets { low: Some(7), ..ThinkingBudgets::default() },
    }
}

fn grammars() -> Arc<Grammars> {
    static GRAMMARS: OnceLock<Arc<Grammars>> = OnceLock::new();
    let tokenizer = tokenizer();
    let build = || Arc::new(Grammars::new(&tokenizer, &[EOS], tokenizer.vocab_size()).unwrap());
    GRAMMARS.get_or_init(build).clone()
}

/// What the engine says to one request.
#[derive(Clone)]
pub(crate) struct Script {
    pub(crate) events: Vec<Event>,
    /// Leave the generation running after the events, until it is aborted or `Engine::release` is called.
    pub(crate) hold: bool,
}

impl Script {
    /// Tokens, then the end.
    pub(crate) fn tokens(tokens: &[TokenId], reason: FinishReason) -> Self {
        let mut events = vec![Event::Scheduled { cached_tokens: 3 }];
        events.extend(tokens.iter().map(|&token| Event::Token { token, logprobs: None }));
        if let FinishReason::Stop(token) = reason {
            events.push(Event::Token { token, logprobs: None });
        }
        events.push(Event::Finished(reason));
        Self { events, hold: false }
    }

    /// This text, control tokens in it as such, then end of sequence.
    pub(crate) fn text(text: &str) -> Self {
        Self::tokens(&tokenizer().encode(text).unwrap(), FinishReason::Stop(EOS))
    }

    /// This text, and no end.
    pub(crate) fn endless(text: &str) -> Self {
        let mut script = Self::text(text);
        script.events.truncate(script.events.len() - 2);
        Self { hold: true, ..script }
    }
}

/// What the engine was asked.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) id: SeqId,
    pub(crate) prompt: Vec<TokenId>,
    pub(crate) params: SamplingParams,
    pub(crate) priority: i32,
    pub(crate) cache_salt: Option<String>,
    /// Tokens that may come first, where the request's rules bound them.
    pub(crate) first_mask: Option<Vec<u32>>,
}

#[derive(Default)]
struct Record {
    asked: Vec<Asked>,
    aborted: Vec<SeqId>,
    held: HashMap<SeqId, EventSender>,
    /// Ended by `Engine::release` and not reported yet.
    released: usize,
}

/// A thread that answers the n-th request by the n-th script, and further ones by the last.
#[derive(Clone)]
pub(crate) struct Engine {
    pub(crate) handle: Handle,
    record: Arc<Mutex<Record>>,
}

pub(crate) fn info() -> EngineInfo {
    EngineInfo {
        max_model_len: MAX_MODEL_LEN,
        vocab_size: tokenizer().vocab_size(),
        max_num_seqs: 64,
        max_queued: 64,
        max_unread_tokens: 4096,
    }
}

impl Engine {
    pub(crate) fn new(scripts: Vec<Script>) -> Self {
        let (handle, inbox) = Handle::channel(info());
        inbox.set_status(Status::Ready);
        let record = Arc::new(Mutex::new(Record::default()));
        let engine = Self { handle, record: record.clone() };
        std::thread::spawn(move || answer(&inbox, &scripts, &record));
        engine
    }

    pub(crate) fn saying(text: &str) -> Self {
        Self::new(vec![Script::text(text)])
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.record.lock().unwrap().asked.clone()
    }

    pub(crate) fn aborted(&self) -> Vec<SeqId> {
        self.record.lock().unwrap().aborted.clone()
    }

    /// Ends every held generation.
    pub(crate) fn release(&self) {
        let mut record = self.record.lock().unwrap();
        record.released += record.held.len();
        for (_, events) in record.held.drain() {
            events.end(Event::Finished(FinishReason::Length));
        }
    }

    pub(crate) fn router(&self, config: ServerConfig) -> Router {
        router(config, model(), self.handle.clone())
    }
}

fn first_mask(constraint: &mut dyn TokenConstraint) -> Vec<u32> {
    let mut mask = vec![0; info().vocab_size.div_ceil(32)];
    match constraint.fill_mask(&mut mask).expect("a constraint that can begin") {
        Allowed::Masked => mask,
        Allowed::Any => vec![u32::MAX; mask.len()],
    }
}

fn answer(inbox: &Inbox, scripts: &[Script], record: &Mutex<Record>) {
    let mut num_asked = 0;
    while let Some(command) = inbox.wait() {
        let mut record = record.lock().unwrap();
        inbox.ended(std::mem::take(&mut record.released));
        match command {
            Command::Submit { id, request, events } => {
                let script = scripts[num_asked.min(scripts.len() - 1)].clone();
                num_asked += 1;
                let top = request.params.logprobs;
                record.asked.push(Asked {
                    id,
                    prompt: request.prompt,
                    params: request.params,
                    priority: request.priority,
                    cache_salt: request.cache_salt,
                    first_mask: request.constraint.map(|mut constraint| first_mask(&mut *constraint)),
                });
                for event in script.events {
                    let event = match (event, top) {
                        (Event::Token { token, .. }, Some(top)) => {
                            Event::Token { token, logprobs: Some(logprobs(token, top)) }
                        }
                        (event, _) => event,
                    };
                    events.send(event);
                }
                if script.hold {
                    record.held.insert(id, events);
                } else {
                    inbox.ended(1);
                }
            }
            Command::Abort(id) => {
                inbox.ended(usize::from(record.held.remove(&id).is_some()));
                record.aborted.push(id);
            }
            Command::FlushPrefixCache(answer) => _ = answer.send(7),
            Command::Stop => return,
        }
    }
}

/// Made-up log-probabilities that tell the tokens apart.
pub(crate) fn logprobs(token: TokenId, top: u32) -> TokenLogprobs {
    let of = |i: u32| (TokenId((token.0 + i) % 512), -0.25 - i as f32);
    TokenLogprobs { logprob: -0.25, top: (0..top).map(of).collect() }
}

/// A reply, whole.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    /// `error.param` of a refusal with this status.
    pub(crate) fn refused(&self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        let error = self.json()["error"].clone();
        assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()), "{}", self.text);
        assert!(error["type"].is_string() && error.get("param").is_some() && error.get("code").is_some());
        error
    }

    /// The data of every event of a stream that ended well, `[DONE]` taken off.
    pub(crate) fn events(&self) -> Vec<Value> {
        assert_eq!(self.headers[header::CONTENT_TYPE], "text/event-stream");
        let mut data: Vec<&str> = self.text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.text);
        data.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

pub(crate) async fn send(router: &Router, request: Request<Body>) -> Answer {
    let response = router.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let text = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
    Answer { status: parts.status, headers: parts.headers, text }
}

pub(crate) async fn get(router: &Router, path: &str) -> Answer {
    send(router, Request::get(path).body(Body::empty()).unwrap()).await
}

pub(crate) async fn post(router: &Router, path: &str, body: &Value) -> Answer {
    send(router, request(Method::POST, path, &body.to_string())).await
}

pub(crate) async fn chat(router: &Router, body: &Value) -> Answer {
    post(router, "/v1/chat/completions", body).await
}

pub(crate) async fn complete(router: &Router, body: &Value) -> Answer {
    post(router, "/v1/completions", body).await
}

pub(crate) fn request(method: Method, path: &str, body: &str) -> Request<Body> {
    let builder =
        Request::builder().method(method).uri(path).header(header::CONTENT_TYPE, "application/json");
    builder.body(Body::from(body.to_owned())).unwrap()
}

/// `base` with the fields of `more`.
pub(crate) fn with(base: &Value, more: &Value) -> Value {
    let mut merged = base.clone();
    for (name, value) in more.as_object().unwrap() {
        merged[name.as_str()] = value.clone();
    }
    merged
}

/// Waits until `condition` holds; fails the test when it does not within ten seconds.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "not within 10 s: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
