//! Continuous batching as a pure state machine: [`plan`] chooses a step, [`begin`] reserves KV blocks for it, and
//! [`commit`] applies what came of it, up to `depth` steps later; or [`fail`] ends what it held.
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
//!     prompt_logits: false,
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
//! - A chunk that cannot finish its prompt in this step leaves up to half of the step's prefill budget to sequences
//!   behind it, of the same priority, whose whole prefill fits there. They overtake it in this step, in order of service.
//!   So a short prompt waits for two chunks of a long one at most: the one in flight and the one that carries it.
//! - A sequence is admitted with blocks for all of its known tokens, so a prefill never stops half-way for blocks,
//!   and nobody is admitted past a sequence that does not fit yet. One that is overtaken while it waits has its seat and
//!   its blocks set aside.
//! - A waiting sequence that lacks a seat or blocks takes those of the last running sequences of a *strictly* worse
//!   priority: as few as make room, and none if all of them do not, or if the step has no token for it. The headroom that
//!   it respects is that of the sequences that need not give way to it. In the same step nobody is admitted who is not
//!   better than each of those that gave way, so they are not passed, and cannot come back before something ends.
//! - A decode row that lacks a block takes those of the last running sequences behind it: as few as free one.
//! - Who gives way is computed anew later (recompute). One that is in flight cannot give way: with it, all that were to
//!   give way sit out a step, and do so in the next. The last sequence itself keeps its blocks and waits. So the first
//!   running sequence always advances, and since [`State::add`] refuses what would not fit alone, everybody comes first
//!   in the end.
//! - A prompt whose logits are wanted ([`NewSequence::prompt_logits`]) takes no more tokens of a step than it has rows of
//!   logits for, leaves the rest of the budget to those behind it, and overtakes nobody. Every sequence has one row, and
//!   those prompts share [`Limits::max_prompt_logits`] more.
//! - Tokens in flight count at their upper bound (every draft accepted) until [`commit`] knows better, and no row is
//!   planned beyond a sequence's limits on that count.
//! - A sequence that may not run ahead ([`NewSequence::run_ahead`]) has no decode row while a token of it is in flight,
//!   and no drafts. Its row may draw nothing, and then it runs the same token again; while it is paused ([`State::pause`])
//!   it has no decode row at all. The block that holds its last known token is not shared before the next one is known.
//!
//! # The prefix cache
//!
//! With a [`PrefixKey`], full blocks are found by a keyed hash of the salt and of every token up to their end.
//!
//! - Only full blocks are shared, and they are only read: what a sequence finds covers at most `(len - 1) / block_size`
//!   blocks of its `len` known tokens. So at least its last known token is run, in a block of its own, and sequences that
//!   diverge have blocks of their own from the one on in which they do. A sequence whose prompt's logits are wanted finds
//!   nothing that it has not computed itself before it was preempted.
//! - A block can be hit as soon as a step has begun that completes it with known tokens, since steps run in order on the
//!   device, and within a step each layer writes all KV before attention reads any: even a sequence admitted by the same
//!   plan, behind the chunk that fills the block, shares it. Where the token is drawn by a step in flight, it is that
//!   step's commit that makes the block known. What rejected drafts wrote never is.
//! - Of two blocks with the same content in use, the second stays anonymous.
//! - A block that nobody holds any more stays findable until it is evicted: the one released first goes first, and of one
//!   sequence the deepest. Free + used + cached blocks = all blocks, which every [`commit`] asserts.
//! - After [`fail`], nothing that the failed steps were to write is found.
//!
//! # Allocation
//!
//! While the batch stays the same and only decodes, [`plan_into`], [`begin`] and [`commit`] allocate nothing: what a
//! sequence can grow to is reserved when it is admitted.
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

use blocks::BlockPool;
pub use config::{Limits, SchedConfig};
pub use error::SchedError;
pub use plan::{Decode, Plan, PrefillChunk, plan, plan_into};
pub use prefix::PrefixKey;
pub use sequence::{Finished, NewSequence, Outcome, Phase, Sequence};
pub use state::{State, Stats};
pub use step::{StepId, begin, commit, fail};
