//! Load on the served binary, from another process: a soak with clients that leave, an overload, a drain. Prints every
//! figure with its bound and fails when one is missed. Knows nothing of the server but its command line and HTTP.
#![forbid(unsafe_code)]

mod client;
mod drain;
mod histogram;
mod http;
mod overload;
mod report;
mod server;
mod soak;
mod sse;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

use crate::drain::Drain;
use crate::overload::Overload;
use crate::report::{Bound, Report};
use crate::server::Server;
use crate::soak::Soak;

/// Disconnects per second of the soak, unless told otherwise: 10,000 in two minutes.
const DISCONNECTS_PER_SECOND: f64 = 10_000.0 / 120.0;
/// Shorter runs share their time among the phases.
const LONG: u64 = 60;

/// Drives r1-serve: soak, overload, drain. Needs Linux' /proc.
#[derive(Debug, Parser)]
#[command(name = "r1-load", version)]
struct Args {
    /// The server [default: r1-serve beside this binary; env: R1_SERVE_BIN].
    #[arg(long, value_name = "PATH")]
    bin: Option<PathBuf>,

    /// Length of the soak; below 60, of all phases together.
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u64).range(5..))]
    seconds: u64,

    /// Streams at once in the soak.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..))]
    streams: u16,

    /// Clients that leave during the soak [default: 10000 per two minutes].
    #[arg(long)]
    disconnects: Option<u64>,

    /// Where the random requests begin.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Sequences in the running batch, for all phases.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    max_num_seqs: u16,

    /// Places in the queue during overload and drain; three times as many requests per second are offered on top.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    max_queued_requests: u16,

    /// Excess requests that are sent at the same moment.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    burst: u16,

    /// Run these phases only.
    #[arg(long, value_enum, num_args = 1..)]
    phases: Vec<Phase>,

    /// More arguments for the server.
    #[arg(last = true)]
    more: Vec<String>,

    /// Write the figures here, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Phase {
    Soak,
    /// Overload, then drain.
    Overload,
}

impl Args {
    fn binary(&self) -> Result<PathBuf> {
        let beside = || Some(std::env::current_exe().ok()?.with_file_name("r1-serve"));
        let named = self.bin.clone().or_else(|| std::env::var_os("R1_SERVE_BIN").map(PathBuf::from));
        let binary = named.or_else(beside).context("name the server with --bin")?;
        if !binary.is_file() {
            bail!(
                "there is no {}; build it with `cargo build --release`, or name it with --bin",
                binary.display()
            );
        }
        Ok(binary)
    }

    /// Lengths of the soak and of each half of the overload; what still runs at the end of each, and the drain, need the
    /// rest of a short run.
    fn lengths(&self) -> (Duration, Duration) {
        let seconds = |seconds: f64| Duration::from_secs_f64(seconds);
        let total = self.seconds as f64;
        if self.seconds >= LONG {
            (seconds(total), seconds(20.0))
        } else {
            (seconds(total * 0.35), seconds(total * 0.15))
        }
    }

    fn runs(&self, phase: Phase) -> bool {
        self.phases.is_empty() || self.phases.contains(&phase)
    }

    fn server(&self, rest: &[(&str, usize)]) -> Vec<String> {
        let mut args = vec!["--max-num-seqs".to_owned(), self.max_num_seqs.to_string()];
        for (name, value) in rest {
            args.extend([(*name).to_owned(), value.to_string()]);
        }
        args.extend(self.more.iter().cloned());
        args
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let run = runtime.context("cannot start the runtime").and_then(|runtime| runtime.block_on(run(&args)));
    match run {
        Ok(0) => ExitCode::SUCCESS,
        Ok(missed) => {
            eprintln!("{missed} bounds were missed");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("r1-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the phases; gives how many bounds were missed.
async fn run(args: &Args) -> Result<usize> {
    let binary = args.binary()?;
    let (soak_length, half) = args.lengths();
    let mut report = Report::default();
    let started = Instant::now();

    if args.runs(Phase::Soak) {
        let per_length = (DISCONNECTS_PER_SECOND * soak_length.as_secs_f64()).round() as u64;
        let soak = Soak {
            length: soak_length,
            streams: usize::from(args.streams),
            max_num_seqs: usize::from(args.max_num_seqs),
            disconnects: args.disconnects.unwrap_or(per_length),
            seed: args.seed,
        };
        // Two choices per stream fit into the queue, and as much again of clients that left and are not yet gone.
        let queue = usize::from(args.streams) * 4;
        let limits = [("--max-queued-requests", queue), ("--max-model-len", soak::CONTEXT_TOKENS as usize)];
        let mut server = Server::start(&binary, &args.server(&limits))?;
        let bar = progress("soak", soak_length);
        soak::run(&server, &soak, &bar, &mut report).await?;
        bar.finish_and_clear();
        finish(&mut server, "soak", &mut report).await?;
    }

    if args.runs(Phase::Overload) {
        let queue = usize::from(args.max_queued_requests);
        let mut server = Server::start(&binary, &args.server(&[("--max-queued-requests", queue)]))?;
        let overload = Overload {
            half,
            running: usize::from(args.max_num_seqs),
            waiting: queue,
            burst: usize::from(args.burst),
            seed: args.seed,
        };
        let bar = progress("overload", half * 2);
        let time_per_token = overload::run(&server, &overload, &bar, &mut report).await?;
        bar.finish_and_clear();
        let drain = Drain { streams: usize::from(args.max_num_seqs), time_per_token, seed: args.seed };
        drain::run(&mut server, &drain, &mut report).await?;
        complain(&server, "drain", &mut report);
    }

    println!("{}", report.table());
    println!("{:.1} s in all, seed {}", started.elapsed().as_secs_f64(), args.seed);
    if let Some(path) = &args.json {
        let text = format!("{:#}\n", report.json());
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(report.missed())
}

/// Stops an idle server, which must end at once and well.
async fn finish(server: &mut Server, phase: &'static str, report: &mut Report) -> Result<()> {
    server.terminate()?;
    let ended = server.wait(Duration::from_secs(10)).await?;
    let code = ended.and_then(|status| status.code()).map_or(f64::NAN, f64::from);
    report.figure(phase, "exit code after SIGTERM", code, "", Bound::Exactly(0.0));
    complain(server, phase, report);
    Ok(())
}

/// Errors in the server's log: all are counted, the first few are shown.
fn complain(server: &Server, phase: &'static str, report: &mut Report) {
    let complaints = server.complaints();
    report.figure(phase, "errors in the server's log", complaints.len() as f64, "", Bound::Exactly(0.0));
    for line in complaints.into_iter().take(5) {
        report.remark(format!("{phase}, the server's log: {line}"));
    }
}

/// A bar over a phase's seconds; nothing where no terminal is.
fn progress(name: &'static str, length: Duration) -> ProgressBar {
    let style =
        ProgressStyle::with_template("{prefix:9} [{bar:40}] {pos}/{len} s  {msg}").expect("a fixed template");
    ProgressBar::new(length.as_secs()).with_style(style).with_prefix(name)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn short_runs_share_their_time() {
        let lengths = |line: &str| Args::try_parse_from(line.split(' ')).expect("arguments").lengths();
        let seconds = Duration::from_secs;
        assert_eq!(lengths("r1-load --seconds 120"), (seconds(120), seconds(20)));
        assert_eq!(lengths("r1-load --seconds 20"), (seconds(7), seconds(3)));
    }
}
