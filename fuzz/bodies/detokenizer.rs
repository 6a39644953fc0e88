//! Whatever tokens a model chooses: their text in pieces is their text as a whole, and the output parser sorts it the same
//! however it is cut, tool calls included. Shared by the fuzz target and the replay of its corpus.
//!
//! Input: a byte of flags, a byte that seeds the cuts, a byte whose low bits count the stop strings, each stop string as
//! a length and its bytes; the rest is token ids of two bytes.

use std::sync::{Arc, OnceLock};

use r1_core::TokenId;
use r1_text::{
    ControlText, Delta, Detokenizer, OutputParser, ParserConfig, Piece, TokenClass, Tokenizer, ToolParser,
};

pub(crate) fn run(data: &[u8]) {
    let [flags, seed, num_stops, rest @ ..] = data else { return };
    let flag = |bit: u8| flags >> bit & 1 == 1;
    let control = if flag(0) { ControlText::Show } else { ControlText::Hide };
    let mut rest = rest;
    let mut stop = Vec::new();
    for _ in 0..num_stops % 4 {
        let Some((&len, more)) = rest.split_first() else { return };
        let (text, more) = more.split_at(more.len().min(usize::from(len % 16)));
        stop.push(String::from_utf8_lossy(text).into_owned());
        rest = more;
    }
    let tokens: Vec<TokenId> = rest.as_chunks().0.iter().map(|&id| token(u16::from_le_bytes(id))).collect();

    let mut stream = Detokenizer::new(Arc::clone(tokenizer()), control);
    let mut pieces: Vec<Piece> = tokens.iter().map(|&t| stream.push(t)).collect();
    pieces.push(word(&stream.finish()));
    let whole = tokenizer().decode(&tokens, control);
    assert_eq!(pieces.iter().map(|piece| piece.text.as_str()).collect::<String>(), whole);

    let config = ParserConfig {
        start_inside_reasoning: flag(1),
        separate_reasoning: flag(2),
        include_stop: flag(3),
        stop,
        ..ParserConfig::default()
    };
    run_without_tools(&config, &whole, &pieces, *seed);
    let names = ["get_weather", "get_time", "a"].map(str::to_owned).to_vec();
    let tools = |spelled| Some(ToolParser { syntax: None, names: names.clone(), spelled, hide_cut: false });
    let by_tokens = ParserConfig { tools: tools(false), ..config.clone() };
    assert_eq!(parse(&by_tokens, &pieces), parse(&by_tokens, &recut(&pieces, *seed)));
    let spelled = ParserConfig { tools: tools(true), ..config };
    let at_once = parse(&spelled, &[word(&whole)]);
    assert_eq!(parse(&spelled, &pieces), at_once);
    assert_eq!(parse(&spelled, &cut(&whole, *seed)), at_once);
}

fn word(text: &str) -> Piece {
    Piece { text: text.to_owned(), class: TokenClass::Text }
}

/// The same reply with its words cut elsewhere; tool markup stays whole.
fn recut(pieces: &[Piece], seed: u8) -> Vec<Piece> {
    let mut out = Vec::new();
    let mut words = String::new();
    for piece in pieces {
        if piece.class == TokenClass::Tool {
            out.extend(cut(&std::mem::take(&mut words), seed));
            out.push(piece.clone());
        } else {
            words += &piece.text;
        }
    }
    out.extend(cut(&words, seed));
    out
}

fn run_without_tools(config: &ParserConfig, whole: &str, pieces: &[Piece], seed: u8) {
    let at_once = parse(config, &[word(whole)]);
    assert_eq!(parse(config, pieces), at_once);
    assert_eq!(parse(config, &cut(whole, seed)), at_once);
    let Some(parsed) = at_once else { return };
    let (end, stopped) = first_stop(config, whole);
    assert_eq!(parsed.stopped, stopped);
    if config.separate_reasoning {
        assert!(parsed.reasoning.len() + parsed.content.len() <= end);
        assert!(whole[..end].ends_with(&parsed.content), "{:?} of {whole:?}", parsed.content);
        assert!(whole[..end].contains(&parsed.reasoning), "{:?} of {whole:?}", parsed.reasoning);
    } else {
        assert_eq!((parsed.reasoning.as_str(), parsed.content.as_str()), ("", &whole[..end]));
    }
}

/// Mostly ids of the vocabulary, some beyond it.
fn token(id: u16) -> TokenId {
    TokenId(if id >= 0xfff0 { u32::MAX - u32::from(id & 0xf) } else { u32::from(id % 600) })
}

#[derive(Debug, PartialEq)]
struct Parsed {
    reasoning: String,
    content: String,
    /// Names and arguments.
    calls: Vec<(String, String)>,
    stopped: Option<String>,
}

/// `None` where the stop strings are refused.
fn parse(config: &ParserConfig, pieces: &[Piece]) -> Option<Parsed> {
    let Ok(mut parser) = OutputParser::new(config.clone()) else {
        assert!(config.stop.iter().any(String::is_empty));
        return None;
    };
    let mut parsed =
        Parsed { reasoning: String::new(), content: String::new(), calls: Vec::new(), stopped: None };
    let mut take = |output: r1_text::Output| {
        for delta in output.deltas {
            match delta {
                Delta::Reasoning(text) => {
                    assert!(
                        !text.is_empty() && parsed.content.is_empty() && parsed.calls.is_empty(),
                        "reasoning first"
                    );
                    parsed.reasoning += &text;
                }
                Delta::Content(text) => {
                    assert!(!text.is_empty());
                    parsed.content += &text;
                }
                Delta::ToolCall { index, name } => {
                    assert!(config.tools.as_ref().is_some_and(|tools| tools.names.contains(&name)));
                    assert_eq!(index, parsed.calls.len());
                    parsed.calls.push((name, String::new()));
                }
                Delta::ToolArguments { index, text } => {
                    assert!(!text.is_empty() && index + 1 == parsed.calls.len());
                    parsed.calls[index].1 += &text;
                }
            }
        }
        parsed.stopped = output.stopped;
    };
    for piece in pieces {
        take(parser.push(piece));
    }
    take(parser.finish());
    Some(parsed)
}

/// Pieces of 0 to 7 characters, by the seed.
fn cut(text: &str, seed: u8) -> Vec<Piece> {
    let mut state = u32::from(seed) + 1;
    let mut pieces = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let chars = (state >> 24) as usize % 8;
        let at = rest.char_indices().nth(chars).map_or(rest.len(), |(at, _)| at);
        let (piece, more) = rest.split_at(at);
        pieces.push(word(piece));
        rest = more;
    }
    pieces
}

/// Where the reply ends, by looking for every stop string at every place: the first to end, the longest of those.
fn first_stop(config: &ParserConfig, text: &str) -> (usize, Option<String>) {
    let ends = (0..=text.len()).filter(|&end| text.is_char_boundary(end));
    for end in ends {
        let stops = config.stop.iter().filter(|s| text[..end].ends_with(s.as_str()));
        if let Some(stop) = stops.max_by_key(|s| s.len()) {
            let cut = if config.include_stop { end } else { end - stop.len() };
            return (cut, Some(stop.clone()));
        }
    }
    (text.len(), None)
}

fn tokenizer() -> &'static Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        let json = include_bytes!("../../crates/cli/model/tokenizer.json");
        let config = include_bytes!("../../crates/cli/model/tokenizer_config.json");
        Arc::new(Tokenizer::from_bytes(json, Some(config)).expect("it is served"))
    })
}
