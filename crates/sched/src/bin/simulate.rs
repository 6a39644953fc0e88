//! Runs the scheduler's simulator over many seeds: `simulate --seeds 1000 [--seed 0] [--steps 1000]`. Exits with 1 and
//! the way to replay it at the first seed that breaks a rule.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};
use r1_sched::simulate::{Report, Scenario, run};

const USAGE: &str = "usage: simulate [--seeds N] [--seed FIRST] [--steps PER_SEED]";

struct Args {
    num_seeds: u64,
    first_seed: u64,
    num_steps: u64,
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Args, String> {
    let mut parsed = Args { num_seeds: 1000, first_seed: 0, num_steps: 1000 };
    while let Some(flag) = args.next() {
        let field = match flag.as_str() {
            "--seeds" => &mut parsed.num_seeds,
            "--seed" => &mut parsed.first_seed,
            "--steps" => &mut parsed.num_steps,
            _ => return Err(format!("unknown argument {flag}\n{USAGE}")),
        };
        let value = args.next().ok_or_else(|| format!("{flag} needs a number\n{USAGE}"))?;
        *field = value.parse().map_err(|_| format!("{flag}: {value} is not a number\n{USAGE}"))?;
    }
    Ok(parsed)
}

fn main() -> ExitCode {
    let Args { num_seeds, first_seed, num_steps } = match parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::from(2);
        }
    };
    let bar = ProgressBar::new(num_seeds);
    bar.set_style(
        ProgressStyle::with_template("{bar:40} {pos}/{len} seeds, {per_sec}, {eta} left")
            .expect("a constant template"),
    );
    let mut total = Report::default();
    for seed in first_seed..first_seed.saturating_add(num_seeds) {
        let scenario = Scenario::from_seed(seed, num_steps);
        match run(&scenario) {
            Ok(report) => total.add(&report),
            Err(failure) => {
                bar.abandon();
                eprintln!("{failure}\n{scenario:#?}");
                eprintln!(
                    "replay: cargo run --release -p r1-sched --bin simulate -- --seed {seed} --seeds 1 --steps {num_steps}"
                );
                return ExitCode::FAILURE;
            }
        }
        bar.inc(1);
    }
    bar.finish();
    println!("{num_seeds} seeds hold. {total}");
    ExitCode::SUCCESS
}
