//! A large cluster's upgrade takes hardly longer than it has to.

use kprov_sim::fleet::measure;
use kprov_types::api::MaxUnavailable;

fn is_close(workers: usize, max_unavailable: MaxUnavailable) {
    let measured = measure(workers, max_unavailable);
    assert_eq!(measured.failed, None);
    assert!(
        measured.took >= measured.floor() * 95 / 100,
        "{measured}: less than can be"
    );
    assert!(
        measured.took <= measured.floor() * 105 / 100,
        "{measured}: more than 5% above"
    );
}

#[test]
fn a_thousand_machines_ten_at_once() {
    is_close(1000, MaxUnavailable::Count(10));
}

#[test]
fn a_thousand_machines_five_percent_at_once() {
    is_close(1000, MaxUnavailable::Percent(5));
}
