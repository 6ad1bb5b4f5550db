//! Kubernetes Events (`events.k8s.io/v1`) on a VersionUpdate: what a person would want to know.

use k8s_openapi::api::core::v1::ObjectReference;
use kprov_types::api::{GROUP, VERSION, VERSION_UPDATE};
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::time::{Duration, timeout};

/// An Event's note may have so many bytes (events.k8s.io/v1).
const LONGEST: usize = 1024;
/// Nothing waits long for an Event.
const TRY: Duration = Duration::from_secs(3);

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Note {
    /// One CamelCase word.
    pub(super) reason: &'static str,
    /// In words.
    pub(super) message: String,
    /// A person may have to look.
    pub(super) warning: bool,
}

impl Note {
    pub(super) fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            warning: false,
        }
    }

    pub(super) fn warning(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            warning: true,
            ..Self::new(reason, message)
        }
    }
}

/// Tells of what happened.
#[derive(Clone)]
pub(super) struct Events(Recorder);

impl Events {
    pub(super) fn new(client: Client) -> Self {
        let reporter = Reporter {
            controller: "kprov.io/operator".into(),
            instance: None,
        };
        Self(Recorder::new(client, reporter))
    }

    /// Tells of something about the VersionUpdate. An Event that can't be told is no reason to hold anything up.
    pub(super) async fn tell(&self, uid: &str, note: Note) {
        let Note {
            reason,
            message,
            warning,
        } = note;
        let regarding = ObjectReference {
            api_version: Some(format!("{GROUP}/{VERSION}")),
            kind: Some("VersionUpdate".into()),
            name: Some(VERSION_UPDATE.into()),
            uid: Some(uid.to_owned()),
            ..ObjectReference::default()
        };
        let event = Event {
            type_: if warning { EventType::Warning } else { EventType::Normal },
            reason: reason.into(),
            note: Some(cut(message)),
            action: "Upgrade".into(),
            secondary: None,
        };
        let publish = async {
            match self.0.publish(&event, &regarding).await {
                // Older API servers take every kind that they don't know themselves for one that has namespaces.
                Err(kube::Error::Api(status)) if status.code == 422 => {
                    let namespace = Some("default".to_owned());
                    let regarding = ObjectReference { namespace, ..regarding };
                    self.0.publish(&event, &regarding).await
                }
                outcome => outcome,
            }
        };
        match timeout(TRY, publish).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(reason, %error, "an Event could not be written"),
            Err(_) => tracing::warn!(reason, "an Event was not taken in time"),
        }
    }
}

fn cut(mut text: String) -> String {
    const MARK: &str = "…";
    if text.len() > LONGEST {
        text.truncate(text.floor_char_boundary(LONGEST - MARK.len()));
        text.push_str(MARK);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_fit() {
        assert_eq!(cut("short".into()), "short");
        let long = cut("ä".repeat(2000));
        assert!(long.len() <= LONGEST && long.ends_with("ä…"), "{}", long.len());
    }
}
