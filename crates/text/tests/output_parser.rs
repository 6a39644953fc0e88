//! The output parser: what a reply is sorted into, and that the cuts between pieces do not matter.

use proptest::prelude::*;
use r1_text::{Delta, OutputParser, ParserConfig, Piece, TextError, TokenClass};

fn text(text: &str) -> Piece {
    Piece { text: text.to_owned(), class: TokenClass::Text }
}

/// Reasoning, content and stop string of a reply fed in `pieces`.
fn parse(config: &ParserConfig, pieces: &[&str]) -> (String, String, Option<String>) {
    let mut parser = OutputParser::new(config.clone()).unwrap();
    let mut outputs: Vec<_> = pieces.iter().map(|piece| parser.push(&text(piece))).collect();
    outputs.push(parser.finish());
    let (mut reasoning, mut content) = (String::new(), String::new());
    for delta in outputs.iter().flat_map(|o| &o.deltas) {
        match delta {
            Delta::Reasoning(text) => {
                assert!(!text.is_empty() && content.is_empty(), "reasoning after content");
                reasoning += text;
            }
            Delta::Content(text) => {
                assert!(!text.is_empty());
                content += text;
            }
            other => panic!("{other:?} without tools"),
        }
    }
    (reasoning, content, outputs.last().unwrap().stopped.clone())
}

fn config(inside: bool, stop: &[&str]) -> ParserConfig {
    ParserConfig {
        start_inside_reasoning: inside,
        separate_reasoning: true,
        stop: stop.iter().map(|&s| s.to_owned()).collect(),
        ..ParserConfig::default()
    }
}

#[track_caller]
fn check(config: &ParserConfig, text: &str, reasoning: &str, content: &str) {
    let expected = (reasoning.to_owned(), content.to_owned(), None);
    assert_eq!(parse(config, &[text]), expected, "{text:?}");
    let characters: Vec<String> = text.chars().map(String::from).collect();
    let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
    assert_eq!(parse(config, &characters), expected, "{text:?} by characters");
}

#[test]
fn reasoning_and_content_from_an_open_prompt() {
    let open = config(true, &[]);
    check(&open, "why\n</think>\n\nbecause", "why", "because");
    check(&open, "\n\nwhy\n\nso\n\n</think>\r\n\n because \n", "why\n\nso", " because \n");
    check(&open, "<think>\nwhy</think>x", "why", "x");
    check(&open, "\n</think>\n\nHi", "", "Hi");
    check(&open, "</think>", "", "");
    check(&open, "all of it\n", "all of it\n", "");
    check(&open, "cut </thi", "cut </thi", "");
    check(&open, "a </thin </think> b", "a </thin ", " b");
    check(&open, "a<</think>b", "a<", "b");
    check(&open, "why</think>a <think>b</think> c", "why", "a <think>b</think> c");
    check(&open, "", "", "");
    check(&open, "</think>\n\n", "", "");
    check(&open, "why\n\n</thi\n</think>x", "why\n\n</thi", "x");
}

#[test]
fn reasoning_and_content_from_a_closed_prompt() {
    let closed = config(false, &[]);
    check(&closed, "just text", "", "just text");
    check(&closed, "\n just text\n", "", "\n just text\n");
    check(&closed, "<think>\nwhy\n</think>\n\nbecause", "why", "because");
    check(&closed, " \n<think>why</think>x", "why", "x");
    check(&closed, "<thin", "", "<thin");
    check(&closed, "<thing>", "", "<thing>");
    check(&closed, "text <think>a</think> b", "", "text <think>a</think> b");
    check(&closed, "text</think> b", "", "text</think> b");
    check(&closed, "  ", "", "  ");
}

#[test]
fn tool_markup_stays_in_the_content() {
    let markup =
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    check(&config(true, &[]), &format!("why</think>{markup}"), "why", markup);
}

#[test]
fn inline_reasoning_is_left_alone() {
    let text = "\n<think>\nwhy\n</think>\n\nbecause";
    check(&ParserConfig { separate_reasoning: false, ..config(true, &[]) }, text, "", text);
}

#[test]
fn stop_strings() {
    let stop = |stops: &[&str], text: &str| parse(&config(false, stops), &[text]);
    let stopped = |content: &str, stop: &str| (String::new(), content.to_owned(), Some(stop.to_owned()));
    assert_eq!(stop(&["END"], "a END b"), stopped("a ", "END"));
    assert_eq!(stop(&["b", "ab"], "xabx"), stopped("x", "ab"), "of those that end together the longest");
    assert_eq!(stop(&["abc", "b"], "xabc"), stopped("xa", "b"), "the first to end");
    assert_eq!(stop(&["aab"], "aaab"), stopped("a", "aab"), "a beginning inside a beginning");
    assert_eq!(stop(&["🙂"], "a🙃🙂"), stopped("a🙃", "🙂"));
    assert_eq!(stop(&["END"], "a EN"), (String::new(), "a EN".into(), None), "flushed at the end");
    let include = ParserConfig { include_stop: true, ..config(false, &["END"]) };
    assert_eq!(parse(&include, &["a E", "ND b"]), stopped("a END", "END"));
    let inside = parse(&config(true, &["STOP"]), &["why\nST", "OP</think>x"]);
    assert_eq!(inside, ("why\n".into(), String::new(), Some("STOP".into())));
    let tag = parse(&config(true, &["</think>"]), &["why\n</th", "ink>x"]);
    assert_eq!(tag, ("why\n".into(), String::new(), Some("</think>".into())), "the raw text is searched");
    assert!(matches!(OutputParser::new(config(true, &["a", ""])), Err(TextError::EmptyStop(1))));
}

#[test]
fn nothing_is_given_out_that_could_be_a_stop_string_or_a_tag() {
    let mut parser = OutputParser::new(config(true, &["END"])).unwrap();
    let mut push = |piece: &str| parser.push(&text(piece)).deltas;
    assert_eq!(push("why\n"), [Delta::Reasoning("why".into())]);
    assert_eq!(push("E"), []);
    assert_eq!(push("x</th"), [Delta::Reasoning("\nEx".into())]);
    assert_eq!(push("ink>"), []);
    assert_eq!(push("\n\n"), []);
    assert_eq!(push("a EN"), [Delta::Content("a ".into())]);
    assert_eq!(push("d"), [Delta::Content("ENd".into())]);
    let stop = parser.push(&text("END and more"));
    assert_eq!((stop.deltas, stop.stopped.as_deref()), (vec![], Some("END")));
    assert_eq!(parser.push(&text("more")).deltas, []);
    assert_eq!(parser.finish().stopped.as_deref(), Some("END"));
}

#[test]
fn the_place_can_be_asked() {
    let mut parser = OutputParser::new(config(false, &[])).unwrap();
    assert!(!parser.in_reasoning());
    parser.push(&text("<think>"));
    assert!(parser.in_reasoning());
    parser.push(&text("a</think>"));
    assert!(!parser.in_reasoning());
}

/// What the reply must be by the rules, told without a stream.
fn whole(config: &ParserConfig, text: &str) -> (String, String, Option<String>) {
    let ends = |s: &String| text.find(s.as_str()).map(|at| (at + s.len(), at, s.clone()));
    let first = config.stop.iter().filter_map(ends).min();
    let (text, stopped) = match first {
        Some((end, start, s)) => (&text[..if config.include_stop { end } else { start }], Some(s)),
        None => (text, None),
    };
    let breaks = ['\n', '\r'];
    let mut rest = text;
    let mut inside = config.start_inside_reasoning;
    if !config.separate_reasoning {
        return (String::new(), text.to_owned(), stopped);
    }
    if !inside && let Some(after) = text.trim_start().strip_prefix("<think>") {
        (inside, rest) = (true, after);
    }
    if !inside {
        return (String::new(), text.to_owned(), stopped);
    }
    loop {
        rest = rest.trim_start_matches(breaks);
        match rest.strip_prefix("<think>") {
            Some(after) => rest = after,
            None => break,
        }
    }
    match rest.split_once("</think>") {
        Some((a, b)) => (a.trim_end_matches(breaks).into(), b.trim_start_matches(breaks).into(), stopped),
        None => (rest.to_owned(), String::new(), stopped),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn cuts_do_not_matter(
        text in "(<think>|</think>|</thi|<|\n|\r\n| |a|b|ab|🙂|é){0,14}",
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        stop in prop::collection::vec("(a|b|\n|<|🙂|</think>){1,3}", 0..3),
        inside in any::<bool>(),
        separate_reasoning in prop::bool::weighted(0.8),
        include_stop in any::<bool>(),
    ) {
        let config = ParserConfig { start_inside_reasoning: inside, separate_reasoning, stop, include_stop, ..ParserConfig::default() };
        let mut cuts: Vec<usize> = cuts.iter().map(|c| text.floor_char_boundary(c.index(text.len() + 1))).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
        let one = parse(&config, &[&text]);
        prop_assert_eq!(&parse(&config, &pieces), &one);
        prop_assert_eq!(&whole(&config, &text), &one);
    }
}
