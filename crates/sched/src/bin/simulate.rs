//! Runs the scheduler's simulator over many seeds, on every core: `simulate [--seeds N] [--seed FIRST] [--steps PER_SEED]
//! [--threads N]`. Exits with 1 and the way to replay it at a seed that breaks a rule. The total does not depend on the
//! number of threads.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use r1_sched::simulate::{Failure, Report, Scenario, run};

const USAGE: &str = "usage: simulate [--seeds N] [--seed FIRST] [--steps PER_SEED] [--threads N]";
/// Seeds that a thread takes at a time. Totals are added up in the order of these shards.
const SHARD: u64 = 1000;

struct Args {
    num_seeds: u64,
    first_seed: u64,
    num_steps: u64,
    num_threads: u64,
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Args, String> {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let mut parsed = Args { num_seeds: 1_000_000, first_seed: 0, num_steps: 200, num_threads: cores };
    while let Some(flag) = args.next() {
        let field = match flag.as_str() {
            "--seeds" => &mut parsed.num_seeds,
            "--seed" => &mut parsed.first_seed,
            "--steps" => &mut parsed.num_steps,
            "--threads" => &mut parsed.num_threads,
            _ => return Err(format!("unknown argument {flag}\n{USAGE}")),
        };
        let value = args.next().ok_or_else(|| format!("{flag} needs a number\n{USAGE}"))?;
        *field = value.parse().map_err(|_| format!("{flag}: {value} is not a number\n{USAGE}"))?;
    }
    if parsed.num_threads == 0 {
        return Err(format!("--threads must be at least 1\n{USAGE}"));
    }
    Ok(parsed)
}

/// What one thread has done: the reports of its shards by their numbers, and the first seed that failed.
type Done = (Vec<(u64, Report)>, Option<Failure>);

/// Takes shards until there is none left, or some seed of anybody's has failed.
fn work(args: &Args, next: &AtomicU64, bar: &ProgressBar) -> Done {
    let mut reports = Vec::new();
    loop {
        let shard = next.fetch_add(1, Ordering::Relaxed);
        let Some(from) = shard.checked_mul(SHARD).filter(|&from| from < args.num_seeds) else {
            return (reports, None);
        };
        let to = (from + SHARD).min(args.num_seeds);
        let mut total = Report::default();
        for seed in from..to {
            let seed = args.first_seed.wrapping_add(seed);
            match run(&Scenario::from_seed(seed, args.num_steps)) {
                Ok(report) => total.add(&report),
                Err(failure) => {
                    next.store(args.num_seeds, Ordering::Relaxed);
                    return (reports, Some(failure));
                }
            }
            bar.inc(1);
        }
        reports.push((shard, total));
    }
}

fn main() -> ExitCode {
    let args = match parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::from(2);
        }
    };
    let bar = ProgressBar::new(args.num_seeds);
    bar.set_style(
        ProgressStyle::with_template("{bar:40} {pos}/{len} seeds, {per_sec}, {eta} left")
            .expect("a constant template"),
    );
    // A panic of the scheduler is reported as the failure of its seed.
    std::panic::set_hook(Box::new(|_| {}));
    let begun = Instant::now();
    let next = AtomicU64::new(0);
    let done: Vec<Done> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..args.num_threads).map(|_| scope.spawn(|| work(&args, &next, &bar))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a run catches its panics")).collect()
    });
    let elapsed = begun.elapsed().as_secs_f64();
    let (mut reports, mut failures) = (Vec::new(), Vec::new());
    for (of_thread, failure) in done {
        reports.extend(of_thread);
        failures.extend(failure);
    }
    if !failures.is_empty() {
        bar.abandon();
        for failure in &failures {
            let (seed, steps) = (failure.seed, args.num_steps);
            eprintln!("{failure}\n{:#?}", Scenario::from_seed(seed, steps));
            eprintln!(
                "replay: cargo run --release -p r1-sched --bin simulate -- --seed {seed} --seeds 1 --steps {steps}"
            );
        }
        return ExitCode::FAILURE;
    }
    bar.finish();
    reports.sort_unstable_by_key(|&(shard, _)| shard);
    let mut total = Report::default();
    for (_, report) in &reports {
        total.add(report);
    }
    println!("{} seeds hold. {total}", args.num_seeds);
    println!("{:.0} steps/s on {} threads, {elapsed:.1} s", total.steps as f64 / elapsed, args.num_threads);
    ExitCode::SUCCESS
}
