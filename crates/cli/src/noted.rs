//! Flags of vLLM and SGLang that change nothing here: a table of those that are accepted with a note, because what they ask
//! for always holds or cannot be, and of those that are refused by name. None is ever ignored in silence.

use anyhow::{Result, bail};
use clap::error::Error;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

/// What is said to a flag.
#[derive(Clone, Copy, Debug)]
enum Answer {
    /// Accepted; why there is nothing to do.
    Note(&'static str),
    /// Refused; the way out.
    Refusal(&'static str),
}

use Answer::{Note, Refusal};

/// Names of one meaning, whether they take a value, what is said.
type Flag = (&'static [&'static str], bool, Answer);

const FLAGS: &[Flag] = &[
    (&["trust-remote-code"], false, Note("no code of a checkpoint is ever run")),
    (&["enable-torch-compile"], false, Note("there is nothing to compile")),
    (&["torch-compile-max-bs"], true, Note("there is nothing to compile")),
    (
        &["enable-auto-tool-choice"],
        false,
        Note("calls of tools are always told apart; --tool-call-parser none leaves them in the text"),
    ),
    (
        &["enable-reasoning"],
        false,
        Note("reasoning is always told apart; --reasoning-parser none leaves it in the text"),
    ),
    (&["guided-decoding-backend", "grammar-backend"], true, Note("there is one, and it is built in")),
    (&["stream-interval"], true, Note("every token's text is sent as it comes")),
    (&["uvicorn-log-level", "log-level-http"], true, Note("there is one log; --log-level bounds it")),
    (
        &["enable-log-requests", "log-requests"],
        false,
        Note("a line per request is logged by default; --log-prompts adds texts"),
    ),
    (&["disable-log-stats"], false, Note("statistics stand in /metrics; --log-level warn quiets the log")),
    (&["enable-metrics"], false, Note("/metrics is always served")),
    (&["enable-cache-report"], false, Note("`usage` always says what the prefix cache held")),
    (
        &["enable-chunked-prefill", "enable-mixed-chunk"],
        false,
        Note("prompts over --max-num-batched-tokens are always prefilled in chunks"),
    ),
    (&["swap-space"], true, Note("nothing is swapped out; what is preempted is computed anew")),
    (&["block-size", "page-size"], true, Note("blocks of the KV cache hold 64 tokens")),
    (&["distributed-executor-backend"], true, Note("ranks are threads of this process")),
    (&["attention-backend", "sampling-backend"], true, Note("each --device has one")),
    (&["disable-custom-all-reduce"], false, Note("there is none")),
    (&["tokenizer-mode"], true, Note("there is one tokenizer")),
    (&["chat-template-content-format"], true, Note("templates get texts, whichever form a message has")),
    (
        &["scheduling-policy", "schedule-policy"],
        true,
        Note("requests run by their `priority`, and those alike in order of arrival"),
    ),
    (&["skip-server-warmup"], false, Note("nothing warms up")),
    (
        &["ssl-keyfile-password"],
        true,
        Refusal("decrypt the key, as with `openssl pkey -in key.pem -out plain.pem`, and give that file"),
    ),
    (
        &["ssl-ca-certs", "ssl-cert-reqs"],
        true,
        Refusal("clients show keys (--api-key), not certificates; a proxy in front can ask for those"),
    ),
    (&["enable-ssl-refresh"], false, Refusal("restart the server when its certificate is renewed")),
    (&["uds"], true, Refusal("the server listens on --host and --port")),
    (&["middleware"], true, Refusal("no Python is run; put a proxy in front")),
    (
        &["tool-parser-plugin", "reasoning-parser-plugin"],
        true,
        Refusal("no Python is run; see --tool-call-parser and --reasoning-parser"),
    ),
    (&["enable-lora"], false, Refusal("adapters are not built; merge them into the checkpoint")),
    (
        &["lora-modules", "lora-paths"],
        true,
        Refusal("adapters are not built; merge them into the checkpoint"),
    ),
    (
        &["speculative-config", "speculative-algorithm", "speculative-model", "num-speculative-tokens"],
        true,
        Refusal("speculative decoding is not built; leave it out"),
    ),
    (&["cpu-offload-gb"], true, Refusal("weights lie on the device; take more of them (--tp)")),
    (&["rope-scaling"], true, Refusal("say it as --json-model-override-args '{\"rope_scaling\": {...}}'")),
    (&["return-tokens-as-token-ids"], false, Refusal("set return_tokens_as_token_ids in the request")),
    (&["no-enable-chunked-prefill"], false, Refusal("prefill is always chunked")),
];

/// Those of the table that were given.
#[derive(Debug)]
pub(crate) struct NotedArgs(Vec<(&'static str, Answer)>);

impl NotedArgs {
    /// A note for each; the first that is refused is an error.
    pub(crate) fn check(&self) -> Result<Vec<String>> {
        let mut notes = Vec::new();
        for (name, answer) in &self.0 {
            match answer {
                Note(why) => notes.push(format!("--{name}: {why}")),
                Refusal(way_out) => bail!("--{name} is not supported: {way_out}"),
            }
        }
        Ok(notes)
    }
}

fn names() -> impl Iterator<Item = (&'static str, bool, Answer)> {
    FLAGS.iter().flat_map(|(names, value, answer)| names.iter().map(|name| (*name, *value, *answer)))
}

impl Args for NotedArgs {
    fn augment_args(command: Command) -> Command {
        command.args(names().map(|(name, value, answer)| {
            let arg = Arg::new(name).long(name).hide(true);
            match (value, answer) {
                (false, _) => arg.action(ArgAction::SetTrue),
                (true, Note(_)) => arg.action(ArgAction::Append).allow_negative_numbers(true),
                // Whatever follows it, it is the flag that is wrong.
                (true, Refusal(_)) => arg.action(ArgAction::Append).num_args(0..),
            }
        }))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for NotedArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let given = |name| matches.value_source(name) == Some(ValueSource::CommandLine);
        Ok(Self(names().filter(|(name, ..)| given(name)).map(|(name, _, answer)| (name, answer)).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
