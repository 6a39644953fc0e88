//! What is logged, how it looks, and where spans go. Must not know what lines mean.

use std::io::IsTerminal;

use anyhow::Result;
use clap::{Args, ValueEnum};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::args::at_least_one;
use crate::traces::Traces;

#[derive(Debug, Args)]
#[command(next_help_heading = "Log")]
pub(crate) struct LogArgs {
    /// Least severity that is logged [default: what RUST_LOG says, else info].
    #[arg(long, value_enum, value_name = "LEVEL", ignore_case = true)]
    log_level: Option<LogLevel>,

    /// How log lines look.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,

    /// Log no line per request.
    #[arg(long, alias = "disable-log-requests", alias = "disable-uvicorn-access-log")]
    pub(crate) no_request_log: bool,

    /// Log the prompts and replies of requests, which are never logged otherwise.
    #[arg(long)]
    pub(crate) log_prompts: bool,

    /// Most characters of a prompt or a reply that --log-prompts logs.
    #[arg(long, value_name = "CHARACTERS", default_value_t = 2048, value_parser = at_least_one)]
    max_log_len: usize,

    /// Send the spans of requests to this OpenTelemetry collector by OTLP over HTTP, as http://localhost:4318/v1/traces.
    #[arg(long, value_name = "URL")]
    pub(crate) otlp_traces_endpoint: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogLevel {
    Trace,
    Debug,
    Info,
    #[value(alias = "warning")]
    Warn,
    #[value(alias = "critical")]
    Error,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

impl LogArgs {
    /// Where spans are sent, if anywhere.
    pub(crate) fn traces(&self) -> Result<Option<Traces>> {
        self.otlp_traces_endpoint.as_deref().map(Traces::open).transpose()
    }

    /// So many characters of each prompt and reply are logged.
    pub(crate) fn text_len(&self) -> Option<usize> {
        self.log_prompts.then_some(self.max_log_len)
    }

    /// Begins to log to standard error.
    pub(crate) fn init(&self, traces: Option<&Traces>) {
        let filter = match self.log_level.as_ref().and_then(LogLevel::to_possible_value) {
            Some(level) => EnvFilter::new(level.get_name()),
            None => EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        };
        let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
        let log = match self.log_format {
            LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).with_target(false).boxed(),
            LogFormat::Json => log.json().boxed(),
        };
        // What is logged and what is traced are chosen apart.
        tracing_subscriber::registry().with(log.with_filter(filter)).with(traces.map(Traces::layer)).init();
    }
}

/// What the start has to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// For whoever wonders.
    Note(String),
    /// Worth a change.
    Warning(String),
}

impl Said {
    /// To the log.
    pub(crate) fn log(&self) {
        match self {
            Self::Note(text) => tracing::info!("{text}"),
            Self::Warning(text) => tracing::warn!("{text}"),
        }
    }
}

impl std::fmt::Display for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Note(text) => write!(f, "note: {text}"),
            Self::Warning(text) => write!(f, "warning: {text}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command_line::read;

    #[test]
    fn levels_in_everybodys_words() {
        for (said, level) in
            [("debug", LogLevel::Debug), ("WARNING", LogLevel::Warn), ("critical", LogLevel::Error)]
        {
            let cli = read(["r1-serve", "--log-level", said]).unwrap();
            assert_eq!(cli.serve.log.log_level, Some(level), "{said}");
        }
    }

    #[test]
    fn texts_are_logged_only_when_asked_for() {
        let text_len = |line: &str| read(line.split(' ')).unwrap().serve.log.text_len();
        assert_eq!(text_len("r1-serve --max-log-len 5"), None);
        assert_eq!(text_len("r1-serve --log-prompts --max-log-len 5"), Some(5));
    }
}
