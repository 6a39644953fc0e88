//! A seeded simulator: random load on a tiny machine, every invariant checked on every commit, and every finished
//! sequence compared with the run it would have had alone. A seed replays its run exactly.
//!
//! Checked: blocks are conserved and owned once; a block in a step in flight never changes its owner; tables only
//! grow while a sequence runs; rows stay within budgets and limits, in order of service; no token is lost, doubled or
//! reordered; every sequence is reported once, for the right reason; the first sequence in order of service ends
//! within a bound, and if it runs it is never left out of more than two plans.
//!
//! Knows the scheduler from outside only, and stands where the engine and the device would.

mod checks;
mod device;
mod rng;
mod scenario;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use r1_core::{BlockId, FinishReason, SeqId, TokenId};

use crate::{Limits, NewSequence, Outcome, Plan, SchedError, State, StepId, begin, commit, plan};
use device::{Device, next_token};
use rng::{Rng, mix};
pub use scenario::Scenario;

/// What happened in a run, or in many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Steps committed.
    pub steps: u64,
    /// Sequences added.
    pub added: u64,
    /// Sequences refused: queue full, or never fitting.
    pub refused: u64,
    /// Sequences that ended with a stop token.
    pub stopped: u64,
    /// Sequences that ended at their limit.
    pub reached_limit: u64,
    /// Sequences aborted.
    pub aborted: u64,
    /// Times a sequence lost its blocks.
    pub preemptions: u64,
    /// Tokens that prefill chunks ran, prompts and recomputation.
    pub prefilled_tokens: u64,
    /// Tokens drawn and kept.
    pub generated_tokens: u64,
    /// Drafts accepted.
    pub accepted_drafts: u64,
    /// Rows run for sequences that had ended meanwhile.
    pub discarded_rows: u64,
    /// Hash of every plan in order: equal for equal runs.
    pub trace: u64,
}

impl Report {
    /// Adds the counts of another run.
    pub fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.added += other.added;
        self.refused += other.refused;
        self.stopped += other.stopped;
        self.reached_limit += other.reached_limit;
        self.aborted += other.aborted;
        self.preemptions += other.preemptions;
        self.prefilled_tokens += other.prefilled_tokens;
        self.generated_tokens += other.generated_tokens;
        self.accepted_drafts += other.accepted_drafts;
        self.discarded_rows += other.discarded_rows;
        self.trace = mix(self.trace.rotate_left(1) ^ other.trace);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} steps: {} sequences added, {} refused; {} stopped, {} at their limit, {} aborted; {} preemptions; \
             {} tokens prefilled, {} generated, {} of them accepted drafts; {} rows discarded; trace {:016x}",
            self.steps,
            self.added,
            self.refused,
            self.stopped,
            self.reached_limit,
            self.aborted,
            self.preemptions,
            self.prefilled_tokens,
            self.generated_tokens,
            self.accepted_drafts,
            self.discarded_rows,
            self.trace
        )
    }
}

/// A rule that did not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("seed {seed}, step {step}: {what}")]
pub struct Failure {
    /// Replays the run.
    pub seed: u64,
    /// Steps committed before.
    pub step: u64,
    /// The rule, and what was found instead.
    pub what: String,
}

/// Runs a scenario to its end. A panic of the scheduler is a failure like any other.
pub fn run(scenario: &Scenario) -> Result<Report, Failure> {
    let fail = |step, what| Failure { seed: scenario.seed, step, what };
    let state = State::new(scenario.config.clone()).map_err(|error| fail(0, error.to_string()))?;
    let mut simulation = Simulation::new(scenario, state);
    match catch_unwind(AssertUnwindSafe(|| simulation.run())) {
        Ok(Ok(())) => Ok(simulation.report),
        Ok(Err(what)) => Err(fail(simulation.report.steps, what)),
        Err(panic) => {
            let message = panic.downcast_ref::<String>().cloned();
            let message = message.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            Err(fail(simulation.report.steps, format!("panic: {}", message.unwrap_or_default())))
        }
    }
}

/// The engine's side of a sequence.
struct Client {
    prompt: Vec<TokenId>,
    max_len: usize,
    priority: i32,
    arrival: u64,
    /// A token divisible by this is a stop token.
    stop_modulus: u32,
    /// Output as it was committed, piece by piece.
    streamed: Vec<TokenId>,
}

impl Client {
    fn is_stop(&self, token: TokenId) -> bool {
        token.0.is_multiple_of(self.stop_modulus)
    }

    /// Prompt and output, and the reason it ends, when nothing else runs.
    fn ideal(&self) -> (Vec<TokenId>, FinishReason) {
        let mut tokens = self.prompt.clone();
        loop {
            let token = next_token(tokens.iter().copied());
            tokens.push(token);
            if self.is_stop(token) {
                return (tokens, FinishReason::Stop(token));
            }
            if tokens.len() == self.max_len {
                return (tokens, FinishReason::Length);
            }
        }
    }
}

/// One row in flight.
struct Row {
    seq: SeqId,
    table: Vec<BlockId>,
    max_tokens: usize,
    drawn: Vec<TokenId>,
}

/// By when the first sequence in order of service must have ended.
struct Deadline {
    seq: SeqId,
    step: u64,
}

struct Simulation<'a> {
    scenario: &'a Scenario,
    rng: Rng,
    state: State,
    device: Device,
    clients: BTreeMap<SeqId, Client>,
    in_flight: VecDeque<(StepId, Vec<Row>)>,
    num_ids: u64,
    deadline: Option<Deadline>,
    /// Plans in a row that left out the first sequence in order of service though it ran and was not in flight.
    left_out: usize,
    report: Report,
}

impl<'a> Simulation<'a> {
    fn new(scenario: &'a Scenario, state: State) -> Self {
        Self {
            scenario,
            rng: Rng::new(scenario.seed),
            device: Device::new(scenario.config.block_size, scenario.config.num_blocks),
            state,
            clients: BTreeMap::new(),
            in_flight: VecDeque::new(),
            num_ids: 0,
            deadline: None,
            left_out: 0,
            report: Report::default(),
        }
    }

    fn run(&mut self) -> Result<(), String> {
        while self.report.steps < self.scenario.num_steps || !self.state.is_idle() {
            if self.report.steps < self.scenario.num_steps {
                while self.rng.percent(self.scenario.arrival_percent) {
                    self.arrive()?;
                }
            }
            if self.rng.percent(self.scenario.abort_percent) {
                self.abort()?;
            }
            // An engine commits when the device is done, which may be before or after it has planned ahead.
            let began = !self.rng.percent(20) && self.begin()?;
            if !began && !self.in_flight.is_empty() {
                self.commit()?;
            }
        }
        ensure(self.clients.is_empty(), || format!("sequences never reported: {:?}", self.clients.keys()))?;
        let stats = self.state.stats();
        ensure(stats.blocks_free == stats.blocks_total, || format!("idle, but {stats:?}"))
    }

    fn arrive(&mut self) -> Result<(), String> {
        let Scenario { config, max_prompt, max_new_tokens, num_priorities, .. } = self.scenario;
        // Zeros, too, but seldom: they are refused.
        let at_least = usize::from(!self.rng.percent(2));
        let prompt_len = self.rng.range(at_least, *max_prompt);
        let prompt: Vec<_> = (0..prompt_len).map(|_| TokenId(self.rng.range(0, 999) as u32)).collect();
        let max_new_tokens = self.rng.range(at_least, *max_new_tokens);
        let priority = self.rng.range(0, num_priorities - 1) as i32;
        let stop_modulus = self.rng.range(2, 100) as u32;
        let id = SeqId(self.num_ids);
        let max_len = (prompt_len + max_new_tokens).min(config.max_model_len);
        let expect = if prompt_len == 0 {
            Err(SchedError::EmptyPrompt)
        } else if max_new_tokens == 0 {
            Err(SchedError::NoNewTokens)
        } else if prompt_len >= config.max_model_len {
            Err(SchedError::PromptTooLong { prompt: prompt_len, max_model_len: config.max_model_len })
        } else if config.blocks_for(max_len - 1) > config.num_blocks {
            let needs_blocks = config.blocks_for(max_len - 1);
            Err(SchedError::NeverFits { needs_blocks, num_blocks: config.num_blocks })
        } else if self.state.stats().waiting >= config.max_queued {
            Err(SchedError::QueueFull { max: config.max_queued })
        } else {
            Ok(())
        };
        let new = NewSequence {
            id,
            prompt: prompt.clone(),
            max_new_tokens: max_new_tokens as u32,
            priority,
            cache_salt: None,
            run_ahead: true,
        };
        let found = self.state.add(new);
        ensure(found == expect, || format!("add: expected {expect:?}, found {found:?}"))?;
        if found.is_err() {
            self.report.refused += 1;
            return Ok(());
        }
        self.num_ids += 1;
        self.report.added += 1;
        let arrival = id.0;
        let client = Client { prompt, max_len, priority, arrival, stop_modulus, streamed: Vec::new() };
        self.clients.insert(id, client);
        Ok(())
    }

    fn abort(&mut self) -> Result<(), String> {
        if self.num_ids == 0 {
            return Ok(());
        }
        // Any of the latest ids: live, draining or long gone.
        let id = SeqId(self.num_ids - 1 - self.rng.range(0, 15).min(self.num_ids as usize - 1) as u64);
        let aborted = self.state.abort(id);
        let live = self.clients.contains_key(&id);
        ensure(aborted.is_some() == live, || format!("abort of sequence {id}, live {live}: {aborted:?}"))?;
        self.state.audit();
        aborted.map_or(Ok(()), |finished| self.check_finished(&finished, true))
    }

    /// Plans and begins a step, if there is one.
    fn begin(&mut self) -> Result<bool, String> {
        let mut limits =
            Limits { num_drafts: self.rng.range(0, self.scenario.max_drafts), ..self.state.limits() };
        let tight = self.rng.percent(self.scenario.tight_percent);
        if tight {
            limits.max_num_batched_tokens = self.rng.range(1, limits.max_num_batched_tokens);
            limits.max_num_seqs = self.rng.range(1, limits.max_num_seqs);
        }
        let chosen = plan(&self.state, &limits);
        self.check_plan(&chosen, &limits, tight)?;
        if chosen.is_empty() {
            ensure(!self.in_flight.is_empty() || self.state.is_idle(), || {
                "deadlock: nothing to run".to_owned()
            })?;
            return Ok(false);
        }
        let step = begin(&mut self.state, &chosen);
        self.state.audit();
        self.trace(&chosen);
        for &seq in &chosen.preempt {
            self.report.preemptions += 1;
            let client = &self.clients[&seq];
            let kept = [client.prompt.as_slice(), &client.streamed].concat();
            ensure(self.state.tokens(seq) == kept, || format!("preempted sequence {seq} lost tokens"))?;
            ensure(self.device.remove(seq) == Some(kept), || format!("sequence {seq} preempted in flight"))?;
        }
        let rows = self.run_on_device(&chosen)?;
        self.in_flight.push_back((step, rows));
        Ok(true)
    }

    fn trace(&mut self, chosen: &Plan) {
        let decode =
            chosen.decode.iter().flat_map(|row| [row.seq.0, row.start as u64, row.num_drafts as u64]);
        let prefill =
            chosen.prefill.iter().flat_map(|chunk| [chunk.seq.0, chunk.start as u64, chunk.len as u64]);
        let preempt = chosen.preempt.iter().map(|seq| seq.0);
        for value in decode.chain(prefill).chain(preempt) {
            self.report.trace = mix(self.report.trace.wrapping_add(1) ^ mix(value));
        }
    }

    /// Executes a step on the device, whose results the host sees at the commit.
    fn run_on_device(&mut self, chosen: &Plan) -> Result<Vec<Row>, String> {
        let mut rows = Vec::new();
        // All tables first: what one row takes must not be another's.
        let ids = chosen.decode.iter().map(|row| row.seq).chain(chosen.prefill.iter().map(|chunk| chunk.seq));
        for seq in ids {
            let new = self.device.bind(seq, self.state.block_table(seq), self.state.tokens(seq))?;
            for row in self.in_flight.iter().flat_map(|(_, rows)| rows) {
                let taken = new.iter().find(|block| row.seq != seq && row.table.contains(block));
                ensure(taken.is_none(), || format!("{taken:?} of {} in flight goes to {seq}", row.seq))?;
            }
        }
        for &row in &chosen.decode {
            let rejected = self.rejected_in_flight(row.seq);
            let drawn = self.device.decode(row, rejected, &mut self.rng)?;
            let table = self.state.block_table(row.seq).to_vec();
            rows.push(Row { seq: row.seq, table, max_tokens: 1 + row.num_drafts, drawn });
        }
        for &chunk in &chosen.prefill {
            let drawn = self.device.prefill(chunk, self.state.tokens(chunk.seq))?;
            let table = self.state.block_table(chunk.seq).to_vec();
            self.report.prefilled_tokens += chunk.len as u64;
            rows.push(Row { seq: chunk.seq, table, max_tokens: usize::from(chunk.samples), drawn });
        }
        Ok(rows)
    }

    /// Drafts of a sequence that steps in flight have rejected, which the host does not know yet.
    fn rejected_in_flight(&self, seq: SeqId) -> usize {
        let rows = self.in_flight.iter().flat_map(|(_, rows)| rows).filter(|row| row.seq == seq);
        rows.map(|row| row.max_tokens - row.drawn.len()).sum()
    }

    /// Stands for the engine at the end of a step: finds stop tokens, streams, commits.
    fn commit(&mut self) -> Result<(), String> {
        let (step, rows) = self.in_flight.pop_front().expect("the caller looked");
        let ids: Vec<_> = rows.iter().map(|row| row.seq).collect();
        if self.rng.percent(self.scenario.fail_percent) {
            // The device failed: its sequences end, and there are no outcomes.
            for &seq in &ids {
                if let Some(aborted) = self.state.abort(seq) {
                    self.check_finished(&aborted, true)?;
                }
            }
        }
        let mut outcomes: Vec<(SeqId, Vec<TokenId>, Option<FinishReason>)> = Vec::new();
        for row in rows {
            let Some(client) = self.clients.get_mut(&row.seq) else {
                self.report.discarded_rows += 1;
                if self.rng.percent(50) {
                    outcomes.push((row.seq, row.drawn, None));
                }
                continue;
            };
            let mut tokens = row.drawn;
            let stop = tokens.iter().position(|&token| client.is_stop(token));
            let finish = stop.map(|at| FinishReason::Stop(tokens[at]));
            tokens.truncate(stop.map_or(tokens.len(), |at| at + 1));
            client.streamed.extend_from_slice(&tokens);
            self.report.generated_tokens += tokens.len() as u64;
            self.report.accepted_drafts += tokens.len().saturating_sub(1) as u64;
            if row.max_tokens > 0 || self.rng.percent(50) {
                outcomes.push((row.seq, tokens, finish));
            }
        }
        let outcomes =
            outcomes.iter().map(|(seq, tokens, finish)| Outcome { seq: *seq, tokens, finish: *finish });
        let finished = commit(&mut self.state, step, outcomes);
        self.state.audit();
        self.report.steps += 1;
        for finished in &finished {
            self.check_finished(finished, false)?;
        }
        for seq in ids {
            if self.state.sequence(seq).is_none() {
                self.device.remove(seq);
            }
        }
        self.check_deadline()
    }
}

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(scenario: &Scenario) -> Report {
        run(scenario).unwrap_or_else(|failure| {
            panic!(
                "{failure}\nreplay: cargo run --release -p r1-sched --bin simulate -- --seed {} --seeds 1 --steps {}\n\
                 {scenario:#?}",
                scenario.seed, scenario.num_steps
            )
        })
    }

    /// 100,000 steps over 400 machines and loads.
    #[test]
    fn no_seed_breaks_a_rule() {
        let mut total = Report::default();
        for seed in 0..400 {
            total.add(&check(&Scenario::from_seed(seed, 250)));
        }
        assert!(total.steps >= 100_000, "{total}");
        // A load that never comes to these would test nothing.
        let events = [
            ("refused", total.refused),
            ("stopped", total.stopped),
            ("reached_limit", total.reached_limit),
            ("aborted", total.aborted),
            ("preemptions", total.preemptions),
            ("accepted_drafts", total.accepted_drafts),
            ("discarded_rows", total.discarded_rows),
        ];
        for (event, count) in events {
            assert!(count >= 1000, "only {count} {event}: {total}");
        }
    }

    #[test]
    fn a_seed_replays_exactly() {
        let scenario = Scenario::from_seed(7, 300);
        let (first, again) = (check(&scenario), check(&scenario));
        assert_eq!(first, again);
        assert_ne!(first.trace, check(&Scenario::from_seed(8, 300)).trace);
    }

    #[test]
    fn a_panic_inside_is_a_failure_with_its_seed() {
        let mut scenario = Scenario::from_seed(3, 100);
        scenario.num_priorities = 0;
        let failure = run(&scenario).unwrap_err();
        assert_eq!(failure.seed, 3);
        assert!(failure.what.starts_with("panic: "), "{failure}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        /// Like the seeds, but proptest looks for the smallest machine that fails.
        #[test]
        fn no_machine_breaks_a_rule(
            seed: u64,
            (block_size, max_num_seqs, more_tokens) in (1_usize..9, 1_usize..9, 0_usize..40),
            (max_model_len, num_blocks, max_queued) in (2_usize..40, 1_usize..60, 1_usize..12),
            (depth, max_drafts, headroom_tokens) in (1_usize..=2, 0_usize..5, 0_usize..10),
            (arrival_percent, abort_percent, tight_percent) in (1_usize..60, 0_usize..10, 0_usize..20),
        ) {
            let config = crate::SchedConfig {
                block_size,
                num_blocks,
                max_num_seqs,
                max_num_batched_tokens: max_num_seqs + more_tokens,
                max_model_len,
                max_queued,
                headroom_tokens,
                depth,
                prefix_cache: None,
            };
            let scenario = Scenario {
                config,
                max_drafts,
                arrival_percent,
                abort_percent,
                tight_percent,
                ..Scenario::from_seed(seed, 100)
            };
            let result = run(&scenario);
            prop_assert!(result.is_ok(), "{result:?}");
        }
    }
}
