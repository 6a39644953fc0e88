//! What a full block is called by: a keyed hash of everything before it and in it. Knows nothing of blocks and tables.
//!
//! The hash is SipHash-2-4 with 128 bits, chained: `h_i = H(key; h_{i-1}, tokens of block i)`, and `h_{-1} = H(key;
//! cache_salt)`. The key is secret and drawn per process, so nobody outside can choose prompts that collide.

use std::hash::Hasher as _;

use r1_core::TokenId;
use siphasher::sip128::{Hasher128 as _, SipHasher24};

/// The secret that turns the prefix cache on: 128 bits, drawn per process by whoever makes the scheduler.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PrefixKey([u64; 2]);

impl PrefixKey {
    /// A key of these bits; they should come from the system's generator.
    pub const fn new(bits: [u64; 2]) -> Self {
        Self(bits)
    }

    fn hasher(self) -> SipHasher24 {
        SipHasher24::new_with_keys(self.0[0], self.0[1])
    }

    /// What the first block of a sequence is chained to. No salt and an empty one are different salts.
    pub(crate) fn root(self, salt: Option<&[u8]>) -> BlockHash {
        let mut hasher = self.hasher();
        hasher.write(&[0, u8::from(salt.is_some())]);
        hasher.write(salt.unwrap_or_default());
        BlockHash(hasher.finish128().into())
    }

    /// The hash of a full block that holds `tokens` and follows a block of hash `before`.
    pub(crate) fn chain(self, before: BlockHash, tokens: &[TokenId]) -> BlockHash {
        let mut hasher = self.hasher();
        hasher.write(&[1]);
        hasher.write(&before.0.to_le_bytes());
        for token in tokens {
            hasher.write(&token.0.to_le_bytes());
        }
        BlockHash(hasher.finish128().into())
    }
}

impl std::fmt::Debug for PrefixKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PrefixKey(secret)")
    }
}

/// Stands for the salt and every token up to the end of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BlockHash(pub(crate) u128);

/// The hashes of a sequence's full blocks, as far as its tokens are known. Stays empty without a prefix cache.
#[derive(Clone, Debug)]
pub(crate) struct HashChain {
    /// Key and root; `None`: no prefix cache.
    start: Option<(PrefixKey, BlockHash)>,
    hashes: Vec<BlockHash>,
}

impl HashChain {
    pub(crate) fn new(key: Option<PrefixKey>, salt: Option<&[u8]>) -> Self {
        Self { start: key.map(|key| (key, key.root(salt))), hashes: Vec::new() }
    }

    /// Room for as many blocks in all.
    pub(crate) fn reserve(&mut self, num_blocks: usize) {
        if self.start.is_some() {
            self.hashes.reserve_exact(num_blocks.saturating_sub(self.hashes.len()));
        }
    }

    /// Adds the blocks that have become full.
    pub(crate) fn extend(&mut self, tokens: &[TokenId], block_size: usize) {
        let Some((key, root)) = self.start else { return };
        for block in tokens[self.hashes.len() * block_size..].chunks_exact(block_size) {
            let before = self.hashes.last().copied().unwrap_or(root);
            self.hashes.push(key.chain(before, block));
        }
    }

    pub(crate) fn hashes(&self) -> &[BlockHash] {
        &self.hashes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(key: PrefixKey, salt: Option<&[u8]>, tokens: &[u32]) -> Vec<BlockHash> {
        let mut chain = HashChain::new(Some(key), salt);
        let tokens: Vec<_> = tokens.iter().copied().map(TokenId).collect();
        chain.extend(&tokens, 2);
        chain.hashes().to_vec()
    }

    const KEY: PrefixKey = PrefixKey([7, 9]);

    #[test]
    fn the_hash_is_siphash_2_4_128() {
        // The first of the reference implementation's vectors_sip128: an empty input under the key 00 01 .. 0f.
        let key = PrefixKey([0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908]);
        let empty: u128 = key.hasher().finish128().into();
        let expect =
            [0xa3, 0x81, 0x7f, 0x04, 0xba, 0x25, 0xa8, 0xe6, 0x6d, 0xf6, 0x72, 0x14, 0xc7, 0x55, 0x02, 0x93];
        assert_eq!(key.hasher().finish128().as_bytes(), expect, "{empty:032x}");
    }

    #[test]
    fn a_hash_stands_for_all_that_came_before() {
        let both = chain(KEY, None, &[1, 2, 3, 4]);
        assert_eq!(both.len(), 2);
        assert_eq!(chain(KEY, None, &[1, 2, 3]), both[..1], "only full blocks");
        assert_ne!(chain(KEY, None, &[9, 2, 3, 4])[1], both[1]);
        assert_ne!(chain(KEY, None, &[3, 4])[0], both[1]);
        assert_ne!(chain(PrefixKey([7, 8]), None, &[1, 2])[0], both[0]);
    }

    #[test]
    fn salts_are_kept_apart() {
        let salts: [Option<&[u8]>; 5] = [None, Some(b""), Some(b"a"), Some(b"b"), Some(b"a\0")];
        for (at, &salt) in salts.iter().enumerate() {
            for &other in &salts[..at] {
                assert_ne!(chain(KEY, salt, &[1, 2]), chain(KEY, other, &[1, 2]), "{salt:?} {other:?}");
            }
        }
    }

    #[test]
    fn pieces_give_the_same_chain_as_the_whole() {
        let tokens: Vec<_> = (0..11).map(TokenId).collect();
        let mut pieces = HashChain::new(Some(KEY), None);
        for len in 0..=tokens.len() {
            pieces.extend(&tokens[..len], 2);
        }
        assert_eq!(pieces.hashes(), chain(KEY, None, &(0..11).collect::<Vec<_>>()));
    }

    #[test]
    fn without_a_key_there_are_no_hashes_and_no_key_is_printed() {
        let mut chain = HashChain::new(None, Some(b"salt"));
        chain.reserve(9);
        chain.extend(&[TokenId(1); 9], 2);
        assert_eq!((chain.hashes().len(), chain.hashes.capacity()), (0, 0));
        assert_eq!(format!("{:?}", PrefixKey([123, 456])), "PrefixKey(secret)");
    }
}
