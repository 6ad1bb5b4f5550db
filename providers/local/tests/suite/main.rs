//! Real machines on this host. Every test makes its own clusters, on a range of its own, and removes them.
#![cfg(test)]

mod conformance;
mod crashes;
mod harness;
mod machines;
mod network;
mod room;
