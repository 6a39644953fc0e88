//! Formats: JSON, schemas, regexes, choices.

use r1_text::Format;
use serde_json::{Value, json};

use crate::walk::World;

/// Python's `json.dumps`: a space behind `,` and `:`.
fn dumps(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("[{}]", items.iter().map(dumps).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            let items: Vec<String> = map.iter().map(|(k, v)| format!("{}: {}", Value::from(k.as_str()), dumps(v))).collect();
            format!("{{{}}}", items.join(", "))
        }
        other => other.to_string(),
    }
}

#[test]
fn json_objects_in_every_spelling() {
    for world in World::both() {
        let constraint = world.of_format(Format::JsonObject);
        let value = json!({"a": 1, "b": [true, null, -1.5e3, "x\"y\u{1F600}\n"], "c": {"d": {}, "e": []}, "": "</think>"});
        for text in [value.to_string(), dumps(&value), serde_json::to_string_pretty(&value).unwrap()] {
            assert!(world.accepts(&constraint, &text), "{text}");
        }
        for text in ["[]", "1", "{\"a\"", "{a:1}", "{} {}", "x", "", "{\"a\":1,}"] {
            assert!(!world.accepts(&constraint, text), "{text}");
        }
    }
}

#[test]
fn random_walks_give_json() {
    for world in World::both() {
        let mut ended = 0;
        for seed in 0..30 {
            let mut constraint = world.of_format(Format::JsonObject);
            if let Some(reply) = world.random(&mut constraint, seed, 300) {
                let text = world.text(&reply);
                assert!(serde_json::from_str::<Value>(&text).is_ok_and(|v| v.is_object()), "{text}");
                ended += 1;
            }
        }
        assert!(ended > 10, "{ended}");
    }
}

#[test]
fn regex() {
    for world in World::both() {
        let constraint = world.of_format(Format::Regex(r"^\d{3}-[a-c]+$".into()));
        assert!(world.accepts(&constraint, "123-abccba"));
        for text in ["123-", "12-a", "123-abd", " 123-a", "123-a\n"] {
            assert!(!world.accepts(&constraint, text), "{text}");
        }
    }
}
