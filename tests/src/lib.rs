//! What the cross-crate tests share: goldens, and a driver that feeds tokens to a model by hand.
#![forbid(unsafe_code)]

mod emu;
mod faulty;
mod feed;
mod golden;
mod reply;
pub mod server;
mod tiny;

pub use emu::{emulated, gpu};
pub use faulty::{Faulty, Fuse};
pub use feed::{Feed, Feeder, Load, teacher_force, teacher_force_stages};
pub use golden::{Gap, Golden, goldens_dir};
pub use reply::{Reply, collect};
pub use tiny::{Tiny, tiny_dir};
