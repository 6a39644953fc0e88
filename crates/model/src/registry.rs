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

/// How tools are written into the system prompt where the chat template ignores them.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub enum ToolsBlockKind {
    /// As R1 and V3 were trained to read them.
    #[serde(rename = "deepseek-v3")]
    DeepSeekV3,
    /// As V3.1 was.
    #[serde(rename = "deepseek-v3.1")]
    DeepSeekV31,
}

/// How a reply writes a call.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum ToolSyntaxKind {
    /// The arguments in a Markdown fence: R1, V3.
    Fenced,
    /// The arguments as they are: V3.1.
    Plain,
}

/// OpenAI's `reasoning_effort`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum ReasoningEffort {
    /// No thinking.
    None,
    /// The least.
    Minimal,
    /// Little.
    Low,
    /// OpenAI's default.
    Medium,
    /// The most.
    High,
}

/// Tokens that a model may think for.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct ThinkingBudgets {
    minimal: Option<usize>,
    low: Option<usize>,
    medium: Option<usize>,
    high: Option<usize>,
}

impl ThinkingBudgets {
    /// The budget in tokens: `None` sets no limit, 0 closes the thinking at once.
    pub fn of(&self, effort: ReasoningEffort) -> Option<usize> {
        match effort {
            ReasoningEffort::None => Some(0),
            ReasoningEffort::Minimal => self.minimal,
            ReasoningEffort::Low => self.low,
            ReasoningEffort::Medium => self.medium,
            ReasoningEffort::High => self.high,
        }
    }
}

/// How the prompts and replies of some models are written.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Family {
    /// Its name in the table.
    pub name: String,
    /// What a chat template of the family holds.
    pub template_marks: Vec<String>,
    /// How tools are written where the template ignores them; `None` where nothing is known to work.
    #[serde(default)]
    pub tools_block: Option<ToolsBlockKind>,
    /// How calls are written; `None` where there are none.
    #[serde(default)]
    pub tool_syntax: Option<ToolSyntaxKind>,
    /// Tokens of reasoning.
    #[serde(default)]
    pub thinking_budgets: ThinkingBudgets,
}

/// One known model.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct KnownModel {
    /// Hub id, `organisation/name`.
    pub id: String,
    /// `model_type` of its config.json.
    pub architecture: String,
    /// The [`Family`] that its prompts and replies are written like.
    #[serde(default)]
    pub family: Option<String>,
    /// Whether it is served.
    pub status: ModelStatus,
    /// Why it is not served.
    #[serde(default)]
    pub why: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    family: Vec<Family>,
    model: Vec<KnownModel>,
}

/// The models of `models.toml`.
pub struct Registry {
    families: Vec<Family>,
    models: Vec<KnownModel>,
}

impl Registry {
    /// The table that was built in.
    ///
    /// # Panics
    /// When `models.toml` is malformed, which a test rules out.
    pub fn builtin() -> Self {
        let file: File = toml::from_str(include_str!("../../../models.toml")).expect("models.toml is tested");
        Self { families: file.family, models: file.model }
    }

    /// Every known model, in the file's order.
    pub fn models(&self) -> &[KnownModel] {
        &self.models
    }

    /// The model of that hub id; the case of letters does not matter, as on the hub.
    pub fn find(&self, id: &str) -> Option<&KnownModel> {
        self.models.iter().find(|model| model.id.eq_ignore_ascii_case(id))
    }

    /// Every family, in the file's order.
    pub fn families(&self) -> &[Family] {
        &self.families
    }

    /// The family of a checkpoint with this chat template: the known model's, else by what stands in the template.
    ///
    /// # Panics
    /// When `models.toml` names a family that it lacks, or has none for other templates, which a test rules out.
    pub fn family(&self, model: Option<&KnownModel>, template: &str) -> &Family {
        let named = model.and_then(|model| model.family.as_deref());
        let is_it = |family: &&Family| match named {
            Some(name) => family.name == name,
            None => family.template_marks.iter().all(|mark| template.contains(mark)),
        };
        self.families.iter().find(is_it).expect("models.toml is tested")
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

    #[test]
    fn every_model_and_every_template_has_a_family() {
        let registry = Registry::builtin();
        for model in registry.models() {
            let family = registry.family(Some(model), "");
            assert!(model.family.as_ref().is_none_or(|name| *name == family.name), "{}", model.id);
            assert!(model.family.is_some() || model.status == ModelStatus::Planned, "{}", model.id);
        }
        for family in registry.families() {
            assert_eq!(registry.family(None, &family.template_marks.concat()).name, family.name);
            assert_eq!(family.tools_block.is_some(), family.tool_syntax.is_some(), "{}", family.name);
        }
        let of = |id: &str| registry.family(registry.find(id), "");
        assert_eq!(of("deepseek-ai/DeepSeek-R1").tool_syntax, Some(ToolSyntaxKind::Fenced));
        assert_eq!(of("deepseek-ai/DeepSeek-V3").tools_block, Some(ToolsBlockKind::DeepSeekV3));
        assert_eq!(of("deepseek-ai/DeepSeek-V3.1").tool_syntax, Some(ToolSyntaxKind::Plain));
        assert_eq!(of("deepseek-ai/DeepSeek-V2-Chat").tool_syntax, None);
    }

    #[test]
    fn budgets_grow_with_the_effort() {
        use ReasoningEffort::{High, Low, Medium, Minimal, None as NoEffort};
        for family in Registry::builtin().families() {
            let of = |effort| family.thinking_budgets.of(effort);
            assert_eq!((of(NoEffort), of(High)), (Some(0), None), "{}", family.name);
            let [minimal, low, medium] = [Minimal, Low, Medium].map(|effort| of(effort).unwrap());
            assert!(0 < minimal && minimal < low && low < medium, "{}", family.name);
        }
    }
}
