//! Host-side communicators: [`Local`], ranks as threads of one process. Knows no model and no device but the
//! [`Backend`](r1_backend::Backend) it is handed.
#![forbid(unsafe_code)]

mod group;
mod local;

pub use group::Staging;
pub use local::{Collective, Local};
