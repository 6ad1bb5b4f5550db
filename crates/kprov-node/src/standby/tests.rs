use super::*;

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn api() -> ApiSeen {
    ApiSeen {
        placed: false,
        first_boot: false,
        index: 0,
        able: true,
        serve: false,
        self_hosted: SelfHosted::Absent,
        silent: None,
    }
}

#[test]
fn the_api_standby_is_placed_when_nothing_answers() {
    use Action::{Keep, Place};
    let cases = [
        (
            "first boot, first machine: at once",
            ApiSeen {
                first_boot: true,
                silent: Some(s(0)),
                ..api()
            },
            Place,
        ),
        (
            "but not before its image and etcd are there",
            ApiSeen {
                first_boot: true,
                able: false,
                silent: Some(s(99)),
                ..api()
            },
            Keep,
        ),
        (
            "first boot, second machine: it waits for the first",
            ApiSeen {
                first_boot: true,
                index: 1,
                silent: Some(s(59)),
                ..api()
            },
            Keep,
        ),
        (
            "but not for ever",
            ApiSeen {
                first_boot: true,
                index: 1,
                silent: Some(s(60)),
                ..api()
            },
            Place,
        ),
        ("an API answers", api(), Keep),
        (
            "cold start: patience first",
            ApiSeen {
                silent: Some(s(4)),
                ..api()
            },
            Keep,
        ),
        (
            "cold start",
            ApiSeen {
                silent: Some(s(5)),
                ..api()
            },
            Place,
        ),
        (
            "cold start, third machine",
            ApiSeen {
                index: 2,
                silent: Some(s(24)),
                ..api()
            },
            Keep,
        ),
        (
            "cold start, third machine, later",
            ApiSeen {
                index: 2,
                silent: Some(s(25)),
                ..api()
            },
            Place,
        ),
        (
            "its own is starting",
            ApiSeen {
                self_hosted: SelfHosted::Starting,
                silent: Some(s(29)),
                ..api()
            },
            Keep,
        ),
        (
            "its own starts and starts",
            ApiSeen {
                self_hosted: SelfHosted::Starting,
                silent: Some(s(30)),
                ..api()
            },
            Place,
        ),
    ];
    for (what, seen, expected) in cases {
        assert_eq!(decide_api(&seen), expected, "{what}");
    }
}

#[test]
fn the_api_standby_goes_only_for_this_machines_own_instance() {
    use Action::{Keep, Remove};
    let placed = ApiSeen { placed: true, ..api() };
    let cases = [
        ("another machine answers", placed, Keep),
        (
            "its own starts",
            ApiSeen {
                self_hosted: SelfHosted::Starting,
                ..placed
            },
            Keep,
        ),
        (
            "its own has just answered",
            ApiSeen {
                self_hosted: SelfHosted::Ready(s(1)),
                ..placed
            },
            Keep,
        ),
        (
            "its own answers",
            ApiSeen {
                self_hosted: SelfHosted::Ready(s(2)),
                ..placed
            },
            Remove,
        ),
    ];
    for (what, seen, expected) in cases {
        assert_eq!(decide_api(&seen), expected, "{what}");
    }
}

#[test]
fn the_api_standby_serves_beside_the_self_hosted_one_when_ordered() {
    use Action::{Keep, Place, Remove};
    let ready = ApiSeen {
        serve: true,
        self_hosted: SelfHosted::Ready(s(999)),
        ..api()
    };
    let cases = [
        ("ordered: at once", ready, Place),
        ("not before it can run", ApiSeen { able: false, ..ready }, Keep),
        ("it stays", ApiSeen { placed: true, ..ready }, Keep),
        (
            "it stays while its own is replaced",
            ApiSeen {
                placed: true,
                self_hosted: SelfHosted::Absent,
                ..ready
            },
            Keep,
        ),
        (
            "withdrawn before its own is back",
            ApiSeen {
                placed: true,
                serve: false,
                self_hosted: SelfHosted::Starting,
                ..ready
            },
            Keep,
        ),
        (
            "withdrawn",
            ApiSeen {
                placed: true,
                serve: false,
                ..ready
            },
            Remove,
        ),
    ];
    for (what, seen, expected) in cases {
        assert_eq!(decide_api(&seen), expected, "{what}");
    }
}

fn leader() -> LeaderSeen {
    LeaderSeen {
        placed: false,
        first_boot: false,
        index: 0,
        able: true,
        api_listens: true,
        api: Some(s(1000)),
        self_hosted: SelfHosted::Absent,
        lease: LeaseSeen::Unknown,
    }
}

fn held(here: bool, quiet: u64, held: u64) -> LeaseSeen {
    LeaseSeen::Held {
        here,
        quiet: s(quiet),
        held: s(held),
    }
}

#[test]
#[expect(clippy::too_many_lines, reason = "one table")]
fn a_leaders_standby_is_placed_when_nobody_leads() {
    use Action::{Keep, Place};
    let first = LeaderSeen {
        first_boot: true,
        api: Some(s(0)),
        ..leader()
    };
    let cases = [
        (
            "first boot, no API yet",
            LeaderSeen {
                api_listens: false,
                api: None,
                ..first
            },
            Keep,
        ),
        (
            "first boot, the API is starting",
            LeaderSeen {
                api: None,
                api_listens: true,
                ..first
            },
            Place,
        ),
        (
            "second machine, the API is starting",
            LeaderSeen {
                api: None,
                api_listens: true,
                index: 1,
                ..first
            },
            Keep,
        ),
        (
            "first boot: at once, though the Lease may not be readable yet",
            first,
            Place,
        ),
        (
            "first boot, no Lease",
            LeaderSeen {
                lease: LeaseSeen::Free(s(0)),
                ..first
            },
            Place,
        ),
        (
            "first boot, somebody leads already",
            LeaderSeen {
                lease: held(false, 1, 5),
                ..first
            },
            Keep,
        ),
        (
            "first boot, second machine",
            LeaderSeen {
                index: 1,
                lease: LeaseSeen::Free(s(44)),
                ..leader()
            },
            Keep,
        ),
        ("image missing", LeaderSeen { able: false, ..first }, Keep),
        ("unreadable", leader(), Keep),
        (
            "renewed",
            LeaderSeen {
                lease: held(false, 29, 99),
                ..leader()
            },
            Keep,
        ),
        (
            "not renewed",
            LeaderSeen {
                lease: held(false, 30, 99),
                ..leader()
            },
            Place,
        ),
        (
            "free",
            LeaderSeen {
                lease: LeaseSeen::Free(s(30)),
                ..leader()
            },
            Place,
        ),
        (
            "the API has only come back",
            LeaderSeen {
                api: Some(s(3)),
                lease: held(false, 300, 900),
                ..leader()
            },
            Keep,
        ),
        (
            "third machine",
            LeaderSeen {
                index: 2,
                lease: held(false, 59, 99),
                ..leader()
            },
            Keep,
        ),
        (
            "third machine, later",
            LeaderSeen {
                index: 2,
                lease: held(false, 60, 99),
                ..leader()
            },
            Place,
        ),
        (
            "its own is starting",
            LeaderSeen {
                self_hosted: SelfHosted::Starting,
                lease: held(false, 54, 99),
                ..leader()
            },
            Keep,
        ),
        (
            "its own is there",
            LeaderSeen {
                self_hosted: SelfHosted::Ready(s(0)),
                lease: held(false, 99, 99),
                ..leader()
            },
            Keep,
        ),
    ];
    for (what, seen, expected) in cases {
        assert_eq!(decide_leader(&seen), expected, "{what}");
    }
}

#[test]
fn a_leaders_standby_goes_when_it_is_not_needed() {
    use Action::{Keep, Remove};
    let placed = LeaderSeen {
        placed: true,
        ..leader()
    };
    let cases = [
        (
            "it leads",
            LeaderSeen {
                lease: held(true, 1, 99),
                ..placed
            },
            Keep,
        ),
        (
            "nobody leads",
            LeaderSeen {
                lease: LeaseSeen::Free(s(99)),
                ..placed
            },
            Keep,
        ),
        (
            "its own has just answered",
            LeaderSeen {
                self_hosted: SelfHosted::Ready(s(1)),
                ..placed
            },
            Keep,
        ),
        (
            "its own answers",
            LeaderSeen {
                self_hosted: SelfHosted::Ready(s(2)),
                ..placed
            },
            Remove,
        ),
        (
            "another has just begun to lead",
            LeaderSeen {
                lease: held(false, 1, 10),
                ..placed
            },
            Keep,
        ),
        (
            "another leads",
            LeaderSeen {
                lease: held(false, 1, 30),
                ..placed
            },
            Remove,
        ),
        (
            "another led and is lost",
            LeaderSeen {
                lease: held(false, 16, 99),
                ..placed
            },
            Keep,
        ),
        ("the API is away", LeaderSeen { api: None, ..placed }, Keep),
    ];
    for (what, seen, expected) in cases {
        assert_eq!(decide_leader(&seen), expected, "{what}");
    }
}

#[test]
fn placing_and_taking_away_never_alternate() {
    // Whatever is seen, what one decision does the next one, seeing the same, does not undo.
    let hosted = [
        SelfHosted::Absent,
        SelfHosted::Starting,
        SelfHosted::Ready(s(1)),
        SelfHosted::Ready(s(5)),
    ];
    let leases = [
        LeaseSeen::Unknown,
        LeaseSeen::Free(s(99)),
        held(false, 1, 99),
        held(false, 99, 99),
        held(true, 99, 99),
    ];
    for first_boot in [false, true] {
        for self_hosted in hosted {
            for (silent, serve) in [(None, false), (None, true), (Some(s(999)), false), (Some(s(999)), true)] {
                let seen = ApiSeen {
                    first_boot,
                    serve,
                    self_hosted,
                    silent,
                    ..api()
                };
                // While something ready listens here, an API answers.
                let possible = silent.is_none() || !matches!(self_hosted, SelfHosted::Ready(_));
                if possible && decide_api(&seen) == Action::Place {
                    assert_eq!(decide_api(&ApiSeen { placed: true, ..seen }), Action::Keep, "{seen:?}");
                }
            }
            for lease in leases {
                let seen = LeaderSeen {
                    first_boot,
                    self_hosted,
                    lease,
                    ..leader()
                };
                if decide_leader(&seen) == Action::Place {
                    assert_eq!(
                        decide_leader(&LeaderSeen { placed: true, ..seen }),
                        Action::Keep,
                        "{seen:?}"
                    );
                }
            }
        }
    }
}
