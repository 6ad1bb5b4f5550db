//! The provider against a Resource Manager on loopback that refuses what Azure refuses.

#![cfg(test)]

mod cloud;
mod conformance;
mod crashes;
mod credentials;
mod errors;
mod login;
mod operations;
mod scale;
