//! What this process has made lately, and no listing has shown yet.
//!
//! EC2's listings lag behind ("Eventual consistency in the Amazon EC2 API"): a thing just made may be missing from the next one.
//! Taken at its word, such a listing would have the thing made twice. This is no state that anything depends on: another
//! process starts with none, and client tokens and unique names keep it from a second copy.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use kprov_provider::ProviderError;
use kprov_types::ClusterName;

/// After this long what is not listed is taken to be gone.
const TRUST: Duration = Duration::from_mins(1);
/// When to look again.
const AGAIN: Duration = Duration::from_millis(300);

/// Things that were made and not seen since, by id.
#[derive(Debug, Default)]
pub(crate) struct Ledger(Mutex<BTreeMap<(ClusterName, String), Instant>>);

impl Ledger {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<(ClusterName, String), Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thing was made.
    pub(crate) fn made(&self, cluster: &ClusterName, id: &str) {
        self.lock().insert((cluster.clone(), id.to_owned()), Instant::now());
    }

    /// A thing was removed, or is to be.
    pub(crate) fn removed(&self, cluster: &ClusterName, id: &str) {
        self.lock().remove(&(cluster.clone(), id.to_owned()));
    }

    /// Whether all that was made is among what is listed; if not, the listing is too old to act on.
    pub(crate) fn check(&self, cluster: &ClusterName, listed: &BTreeSet<&str>) -> Result<(), ProviderError> {
        let mut made = self.lock();
        made.retain(|(of, id), when| of != cluster || !(listed.contains(id.as_str()) || when.elapsed() > TRUST));
        match made.keys().find(|(of, _)| of == cluster) {
            None => Ok(()),
            Some((_, id)) => Err(ProviderError::wait(
                format!("`{id}` was made just now and is not listed yet"),
                AGAIN,
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kprov_provider::Advice;

    #[test]
    fn listings_have_to_show_what_was_made() {
        let (ledger, demo, other) = (
            Ledger::default(),
            ClusterName::new("demo").unwrap(),
            ClusterName::new("other").unwrap(),
        );
        ledger.made(&demo, "vpc-1");
        ledger.made(&demo, "sg-1");
        let error = ledger.check(&demo, &["vpc-1"].into()).unwrap_err();
        assert!(error.message.contains("`sg-1`") && error.advice == Advice::Wait(AGAIN));
        assert!(ledger.check(&other, &BTreeSet::new()).is_ok());
        assert!(ledger.check(&demo, &["sg-1"].into()).is_ok());
        // Seen once is enough: what is missing later was removed by somebody.
        assert!(ledger.check(&demo, &BTreeSet::new()).is_ok());
        ledger.made(&demo, "sg-2");
        ledger.removed(&demo, "sg-2");
        assert!(ledger.check(&demo, &BTreeSet::new()).is_ok());
    }
}
