//! The `r1-serve` binary.
fn main() {}
