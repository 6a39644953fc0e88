//! Streaming detokenizer: text of tokens as they come, in whole characters. Knows nothing of what the text means.

use std::sync::Arc;

use r1_core::TokenId;

use crate::control::TokenClass;
use crate::tokenizer::Tokenizer;

/// Whether tokens that structure a conversation (BOS, EOS, roles, padding) appear in text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ControlText {
    /// They read as nothing.
    #[default]
    Hide,
    /// They read as written.
    Show,
}

/// What one token added to the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The characters that became whole with this token; often empty. A [`Think`](TokenClass::Think) or
    /// [`Tool`](TokenClass::Tool) token's own text is at its end.
    pub text: String,
    /// The class of the token itself, so that a tag which came as a token differs from one that was spelled out.
    pub class: TokenClass,
}

/// Turns one sequence's tokens into text.
///
/// The concatenation of all pieces and of [`finish`](Self::finish) is [`Tokenizer::decode`] of all tokens. A character that
/// is split over tokens is held back until it is whole; U+FFFD appears only where the bytes cannot become UTF-8.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    control: ControlText,
    /// The beginning of a character, at most 3 bytes between calls.
    held: Vec<u8>,
}

impl Detokenizer {
    /// Starts a sequence.
    pub fn new(tokenizer: Arc<Tokenizer>, control: ControlText) -> Self {
        Self { tokenizer, control, held: Vec::new() }
    }

    /// The text that `token` completes.
    pub fn push(&mut self, token: TokenId) -> Piece {
        let class = self.tokenizer.class(token);
        if class == TokenClass::Hidden && self.control == ControlText::Hide {
            return Piece { text: String::new(), class };
        }
        self.held.extend_from_slice(self.tokenizer.token_bytes(token));
        Piece { text: take_characters(&mut self.held), class }
    }

    /// What is left at the end: U+FFFD when the last character never became whole, else nothing.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.held).into_owned()
    }
}

/// Takes the characters from `bytes` and leaves the beginning of one that could still become whole. Bytes that cannot are
/// replaced as `String::from_utf8_lossy` replaces them.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut done = 0;
    loop {
        match std::str::from_utf8(&bytes[done..]) {
            Ok(rest) => {
                text.push_str(rest);
                bytes.clear();
                return text;
            }
            Err(error) => {
                let valid = done + error.valid_up_to();
                text.push_str(std::str::from_utf8(&bytes[done..valid]).expect("checked just now"));
                let Some(bad) = error.error_len() else {
                    bytes.drain(..valid);
                    return text;
                };
                text.push(char::REPLACEMENT_CHARACTER);
                done = valid + bad;
            }
        }
    }
}
