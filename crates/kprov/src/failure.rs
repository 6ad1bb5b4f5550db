//! Errors as a person reads them: the chain, then a hint, and an exit code.

use std::fmt;

use kprov_provider::{Advice, ProviderError};

/// Something the user can fix: exit code 1.
#[derive(Debug)]
pub(crate) struct UserError {
    message: String,
    hint: Option<String>,
}

impl UserError {
    /// An error with no hint yet.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: None,
        }
    }

    /// Adds what to do.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for UserError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for UserError {}

/// Attaches a hint to any error and says that the user can fix it.
pub(crate) trait OrHint<T> {
    /// Wraps the error in a [`UserError`] with this message and hint.
    fn or_hint(self, message: impl Into<String>, hint: impl Into<String>) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> OrHint<T> for Result<T, E> {
    fn or_hint(self, message: impl Into<String>, hint: impl Into<String>) -> anyhow::Result<T> {
        self.map_err(|e| e.into().context(UserError::new(message).hint(hint)))
    }
}

/// The exit code: 1 the user can fix, 2 unexpected (clap itself uses 2 for wrong usage).
pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    let fixable = error.chain().any(|e| {
        e.is::<UserError>()
            || e.downcast_ref::<ProviderError>()
                .is_some_and(|p| p.advice == Advice::Never)
    }) || error.downcast_ref::<UserError>().is_some();
    if fixable { 1 } else { 2 }
}

/// What to do about it: the outermost hint there is.
pub(crate) fn hint(error: &anyhow::Error) -> Option<&str> {
    let outermost = error.downcast_ref::<UserError>().and_then(|u| u.hint.as_deref());
    outermost.or_else(|| {
        error.chain().find_map(|e| {
            e.downcast_ref::<UserError>()
                .and_then(|u| u.hint.as_deref())
                .or_else(|| e.downcast_ref::<ProviderError>().and_then(|p| p.hint.as_deref()))
        })
    })
}

/// `error: ...`, one `caused by:` line for each source, then a blank line and `hint: ...`.
pub(crate) fn render(error: &anyhow::Error) -> String {
    use std::fmt::Write as _;
    let mut out = format!("error: {error}\n");
    let mut last = error.to_string();
    for cause in error.chain().skip(1) {
        let text = cause.to_string();
        if text != last {
            let _ = writeln!(out, "  caused by: {text}");
        }
        last = text;
    }
    if let Some(hint) = hint(error) {
        let _ = write!(out, "\nhint: {hint}\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;

    #[test]
    fn renders_chain_then_hint() {
        let io = std::io::Error::new(std::io::ErrorKind::NotFound, "no such file");
        let error = Err::<(), _>(io)
            .or_hint("can't read `a.yaml`", "check the path")
            .context("can't start")
            .unwrap_err();
        assert_eq!(
            render(&error),
            "error: can't start\n  caused by: can't read `a.yaml`\n  caused by: no such file\n\nhint: check the path\n"
        );
        assert_eq!(exit_code(&error), 1);
    }

    #[test]
    fn provider_errors_bring_their_hint() {
        let error = anyhow::Error::from(ProviderError::never("no room").hint("make room"));
        assert_eq!(render(&error), "error: no room\n\nhint: make room\n");
        assert_eq!(exit_code(&error), 1);
        assert_eq!(exit_code(&anyhow::anyhow!("what?")), 2);
    }
}
