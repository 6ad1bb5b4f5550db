//! Operations as ARM's contract has them, and as services answer.

use serde_json::json;

use super::*;

const SELF: &str = "https://arm/r";
const LIMIT: Duration = Duration::from_mins(1);

fn reply(status: u16, headers: &[(&str, &str)], body: Value) -> Reply {
    Reply {
        status,
        headers: headers
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect(),
        body,
    }
}

fn asked(poll: &Poll) -> (&str, Duration) {
    match poll {
        Poll::Again { url, after } => (url, *after),
        other => panic!("{other:?}"),
    }
}

fn done(poll: Poll) -> Value {
    match poll {
        Poll::Done(value) => value,
        other => panic!("{other:?}"),
    }
}

fn in_state(state: &str) -> Value {
    json!({"properties": {"provisioningState": state}})
}

#[test]
fn a_reply_that_is_final_is_the_end() {
    for (method, status, body) in [
        (Method::Put, 200, in_state("Succeeded")),
        (Method::Put, 201, json!({"properties": {}})),
        (Method::Delete, 204, Value::Null),
        (Method::Delete, 200, Value::Null),
        (Method::Post, 200, json!({"a": 1})),
    ] {
        let (_, poll) = Poller::begin(method, SELF, reply(status, &[], body.clone()), LIMIT);
        assert_eq!(done(poll), body, "{method:?} {status}");
    }
}

#[test]
fn an_operation_is_followed_and_the_resource_read_at_its_end() {
    let first = reply(
        201,
        &[("azure-asyncoperation", "https://arm/op"), ("retry-after", "7")],
        in_state("Creating"),
    );
    let (mut poller, poll) = Poller::begin(Method::Put, SELF, first, LIMIT);
    assert_eq!(asked(&poll), ("https://arm/op", Duration::from_secs(7)));
    let running = reply(200, &[("retry-after", "2")], json!({"status": "InProgress"}));
    let poll = poller.next(Some(running), Duration::from_secs(7));
    assert_eq!(asked(&poll), ("https://arm/op", Duration::from_secs(2)));
    let poll = poller.next(
        Some(reply(200, &[], json!({"status": "Succeeded"}))),
        Duration::from_secs(9),
    );
    assert_eq!(asked(&poll).0, SELF);
    // The resource may lag behind its operation, and may disagree with it.
    let poll = poller.next(Some(reply(200, &[], in_state("Updating"))), Duration::from_secs(9));
    assert_eq!(asked(&poll).0, SELF);
    let body = in_state("Succeeded");
    assert_eq!(
        done(poller.next(Some(reply(200, &[], body.clone())), Duration::from_secs(10))),
        body
    );
}

#[test]
fn a_location_is_followed_where_it_leads() {
    let first = reply(202, &[("location", "https://arm/a")], Value::Null);
    let (mut poller, poll) = Poller::begin(Method::Delete, SELF, first, LIMIT);
    assert_eq!(asked(&poll).0, "https://arm/a");
    let poll = poller.next(
        Some(reply(
            202,
            &[("location", "https://arm/b"), ("retry-after", "0")],
            Value::Null,
        )),
        Duration::ZERO,
    );
    assert_eq!(asked(&poll), ("https://arm/b", LEAST));
    assert_eq!(
        done(poller.next(Some(reply(204, &[], Value::Null)), Duration::ZERO)),
        Value::Null
    );
}

#[test]
fn without_headers_the_resource_tells() {
    let (mut poller, poll) = Poller::begin(Method::Put, SELF, reply(201, &[], in_state("Creating")), LIMIT);
    let (url, first) = asked(&poll);
    assert_eq!(url, SELF);
    let second = poller.next(Some(reply(200, &[], in_state("Creating"))), Duration::ZERO);
    assert!(asked(&second).1 > first, "it asks less and less often");
    assert_eq!(
        done(poller.next(Some(reply(200, &[], in_state("Succeeded"))), Duration::ZERO)),
        in_state("Succeeded")
    );
    let (mut poller, poll) = Poller::begin(Method::Delete, SELF, reply(202, &[], Value::Null), LIMIT);
    assert_eq!(asked(&poll).0, SELF);
    let poll = poller.next(Some(reply(200, &[], in_state("Deleting"))), Duration::ZERO);
    assert_eq!(asked(&poll).0, SELF);
    assert_eq!(
        done(poller.next(Some(reply(404, &[], Value::Null)), Duration::ZERO)),
        Value::Null
    );
}

#[test]
fn a_failure_is_shown_from_within() {
    let first = || reply(202, &[("azure-asyncoperation", "https://arm/op")], Value::Null);
    let failed = json!({"status": "Failed", "error": {
        "code": "ResourceDeploymentFailure", "message": "outer",
        "details": [{"code": "AllocationFailed", "message": "no room"}],
    }});
    let (mut poller, _) = Poller::begin(Method::Put, SELF, first(), LIMIT);
    let Poll::Failed(Failure::Ended(error)) = poller.next(Some(reply(200, &[], failed)), Duration::ZERO) else {
        panic!()
    };
    assert_eq!(error.innermost().code, "AllocationFailed");
    let (mut poller, _) = Poller::begin(Method::Put, SELF, first(), LIMIT);
    let canceled = reply(200, &[], json!({"status": "Canceled"}));
    let Poll::Failed(Failure::Ended(error)) = poller.next(Some(canceled), Duration::ZERO) else {
        panic!()
    };
    assert_eq!(error.code, "Canceled");
    // An operation that claims success, and a resource that says otherwise.
    let (mut poller, _) = Poller::begin(Method::Put, SELF, first(), LIMIT);
    poller.next(Some(reply(200, &[], json!({"status": "Succeeded"}))), Duration::ZERO);
    let poll = poller.next(Some(reply(200, &[], in_state("Failed"))), Duration::ZERO);
    assert!(matches!(poll, Poll::Failed(Failure::Ended(_))), "{poll:?}");
}

#[test]
fn throttling_and_bad_gateways_are_waited_out_but_not_for_ever() {
    let first = reply(202, &[("azure-asyncoperation", "https://arm/op")], Value::Null);
    let (mut poller, _) = Poller::begin(Method::Put, SELF, first, LIMIT);
    for _ in 0..50 {
        let poll = poller.next(Some(reply(429, &[("retry-after", "3")], Value::Null)), Duration::ZERO);
        assert_eq!(asked(&poll).1, Duration::from_secs(3));
    }
    for _ in 1..PATIENCE {
        asked(&poller.next(None, Duration::ZERO));
    }
    let poll = poller.next(Some(reply(503, &[], Value::Null)), Duration::ZERO);
    assert!(
        matches!(poll, Poll::Failed(Failure::Refused { status: 503, .. })),
        "{poll:?}"
    );
}

#[test]
fn every_state_that_is_no_end_has_a_deadline() {
    type Case<'a> = (Reply, &'a dyn Fn() -> Reply);
    let running = || reply(200, &[], json!({"status": "InProgress"}));
    let creating = || reply(200, &[], in_state("Creating"));
    let accepted = || reply(202, &[], Value::Null);
    let cases: [Case<'_>; 3] = [
        (
            reply(201, &[("azure-asyncoperation", "https://arm/op")], Value::Null),
            &running,
        ),
        (reply(202, &[("location", "https://arm/op")], Value::Null), &accepted),
        (reply(201, &[], in_state("Creating")), &creating),
    ];
    for (first, then) in cases {
        let (mut poller, _) = Poller::begin(Method::Put, SELF, first, LIMIT);
        // The last question is asked at the deadline, not after it.
        let slow = Reply {
            headers: [("retry-after".to_owned(), "600".to_owned())].into(),
            ..then()
        };
        let poll = poller.next(Some(slow), Duration::from_secs(59));
        assert_eq!(asked(&poll).1, Duration::from_secs(1));
        let poll = poller.next(Some(then()), LIMIT);
        assert!(matches!(poll, Poll::Failed(Failure::NeverEnded { .. })), "{poll:?}");
        let poll = poller.next(None, LIMIT);
        assert!(matches!(poll, Poll::Failed(Failure::NeverEnded { .. })), "{poll:?}");
    }
}
