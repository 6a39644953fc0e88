//! Continuous batching as a pure state machine: [`plan`] chooses a step, [`begin`] reserves KV blocks for it, and
//! [`commit`] applies what came of it, up to `depth` steps later.
//!
//! The same state gives the same plan: there is no clock, no randomness, no thread and no iteration in hash order
//! here, and nothing is known of tensors, devices, text or HTTP. The one exception to "no randomness" is
//! [`simulate`], which drives the state machine from a seed and brings its own generator.
//!
//! # A step
//!
//! ```
//! use r1_core::{FinishReason, SeqId, TokenId};
//! use r1_sched::{NewSequence, Outcome, SchedConfig, State, begin, commit, plan};
//!
//! let config = SchedConfig { num_blocks: 8, max_model_len: 64, ..SchedConfig::default() };
//! let mut state = State::new(config)?;
//! let prompt = vec![TokenId(7); 20];
//! let new = NewSequence {
//!     id: SeqId(1),
//!     prompt,
//!     max_new_tokens: 1,
//!     priority: 0,
//!     cache_salt: None,
//!     run_ahead: true,
//! };
//! state.add(new)?;
//!
//! let chosen = plan(&state, &state.limits());
//! assert_eq!(chosen.prefill[0].len, 20);
//! let step = begin(&mut state, &chosen);
//! let drawn = Outcome { seq: SeqId(1), tokens: &[TokenId(3)], finish: None };
//! let finished = commit(&mut state, step, [drawn]);
//! assert_eq!(finished[0].reason, FinishReason::Length);
//! assert!(state.is_idle());
//! # Ok::<(), r1_sched::SchedError>(())
//! ```
//!
//! # The rules
//!
//! - Order is `(priority, arrival)`, lower first. It holds for running and waiting sequences alike, so a preempted
//!   sequence is back in front of every later one of its priority.
//! - Decode rows come first, which bounds inter-token latency; prefill chunks fill what is left of the budget.
//! - A sequence is admitted with blocks for all of its known tokens, so a prefill never stops half-way for blocks,
//!   and nobody is admitted past a sequence that does not fit yet.
//! - A decode row that lacks a block takes those of the last running sequence behind it (recompute). One that is in
//!   flight cannot give them up: it sits out a step and gives them up in the next. The last sequence itself keeps its
//!   blocks and waits. So the first running sequence always advances, and since [`State::add`] refuses what would
//!   not fit alone, everybody comes first in the end.
//! - Tokens in flight count at their upper bound (every draft accepted) until [`commit`] knows better, and no row is
//!   planned beyond a sequence's limits on that count.
#![forbid(unsafe_code)]

mod blocks;
mod config;
mod error;
#[cfg(test)]
mod fixture;
mod plan;
mod prefix;
mod sequence;
#[cfg(test)]
mod sharing;
pub mod simulate;
mod state;
mod step;

pub use blocks::BlockPool;
pub use config::{Limits, SchedConfig};
pub use error::SchedError;
pub use plan::{Decode, Plan, PrefillChunk, plan, plan_into};
pub use prefix::PrefixKey;
pub use sequence::{Finished, NewSequence, Outcome, Phase, Sequence};
pub use state::{State, Stats};
pub use step::{StepId, begin, commit, fail};
