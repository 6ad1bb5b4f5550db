//! Work on several items at once, on threads: hashing and running programs block.

use std::panic;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

/// How many threads at most: more than the disk keeps up with is of no use.
const THREADS: usize = 4;

/// Does `work` with each item and returns the results in the items' order. After a failure nothing new is begun; of several,
/// the first in the items' order is returned.
pub(crate) fn try_map<T: Sync, R: Send, E: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let each = || {
        let mut results = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { break };
            let result = work(item);
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            results.push((index, result));
        }
        results
    };
    let threads = thread::available_parallelism().map_or(1, Into::into).min(THREADS);
    let mut results: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(each)).collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause)))
            .collect()
    });
    results.sort_by_key(|(index, _)| *index);
    results.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_order_and_stops_at_failures() {
        let items: Vec<u32> = (0..100).collect();
        let doubled = try_map(&items, |n| Ok::<_, ()>(n * 2)).unwrap();
        assert_eq!(doubled, items.iter().map(|n| n * 2).collect::<Vec<_>>());
        let begun = AtomicUsize::new(0);
        let failed = try_map(&items, |n| {
            begun.fetch_add(1, Ordering::Relaxed);
            if *n < 3 { Ok(()) } else { Err(*n) }
        });
        assert_eq!(failed, Err(3));
        assert!(begun.into_inner() <= 3 + THREADS);
        assert_eq!(try_map(&[], |(): &()| Err::<(), _>(())), Ok(vec![]));
    }
}
