//! `r1-serve bench make-model`: a random checkpoint of a shape, as files that any program reads. Must not know what is in them.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use r1_weights::{ConfigJson, write_dummy};
use serde_json::json;

use crate::args::at_least_one;
use crate::overrides::OverrideArgs;
use crate::source::DUMMY_SEED;

/// What belongs to a model besides its weights and its config.json.
const COMPANIONS: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
];
const QUANTIZATION: &str = "quantization_config";

#[derive(Debug, Args)]
pub(crate) struct MakeModelArgs {
    /// A config.json, under whatever name, or a folder with one. Tokenizer, chat template and generation_config.json beside it
    /// are copied.
    #[arg(long, value_name = "PATH")]
    config: PathBuf,

    /// The folder to write: new, or empty.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// How the linear layers' weights are stored. The same seed gives the same weights in both, up to what FP8 rounds.
    #[arg(long, value_enum)]
    format: Format,

    /// Seed of the weights; the default is that of --load-format dummy.
    #[arg(long, value_name = "N", default_value_t = DUMMY_SEED)]
    seed: u64,

    /// Most bytes of a file; a larger tensor has a file of its own.
    #[arg(long, value_name = "BYTES", default_value_t = 4_000_000_000, value_parser = bytes)]
    shard_size: u64,

    #[command(flatten)]
    overrides: OverrideArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// BF16.
    Bf16,
    /// F8_E4M3 with an F32 scale (`weight_scale_inv`) per block of 128 x 128, or of config.json's quantization_config.
    Fp8,
}

fn bytes(text: &str) -> Result<u64, String> {
    at_least_one(text).map(|bytes| bytes as u64)
}

/// Writes the checkpoint.
pub(crate) fn run(args: &MakeModelArgs) -> Result<()> {
    let path = if args.config.is_dir() { args.config.join("config.json") } else { args.config.clone() };
    let mut config = ConfigJson::open(&path)?;
    args.overrides.apply(&mut config);
    args.format.declare(&mut config);
    let model = args.overrides.named(config.model().map_err(Into::into))?;
    let total = model.published_size_bytes();
    let bar = if io::stderr().is_terminal() { ProgressBar::new(total) } else { ProgressBar::hidden() };
    let style = "writing [{bar:40}] {binary_bytes}/{binary_total_bytes} {eta}";
    bar.set_style(ProgressStyle::with_template(style).expect("a fixed template"));
    let progress = &mut |bytes| bar.set_position(bytes);
    let written = write_dummy(&config, args.seed, &args.out, args.shard_size, progress)?;
    bar.finish_and_clear();
    let beside = path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
    copy_companions(beside, &args.out)?;
    let counts = model.param_counts();
    writeln!(
        io::stdout(),
        "{}: random weights of {:.2} B parameters ({:.2} B active), {:.2} GB in {} files",
        args.out.display(),
        counts.total as f64 / 1e9,
        counts.active as f64 / 1e9,
        written.size_bytes as f64 / 1e9,
        written.shards
    )?;
    Ok(())
}

impl Format {
    /// Makes config.json say it.
    fn declare(self, config: &mut ConfigJson) {
        let fields = config.fields_mut();
        match self {
            Self::Bf16 => {
                fields.shift_remove(QUANTIZATION);
            }
            Self::Fp8 => {
                if fields.get(QUANTIZATION).is_none_or(serde_json::Value::is_null) {
                    let blocks = json!({
                        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                        "weight_block_size": [128, 128]
                    });
                    fields.insert(QUANTIZATION.into(), blocks);
                }
            }
        }
    }
}

fn copy_companions(from: &Path, to: &Path) -> Result<()> {
    for name in COMPANIONS {
        let source = from.join(name);
        if source.is_file() {
            fs::copy(&source, to.join(name)).with_context(|| format!("cannot copy {}", source.display()))?;
        }
    }
    Ok(())
}
