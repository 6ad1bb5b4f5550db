//! The provider on hosts that are namespaces of this one, each with a real `sshd`.
#![expect(clippy::unwrap_used, reason = "a test's own failures")]

mod conformance;
mod failures;
mod room;
