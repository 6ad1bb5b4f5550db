//! Spreading over zones: always the one that has the fewest. Pure.

use std::collections::BTreeMap;

/// How many there are in each zone.
#[derive(Clone, Debug)]
pub(crate) struct Spread {
    counts: BTreeMap<String, usize>,
}

impl Spread {
    /// Zones to choose from, and the zone of each that is there.
    pub(crate) fn new<'a>(zones: impl IntoIterator<Item = &'a str>, there: impl IntoIterator<Item = &'a str>) -> Self {
        let mut counts: BTreeMap<String, usize> = zones.into_iter().map(|z| (z.to_owned(), 0)).collect();
        for zone in there {
            if let Some(count) = counts.get_mut(zone) {
                *count += 1;
            }
        }
        Self { counts }
    }

    /// The zone for one more; `None` where there are no zones.
    pub(crate) fn next(&mut self) -> Option<String> {
        let (zone, count) = self
            .counts
            .iter_mut()
            .min_by_key(|(zone, count)| (**count, (*zone).clone()))?;
        *count += 1;
        Some(zone.clone())
    }

    /// One more in this zone, which was not chosen here.
    pub(crate) fn count(&mut self, zone: &str) {
        if let Some(count) = self.counts.get_mut(zone) {
            *count += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_emptiest_zone_is_next() {
        let mut spread = Spread::new(["b", "a", "c"], ["a", "a", "b", "elsewhere"]);
        let mut next = || spread.next().unwrap();
        assert_eq!([next(), next(), next(), next()], ["c", "b", "c", "a"]);
        assert_eq!(Spread::new([], ["a"]).next(), None);
    }
}
