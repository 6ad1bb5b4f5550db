use super::*;

fn machines() -> Vec<Member> {
    (1..=3)
        .map(|n| Member {
            name: MachineName::new(format!("cp-{n}")).unwrap(),
            address: IpAddr::from([10, 0, 0, n]),
        })
        .collect()
}

fn listed(n: u8, started: bool, learner: bool) -> EtcdMember {
    let address = IpAddr::from([10, 0, 0, n]);
    EtcdMember {
        id: format!("{n}00"),
        name: if started { format!("cp-{n}") } else { String::new() },
        peer_urls: vec![peer_url(address)],
        client_urls: if started { vec![client_url(address)] } else { Vec::new() },
        learner,
    }
}

fn started(numbers: &[u8]) -> Vec<EtcdMember> {
    numbers.iter().map(|n| listed(*n, true, false)).collect()
}

#[test]
fn decisions() {
    let all = machines();
    let me = &all[0];
    let start = |state| {
        Decision::Start(Start {
            state,
            members: all.clone(),
        })
    };
    let see = |members| Observation {
        members: Some(members),
        ..Observation::default()
    };

    let cases = [
        (
            "data is there",
            Observation {
                data: true,
                started_before: true,
                ..Observation::default()
            },
            start(EtcdClusterState::Existing),
        ),
        ("a new cluster", Observation::default(), start(EtcdClusterState::New)),
        (
            "peers form the cluster at this moment",
            see(vec![
                listed(1, false, false),
                listed(2, false, false),
                listed(3, false, false),
            ]),
            start(EtcdClusterState::New),
        ),
        (
            "an initial member that comes late",
            see(vec![
                listed(1, false, false),
                listed(2, true, false),
                listed(3, true, false),
            ]),
            start(EtcdClusterState::Existing),
        ),
        (
            "added already",
            see(vec![
                listed(1, false, true),
                listed(2, true, false),
                listed(3, true, false),
            ]),
            start(EtcdClusterState::Existing),
        ),
        (
            "data lost",
            see(started(&[1, 2, 3])),
            Decision::Remove { id: "100".into() },
        ),
        ("not a member", see(started(&[2, 3])), Decision::Add),
    ];
    for (what, seen, expected) in cases {
        assert_eq!(decide(me, &all, &seen), expected, "{what}");
    }
}

#[test]
fn it_waits_rather_than_risk_data_or_quorum() {
    let all = machines();
    let cases = [
        (
            "all data lost",
            Observation {
                started_before: true,
                ..Observation::default()
            },
            "empty",
        ),
        (
            "data lost while another is unhealthy",
            Observation {
                members: Some(started(&[1, 2, 3])),
                unhealthy: vec!["cp-3".into()],
                ..Observation::default()
            },
            "cp-3",
        ),
        (
            "adding while another is unhealthy",
            Observation {
                members: Some(started(&[2, 3])),
                unhealthy: vec!["cp-2".into()],
                ..Observation::default()
            },
            "cp-2",
        ),
        (
            "another learner",
            Observation {
                members: Some(vec![listed(2, true, false), listed(3, false, true)]),
                ..Observation::default()
            },
            "learner",
        ),
    ];
    for (what, seen, word) in cases {
        match decide(&all[0], &all, &seen) {
            Decision::Wait { why } => assert!(why.contains(word), "{what}: {why}"),
            other => panic!("{what}: {other:?}"),
        }
    }
}

#[test]
fn members_that_the_bundle_does_not_know_keep_their_names() {
    let all = machines();
    let mut members = vec![listed(1, false, true), listed(2, true, false), listed(9, true, false)];
    members[2].name = "other".into();
    let seen = Observation {
        members: Some(members),
        ..Observation::default()
    };
    let Decision::Start(Start {
        state: EtcdClusterState::Existing,
        members,
    }) = decide(&all[0], &all, &seen)
    else {
        panic!()
    };
    let names: Vec<_> = members.iter().map(|m| format!("{} {}", m.name, m.address)).collect();
    assert_eq!(names, ["cp-1 10.0.0.1", "cp-2 10.0.0.2", "other 10.0.0.9"]);
}
