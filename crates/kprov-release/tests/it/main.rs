//! Payloads from end to end: made, verified, served, fetched.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

mod common;
mod create;
mod fetch;
mod online;
mod serve;
mod store;
