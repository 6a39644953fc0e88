//! The `r1-serve` binary: arguments, wiring and subcommands. Knows no model maths.
#![forbid(unsafe_code)]

mod args;
mod bench;
mod chat;
mod client;
mod command_line;
mod config_file;
mod http;
mod launch;
mod log;
mod noted;
mod numa;
mod overrides;
mod peers;
mod serve;
mod source;
mod text;
mod traces;

use std::process::ExitCode;

use mimalloc::MiMalloc;

use crate::args::{BenchCommand, Command};

/// Requests come and go on many threads, and what one allocates another frees: the C library's allocator keeps growing under
/// that.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    let cli = command_line::parse();
    let result = match cli.command {
        None => serve::run(&cli.serve),
        Some(Command::Serve(args)) => serve::run(&args),
        Some(Command::Chat(args)) => chat::run(&args),
        Some(Command::Bench { what }) => match what {
            BenchCommand::OneBatch(args) => bench::one_batch(&args),
            BenchCommand::MakeModel(args) => bench::make_model::run(&args),
            BenchCommand::Serving(args) => bench::serving::run(&args),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output has had enough, as `head` does.
        Err(error) if broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    io.into_iter().any(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
