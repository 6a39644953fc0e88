//! Reasoning before an answer, and its budget.

use r1_core::TokenConstraint;
use r1_text::{Format, ReplyRules, Thinking};

use crate::walk::World;

fn digits(thinking: Thinking) -> ReplyRules {
    ReplyRules { thinking, format: Some(Format::Regex("[0-9]{1,3}".into())), ..ReplyRules::default() }
}

#[test]
fn the_answer_begins_behind_the_reasoning() {
    for world in World::both() {
        let constraint = world.constraint(&digits(Thinking::Open));
        for text in ["</think>7", "so {it} is\n</think>\n\n42", "<think>x</think>\n\n\n\n1"] {
            assert!(world.accepts_markup(&constraint, text), "{text}");
            // Spelled out, the tag counts as well.
            assert!(world.accepts(&constraint, text), "{text}");
        }
        for text in ["so 42", "</think>", "</think>\n\n\n\n\n1", "</think> 1", "</think>x"] {
            let mut constraint = constraint.clone();
            let whole = world.follow_markup(&mut constraint, text) == text;
            let is_answer = text.contains("</think>");
            assert!(!(whole && is_answer && world.may_end(&mut constraint)), "{text}");
        }
    }
}

#[test]
fn a_closed_prompt_may_open_the_reasoning() {
    for world in World::both() {
        let constraint = world.constraint(&digits(Thinking::MayOpen));
        for text in ["7", "<think>x</think>7", "\n<think>\nx\n</think>\n\n7"] {
            assert!(world.accepts_markup(&constraint, text), "{text}");
        }
        for text in ["x", "\n7", " 7", "7<think>", "\n\n\n\n\n<think></think>7"] {
            assert!(!world.accepts_markup(&constraint, text), "{text}");
        }
        let constraint = world.constraint(&digits(Thinking::None));
        assert!(world.accepts(&constraint, "7"));
        assert!(!world.accepts_markup(&constraint, "<think></think>7"));
    }
}

#[test]
fn the_budget_closes_the_reasoning() {
    for world in World::both() {
        let close = world.id("</think>");
        for budget in [0, 1, 5] {
            let rules = ReplyRules { thinking_budget: Some(budget), ..digits(Thinking::Open) };
            let mut constraint = world.constraint(&rules);
            let word = world.tokens("a")[0];
            for _ in 0..budget {
                assert!(world.may(&mut constraint, word) && world.may(&mut constraint, close));
                assert!(!world.may_end(&mut constraint), "a reply that must be something does not end here");
                constraint.accept(word).unwrap();
            }
            let mask = world.mask(&mut constraint).expect("the tag alone");
            assert_eq!(mask.iter().map(|w| w.count_ones()).sum::<u32>(), 1);
            assert!(world.may(&mut constraint, close));
            assert!(constraint.clone().accept(word).is_err());
            constraint.accept(close).unwrap();
            assert!(world.accepts(&constraint, "\n\n12"));
        }
        // Without a format the rest is free; the reasoning that the model opens itself has the same budget.
        let rules = ReplyRules { format: None, thinking_budget: Some(2), ..digits(Thinking::MayOpen) };
        let mut constraint = world.constraint(&rules);
        assert_eq!(world.follow_markup(&mut constraint, "<think>"), "<think>");
        for _ in 0..2 {
            constraint.accept(world.tokens("a")[0]).unwrap();
        }
        assert!(!world.may(&mut constraint, world.tokens("a")[0]));
        constraint.accept(close).unwrap();
        assert_eq!(world.mask(&mut constraint), None);
        let mut constraint = world.constraint(&rules);
        assert_eq!(world.follow(&mut constraint, "hello there"), "hello there");
    }
}

#[test]
fn a_tag_of_several_tokens_is_forced_whole() {
    // The same tokenizer without its think tags.
    let text = include_str!("../../testdata/tiny-r1-tokenizer.json");
    let mut json: serde_json::Value = serde_json::from_str(text).unwrap();
    let added = json["added_tokens"].as_array_mut().unwrap();
    added.retain(|t| !t["content"].as_str().unwrap().ends_with("think>"));
    json["model"]["vocab"].as_object_mut().unwrap().retain(|t, _| !t.ends_with("think>"));
    let world = World::new(json.to_string().as_bytes());
    let rules = ReplyRules { thinking_budget: Some(3), ..digits(Thinking::Open) };
    let mut constraint = world.constraint(&rules);
    let reply = world.random(&mut constraint, 7, 400).expect("it ends");
    let text = world.text(&reply);
    let (_, answer) = text.split_once("</think>").unwrap_or_else(|| panic!("{text}"));
    assert!(answer.trim_start_matches('\n').parse::<u32>().is_ok(), "{text}");
    let constraint = world.constraint(&digits(Thinking::MayOpen));
    assert!(world.accepts(&constraint, "<think>a</think>7"));
    assert!(world.accepts(&constraint, "7"));
}

#[test]
fn clones_go_their_own_ways() {
    let world = World::tiny();
    let mut first = world.constraint(&digits(Thinking::Open));
    world.follow_markup(&mut first, "</think>1");
    let mut second = first.clone();
    assert_eq!(world.follow(&mut first, "23"), "23");
    assert!(!world.may(&mut first, world.tokens("4")[0]));
    assert_eq!(world.follow(&mut second, "45"), "45");
    // A failure of one is not the other's.
    assert!(first.accept(world.tokens("x")[0]).is_err());
    assert!(world.may_end(&mut second));
    // Nor of the next request with the same grammar.
    assert!(world.accepts_markup(&world.constraint(&digits(Thinking::Open)), "</think>9"));
}

#[test]
fn eos_may_be_drawn_again() {
    let world = World::tiny();
    let mut constraint = world.constraint(&digits(Thinking::None));
    world.follow(&mut constraint, "123");
    for _ in 0..3 {
        assert!(world.may_end(&mut constraint));
        constraint.accept(world.eos).unwrap();
    }
}
