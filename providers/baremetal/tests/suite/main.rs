//! The provider on hosts that are namespaces of this one, each with a real `sshd`.
#![cfg(test)]

mod conformance;
mod failures;
mod room;
