//! Checkpoints as a caller sees them: configs, files good and bad, shards of FP8 blocks.

mod checkpoint;
mod config;
mod dummy;
mod linear;
mod quantize;
mod refused;
mod support;
mod verify;
