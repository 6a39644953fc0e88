//! `r1-serve bench serving`: a running server under load, in the words of SGLang's and vLLM's `bench_serving`. Knows OpenAI's API
//! and nothing of this server's, but that it takes token ids below the vocabulary's size that it states.

mod report;
mod requests;
mod workload;

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

use crate::args::at_least_one;
use crate::client::{Client, Connections};
use crate::text::{JsonObject, json_object};
use report::{Reply, Report};
use requests::{Endpoint, Prompts, Requests};
use workload::{Planned, Workload};

/// Ids that every vocabulary of today's has, for servers that do not state theirs.
const ANY_VOCABULARY: usize = 1000;
/// A request's thread parses events, and waits.
const STACK_BYTES: usize = 512 << 10;

/// What `--output-file` holds, for `--help`.
pub(crate) const JSON_HELP: &str = "\
--output-file holds one JSON object. What was asked: base_url, endpoint, model, prompts (token_ids or words), dataset_name, \
num_prompts, random_input_len, random_output_len, random_range_ratio, request_rate (null: inf), max_concurrency, seed, \
temperature, ignore_eos, version. What came: completed, failed, first_failure, total_input_tokens and total_output_tokens (by the \
server's usage), asked_input_tokens and asked_output_tokens (of those that completed), replies_without_usage, duration (s), \
request_throughput, input_throughput, output_throughput and total_token_throughput (per second), concurrency (mean), and \
{mean,median,p90,p99}_{ttft,tpot,itl,e2e_latency}_ms, which are null where nothing was measured.

TTFT: from sending to the first text. ITL: between two pieces of text, each of which may hold several tokens. E2E: from sending to the \
reply's last event. TPOT: (E2E - TTFT) / (output tokens - 1), of replies of two tokens or more. Percentiles are interpolated.";

#[derive(Debug, Args)]
pub(crate) struct ServingArgs {
    /// The server [default: http://HOST:PORT].
    #[arg(long, value_name = "URL", conflicts_with_all = ["host", "port"])]
    base_url: Option<String>,

    /// The server's host.
    #[arg(long, default_value = "127.0.0.1")]
    host: String,

    /// The server's port.
    #[arg(long, default_value_t = 8000)]
    port: u16,

    /// Model name to ask for [default: the first the server lists].
    #[arg(long)]
    model: Option<String>,

    /// Key to send.
    #[arg(long, env = "R1_API_KEY", hide_env_values = true)]
    api_key: Option<String>,

    /// A PEM file with the authorities that may vouch for an https server [default: the system's, or those of SSL_CERT_FILE].
    #[arg(long, value_name = "FILE")]
    cacert: Option<PathBuf>,

    /// Where to send requests: a path that ends in /completions; one that ends in /chat/completions gets messages.
    #[arg(long, value_name = "PATH", default_value = "/v1/completions")]
    endpoint: String,

    /// Where lengths come from.
    #[arg(long, value_enum, default_value_t = DatasetName::Random)]
    dataset_name: DatasetName,

    /// Requests.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = at_least_one)]
    num_prompts: usize,

    /// Tokens of a random prompt.
    #[arg(long, alias = "random-input", value_name = "TOKENS", default_value_t = 1024, value_parser = at_least_one)]
    random_input_len: usize,

    /// Tokens generated for a random prompt.
    #[arg(long, alias = "random-output", value_name = "TOKENS", default_value_t = 128, value_parser = at_least_one)]
    random_output_len: usize,

    /// Random lengths are uniform from this share of those to those: 1, all alike; 0, from one token on.
    #[arg(long, value_name = "SHARE", default_value_t = 1.0, value_parser = share)]
    random_range_ratio: f64,

    /// Requests per second, arriving as a Poisson process; inf: all at once.
    #[arg(long, value_name = "RATE", default_value_t = f64::INFINITY, value_parser = rate)]
    request_rate: f64,

    /// Most requests in flight; more that arrive wait here [default: as many as arrive].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_concurrency: Option<usize>,

    /// Seed of lengths, arrivals and prompts.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Leave replies where the model ends them; without it, `ignore_eos` asks for as many tokens as were drawn.
    #[arg(long)]
    disable_ignore_eos: bool,

    /// Sampling temperature.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,

    /// Prompts of random token ids, which need no tokenizer; only a completions endpoint takes them [default: where the server is
    /// r1-serve].
    #[arg(long, conflicts_with = "text_prompts")]
    tokenizer_free: bool,

    /// Prompts of words, whose tokens two requests count beforehand.
    #[arg(long)]
    text_prompts: bool,

    /// Size of the vocabulary that token ids are drawn from [default: what the server states, else 1000].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    vocab_size: Option<usize>,

    /// Requests sent one by one beforehand, which count for nothing.
    #[arg(long, value_name = "N", default_value_t = 1)]
    warmup_requests: usize,

    /// Fields that every request has besides.
    #[arg(long, value_name = "JSON", value_parser = json_object)]
    extra_request_body: Option<JsonObject>,

    /// A file to write the figures to, as JSON.
    #[arg(long, value_name = "FILE")]
    output_file: Option<PathBuf>,
}

/// Where the lengths of prompts and replies come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DatasetName {
    /// Uniform, see --random-input-len.
    Random,
    /// Log-normal, about as long as ShareGPT's conversations: medians of 80 and 120 tokens, deviations of 1.4 and 1.0 of their
    /// logarithms, cut to 4 to 1024.
    SharegptLike,
}

fn share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|share| (0.0..=1.0).contains(share)).ok_or_else(|| "a share from 0 to 1".into())
}

fn rate(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|rate| *rate > 0.0).ok_or_else(|| "requests per second, above 0, or inf".into())
}

/// Measures and reports.
pub(crate) fn run(args: &ServingArgs) -> Result<()> {
    let requests = args.requests()?;
    let prompts = args.prompts(&requests)?;
    let plan = args.workload().plan();
    let bodies: Vec<Value> = plan.iter().map(|planned| requests.planned(planned, prompts)).collect();
    for i in 0..args.warmup_requests {
        let seed = workload::Random::new(!args.seed ^ i as u64).next_u64();
        let planned = Planned { prompt_seed: seed, ..plan[i % plan.len()].clone() };
        requests.send(&requests.planned(&planned, prompts)).context("the warm-up request failed")?;
    }
    // A file that cannot be written is known before the run.
    let file = args
        .output_file
        .as_ref()
        .map(|path| fs::File::create(path).with_context(|| format!("cannot write {}", path.display())));
    let file = file.transpose()?;
    let report = measure(args, &requests, &plan, &bodies)?;
    io::stdout().write_all(report.table().as_bytes())?;
    if let Some(mut file) = file {
        let mut json = args.json(&requests, prompts);
        json.extend(report.json());
        writeln!(file, "{}", serde_json::to_string_pretty(&json)?)?;
    }
    if report.replies.is_empty() {
        bail!("all {} requests failed", report.failures.len());
    }
    Ok(())
}

/// Sends every request at its time.
fn measure(args: &ServingArgs, requests: &Requests, plan: &[Planned], bodies: &[Value]) -> Result<Report> {
    let bar =
        if io::stderr().is_terminal() { ProgressBar::new(plan.len() as u64) } else { ProgressBar::hidden() };
    bar.set_style(
        ProgressStyle::with_template("{pos}/{len} [{bar:40}] {elapsed}").expect("a fixed template"),
    );
    let mut report = Report::default();
    let mut keep = |returned: Option<Result<Reply>>| {
        match returned {
            None => return,
            Some(Ok(reply)) => report.replies.push(reply),
            Some(Err(error)) => report.failures.push(format!("{error:#}")),
        }
        bar.inc(1);
    };
    // As many permits as requests may be in flight; each request ends by giving its own back, with what came of it.
    let (give_back, permits) = mpsc::channel::<Option<Result<Reply>>>();
    for _ in 0..args.max_concurrency.unwrap_or(plan.len()) {
        give_back.send(None)?;
    }
    let started = Instant::now();
    thread::scope(|scope| -> Result<()> {
        for (planned, body) in plan.iter().zip(bodies) {
            thread::sleep((started + planned.arrival).saturating_duration_since(Instant::now()));
            keep(permits.recv()?);
            let give_back = give_back.clone();
            let send = move || {
                let reply = requests.send(body).map(|reply| Reply {
                    asked_input_tokens: planned.input_tokens as u64,
                    asked_output_tokens: planned.output_tokens as u64,
                    ..reply
                });
                // The receiver outlives every request.
                let _ = give_back.send(Some(reply));
            };
            let thread = thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, send);
            thread.context("cannot start a thread for a request; bound them with --max-concurrency")?;
        }
        Ok(())
    })?;
    drop(give_back);
    let duration = started.elapsed();
    permits.into_iter().for_each(keep);
    bar.finish_and_clear();
    report.duration = duration;
    Ok(report)
}

impl ServingArgs {
    /// How requests are written, for which model.
    fn requests(&self) -> Result<Requests> {
        let url = self.base_url.clone().unwrap_or_else(|| format!("http://{}:{}", self.host, self.port));
        let key = self.api_key.clone();
        // A connection for each request, as a client of its own has.
        let client = Client::new(&url, self.cacert.as_deref(), key, Connections::OnePerRequest)?;
        let endpoint = if self.endpoint.ends_with("/chat/completions") {
            Endpoint::Chat
        } else if self.endpoint.ends_with("/completions") {
            Endpoint::Completions
        } else {
            bail!("--endpoint {}: paths that end in /completions or /chat/completions are", self.endpoint)
        };
        let model = match &self.model {
            Some(model) => model.clone(),
            None => client.first_model()?,
        };
        let mut common = Map::new();
        common.insert("temperature".into(), json!(self.temperature));
        if !self.disable_ignore_eos {
            common.insert("ignore_eos".into(), json!(true));
        }
        common.extend(self.extra_request_body.clone().unwrap_or_default());
        Ok(Requests { client, path: self.endpoint.clone(), endpoint, model, common })
    }

    fn workload(&self) -> Workload {
        Workload {
            dataset: self.dataset_name,
            num_prompts: self.num_prompts,
            input_len: self.random_input_len,
            output_len: self.random_output_len,
            range_ratio: self.random_range_ratio,
            rate: self.request_rate,
            seed: self.seed,
        }
    }

    /// Which form prompts have, by the flags and by what the server is.
    fn prompts(&self, requests: &Requests) -> Result<Prompts> {
        let takes_ids = requests.endpoint == Endpoint::Completions;
        if self.tokenizer_free && !takes_ids {
            bail!(
                "--tokenizer-free: chats are made of texts; leave it out, or take --endpoint /v1/completions"
            );
        }
        // A server without a list of models is none of ours.
        let is_ours =
            || requests.client.get("/v1/models").is_ok_and(|list| list["data"][0]["owned_by"] == "r1-serve");
        if !(self.tokenizer_free || takes_ids && !self.text_prompts && is_ours()) {
            return requests.calibrate().context("no prompts of a known length can be made for this server");
        }
        let stated = || requests.client.get("/get_model_info").ok()?["vocab_size"].as_u64();
        let vocab_size = self.vocab_size.or_else(|| stated().map(|size| size as usize)).unwrap_or_else(|| {
            eprintln!(
                "note: the server does not state its vocabulary; token ids lie below {ANY_VOCABULARY} (--vocab-size)"
            );
            ANY_VOCABULARY
        });
        Ok(Prompts::Ids { vocab_size })
    }

    /// What was asked, for the file of figures.
    fn json(&self, requests: &Requests, prompts: Prompts) -> Map<String, Value> {
        let asked = json!({
            "base_url": requests.client.base(),
            "endpoint": self.endpoint,
            "model": requests.model,
            "prompts": match prompts {
                Prompts::Ids { .. } => "token_ids",
                Prompts::Words { .. } => "words",
            },
            "dataset_name": self.dataset_name.to_possible_value().expect("none is skipped").get_name(),
            "num_prompts": self.num_prompts,
            "random_input_len": self.random_input_len,
            "random_output_len": self.random_output_len,
            "random_range_ratio": self.random_range_ratio,
            "request_rate": self.request_rate.is_finite().then_some(self.request_rate),
            "max_concurrency": self.max_concurrency,
            "seed": self.seed,
            "temperature": self.temperature,
            "ignore_eos": !self.disable_ignore_eos,
            "version": env!("CARGO_PKG_VERSION"),
        });
        match asked {
            Value::Object(asked) => asked,
            _ => unreachable!("it was written as an object"),
        }
    }
}
