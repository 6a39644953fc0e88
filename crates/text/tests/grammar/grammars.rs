//! Lark and GBNF.

use r1_text::Format;
use serde_json::Value;

use crate::walk::World;

/// llama.cpp's idioms: white space by recursion, counted hex digits, nested groups, a comment.
const JSON_GBNF: &str = r#"
# JSON
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9]{1,2})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"#;

#[test]
fn gbnf_json() {
    for world in World::both() {
        let constraint = world.of_format(Format::Grammar(JSON_GBNF.into()));
        for text in [r#"{"a": [1, -2.5e3, {"b": "x\n\u00e9"}], "c": null}"#, "{}", "{\n \"k\": true }"] {
            assert!(world.accepts(&constraint, text), "{text}");
        }
        for text in ["[1]", "{\"a\": 01}", "{\"a\"}", "{,}"] {
            assert!(!world.accepts(&constraint, text), "{text}");
        }
        let mut ended = 0;
        for seed in 0..20 {
            let mut constraint = constraint.clone();
            if let Some(reply) = world.random(&mut constraint, seed, 300) {
                let text = world.text(&reply);
                assert!(serde_json::from_str::<Value>(&text).is_ok(), "{text}");
                ended += 1;
            }
        }
        assert!(ended > 5, "{ended}");
    }
}

#[test]
fn gbnf_piece_by_piece() {
    let world = World::tiny();
    for (grammar, good, bad) in [
        ("root ::= \"a\" | \"b\"", vec!["a", "b"], vec!["c", "ab"]),
        // Every way to split the text counts.
        ("root ::= [a-z]+ \"x\" \"yz\"? ", vec!["abx", "xx", "xxyz"], vec!["x", "ab"]),
        ("root ::= (\"ab\" | \"a\") (\"c\" | \"bc\")", vec!["abc", "ac", "abbc"], vec!["ab"]),
        ("root ::= item{2,3}\nitem ::= [0-9] \";\"", vec!["1;2;", "1;2;3;"], vec!["1;", "1;2;3;4;"]),
        ("root ::= \"(\" root \")\" | \"x\"", vec!["x", "((x))"], vec!["(x", "()"]),
        (
            "root ::= a\na ::= [^\\]\\n-] ws \"\\t\\\"\\\\\"\nws ::= ([ ] ws)?",
            vec!["q   \t\"\\"],
            vec!["]\t\"\\"],
        ),
        ("root ::= \"\\u00e9\" . \"x\"{0}", vec!["\u{e9}z"], vec!["e", "\u{e9}zx"]),
        ("root ::= \"a\"\n  | \"b\" # comment | \"c\"\n", vec!["a", "b"], vec!["c"]),
        (
            "root ::= expr\nexpr ::= term ([-+*/] term)*\nterm ::= [0-9]+ | \"(\" expr \")\"",
            vec!["1+(2*34)", "7"],
            vec!["1+", "(1"],
        ),
    ] {
        let constraint = world.of_format(Format::Grammar(grammar.into()));
        for text in good {
            assert!(world.accepts(&constraint, text), "{grammar}: {text}");
        }
        for text in bad {
            assert!(!world.accepts(&constraint, text), "{grammar}: {text}");
        }
    }
}

#[test]
fn gbnf_errors_name_the_line() {
    let world = World::tiny();
    for (grammar, place) in [
        ("start ::= \"a\"", None),
        ("root ::= a\n", Some("line 1")),
        ("root ::= \"a\"\nroot ::= \"b\"", Some("line 2")),
        ("root ::= \"a\n", Some("line 2")),
        ("root ::= [a-", Some("line 1")),
        ("root ::= [z-a]", Some("line 1")),
        ("\n\nroot ::= (\"a\"", Some("line 3")),
        ("root ::= \"a\"{5,2}", Some("line 1")),
        ("root ::= \"a\"{99999}", Some("line 1")),
        ("root ::= \"\\q\"", Some("line 1")),
        ("root ::= x\nx ::= \"a\" x", Some("line 1")),
        ("root ::= \"a\" }", Some("line 1")),
        ("root ::= <think>", Some("line 1")),
        ("root = \"a\"\nx ::= \"b\"", Some("line 1")),
    ] {
        let error = world.refusal(Format::Grammar(grammar.into()));
        assert_eq!((error.field.as_str(), error.place.as_deref()), ("format", place), "{grammar}: {error}");
    }
}

#[test]
fn lark() {
    let world = World::tiny();
    let grammar = r#"
        start: "print" WS expr  // a comment
        expr: NUMBER | expr OP NUMBER
        OP: "+" | "-"
        WS: /[ ]/
        %import common.INT -> NUMBER
    "#;
    let constraint = world.of_format(Format::Grammar(grammar.into()));
    assert!(world.accepts(&constraint, "print 1+22-3"));
    assert!(!world.accepts(&constraint, "print 1+"));
    for (grammar, place) in [
        ("begin: \"a\"", None),
        ("start: \"a", Some("line 1")),
        ("\nstart: %json {}", Some("line 2")),
        ("start: <think>", Some("line 1")),
        ("start: <[5]>", Some("line 1")),
        ("start: @other", Some("line 1")),
        ("%llguidance {\"allow_invalid_utf8\": true}\nstart: \"a\"", Some("line 1")),
        ("start: \"a\"{1,1000000}", Some("line 1")),
        ("start: /(a{1,1000}){1,1000}/", Some("line 1")),
        ("start: missing", None),
    ] {
        let error = world.refusal(Format::Grammar(grammar.into()));
        assert_eq!(error.place.as_deref(), place, "{grammar}: {error}");
    }
}
