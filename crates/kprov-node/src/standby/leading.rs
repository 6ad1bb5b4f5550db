//! Which of this machine's processes holds a Lease, and whether that process is gone. Pure.
//!
//! client-go's components call themselves by a random id that tells nothing of their revision, and hold their Lease for as long as
//! it runs when they end: the next leader waits some fifteen seconds. Here the one who holds it is known, and so is its end.

use std::collections::BTreeSet;

/// What was seen of a Lease's holder on this machine.
///
/// A holder is known to be a revision's process when it was seen to renew the Lease while no other revision ran here. (That it
/// holds the Lease is not enough: it may have ended before anyone looked.)
#[derive(Debug)]
pub(super) struct Leading<T> {
    holder: Option<String>,
    /// The one revision that ran when the Lease was looked at last, and when it had been renewed then.
    alone: Option<(u16, T)>,
    revision: Option<u16>,
}

impl<T> Default for Leading<T> {
    fn default() -> Self {
        Self {
            holder: None,
            alone: None,
            revision: None,
        }
    }
}

impl<T: PartialEq + Clone> Leading<T> {
    /// Takes in who of this machine holds the Lease with the time that was written into it last, and which revisions run here;
    /// tells whether the holder's process has ended.
    pub(super) fn look(&mut self, held: Option<(&str, &T)>, running: &BTreeSet<u16>) -> bool {
        let Some((holder, renewed)) = held else {
            *self = Self::default();
            return false;
        };
        if self.holder.as_deref() != Some(holder) {
            *self = Self {
                holder: Some(holder.to_owned()),
                ..Self::default()
            };
        }
        let mut revisions = running.iter();
        let alone = match (revisions.next(), revisions.next()) {
            (Some(revision), None) => Some((*revision, renewed.clone())),
            _ => None,
        };
        if let (Some((before, time)), Some((now, _))) = (&self.alone, &alone)
            && before == now
            && time != renewed
        {
            self.revision = Some(*now);
        }
        self.alone = alone;
        self.revision.is_some_and(|revision| !running.contains(&revision))
    }

    /// The revision of the process that holds the Lease, where that is known.
    pub(super) fn revision(&self) -> Option<u16> {
        self.revision
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The holder, the time of renewal, and what runs.
    type Look<'a> = (&'a str, u8, &'a [u16]);

    /// What the last of some looks told.
    fn last(looks: &[Look<'_>]) -> bool {
        let mut leading = Leading::default();
        let told = looks.iter().map(|(holder, renewed, running)| {
            let held = (!holder.is_empty()).then_some((*holder, renewed));
            leading.look(held, &running.iter().copied().collect())
        });
        told.last().unwrap()
    }

    #[test]
    fn a_leader_that_has_ended_is_told() {
        assert!(last(&[("a", 1, &[2]), ("a", 2, &[2]), ("a", 3, &[])]));
        assert!(
            last(&[("a", 1, &[2]), ("a", 2, &[2]), ("a", 3, &[2, 3]), ("a", 3, &[3])]),
            "its successor runs"
        );
        assert!(
            last(&[("a", 1, &[1]), ("a", 2, &[1]), ("a", 3, &[1, 2]), ("a", 4, &[2])]),
            "the standby"
        );
    }

    #[test]
    fn a_leader_that_may_live_is_left_alone() {
        let cases: &[(&str, &[Look<'_>])] = &[
            ("it runs", &[("a", 1, &[2]), ("a", 2, &[2]), ("a", 3, &[2, 3])]),
            (
                "the other one has ended",
                &[("a", 1, &[2]), ("a", 2, &[2]), ("a", 3, &[2, 3]), ("a", 4, &[2])],
            ),
            (
                "two ran from the first look on",
                &[("a", 1, &[2, 3]), ("a", 2, &[2, 3]), ("a", 3, &[3])],
            ),
            (
                "it was never seen to renew",
                &[("a", 1, &[2]), ("a", 1, &[2]), ("a", 1, &[])],
            ),
            (
                "it renewed while two ran",
                &[("a", 1, &[2]), ("a", 2, &[2, 3]), ("a", 3, &[3])],
            ),
            (
                "another one here leads since",
                &[("a", 1, &[2]), ("a", 2, &[2]), ("b", 3, &[3])],
            ),
            (
                "another machine leads since",
                &[("a", 1, &[2]), ("a", 2, &[2]), ("", 0, &[])],
            ),
            (
                "nobody held it for a while",
                &[("a", 1, &[2]), ("a", 2, &[2]), ("", 0, &[2]), ("a", 3, &[])],
            ),
        ];
        for (what, looks) in cases {
            assert!(!last(looks), "{what}");
        }
        // Which of two is the leader is known as soon as it renews alone.
        assert!(last(&[
            ("a", 1, &[2, 3]),
            ("a", 2, &[3]),
            ("a", 3, &[3]),
            ("a", 3, &[])
        ]));
    }
}
