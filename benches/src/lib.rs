//! Shared measuring code of the benches.
