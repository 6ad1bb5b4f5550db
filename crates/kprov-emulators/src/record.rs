//! What was called, how often, and which calls are to fail.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The calls that an emulator got, by name (`RunInstances`, `PUT virtualMachines`).
#[derive(Clone, Debug, Default)]
pub struct Record(Arc<Mutex<BTreeMap<String, u64>>>);

impl Record {
    /// Counts one call.
    pub fn count(&self, call: &str) {
        let mut calls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *calls.entry(call.to_owned()).or_default() += 1;
    }

    /// All calls so far, by name.
    pub fn calls(&self) -> BTreeMap<String, u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many calls there were.
    pub fn total(&self) -> u64 {
        self.calls().values().sum()
    }

    /// Forgets all calls.
    pub fn reset(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}
