//! Flags of the text side: tokenizer, template, parsers, and how requests are sampled that do not say it.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use r1_server::SamplingDefaults;
use r1_text::ToolSyntax;
use r1_weights::GenerationDefaults;
use serde_json::{Map, Value};

#[derive(Debug, Args)]
#[command(next_help_heading = "Text")]
pub(crate) struct TextArgs {
    /// A folder with tokenizer.json, or the file itself [default: the model's].
    #[arg(long, alias = "tokenizer-path", value_name = "PATH")]
    pub(crate) tokenizer: Option<PathBuf>,

    /// A Jinja chat template to use instead of the model's.
    #[arg(long, value_name = "FILE")]
    pub(crate) chat_template: Option<PathBuf>,

    /// Variables of the chat template where a request's chat_template_kwargs are silent.
    #[arg(long, value_name = "JSON", value_parser = json_object)]
    default_chat_template_kwargs: Option<JsonObject>,

    /// How reasoning is told from the answer; none leaves <think> inline.
    #[arg(long, value_enum, default_value_t = ReasoningParser::DeepseekR1)]
    pub(crate) reasoning_parser: ReasoningParser,

    /// How calls of tools are told from the answer: as the model writes them (auto), or as DeepSeek V3 and R1 or V3.1 do; none
    /// leaves them in the text.
    #[arg(long, value_enum, default_value_t = ToolCallParser::Auto)]
    tool_call_parser: ToolCallParser,

    /// Whose advice on sampling silent requests follow: the model's (auto), nobody's (vllm), or that of a folder with a
    /// generation_config.json.
    #[arg(long, value_name = "auto|vllm|PATH", default_value = "auto")]
    generation_config: String,

    /// Sampling of silent requests, over that advice: temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens.
    #[arg(long, value_name = "JSON", value_parser = json_object)]
    override_generation_config: Option<JsonObject>,
}

pub(crate) type JsonObject = Map<String, Value>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReasoningParser {
    #[value(name = "deepseek-r1", alias = "deepseek_r1", alias = "deepseek-v3", alias = "deepseek_v3")]
    DeepseekR1,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ToolCallParser {
    Auto,
    #[value(name = "deepseek-v3", alias = "deepseekv3", alias = "deepseek_v3")]
    DeepseekV3,
    #[value(
        name = "deepseek-v3.1",
        alias = "deepseekv31",
        alias = "deepseek_v31",
        alias = "deepseek-v31",
        alias = "deepseek_v3.1"
    )]
    DeepseekV31,
    None,
}

impl TextArgs {
    /// How the model writes calls of tools; `own` is what its template or the table of models says.
    pub(crate) fn tool_syntax(&self, own: Option<ToolSyntax>) -> Option<ToolSyntax> {
        match self.tool_call_parser {
            ToolCallParser::Auto => own,
            ToolCallParser::DeepseekV3 => Some(ToolSyntax::Fenced),
            ToolCallParser::DeepseekV31 => Some(ToolSyntax::Plain),
            ToolCallParser::None => None,
        }
    }

    /// The template's variables where requests are silent. Templates call the switch for reasoning `thinking` or
    /// `enable_thinking`, and one stands for both, as in requests.
    pub(crate) fn template_kwargs(&self) -> Result<JsonObject> {
        const NAMES: [&str; 2] = ["thinking", "enable_thinking"];
        let mut kwargs = self.default_chat_template_kwargs.clone().unwrap_or_default();
        if let Some(on) = NAMES.iter().find_map(|name| kwargs.get(*name)).cloned() {
            for name in NAMES {
                let other = kwargs.insert(name.into(), on.clone());
                if !on.is_boolean() || other.is_some_and(|other| other != on) {
                    bail!(
                        "--default-chat-template-kwargs: {name} must be true or false, and agree with its other name"
                    );
                }
            }
        }
        Ok(kwargs)
    }

    /// Advice on sampling for a model that comes with `models`, and a bound on replies.
    pub(crate) fn generation(&self, models: &GenerationDefaults, vocab_size: usize) -> Result<Generation> {
        let advice = match self.generation_config.as_str() {
            "auto" => models.clone(),
            // What ends a reply is no matter of sampling.
            "vllm" | "none" => GenerationDefaults {
                eos_token_ids: models.eos_token_ids.clone(),
                ..GenerationDefaults::default()
            },
            path => {
                let path = PathBuf::from(path);
                let file = if path.is_dir() { path.join("generation_config.json") } else { path };
                let text = fs::read(&file)
                    .with_context(|| format!("--generation-config: cannot read {}", file.display()))?;
                GenerationDefaults::from_json(&text, vocab_size)
                    .with_context(|| format!("--generation-config {}", file.display()))?
            }
        };
        let over = self.override_generation_config.clone().unwrap_or_default();
        Generation::new(advice, over, vocab_size).context("--override-generation-config")
    }
}

/// Where replies end and how they are drawn, for requests that do not say it.
pub(crate) struct Generation {
    pub(crate) advice: GenerationDefaults,
    max_tokens: Option<u32>,
}

impl Generation {
    fn new(advice: GenerationDefaults, mut over: JsonObject, vocab_size: usize) -> Result<Self> {
        const KNOWN: [&str; 6] =
            ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "do_sample"];
        let max_tokens = match over.remove("max_new_tokens") {
            None | Some(Value::Null) => None,
            Some(value) => {
                let tokens = value.as_u64().and_then(|tokens| u32::try_from(tokens).ok()).filter(|&n| n > 0);
                Some(tokens.with_context(|| format!("max_new_tokens is {value}; it must be at least 1"))?)
            }
        };
        if let Some(unknown) = over.keys().find(|key| !KNOWN.contains(&key.as_str())) {
            bail!("{unknown} is not known; {} and max_new_tokens are", KNOWN.join(", "));
        }
        let over = GenerationDefaults::from_json(Value::Object(over).to_string().as_bytes(), vocab_size)?;
        let temperature = over.temperature.or(advice.temperature);
        let advice = GenerationDefaults {
            top_p: over.top_p.or(advice.top_p),
            top_k: over.top_k.or(advice.top_k),
            min_p: over.min_p.or(advice.min_p),
            repetition_penalty: over.repetition_penalty.or(advice.repetition_penalty),
            eos_token_ids: advice.eos_token_ids,
            // A temperature that was asked for is meant.
            do_sample: over.do_sample.or(advice.do_sample.filter(|_| over.temperature.is_none())),
            temperature,
        };
        Ok(Self { advice, max_tokens })
    }

    /// As the server applies it.
    pub(crate) fn sampling(&self) -> SamplingDefaults {
        let advice = &self.advice;
        SamplingDefaults {
            // `do_sample: false` asks for greedy decoding whatever temperature stands beside it.
            temperature: if advice.do_sample == Some(false) { Some(0.0) } else { advice.temperature },
            top_p: advice.top_p,
            top_k: advice.top_k,
            min_p: advice.min_p,
            repetition_penalty: advice.repetition_penalty,
            max_tokens: self.max_tokens,
        }
    }
}

pub(crate) fn json_object(text: &str) -> Result<JsonObject, String> {
    serde_json::from_str(text).map_err(|error| format!("a JSON object: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command_line::read;

    fn generation(arguments: &[&str]) -> Result<SamplingDefaults> {
        let model =
            GenerationDefaults::from_json(br#"{"temperature": 0.6, "top_p": 0.95, "do_sample": true}"#, 9)?;
        let cli = read(["r1-serve"].iter().chain(arguments))?;
        Ok(cli.serve.text.generation(&model, 9)?.sampling())
    }

    #[test]
    fn tool_calls_are_parsed_in_everybodys_words() {
        for (said, syntax) in [
            ("deepseek-v3", Some(ToolSyntax::Fenced)),
            ("deepseekv3", Some(ToolSyntax::Fenced)),
            ("deepseek_v3", Some(ToolSyntax::Fenced)),
            ("deepseek-v3.1", Some(ToolSyntax::Plain)),
            ("deepseekv31", Some(ToolSyntax::Plain)),
            ("deepseek_v31", Some(ToolSyntax::Plain)),
            ("none", None),
        ] {
            let cli = read(["r1-serve", "--tool-call-parser", said]).unwrap();
            for own in [None, Some(ToolSyntax::Fenced), Some(ToolSyntax::Plain)] {
                assert_eq!(cli.serve.text.tool_syntax(own), syntax, "{said}");
            }
        }
        for own in [None, Some(ToolSyntax::Plain)] {
            assert_eq!(read(["r1-serve"]).unwrap().serve.text.tool_syntax(own), own);
        }
        let error = read(["r1-serve", "--tool-call-parser", "hermes"]).unwrap_err().to_string();
        assert!(error.contains("deepseek-v3.1"), "{error}");
        for said in ["deepseek-r1", "deepseek_r1", "deepseek-v3", "deepseek_v3"] {
            let cli = read(["r1-serve", "--reasoning-parser", said]).unwrap();
            assert_eq!(cli.serve.text.reasoning_parser, ReasoningParser::DeepseekR1, "{said}");
        }
    }

    #[test]
    fn one_name_of_the_switch_for_reasoning_stands_for_both() {
        let kwargs = |json: &str| {
            read(["r1-serve", "--default-chat-template-kwargs", json])?.serve.text.template_kwargs()
        };
        for json in [r#"{"thinking": false, "a": 1}"#, r#"{"enable_thinking": false, "a": 1}"#] {
            let expected = serde_json::json!({"thinking": false, "enable_thinking": false, "a": 1});
            assert_eq!(Value::Object(kwargs(json).unwrap()), expected);
        }
        for json in [r#"{"thinking": false, "enable_thinking": true}"#, r#"{"thinking": 1}"#, "[]", "{"] {
            let error = kwargs(json).unwrap_err().to_string();
            assert!(error.contains("--default-chat-template-kwargs"), "{error}");
        }
    }

    #[test]
    fn sampling_of_silent_requests() {
        let model =
            SamplingDefaults { temperature: Some(0.6), top_p: Some(0.95), ..SamplingDefaults::default() };
        assert_eq!(generation(&[]).unwrap(), model);
        assert_eq!(generation(&["--generation-config", "vllm"]).unwrap(), SamplingDefaults::default());
        let over = r#"{"temperature": 0.1, "max_new_tokens": 40}"#;
        let expected = SamplingDefaults { temperature: Some(0.1), max_tokens: Some(40), ..model.clone() };
        assert_eq!(generation(&["--override-generation-config", over]).unwrap(), expected);
        let greedy = SamplingDefaults { temperature: Some(0.0), ..model };
        assert_eq!(generation(&["--override-generation-config", r#"{"do_sample": false}"#]).unwrap(), greedy);
        for (bad, needle) in [
            (r#"{"temperatur": 1}"#, "temperatur is not known"),
            (r#"{"top_p": 0}"#, "top_p"),
            (r#"{"max_new_tokens": 0}"#, "at least 1"),
        ] {
            let error = format!("{:#}", generation(&["--override-generation-config", bad]).unwrap_err());
            assert!(error.contains(needle) && error.contains("--override-generation-config"), "{error}");
        }
        assert!(generation(&["--override-generation-config", "[1]"]).is_err());
        let error = format!("{:#}", generation(&["--generation-config", "/nowhere"]).unwrap_err());
        assert!(error.contains("/nowhere"), "{error}");
    }

    #[test]
    fn a_folders_advice_replaces_the_models() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("generation_config.json"), r#"{"top_k": 20}"#).unwrap();
        let path = folder.path().to_str().unwrap();
        let expected = SamplingDefaults { top_k: Some(20), ..SamplingDefaults::default() };
        assert_eq!(generation(&["--generation-config", path]).unwrap(), expected);
    }
}
