//! Control tokens: which strings they are, how they are found in text, and how user text is kept from being read as
//! one. Knows nothing of token ids or templates.
//!
//! A conversation becomes a prompt as *text*: the template writes `<｜User｜>` and the client's words into one string.
//! Words that look like a control token must stay words. So every client-supplied string is [guarded](ControlTokens::guard)
//! before rendering: a guard character is put behind the first character of each control string in it. The template
//! handles such a string like any other, and after rendering a control string without a guard is one that the template
//! wrote. The guard is U+FDD0, a noncharacter that Unicode sets aside for a program's own use; one in the client's text
//! is doubled, so nothing is lost.

use std::borrow::Cow;
use std::collections::HashMap;

use serde_json::Value;

/// Opens the reasoning.
pub const THINK_OPEN: &str = "<think>";
/// Ends the reasoning.
pub const THINK_CLOSE: &str = "</think>";

/// Tool-call and tool-output markup of R1, V3, V3.1 and V3.2. A model's reply may hold it; it reads as text until a tool
/// parser takes it.
const TOOL_TOKENS: [&str; 12] = [
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜search▁begin｜>",
    "<｜search▁end｜>",
    "｜DSML｜",
];

/// Tokens that structure a conversation and are never part of a reply. V3's tokenizer.json marks only BOS, EOS, pad and
/// `<|EOT|>` as special, so the list is explicit.
const HIDDEN_TOKENS: [&str; 9] = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<|EOT|>",
    "<｜fim▁begin｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁end｜>",
];

/// Unused rows of V3's embedding: `<｜place▁holder▁no▁0｜>` and so on.
const PLACEHOLDER_PREFIX: &str = "<｜place▁holder▁no▁";

const GUARD: char = '\u{FDD0}';

/// What a token of the vocabulary is to a reader of the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenClass {
    /// Part of the text.
    Text,
    /// `<think>` or `</think>`.
    Think,
    /// Tool markup; part of the text until a tool parser takes it.
    Tool,
    /// Structure that no reply shows: BOS, EOS, roles, padding.
    Hidden,
}

/// The class of an added token with this content; `special` is tokenizer.json's flag.
pub(crate) fn classify(content: &str, special: bool) -> TokenClass {
    if content == THINK_OPEN || content == THINK_CLOSE {
        TokenClass::Think
    } else if TOOL_TOKENS.contains(&content) {
        TokenClass::Tool
    } else if special || HIDDEN_TOKENS.contains(&content) || content.starts_with(PLACEHOLDER_PREFIX) {
        TokenClass::Hidden
    } else {
        TokenClass::Text
    }
}

/// A set of strings, searched for the longest one that starts at a byte.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trie {
    /// `(node, byte) -> node`; node 0 is the root.
    edges: HashMap<(u32, u8), u32>,
    /// Per node: the index, in order of insertion, of the string that ends here.
    ends: Vec<Option<u32>>,
}

/// What stands at one place of a text.
struct Found {
    /// The longest string: its index and its length in bytes.
    longest: Option<(u32, usize)>,
    /// The text ended inside a string of the set, and not at the end of another.
    cut_short: bool,
}

impl Trie {
    pub(crate) fn new<'a>(strings: impl IntoIterator<Item = &'a str>) -> Self {
        let mut trie = Self { edges: HashMap::new(), ends: vec![None] };
        for (index, string) in strings.into_iter().enumerate() {
            let mut node = 0;
            for byte in string.bytes() {
                let next = trie.ends.len() as u32;
                node = *trie.edges.entry((node, byte)).or_insert(next);
                if node == next {
                    trie.ends.push(None);
                }
            }
            trie.ends[node as usize] = Some(index as u32);
        }
        trie
    }

    fn at(&self, text: &[u8]) -> Found {
        let mut node = 0;
        let mut longest = None;
        for (len, &byte) in text.iter().enumerate() {
            match self.edges.get(&(node, byte)) {
                Some(&next) => node = next,
                None => return Found { longest, cut_short: false },
            }
            if let Some(index) = self.ends[node as usize] {
                longest = Some((index, len + 1));
            }
        }
        let ends_here = longest.is_some_and(|(_, len)| len == text.len());
        Found { longest, cut_short: node != 0 && !ends_here }
    }

    /// Leftmost-longest matches that do not overlap: `(start, end, index)`, in order.
    pub(crate) fn matches<'t>(&'t self, text: &'t str) -> impl Iterator<Item = (usize, usize, usize)> + 't {
        let bytes = text.as_bytes();
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < bytes.len() {
                if let Some((index, len)) = self.at(&bytes[at..]).longest {
                    let start = at;
                    at += len;
                    return Some((start, at, index as usize));
                }
                at += 1;
            }
            None
        })
    }
}

/// The strings that client text must not smuggle in as tokens.
#[derive(Clone, Debug)]
pub struct ControlTokens {
    strings: Vec<String>,
    trie: Trie,
}

impl Default for ControlTokens {
    fn default() -> Self {
        Self::new([])
    }
}

impl ControlTokens {
    /// DeepSeek's control tokens and `more`: a tokenizer's own added tokens.
    pub fn new<'a>(more: impl IntoIterator<Item = &'a str>) -> Self {
        let known = [THINK_OPEN, THINK_CLOSE].into_iter().chain(TOOL_TOKENS).chain(HIDDEN_TOKENS);
        let mut strings: Vec<String> = known.chain(more).map(str::to_owned).collect();
        strings.sort_unstable();
        strings.dedup();
        let trie = Trie::new(strings.iter().map(String::as_str));
        Self { strings, trie }
    }

    /// Marks every control string in client text, and a beginning of one at the text's end, which the text that the
    /// template puts behind it could complete.
    pub fn guard<'t>(&self, text: &'t str) -> Cow<'t, str> {
        self.guard_except(text, &[])
    }

    /// Like [`guard`](Self::guard), for an earlier reply: the think tags stay tags, because templates cut the reasoning
    /// off at them.
    pub fn guard_reply<'t>(&self, text: &'t str) -> Cow<'t, str> {
        self.guard_except(text, &[THINK_OPEN, THINK_CLOSE])
    }

    fn guard_except<'t>(&self, text: &'t str, keep: &[&str]) -> Cow<'t, str> {
        let mut out = String::new();
        let mut copied = 0;
        for (at, c) in text.char_indices() {
            let found = self.trie.at(&text.as_bytes()[at..]);
            let kept = found.longest.is_some_and(|(i, _)| keep.contains(&self.strings[i as usize].as_str()));
            // A match does not end the walk: another string could begin inside this one.
            if c == GUARD || found.cut_short || (found.longest.is_some() && !kept) {
                let end = at + c.len_utf8();
                out.push_str(&text[copied..end]);
                out.push(GUARD);
                copied = end;
            }
        }
        if copied == 0 {
            return Cow::Borrowed(text);
        }
        out.push_str(&text[copied..]);
        Cow::Owned(out)
    }

    /// [Guards](Self::guard) every string and every key of a JSON value.
    pub fn guard_json(&self, value: &Value) -> Value {
        match value {
            Value::String(s) => Value::String(self.guard(s).into_owned()),
            Value::Array(items) => items.iter().map(|v| self.guard_json(v)).collect(),
            Value::Object(map) => {
                map.iter().map(|(k, v)| (self.guard(k).into_owned(), self.guard_json(v))).collect()
            }
            other => other.clone(),
        }
    }

    /// Whether `c` is the character that guards.
    pub(crate) fn is_guard(c: char) -> bool {
        c == GUARD
    }

    /// Control strings of guarded text: those that the template wrote.
    pub(crate) fn matches<'t>(
        &'t self,
        guarded: &'t str,
    ) -> impl Iterator<Item = (usize, usize, &'t str)> + 't {
        self.trie.matches(guarded).map(|(start, end, index)| (start, end, self.strings[index].as_str()))
    }
}

/// Undoes [`ControlTokens::guard`].
pub(crate) fn unguard(guarded: &str) -> Cow<'_, str> {
    if !guarded.contains(GUARD) {
        return Cow::Borrowed(guarded);
    }
    let mut out = String::with_capacity(guarded.len());
    let mut chars = guarded.chars();
    while let Some(c) = chars.next() {
        if c == GUARD {
            out.extend(chars.next());
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn found(control: &ControlTokens, text: &str) -> Vec<String> {
        control.matches(text).map(|(_, _, s)| s.to_owned()).collect()
    }

    #[test]
    fn guarded_text_holds_no_control_token_and_comes_back_whole() {
        let control = ControlTokens::new(["<|eot_id|>"]);
        for text in [
            "plain",
            "<｜User｜>",
            "a<think>b</think>c",
            "<<｜Assistant｜>>",
            "<think<think>>",
            "\u{FDD0}<think>\u{FDD0}",
            "｜DSML｜invoke",
            "x <|eot_id|> y",
        ] {
            let guarded = control.guard(text);
            assert_eq!(found(&control, &guarded), Vec::<String>::new(), "{text}");
            assert_eq!(unguard(&guarded), text);
        }
        assert!(matches!(control.guard("nothing < here"), Cow::Borrowed(_)));
    }

    #[test]
    fn a_cut_control_token_cannot_be_completed_by_what_follows() {
        let control = ControlTokens::default();
        let prompt = format!("{}{}", control.guard("<｜Us"), control.guard("er｜>"));
        assert_eq!(found(&control, &prompt), Vec::<String>::new());
        assert_eq!(unguard(&prompt), "<｜User｜>");
    }

    #[test]
    fn replies_keep_think_tags_only() {
        let control = ControlTokens::default();
        let text = "<think>a</think>b<｜User｜><think>";
        let guarded = control.guard_reply(text);
        assert_eq!(found(&control, &guarded), ["<think>", "</think>", "<think>"]);
        assert_eq!(unguard(&guarded), text);
    }

    #[test]
    fn longest_match_wins() {
        let trie = Trie::new(["<a", "<a>", "b"]);
        assert_eq!(trie.matches("<a><ab").collect::<Vec<_>>(), [(0, 3, 1), (3, 5, 0), (5, 6, 2)]);
    }

    #[test]
    fn classes() {
        assert_eq!(classify("<think>", false), TokenClass::Think);
        assert_eq!(classify("<｜tool▁sep｜>", true), TokenClass::Tool);
        assert_eq!(classify("<｜User｜>", false), TokenClass::Hidden);
        assert_eq!(classify("<｜place▁holder▁no▁7｜>", false), TokenClass::Hidden);
        assert_eq!(classify("<|im_end|>", true), TokenClass::Hidden);
        assert_eq!(classify("<tool_call>", false), TokenClass::Text);
    }

    proptest! {
        #[test]
        fn no_sequence_of_strings_forges_a_control_token(
            parts in prop::collection::vec("(<think>|</think>|<｜User｜>|<｜|Us|er｜>|<|>|｜|\u{FDD0}|[a-c]){0,6}", 1..5)
        ) {
            let control = ControlTokens::default();
            let prompt: String = parts.iter().map(|p| control.guard(p).into_owned()).collect();
            prop_assert_eq!(found(&control, &prompt), Vec::<String>::new());
            prop_assert_eq!(unguard(&prompt), parts.concat());
        }
    }
}
