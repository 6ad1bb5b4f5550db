//! How far this machine is: told by the setup endpoint and written to a file for `kprov-node status`.

use camino::Utf8Path;
use kprov_types::Digest;
use kprov_types::node::{SetupStatus, SetupStep};
use tokio::sync::watch;

use crate::{files, paths};

/// The machine's status; cheap to clone, all clones are one.
#[derive(Clone, Debug)]
pub struct Status(watch::Sender<SetupStatus>);

impl Status {
    /// A machine that has only started.
    pub fn new() -> Self {
        let begin = SetupStatus {
            step: SetupStep::Started,
            message: None,
            bundle: None,
            host_findings: Vec::new(),
        };
        Self(watch::Sender::new(begin))
    }

    /// The status now.
    pub fn get(&self) -> SetupStatus {
        self.0.borrow().clone()
    }

    /// The status, now and as it changes.
    pub fn watch(&self) -> watch::Receiver<SetupStatus> {
        self.0.subscribe()
    }

    /// Whether the machine is set up.
    pub fn is_done(&self) -> bool {
        self.0.borrow().step == SetupStep::Done
    }

    /// Moves on to `step`. Steps that run at the same time may end in any order; the status never goes back.
    pub fn reach(&self, step: SetupStep) {
        self.0.send_if_modified(|status| {
            let on = step > status.step;
            if on {
                tracing::info!(?step, "setup");
                status.step = step;
                status.message = None;
            }
            on
        });
    }

    /// Says what the machine waits for.
    pub fn note(&self, message: impl Into<String>) {
        let message = Some(message.into());
        self.0.send_if_modified(|status| {
            let new = status.message != message;
            if new {
                tracing::info!(message = message.as_deref(), "setup");
                status.message = message;
            }
            new
        });
    }

    /// Says which bundle was accepted.
    pub fn bundle(&self, digest: Digest) {
        self.0.send_modify(|status| status.bundle = Some(digest));
    }

    /// Adds to what the host lacks.
    pub fn add_findings(&self, findings: Vec<String>) {
        for finding in &findings {
            tracing::warn!(finding, "host");
        }
        if !findings.is_empty() {
            self.0.send_modify(|status| status.host_findings.extend(findings));
        }
    }

    /// Waits until the machine is set up.
    pub async fn done(&self) {
        // The sender is `self`, so the channel cannot close while this waits.
        let _ = self
            .0
            .subscribe()
            .wait_for(|status| status.step == SetupStep::Done)
            .await;
    }

    /// Keeps the status file as the status is.
    pub async fn write_file(self) {
        let mut changes = self.0.subscribe();
        loop {
            let status = changes.borrow_and_update().clone();
            match serde_json::to_vec_pretty(&status) {
                Ok(json) => {
                    if let Err(error) = files::write(Utf8Path::new(paths::STATUS), &json, 0o644) {
                        tracing::warn!(error = crate::chain(&error), "no status file");
                    }
                }
                Err(error) => tracing::error!(%error, "the status cannot be written as JSON"),
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    }
}

impl Default for Status {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_never_go_back() {
        let status = Status::new();
        status.reach(SetupStep::Images);
        status.note("waits");
        status.reach(SetupStep::Fetching);
        assert_eq!(status.get().step, SetupStep::Images);
        assert_eq!(status.get().message.as_deref(), Some("waits"));
        status.reach(SetupStep::Waiting);
        assert_eq!(status.get().message, None);
    }
}
