//! The rules that a simulated run must keep, apart from what the device itself notices. Knows the run's bookkeeping;
//! changes nothing of the scheduler.

use r1_core::{FinishReason, SeqId};

use super::{Deadline, Simulation, ensure};
use crate::{Finished, Limits, Plan, PrefillChunk, Sequence};

/// Place in the order of service.
type Turn = (i32, u64);

impl Simulation<'_> {
    fn turn(&self, seq: SeqId) -> Turn {
        (self.clients[&seq].priority, self.clients[&seq].arrival)
    }

    /// Compares what a sequence got with what it would have got alone.
    pub(super) fn check_finished(&mut self, finished: &Finished, aborted: bool) -> Result<(), String> {
        let seq = finished.seq;
        let client = self.clients.remove(&seq).ok_or_else(|| format!("sequence {seq} reported twice"))?;
        let (tokens, reason) = client.ideal();
        ensure(finished.prompt_len == client.prompt.len(), || format!("sequence {seq}: prompt length"))?;
        ensure(finished.output() == client.streamed, || {
            format!("sequence {seq}: streamed and finished differ")
        })?;
        self.prompts.ended(&finished.tokens, client.salt);
        if aborted {
            self.report.aborted += 1;
            ensure(finished.reason == FinishReason::Abort, || format!("aborted, but {finished:?}"))?;
            return ensure(tokens.starts_with(&finished.tokens), || {
                format!("ideal {tokens:?}, but {finished:?}")
            });
        }
        match reason {
            FinishReason::Length => self.report.reached_limit += 1,
            _ => self.report.stopped += 1,
        }
        let same = finished.tokens == tokens && finished.reason == reason;
        ensure(same, || format!("ideal {tokens:?} {reason:?}, but {finished:?}"))
    }

    /// Budgets, order of service, and that nobody is left out for long or for nothing.
    pub(super) fn check_plan(&mut self, chosen: &Plan, limits: &Limits, tight: bool) -> Result<(), String> {
        ensure(chosen.num_tokens() <= limits.max_num_batched_tokens, || format!("over budget: {chosen:?}"))?;
        ensure(chosen.num_seqs() <= limits.max_num_seqs, || format!("too many rows: {chosen:?}"))?;
        ensure(chosen.decode.is_sorted_by_key(|row| self.turn(row.seq)), || {
            format!("out of order: {chosen:?}")
        })?;
        for row in &chosen.decode {
            let client = &self.clients[&row.seq];
            ensure(row.num_drafts <= limits.num_drafts, || format!("too many drafts: {row:?}"))?;
            let end = row.start + 1 + row.num_drafts;
            ensure(end < client.max_len, || format!("may draw past its limit: {row:?}"))?;
            let ahead = row.num_drafts > 0 || self.has_token_in_flight(row.seq);
            ensure(client.run_ahead || !ahead, || format!("runs ahead of the host: {row:?}"))?;
            ensure(!client.paused, || format!("runs though it is paused: {row:?}"))?;
        }
        let rows = chosen.prefill.iter().map(|chunk| {
            let seq = self.state.sequence(chunk.seq).expect("planned sequences are live");
            seq.prompt_logits(chunk.start, chunk.len).len() + usize::from(chunk.samples)
        });
        let more: usize = rows.map(|rows| rows.saturating_sub(1)).sum();
        ensure(more <= limits.max_prompt_logits, || format!("{more} rows of logits more: {chosen:?}"))?;
        self.check_preempt(chosen)?;
        self.check_gives_way(chosen, limits, tight)?;
        self.check_prefill(chosen, limits)?;
        self.check_left_out(chosen, limits, tight)
    }

    fn has_token_in_flight(&self, seq: SeqId) -> bool {
        self.in_flight.iter().flat_map(|step| &step.rows).any(|row| row.seq == seq && row.max_tokens > 0)
    }

    /// Free blocks, and cached ones, are enough for every running sequence to grow.
    fn has_blocks(&self, limits: &Limits) -> bool {
        let stats = self.state.stats();
        stats.blocks_free + stats.blocks_cached >= stats.running * (2 + limits.num_drafts)
    }

    /// Chunks are in order of service, but for short ones that overtake a long one in its half of the budget; nobody
    /// who would fit there is left behind; nobody is admitted past a sequence that does not fit.
    fn check_prefill(&self, chosen: &Plan, limits: &Limits) -> Result<(), String> {
        // Prompts whose logits are wanted are cut anywhere, and leave tokens to those behind them.
        let is_cut = |chunk: &PrefillChunk| !chunk.samples && self.clients[&chunk.seq].prompt_logits;
        if chosen.prefill.iter().any(is_cut) {
            return Ok(());
        }
        // A chunk that does not finish its prompt takes what is left, so it is the last. One that was overtaken may
        // finish after all when those that overtook it have made somebody give way, whose row had a token.
        let sorted = chosen.prefill.is_sorted_by_key(|chunk| self.turn(chunk.seq));
        let (long, in_order) = match chosen.prefill.split_last() {
            Some((long, rest)) if !long.samples || !sorted && self.gives_way(chosen) => (Some(long), rest),
            _ => (None, chosen.prefill.as_slice()),
        };
        let all_sample = in_order.iter().all(|chunk| chunk.samples);
        ensure(all_sample, || format!("an unfinished chunk is not the last: {chosen:?}"))?;
        ensure(in_order.is_sorted_by_key(|chunk| self.turn(chunk.seq)), || {
            format!("out of order: {chosen:?}")
        })?;
        for chunk in in_order.iter().chain(long) {
            if let Some(seq) = self.state.waiting().find(|seq| seq.id() == chunk.seq) {
                self.check_start(chunk, seq)?;
            }
        }
        let Some(long) = long else { return self.check_passed(chosen, None) };
        let turn = self.turn(long.seq);
        let budget =
            limits.max_num_batched_tokens - chosen.decode.iter().map(|row| 1 + row.num_drafts).sum::<usize>();
        let overtaking: Vec<_> = in_order.iter().filter(|chunk| self.turn(chunk.seq) > turn).collect();
        let used: usize = overtaking.iter().map(|chunk| chunk.len).sum();
        ensure(overtaking.iter().all(|chunk| self.turn(chunk.seq).0 == turn.0), || {
            format!("overtaken by another priority: {chosen:?}")
        })?;
        ensure(used <= budget / 2, || format!("overtaken by more than half the budget: {chosen:?}"))?;
        ensure(long.samples || chosen.num_tokens() == limits.max_num_batched_tokens, || {
            format!("an unfinished chunk leaves tokens: {chosen:?}")
        })?;
        let left = (budget / 2).min(long.len + used - 1) - used;
        self.check_passed(chosen, Some((turn, left)))?;
        let short = |seq: &&Sequence| {
            seq.is_prefilling()
                && !self.clients[&seq.id()].prompt_logits
                && self.turn(seq.id()) > turn
                && seq.priority() == turn.0
                && seq.tokens().len() - self.prefilled(seq.id()) <= left
                && chosen.prefill.iter().all(|chunk| chunk.seq != seq.id())
        };
        let room = chosen.num_seqs() < limits.max_num_seqs && self.has_blocks(limits);
        if let Some(seq) = self.state.running().find(short).filter(|_| room) {
            return Err(format!("short sequence {} stays behind a long one: {chosen:?}", seq.id()));
        }
        // The same for the first that is not admitted, with a seat and blocks for it and for all.
        let is_admitted = |seq: &&Sequence| chosen.prefill.iter().any(|chunk| chunk.seq == seq.id());
        let admitted: Vec<_> = self.state.waiting().filter(is_admitted).collect();
        let Some(waits) = self.state.waiting().find(|seq| !is_admitted(seq)) else { return Ok(()) };
        let (config, stats) = (&self.scenario.config, self.state.stats());
        let known = |seq: &Sequence| config.blocks_for(seq.tokens().len());
        let num_seqs = stats.running + admitted.len() + 1;
        let blocks = stats.running * (2 + limits.num_drafts)
            + admitted.iter().map(|seq| known(seq)).sum::<usize>()
            + known(waits)
            + config.blocks_for(config.headroom_tokens * num_seqs);
        let due = room
            && !self.gives_way(chosen)
            && waits.priority() == turn.0
            && !self.clients[&waits.id()].prompt_logits
            && self.turn(waits.id()) > turn
            && waits.tokens().len() <= left
            && num_seqs + stats.draining <= config.max_num_seqs
            && stats.blocks_free + stats.blocks_cached >= blocks;
        ensure(!due, || format!("short sequence {} waits for a long one: {chosen:?}", waits.id()))
    }

    /// Somebody loses its blocks, or sits out this step to lose them in the next: for a sequence further behind, maybe, and
    /// then the tokens of its row come free when the short ones before that have been looked at.
    fn gives_way(&self, chosen: &Plan) -> bool {
        let sits_out =
            |seq: &Sequence| seq.may_decode() && chosen.decode.iter().all(|row| row.seq != seq.id());
        !chosen.preempt.is_empty() || self.state.running().any(sits_out)
    }

    /// Tokens of a sequence whose prefill has begun.
    fn prefilled(&self, seq: SeqId) -> usize {
        self.prefilled.get(&seq).copied().unwrap_or(0)
    }

    /// The first chunk of a waiting sequence: what is found are whole blocks, and never the last token.
    fn check_start(&self, chunk: &PrefillChunk, seq: &Sequence) -> Result<(), String> {
        let config = &self.scenario.config;
        let whole = chunk.start.is_multiple_of(config.block_size) && chunk.start < seq.tokens().len();
        let on = chunk.start == 0 || config.prefix_cache.is_some();
        ensure(whole && on, || format!("{chunk:?} of {} tokens", seq.tokens().len()))
    }

    /// Waiting sequences are admitted in order of service. Passed over are only those of the long one's priority that do
    /// not fit in the `left` tokens that may overtake it.
    fn check_passed(&self, chosen: &Plan, long: Option<(Turn, usize)>) -> Result<(), String> {
        let is_admitted = |seq: &Sequence| chosen.prefill.iter().any(|chunk| chunk.seq == seq.id());
        let last = self.state.waiting().rfind(|&seq| is_admitted(seq)).map(|seq| self.turn(seq.id()));
        let passed =
            |seq: &&Sequence| !is_admitted(seq) && last.is_some_and(|last| self.turn(seq.id()) < last);
        for seq in self.state.waiting().filter(passed) {
            let allowed = long.is_some_and(|(turn, left)| {
                let is_long = seq.tokens().len() > left
                    || self.clients[&seq.id()].prompt_logits
                    || self.gives_way(chosen);
                seq.priority() == turn.0 && self.turn(seq.id()) > turn && is_long
            });
            ensure(allowed, || format!("sequence {} was passed over: {chosen:?}", seq.id()))?;
        }
        Ok(())
    }

    /// After a plan has been begun: who was passed over because of its length still fits.
    pub(super) fn check_set_aside(&self, chosen: &Plan, admitted: &[SeqId]) -> Result<(), String> {
        let config = &self.scenario.config;
        let last = admitted.iter().map(|&seq| self.turn(seq)).max();
        let passed = |seq: &&Sequence| last.is_some_and(|last| self.turn(seq.id()) < last);
        // Those that the plan preempted are back in the queue, too, and were not passed but gave way.
        let passed = self.state.waiting().filter(passed).find(|seq| !chosen.preempt.contains(&seq.id()));
        let Some(seq) = passed else { return Ok(()) };
        let stats = self.state.stats();
        let seat = stats.running + stats.draining < config.max_num_seqs;
        let blocks =
            config.prefix_cache.is_some() || config.blocks_for(seq.tokens().len()) <= stats.blocks_free;
        ensure(seat && blocks, || format!("no room is left for {}, which was passed: {chosen:?}", seq.id()))
    }

    fn check_left_out(&mut self, chosen: &Plan, limits: &Limits, tight: bool) -> Result<(), String> {
        let planned = |seq: SeqId| {
            chosen.decode.iter().any(|row| row.seq == seq)
                || chosen.prefill.iter().any(|chunk| chunk.seq == seq)
        };
        let first_waiting = self.state.waiting().next().map(|seq| self.turn(seq.id()));
        let idle = |seq: &&Sequence| {
            seq.len_upper_bound() < seq.max_len()
                && !planned(seq.id())
                && !seq.is_paused()
                && (self.clients[&seq.id()].run_ahead || !self.has_token_in_flight(seq.id()))
                // It may be giving way.
                && first_waiting.is_none_or(|waits| waits.0 >= seq.priority())
        };
        if let Some(seq) = self.state.running().find(idle) {
            // Room for a block more per sequence, and yet one is left out.
            let has_room = chosen.preempt.is_empty()
                && chosen.num_tokens() < limits.max_num_batched_tokens
                && chosen.num_seqs() < limits.max_num_seqs
                && self.has_blocks(limits)
                && self.in_flight.len() < self.scenario.config.depth;
            ensure(!has_room, || format!("sequence {} left out for no reason: {chosen:?}", seq.id()))?;
        }
        // A waiting sequence of a better priority may take the budget of a running prefill.
        let first = self
            .state
            .running()
            .next()
            .filter(|seq| first_waiting.is_none_or(|waits| self.turn(seq.id()) < waits));
        let full = self.in_flight.len() == self.scenario.config.depth;
        match first {
            Some(seq) if seq.is_paused() => self.left_out = 0,
            Some(seq) if !seq.is_in_flight() && !planned(seq.id()) && !full && !tight => self.left_out += 1,
            Some(seq) if full || tight && !planned(seq.id()) => {}
            _ => self.left_out = 0,
        }
        // One step ahead, a block may have to come out of a step in flight, and out of the one after it.
        let most = 2 * (self.scenario.config.depth - 1);
        ensure(self.left_out <= most, || format!("{:?} left out of {} plans", first, self.left_out))
    }

    /// Those preempted are the last of the running, but for some that are kept out of the step; a decode row needs their
    /// blocks, or somebody is admitted who is of a better priority than each of them.
    fn check_preempt(&self, chosen: &Plan) -> Result<(), String> {
        let Some(best) = chosen.preempt.iter().map(|&seq| self.turn(seq).0).min() else { return Ok(()) };
        let is_victim = |seq: &&Sequence| chosen.preempt.contains(&seq.id());
        let mut from_first_victim = self.state.running().skip_while(|seq| !is_victim(seq));
        let stays = from_first_victim.find(|seq| {
            let mut rows =
                chosen.decode.iter().map(|row| row.seq).chain(chosen.prefill.iter().map(|row| row.seq));
            !is_victim(seq) && rows.any(|row| row == seq.id())
        });
        ensure(stays.is_none(), || format!("{stays:?} runs behind a preempted sequence: {chosen:?}"))?;
        let is_admitted = |row: &&PrefillChunk| self.state.waiting().any(|seq| seq.id() == row.seq);
        let mut admitted = chosen.prefill.iter().filter(is_admitted).peekable();
        let any = admitted.peek().is_some();
        let equal = admitted.find(|row| self.turn(row.seq).0 >= best);
        ensure(equal.is_none(), || format!("{equal:?} is admitted to preempted blocks: {chosen:?}"))?;
        let block_size = self.scenario.config.block_size;
        let grows = chosen.decode.iter().any(|row| {
            let table = self.state.sequence(row.seq).map_or(0, |seq| seq.block_table().len());
            row.start >= table * block_size
        });
        // Or the row that needed them is itself left out, to give way to somebody better in the next step.
        let awaited = self.state.waiting().next().is_some_and(|seq| seq.priority() < best);
        ensure(any || grows || awaited, || format!("preempted for nobody: {chosen:?}"))
    }

    /// With blocks for all, no prefill in its way and nothing in flight, whoever waits and is better than the last running
    /// one is admitted: there is a seat, or it is given one.
    fn check_gives_way(&self, chosen: &Plan, limits: &Limits, tight: bool) -> Result<(), String> {
        let (Some(waits), Some(last)) = (self.state.waiting().next(), self.state.running().next_back())
        else {
            return Ok(());
        };
        let (config, stats) = (&self.scenario.config, self.state.stats());
        let headroom = config.headroom_tokens * (stats.running + 1);
        let blocks = config.blocks_for(waits.tokens().len())
            + config.blocks_for(headroom)
            + stats.running * (2 + limits.num_drafts);
        let due = waits.priority() < last.priority()
            && !tight
            && self.in_flight.is_empty()
            && stats.blocks_free + stats.blocks_cached >= blocks
            && !self.state.running().any(Sequence::is_prefilling);
        let admitted = chosen.prefill.iter().any(|chunk| chunk.seq == waits.id());
        ensure(!due || admitted, || format!("sequence {} waits for a worse priority: {chosen:?}", waits.id()))
    }

    /// The first sequence in order of service must end within as many steps as all that stand in its way need.
    pub(super) fn check_deadline(&mut self) -> Result<(), String> {
        let first = self.clients.iter().min_by_key(|(_, client)| (client.priority, client.arrival));
        let Some((&seq, _)) = first else {
            self.deadline = None;
            return Ok(());
        };
        let now = self.report.steps;
        match &self.deadline {
            Some(deadline) if deadline.seq == seq => ensure(now <= deadline.step, || {
                format!("sequence {seq} starves: due at step {}", deadline.step)
            }),
            _ => {
                // Each running sequence, one after the other: at worst a token per step, prefilled anew once.
                let ahead: usize = self.state.running().map(|seq| 2 * seq.max_len()).sum();
                let own = 2 * self.clients[&seq].max_len;
                let slow = self.tightens() || self.scenario.undrawn_percent > 0;
                let steps = (ahead + own + 8) * self.scenario.config.depth * if slow { 8 } else { 1 };
                self.deadline = Some(Deadline { seq, step: now + steps as u64 });
                Ok(())
            }
        }
    }

    fn tightens(&self) -> bool {
        self.scenario.tight_percent > 0
    }
}
