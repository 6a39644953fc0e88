//! config.json as it stands in its file, and values that replace some of it. Knows no field's meaning.

use std::path::Path;

use serde_json::{Map, Value};

use super::{ConfigError, ModelConfig, json_object, parse, read_small};

/// The fields of a config.json, in the file's order.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfigJson(Map<String, Value>);

impl ConfigJson {
    /// Reads the file `path`.
    pub fn open(path: &Path) -> Result<Self, ConfigError> {
        Self::parse(&read_small(path)?)
    }

    /// Reads the text of a config.json.
    pub fn parse(text: &[u8]) -> Result<Self, ConfigError> {
        Ok(Self(json_object("config.json", text)?))
    }

    /// Puts `overrides` in place of the fields of their names; where both are objects, into the object. A null makes a field
    /// null, which means that it is absent.
    pub fn override_with(&mut self, overrides: &Map<String, Value>) {
        merge(&mut self.0, overrides);
    }

    /// The fields.
    pub const fn fields(&self) -> &Map<String, Value> {
        &self.0
    }

    /// The fields, to be changed.
    pub const fn fields_mut(&mut self) -> &mut Map<String, Value> {
        &mut self.0
    }

    /// What they mean.
    pub fn model(&self) -> Result<ModelConfig, ConfigError> {
        parse::model_config(&self.0)
    }
}

fn merge(fields: &mut Map<String, Value>, overrides: &Map<String, Value>) {
    for (name, value) in overrides {
        match (fields.get_mut(name), value) {
            (Some(Value::Object(inner)), Value::Object(value)) => merge(inner, value),
            _ => {
                fields.insert(name.clone(), value.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn overridden(text: &str, overrides: &Value) -> Value {
        let mut json = ConfigJson::parse(text.as_bytes()).unwrap();
        json.override_with(overrides.as_object().unwrap());
        Value::Object(json.fields().clone())
    }

    #[test]
    fn objects_are_merged_and_all_else_replaced() {
        let text = r#"{"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": [4, 5]}"#;
        let overrides = json!({"a": "x", "b": {"d": {"e": 6, "g": 7}}, "f": [8], "h": {"i": 9}});
        let expected = json!({"a": "x", "b": {"c": 2, "d": {"e": 6, "g": 7}}, "f": [8], "h": {"i": 9}});
        assert_eq!(overridden(text, &overrides), expected);
        assert_eq!(overridden(text, &json!({"b": null}))["b"], Value::Null);
        assert_eq!(overridden(text, &json!({"a": {"b": 1}}))["a"], json!({"b": 1}));
        assert_eq!(overridden(text, &json!({})), serde_json::from_str::<Value>(text).unwrap());
    }
}
