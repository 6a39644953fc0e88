//! Tool calls.

use r1_text::{Format, ReplyRules, Thinking, ToolChoice, ToolRule, ToolSyntax, Tools};
use serde_json::{Value, json};

use crate::walk::World;

fn tools(choice: ToolChoice, syntax: ToolSyntax) -> Tools {
    let city = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": false});
    let rules = vec![
        ToolRule { name: "get_weather".into(), parameters: city, strict: false },
        ToolRule { name: "now".into(), parameters: Value::Null, strict: false },
    ];
    Tools { rules, choice, parallel: true, syntax }
}

fn rules(tools: Tools) -> ReplyRules {
    ReplyRules { tools: Some(tools), ..ReplyRules::default() }
}

fn fenced(name: &str, arguments: &str) -> String {
    format!("<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>")
}

fn calls(list: &[String]) -> String {
    format!("<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>", list.join("\n"))
}

#[test]
fn required_calls() {
    for world in World::both() {
        let constraint = world.constraint(&rules(tools(ToolChoice::Required, ToolSyntax::Fenced)));
        let weather = fenced("get_weather", r#"{"city": "Paris"}"#);
        let now = fenced("now", r#"{"zone":{"a":[1]}}"#);
        let close = fenced("get_weather", "{\"city\": \"</think>```\\n\"}");
        assert!(world.accepts_markup(&constraint, &calls(std::slice::from_ref(&weather))));
        assert!(world.accepts_markup(&constraint, &calls(&[weather.clone(), now.clone(), weather.clone()])));
        assert!(world.accepts_markup(
            &constraint,
            &calls(&[weather.clone(), now.clone()]).replace("end｜>\n", "end｜>")
        ));
        assert!(!world.accepts_markup(&constraint, &calls(&[close])), "a control token inside a string");
        assert!(!world.accepts_markup(&constraint, &calls(&[])));
        assert!(!world.accepts_markup(&constraint, &calls(&[fenced("get_weather", "{}")])));
        assert!(!world.accepts_markup(&constraint, &calls(&[fenced("other", "{}")])));
        assert!(!world.accepts_markup(&constraint, "hello"));
        assert!(!world.accepts_markup(&constraint, &format!("{}!", calls(&[now]))));
    }
}

#[test]
fn one_call_and_a_named_call() {
    let world = World::tiny();
    let weather = fenced("get_weather", r#"{"city": "Paris"}"#);
    let now = fenced("now", "{}");
    let one = Tools { parallel: false, ..tools(ToolChoice::Required, ToolSyntax::Fenced) };
    let constraint = world.constraint(&rules(one));
    assert!(world.accepts_markup(&constraint, &calls(std::slice::from_ref(&weather))));
    assert!(!world.accepts_markup(&constraint, &calls(&[weather.clone(), now.clone()])));
    let constraint = world.constraint(&rules(tools(ToolChoice::Named("now".into()), ToolSyntax::Fenced)));
    assert!(world.accepts_markup(&constraint, &calls(&[now])));
    assert!(!world.accepts_markup(&constraint, &calls(&[weather])));
}

#[test]
fn plain_syntax() {
    let world = World::v3_like();
    let constraint = world.constraint(&rules(tools(ToolChoice::Required, ToolSyntax::Plain)));
    let call =
        "<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{\"city\": \"Rome\"}<｜tool▁call▁end｜>".to_owned();
    assert!(world.accepts_markup(&constraint, &calls(std::slice::from_ref(&call))));
    let both = format!("<｜tool▁calls▁begin｜>{call}{call}<｜tool▁calls▁end｜>");
    assert!(world.accepts_markup(&constraint, &both));
}

#[test]
fn auto_is_free_until_the_calls_begin() {
    for world in World::both() {
        let auto = rules(tools(ToolChoice::Auto, ToolSyntax::Fenced));
        let mut constraint = world.constraint(&auto);
        assert_eq!(world.mask(&mut constraint), None);
        assert!(world.accepts_markup(&constraint, "any text</think> at all"));
        // Not strict: any object.
        let call = calls(&[fenced("get_weather", r#"{"town": 1}"#)]);
        assert!(world.accepts_markup(&constraint, &format!("I shall look.{call}")));
        assert!(!world.accepts_markup(&constraint, &calls(&[fenced("other", "{}")])));
        world.follow_markup(&mut constraint, &call);
        let mask = world.mask(&mut constraint).expect("only EOS");
        assert_eq!(mask.iter().map(|w| w.count_ones()).sum::<u32>(), 1);

        let mut strict = tools(ToolChoice::Auto, ToolSyntax::Fenced);
        strict.rules[0].strict = true;
        let constraint = world.constraint(&rules(strict));
        assert!(!world.accepts_markup(&constraint, &call));
        assert!(world.accepts_markup(&constraint, &calls(&[fenced("get_weather", r#"{"city": ""}"#)])));
    }
}

#[test]
fn a_format_or_calls() {
    let world = World::tiny();
    let both = ReplyRules {
        format: Some(Format::Regex("[0-9]+".into())),
        thinking: Thinking::Open,
        ..rules(tools(ToolChoice::Auto, ToolSyntax::Fenced))
    };
    let constraint = world.constraint(&both);
    assert!(world.accepts_markup(&constraint, "hm</think>\n\n12"));
    assert!(world.accepts_markup(&constraint, &format!("hm\n</think>{}", calls(&[fenced("now", "{}")]))));
    assert!(!world.accepts_markup(&constraint, "</think>hello"));
    assert!(!world.accepts_markup(&constraint, &format!("</think>1{}", calls(&[fenced("now", "{}")]))));
}

#[test]
fn random_walks_give_calls() {
    let world = World::tiny();
    let mut ended = 0;
    for seed in 0..40 {
        let mut constraint = world.constraint(&rules(tools(ToolChoice::Required, ToolSyntax::Fenced)));
        let Some(reply) = world.random(&mut constraint, seed, 400) else { continue };
        let text = world.text(&reply);
        let inner =
            text.strip_prefix("<｜tool▁calls▁begin｜>").and_then(|t| t.strip_suffix("<｜tool▁calls▁end｜>"));
        for call in inner.unwrap_or_else(|| panic!("{text}")).split("<｜tool▁call▁end｜>") {
            if call.is_empty() {
                continue;
            }
            let (name, arguments) = call
                .trim_start_matches('\n')
                .strip_prefix("<｜tool▁call▁begin｜>function<｜tool▁sep｜>")
                .and_then(|c| c.strip_suffix("\n```"))
                .and_then(|c| c.split_once("\n```json\n"))
                .unwrap_or_else(|| panic!("{text}"));
            let arguments: Value = serde_json::from_str(arguments).unwrap_or_else(|e| panic!("{e}: {text}"));
            assert!(name == "now" || arguments["city"].is_string(), "{text}");
            assert!(arguments.is_object());
        }
        // Control tokens came where the markup has them, and nowhere else.
        let control = reply.iter().filter(|t| t.0 < 16).count();
        let markup = 2 + 3 * reply.iter().filter(|&&t| t == world.id("<｜tool▁call▁begin｜>")).count();
        assert_eq!(control, markup, "{text}");
        ended += 1;
    }
    assert!(ended > 10, "{ended}");
}

#[test]
fn what_is_wrong_is_named() {
    let world = World::tiny();
    let refusal = |tools: Tools| world.grammars.constraint(&rules(tools)).err().expect("refused");
    let base = || tools(ToolChoice::Required, ToolSyntax::Fenced);
    assert_eq!(refusal(Tools { rules: vec![], ..base() }).field, "tools");
    assert_eq!(refusal(Tools { choice: ToolChoice::Named("x".into()), ..base() }).field, "tools.choice");
    let mut twice = base();
    twice.rules[1].name = "get_weather".into();
    assert_eq!(refusal(twice).field, "tools[1].name");
    let mut bad = base();
    bad.rules[1].parameters = json!({"type": "object", "properties": {"a": {"not": {}}}});
    let error = refusal(bad);
    assert_eq!(
        (error.field.as_str(), error.place.as_deref()),
        ("tools[1].parameters", Some("/properties/a/not"))
    );
    let mut array = base();
    array.rules[0].parameters = json!({"type": "array"});
    assert_eq!(refusal(array).place.as_deref(), Some("/type"));
}
