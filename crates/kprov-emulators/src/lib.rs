//! Clouds on loopback, for tests alone: what stands in for AWS and Azure, counts the calls it gets, and fails on request.
//!
//! [`aws`] is a recording proxy in front of a `moto` server that puts right what moto lets pass; [`azure`] is a small, strict and
//! stateful Azure Resource Manager. [`record`] is the count of calls that both keep. No program that ships depends on this crate.

pub mod aws;
pub mod azure;
pub mod record;
