//! Tests against a real API server, in one program.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests end so, and tell the versions they ran; clippy.toml's allowance does not reach helper functions"
)]

mod api_server;
mod cluster;
mod election;
mod memory;
mod operator;
mod rights;
mod supervise;
