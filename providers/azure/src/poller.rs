//! How an Azure Resource Manager operation is followed to its end. Pure: replies go in, what to ask next comes out.
//!
//! The contract is ARM's [asynchronous operations](https://github.com/cloud-and-ai-microsoft/resource-provider-contract/blob/master/v1.0/async-api-reference.md):
//! a reply with `Azure-AsyncOperation` is followed by that URL's `status`; else one with `202` and `Location` by that URL until it
//! answers something else than `202`; else the resource itself by its `provisioningState`. `Retry-After` says how long to wait. A
//! resource that was put is read once more at the end, and what it says of itself is believed over the operation; what came of a
//! POST is read at its `Location`.

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
    /// Where the result of a POST is, once its operation has succeeded.
    result: Option<String>,
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
            result: first
                .header("location")
                .filter(|_| method == Method::Post)
                .map(ToOwned::to_owned),
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

    /// Takes the reply to what [`Poll::Again`] asked for; `None` where there was none. `elapsed` counts from the first reply.
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
            400..=499 => return Poll::Failed(Failure::refused(&reply)),
            _ => self.unusable = 0,
        }
        match self.watch {
            Watch::Status(_) => self.status(&reply),
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

    fn status(&mut self, reply: &Reply) -> Poll {
        let status = reply.body.get("status").and_then(Value::as_str).unwrap_or("");
        match State::of(status) {
            State::Succeeded => self.finished(reply),
            State::Failed => Poll::Failed(Failure::Ended(ArmError::of_operation(&reply.body, status))),
            // Without a document, the HTTP status alone says whether it has ended.
            State::Unknown if status.is_empty() && matches!(reply.status, 200 | 201 | 204) => self.finished(reply),
            State::Unknown | State::Running => self.again(reply),
        }
    }

    /// The operation says that it has succeeded: what was put, or what came of it, is read.
    fn finished(&mut self, reply: &Reply) -> Poll {
        match self.method {
            Method::Post if matches!(self.watch, Watch::Status(_)) && self.result.is_some() => {
                let url = self.result.take().unwrap_or_default();
                self.watch = Watch::Location(url.clone());
                Poll::Again {
                    url,
                    after: Duration::ZERO,
                }
            }
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
            Some(reply) => Failure::refused(&reply),
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
mod tests;
