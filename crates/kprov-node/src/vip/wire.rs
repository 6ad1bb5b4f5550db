//! Messages as they travel: one UDP datagram each, authenticated by a key that only control-plane machines have.

use hmac::{Hmac, Mac};
use kprov_types::node::Bundle;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::elect::Message;

type Authenticator = Hmac<Sha256>;

/// Bytes of the authenticator that each datagram begins with.
const TAG: usize = 32;

/// Seals and opens messages of one cluster's machines.
#[derive(Clone)]
pub(super) struct Seal {
    key: Authenticator,
    /// The machines that votes are counted among: others' votes are about something else.
    machines: String,
}

#[derive(Serialize, Deserialize)]
struct Letter {
    machines: String,
    from: usize,
    message: Message,
}

impl Seal {
    /// From what all control-plane machines of a cluster have and nobody else.
    pub(super) fn new(bundle: &Bundle) -> Self {
        let mut secret = Sha256::new();
        secret.update(b"kprov virtual address v1\0");
        secret.update(bundle.secrets.ca.key.as_bytes());
        let mut machines = Sha256::new();
        for member in &bundle.settings.members {
            machines.update(member.name.as_str());
            machines.update(b"\n");
        }
        Self {
            #[expect(clippy::expect_used, reason = "HMAC takes keys of any length")]
            key: Authenticator::new_from_slice(&secret.finalize()).expect("any length will do"),
            machines: hex::encode(&machines.finalize()[..8]),
        }
    }

    pub(super) fn seal(&self, from: usize, message: Message) -> Vec<u8> {
        let letter = Letter {
            machines: self.machines.clone(),
            from,
            message,
        };
        let json = serde_json::to_vec(&letter).unwrap_or_default();
        let mut datagram = self.key.clone().chain_update(&json).finalize().into_bytes().to_vec();
        datagram.extend(json);
        datagram
    }

    /// Who says what; nothing if it isn't from one of these machines.
    pub(super) fn open(&self, datagram: &[u8]) -> Option<(usize, Message)> {
        let (tag, json) = datagram.split_at_checked(TAG)?;
        self.key.clone().chain_update(json).verify_slice(tag).ok()?;
        let Letter {
            machines,
            from,
            message,
        } = serde_json::from_slice(json).ok()?;
        (machines == self.machines).then_some((from, message))
    }
}

#[cfg(test)]
mod tests {
    use super::super::elect::Round;
    use super::*;
    use crate::testing;

    #[test]
    fn only_what_was_sealed_by_the_same_cluster_is_opened() {
        let bundle = testing::bundle();
        let seal = Seal::new(&bundle);
        let round = Round { process: 7, number: 3 };
        let message = Message::Ask { round, lease: 2100 };
        let datagram = seal.seal(1, message);
        assert_eq!(seal.open(&datagram), Some((1, message)));
        for place in 0..datagram.len() {
            let mut changed = datagram.clone();
            changed[place] ^= 1;
            assert_eq!(seal.open(&changed), None, "byte {place}");
            assert_eq!(seal.open(&datagram[..place]), None, "{place} bytes");
        }
        let mut other = bundle.clone();
        other.secrets.ca.key = "another".into();
        assert_eq!(Seal::new(&other).open(&datagram), None);
        // The same key, but votes among other machines.
        let mut other = bundle;
        other.settings.members.pop();
        assert_eq!(Seal::new(&other).open(&datagram), None);
    }
}
