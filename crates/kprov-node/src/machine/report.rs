//! What the machine tells: put together by its parts, written to its object by [`super::objects::write_status`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use kprov_types::api::MachineStatus;
use tokio::sync::watch;

/// The status of this machine; cheap to clone, all clones are one.
#[derive(Clone, Debug, Default)]
pub struct Report {
    status: watch::Sender<MachineStatus>,
    messages: Arc<Mutex<BTreeMap<&'static str, String>>>,
    whole: watch::Sender<bool>,
}

impl Report {
    /// The status, now and as it changes.
    pub fn watch(&self) -> watch::Receiver<MachineStatus> {
        self.status.subscribe()
    }

    /// The status is whole: from now on it may be written. One that is not would say of what is not known yet that it is not.
    pub fn complete(&self) {
        self.whole.send_if_modified(|whole| !std::mem::replace(whole, true));
    }

    /// Waits until the status is whole.
    pub async fn completed(&self) {
        // The sender is `self`, so the channel cannot close while this waits.
        let _ = self.whole.subscribe().wait_for(|whole| *whole).await;
    }

    /// Changes something. Nobody hears of it unless it is different then.
    pub fn set(&self, change: impl FnOnce(&mut MachineStatus)) {
        self.status.send_if_modified(|status| {
            let before = status.clone();
            change(status);
            *status != before
        });
    }

    /// Says what one part is doing or waits for; an empty text for nothing.
    pub fn say(&self, part: &'static str, text: impl Into<String>) {
        let text = text.into();
        let all = {
            let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
            let known = messages.get(part).map_or("", String::as_str);
            if known == text {
                return;
            }
            tracing::info!(part, message = text, "orders");
            if text.is_empty() {
                messages.remove(part);
            } else {
                messages.insert(part, text);
            }
            messages.values().cloned().collect::<Vec<_>>().join("; ")
        };
        self.set(|status| status.message = all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_joined_and_told_once() {
        let report = Report::default();
        let mut changes = report.watch();
        report.say("run", "waits");
        report.say("etcd", "moves");
        assert_eq!(changes.borrow_and_update().message, "moves; waits");
        report.say("run", "waits");
        report.set(|status| status.message = "moves; waits".into());
        assert!(!changes.has_changed().unwrap());
        report.say("etcd", "");
        assert_eq!(changes.borrow_and_update().message, "waits");
    }
}
