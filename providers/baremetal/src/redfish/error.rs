//! Why a management controller could not be made to do something, with what to do about it.

use std::fmt::Write as _;
use std::time::Duration;

use super::model::PowerState;

/// What went wrong at a management controller.
#[derive(Debug, thiserror::Error)]
pub enum BmcError {
    /// The credentials are not where the inventory says.
    #[error("the credentials for `{bmc}` cannot be read from {place}")]
    Credentials {
        /// The controller.
        bmc: String,
        /// File or variable.
        place: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// What is there is not `user:password`.
    #[error("{place} does not hold `user:password` for `{bmc}`")]
    NotCredentials {
        /// The controller.
        bmc: String,
        /// File or variable.
        place: String,
    },
    /// Others can read them.
    #[error("the credentials file `{path}` can be read by others than its owner")]
    Readable {
        /// The file.
        path: String,
    },
    /// TLS cannot be set up.
    #[error("`{bmc}` cannot be asked securely: {why}")]
    Tls {
        /// The controller.
        bmc: String,
        /// Why.
        why: String,
    },
    /// It does not know user or password.
    #[error("`{bmc}` refuses the user name or password")]
    Unauthorized {
        /// The controller.
        bmc: String,
    },
    /// The user is known and may not do this.
    #[error("`{bmc}` does not let this user {what}")]
    Forbidden {
        /// The controller.
        bmc: String,
        /// What was tried.
        what: String,
    },
    /// There is no connection, or no answer in time.
    #[error("`{bmc}` does not answer")]
    Silent {
        /// The controller.
        bmc: String,
        /// For how long it was tried.
        tried: Duration,
        /// The last attempt.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It answers, but with something else than Redfish.
    #[error("`{bmc}` does not speak Redfish at `{path}`: {why}")]
    NotRedfish {
        /// The controller.
        bmc: String,
        /// The path.
        path: String,
        /// What was wrong with the answer.
        why: String,
    },
    /// It manages no system, or several, or not the one named.
    #[error("`{bmc}` manages {}", systems(.found))]
    System {
        /// The controller.
        bmc: String,
        /// The ids of what it manages.
        found: Vec<String>,
    },
    /// It cannot do that.
    #[error("`{bmc}` cannot {what}; it offers {}", offers(.offered))]
    Unsupported {
        /// The controller.
        bmc: String,
        /// What was wanted.
        what: String,
        /// What it can do instead.
        offered: Vec<String>,
    },
    /// It refused.
    #[error("`{bmc}` refuses to {what} (HTTP {status}): {why}")]
    Refused {
        /// The controller.
        bmc: String,
        /// What was wanted.
        what: String,
        /// The HTTP status.
        status: u16,
        /// Its own words.
        why: String,
    },
    /// It said yes, and nothing happened.
    #[error("`{bmc}` accepted to {what} {} and did not do it within {} s: it is still {state}", times(*.asked), .waited.as_secs())]
    Ignored {
        /// The controller.
        bmc: String,
        /// What was wanted.
        what: String,
        /// How often.
        asked: u32,
        /// How long was waited.
        waited: Duration,
        /// How it is.
        state: String,
    },
}

fn times(count: u32) -> String {
    match count {
        1 => "once".into(),
        n => format!("{n} times"),
    }
}

fn systems(found: &[String]) -> String {
    match found {
        [] => "no system".into(),
        [one] => format!("the system `{one}` only, which is not the one named"),
        many => format!("several systems ({})", list(many)),
    }
}

fn offers(offered: &[String]) -> String {
    if offered.is_empty() {
        "nothing of the kind".into()
    } else {
        list(offered)
    }
}

fn list(words: &[String]) -> String {
    let mut text = String::new();
    for (i, word) in words.iter().enumerate() {
        let _ = write!(text, "{}`{word}`", if i == 0 { "" } else { ", " });
    }
    text
}

impl BmcError {
    /// What a person can do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Credentials { .. } | Self::NotCredentials { .. } => {
                "write one line `user:password` there, or name another place in `bmc.credentials`".into()
            }
            Self::Readable { path } => format!("`chmod 600 {path}`"),
            Self::Tls { .. } => {
                "name the controller's certificate in `bmc.caFile`; a self-signed one is accepted if it is exactly that one".into()
            }
            Self::Unauthorized { .. } => {
                "check the file or variable that `bmc.credentials` names; some controllers lock an account after a few wrong passwords".into()
            }
            Self::Forbidden { .. } => "give the user the role `Operator` on the controller".into(),
            Self::Silent { tried, .. } => format!(
                "tried for {} s; check `bmc.address` and whether the management network is reached from here",
                tried.as_secs()
            ),
            Self::NotRedfish { .. } => "check `bmc.address`; Redfish may have to be switched on in the controller's settings".into(),
            Self::System { found, .. } if found.is_empty() => "the controller may be starting still; try again in a minute".into(),
            Self::System { .. } => "name one of them in `bmc.system`".into(),
            Self::Unsupported { .. } => "a newer firmware may offer it; or start the host by hand and give it by `ssh`".into(),
            Self::Refused { status: 503, .. } => "the controller is busy or starting; try again in a minute".into(),
            Self::Refused { .. } => "the controller's own log may say more".into(),
            Self::Ignored { .. } => {
                "look at the host's console; controllers ignore power actions while firmware is updated or a lock is on".into()
            }
        }
    }

    /// Whether the same thing may succeed a moment later.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Silent { .. } => true,
            Self::Refused { status, .. } => matches!(status, 408 | 409 | 429 | 500 | 502..=504),
            _ => false,
        }
    }

    pub(super) fn ignored(bmc: &str, what: &str, asked: u32, waited: Duration, state: &PowerState) -> Self {
        Self::Ignored {
            bmc: bmc.to_owned(),
            what: what.to_owned(),
            asked,
            waited,
            state: state.to_string(),
        }
    }
}
