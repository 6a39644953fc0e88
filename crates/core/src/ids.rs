//! Newtypes for everything that is counted or looked up, so that none can be passed in another's place.

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub $inner);

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// A row of the embedding table.
    TokenId(u32)
);
id!(
    /// One generation: a prompt and what follows it. Never reused within a process.
    SeqId(u64)
);
id!(
    /// A block of the paged KV cache.
    BlockId(u32)
);
id!(
    /// This worker's place in a parallel group, counted from 0. A value that is passed, never a global.
    Rank(usize)
);
