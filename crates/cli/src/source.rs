//! Where a model comes from: the one in the binary, a folder, the Hugging Face cache, or a config.json alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use r1_model::{ModelStatus, ReasoningEffort, Registry, ToolSyntaxKind};
use r1_server::ThinkingBudgets;
use r1_text::{Tokenizer, ToolSyntax};
use r1_weights::{Checkpoint, ConfigJson, GenerationDefaults, HubEnv, ModelConfig, resolve_model};
use serde_json::Value;

use crate::args::{LoadFormat, ModelArgs, Quantization};

/// Aligned so that its tensors can be read where they lie.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static TINY_WEIGHTS: &Aligned<[u8]> = &Aligned(*include_bytes!("../model/model.safetensors"));
const TINY_NAME: &str = "tiny-r1";
const TINY_TOKENIZER: &[u8] = include_bytes!("../model/tokenizer.json");
const TINY_TOKENIZER_CONFIG: &[u8] = include_bytes!("../model/tokenizer_config.json");

/// Seed of dummy weights: every start has the same.
pub(crate) const DUMMY_SEED: u64 = 0;

/// The files of a model, opened and checked as far as that needs no weights.
pub(crate) struct Source {
    /// What the user called it.
    pub(crate) name: String,
    pub(crate) config: ModelConfig,
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) defaults: GenerationDefaults,
    /// Whether the weights are random ones.
    pub(crate) is_dummy: bool,
    /// Where its tokenizer and its template are; `None`: in the binary.
    folder: Option<PathBuf>,
}

/// How a model's prompts and replies are written.
pub(crate) struct Family {
    pub(crate) tool_syntax: Option<ToolSyntax>,
    pub(crate) thinking_budgets: ThinkingBudgets,
}

impl Source {
    /// Opens what `--model` names.
    pub(crate) fn open(args: &ModelArgs) -> Result<Self> {
        let source = match args.model() {
            None => Self::bundled(args)?,
            Some(model) => Self::folder(model, args)?,
        };
        match (args.quantization, &source.config.quantization) {
            (None | Some(Quantization::Int8 | Quantization::Int4), _)
            | (Some(Quantization::Fp8), Some(_)) => {}
            (Some(Quantization::Fp8), None) => {
                bail!(
                    "--quantization fp8: the checkpoint is not FP8, and quantizing to FP8 at load is not supported; int8 and int4 are"
                )
            }
            (Some(Quantization::Awq | Quantization::Gptq), _) => {
                bail!(
                    "--quantization awq and gptq are not supported yet; the model's FP8 or BF16 checkpoint is, also with \
                     --quantization int8 or int4"
                )
            }
        }
        if source.is_dummy {
            tracing::warn!(
                "--load-format dummy: the weights are random and replies mean nothing; only speed can be measured"
            );
        }
        if !source.config.unknown_fields.is_empty() {
            tracing::warn!(fields = ?source.config.unknown_fields, "config.json has fields that mean nothing here");
        }
        Ok(source)
    }

    fn bundled(args: &ModelArgs) -> Result<Self> {
        let config = args.overrides.model(ConfigJson::parse(include_bytes!("../model/config.json"))?)?;
        let generation = include_bytes!("../model/generation_config.json");
        let is_dummy = args.load_format == LoadFormat::Dummy;
        let checkpoint = if is_dummy {
            Checkpoint::dummy(&config, DUMMY_SEED)
        } else {
            Checkpoint::from_static(TINY_NAME, &TINY_WEIGHTS.0)?
        };
        Ok(Self {
            name: TINY_NAME.into(),
            checkpoint: Arc::new(checkpoint),
            defaults: GenerationDefaults::from_json(generation, config.vocab_size)?,
            config,
            is_dummy,
            folder: None,
        })
    }

    fn folder(model: &str, args: &ModelArgs) -> Result<Self> {
        let known = Registry::builtin().find(model).cloned();
        if let Some(known) = known.filter(|known| known.status == ModelStatus::Planned) {
            bail!("{} is not supported yet: {}", known.id, known.why.unwrap_or_default());
        }
        let is_dummy = args.load_format == LoadFormat::Dummy;
        if is_dummy && Path::new(model).is_file() {
            return Self::dummy(model, Path::new(model), None, args);
        }
        let folder = resolve_model(
            model,
            args.revision.as_deref(),
            args.download_dir.as_deref(),
            &HubEnv::from_process(),
        )?;
        let config = folder.join("config.json");
        if is_dummy {
            return Self::dummy(model, &config, Some(folder), args);
        }
        let config = args.overrides.model(ConfigJson::open(&config)?)?;
        Ok(Self {
            name: model.to_owned(),
            checkpoint: Arc::new(Checkpoint::open(&folder)?),
            defaults: GenerationDefaults::open(&folder, config.vocab_size)?,
            config,
            is_dummy,
            folder: Some(folder),
        })
    }

    /// Random weights of the shape in the file `config`; the rest is the folder's as far as it has it.
    fn dummy(model: &str, config: &Path, folder: Option<PathBuf>, args: &ModelArgs) -> Result<Self> {
        let config = args.overrides.model(ConfigJson::open(config)?)?;
        let defaults = match &folder {
            Some(folder) => GenerationDefaults::open(folder, config.vocab_size)?,
            None => GenerationDefaults::default(),
        };
        Ok(Self {
            name: model.to_owned(),
            checkpoint: Arc::new(Checkpoint::dummy(&config, DUMMY_SEED)),
            defaults,
            config,
            is_dummy: true,
            folder: folder.filter(|folder| folder.join("tokenizer.json").exists()),
        })
    }

    /// The tokenizer: `path` (a folder or a tokenizer.json) or the model's own.
    pub(crate) fn tokenizer(&self, path: Option<&Path>) -> Result<Tokenizer> {
        let folder = match (path, &self.folder) {
            (Some(path), _) if path.is_file() => {
                let json = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
                let config = path.with_file_name("tokenizer_config.json");
                // It may be absent, but not unreadable: it says which tokens begin and end a text.
                let config = if config.exists() {
                    Some(fs::read(&config).with_context(|| format!("cannot read {}", config.display()))?)
                } else {
                    None
                };
                return Ok(Tokenizer::from_bytes(&json, config.as_deref())?);
            }
            (Some(path), _) => path,
            (None, Some(folder)) => folder,
            (None, None) if self.is_dummy => return stand_in(self.config.vocab_size),
            (None, None) => return Ok(Tokenizer::from_bytes(TINY_TOKENIZER, Some(TINY_TOKENIZER_CONFIG))?),
        };
        Ok(Tokenizer::from_dir(folder)?)
    }

    /// How prompts and replies are written, by the table of models or else by the chat template.
    pub(crate) fn family(&self, template: &str) -> Family {
        let registry = Registry::builtin();
        let family = registry.family(registry.find(&self.name), template);
        let budgets = &family.thinking_budgets;
        let budget = |effort| budgets.of(effort).map(|tokens| u32::try_from(tokens).unwrap_or(u32::MAX));
        Family {
            tool_syntax: family.tool_syntax.map(|syntax| match syntax {
                ToolSyntaxKind::Fenced => ToolSyntax::Fenced,
                ToolSyntaxKind::Plain => ToolSyntax::Plain,
            }),
            thinking_budgets: ThinkingBudgets {
                minimal: budget(ReasoningEffort::Minimal),
                low: budget(ReasoningEffort::Low),
                medium: budget(ReasoningEffort::Medium),
                high: budget(ReasoningEffort::High),
            },
        }
    }

    /// The chat template's text: the file `path`, the model's chat_template.jinja, or the one in its tokenizer_config.json.
    pub(crate) fn template(&self, path: Option<&Path>, tokenizer: &Tokenizer) -> Result<Option<String>> {
        let read =
            |path: &Path| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
        let own = self.folder.as_ref().map(|folder| folder.join("chat_template.jinja"));
        let inline = path.filter(|path| !path.is_file() && path.to_string_lossy().contains(['{', '\n']));
        if inline.is_some() {
            bail!("--chat-template takes a file, and this is a template; write it into one");
        }
        Ok(match (path, own) {
            (Some(path), _) => Some(read(path).context("--chat-template")?),
            (None, Some(own)) if own.is_file() => Some(read(&own)?),
            (None, Some(_)) => tokenizer.chat_template().map(str::to_owned),
            (None, None) => {
                let bundled = || include_str!("../model/chat_template.jinja").to_owned();
                // One that --tokenizer named for a dummy may bring its own.
                Some(tokenizer.chat_template().map_or_else(bundled, str::to_owned))
            }
        })
    }
}

/// tiny-r1's tokenizer with a made-up word for each further id: whatever random weights draw is a piece of text, so that it is
/// streamed as other models' tokens are. Text is never read as those words.
fn stand_in(vocab_size: usize) -> Result<Tokenizer> {
    let mut json: Value = serde_json::from_slice(TINY_TOKENIZER).context("the bundled tokenizer")?;
    let vocab = json["model"]["vocab"].as_object_mut().context("the bundled tokenizer has a vocabulary")?;
    let own = Tokenizer::from_bytes(TINY_TOKENIZER, Some(TINY_TOKENIZER_CONFIG))?.vocab_size();
    if vocab_size < own {
        bail!(
            "vocab_size is {vocab_size}, and the tokenizer that stands in for the model's has {own} tokens; give one with \
             --tokenizer PATH"
        );
    }
    // In the byte-level alphabet, a space before the word.
    vocab.extend((own..vocab_size).map(|id| (format!("\u{120}w{id}"), id.into())));
    Ok(Tokenizer::from_bytes(&serde_json::to_vec(&json)?, Some(TINY_TOKENIZER_CONFIG))?)
}
