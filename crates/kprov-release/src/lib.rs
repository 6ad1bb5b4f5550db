//! Release payloads: everything one Kubernetes version consists of, named by digest and signed.
//!
//! A payload is a directory. `release.json` ([`kprov_types::release::Release`]) names images and host files by digest,
//! `release.json.sig` signs its bytes (see [`keys`]), and what the payload carries lies beside it as blobs of an OCI image
//! layout, images and host files alike. Whoever has the digest of `release.json` can check all the rest.
//!
//! Start reading at [`create`](mod@create) (a payload from directories of programs) or [`online`] (one that refers to the
//! official registry and download site), then [`payload`] (open, verify), [`serve`] (what machines fetch from), [`store`] (what
//! a machine offers to others, and takes by [`upload`]) and [`fetch`] (what machines fetch with).
//!
//! This crate must never run or hand out bytes as verified that it has not hashed, and knows nothing of machines or clusters.

pub mod create;
mod digest;
mod elf;
mod facts;
pub mod fetch;
mod http;
pub mod keys;
mod layout;
mod locate;
pub mod online;
mod output;
mod parallel;
pub mod payload;
mod program;
mod range;
mod rootfs;
pub mod serve;
pub mod store;
pub mod upload;
mod userland;

pub use create::{CreateError, CreateOptions, create};
pub use fetch::{FetchError, Fetcher};
pub use keys::{KeyError, PublicKey, SigningKey, TrustedKeys};
pub use online::{OnlineError, OnlineOptions, Runtime, create_online};
pub use output::OutputError;
pub use payload::{PAYLOAD_REGISTRY, Payload, PayloadError, ReadReleaseError, Verified, VerifyOptions, read_release};
pub use store::{Store, StoreConfig, StoreError};
