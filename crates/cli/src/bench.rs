//! `r1-serve bench one-batch`: the latency of one batch, in the words of SGLang's `bench_one_batch`; and the other benches.

pub(crate) mod make_model;
pub(crate) mod serving;

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use r1_backend::Backend;
use r1_engine::{Connect, LocalRanks, OneBatch, OneBatchBench, OneBatchTimes};

use crate::args::OneBatchArgs;
use crate::launch::{AnyDevice, Launch, OnDevice};
use crate::source::Source;

/// Decode steps whose latency is printed one by one.
const SHOWN_STEPS: usize = 5;
/// Tokens generated in the warm-up.
const WARMUP_OUTPUT_TOKENS: usize = 8;

/// Runs a short batch to warm up, then the one that was asked for.
pub(crate) fn one_batch(args: &OneBatchArgs) -> Result<()> {
    for note in args.model.check()? {
        eprintln!("note: {note}");
    }
    let source = Source::open(&args.model)?;
    if args.batch_size == 0 || args.input_len == 0 || args.output_len == 0 {
        bail!("--batch-size, --input-len and --output-len must be at least 1");
    }
    let tokens_per_step = args.model.max_num_batched_tokens.max(args.batch_size);
    let (device, said) = AnyDevice::open(&args.model)?;
    for said in said {
        eprintln!("{said}");
    }
    let mut launch = Launch::new(&args.model, &source, &device, args.batch_size, tokens_per_step)?;
    let max_model_len = launch.engine.max_model_len;
    if args.input_len.saturating_add(args.output_len) > max_model_len {
        bail!(
            "--input-len {} and --output-len {} together are more than the context of {max_model_len} tokens",
            args.input_len,
            args.output_len
        );
    }
    // The KV cache need not be larger than this batch.
    launch.engine.max_model_len = args.input_len + args.output_len;
    writeln!(io::stdout(), "{} on {}; {}", source.name, device.describe(), launch.precision(&source))?;
    let batch = OneBatch {
        batch_size: args.batch_size,
        input_tokens: args.input_len,
        output_tokens: args.output_len,
    };
    device.with(Run { source, launch, batch })
}

struct Run {
    source: Source,
    launch: Launch,
    batch: OneBatch,
}

impl OnDevice for Run {
    type Output = Result<()>;

    fn run<B: Backend>(self, devices: Vec<Arc<B>>, connect: Connect<B>) -> Result<()> {
        let bar =
            if std::io::stderr().is_terminal() { ProgressBar::new(1000) } else { ProgressBar::hidden() };
        let mut progress = |share: f32| bar.set_position((share * 1000.0) as u64);
        let Source { checkpoint, config, .. } = self.source;
        let ranks = LocalRanks { devices, connect, checkpoint, config, options: self.launch.model };
        let mut bench = OneBatchBench::new(Arc::new(ranks), &self.launch.engine, &mut progress)?;
        bar.finish_and_clear();
        writeln!(io::stdout(), "Warmup ...")?;
        let warmup = self.batch.output_tokens.min(WARMUP_OUTPUT_TOKENS);
        measure(&mut bench, OneBatch { output_tokens: warmup, ..self.batch })?;
        writeln!(io::stdout(), "Benchmark ...")?;
        measure(&mut bench, self.batch)
    }
}

fn measure<B: Backend>(bench: &mut OneBatchBench<B>, batch: OneBatch) -> Result<()> {
    let times = bench.run(batch, |_| {}).context("a step failed")?;
    Ok(io::stdout().write_all(report(batch, &times).as_bytes())?)
}

/// The lines of one run. A batch that generates one token per sequence has no decode steps.
fn report(batch: OneBatch, times: &OneBatchTimes) -> String {
    let OneBatch { batch_size, input_tokens, output_tokens } = batch;
    let per_second = |tokens: usize, took: Duration| tokens as f64 / took.as_secs_f64();
    let step = |what: &str, latency: Duration, tokens| {
        let seconds = latency.as_secs_f64();
        format!("{what} latency: {seconds:6.5} s, throughput: {:9.2} token/s\n", per_second(tokens, latency))
    };
    let mut lines = vec![step("Prefill.", times.prefill, batch_size * input_tokens)];
    let shown = times.decode_steps.iter().take(SHOWN_STEPS);
    lines.extend(shown.map(|&latency| step("Decode. ", latency, batch_size)));
    let mut sorted = times.decode_steps.clone();
    sorted.sort_unstable();
    lines.extend(sorted.get(sorted.len() / 2).map(|&median| {
        let seconds = median.as_secs_f64();
        let rate = per_second(batch_size, median);
        format!("Decode.  median latency: {seconds:6.5} s, median throughput: {rate:9.2} token/s\n")
    }));
    let total = times.prefill + times.decode_steps.iter().sum::<Duration>();
    let rate = per_second(batch_size * (input_tokens + output_tokens), total);
    lines.push(format!("Total. latency: {:6.3} s, throughput: {rate:9.2} token/s\n", total.as_secs_f64()));
    lines.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_has_the_published_form() {
        let batch = OneBatch { batch_size: 1, input_tokens: 128, output_tokens: 3 };
        let times = OneBatchTimes {
            prefill: Duration::from_micros(196_350),
            decode_steps: vec![Duration::from_millis(21), Duration::from_micros(20_980)],
        };
        let expected = "\
Prefill. latency: 0.19635 s, throughput:    651.90 token/s
Decode.  latency: 0.02100 s, throughput:     47.62 token/s
Decode.  latency: 0.02098 s, throughput:     47.66 token/s
Decode.  median latency: 0.02100 s, median throughput:     47.62 token/s
Total. latency:  0.238 s, throughput:    549.66 token/s
";
        assert_eq!(report(batch, &times), expected);
    }
}
