//! What unit tests share: a small scheduler, and an engine that draws counted tokens. Knows no rule of the scheduler.

use r1_core::{FinishReason, SeqId, TokenId};

use crate::{
    Finished, Limits, NewSequence, Outcome, Plan, PrefixKey, SchedConfig, State, StepId, begin, commit, plan,
};

/// Any key: nobody attacks a test.
pub(crate) const KEY: PrefixKey = PrefixKey::new([1, 2]);

/// Blocks of 4 tokens, 4 sequences, 16 tokens a step, no headroom, one step at a time.
pub(crate) fn config(num_blocks: usize) -> SchedConfig {
    SchedConfig {
        block_size: 4,
        num_blocks,
        max_num_seqs: 4,
        max_num_batched_tokens: 16,
        max_model_len: 64,
        max_prompt_logits: 4,
        max_queued: 8,
        headroom_tokens: 0,
        depth: 1,
        prefix_cache: None,
    }
}

/// A scheduler with the configuration, which must be valid.
pub(crate) fn state(config: SchedConfig) -> State {
    State::new(config).expect("a valid test configuration")
}

/// A sequence of priority 0 with a prompt of `len` tokens.
pub(crate) fn sequence(id: u64, len: usize, max_new_tokens: u32) -> NewSequence {
    NewSequence {
        id: SeqId(id),
        prompt: vec![TokenId(1000 + id as u32); len],
        max_new_tokens,
        priority: 0,
        cache_salt: None,
        run_ahead: true,
        prompt_logits: false,
    }
}

/// Plans with the configuration's limits and begins.
pub(crate) fn start(state: &mut State) -> (StepId, Plan) {
    let limits = state.limits();
    start_with(state, &limits)
}

/// Plans and begins.
pub(crate) fn start_with(state: &mut State, limits: &Limits) -> (StepId, Plan) {
    let chosen = plan(state, limits);
    let step = begin(state, &chosen);
    state.audit();
    (step, chosen)
}

/// Commits with one token, the same for all, for each row that samples.
pub(crate) fn finish(state: &mut State, (step, chosen): &(StepId, Plan), token: u32) -> Vec<Finished> {
    let prefill = chosen.prefill.iter().filter(|chunk| chunk.samples).map(|chunk| chunk.seq);
    let token = [TokenId(token)];
    let outcomes = chosen.decode.iter().map(|row| row.seq).chain(prefill).map(|seq| drawn(seq, &token));
    let finished = commit(state, *step, outcomes);
    state.audit();
    finished
}

/// One whole step.
pub(crate) fn step(state: &mut State, token: u32) -> (Plan, Vec<Finished>) {
    let started = start(state);
    let finished = finish(state, &started, token);
    (started.1, finished)
}

/// An outcome that does not finish.
pub(crate) fn drawn(seq: SeqId, tokens: &[TokenId]) -> Outcome<'_> {
    Outcome { seq, tokens, finish: None }
}

/// An outcome that ends with its one token, a stop token.
pub(crate) fn stopped(seq: SeqId, token: &[TokenId; 1]) -> Outcome<'_> {
    Outcome { finish: Some(FinishReason::Stop(token[0])), ..drawn(seq, token) }
}

/// Ids of decode rows, `(id, start, len, samples)` of chunks, ids of the preempted.
pub(crate) type Shape = (Vec<u64>, Vec<(u64, usize, usize, bool)>, Vec<u64>);

/// A plan in short.
pub(crate) fn shape(plan: &Plan) -> Shape {
    (
        plan.decode.iter().map(|row| row.seq.0).collect(),
        plan.prefill.iter().map(|chunk| (chunk.seq.0, chunk.start, chunk.len, chunk.samples)).collect(),
        plan.preempt.iter().map(|seq| seq.0).collect(),
    )
}
