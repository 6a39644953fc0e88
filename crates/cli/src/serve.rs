//! `r1-serve`: opens the port, loads weights on the engine's thread and text beside it, and serves.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use r1_backend::Backend;
use r1_core::TokenId;
use r1_engine::{Connect, EngineInfo, Handle, Inbox, LocalRanks, Status};
use r1_server::{ReasoningParser as ServerParser, ServedGrammars, ServedModel, ServerConfig};
use r1_text::{ChatTemplate, Grammars, Tokenizer, ToolSyntax, ToolsBlock};
use r1_weights::{Checkpoint, ModelConfig};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::args::ServeArgs;
use crate::launch::{AnyDevice, Launch, OnDevice};
use crate::log::Said;
use crate::source::Source;
use crate::text::ReasoningParser;
use crate::traces;

/// For what still runs when the server has ended.
const RUNTIME_PATIENCE: Duration = Duration::from_secs(2);
/// Tokens of a reply that may wait for a client that does not read: beyond what sockets hold, minutes at a large model's pace.
const MAX_UNREAD_TOKENS: usize = 4096;

/// Loads and serves until a signal comes.
pub(crate) fn run(args: &ServeArgs) -> Result<()> {
    let traces = args.log.traces()?;
    args.log.init(traces.as_ref());
    for note in args.model.check()? {
        tracing::info!("{note}");
    }
    let config = server_config(args)?;
    let source = Source::open(&args.model)?;
    let (device, said) = AnyDevice::open(&args.model)?;
    said.iter().for_each(Said::log);
    let (seqs, tokens) = (args.model.max_num_seqs, args.model.max_num_batched_tokens);
    let launch = Launch::new(&args.model, &source, &device, seqs, tokens)?;
    let (engine, inbox) = Handle::channel(EngineInfo {
        max_model_len: launch.engine.max_model_len,
        vocab_size: source.config.vocab_size,
        max_num_seqs: launch.engine.max_num_seqs,
        max_queued: args.http.max_queued_requests,
        max_unread_tokens: MAX_UNREAD_TOKENS,
    });
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        // They read prompts, which is arithmetic: more of them than cores would only hold memory.
        .max_blocking_threads(cores.max(2))
        .build()
        .context("cannot start the network threads")?;
    // A port that is taken is known before minutes of loading.
    let (host, port) = (args.http.host.as_str(), args.http.port);
    let listener = runtime
        .block_on(TcpListener::bind((host, port)))
        .with_context(|| format!("cannot listen on {host}:{port}; choose another --host or --port"))?;
    // Port 0 asks the system for a free one.
    let address = listener.local_addr()?;
    let (described, precision) = (device.describe(), launch.precision(&source));
    let (checkpoint, model_config) = (source.checkpoint.clone(), source.config.clone());
    let thread = device.with(Spawn { inbox, launch, checkpoint, config: model_config });
    // Weights are loaded meanwhile; who connects already waits for an answer as long as the tokenizer takes.
    let served = served_model(args, &source).and_then(|model| {
        let banner = Banner {
            name: model.names[0].clone(),
            checkpoint_bytes: source.checkpoint.size_bytes(),
            device: described,
            precision,
            address,
            has_template: model.template.is_some(),
            is_tls: config.tls.is_some(),
            needs_key: !config.api_keys.is_empty(),
        };
        runtime.block_on(serve(listener, config, model, engine.clone(), banner))
    });
    let loading = matches!(engine.status(), Status::Loading { .. });
    engine.stop();
    if !loading {
        // The engine ends within a step; a panic of its thread was reported when it happened. A thread that still loads
        // ends with the process: it has nothing to save.
        let _ = thread.join();
    }
    // What still runs there ends its spans first, if it ends soon: a request that is read for long holds nothing to save.
    runtime.shutdown_timeout(RUNTIME_PATIENCE);
    drop(traces);
    served
}

/// What the command line says about the HTTP side.
fn server_config(args: &ServeArgs) -> Result<ServerConfig> {
    Ok(ServerConfig {
        seed: args.seed,
        request_log: !args.log.no_request_log,
        log_texts: args.log.text_len(),
        default_template_kwargs: args.text.template_kwargs()?,
        adopt_trace: args.log.otlp_traces_endpoint.is_some().then_some(traces::adopt),
        ..args.http.config()?
    })
}

struct Spawn {
    inbox: Inbox,
    launch: Launch,
    checkpoint: Arc<Checkpoint>,
    config: ModelConfig,
}

impl OnDevice for Spawn {
    type Output = std::thread::JoinHandle<()>;

    fn run<B: Backend>(self, devices: Vec<Arc<B>>, connect: Connect<B>) -> Self::Output {
        let Self { inbox, launch, checkpoint, config } = self;
        let ranks = LocalRanks { devices, connect, checkpoint, config, options: launch.model };
        r1_engine::spawn(inbox, launch.engine, Arc::new(ranks))
    }
}

fn served_model(args: &ServeArgs, source: &Source) -> Result<ServedModel> {
    let tokenizer = source.tokenizer(args.text.tokenizer.as_deref())?;
    let vocab_size = source.config.vocab_size;
    if tokenizer.vocab_size() > vocab_size {
        bail!(
            "the tokenizer has {} tokens, but the model's vocab_size is {vocab_size}; they do not belong together",
            tokenizer.vocab_size(),
        );
    }
    let template = source.template(args.text.chat_template.as_deref(), &tokenizer)?;
    let family = source.family(template.as_deref().unwrap_or_default());
    let tool_syntax = args.text.tool_syntax(family.tool_syntax);
    let template = template.map(|source| compile(&source, &tokenizer, tool_syntax)).transpose();
    let template = template.with_context(|| match &args.text.chat_template {
        Some(path) => format!("--chat-template {}", path.display()),
        None => "the model's own template".to_owned(),
    })?;
    let generation = args.text.generation(&source.defaults, vocab_size)?;
    let mut eos_token_ids = source.config.eos_token_ids.clone();
    eos_token_ids.extend(&generation.advice.eos_token_ids);
    eos_token_ids.sort_unstable();
    eos_token_ids.dedup();
    let names = if args.served_model_name.is_empty() {
        vec![source.name.clone()]
    } else {
        args.served_model_name.clone()
    };
    let tokenizer = Arc::new(tokenizer);
    Ok(ServedModel {
        names,
        template,
        grammars: grammars(&tokenizer, &eos_token_ids, vocab_size)?,
        tool_syntax,
        thinking_budgets: family.thinking_budgets,
        tokenizer,
        defaults: generation.sampling(),
        eos_token_ids,
        reasoning_parser: match args.text.reasoning_parser {
            ReasoningParser::DeepseekR1 => ServerParser::DeepSeekR1,
            ReasoningParser::None => ServerParser::None,
        },
    })
}

/// Their tables take longer than everything else here and most requests need none: they are made while the server begins.
fn grammars(
    tokenizer: &Arc<Tokenizer>,
    eos_token_ids: &[TokenId],
    vocab_size: usize,
) -> Result<ServedGrammars> {
    Grammars::check(tokenizer, eos_token_ids, vocab_size)?;
    let (tokenizer, eos_token_ids) = (tokenizer.clone(), eos_token_ids.to_vec());
    let make = move || Grammars::new(&tokenizer, &eos_token_ids, vocab_size);
    ServedGrammars::prepare(make).context("cannot start a thread")
}

/// `tool_syntax` says which block tells the model of its tools where the template does not.
fn compile(
    source: &str,
    tokenizer: &Tokenizer,
    tool_syntax: Option<ToolSyntax>,
) -> Result<Arc<ChatTemplate<'static>>> {
    let control = tokenizer.control_tokens().clone();
    // Served as long as the process lives.
    let source: &'static str = source.to_owned().leak();
    let template = ChatTemplate::new(source, tokenizer.bos_text(), tokenizer.eos_text(), control);
    Ok(Arc::new(match tool_syntax {
        Some(syntax) => template?.with_tools_block(ToolsBlock::of_syntax(syntax)),
        None => template?,
    }))
}

struct Banner {
    name: String,
    /// What is loaded.
    checkpoint_bytes: u64,
    device: String,
    precision: String,
    address: SocketAddr,
    has_template: bool,
    is_tls: bool,
    needs_key: bool,
}

impl Banner {
    /// What to do next, once the server is ready.
    fn print(&self) {
        let Self { name, device, precision, address, .. } = self;
        let url = format!("{}://{address}", if self.is_tls { "https" } else { "http" });
        println!("\nr1-serve is ready: {name} on {device}; {precision}\n  {url}/v1\n\nTry it:\n");
        let key = if self.needs_key { " \\\n    -H \"Authorization: Bearer $R1_API_KEY\"" } else { "" };
        if self.has_template {
            println!(
                "  curl -N {url}/v1/chat/completions{key} \\\n    -H 'Content-Type: application/json' \\\n    -d '{{\"model\": \
                 \"{name}\", \"stream\": true, \"messages\": [{{\"role\": \"user\", \"content\": \"how many rs are in \
                 strawberry\"}}]}}'\n\n  r1-serve chat --url {url}\n"
            );
        } else {
            println!(
                "  curl {url}/v1/completions{key} \\\n    -H 'Content-Type: application/json' \\\n    -d '{{\"model\": \
                 \"{name}\", \"prompt\": \"San Francisco is a\", \"max_tokens\": 32}}'\n"
            );
        }
    }
}

async fn serve(
    listener: TcpListener,
    config: ServerConfig,
    model: ServedModel,
    engine: Handle,
    banner: Banner,
) -> Result<()> {
    let watched = engine.clone();
    let (start, outcome) = watch::channel(None);
    tokio::spawn(async move { start.send_replace(Some(until_ready(&watched, &banner).await)) });
    let shutdown = async {
        signal().await;
        tracing::info!("stopping; a second signal ends the process at once");
        tokio::spawn(async {
            signal().await;
            std::process::exit(130);
        });
    };
    let start_failed = start_failed(outcome, model.grammars.clone());
    tokio::select! {
        () = r1_server::serve(listener, config, model, engine, shutdown) => Ok(()),
        // Nothing has been served for long, so nothing is drained.
        why = start_failed => bail!("{why}"),
    }
}

/// Resolves with the reason once weights or grammars turn out to be unusable.
async fn start_failed(
    mut loading: watch::Receiver<Option<Result<(), String>>>,
    grammars: ServedGrammars,
) -> String {
    let loading_failed = async {
        match loading.wait_for(|outcome| matches!(outcome, Some(Err(_)))).await.as_deref() {
            Ok(Some(Err(why))) => why.clone(),
            // The sender ends without a failure only together with this runtime.
            _ => std::future::pending().await,
        }
    };
    let grammars_failed = async {
        match grammars.get().await {
            Err(why) => format!("the grammars of this model could not be prepared: {why}"),
            Ok(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        why = loading_failed => why,
        why = grammars_failed => why,
    }
}

/// Follows the loading of the model; gives why it failed.
async fn until_ready(engine: &Handle, banner: &Banner) -> Result<(), String> {
    const STEPS: u64 = 1000;
    let bar = ProgressBar::new(STEPS);
    let style =
        ProgressStyle::with_template("loading {msg} [{bar:40}] {percent}% {eta}").expect("a fixed template");
    bar.set_style(style);
    bar.set_message(banner.name.clone());
    loop {
        match engine.status() {
            Status::Loading { progress, elapsed } => {
                bar.set_position((progress * STEPS as f32) as u64);
                let loaded = f64::from(progress) * banner.checkpoint_bytes as f64;
                let rate = loaded / 1e9 / elapsed.as_secs_f64().max(1e-3);
                bar.set_message(format!("{} at {rate:.2} GB/s", banner.name));
            }
            Status::Ready => {
                bar.finish_and_clear();
                banner.print();
                return Ok(());
            }
            Status::Failed(why) => {
                bar.abandon();
                return Err(why);
            }
            Status::Stopped => return Ok(()),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Resolves at the first SIGTERM or SIGINT from now on.
async fn signal() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    // Without a handler for signals the process ends the way the system ends it.
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn grammars_that_fail_fail_the_start() {
        let (_loading, loading) = watch::channel(None);
        let grammars = ServedGrammars::prepare(|| Err("no room")).expect("a thread");
        let why = start_failed(loading, grammars).await;
        assert_eq!(why, "the grammars of this model could not be prepared: no room");
    }
}
