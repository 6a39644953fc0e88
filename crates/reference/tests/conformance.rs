//! The oracle is itself held against plain F64 loops.

use r1_reference::Reference;

r1_backend::conformance_tests!(&Reference::new());
