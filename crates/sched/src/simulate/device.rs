//! A device and a model that notice every mistake of a scheduler: a slot of the KV cache holds a hash of the whole
//! history up to its position, salt included, computed from the slot before it as attention would; every row reads its
//! whole context through its block table and compares it with its own history. A token lost, doubled, moved or
//! overwritten is noticed, and so is a block that is shared but holds anything else, or is written to by one sequence
//! while it is read by another. Knows nothing of the scheduler's state.

use std::collections::BTreeMap;

use r1_core::{BlockId, SeqId, TokenId};

use super::rng::{Rng, mix};
use crate::{Decode, PrefillChunk};

const VOCAB_SIZE: u64 = 1 << 16;

/// What stands before the first token of a sequence with this salt.
pub(super) fn root(salt: Option<&[u8]>) -> u64 {
    let length = salt.map_or(0, |salt| 1 + salt.len() as u64);
    salt.unwrap_or_default().iter().fold(mix(length), |hash, &byte| mix(hash ^ u64::from(byte)))
}

/// The history one token on.
pub(super) fn extend(history: u64, token: TokenId) -> u64 {
    mix(history ^ u64::from(token.0).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// The model: the token that follows a history.
pub(super) fn next_token(history: u64) -> TokenId {
    TokenId((mix(history) % VOCAB_SIZE) as u32)
}

/// What a slot of the KV cache holds: position, token, and the history up to it. `None`: nothing of worth.
type Slot = Option<(usize, TokenId, u64)>;

/// The device's side of a sequence, ahead of the host by the steps in flight.
struct OnDevice {
    root: u64,
    tokens: Vec<TokenId>,
    /// The history up to each token.
    histories: Vec<u64>,
    table: Vec<BlockId>,
    /// How long the table was before the present step.
    bound_before: usize,
}

impl OnDevice {
    fn push(&mut self, token: TokenId) {
        let before = self.histories.last().copied().unwrap_or(self.root);
        self.histories.push(extend(before, token));
        self.tokens.push(token);
    }
}

/// KV cache and last sampled tokens.
pub(super) struct Device {
    block_size: usize,
    slots: Vec<Slot>,
    /// By block: tables that have held it since before the present step.
    num_tables: Vec<u32>,
    /// By block: tables that it was added to in the present step.
    num_new: Vec<u32>,
    sequences: BTreeMap<SeqId, OnDevice>,
    /// Slots that the present step has written.
    written: Vec<usize>,
}

impl Device {
    pub(super) fn new(block_size: usize, num_blocks: usize) -> Self {
        Self {
            block_size,
            slots: vec![None; block_size * num_blocks],
            num_tables: vec![0; num_blocks],
            num_new: vec![0; num_blocks],
            sequences: BTreeMap::new(),
            written: Vec::new(),
        }
    }

    /// Forgets a sequence, and returns the tokens it had. Not during a step.
    pub(super) fn remove(&mut self, seq: SeqId) -> Option<Vec<TokenId>> {
        let on_device = self.sequences.remove(&seq)?;
        for block in on_device.table {
            self.num_tables[block.0 as usize] -= 1;
        }
        Some(on_device.tokens)
    }

    /// Takes the block table of a sequence's row in the present step. New blocks are its own alone and poisoned, but for
    /// those that end below `found` positions, which others may hold, too. `known` are the tokens that the host knows,
    /// for a sequence that the device does not.
    pub(super) fn bind(
        &mut self,
        seq: SeqId,
        root: u64,
        table: &[BlockId],
        known: &[TokenId],
        found: usize,
    ) -> Result<(), String> {
        let on_device = self.sequences.entry(seq).or_insert_with(|| {
            let (tokens, histories, table) = (Vec::new(), Vec::new(), Vec::new());
            let mut new = OnDevice { root, tokens, histories, table, bound_before: 0 };
            for &token in known {
                new.push(token);
            }
            new
        });
        let bound = on_device.table.len();
        if !table.starts_with(&on_device.table) {
            return Err(format!(
                "sequence {seq}: block table changed from {:?} to {table:?}",
                on_device.table
            ));
        }
        on_device.bound_before = bound;
        for (at, &block) in table.iter().enumerate().skip(bound) {
            let index = block.0 as usize;
            let is_shared = (at + 1) * self.block_size <= found;
            if !is_shared {
                let others = self.num_tables[index] + self.num_new[index];
                if others > 0 {
                    return Err(format!("sequence {seq} gets block {block}, which {others} tables hold"));
                }
                self.slots[index * self.block_size..(index + 1) * self.block_size].fill(None);
            }
            self.num_new[index] += 1;
            on_device.table.push(block);
        }
        Ok(())
    }

    /// Ends the present step, and returns the slots it has written.
    pub(super) fn end_step(&mut self) -> Vec<usize> {
        for (all, new) in self.num_tables.iter_mut().zip(&mut self.num_new) {
            *all += std::mem::take(new);
        }
        for on_device in self.sequences.values_mut() {
            on_device.bound_before = on_device.table.len();
        }
        std::mem::take(&mut self.written)
    }

    /// A step has failed: what it was to write is worth nothing.
    pub(super) fn spoil(&mut self, written: &[usize]) {
        for &slot in written {
            self.slots[slot] = None;
        }
    }

    /// Runs the last token and the drafts, of which a random number is right. `rejected` is how many drafts the steps
    /// in flight before this one have rejected. Returns the tokens drawn: none unless it `draws`.
    pub(super) fn decode(
        &mut self,
        row: Decode,
        rejected: usize,
        draws: bool,
        rng: &mut Rng,
    ) -> Result<Vec<TokenId>, String> {
        let Decode { seq, start, num_drafts } = row;
        let on_device = self.sequences.get_mut(&seq).ok_or_else(|| format!("sequence {seq} is not bound"))?;
        let position = on_device.tokens.len() - 1;
        if start != position + rejected {
            return Err(format!(
                "sequence {seq}: decode planned at {start}, but its last token is at {position} and {rejected} \
                 drafts in flight were rejected"
            ));
        }
        self.read(seq, 0, position)?;
        if !draws {
            self.write(seq, position, self.sequences[&seq].tokens[position])?;
            return Ok(Vec::new());
        }
        let num_drawn = rng.range(1, num_drafts + 1);
        let mut drawn = Vec::with_capacity(num_drawn);
        for ahead in 0..=num_drafts {
            let at = position + ahead;
            if ahead < num_drawn {
                let token = self.sequences[&seq].tokens[at];
                self.write(seq, at, token)?;
                let next = next_token(self.read(seq, at, at + 1)?);
                drawn.push(next);
                self.sequences.get_mut(&seq).expect("looked up above").push(next);
            } else {
                let wrong_draft = TokenId(VOCAB_SIZE as u32);
                self.write(seq, at, wrong_draft)?;
            }
        }
        Ok(drawn)
    }

    /// Runs known tokens. Returns the token drawn after them, if the chunk samples and `draws`.
    pub(super) fn prefill(
        &mut self,
        row: PrefillChunk,
        known: &[TokenId],
        draws: bool,
    ) -> Result<Vec<TokenId>, String> {
        let PrefillChunk { seq, start, len, samples } = row;
        let Some(chunk) = known.get(start..start + len) else {
            return Err(format!("sequence {seq}: chunk {start}+{len} of {} known tokens", known.len()));
        };
        for (ahead, &token) in chunk.iter().enumerate() {
            self.write(seq, start + ahead, token)?;
        }
        let history = self.read(seq, 0, start + len)?;
        if samples != (start + len == known.len()) {
            return Err(format!("sequence {seq}: samples is {samples} at {start}+{len} of {}", known.len()));
        }
        if !samples || !draws {
            return Ok(Vec::new());
        }
        let next = next_token(history);
        self.sequences.get_mut(&seq).expect("read above").push(next);
        Ok(vec![next])
    }

    /// Where a sequence's position lies: table index and slot.
    fn slot(&self, seq: SeqId, position: usize) -> Result<(usize, usize), String> {
        let table = &self.sequences.get(&seq).ok_or_else(|| format!("sequence {seq} is not bound"))?.table;
        let at = position / self.block_size;
        let block =
            table.get(at).ok_or_else(|| format!("sequence {seq}: no block for position {position}"))?;
        Ok((at, block.0 as usize * self.block_size + position % self.block_size))
    }

    fn write(&mut self, seq: SeqId, position: usize, token: TokenId) -> Result<(), String> {
        let (at, slot) = self.slot(seq, position)?;
        let on_device = &self.sequences[&seq];
        let others = self.num_tables[slot / self.block_size] - u32::from(at < on_device.bound_before);
        if others > 0 {
            return Err(format!("sequence {seq} writes position {position} where {others} others read"));
        }
        let before = match position.checked_sub(1) {
            None => on_device.root,
            Some(before) => match self.slots[self.slot(seq, before)?.1] {
                Some((_, _, history)) => history,
                None => return Err(format!("sequence {seq}: nothing before position {position}")),
            },
        };
        self.slots[slot] = Some((position, token, extend(before, token)));
        self.written.push(slot);
        Ok(())
    }

    /// Reads positions `from..to`, which must hold the sequence's own history, and returns it as it stands at `to`.
    fn read(&self, seq: SeqId, from: usize, to: usize) -> Result<u64, String> {
        let on_device = self.sequences.get(&seq).ok_or_else(|| format!("sequence {seq} is not bound"))?;
        for position in from..to {
            let expect = Some((position, on_device.tokens[position], on_device.histories[position]));
            let found = self.slots[self.slot(seq, position)?.1];
            if found != expect {
                return Err(format!(
                    "sequence {seq}: the slot of position {position} holds {found:?}, not {expect:?}"
                ));
            }
        }
        Ok(to.checked_sub(1).map_or(on_device.root, |last| on_device.histories[last]))
    }
}
