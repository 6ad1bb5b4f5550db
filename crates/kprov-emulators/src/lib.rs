//! Clouds and controllers on loopback, for tests alone: what stands in for AWS, Azure and a BMC, counts the calls it gets, and fails
//! on request.
//!
//! [`aws`] is a recording proxy in front of a `moto` server that puts right what moto lets pass; [`azure`] is a small, strict and
//! stateful Azure Resource Manager; [`bmc`] is a management controller that misbehaves in the ways real ones do. [`hosts`] are bare-metal hosts with a real `sshd`. [`record`] is the
//! count of calls that they keep. No program that ships depends on this crate.

pub mod aws;
pub mod azure;
pub mod bmc;
pub mod hosts;
pub mod record;
