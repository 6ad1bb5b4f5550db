//! What is wrong with an inventory: where, with which host, and what to do.

use std::fmt;

use camino::{Utf8Path, Utf8PathBuf};

/// A place in an inventory's files.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The file.
    pub file: Utf8PathBuf,
    /// The line, from 1 on; 0 where it can't be told.
    pub line: usize,
}

impl Place {
    /// A line of a file.
    pub fn new(file: &Utf8Path, line: usize) -> Self {
        Self {
            file: file.to_owned(),
            line,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}", self.file),
            line => write!(f, "{}:{line}", self.file),
        }
    }
}

/// Why an inventory can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{place}`: {}{message}", host.as_ref().map(|h| format!("host `{h}`: ")).unwrap_or_default())]
pub struct InventoryError {
    /// Where.
    pub place: Place,
    /// The host, if it's about one.
    pub host: Option<String>,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl InventoryError {
    pub(super) fn new(place: &Place, message: impl Into<String>) -> Self {
        Self {
            place: place.clone(),
            host: None,
            message: message.into(),
            hint: None,
        }
    }

    pub(super) fn of(mut self, host: &str) -> Self {
        self.host = Some(host.to_owned());
        self
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}
