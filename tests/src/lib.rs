//! Shared code of the cross-crate tests.
