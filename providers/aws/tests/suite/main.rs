//! The provider on `moto` behind the recording proxy of `kprov-emulators`. Each test has a server of its own.
#![cfg(test)]

mod account;
mod batches;
mod conformance;
mod crashes;
mod errors;
mod plans;
mod room;
