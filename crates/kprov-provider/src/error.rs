//! What can go wrong at a provider, and what to do then.

use std::time::Duration;

/// What the caller should do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Trying again won't help; a person has to change something.
    Never,
    /// Nothing took effect; try again after at least this long.
    RetryAfter(Duration),
    /// Nothing went wrong: something else has to come to its end first. Look again after this long, as often as it takes.
    Wait(Duration),
    /// A reply was lost: it may have taken effect. Observe, then decide.
    LookFirst,
}

/// An error of a provider call. `Display` names the object; the source is never inside it.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ProviderError {
    /// What failed, with the object named in backticks.
    pub message: String,
    /// What a person can do about it.
    pub hint: Option<String>,
    /// What the caller should do about it.
    pub advice: Advice,
    /// The error beneath.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl ProviderError {
    /// An error that only a person can mend.
    pub fn never(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: None,
            advice: Advice::Never,
            source: None,
        }
    }

    /// An error that may pass.
    pub fn retry_after(message: impl Into<String>, delay: Duration) -> Self {
        Self {
            message: message.into(),
            hint: None,
            advice: Advice::RetryAfter(delay),
            source: None,
        }
    }

    /// What only takes its time.
    pub fn wait(message: impl Into<String>, delay: Duration) -> Self {
        Self {
            message: message.into(),
            hint: None,
            advice: Advice::Wait(delay),
            source: None,
        }
    }

    /// An error whose call may have taken effect.
    pub fn look_first(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: None,
            advice: Advice::LookFirst,
            source: None,
        }
    }

    /// Adds what a person can do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the error beneath.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }
}
