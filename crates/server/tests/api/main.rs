//! The HTTP API against a scripted engine: over the router, and over a socket where connections matter.
#![forbid(unsafe_code)]

mod bad_input;
mod exposition;
mod fields;
mod grammars;
mod http;
mod lifecycle;
mod messages;
mod numbers;
mod openapi;
mod ops;
mod page;
mod replies;
mod responses;
mod socket;
mod support;
mod tls;
