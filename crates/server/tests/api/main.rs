//! The HTTP API against a scripted engine: over the router, and over a socket where connections matter.
#![forbid(unsafe_code)]

mod fields;
mod http;
mod replies;
mod socket;
mod support;
