//! Newtypes for the names that identify clusters and machines.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The name is empty.
    #[error("a name must not be empty")]
    Empty,
    /// The name is longer than its kind allows.
    #[error("`{name}` has {length} characters; at most {limit} are allowed")]
    TooLong {
        /// The name as given.
        name: String,
        /// Its length in characters.
        length: usize,
        /// The longest this kind of name may be.
        limit: usize,
    },
    /// The name isn't an RFC 1123 label.
    #[error(
        "`{name}` is not a DNS label: use lower-case letters, digits and `-`, starting with a letter and ending with a letter or digit"
    )]
    NotALabel {
        /// The name as given.
        name: String,
    },
}

fn check_label(name: &str, limit: usize) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    let length = name.chars().count();
    if length > limit {
        return Err(NameError::TooLong {
            name: name.to_owned(),
            length,
            limit,
        });
    }
    let bytes = name.as_bytes();
    let inner = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
    let label = bytes.iter().all(inner)
        && bytes.first().is_some_and(u8::is_ascii_lowercase)
        && bytes.last().is_some_and(|b| *b != b'-');
    if label {
        Ok(())
    } else {
        Err(NameError::NotALabel { name: name.to_owned() })
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $limit:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        #[serde(try_from = "String", into = "String")]
        #[schemars(with = "String")]
        pub struct $name(String);

        impl $name {
            /// The longest such a name may be, in characters.
            pub const LIMIT: usize = $limit;

            /// Checks and wraps a name.
            pub fn new(name: impl Into<String>) -> Result<Self, NameError> {
                let name = name.into();
                check_label(&name, Self::LIMIT)?;
                Ok(Self(name))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(s: &str) -> Result<Self, NameError> {
                Self::new(s)
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(s: String) -> Result<Self, NameError> {
                Self::new(s)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
    };
}

name_type! {
    /// A cluster's name: an RFC 1123 label short enough to be part of every resource's name on every provider.
    ClusterName, 40
}
name_type! {
    /// A machine's name, which is its host name and its Kubernetes Node's name too: an RFC 1123 label.
    MachineName, 63
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_labels_only() {
        for good in ["a", "demo", "demo-1", "x9"] {
            assert_eq!(ClusterName::new(good).unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a-", "A", "a.b", "1a", "a_b", "ü", "a b"] {
            assert!(ClusterName::new(bad).is_err(), "{bad}");
        }
        assert!(matches!(
            ClusterName::new("a".repeat(41)),
            Err(NameError::TooLong {
                length: 41,
                limit: 40,
                ..
            })
        ));
    }

    #[test]
    fn deserializing_checks() {
        assert!(serde_json::from_str::<ClusterName>("\"Demo\"").is_err());
    }
}
