//! generation_config.json: what a model's makers advise for requests that are silent. Knows no request.

use std::path::Path;

use r1_core::TokenId;

use crate::config::{ConfigError, Fields, json_object, read_small};

/// Advice on sampling; `None` where the file is silent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Sampling temperature, 0 to 2.
    pub temperature: Option<f32>,
    /// Nucleus, above 0 and at most 1.
    pub top_p: Option<f32>,
    /// Most tokens kept; the file's 0 means all and reads as `None`.
    pub top_k: Option<u32>,
    /// Least probability kept, relative to the most likely token's.
    pub min_p: Option<f32>,
    /// Divides the logits of seen tokens; above 0 and at most 2.
    pub repetition_penalty: Option<f32>,
    /// Tokens that end a sequence; empty when the file names none.
    pub eos_token_ids: Vec<TokenId>,
    /// `Some(false)` asks for greedy decoding.
    pub do_sample: Option<bool>,
}

impl GenerationDefaults {
    /// Reads `generation_config.json` in `dir`; a model without one has no advice.
    pub fn open(dir: &Path, vocab_size: usize) -> Result<Self, ConfigError> {
        match read_small(&dir.join("generation_config.json")) {
            Err(ConfigError::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            text => Self::from_json(&text?, vocab_size),
        }
    }

    /// Reads the text of a generation_config.json; token ids must lie below `vocab_size`.
    pub fn from_json(text: &[u8], vocab_size: usize) -> Result<Self, ConfigError> {
        const FILE: &str = "generation_config.json";
        let map = json_object(FILE, text)?;
        let mut f = Fields::new(FILE, "", &map);
        let mut number = |field, range, ok: fn(f64) -> bool| -> Result<Option<f32>, ConfigError> {
            Ok(f.number(field, range, ok)?.map(|x| x as f32))
        };
        Ok(Self {
            temperature: number("temperature", "between 0 and 2", |x| (0.0..=2.0).contains(&x))?,
            top_p: number("top_p", "above 0 and at most 1", |x| x > 0.0 && x <= 1.0)?,
            min_p: number("min_p", "between 0 and 1", |x| (0.0..=1.0).contains(&x))?,
            repetition_penalty: number("repetition_penalty", "above 0 and at most 2", |x| {
                x > 0.0 && x <= 2.0
            })?,
            top_k: f.size("top_k", 0, u64::from(u32::MAX))?.map(|k| k as u32).filter(|&k| k > 0),
            eos_token_ids: f.token_ids("eos_token_id", vocab_size)?.into_iter().map(TokenId).collect(),
            do_sample: f.bool("do_sample")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<GenerationDefaults, ConfigError> {
        GenerationDefaults::from_json(text.as_bytes(), 512)
    }

    #[test]
    fn published_defaults() {
        let text = r#"{"_from_model_config": true, "bos_token_id": 0, "eos_token_id": 1, "do_sample": true,
                       "temperature": 0.6, "top_p": 0.95, "transformers_version": "4.39.3"}"#;
        let expected = GenerationDefaults {
            temperature: Some(0.6),
            top_p: Some(0.95),
            eos_token_ids: vec![TokenId(1)],
            do_sample: Some(true),
            ..GenerationDefaults::default()
        };
        assert_eq!(read(text).unwrap(), expected);
    }

    #[test]
    fn lists_nulls_and_disabled_top_k() {
        let read =
            read(r#"{"eos_token_id": [1, 7], "top_k": 0, "min_p": 0.05, "temperature": null}"#).unwrap();
        assert_eq!(read.eos_token_ids, [TokenId(1), TokenId(7)]);
        assert_eq!((read.top_k, read.min_p, read.temperature), (None, Some(0.05), None));
        assert_eq!(super::GenerationDefaults::from_json(b"{}", 1).unwrap(), GenerationDefaults::default());
    }

    #[test]
    fn bad_values_are_named() {
        for (text, field) in [
            (r#"{"temperature": -1}"#, "temperature"),
            (r#"{"temperature": "hot"}"#, "temperature"),
            (r#"{"top_p": 0}"#, "top_p"),
            (r#"{"top_k": -1}"#, "top_k"),
            (r#"{"min_p": 2}"#, "min_p"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty"),
            (r#"{"eos_token_id": 512}"#, "eos_token_id"),
            (r#"{"eos_token_id": [1, -1]}"#, "eos_token_id"),
            (r#"{"do_sample": 1}"#, "do_sample"),
        ] {
            let message = read(text).unwrap_err().to_string();
            assert!(message.starts_with(&format!("generation_config.json: {field} ")), "{text}: {message}");
        }
        assert!(matches!(read("[]"), Err(ConfigError::Json { .. })));
    }

    #[test]
    fn a_model_without_the_file_has_no_advice() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(GenerationDefaults::open(dir.path(), 512).unwrap(), GenerationDefaults::default());
        std::fs::write(dir.path().join("generation_config.json"), r#"{"top_k": 20}"#).unwrap();
        assert_eq!(GenerationDefaults::open(dir.path(), 512).unwrap().top_k, Some(20));
    }
}
