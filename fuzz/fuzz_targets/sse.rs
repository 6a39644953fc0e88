//! libFuzzer's way into `bodies/sse.rs`.
#![no_main]

#[path = "../bodies/sse.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|data: &[u8]| body::run(data, r1_server::frames));
