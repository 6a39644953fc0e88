//! Checkpoint to weights: config.json, safetensors, FP8 blocks, sharding.
