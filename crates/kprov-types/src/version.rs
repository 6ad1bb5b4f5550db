//! Kubernetes versions.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A text that is not a Kubernetes version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a Kubernetes version; expected MAJOR.MINOR.PATCH such as `1.36.3`")]
pub struct VersionError {
    /// The text as given.
    pub text: String,
}

/// A full Kubernetes version such as `1.36.3`: semantic versioning, a leading `v` allowed when parsing and never kept.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct KubernetesVersion(semver::Version);

/// A minor release line such as `1.36`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Minor {
    /// The major version; 1 for every Kubernetes so far.
    pub major: u64,
    /// The minor version.
    pub minor: u64,
}

impl KubernetesVersion {
    /// The minor release line this version belongs to.
    pub fn minor(&self) -> Minor {
        Minor {
            major: self.0.major,
            minor: self.0.minor,
        }
    }

    /// The version as its tag, with the `v` that Kubernetes' own tools print.
    pub fn tag(&self) -> String {
        format!("v{}", self.0)
    }
}

impl fmt::Display for KubernetesVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Minor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl Minor {
    /// The minor `1.<minor>`.
    pub const fn v1(minor: u64) -> Self {
        Self { major: 1, minor }
    }
}

impl FromStr for KubernetesVersion {
    type Err = VersionError;
    fn from_str(text: &str) -> Result<Self, VersionError> {
        let trimmed = text.strip_prefix('v').unwrap_or(text);
        semver::Version::parse(trimmed)
            .map(Self)
            .map_err(|_| VersionError { text: text.to_owned() })
    }
}

impl TryFrom<String> for KubernetesVersion {
    type Error = VersionError;
    fn try_from(text: String) -> Result<Self, VersionError> {
        text.parse()
    }
}

impl From<KubernetesVersion> for String {
    fn from(version: KubernetesVersion) -> String {
        version.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_with_and_without_v() {
        let v: KubernetesVersion = "v1.36.3".parse().unwrap();
        assert_eq!(v.to_string(), "1.36.3");
        assert_eq!(v.tag(), "v1.36.3");
        assert_eq!(v.minor(), Minor::v1(36));
        assert!(v > "1.36.3-rc.1".parse().unwrap());
        for bad in ["1.36", "latest", "", "1.36.x", "vv1.2.3"] {
            assert!(bad.parse::<KubernetesVersion>().is_err(), "{bad}");
        }
    }
}
