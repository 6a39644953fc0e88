//! The command line, in our words; the peers' words are aliases.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::bench::make_model::MakeModelArgs;
use crate::bench::serving::ServingArgs;
use crate::http::HttpArgs;
use crate::log::LogArgs;
use crate::numa::Numa;
use crate::overrides::OverrideArgs;
use crate::peers::PeerArgs;
use crate::text::TextArgs;

/// Serves DeepSeek-R1 and its family over the OpenAI API.
///
/// Without arguments it serves tiny-r1, a small model that is part of the binary.
#[derive(Debug, Parser)]
#[command(
    name = "r1-serve",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_precedence_over_arg = true
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve a model (the default).
    #[command(visible_alias = "launch_server")]
    Serve(Box<ServeArgs>),
    /// Talk to a running server in the terminal.
    Chat(ChatArgs),
    /// Measure.
    Bench {
        #[command(subcommand)]
        what: BenchCommand,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Latency and throughput of one batch: a prefill, then decode steps.
    #[command(alias = "one_batch")]
    OneBatch(Box<OneBatchArgs>),
    /// Throughput and latencies of a running server under load: any server of OpenAI's API.
    #[command(after_long_help = crate::bench::serving::JSON_HELP)]
    Serving(Box<ServingArgs>),
    /// Write a random checkpoint of a shape, in the published layout.
    #[command(alias = "make_model")]
    MakeModel(Box<MakeModelArgs>),
}

/// Which model, on which device, how.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    /// A folder with config.json and safetensors, or a hub id (org/name) that is in the Hugging Face cache. Without it,
    /// the built-in tiny-r1.
    #[arg(long, alias = "model-path", value_name = "MODEL")]
    pub(crate) model: Option<String>,

    /// The model, as for --model.
    #[arg(value_name = "MODEL", conflicts_with = "model")]
    pub(crate) model_positional: Option<String>,

    /// Branch, tag or commit of a hub id.
    #[arg(long)]
    pub(crate) revision: Option<String>,

    /// A folder to look in before the Hugging Face cache, laid out like it.
    #[arg(long, value_name = "DIR")]
    pub(crate) download_dir: Option<PathBuf>,

    /// Where the weights come from.
    #[arg(long, value_enum, default_value_t = LoadFormat::Auto)]
    pub(crate) load_format: LoadFormat,

    #[command(flatten)]
    pub(crate) overrides: OverrideArgs,

    /// Where to compute. auto: NVIDIA's GPUs, else AMD's, else the CPU. emu: the GPU code on emulated GPUs, slow, for tests.
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    pub(crate) device: Device,

    /// Element type of activations. auto: BF16 where the device multiplies it (a CPU with AVX-512 BF16 and VBMI, a GPU), else F32;
    /// weights as stored (a CPU widens FP8 in registers), FP8 ones applied to FP8 activations where a GPU has FP8 arithmetic.
    /// float32: F32, weights as stored. bfloat16: BF16, FP8 weights widened to BF16 once, at load.
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub(crate) dtype: Dtype,

    /// Quantization of the weights. int8, int4: linears and experts are quantized at load, in groups of 128, from BF16 or FP8, for
    /// --device cpu (and reference); what is not quantized stays as stored, also with --dtype bfloat16. fp8 is read from config.json, so it can only confirm it.
    #[arg(long, value_enum)]
    pub(crate) quantization: Option<Quantization>,

    /// What --quantization's weights are applied to on a CPU [default: auto]. on: activations rounded to int8, per token and 128
    /// inputs, which AVX-512 VNNI multiplies two to three times as fast. off: activations as they are. auto: on where the CPU has
    /// AVX-512 with BF16, VBMI and VNNI, unless --dtype is float32.
    #[arg(long, value_enum, value_name = "WHEN")]
    pub(crate) int8_activations: Option<Int8Activations>,

    /// Element type of the KV cache; auto is that of the activations (see --dtype), and another than theirs is fp8 alone. fp8 (fp8_e4m3): latents as E4M3 with a scale per token
    /// and 128 channels, rotated keys in BF16: a little more than a quarter of F32's memory.
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub(crate) kv_cache_dtype: Dtype,

    /// CPU threads [default: one per core].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) threads: Option<u16>,

    /// Where weights lie on a CPU [default: in-place]. in-place: in the page cache, which other processes share and whose pages
    /// are as large as the file system keeps them. huge-pages: matrices are copied into huge pages at the start and their pages in
    /// the file given back: faster where the page cache has small pages.
    #[arg(long, value_enum, value_name = "PLACE")]
    pub(crate) weight_memory: Option<WeightMemory>,

    /// Where threads and memory of a CPU with several NUMA nodes lie [default: auto]. Weights that are mapped in place are
    /// interleaved only as far as the page cache does not hold them yet; --weight-memory huge-pages copies them interleaved.
    #[arg(long, value_enum, value_name = "PLACEMENT")]
    pub(crate) numa: Option<Numa>,

    /// Most tokens of prompt and reply together [default: the model's].
    #[arg(long, alias = "context-length", value_name = "TOKENS")]
    pub(crate) max_model_len: Option<usize>,

    /// Most sequences in the running batch.
    #[arg(long, alias = "max-running-requests", value_name = "N", default_value_t = 64)]
    pub(crate) max_num_seqs: usize,

    /// Most tokens in one step; longer prompts are prefilled in chunks.
    #[arg(
        long,
        alias = "chunked-prefill-size",
        value_name = "TOKENS",
        default_value_t = 1024,
        allow_hyphen_values = true,
        value_parser = tokens_per_step
    )]
    pub(crate) max_num_batched_tokens: usize,

    /// Share of the memory that may be taken. On a GPU: of the GPU's memory, weights and KV cache together [default: 0.9]; on a
    /// CPU: of what is free after loading, by the KV cache [default: 0.5].
    #[arg(long, alias = "mem-fraction-static", value_name = "SHARE", value_parser = share)]
    pub(crate) gpu_memory_utilization: Option<f64>,

    /// Let NVIDIA's driver compile the kernels at start for a GPU that this build has no native code for.
    #[arg(long)]
    pub(crate) allow_ptx: bool,

    /// Tokens that the KV cache holds [default: what is useful and fits].
    #[arg(long, value_name = "TOKENS", value_parser = at_least_one)]
    pub(crate) max_total_tokens: Option<usize>,

    /// Compute every prompt anew, whatever it has in common with earlier ones.
    #[arg(long, alias = "no-enable-prefix-caching", alias = "disable-radix-cache")]
    pub(crate) no_prefix_cache: bool,

    /// Tensor-parallel ranks. On a CPU they are threads of this process, which share its cores.
    #[arg(
        long,
        alias = "tensor-parallel-size",
        alias = "tp-size",
        value_name = "N",
        default_value_t = 1,
        value_parser = at_least_one
    )]
    pub(crate) tp: usize,

    /// A request's tokens do not depend on what else runs, bit for bit: not on the batch, on chunks of its prompt, on the
    /// prefix cache, on preemption. Costs prefill speed.
    #[arg(long)]
    pub(crate) deterministic: bool,

    #[command(flatten)]
    pub(crate) peers: PeerArgs,
}

impl ModelArgs {
    /// Refuses what is asked for and not built; gives a note for each flag that has nothing to do.
    pub(crate) fn check(&self) -> anyhow::Result<Vec<String>> {
        self.peers.check(self.tp, self.device.captures())
    }

    /// What was asked for, by either spelling.
    pub(crate) fn model(&self) -> Option<&str> {
        self.model.as_deref().or(self.model_positional.as_deref())
    }
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// Names the model answers to; the first is given in replies [default: what --model says].
    #[arg(long, value_name = "NAME", num_args = 1.., action = clap::ArgAction::Append)]
    pub(crate) served_model_name: Vec<String>,

    /// Flags from a YAML or TOML file, its keys without the dashes; what stands on the command line wins.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Seed of the first choice that brings none; each further one gets the next, in the order they are read [default:
    /// random seeds].
    #[arg(long, alias = "random-seed", value_name = "N")]
    pub(crate) seed: Option<u64>,

    #[command(flatten)]
    pub(crate) text: TextArgs,

    #[command(flatten)]
    pub(crate) http: HttpArgs,

    #[command(flatten)]
    pub(crate) log: LogArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    /// One question; without it, a conversation.
    pub(crate) prompt: Option<String>,

    /// The server.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub(crate) url: String,

    /// Model name to ask for [default: the first the server lists].
    #[arg(long)]
    pub(crate) model: Option<String>,

    /// A PEM file with the authorities that may vouch for an https server, such as its own certificate [default: the
    /// system's, or those of SSL_CERT_FILE].
    #[arg(long, value_name = "FILE")]
    pub(crate) cacert: Option<PathBuf>,

    /// Key to send.
    #[arg(long, env = "R1_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,

    /// System message.
    #[arg(long)]
    pub(crate) system: Option<String>,

    /// Sampling temperature [default: the model's].
    #[arg(long)]
    pub(crate) temperature: Option<f32>,

    /// Most tokens of a reply [default: what the context leaves].
    #[arg(long)]
    pub(crate) max_tokens: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct OneBatchArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// Sequences in the batch.
    #[arg(long, default_value_t = 1)]
    pub(crate) batch_size: usize,

    /// Tokens of each prompt.
    #[arg(long, alias = "input", default_value_t = 128)]
    pub(crate) input_len: usize,

    /// Tokens generated per sequence.
    #[arg(long, alias = "output", default_value_t = 256)]
    pub(crate) output_len: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Device {
    Auto,
    Cpu,
    Cuda,
    Rocm,
    Emu,
    Reference,
}

impl Device {
    /// Whether decode steps are captured on it.
    fn captures(self) -> bool {
        match self {
            Self::Cuda | Self::Rocm | Self::Emu => true,
            Self::Cpu | Self::Reference => false,
            Self::Auto => r1_gpu::devices().iter().any(|found| found.devices.is_ok()),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dtype {
    Auto,
    #[value(alias = "float", alias = "fp32", alias = "f32")]
    Float32,
    #[value(alias = "bf16")]
    Bfloat16,
    #[value(alias = "half", alias = "fp16")]
    Float16,
    #[value(name = "fp8", alias = "fp8_e4m3")]
    Fp8,
    #[value(name = "fp8_e5m2")]
    Fp8E5m2,
    /// Of weights alone; refused with the flag that means it.
    #[value(hide = true, alias = "i8", alias = "uint8", alias = "int4")]
    Int8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Quantization {
    Int8,
    Int4,
    Fp8,
    Awq,
    Gptq,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Int8Activations {
    #[default]
    Auto,
    On,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WeightMemory {
    InPlace,
    HugePages,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LoadFormat {
    /// The model's safetensors.
    Auto,
    /// The model's safetensors.
    Safetensors,
    /// Random weights of the shape of config.json, made in memory, to measure speed with: --model is then a folder that needs
    /// nothing but a config.json, or such a file.
    Dummy,
}

fn share(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|share| *share > 0.0 && *share <= 1.0)
        .ok_or_else(|| "a share above 0 and at most 1".into())
}

fn tokens_per_step(text: &str) -> Result<usize, String> {
    if text.starts_with('-') {
        return Err("prefill is always chunked; give the most tokens of one step, as large as the longest prompt to have \
                    none in pieces"
            .into());
    }
    at_least_one(text)
}

pub(crate) fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "a whole number of at least 1".into())
}

pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    // Ten years; moments that far ahead can still be told apart from now on every system.
    const MOST: Duration = Duration::from_hours(10 * 365 * 24);
    let seconds: f64 = text.parse().map_err(|_| "a number of seconds".to_owned())?;
    let duration = Duration::try_from_secs_f64(seconds).ok().filter(|duration| *duration <= MOST);
    duration.ok_or_else(|| format!("must be from 0 to {}", MOST.as_secs()))
}

pub(crate) fn some_seconds(text: &str) -> Result<Duration, String> {
    let duration = seconds(text)?;
    if duration < Duration::from_millis(1) { Err("must be at least 0.001".into()) } else { Ok(duration) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Cli {
        Cli::try_parse_from(line.split(' ')).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn serve_is_the_default_and_both_dialects_mean_the_same() {
        for line in [
            "r1-serve --model m --max-model-len 100 --max-num-seqs 3 --max-num-batched-tokens 50 --tp 1",
            "r1-serve --model-path m --context-length 100 --max-running-requests 3 --chunked-prefill-size 50 --tp-size 1",
            "r1-serve m --max-model-len=100 --max-num-seqs=3 --max-num-batched-tokens=50 --tensor-parallel-size=1",
        ] {
            let cli = parse(line);
            assert!(cli.command.is_none());
            let args = cli.serve.model;
            assert_eq!(args.model(), Some("m"), "{line}");
            let sizes = (args.max_model_len, args.max_num_seqs, args.max_num_batched_tokens);
            assert_eq!(sizes, (Some(100), 3, 50), "{line}");
        }
        let Some(Command::Serve(args)) = parse("r1-serve serve deepseek-ai/DeepSeek-R1 --port 1").command
        else {
            panic!("a subcommand")
        };
        assert_eq!((args.model.model(), args.http.port), (Some("deepseek-ai/DeepSeek-R1"), 1));
    }

    #[test]
    fn the_published_benchmark_command_parses() {
        let line = "r1-serve bench one-batch --batch-size 1 --input 128 --output 256 --model m --trust-remote-code --tp 1 \
                    --enable-torch-compile --torch-compile-max-bs 1";
        let Some(Command::Bench { what: BenchCommand::OneBatch(args) }) = parse(line).command else {
            panic!("a benchmark")
        };
        assert_eq!((args.batch_size, args.input_len, args.output_len), (1, 128, 256));
    }

    #[test]
    fn timeouts_are_seconds_and_not_zero() {
        let args = parse("r1-serve --watchdog-timeout 0.5 --request-timeout 90 --idle-timeout 5").serve.http;
        let seconds =
            (args.watchdog_timeout.as_secs_f64(), args.request_timeout, args.idle_timeout.as_secs());
        assert_eq!(seconds, (0.5, Some(Duration::from_secs(90)), 5));
        let args = parse("r1-serve").serve.http;
        assert_eq!((args.watchdog_timeout.as_secs(), args.request_timeout), (120, None));
        for flag in ["--watchdog-timeout", "--request-timeout", "--idle-timeout"] {
            for value in ["0", "-1", "soon", "NaN", "inf", "1e10", "1e19", "1e300"] {
                assert!(
                    Cli::try_parse_from(["r1-serve", &format!("{flag}={value}")]).is_err(),
                    "{flag}={value}"
                );
            }
        }
    }

    #[test]
    fn an_unknown_flag_suggests_the_nearest() {
        let error = Cli::try_parse_from(["r1-serve", "--max-model-length", "3"]).unwrap_err().to_string();
        assert!(error.contains("--max-model-len"), "{error}");
    }
}
