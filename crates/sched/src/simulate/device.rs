//! A device and a model that notice every mistake of a scheduler: the next token is a hash of the whole token history,
//! and the history is read from the paged KV cache through the block table, as attention does. A token lost, doubled,
//! moved or overwritten changes everything after it. Knows nothing of the scheduler's state.

use std::collections::BTreeMap;

use r1_core::{BlockId, SeqId, TokenId};

use super::rng::{Rng, mix};
use crate::{Decode, PrefillChunk};

const VOCAB_SIZE: u64 = 1 << 16;

/// The model: the token that follows `history`.
pub(super) fn next_token(history: impl IntoIterator<Item = TokenId>) -> TokenId {
    let hash = history.into_iter().fold(0x7073_6575_646f, |hash, token| mix(hash ^ u64::from(token.0)));
    TokenId((hash % VOCAB_SIZE) as u32)
}

/// What a slot of the KV cache holds: whose, which position, which token.
type Slot = Option<(SeqId, usize, TokenId)>;

/// The device's side of a sequence, ahead of the host by the steps in flight.
struct OnDevice {
    tokens: Vec<TokenId>,
    table: Vec<BlockId>,
}

/// KV cache and last sampled tokens.
pub(super) struct Device {
    block_size: usize,
    slots: Vec<Slot>,
    sequences: BTreeMap<SeqId, OnDevice>,
}

impl Device {
    pub(super) fn new(block_size: usize, num_blocks: usize) -> Self {
        Self { block_size, slots: vec![None; block_size * num_blocks], sequences: BTreeMap::new() }
    }

    /// Forgets a sequence, and returns the tokens it had.
    pub(super) fn remove(&mut self, seq: SeqId) -> Option<Vec<TokenId>> {
        self.sequences.remove(&seq).map(|on_device| on_device.tokens)
    }

    /// Takes the block table of a sequence's next row, and returns the blocks that are new in it, poisoned.
    /// `known` are the tokens that the host knows, for a sequence that the device does not.
    pub(super) fn bind(
        &mut self,
        seq: SeqId,
        table: &[BlockId],
        known: &[TokenId],
    ) -> Result<Vec<BlockId>, String> {
        let on_device = self
            .sequences
            .entry(seq)
            .or_insert_with(|| OnDevice { tokens: known.to_vec(), table: Vec::new() });
        let Some(new) = table.strip_prefix(on_device.table.as_slice()) else {
            return Err(format!(
                "sequence {seq}: block table changed from {:?} to {table:?}",
                on_device.table
            ));
        };
        for block in new {
            let first = block.0 as usize * self.block_size;
            self.slots[first..first + self.block_size].fill(None);
        }
        let new = new.to_vec();
        on_device.table = table.to_vec();
        Ok(new)
    }

    /// Runs the last token and the drafts, of which a random number is right. `rejected` is how many drafts the steps
    /// in flight before this one have rejected. Returns the tokens drawn.
    pub(super) fn decode(
        &mut self,
        row: Decode,
        rejected: usize,
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
        let num_drawn = rng.range(1, num_drafts + 1);
        let mut drawn = Vec::with_capacity(num_drawn);
        for ahead in 0..=num_drafts {
            let tokens = &mut self.sequences.get_mut(&seq).expect("looked up above").tokens;
            if ahead < num_drawn {
                let token = tokens[position + ahead];
                self.write(seq, position + ahead, token)?;
                let next = next_token(self.context(seq, position + ahead + 1)?);
                drawn.push(next);
                self.sequences.get_mut(&seq).expect("looked up above").tokens.push(next);
            } else {
                let wrong_draft = TokenId(VOCAB_SIZE as u32);
                self.write(seq, position + ahead, wrong_draft)?;
            }
        }
        Ok(drawn)
    }

    /// Runs known tokens. Returns the token drawn after them, if the chunk samples.
    pub(super) fn prefill(&mut self, row: PrefillChunk, known: &[TokenId]) -> Result<Vec<TokenId>, String> {
        let PrefillChunk { seq, start, len, samples } = row;
        let Some(chunk) = known.get(start..start + len) else {
            return Err(format!("sequence {seq}: chunk {start}+{len} of {} known tokens", known.len()));
        };
        for (ahead, &token) in chunk.iter().enumerate() {
            self.write(seq, start + ahead, token)?;
        }
        let context = self.context(seq, start + len)?;
        if samples != (start + len == known.len()) {
            return Err(format!("sequence {seq}: samples is {samples} at {start}+{len} of {}", known.len()));
        }
        if !samples {
            return Ok(Vec::new());
        }
        let next = next_token(context);
        self.sequences.get_mut(&seq).ok_or_else(|| format!("sequence {seq} is not bound"))?.tokens.push(next);
        Ok(vec![next])
    }

    fn slot(&self, seq: SeqId, position: usize) -> Result<usize, String> {
        let table = &self.sequences.get(&seq).ok_or_else(|| format!("sequence {seq} is not bound"))?.table;
        let block = table
            .get(position / self.block_size)
            .ok_or_else(|| format!("sequence {seq}: no block for position {position}"))?;
        Ok(block.0 as usize * self.block_size + position % self.block_size)
    }

    fn write(&mut self, seq: SeqId, position: usize, token: TokenId) -> Result<(), String> {
        let slot = self.slot(seq, position)?;
        self.slots[slot] = Some((seq, position, token));
        Ok(())
    }

    /// The tokens at positions `0..len`, as the KV cache has them.
    fn context(&self, seq: SeqId, len: usize) -> Result<Vec<TokenId>, String> {
        (0..len)
            .map(|position| match self.slots[self.slot(seq, position)?] {
                Some((owner, at, token)) if owner == seq && at == position => Ok(token),
                found => Err(format!("sequence {seq}: the slot of position {position} holds {found:?}")),
            })
            .collect()
    }
}
