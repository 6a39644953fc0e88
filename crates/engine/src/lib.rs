//! Runs the ranks: a handle to submit requests through, the step loop, the batch's input tensors, statistics.
//! Non-generic outside, generic over the backend inside. Speaks token ids only; knows nothing of HTTP, text or JSON.
#![forbid(unsafe_code)]

mod bell;
mod buckets;
mod config;
mod events;
mod handle;
mod input;
mod live;
mod local;
mod masks;
mod memory;
mod one_batch;
mod pipeline;
mod rank;
mod ranks;
mod serve;

pub use config::{EngineConfig, PROMPT_LOGIT_ROWS, StartError};
pub use events::{EventSender, Sent};
pub use handle::{
    Command, EngineError, EngineInfo, Event, Generation, Handle, Inbox, Request, Stats, Status, SubmitError,
    TokenLogprobs,
};
pub use local::{Connect, LocalRanks, connect_in_host_memory};
pub use one_batch::{OneBatch, OneBatchBench, OneBatchError, OneBatchTimes};
pub use ranks::RankLoader;
pub use serve::spawn;
