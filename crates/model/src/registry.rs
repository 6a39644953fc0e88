//! `models.toml`: what is known of a hub id before anything of it is read.

use serde::Deserialize;

/// Whether this build runs a model.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum ModelStatus {
    /// Its architecture is built.
    Served,
    /// It is refused by name.
    Planned,
}

/// One known model.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct KnownModel {
    /// Hub id, `organisation/name`.
    pub id: String,
    /// `model_type` of its config.json.
    pub architecture: String,
    /// Whether it is served.
    pub status: ModelStatus,
    /// Why it is not served.
    #[serde(default)]
    pub why: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    model: Vec<KnownModel>,
}

/// The models of `models.toml`.
pub struct Registry {
    models: Vec<KnownModel>,
}

impl Registry {
    /// The table that was built in.
    ///
    /// # Panics
    /// When `models.toml` is malformed, which a test rules out.
    pub fn builtin() -> Self {
        let file: File = toml::from_str(include_str!("../../../models.toml")).expect("models.toml is tested");
        Self { models: file.model }
    }

    /// Every known model, in the file's order.
    pub fn models(&self) -> &[KnownModel] {
        &self.models
    }

    /// The model of that hub id; the case of letters does not matter, as on the hub.
    pub fn find(&self, id: &str) -> Option<&KnownModel> {
        self.models.iter().find(|model| model.id.eq_ignore_ascii_case(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_is_whole() {
        let registry = Registry::builtin();
        for model in registry.models() {
            assert_eq!(model.why.is_some(), model.status == ModelStatus::Planned, "{}", model.id);
            assert_eq!(registry.find(&model.id.to_uppercase()), Some(model), "ids are unique");
            let built = ["deepseek_v2", "deepseek_v3"].contains(&model.architecture.as_str());
            assert!(built || model.status == ModelStatus::Planned, "{}", model.id);
        }
        assert_eq!(registry.find("deepseek-ai/DeepSeek-R1").unwrap().status, ModelStatus::Served);
    }
}
