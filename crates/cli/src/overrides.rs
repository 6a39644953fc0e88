//! Flags that replace values of a model's config.json. Must not know what a field means.

use anyhow::{Context, Result};
use clap::Args;
use r1_weights::{ConfigJson, ModelConfig};

use crate::text::{JsonObject, json_object};

#[derive(Debug, Args)]
pub(crate) struct OverrideArgs {
    /// Values in place of config.json's, as '{"num_hidden_layers": 4}'; an object goes into the object of its name, and null
    /// takes a field away.
    #[arg(long, alias = "hf-overrides", value_name = "JSON", value_parser = json_object)]
    json_model_override_args: Option<JsonObject>,
}

impl OverrideArgs {
    /// Puts the values into `json`.
    pub(crate) fn apply(&self, json: &mut ConfigJson) {
        if let Some(overrides) = &self.json_model_override_args {
            json.override_with(overrides);
        }
    }

    /// What `json` means with them.
    pub(crate) fn model(&self, mut json: ConfigJson) -> Result<ModelConfig> {
        self.apply(&mut json);
        self.named(json.model().map_err(Into::into))
    }

    /// Names the flag in what may be its fault.
    pub(crate) fn named<T>(&self, result: Result<T>) -> Result<T> {
        match &self.json_model_override_args {
            Some(_) => result.context("with --json-model-override-args"),
            None => result,
        }
    }
}
