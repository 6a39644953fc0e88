//! libFuzzer's way into `bodies/safetensors.rs`.
#![no_main]

#[path = "../bodies/safetensors.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|data: &[u8]| body::run(data));
