//! Tool calls in replies: what is a call and what is content, and that the cuts between pieces do not matter.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use r1_text::{
    ControlText, Delta, Detokenizer, OutputParser, ParserConfig, Piece, TokenClass, Tokenizer, ToolParser,
    ToolSyntax,
};

const CALLS: &str = "<｜tool▁calls▁begin｜>";
const END_CALLS: &str = "<｜tool▁calls▁end｜>";
const CALL: &str = "<｜tool▁call▁begin｜>";
const END_CALL: &str = "<｜tool▁call▁end｜>";
const SEP: &str = "<｜tool▁sep｜>";
const OUTPUT: &str = "<｜tool▁output▁begin｜>";

/// A reply as the client gets it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Reply {
    reasoning: String,
    content: String,
    calls: Vec<(String, String)>,
    stopped: Option<String>,
}

impl Reply {
    fn content(content: &str) -> Self {
        Self { content: content.to_owned(), ..Self::default() }
    }

    fn call(mut self, name: &str, arguments: &str) -> Self {
        self.calls.push((name.to_owned(), arguments.to_owned()));
        self
    }

    fn take(&mut self, output: &r1_text::Output) {
        for pair in output.deltas.windows(2) {
            assert_ne!(std::mem::discriminant(&pair[0]), std::mem::discriminant(&pair[1]), "{pair:?}");
        }
        for delta in &output.deltas {
            match delta {
                Delta::Reasoning(text) => {
                    assert!(
                        !text.is_empty() && self.content.is_empty() && self.calls.is_empty(),
                        "{delta:?}"
                    );
                    self.reasoning += text;
                }
                Delta::Content(text) => {
                    assert!(!text.is_empty());
                    self.content += text;
                }
                Delta::ToolCall { index, name } => {
                    assert_eq!(*index, self.calls.len());
                    self.calls.push((name.clone(), String::new()));
                }
                Delta::ToolArguments { index, text } => {
                    assert!(!text.is_empty() && *index + 1 == self.calls.len(), "{delta:?}");
                    self.calls[*index].1 += text;
                }
            }
        }
        self.stopped.clone_from(&output.stopped);
    }
}

fn tools(syntax: Option<ToolSyntax>) -> ParserConfig {
    let names = ["get_weather", "get_time", "get"].map(str::to_owned).to_vec();
    ParserConfig {
        separate_reasoning: true,
        tools: Some(ToolParser { syntax, names, spelled: false, hide_cut: false }),
        ..ParserConfig::default()
    }
}

fn any() -> ParserConfig {
    tools(None)
}

/// The reply as tokens: markup in one piece each, words in pieces of at most `chars` characters.
fn pieces(reply: &str, chars: usize) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut rest = reply;
    while !rest.is_empty() {
        let markup =
            [CALLS, END_CALLS, CALL, END_CALL, SEP, OUTPUT].into_iter().find(|m| rest.starts_with(m));
        let first = rest.chars().next().unwrap().len_utf8();
        let words_end = rest[first..].find("<｜tool▁").map_or(rest.len(), |at| at + first);
        let cut = rest.char_indices().nth(chars).map_or(rest.len(), |(at, _)| at);
        let len = markup.map_or(cut.min(words_end), str::len);
        let class = if markup.is_some() { TokenClass::Tool } else { TokenClass::Text };
        let (text, more) = rest.split_at(len);
        pieces.push(Piece { text: text.to_owned(), class });
        rest = more;
    }
    pieces
}

fn parse(config: &ParserConfig, pieces: &[Piece]) -> Reply {
    let mut parser = OutputParser::new(config.clone()).unwrap();
    let mut reply = Reply::default();
    for piece in pieces {
        reply.take(&parser.push(piece));
    }
    reply.take(&parser.finish());
    reply
}

#[track_caller]
fn check(config: &ParserConfig, text: &str, expected: &Reply) {
    for chars in [usize::MAX, 3, 1] {
        assert_eq!(parse(config, &pieces(text, chars)), *expected, "{text:?} by {chars} characters");
    }
}

#[track_caller]
fn check_content(config: &ParserConfig, text: &str) {
    check(config, text, &Reply::content(text));
}

fn fenced(name: &str, arguments: &str) -> String {
    format!("{CALL}function{SEP}{name}\n```json\n{arguments}\n```{END_CALL}")
}

fn plain(name: &str, arguments: &str) -> String {
    format!("{CALL}{name}{SEP}{arguments}{END_CALL}")
}

#[test]
fn calls_of_both_syntaxes() {
    let paris = r#"{"city": "Paris"}"#;
    let weather = Reply::default().call("get_weather", paris);
    let both = weather.clone().call("get_time", "{}");
    for config in [any(), tools(Some(ToolSyntax::Fenced))] {
        check(&config, &format!("{CALLS}{}{END_CALLS}", fenced("get_weather", paris)), &weather);
        let two = format!("{CALLS}{}\n{}{END_CALLS}", fenced("get_weather", paris), fenced("get_time", "{}"));
        check(&config, &two, &both);
    }
    for config in [any(), tools(Some(ToolSyntax::Plain))] {
        check(&config, &format!("{CALLS}{}{END_CALLS}", plain("get_weather", paris)), &weather);
        let two = format!("{CALLS}{}{}{END_CALLS}", plain("get_weather", paris), plain("get_time", "{}"));
        check(&config, &two, &both);
    }
    let mixed = format!("{CALLS}{}\n{}{END_CALLS}", fenced("get_weather", paris), plain("get_time", "{}"));
    check(&any(), &mixed, &both);
    let prefix_of_another = format!("{CALLS}{}{END_CALLS}", fenced("get", "{}"));
    check(&any(), &prefix_of_another, &Reply::default().call("get", "{}"));
}

#[test]
fn only_the_syntax_that_was_asked_for() {
    check_content(&tools(Some(ToolSyntax::Fenced)), &plain("get_time", "{}"));
    check_content(&tools(Some(ToolSyntax::Plain)), &fenced("get_time", "{}"));
}

#[test]
fn a_function_may_be_named_function() {
    let names = vec!["function".to_owned(), "f".to_owned()];
    let tools = ToolParser { syntax: None, names, spelled: false, hide_cut: false };
    let config = ParserConfig { tools: Some(tools), ..any() };
    check(&config, &plain("function", "{}"), &Reply::default().call("function", "{}"));
    check(&config, &fenced("function", "{}"), &Reply::default().call("function", "{}"));
    check(&config, &fenced("f", "{}"), &Reply::default().call("f", "{}"));
}

#[test]
fn ends_may_be_missing() {
    let time = Reply::default().call("get_time", "{}");
    let two = time.clone().call("get_weather", "[1]");
    for end in ["", END_CALL, "<｜tool▁call▁end｜>\n<｜tool▁calls▁end｜>", END_CALLS, "\n"] {
        for begin in ["", CALLS, "<｜tool▁calls▁begin｜>\n"] {
            check(&any(), &format!("{begin}{CALL}function{SEP}get_time\n```json\n{{}}\n```{end}"), &time);
            check(&any(), &format!("{begin}{CALL}get_time{SEP}{{}}{end}"), &time);
        }
    }
    let no_end = format!("{CALLS}{CALL}function{SEP}get_time\n```json\n{{}}\n```\n{CALL}get_weather{SEP}[1]");
    check(&any(), &no_end, &two);
    let no_fence_end = format!("{CALL}function{SEP}get_time\n```json\n{{}}{END_CALL}");
    check(&any(), &no_fence_end, &time);
}

#[test]
fn a_closed_fence_ends_a_call_without_its_end() {
    let text = format!("{CALL}function{SEP}get_time\n```json\n{{}}\n```\nThat is all.");
    check(&any(), &text, &Reply::content("That is all.").call("get_time", "{}"));
}

#[test]
fn arguments_are_as_the_model_wrote_them() {
    for arguments in [
        "",
        "{\"a\": 1",
        "{}}",
        "not json",
        "{\"code\": \"```\\n\"}",
        "{\"code\": \"x\n```\ny\"}",
        "{\"code\": \"```json\n{}\n``` ` `` ```` \"}",
        "{\n  \"city\" : \"Zürich 🙂\"\n}",
        "{\"tag\": \"<think></think>\"}",
        "````",
        "a ``` b ``` ``",
    ] {
        let expected = Reply::default().call("get_time", arguments);
        check(&any(), &fenced("get_time", arguments), &expected);
        check(&any(), &format!("{CALLS}{}{END_CALLS}", plain("get_time", arguments)), &expected);
    }
    let spaced = fenced("get_time", "\n\n  {}\n\n");
    check(&any(), &spaced, &Reply::default().call("get_time", "{}"));
    let separator = fenced("get_time", &format!("{{\"x\": \"{SEP}\"}}"));
    check(&any(), &separator, &Reply::default().call("get_time", &format!("{{\"x\": \"{SEP}\"}}")));
}

#[test]
fn a_reply_cut_in_a_call_keeps_what_there_was() {
    let cut = |rest: &str| format!("{CALLS}{CALL}function{SEP}get_time\n```json\n{rest}");
    for (rest, arguments) in [
        ("{\"city\": \"New ", "{\"city\": \"New "),
        ("{\"city\": \"`", "{\"city\": \"`"),
        ("{\"city\": \"New\", ", "{\"city\": \"New\","),
        ("{}\n``", "{}"),
        ("{}\n```", "{}"),
        ("", ""),
    ] {
        check(&any(), &cut(rest), &Reply::default().call("get_time", arguments));
    }
    for head in [
        CALLS.to_owned(),
        format!("{CALLS}{CALL}"),
        format!("{CALLS}{CALL}func"),
        format!("{CALLS}{CALL}function{SEP}get_time\n``"),
        format!("{CALLS}{CALL}function{SEP}get_time\n```json"),
    ] {
        check_content(&any(), &head);
    }
}

#[test]
fn what_is_no_call_is_content() {
    for text in [
        format!("{CALLS}{END_CALLS}"),
        format!("{CALLS}{CALLS}"),
        format!("{CALLS} x {END_CALLS}"),
        format!("a\n{END_CALLS}\n{SEP} {END_CALL}"),
        format!("{CALLS}{}{END_CALLS}", fenced("get_stocks", "{}")),
        format!("{CALLS}{}\n{END_CALLS}\n", plain("get_stocks", "{}")),
        format!("{CALLS}{}{END_CALLS}", plain("get_weathers", "{}")),
        format!("{CALL}tool{SEP}get_time\n```json\n{{}}\n```{END_CALL}"),
        format!("{CALL}function{SEP}get_time\n{{}}\n{END_CALL}"),
        format!("{CALL}function{SEP}get_time\n```python\n{{}}\n```{END_CALL}"),
        format!("{CALL}function{SEP}get_time\n```jsonl\n{{}}\n```{END_CALL}"),
        format!("{CALL}function{SEP}{SEP}get_time\n```json\n{{}}\n```{END_CALL}"),
        format!("{CALL}function get_time\n```json\n{{}}\n```{END_CALL}"),
        format!("{CALL}{}function{SEP}get_time\n```json\n{{}}\n```{END_CALL}", "\n".repeat(10) + "x"),
        format!("so: \n\n{CALLS} \n {CALL} func {END_CALL} {END_CALLS} \n and"),
        format!("{OUTPUT}x"),
    ] {
        check_content(&any(), &text);
    }
}

#[test]
fn a_bad_call_beside_a_good_one() {
    let good = fenced("get_time", "{}");
    let bad = fenced("no", "{}");
    let call = |content: &str| Reply::content(content).call("get_time", "{}");
    check(&any(), &format!("{CALLS}{bad}\n{good}{END_CALLS}"), &call(&format!("{CALLS}{bad}")));
    check(&any(), &format!("{CALLS}{good}\n{bad}{END_CALLS}"), &call(&bad));
}

#[test]
fn content_around_calls() {
    let good = format!("{CALLS}{}{END_CALLS}", fenced("get_time", "{}"));
    let call = |content: &str| Reply::content(content).call("get_time", "{}");
    check(&any(), &format!("Let me see.\n\n{good}"), &call("Let me see."));
    check(&any(), &format!(" \n{good}\n"), &call(""));
    check(&any(), &format!("{good}\n\nDone.\n"), &call("Done.\n"));
    check(&any(), &format!(" a \n{good}\n\nb"), &call(" a\n\nb"));
    check_content(&any(), " a \n b \n");
    check_content(&any(), " \n ");
}

#[test]
fn reasoning_and_calls() {
    let good = format!("{CALLS}{}{END_CALLS}", fenced("get_time", "{}"));
    let open = ParserConfig { start_inside_reasoning: true, ..any() };
    let call = Reply { reasoning: "why".into(), ..Reply::default().call("get_time", "{}") };
    check(&open, &format!("why\n</think>\n\n{good}"), &call);
    check(&open, &format!("why\n{good}"), &call);
    check(&open, &format!("\n<think>\nwhy{}", fenced("get_time", "{}")), &call);
    check(&any(), &format!("<think>why\n\n{good}"), &call);
    check(&any(), &format!(" \n{good}"), &Reply { reasoning: String::new(), ..call.clone() });
    check(&open, &good, &Reply { reasoning: String::new(), ..call.clone() });
    check(&open, &format!("why</thi{good}"), &Reply { reasoning: "why</thi".into(), ..call.clone() });
    let bad = Reply { reasoning: "why".into(), ..Reply::content(&format!("\n{CALLS}x")) };
    check(&open, &format!("why\n{CALLS}x"), &bad);
    let other = format!("why {SEP}{END_CALLS}{OUTPUT}");
    check(&open, &other, &Reply { reasoning: other.clone(), ..Reply::default() });
    let inline = ParserConfig { separate_reasoning: false, ..open };
    let content = Reply::content("why</think>").call("get_time", "{}");
    check(&inline, &format!("why</think>\n{good}"), &content);
}

#[test]
fn spelled_markup_is_content_unless_the_tokenizer_has_no_tokens_for_it() {
    let good = format!("a <{CALLS}{}{END_CALLS}", fenced("get_time", "{}"));
    let as_text = |chars: usize| -> Vec<Piece> {
        let all: Vec<char> = good.chars().collect();
        let text = all.chunks(chars).map(|c| c.iter().collect());
        text.map(|text| Piece { text, class: TokenClass::Text }).collect()
    };
    let mut config = any();
    for chars in [1, 5, 1000] {
        assert_eq!(parse(&config, &as_text(chars)), Reply::content(&good));
    }
    config.tools.as_mut().unwrap().spelled = true;
    for chars in [1, 5, 1000] {
        assert_eq!(parse(&config, &as_text(chars)), Reply::content("a <").call("get_time", "{}"));
    }
    check_content(&config, "<<｜tool▁<｜tool▁calls▁begin <");
    let tiny = tokenizer("tiny-r1");
    assert!(!ToolParser::new(&tiny, None, vec![]).spelled);
}

fn tokenizer(name: &str) -> Arc<Tokenizer> {
    let path = format!("{}/testdata/{name}-tokenizer.json", env!("CARGO_MANIFEST_DIR"));
    Arc::new(Tokenizer::from_bytes(&std::fs::read(path).unwrap(), None).unwrap())
}

#[test]
fn tokens_make_calls_and_words_do_not() {
    for name in ["tiny-r1", "v3-like"] {
        let tokenizer = tokenizer(name);
        let good = format!("龘{CALLS}{}{END_CALLS}", fenced("get_time", "{\"city\": \"Zürich\"}"));
        let read = |tokens: &[r1_core::TokenId]| {
            let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer), ControlText::Hide);
            parse(&any(), &tokens.iter().map(|&t| detokenizer.push(t)).collect::<Vec<_>>())
        };
        let call = Reply::content("龘").call("get_time", "{\"city\": \"Zürich\"}");
        let mut tokens = tokenizer.encode(&good).unwrap();
        assert_eq!(read(&tokens), call, "{name}");
        assert_eq!(read(&tokenizer.encode_literal(&good).unwrap()), Reply::content(&good), "{name}");
        tokens.remove(1); // A character that markup cuts off.
        assert_eq!(read(&tokens), Reply { content: "\u{FFFD}".into(), ..call }, "{name}");
    }
}

#[test]
fn stop_strings_act_everywhere() {
    let stop = |stop: &str, text: &str| {
        let config = ParserConfig { stop: vec![stop.to_owned()], ..any() };
        let one = parse(&config, &pieces(text, usize::MAX));
        assert_eq!(parse(&config, &pieces(text, 1)), one);
        one
    };
    let good = format!("so{CALLS}{}{END_CALLS}", fenced("get_time", "{\"city\": \"Rome\"}"));
    let stopped = |reply: Reply, stop: &str| Reply { stopped: Some(stop.to_owned()), ..reply };
    let arguments = Reply::content("so").call("get_time", "{\"city\": \"R");
    assert_eq!(stop("ome", &good), stopped(arguments, "ome"));
    let markup = Reply::content("so<｜");
    assert_eq!(stop("tool▁calls", &good), stopped(markup, "tool▁calls"));
    let head = Reply::content(&format!("so{CALLS}{CALL}"));
    assert_eq!(stop("function", &good), stopped(head, "function"));
    let all = Reply::content("so").call("get_time", "{\"city\": \"Rome\"}");
    assert_eq!(stop(END_CALLS, &good), stopped(all.clone(), END_CALLS));
    assert_eq!(stop("nowhere", &good), all);
}

#[test]
fn stop_strings_wait_for_min_tokens() {
    let read = |min_tokens: usize, tokens: &[&str]| {
        let stop = vec!["END".to_owned(), "aa".to_owned()];
        let config = ParserConfig { min_tokens, stop, ..ParserConfig::default() };
        let piece = |text: &&str| Piece { text: (*text).to_owned(), class: TokenClass::Text };
        parse(&config, &tokens.iter().map(piece).collect::<Vec<_>>())
    };
    let stopped =
        |content: &str, stop: &str| Reply { stopped: Some(stop.to_owned()), ..Reply::content(content) };
    let tokens = ["x END", " y", " EN", "D z"];
    assert_eq!(read(0, &tokens), stopped("x ", "END"));
    for min in 1..=3 {
        assert_eq!(read(min, &tokens), stopped("x END y ", "END"), "it may begin earlier, min_tokens {min}");
    }
    assert_eq!(read(4, &tokens), Reply::content("x END y END z"));
    assert_eq!(read(1, &["aa", "a", "b"]), stopped("a", "aa"), "one that overlaps the first");
    assert_eq!(read(2, &["a", "", "END"]), stopped("a", "END"), "empty pieces are tokens");
    let mut parser =
        OutputParser::new(ParserConfig { min_tokens: 1, stop: vec!["a".into()], ..any() }).unwrap();
    parser.push(&Piece { text: String::new(), class: TokenClass::Text });
    assert_eq!(parser.push_text("a").stopped, None, "text without a token counts none");
}

#[test]
fn arguments_stream_as_they_come() {
    let mut parser = OutputParser::new(any()).unwrap();
    let mut push = |text: &str| parser.push(&pieces(text, usize::MAX)[0]).deltas;
    let arguments = |text: &str| vec![Delta::ToolArguments { index: 0, text: text.to_owned() }];
    for text in [CALLS, CALL, "function", SEP, "get_time", "\n", "```", "json"] {
        assert_eq!(push(text), [], "{text}");
    }
    assert_eq!(push("\n"), [Delta::ToolCall { index: 0, name: "get_time".into() }]);
    assert_eq!(push("{\"a\":"), arguments("{\"a\":"));
    assert_eq!(push(" "), []);
    assert_eq!(push("1}"), arguments(" 1}"));
    assert_eq!(push("\n``"), []);
    assert_eq!(push("`"), []);
    assert_eq!(push(END_CALL), []);
    assert_eq!(parser.finish().deltas, []);
}

/// What once took time by the square of the length would take hours here.
#[test]
fn long_replies_take_linear_time() {
    const BYTES: usize = 1 << 18;
    let begun = pieces(&format!("{CALL}function{SEP}get_time\n```json\n{{\"a\": \""), usize::MAX);
    let stop = vec!["a".repeat(5000) + "b", "</think>x".to_owned(), "`".repeat(999) + "x"];
    let begin = Instant::now();
    for inside in [false, true] {
        for in_call in [false, true] {
            for spelled in [false, true] {
                for unit in [
                    "\n",
                    " ",
                    "<",
                    "`",
                    "\n```",
                    "``` ",
                    "</think",
                    "<thin",
                    "a",
                    "<｜tool▁call",
                    "\n<",
                    "{",
                    "\u{85}",
                ] {
                    let mut config =
                        ParserConfig { start_inside_reasoning: inside, stop: stop.clone(), ..any() };
                    config.tools.as_mut().unwrap().spelled = spelled;
                    let mut parser = OutputParser::new(config).unwrap();
                    let mut len = 0;
                    for piece in begun.iter().filter(|_| in_call) {
                        parser.push(piece);
                    }
                    let piece = Piece { text: unit.to_owned(), class: TokenClass::Text };
                    for _ in 0..BYTES / unit.len() {
                        len += length(&parser.push(&piece));
                    }
                    len += length(&parser.finish());
                    assert!(len <= BYTES + 100);
                }
            }
        }
    }
    for markup in [CALLS, CALL, SEP, END_CALL, END_CALLS] {
        let mut parser = OutputParser::new(any()).unwrap();
        let piece = Piece { text: markup.to_owned(), class: TokenClass::Tool };
        let len: usize = (0..BYTES / markup.len()).map(|_| length(&parser.push(&piece))).sum();
        assert_eq!(len + length(&parser.finish()), BYTES / markup.len() * markup.len());
    }
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
}

fn length(output: &r1_text::Output) -> usize {
    let of = |delta: &Delta| match delta {
        Delta::Reasoning(text) | Delta::Content(text) | Delta::ToolArguments { text, .. } => text.len(),
        Delta::ToolCall { .. } => 0,
    };
    output.deltas.iter().map(of).sum()
}

const FRAGMENTS: [&str; 36] = [
    CALLS,
    CALLS,
    CALL,
    CALL,
    CALL,
    SEP,
    SEP,
    SEP,
    END_CALL,
    END_CALL,
    END_CALLS,
    END_CALLS,
    OUTPUT,
    "function",
    "function",
    "get_time",
    "get_weather",
    "get",
    "nothing",
    "\n```json\n",
    "\n```json\n",
    "```",
    "\n```",
    "json",
    "{}",
    "{\"a\": \"",
    "\"}",
    "<think>",
    "</think>",
    "<thi",
    "\n",
    " ",
    "é🙂",
    "STOP",
    "ST",
    "word",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn cuts_do_not_matter_and_nothing_is_lost(
        fragments in prop::collection::vec(prop::sample::select(&FRAGMENTS[..]), 0..24),
        chars in 1_usize..6,
        stops in prop::bool::weighted(0.3),
        start_inside_reasoning in prop::bool::ANY,
        separate_reasoning in prop::bool::weighted(0.8),
        spelled in prop::bool::ANY,
        syntax in prop::sample::select(vec![None, Some(ToolSyntax::Fenced), Some(ToolSyntax::Plain)]),
    ) {
        let text = fragments.concat();
        let mut config = ParserConfig { start_inside_reasoning, separate_reasoning, ..tools(syntax) };
        config.tools.as_mut().unwrap().spelled = spelled;
        if stops {
            config.stop = vec!["STOP".to_owned(), "n\n".to_owned()];
        }
        let one = parse(&config, &pieces(&text, usize::MAX));
        prop_assert_eq!(&parse(&config, &pieces(&text, chars)), &one);
        if spelled {
            let whole = Piece { text: text.clone(), class: TokenClass::Text };
            prop_assert_eq!(&parse(&config, &[whole]), &one);
        }

        // Every word of the reply is somewhere, in order: white space, think tags and calls' markup may be dropped.
        let Reply { reasoning, content, calls, stopped } = &one;
        if stopped.is_none() {
            let has = |markup: &str| one.content.matches(markup).count() + one.reasoning.matches(markup).count();
            let arguments: String = calls.iter().map(|(_, arguments)| arguments.as_str()).collect();
            let shown = has(CALL) + arguments.matches(CALL).count();
            prop_assert_eq!(shown + calls.len(), text.matches(CALL).count(), "{:?}", one);
            let words = |s: &str| ["word", "é🙂", "nothing", OUTPUT].map(|w| s.matches(w).count());
            let all = reasoning.clone() + content + &arguments;
            prop_assert_eq!(words(&all), words(&text), "{:?}", one);
        }
        if calls.is_empty() && !separate_reasoning && stopped.is_none() {
            prop_assert_eq!(content, &text);
        }
    }
}
