//! The rules that a simulated run must keep, apart from what the device itself notices. Knows the run's bookkeeping;
//! changes nothing of the scheduler.

use r1_core::{FinishReason, SeqId};

use super::{Deadline, Simulation, ensure};
use crate::{Finished, Limits, Plan, Sequence};

impl Simulation<'_> {
    /// Compares what a sequence got with what it would have got alone.
    pub(super) fn check_finished(&mut self, finished: &Finished, aborted: bool) -> Result<(), String> {
        let seq = finished.seq;
        let client = self.clients.remove(&seq).ok_or_else(|| format!("sequence {seq} reported twice"))?;
        let (tokens, reason) = client.ideal();
        ensure(finished.prompt_len == client.prompt.len(), || format!("sequence {seq}: prompt length"))?;
        ensure(finished.output() == client.streamed, || {
            format!("sequence {seq}: streamed and finished differ")
        })?;
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

    /// Budgets, order of service, and that the first sequence is not left out for long.
    pub(super) fn check_plan(&mut self, chosen: &Plan, limits: &Limits, tight: bool) -> Result<(), String> {
        let of = |seq: SeqId| (self.clients[&seq].priority, self.clients[&seq].arrival);
        ensure(chosen.num_tokens() <= limits.max_num_batched_tokens, || format!("over budget: {chosen:?}"))?;
        ensure(chosen.num_seqs() <= limits.max_num_seqs, || format!("too many rows: {chosen:?}"))?;
        let decode: Vec<_> = chosen.decode.iter().map(|row| of(row.seq)).collect();
        let prefill: Vec<_> = chosen.prefill.iter().map(|chunk| of(chunk.seq)).collect();
        ensure(decode.is_sorted() && prefill.is_sorted(), || format!("out of order: {chosen:?}"))?;
        for row in &chosen.decode {
            ensure(row.num_drafts <= limits.num_drafts, || format!("too many drafts: {row:?}"))?;
            let end = row.start + 1 + row.num_drafts;
            ensure(end < self.clients[&row.seq].max_len, || format!("may draw past its limit: {row:?}"))?;
        }
        self.check_preempt(chosen)?;
        for waiting in self.state.waiting() {
            let admitted = |seq: SeqId| chosen.prefill.iter().any(|chunk| chunk.seq == seq);
            let skipped = !admitted(waiting.id())
                && self.state.waiting().any(|seq| of(seq.id()) > of(waiting.id()) && admitted(seq.id()));
            ensure(!skipped, || format!("sequence {} was passed over: {chosen:?}", waiting.id()))?;
        }
        let planned = |seq: SeqId| {
            chosen.decode.iter().any(|row| row.seq == seq)
                || chosen.prefill.iter().any(|chunk| chunk.seq == seq)
        };
        let idle = |seq: &&Sequence| seq.len_upper_bound() < seq.max_len() && !planned(seq.id());
        if let Some(seq) = self.state.running().find(idle) {
            // Room for a block more per sequence, and yet one is left out.
            let stats = self.state.stats();
            let has_room = chosen.num_tokens() < limits.max_num_batched_tokens
                && chosen.num_seqs() < limits.max_num_seqs
                && stats.blocks_free >= stats.running * (2 + limits.num_drafts)
                && self.in_flight.len() < self.scenario.config.depth;
            ensure(!has_room, || format!("sequence {} left out for no reason: {chosen:?}", seq.id()))?;
        }
        // A waiting sequence of a better priority may take the budget of a running prefill.
        let waiting = self.state.waiting().next().map(|seq| of(seq.id()));
        let first =
            self.state.running().next().filter(|seq| waiting.is_none_or(|waits| of(seq.id()) < waits));
        let full = self.in_flight.len() == self.scenario.config.depth;
        match first {
            Some(seq) if !seq.is_in_flight() && !planned(seq.id()) && !full && !tight => self.left_out += 1,
            Some(seq) if full || tight && !planned(seq.id()) => {}
            _ => self.left_out = 0,
        }
        // One step ahead, a block may have to come out of a step in flight, and out of the one after it.
        let most = 2 * (self.scenario.config.depth - 1);
        ensure(self.left_out <= most, || format!("{:?} left out of {} plans", first, self.left_out))
    }

    /// Those preempted are the last of the running, but for some that are kept out of the step, and nobody is admitted
    /// to their blocks.
    fn check_preempt(&self, chosen: &Plan) -> Result<(), String> {
        if chosen.preempt.is_empty() {
            return Ok(());
        }
        let is_victim = |seq: &&Sequence| chosen.preempt.contains(&seq.id());
        let mut from_first_victim = self.state.running().skip_while(|seq| !is_victim(seq));
        let stays = from_first_victim.find(|seq| {
            let mut rows =
                chosen.decode.iter().map(|row| row.seq).chain(chosen.prefill.iter().map(|row| row.seq));
            !is_victim(seq) && rows.any(|row| row == seq.id())
        });
        ensure(stays.is_none(), || format!("{stays:?} runs behind a preempted sequence: {chosen:?}"))?;
        let admitted = chosen.prefill.iter().find(|row| self.state.waiting().any(|seq| seq.id() == row.seq));
        ensure(admitted.is_none(), || format!("{admitted:?} is admitted to preempted blocks: {chosen:?}"))
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
                let steps =
                    (ahead + own + 8) * self.scenario.config.depth * if self.tightens() { 8 } else { 1 };
                self.deadline = Some(Deadline { seq, step: now + steps as u64 });
                Ok(())
            }
        }
    }

    fn tightens(&self) -> bool {
        self.scenario.tight_percent > 0
    }
}
