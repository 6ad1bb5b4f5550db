//! A release that a cluster knows: its manifest, exactly as it was signed.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::release::Digest;

/// `Release.spec`. The object's name is `<version>-<first 12 digits of the digest>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReleaseSpec {
    /// The Kubernetes version.
    pub version: String,
    /// The digest of `manifest`.
    pub digest: Digest,
    /// `release.json`, byte for byte.
    pub manifest: String,
    /// `release.json.sig`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<String>,
    /// Whoever made this object vouches for the digest: no signature is asked for.
    #[serde(default)]
    pub insecure: bool,
    /// Where machines may fetch blobs from, beside the control-plane machines' own stores.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
}

/// `Release.status`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ReleaseStatus {
    /// Whether digest and signature were found good by the operator.
    pub verified: bool,
    /// By which key, or what is wrong.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// The name of the object of a release.
pub fn release_name(version: &str, digest: &Digest) -> String {
    let short: String = digest.hex().chars().take(12).collect();
    // A version with build metadata is no object name.
    let version: String = version
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '.' || c == '-' {
                c.to_ascii_lowercase()
            } else {
                '-'
            }
        })
        .collect();
    format!("{version}-{short}")
}
