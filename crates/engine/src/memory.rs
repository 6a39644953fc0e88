//! Where a device's memory went, in one line.

use r1_backend::MemoryUse;

/// What a rank holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held {
    pub(crate) weight_bytes: usize,
    pub(crate) kv_cache_bytes: usize,
    pub(crate) kv_cache_tokens: usize,
}

const GIB: f64 = (1u64 << 30) as f64;

/// The plan of a device that has memory of its own. Workspaces are what is in use beside weights and cache: buffers of a step,
/// graphs, the driver, and whoever else is on the device.
pub(crate) fn plan(held: Held, memory: MemoryUse) -> String {
    let Held { weight_bytes, kv_cache_bytes, kv_cache_tokens } = held;
    let workspaces = memory.used_bytes.saturating_sub(weight_bytes + kv_cache_bytes);
    let free = memory.total_bytes.saturating_sub(memory.used_bytes);
    let [weights, workspaces, kv_cache, free, total] =
        [weight_bytes, workspaces, kv_cache_bytes, free, memory.total_bytes].map(|bytes| bytes as f64 / GIB);
    format!(
        "uses memory, in GiB: weights {weights:.2}, workspaces {workspaces:.2}, KV cache {kv_cache:.2} ({kv_cache_tokens} tokens), \
         free {free:.2}, of {total:.2}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_make_the_whole() {
        const G: usize = 1 << 30;
        let held = Held { weight_bytes: 85 * G, kv_cache_bytes: 30 * G, kv_cache_tokens: 1000 };
        let memory = MemoryUse { total_bytes: 140 * G, used_bytes: 120 * G + G / 4 };
        assert_eq!(
            plan(held, memory),
            "uses memory, in GiB: weights 85.00, workspaces 5.25, KV cache 30.00 (1000 tokens), free 19.75, of 140.00"
        );
    }
}
