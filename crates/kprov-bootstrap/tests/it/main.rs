//! Tests through the public API, in one program.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests end so, and tell the versions they ran; clippy.toml's allowance does not reach helper functions"
)]

mod common;
mod control_plane;
mod kubelet;
mod manifests;
mod own_kinds;
mod pki;
mod programs;
