//! What would take too long or too much is refused, quickly, with its place; or works.

use std::time::{Duration, Instant};

use r1_core::TokenConstraint;
use r1_text::{Format, ReplyRules};
use serde_json::{Map, Value, json};

use crate::walk::World;

/// Generous: a test must not hang, benches say how fast it is.
const BOUND: Duration = Duration::from_secs(2);

/// As many properties as a schema may have.
const MOST_PROPERTIES: usize = 500;

fn nested(depth: usize) -> Value {
    let mut schema = json!({"type": "integer"});
    for _ in 0..depth {
        // `json!` would copy what it is given, by recursion.
        schema = Value::Object(Map::from_iter([("type".into(), "array".into()), ("items".into(), schema)]));
    }
    schema
}

/// Frees a deep value without recursion.
fn take_apart(mut value: Value) {
    while let Some(inner) = value.get_mut("items") {
        value = inner.take();
    }
}

fn doubling(keyword: &str) -> Value {
    let mut defs = Map::new();
    for i in 0..40 {
        let next = format!("#/$defs/d{}", i + 1);
        defs.insert(
            format!("d{i}"),
            json!({keyword: [{"$ref": next.clone()}, {"$ref": next, "type": "object"}]}),
        );
    }
    defs.insert("d40".into(), json!({"type": "object", "properties": {"a": {"type": "string"}}}));
    json!({"$ref": "#/$defs/d0", "$defs": defs})
}

/// A pattern whose automaton has about 2^`n` states.
fn tail(n: usize) -> String {
    format!("(a|b)*a(a|b){{{n}}}b")
}

fn met_patterns() -> Value {
    let list: Vec<Value> = (0..20).map(|i| json!({"type": "string", "pattern": tail(i + 10)})).collect();
    json!({"allOf": list})
}

fn three_of() -> Value {
    let option = |name: &str| json!({"properties": {name: {"type": "string"}}, "required": [name]});
    json!([option("a"), option("b"), option("c")])
}

fn patterns(n: usize) -> Value {
    let list: Map<String, Value> =
        (0..n).map(|i| (format!("^(a|b|ab){{1,40}}{i}[a-z]*x"), json!({"type": "integer"}))).collect();
    json!({"type": "object", "patternProperties": list})
}

#[test]
fn schema_bombs() {
    let world = World::v3_like();
    let long_chain: Map<String, Value> =
        (0..1500).map(|i| (format!("d{i}"), json!({"$ref": format!("#/$defs/d{}", i + 1)}))).collect();
    let enumeration: Vec<String> = (0..500_000).map(|i| format!("value number {i}")).collect();
    let any_of = |n: usize| -> Value { (0..n).map(|i| json!({"const": i})).collect() };
    for (name, schema, place) in [
        ("itself", json!({"$ref": "#"}), Some("the top")),
        (
            "two references",
            json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
            Some("/$defs/b"),
        ),
        (
            "required itself",
            json!({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
            Some("/properties/a"),
        ),
        ("allOf doubling", doubling("allOf"), Some("/$defs/d")),
        ("anyOf beside references", doubling("anyOf"), Some("/$defs/d")),
        (
            "products",
            json!({"allOf": [{"anyOf": any_of(300)}, {"anyOf": any_of(300)}, {"anyOf": any_of(300)}]}),
            None,
        ),
        ("depth", nested(100), Some("/items")),
        ("a chain", json!({"$ref": "#/$defs/d0", "$defs": long_chain}), Some("/$defs/")),
        ("an enum of 10 MB", json!({"enum": enumeration}), Some("/enum")),
        ("a long enum", json!({"enum": vec!["x".repeat(1000); 2000]}), Some("/enum")),
        ("many patterns", patterns(1000), Some("/patternProperties")),
        ("minItems", json!({"type": "array", "minItems": 1_000_000_000}), Some("/minItems")),
        (
            "maxItems",
            json!({"properties": {"a/b": {"type": "array", "maxItems": 1e9}}}),
            Some("/properties/a~1b/maxItems"),
        ),
        ("maxLength", json!({"type": "string", "maxLength": 1_000_000_000}), Some("/maxLength")),
        ("uniqueItems", json!({"type": "array", "uniqueItems": true}), Some("/uniqueItems")),
        ("http", json!({"$ref": "http://localhost:1/x.json"}), Some("/$ref")),
        ("file", json!({"properties": {"a": {"$ref": "file:///etc/passwd"}}}), Some("/properties/a/$ref")),
        ("no target", json!({"$ref": "#/$defs/nope"}), Some("/$ref")),
        ("format", json!({"type": "string", "format": "zip-code"}), Some("/format")),
        ("not", json!({"not": {}}), Some("/not")),
        ("if", json!({"if": {}, "then": {}}), Some("/if")),
        ("pattern", json!({"type": "string", "pattern": "(a{1,1000}){1,1000}"}), Some("/pattern")),
        ("type", json!({"type": "strnig"}), Some("/type")),
        ("no schema", json!([1]), Some("the top")),
        ("false", json!(false), None),
        ("unsatisfiable", json!({"allOf": [{"type": "string"}, {"type": "integer"}]}), None),
        ("empty range", json!({"type": "integer", "minimum": 5, "maximum": 4}), None),
        ("a prime divisor", json!({"type": "integer", "multipleOf": 999_983}), Some("/multipleOf")),
        ("a divisor", json!({"type": "integer", "multipleOf": 9973}), Some("/multipleOf")),
        ("a small divisor", json!({"type": "number", "multipleOf": 1e-10}), Some("/multipleOf")),
        ("a divisor of 0", json!({"type": "number", "multipleOf": 0}), Some("/multipleOf")),
        (
            "divisors meet",
            json!({"allOf": [{"type": "integer", "multipleOf": 1999}, {"type": "integer", "multipleOf": 1997}]}),
            Some("the top"),
        ),
        ("patterns meet", met_patterns(), Some("the top")),
        (
            "patterns meet in a property",
            json!({"allOf": [{"properties": {"a": met_patterns()["allOf"][0]}}, {"properties": {"a": met_patterns()}}]}),
            Some("the top"),
        ),
        (
            "patterns meet beside references",
            json!({
                "$ref": "#/$defs/a", "pattern": tail(9),
                "$defs": {"a": {"$ref": "#/$defs/b", "pattern": tail(10)}, "b": {"pattern": tail(11), "type": "string"}},
            }),
            Some("the top"),
        ),
        (
            "patterns in alternatives in alternatives",
            json!({"pattern": tail(9), "anyOf": [{"pattern": tail(10), "anyOf": [{"pattern": tail(11)}]}]}),
            Some("the top"),
        ),
        ("groups under allOf", json!({"allOf": vec![json!({"anyOf": three_of()}); 6]}), None),
        ("a bound beyond 64 bits", json!({"type": "integer", "minimum": 1e19}), Some("/minimum")),
        ("a large bound", json!({"type": "number", "maximum": -1e300}), Some("/maximum")),
        ("lengths", json!({"type": "string", "minLength": 5, "maxLength": 4}), None),
    ] {
        let start = Instant::now();
        let error = world.refusal(Format::JsonSchema(schema));
        assert!(start.elapsed() < BOUND, "{name}: {:?}", start.elapsed());
        assert_eq!(error.field, "format", "{name}");
        assert!(error.reason.len() > 10, "{name}: {error}");
        println!("{name}: {:?}: {error}", start.elapsed());
        if let Some(place) = place {
            assert!(error.place.as_ref().is_some_and(|p| p.starts_with(place)), "{name}: {error}");
        }
    }
    let deep = Format::JsonSchema(nested(100_000));
    let rules = ReplyRules { format: Some(deep), ..ReplyRules::default() };
    let start = Instant::now();
    let refused = world.grammars.constraint(&rules).is_err();
    let elapsed = start.elapsed();
    if let Some(Format::JsonSchema(schema)) = rules.format {
        take_apart(schema);
    }
    assert!(refused && elapsed < BOUND);
}

/// These are large, and either refused or held to.
#[test]
fn large_but_bounded() {
    let world = World::v3_like();
    let properties = |n: usize| -> Value {
        let list: Map<String, Value> = (0..n).map(|i| (format!("p{i}"), json!({"type": "string"}))).collect();
        json!({"type": "object", "properties": list, "additionalProperties": false})
    };
    let words: Vec<String> = (0..2500).map(|i| format!("choice number {i}")).collect();
    for (name, format) in [
        ("500 properties", Format::JsonSchema(properties(500))),
        ("250 properties", Format::JsonSchema(properties(250))),
        ("100 properties", Format::JsonSchema(properties(100))),
        ("2500 values", Format::JsonSchema(json!({"enum": words}))),
        ("2500 choices", Format::Choice(words.clone())),
        ("patterns", Format::JsonSchema(patterns(16))),
        ("60 deep", Format::JsonSchema(nested(60))),
        (
            "many items",
            Format::JsonSchema(json!({"type": "array", "minItems": 10_000, "items": {"type": "integer"}})),
        ),
        ("a long string", Format::JsonSchema(json!({"type": "string", "maxLength": 1_000_000}))),
        ("stars", Format::Regex("((((a*)*)*)*)*".into())),
        ("ambiguous", Format::Regex("(a|b|ab){1,1000}c".into())),
        ("counted classes", Format::Regex(r"[\w\s]{1,2000}(\p{Greek}|\p{Han}){1,500}".into())),
        ("two tails", Format::Regex(".*a.{15}".into())),
        ("a big tail", Format::Regex("(.*a.{500}|.*b.{600})".into())),
    ] {
        let start = Instant::now();
        let rules = ReplyRules { format: Some(format), ..ReplyRules::default() };
        match world.grammars.constraint(&rules) {
            Err(error) => println!("{name}: {error}"),
            Ok(constraint) => {
                println!("{name}: compiled in {:?}", start.elapsed());
                let mut constraint = constraint.expect("a format");
                let mut mask = vec![0; world.vocab_size.div_ceil(32)];
                let a = world.tokens("ab");
                for i in 0..60 {
                    mask.fill(0);
                    let wanted = a[i % a.len()];
                    if let Err(error) = constraint.fill_mask(&mut mask) {
                        println!("{name}: step {i}: {error}");
                        break;
                    }
                    let next = if crate::walk::bit(&mask, wanted) {
                        wanted
                    } else {
                        let id = (0..world.vocab_size as u32)
                            .find(|&id| crate::walk::bit(&mask, r1_core::TokenId(id)));
                        r1_core::TokenId(id.expect("a mask is not empty"))
                    };
                    if let Err(error) = constraint.accept(next) {
                        println!("{name}: token {i}: {error}");
                        break;
                    }
                }
            }
        }
        println!("{name}: {:?}", start.elapsed());
        assert!(start.elapsed() < BOUND, "{name}: {:?}", start.elapsed());
    }
}

/// A doubling rule that does not recurse, written out at every place of one that does.
fn doubling_gbnf() -> String {
    let mut text = String::from("root ::= \"x\"");
    for i in 0..1000 {
        text += &[" | \"", &i.to_string(), "\" d0 root \"z\""].concat();
    }
    for i in 0..14 {
        let next = i + 1;
        text += &["\nd", &i.to_string(), " ::= d", &next.to_string(), " d", &next.to_string()].concat();
    }
    text.push_str("\nd14 ::= [ab]\n");
    text
}

#[test]
fn grammar_bombs() {
    let world = World::v3_like();
    let operands = |n: usize, operator: &str| -> String {
        let list: Vec<String> = (0..n).map(|i| format!("/(a|b)*a(a|b){{{}}}.*/", i + 10)).collect();
        format!("start: A\nA: {}\n", list.join(operator))
    };
    let complements = (0..5).map(|i| format!("T{i}: ~/a+b{i}/\n")).collect::<Vec<String>>().concat();
    let lines = format!("start: A{}\n", " ".repeat(60_000));
    for (name, grammar, place) in [
        ("intersections", operands(50, " & "), Some("line 2")),
        ("three operands", operands(3, " & "), Some("line 2")),
        ("over lines", operands(3, "\n  & "), Some("line 4")),
        ("complements", format!("start: T0 T1 T2 T3 T4\n{complements}"), Some("line 6")),
        ("groups", format!("start: {}\"a\"{}\n", "(".repeat(5000), ")".repeat(5000)), Some("line 1")),
        ("no terminal", lines, None),
        ("doubling", doubling_gbnf(), Some("line 1")),
    ] {
        let start = Instant::now();
        let error = world.refusal(Format::Grammar(grammar));
        println!("{name}: {:?}: {error}", start.elapsed());
        assert!(start.elapsed() < BOUND, "{name}: {:?}", start.elapsed());
        assert!(!error.reason.contains("too long to prepare"), "{name}: {error}");
        if place.is_some() {
            assert_eq!(error.place.as_deref(), place, "{name}: {error}");
        }
    }
    for grammar in
        ["start: A\nA: /[a-z]+/ & ~/end/\n", "start: A\nA: /[a-z]+/ & /.{3,5}/\n", "start: \"a\" ~ 3\n"]
    {
        let rules = ReplyRules { format: Some(Format::Grammar(grammar.into())), ..ReplyRules::default() };
        println!("{grammar}: {:?}", world.grammars.constraint(&rules).err());
    }
}

/// Bounds that every 64-bit integer keeps, and others at that end.
#[test]
fn bounds_at_the_end_of_64_bits() {
    let world = World::v3_like();
    for schema in [
        json!({"type": "integer", "minimum": i64::MIN, "maximum": i64::MAX}),
        json!({"type": "integer", "exclusiveMinimum": i64::MIN, "exclusiveMaximum": i64::MAX}),
        json!({"type": "integer", "minimum": 0, "maximum": u64::MAX}),
        json!({"type": "integer", "minimum": -(1_i64 << 53), "maximum": 1_i64 << 53}),
        json!({"type": "number", "minimum": -1e300, "maximum": 1e300}),
        json!({"type": "number", "multipleOf": 0.01}),
        json!({"type": "integer", "multipleOf": 1000}),
    ] {
        let constraint = world.of_format(Format::JsonSchema(schema.clone()));
        assert!(world.accepts(&constraint, "7000"), "{schema}");
    }
}

/// What compiles must not fail in the middle of a reply.
#[test]
fn optional_properties_hold_to_the_end() {
    let world = World::v3_like();
    for (n, value) in [(10, "1"), (MOST_PROPERTIES, "1")] {
        let list: Map<String, Value> = (0..n).map(|i| (format!("p{i}"), json!({}))).collect();
        let start = Instant::now();
        let constraint = world.of_format(Format::JsonSchema(json!({"type": "object", "properties": list})));
        println!("{n} properties: compiled in {:?}", start.elapsed());
        for step in [1, n / 2, n - 1] {
            let fields: Vec<String> = (0..n).step_by(step).map(|i| format!("\"p{i}\":{value}")).collect();
            let text = format!("{{{},\"more\":[1]}}", fields.join(","));
            assert!(world.accepts(&constraint, &text), "{n} properties: {text}");
        }
        println!("{n} properties: {:?}", start.elapsed());
    }
}

#[test]
fn regex_bombs() {
    let world = World::v3_like();
    for (regex, place) in [
        ("(a{1,1000}){1,1000}", Some("character 12")),
        ("(a|b|ab){50}{50}", Some("character 13")),
        (r"(a)\1", None),
        ("(?=a)b", None),
        ("(", None),
        ("", None),
        (r"\bword\b", None),
    ] {
        let start = Instant::now();
        let error = world.refusal(Format::Regex(regex.into()));
        assert!(start.elapsed() < BOUND, "{regex}");
        assert_eq!(error.place.as_deref(), place, "{regex}: {error}");
        assert!(!error.reason.contains('\n') && error.reason.len() < 450, "{error}");
    }
    assert!(world.refusal(Format::Choice(vec![])).reason.contains("choices"));
    assert!(world.refusal(Format::Choice(vec!["a".into(); 10_000])).reason.contains("choices"));
    assert_eq!(
        world.refusal(Format::Choice(vec!["a".into(), String::new()])).place.as_deref(),
        Some("choice 1")
    );
}
