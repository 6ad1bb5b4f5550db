//! How an Azure Resource Manager operation is followed to its end. Pure: replies go in, what to ask next comes out.
//!
//! The contract is ARM's ["asynchronous operations"](https://github.com/cloud-and-ai-microsoft/resource-provider-contract/blob/master/v1.0/async-api-reference.md):
//! a reply with `Azure-AsyncOperation` is followed by that URL's `status`; else one with `202` and `Location` by that URL until it
//! answers something else than `202`; else the resource itself by its `provisioningState`. `Retry-After` says how long to wait. A
//! resource that was put is read once more at the end, and what it says of itself is believed over the operation.

use std::time::Duration;

use serde_json::Value;

use crate::error::{ArmError, Failure};
use crate::reply::Reply;

/// The shortest time between two questions, whatever the server says.
const LEAST: Duration = Duration::from_millis(20);
/// The longest time between two questions where the server says nothing.
const MOST: Duration = Duration::from_secs(5);
/// How many questions in a row may get no usable answer.
const PATIENCE: u32 = 8;

/// What was asked for in the first place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    /// Make or change a resource; at its end the resource is read again.
    Put,
    /// Do something with a resource; there is nothing to read at its end.
    Post,
    /// Remove a resource.
    Delete,
}

/// What to do next.
#[derive(Debug)]
pub(crate) enum Poll {
    /// Ask this URL, after this long.
    Again { url: String, after: Duration },
    /// The operation has succeeded; the resource as it is now, or nothing where there is none.
    Done(Value),
    /// The operation has failed, or was not heard of in time.
    Failed(Failure),
}

/// Where the operation's end is to be seen.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Watch {
    /// By the `status` of this URL's document.
    Status(String),
    /// By this URL's answering something else than 202.
    Location(String),
    /// By the resource's own `provisioningState`.
    Resource,
}

/// An operation that is followed.
#[derive(Debug)]
pub(crate) struct Poller {
    method: Method,
    resource: String,
    watch: Watch,
    limit: Duration,
    interval: Duration,
    unusable: u32,
}

impl Poller {
    /// Begins with the reply to the first request, which was no error. `limit` is how long the operation may take.
    pub(crate) fn begin(method: Method, resource: &str, first: Reply, limit: Duration) -> (Self, Poll) {
        let mut poller = Self {
            method,
            resource: resource.to_owned(),
            watch: Watch::Resource,
            limit,
            interval: Duration::from_millis(100),
            unusable: 0,
        };
        if let Some(url) = first.header("azure-asyncoperation") {
            poller.watch = Watch::Status(url.to_owned());
        } else if first.status == 202
            && let Some(url) = first.header("location")
        {
            poller.watch = Watch::Location(url.to_owned());
        } else {
            let poll = poller.resource(first);
            return (poller, poll);
        }
        let poll = poller.again(&first);
        (poller, poll)
    }

    /// Takes the reply to what [`Poll::Again`] asked for; `None` where there was none. `elapsed` counts from the first request.
    pub(crate) fn next(&mut self, reply: Option<Reply>, elapsed: Duration) -> Poll {
        let poll = self.judge(reply);
        match poll {
            Poll::Again { url, .. } if elapsed >= self.limit => {
                Poll::Failed(Failure::NeverEnded { url, after: self.limit })
            }
            Poll::Again { url, after } => Poll::Again {
                url,
                after: after.min(self.limit.saturating_sub(elapsed)),
            },
            end => end,
        }
    }

    fn judge(&mut self, reply: Option<Reply>) -> Poll {
        let Some(reply) = reply else {
            return self.unusable(None);
        };
        match reply.status {
            // Throttled: neither an answer nor a reason to give up.
            429 => return self.again(&reply),
            408 | 500..=599 => return self.unusable(Some(reply)),
            404 if self.method == Method::Delete => return Poll::Done(Value::Null),
            400..=499 => return Poll::Failed(Failure::refused(reply)),
            _ => self.unusable = 0,
        }
        match self.watch {
            Watch::Status(_) => self.status(reply),
            Watch::Location(ref mut url) => {
                if reply.status != 202 {
                    return self.finished(&reply);
                }
                if let Some(moved) = reply.header("location") {
                    moved.clone_into(url);
                }
                self.again(&reply)
            }
            Watch::Resource => self.resource(reply),
        }
    }

    fn status(&mut self, reply: Reply) -> Poll {
        let status = reply.body.get("status").and_then(Value::as_str).unwrap_or("");
        match State::of(status) {
            State::Succeeded => self.finished(&reply),
            State::Failed => Poll::Failed(Failure::Ended(ArmError::of_operation(&reply.body, status))),
            // Without a document, the HTTP status alone says whether it has ended.
            State::Unknown if status.is_empty() && matches!(reply.status, 200 | 201 | 204) => self.finished(&reply),
            State::Unknown | State::Running => self.again(&reply),
        }
    }

    /// The operation says that it has succeeded: what was put is read.
    fn finished(&mut self, reply: &Reply) -> Poll {
        match self.method {
            Method::Delete | Method::Post => Poll::Done(reply.body.clone()),
            Method::Put => {
                self.watch = Watch::Resource;
                Poll::Again {
                    url: self.resource.clone(),
                    after: Duration::ZERO,
                }
            }
        }
    }

    fn resource(&mut self, reply: Reply) -> Poll {
        let provisioning = reply
            .body
            .pointer("/properties/provisioningState")
            .and_then(Value::as_str);
        match (self.method, provisioning.map(State::of)) {
            (Method::Put, Some(State::Running | State::Unknown)) => self.again(&reply),
            (Method::Put, Some(State::Failed)) => {
                let state = provisioning.unwrap_or("Failed").to_owned();
                Poll::Failed(Failure::Ended(ArmError::of_resource(&reply.body, &state)))
            }
            // Nothing says where to look for the end of it: the resource tells by not being there any more.
            (Method::Delete, _) if reply.status == 202 || (reply.status == 200 && provisioning.is_some()) => {
                self.again(&reply)
            }
            _ => Poll::Done(reply.body),
        }
    }

    fn again(&mut self, reply: &Reply) -> Poll {
        let after = reply.retry_after().unwrap_or_else(|| self.backed_off());
        Poll::Again {
            url: self.url(),
            after: after.max(LEAST),
        }
    }

    fn unusable(&mut self, reply: Option<Reply>) -> Poll {
        self.unusable += 1;
        if self.unusable < PATIENCE {
            let after = reply.as_ref().and_then(Reply::retry_after);
            let after = after.unwrap_or_else(|| self.backed_off()).max(LEAST);
            return Poll::Again { url: self.url(), after };
        }
        Poll::Failed(match reply {
            Some(reply) => Failure::refused(reply),
            None => Failure::Lost("no answer to the question how far it is".into()),
        })
    }

    fn backed_off(&mut self) -> Duration {
        let now = self.interval;
        self.interval = (now * 2).min(MOST);
        now
    }

    fn url(&self) -> String {
        match &self.watch {
            Watch::Status(url) | Watch::Location(url) => url.clone(),
            Watch::Resource => self.resource.clone(),
        }
    }
}

/// What a `status` or a `provisioningState` comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    Succeeded,
    Failed,
    Unknown,
}

impl State {
    /// ARM knows three ends; everything else is a state on the way.
    fn of(text: &str) -> Self {
        match text.to_ascii_lowercase().as_str() {
            "succeeded" => Self::Succeeded,
            "failed" | "canceled" | "cancelled" => Self::Failed,
            "" => Self::Unknown,
            _ => Self::Running,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SELF: &str = "https://arm/r";
    const LIMIT: Duration = Duration::from_secs(60);

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
        let running = || reply(200, &[], json!({"status": "InProgress"}));
        let creating = || reply(200, &[], in_state("Creating"));
        let accepted = || reply(202, &[], Value::Null);
        type Case<'a> = (Reply, &'a dyn Fn() -> Reply);
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
}
