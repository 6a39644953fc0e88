//! A generation read to its end by a thread that waits.

use r1_core::{FinishReason, TokenId};
use r1_engine::{EngineError, Event, Generation, TokenLogprobs};

/// Tokens, what is known of their log-probabilities, and how it ended.
pub type Reply = (Vec<TokenId>, Vec<Option<TokenLogprobs>>, Result<FinishReason, EngineError>);

/// Reads a generation to its end.
///
/// # Panics
/// When it has none.
pub fn collect(mut generation: Generation) -> Reply {
    let (mut tokens, mut logprobs) = (Vec::new(), Vec::new());
    loop {
        match generation.next_blocking().expect("an end") {
            Event::Scheduled { .. } | Event::PromptLogprobs(_) => {}
            Event::Token { token, logprobs: of_token } => {
                tokens.push(token);
                logprobs.push(of_token);
            }
            Event::Finished(reason) => return (tokens, logprobs, Ok(reason)),
            Event::Failed(error) => return (tokens, logprobs, Err(error)),
        }
    }
}
