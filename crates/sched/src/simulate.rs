//! A seeded simulator: random load on a tiny machine, every invariant checked on every commit, and every finished
//! sequence compared with the run it would have had alone. A seed replays its run exactly.
//!
//! Checked: blocks are conserved and counted once per table; nobody writes to a block that another table holds, and a
//! block that is shared holds its readers' own history; tables only grow while a sequence runs; rows stay within budgets
//! and limits, in order of service but for short prefills that overtake a long one within its half; nobody is admitted
//! past a sequence that does not fit, and only a better priority takes a running sequence's place; nobody runs ahead of
//! the host who may not, nor while it is paused, and a row that drew nothing costs nothing but time; the logits of a prompt come whole, once, and within their rows; no token is lost, doubled or reordered, whatever was cached; after a failed step nothing of it
//! is found; every sequence is reported once, for the right reason; the first sequence in order of service ends within a
//! bound, and if it runs it is never left out of more than two plans.
//!
//! Knows the scheduler from outside only, and stands where the engine and the device would.

mod checks;
mod device;
mod load;
mod rng;
mod scenario;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use r1_core::{FinishReason, SeqId, TokenId};

use crate::{Limits, Outcome, Plan, Sequence, State, StepId, begin, commit, fail, plan_into};
use device::{Device, root};
use load::{Client, Prompts};
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
    /// Failures of the device, each of one step or two.
    pub failures: u64,
    /// Known tokens of sequences that were admitted for the first time with the prefix cache on.
    pub queried_tokens: u64,
    /// How many of them the prefix cache had.
    pub hit_tokens: u64,
    /// Tokens that preempted sequences found again.
    pub found_again_tokens: u64,
    /// Sequences that a better priority's admission preempted.
    pub gave_way: u64,
    /// Chunks that overtook a long one.
    pub overtakes: u64,
    /// Rows that drew nothing.
    pub undrawn: u64,
    /// Times a sequence was paused.
    pub pauses: u64,
    /// Rows of logits of prompts, beyond those that drew.
    pub prompt_logits: u64,
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
        self.failures += other.failures;
        self.queried_tokens += other.queried_tokens;
        self.hit_tokens += other.hit_tokens;
        self.found_again_tokens += other.found_again_tokens;
        self.gave_way += other.gave_way;
        self.overtakes += other.overtakes;
        self.undrawn += other.undrawn;
        self.pauses += other.pauses;
        self.prompt_logits += other.prompt_logits;
        self.trace = mix(self.trace.rotate_left(1) ^ other.trace);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} steps: {} sequences added, {} refused; {} stopped, {} at their limit, {} aborted; {} preemptions; \
             {} tokens prefilled, {} generated, {} of them accepted drafts; {} rows discarded; {} failures; \
             {} of {} tokens hit in the prefix cache, {} found again; {} gave way; {} overtook; {} rows drew nothing, {} \
             pauses; {} logits of prompts; trace {:016x}",
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
            self.failures,
            self.hit_tokens,
            self.queried_tokens,
            self.found_again_tokens,
            self.gave_way,
            self.overtakes,
            self.undrawn,
            self.pauses,
            self.prompt_logits,
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

/// One row in flight.
struct Row {
    seq: SeqId,
    max_tokens: usize,
    drawn: Vec<TokenId>,
    /// Positions of the prompt whose logits it gives.
    logits: Range<usize>,
}

/// One step in flight.
struct InFlight {
    id: StepId,
    rows: Vec<Row>,
    /// Slots of the KV cache that it writes.
    written: Vec<usize>,
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
    prompts: Prompts,
    in_flight: VecDeque<InFlight>,
    /// Used again for every step, as an engine would.
    chosen: Plan,
    /// By running sequence: tokens whose prefill has begun.
    prefilled: BTreeMap<SeqId, usize>,
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
            prompts: Prompts::new(scenario),
            in_flight: VecDeque::new(),
            chosen: Plan::default(),
            prefilled: BTreeMap::new(),
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
            if self.rng.percent(self.scenario.flush_percent) {
                self.state.flush_prefix_cache();
                self.state.audit();
            }
            self.resume();
            // An engine commits when the device is done, which may be before or after it has planned ahead.
            let began = !self.rng.percent(20) && self.begin()?;
            if !began && !self.in_flight.is_empty() {
                self.commit()?;
            }
        }
        ensure(self.clients.is_empty(), || format!("sequences never reported: {:?}", self.clients.keys()))?;
        let stats = self.state.stats();
        let all = stats.blocks_free + stats.blocks_cached == stats.blocks_total && stats.blocks_used == 0;
        ensure(all, || format!("idle, but {stats:?}"))?;
        let counted = (stats.prefix_queries_tokens, stats.prefix_hits_tokens);
        let expect = (self.report.queried_tokens, self.report.hit_tokens);
        ensure(counted == expect, || format!("{expect:?} tokens queried and hit, but {stats:?}"))?;
        self.state.flush_prefix_cache();
        self.state.audit();
        let stats = self.state.stats();
        ensure(stats.blocks_free == stats.blocks_total, || format!("flushed, but {stats:?}"))
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
        self.forget(&[id]);
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
            limits.max_prompt_logits /= 2;
        }
        let mut chosen = std::mem::take(&mut self.chosen);
        plan_into(&self.state, &limits, &mut chosen);
        let began = self.begin_plan(&chosen, &limits, tight);
        self.chosen = chosen;
        began
    }

    fn begin_plan(&mut self, chosen: &Plan, limits: &Limits, tight: bool) -> Result<bool, String> {
        self.check_plan(chosen, limits, tight)?;
        if chosen.is_empty() {
            let paused = self.state.running().any(Sequence::is_paused);
            ensure(!self.in_flight.is_empty() || self.state.is_idle() || paused, || {
                "deadlock: nothing to run".to_owned()
            })?;
            return Ok(false);
        }
        let is_new = |seq: &SeqId| self.state.waiting().any(|waits| waits.id() == *seq);
        let admitted: Vec<_> = chosen.prefill.iter().map(|chunk| chunk.seq).filter(is_new).collect();
        let id = begin(&mut self.state, chosen);
        self.state.audit();
        self.trace(chosen);
        for &seq in &chosen.preempt {
            self.report.preemptions += 1;
            self.report.gave_way += u64::from(!admitted.is_empty());
            self.prefilled.remove(&seq);
            let client = &self.clients[&seq];
            let kept = [client.prompt.as_slice(), &client.streamed].concat();
            ensure(self.state.tokens(seq) == kept, || format!("preempted sequence {seq} lost tokens"))?;
            ensure(self.device.remove(seq) == Some(kept), || format!("sequence {seq} preempted in flight"))?;
        }
        self.check_set_aside(chosen, &admitted)?;
        let rows = self.run_on_device(chosen, &admitted)?;
        let written = self.device.end_step();
        self.in_flight.push_back(InFlight { id, rows, written });
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
    fn run_on_device(&mut self, chosen: &Plan, admitted: &[SeqId]) -> Result<Vec<Row>, String> {
        let mut rows = Vec::new();
        // All tables first: what one row takes must not be another's.
        let chunks = chosen.prefill.iter().map(|chunk| (chunk.seq, chunk.start));
        for (seq, start) in chosen.decode.iter().map(|row| (row.seq, 0)).chain(chunks) {
            let found = if admitted.contains(&seq) { start } else { 0 };
            let root = root(self.clients[&seq].salt.as_deref());
            self.device.bind(seq, root, self.state.block_table(seq), self.state.tokens(seq), found)?;
        }
        for chunk in &chosen.prefill {
            if admitted.contains(&chunk.seq) {
                self.count_hit(chunk.seq, chunk.start)?;
            }
            let overtaken = chosen.prefill.last().is_some_and(|last| !last.samples && last.seq < chunk.seq);
            let same = |last: SeqId| self.clients[&last].priority == self.clients[&chunk.seq].priority;
            self.report.overtakes +=
                u64::from(overtaken && chosen.prefill.last().is_some_and(|last| same(last.seq)));
            self.prefilled.insert(chunk.seq, chunk.start + chunk.len);
        }
        for &row in &chosen.decode {
            let rejected = self.rejected_in_flight(row.seq);
            let draws = self.draws(row.seq);
            let drawn = self.device.decode(row, rejected, draws, &mut self.rng)?;
            rows.push(Row { seq: row.seq, max_tokens: 1 + row.num_drafts, drawn, logits: 0..0 });
        }
        for &chunk in &chosen.prefill {
            let draws = !chunk.samples || self.draws(chunk.seq);
            let drawn = self.device.prefill(chunk, self.state.tokens(chunk.seq), draws)?;
            self.report.prefilled_tokens += chunk.len as u64;
            let seq = self.state.sequence(chunk.seq).expect("planned sequences are live");
            let logits = seq.prompt_logits(chunk.start, chunk.len);
            rows.push(Row { seq: chunk.seq, max_tokens: usize::from(chunk.samples), drawn, logits });
        }
        Ok(rows)
    }

    /// Whether a row that samples draws something.
    fn draws(&mut self, seq: SeqId) -> bool {
        let percent = self.scenario.undrawn_percent;
        percent == 0 || self.clients[&seq].run_ahead || !self.rng.percent(percent)
    }

    /// Lets some paused sequences go on.
    fn resume(&mut self) {
        let paused: Vec<_> =
            self.clients.iter().filter(|(_, client)| client.paused).map(|(&seq, _)| seq).collect();
        for seq in paused {
            if self.rng.percent(50) {
                self.state.resume(seq);
                self.clients.get_mut(&seq).expect("it was listed above").paused = false;
            }
        }
    }

    /// What an admitted sequence found in the prefix cache, as the scheduler must count it.
    fn count_hit(&mut self, seq: SeqId, start: usize) -> Result<(), String> {
        let client = self.clients.get_mut(&seq).expect("planned sequences are live");
        let on = self.scenario.config.prefix_cache.is_some();
        if client.first_start.is_none() {
            client.first_start = Some(start);
            self.report.queried_tokens += if on { client.prompt.len() as u64 } else { 0 };
            self.report.hit_tokens += start as u64;
        } else {
            self.report.found_again_tokens += start as u64;
        }
        let cached = self.state.sequence(seq).map(Sequence::cached_tokens);
        ensure(cached == client.first_start, || {
            format!("sequence {seq}: first hit {:?}, reported {cached:?}", client.first_start)
        })
    }

    /// Drafts of a sequence that steps in flight have rejected, which the host does not know yet.
    fn rejected_in_flight(&self, seq: SeqId) -> usize {
        let rows = self.in_flight.iter().flat_map(|step| &step.rows).filter(|row| row.seq == seq);
        rows.map(|row| row.max_tokens - row.drawn.len()).sum()
    }

    /// Stands for the engine at the end of a step: finds stop tokens, streams, commits.
    fn commit(&mut self) -> Result<(), String> {
        if self.rng.percent(self.scenario.fail_percent) {
            return self.fail();
        }
        let InFlight { id, rows, .. } = self.in_flight.pop_front().expect("the caller looked");
        let ids: Vec<_> = rows.iter().map(|row| row.seq).collect();
        let mut outcomes: Vec<(SeqId, Vec<TokenId>, Option<FinishReason>)> = Vec::new();
        let mut undrawn = Vec::new();
        for row in rows {
            let Some(client) = self.clients.get_mut(&row.seq) else {
                self.report.discarded_rows += 1;
                if self.rng.percent(50) {
                    outcomes.push((row.seq, row.drawn, None));
                }
                continue;
            };
            if !row.logits.is_empty() {
                let expected = client.num_logits;
                ensure(client.prompt_logits && row.logits.start == expected, || {
                    format!("sequence {}: logits {:?}, {expected} are there", row.seq, row.logits)
                })?;
                client.num_logits = row.logits.end;
                self.report.prompt_logits += row.logits.len() as u64;
            }
            let mut tokens = row.drawn;
            let all_there = !client.prompt_logits || client.num_logits == client.prompt.len() - 1;
            ensure(tokens.is_empty() || all_there, || {
                format!("sequence {} draws with {} logits of its prompt", row.seq, client.num_logits)
            })?;
            if row.max_tokens > 0 && tokens.is_empty() {
                undrawn.push(row.seq);
            }
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
        let finished = commit(&mut self.state, id, outcomes);
        self.state.audit();
        for seq in undrawn {
            self.report.undrawn += 1;
            if self.rng.percent(50) {
                self.report.pauses += 1;
                self.state.pause(seq);
                self.clients.get_mut(&seq).expect("it has drawn nothing, so it lives").paused = true;
            }
        }
        self.report.steps += 1;
        for finished in &finished {
            self.check_finished(finished, false)?;
        }
        self.forget(&ids);
        self.check_deadline()
    }

    /// The device fails: nothing that the steps in flight write is worth anything.
    fn fail(&mut self) -> Result<(), String> {
        let oldest = self.in_flight.front().expect("the caller looked").id;
        let ended = fail(&mut self.state, oldest);
        self.state.audit();
        self.report.failures += 1;
        let steps = std::mem::take(&mut self.in_flight);
        self.report.steps += steps.len() as u64;
        let mut expect: Vec<_> = steps.iter().flat_map(|step| &step.rows).map(|row| row.seq).collect();
        expect.sort_unstable();
        expect.dedup();
        let ids = expect.clone();
        expect.retain(|seq| self.clients.contains_key(seq));
        let mut found: Vec<_> = ended.iter().map(|finished| finished.seq).collect();
        found.sort_unstable();
        ensure(found == expect, || format!("failed: {expect:?} were in flight, but {found:?} ended"))?;
        ensure(self.state.steps_in_flight() == 0, || "steps in flight after a failure".to_owned())?;
        for finished in &ended {
            self.check_finished(finished, true)?;
        }
        for step in &steps {
            self.device.spoil(&step.written);
        }
        self.forget(&ids);
        self.check_deadline()
    }

    /// Sequences that the scheduler no longer has are gone from the device, too.
    fn forget(&mut self, ids: &[SeqId]) {
        for &seq in ids {
            if self.state.sequence(seq).is_none() {
                self.device.remove(seq);
                self.prefilled.remove(&seq);
            }
        }
    }
}

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

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
            ("failures", total.failures),
            ("hit_tokens", total.hit_tokens),
            ("found_again_tokens", total.found_again_tokens),
            ("gave_way", total.gave_way),
            ("overtakes", total.overtakes),
            ("undrawn", total.undrawn),
            ("pauses", total.pauses),
            ("prompt_logits", total.prompt_logits),
        ];
        for (event, count) in events {
            assert!(count >= 500, "only {count} {event}: {total}");
        }
    }

    /// Rare plans that the checks once took for wrong: somebody gives way for a sequence that overtakes.
    #[test]
    fn seeds_that_once_failed_hold() {
        for seed in [103_770, 175_859, 551_464] {
            check(&Scenario {
                undrawn_percent: 0,
                prompt_logits_percent: 0,
                ..Scenario::from_seed(seed, 200)
            });
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
        #![proptest_config(ProptestConfig {
            cases: 200,
            failure_persistence: None,
            // The same machines in every run: what is rarer is looked for by the binary, over a million seeds.
            rng_seed: RngSeed::Fixed(1),
            ..ProptestConfig::default()
        })]

        /// Like the seeds, but proptest looks for the smallest machine that fails.
        #[test]
        fn no_machine_breaks_a_rule(
            seed: u64,
            (block_size, max_num_seqs, more_tokens) in (1_usize..9, 1_usize..9, 0_usize..40),
            (max_model_len, num_blocks, max_queued) in (2_usize..40, 1_usize..60, 1_usize..12),
            (depth, max_drafts, headroom_tokens) in (1_usize..=2, 0_usize..5, 0_usize..10),
            (arrival_percent, abort_percent, tight_percent) in (1_usize..60, 0_usize..10, 0_usize..20),
            (cached, fail_percent) in (any::<bool>(), 0_usize..5),
            (run_ahead_percent, undrawn_percent) in (0_usize..=100, 0_usize..70),
            (max_prompt_logits, prompt_logits_percent) in (0_usize..20, 0_usize..=100),
        ) {
            let config = crate::SchedConfig {
                block_size,
                num_blocks,
                max_num_seqs,
                max_num_batched_tokens: max_num_seqs + more_tokens,
                max_model_len,
                max_prompt_logits,
                max_queued,
                headroom_tokens,
                depth,
                prefix_cache: cached.then_some(crate::PrefixKey::new([seed, 0])),
            };
            let scenario = Scenario {
                config,
                max_drafts,
                arrival_percent,
                abort_percent,
                fail_percent,
                tight_percent,
                run_ahead_percent,
                undrawn_percent,
                prompt_logits_percent,
                ..Scenario::from_seed(seed, 100)
            };
            let result = run(&scenario);
            prop_assert!(result.is_ok(), "{result:?}");
        }
    }
}
