//! Reads one JSON object field by field and remembers which fields were asked for, so that the rest can be named.
//! Knows no field's meaning.

use std::collections::HashSet;
use std::fmt::Display;

use serde_json::{Map, Value};

use super::ConfigError;

/// One JSON object under reading. `null` reads as absent.
pub(crate) struct Fields<'a> {
    file: &'static str,
    prefix: &'static str,
    map: &'a Map<String, Value>,
    asked: HashSet<&'static str>,
}

impl<'a> Fields<'a> {
    /// `prefix` is what errors put before a field's name: empty, or `rope_scaling.`.
    pub(crate) fn new(file: &'static str, prefix: &'static str, map: &'a Map<String, Value>) -> Self {
        Self { file, prefix, map, asked: HashSet::new() }
    }

    /// The field's name as errors show it.
    pub(crate) fn name(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    /// The value, `None` when absent or null.
    pub(crate) fn get(&mut self, field: &'static str) -> Option<&'a Value> {
        self.asked.insert(field);
        self.map.get(field).filter(|v| !v.is_null())
    }

    /// Whether the file has the field at all, be it null.
    pub(crate) fn states(&self, field: &str) -> bool {
        self.map.contains_key(field)
    }

    pub(crate) fn missing(&self, field: &str) -> ConfigError {
        ConfigError::Missing { file: self.file, field: self.name(field) }
    }

    pub(crate) fn unsupported(&self, field: &str, value: &Value, supported: &str) -> ConfigError {
        ConfigError::Unsupported {
            file: self.file,
            field: self.name(field),
            value: show(value),
            supported: supported.to_owned(),
        }
    }

    pub(crate) fn invalid(&self, field: &str, value: impl Display, reason: impl Into<String>) -> ConfigError {
        ConfigError::Invalid {
            file: self.file,
            field: self.name(field),
            value: value.to_string(),
            reason: reason.into(),
        }
    }

    fn typed<T>(
        &mut self,
        field: &'static str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        read(value)
            .map(Some)
            .ok_or_else(|| self.invalid(field, show(value), format!("it must be {expected}")))
    }

    pub(crate) fn bool(&mut self, field: &'static str) -> Result<Option<bool>, ConfigError> {
        self.typed(field, "true or false", Value::as_bool)
    }

    pub(crate) fn str(&mut self, field: &'static str) -> Result<Option<&'a str>, ConfigError> {
        self.typed(field, "a string", Value::as_str)
    }

    pub(crate) fn object(
        &mut self,
        field: &'static str,
    ) -> Result<Option<&'a Map<String, Value>>, ConfigError> {
        self.typed(field, "an object", Value::as_object)
    }

    /// A whole number in `min..=max`. The bounds are sanity limits, so that no product of sizes overflows.
    pub(crate) fn size(
        &mut self,
        field: &'static str,
        min: u64,
        max: u64,
    ) -> Result<Option<usize>, ConfigError> {
        let Some(n) = self.typed(field, "a whole number", Value::as_u64)? else { return Ok(None) };
        if n < min || n > max {
            return Err(self.invalid(field, n, format!("it must lie between {min} and {max}")));
        }
        Ok(Some(n as usize))
    }

    pub(crate) fn need_size(
        &mut self,
        field: &'static str,
        min: u64,
        max: u64,
    ) -> Result<usize, ConfigError> {
        self.size(field, min, max)?.ok_or_else(|| self.missing(field))
    }

    /// A finite number that `ok` accepts; `range` says which those are.
    pub(crate) fn number(
        &mut self,
        field: &'static str,
        range: &str,
        ok: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, ConfigError> {
        let Some(x) = self.typed(field, "a number", Value::as_f64)? else { return Ok(None) };
        if !x.is_finite() || !ok(x) {
            return Err(self.invalid(field, x, format!("it must be {range}")));
        }
        Ok(Some(x))
    }

    pub(crate) fn need_number(
        &mut self,
        field: &'static str,
        range: &str,
        ok: impl Fn(f64) -> bool,
    ) -> Result<f64, ConfigError> {
        self.number(field, range, ok)?.ok_or_else(|| self.missing(field))
    }

    /// One token id or a list of them, each below `vocab_size`; absent is the empty list.
    pub(crate) fn token_ids(
        &mut self,
        field: &'static str,
        vocab_size: usize,
    ) -> Result<Vec<u32>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let one = std::slice::from_ref(value);
        let list = value.as_array().map_or(one, Vec::as_slice);
        list.iter()
            .map(|id| {
                id.as_u64().filter(|&id| id < vocab_size as u64).map(|id| id as u32).ok_or_else(|| {
                    self.invalid(field, show(id), format!("token ids lie below vocab_size {vocab_size}"))
                })
            })
            .collect()
    }

    /// Refuses any value of `field` but `only`; absent is accepted.
    pub(crate) fn only(
        &mut self,
        field: &'static str,
        only: &Value,
        supported: &str,
    ) -> Result<(), ConfigError> {
        match self.get(field) {
            Some(value) if value != only => Err(self.unsupported(field, value, supported)),
            _ => Ok(()),
        }
    }

    /// Fields that nothing asked for and `harmless` does not list, in the file's order.
    pub(crate) fn unknown(&self, harmless: &[&str]) -> Vec<String> {
        self.map
            .keys()
            .filter(|k| !self.asked.contains(k.as_str()) && !harmless.contains(&k.as_str()))
            .map(|k| self.name(k))
            .collect()
    }
}

/// A value for a message: strings bare, long values cut.
pub(crate) fn show(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    match text.char_indices().nth(80) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    }
}
