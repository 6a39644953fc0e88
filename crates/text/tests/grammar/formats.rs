//! Formats: JSON, schemas, regexes, choices.

use r1_text::Format;
use serde_json::{Value, json};

use crate::walk::World;

/// Python's `json.dumps`: a space behind `,` and `:`.
fn dumps(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("[{}]", items.iter().map(dumps).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            let items: Vec<String> =
                map.iter().map(|(k, v)| format!("{}: {}", Value::from(k.as_str()), dumps(v))).collect();
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

#[test]
fn choice() {
    for world in World::both() {
        let strings = ["yes", "yes, but", "no \"quotes\"\n\u{7f}", "/slash\\"];
        let constraint = world.of_format(Format::Choice(strings.map(str::to_owned).to_vec()));
        for text in strings {
            assert!(world.accepts(&constraint, text), "{text}");
        }
        for text in ["ye", "yes,", "no", "yes yes"] {
            assert!(!world.accepts(&constraint, text), "{text}");
        }
    }
}

/// What pydantic writes for nested models, optional fields, enums and unions.
fn pydantic() -> Value {
    json!({
        "$defs": {
            "Color": {"enum": ["red", "green"], "title": "Color", "type": "string"},
            "Cat": {"type": "object", "properties": {"kind": {"const": "cat", "type": "string"}, "lives": {"type": "integer", "minimum": 0, "maximum": 9}},
                    "required": ["kind", "lives"], "additionalProperties": false},
            "Dog": {"type": "object", "properties": {"kind": {"const": "dog"}, "color": {"$ref": "#/$defs/Color"}},
                    "required": ["kind", "color"], "additionalProperties": false},
            "Tree": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "children": {"type": "array", "items": {"$ref": "#/$defs/Tree"}}},
                     "required": ["name", "children"], "additionalProperties": false}
        },
        "type": "object", "title": "Zoo", "description": "ignored",
        "properties": {
            "pet": {"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}], "discriminator": {"propertyName": "kind"}},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": null},
            "grid": {"type": "array", "items": {"type": "array", "items": {"type": "number"}, "maxItems": 2}, "minItems": 1},
            "born": {"type": "string", "format": "date"},
            "tree": {"$ref": "#/$defs/Tree", "description": "beside a reference"}
        },
        "required": ["pet", "note", "grid", "born", "tree"],
        "additionalProperties": false
    })
}

/// An independent reading of [`pydantic`].
fn is_zoo(zoo: &Value) -> bool {
    fn tree(v: &Value) -> bool {
        let Some(map) = v.as_object() else { return false };
        map.len() == 2
            && v["name"].as_str().is_some_and(|n| n.chars().count() <= 8)
            && v["children"].as_array().is_some_and(|list| list.iter().all(tree))
    }
    let pet = &zoo["pet"];
    let cat = pet["kind"] == "cat" && pet["lives"].as_i64().is_some_and(|n| (0..10).contains(&n));
    let dog = pet["kind"] == "dog" && (pet["color"] == "red" || pet["color"] == "green");
    let row = |row: &Value| row.as_array().is_some_and(|r| r.len() <= 2 && r.iter().all(Value::is_number));
    zoo.as_object().is_some_and(|map| map.keys().eq(["pet", "note", "grid", "born", "tree"]))
        && (cat || dog)
        && pet.as_object().is_some_and(|p| p.len() == 2)
        && (zoo["note"].is_null() || zoo["note"].is_string())
        && zoo["grid"].as_array().is_some_and(|rows| !rows.is_empty() && rows.iter().all(row))
        && zoo["born"].as_str().is_some_and(|s| s.len() == 10 && &s[4..5] == "-")
        && tree(&zoo["tree"])
}

#[test]
fn schemas_as_pydantic_writes_them() {
    let good = json!({"pet": {"kind": "dog", "color": "red"}, "note": null, "grid": [[1, 2.5], []], "born": "2024-02-29",
        "tree": {"name": "oak", "children": [{"name": "", "children": []}]}});
    assert!(is_zoo(&good));
    for world in World::both() {
        let constraint = world.of_format(Format::JsonSchema(pydantic()));
        for text in [good.to_string(), dumps(&good), serde_json::to_string_pretty(&good).unwrap()] {
            assert!(world.accepts(&constraint, &text), "{text}");
        }
        for (pointer, bad) in [
            ("/pet/kind", json!("cow")),
            ("/pet/color", json!("blue")),
            ("/note", json!(1)),
            ("/grid", json!([])),
            ("/grid/0", json!([1, 2, 3])),
            ("/born", json!("yesterday")),
            ("/tree/name", json!("too long a name")),
            ("/tree/children/0", json!({"name": "x"})),
        ] {
            let mut value = good.clone();
            *value.pointer_mut(pointer).unwrap() = bad;
            assert!(!world.accepts(&constraint, &value.to_string()), "{pointer}");
        }
        let mut more = good.clone();
        more["more"] = json!(1);
        assert!(!world.accepts(&constraint, &more.to_string()));
    }
}

#[test]
fn random_walks_satisfy_the_schema() {
    for world in World::both() {
        let mut ended = 0;
        for seed in 0..40 {
            let mut constraint = world.of_format(Format::JsonSchema(pydantic()));
            if let Some(reply) = world.random(&mut constraint, seed, 600) {
                let text = world.text(&reply);
                let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
                assert!(is_zoo(&value), "{text}");
                ended += 1;
            }
        }
        assert!(ended > 10, "{ended}");
    }
}

#[test]
fn white_space_is_bounded() {
    let world = World::tiny();
    let mut constraint = world.of_format(Format::JsonObject);
    assert_eq!(world.follow(&mut constraint, "{"), "{");
    let indented = world.follow(&mut constraint, &format!("\n{}", " ".repeat(200)));
    assert!(indented.len() <= 33, "{}", indented.len());
    let mut constraint = world.of_format(Format::JsonObject);
    assert!(world.follow(&mut constraint, "{   ").len() < 4);
}

#[test]
fn keywords_by_keyword() {
    let world = World::tiny();
    for (schema, good, bad) in [
        (json!({"type": "integer", "multipleOf": 5}), "15", "16"),
        (json!({"type": "number", "exclusiveMinimum": 0, "maximum": 1}), "0.5", "1.5"),
        (json!({"type": "string", "pattern": "^a+$"}), "\"aa\"", "\"ab\""),
        (json!({"type": "string", "minLength": 2, "maxLength": 3}), "\"ab\"", "\"a\""),
        (json!({"type": ["string", "null"]}), "null", "1"),
        (json!({"enum": [1, "a", null, [1, 2], {"k": true}]}), "{\"k\": true}", "{\"k\": false}"),
        (json!({"const": {"a": [1]}}), "{\"a\": [1]}", "{\"a\": [2]}"),
        (
            json!({"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "string"}, "minItems": 2}),
            "[1, \"a\"]",
            "[1]",
        ),
        (
            json!({"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": false}),
            "{\"x1\": 1}",
            "{\"y\": 1}",
        ),
        (
            json!({"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2}),
            "{\"a\": true, \"b\": false}",
            "{\"a\": true, \"b\": true, \"c\": true}",
        ),
        (json!({"allOf": [{"type": "integer"}, {"minimum": 3}]}), "3", "2"),
        (json!({"type": "string", "format": "uuid"}), "\"123e4567-e89b-12d3-a456-426614174000\"", "\"123\""),
        (json!(true), "[1]", "[1"),
        (json!({"type": "array", "items": {"type": "integer"}, "uniqueItems": false}), "[1, 1]", "[a]"),
        (
            json!({"properties": {"uniqueItems": {"type": "integer"}}, "type": "object", "required": ["uniqueItems"]}),
            "{\"uniqueItems\": 1}",
            "{}",
        ),
    ] {
        let constraint = world.of_format(Format::JsonSchema(schema.clone()));
        assert!(world.accepts(&constraint, good), "{schema}: {good}");
        assert!(!world.accepts(&constraint, bad), "{schema}: {bad}");
    }
}
