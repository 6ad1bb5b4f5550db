//! Operations that take a while: what each will have done when it ends, and how it ends.

use std::time::Instant;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::kind::Kind;
use super::refusal::Refusal;
use super::room::{Event, Power};
use super::server::Reply;
use super::store::{State, Store, guid};

/// How an operation failed.
pub(super) type Failure = Refusal;

/// What an operation does when it ends well.
#[derive(Clone, Debug)]
pub(super) enum Effect {
    /// The resource is as it was put.
    Settle,
    /// The resource is gone.
    Remove,
    /// The subnet of this name is gone from the network.
    RemoveSubnet(String),
    /// The group of this name is gone, and all that was in it.
    RemoveGroup(String),
    /// The machine runs, or doesn't.
    Power(Power),
}

/// An operation, under way or over.
#[derive(Clone, Debug)]
pub(super) struct Operation {
    /// The id of the resource concerned.
    pub(super) target: String,
    pub(super) effect: Effect,
    pub(super) started: Timestamp,
    /// How it's going to fail, where it does.
    pub(super) failure: Option<Failure>,
    pub(super) ended: Option<Timestamp>,
    namespace: &'static str,
    location: String,
}

/// What a test has asked to happen to the operation that a call starts.
#[derive(Clone, Debug, Default)]
pub(super) struct Twist {
    pub(super) never_ends: bool,
    pub(super) failure: Option<Failure>,
    pub(super) hidden: Option<std::time::Duration>,
}

impl Store {
    /// Begins an operation on a resource, and returns the answer's headers: `Azure-AsyncOperation`, `Location`, `Retry-After`.
    pub(super) fn begin(
        &mut self,
        kind: &'static Kind,
        id: &str,
        effect: Effect,
        twist: &Twist,
    ) -> Vec<(String, String)> {
        let location = self
            .get(id)
            .map_or_else(|| "westeurope".to_owned(), |r| r.location().to_owned());
        let name = self.start(id, effect, twist, kind.namespace, &location);
        let version = kind.versions[0];
        let base = format!(
            "{}{}/providers/{}/locations/{location}",
            self.endpoint,
            self.scope(),
            kind.namespace
        );
        let monitor = if kind.namespace == "Microsoft.Network" {
            format!("{base}/operationResults/{name}?api-version={version}")
        } else {
            format!("{base}/operations/{name}?monitor=true&api-version={version}")
        };
        vec![
            (
                "Azure-AsyncOperation".to_owned(),
                format!("{base}/operations/{name}?api-version={version}"),
            ),
            ("Location".to_owned(), monitor),
            ("Retry-After".to_owned(), self.options.retry_after.to_string()),
        ]
    }

    /// Begins the removal of a group: ARM names it by `Location` alone.
    pub(super) fn begin_removal_of_group(&mut self, id: &str, group: String, twist: &Twist) -> Vec<(String, String)> {
        let name = self.start(id, Effect::RemoveGroup(group), twist, "Microsoft.Resources", "global");
        let link = format!(
            "{}{}/operationresults/{name}?api-version=2021-04-01",
            self.endpoint,
            self.scope()
        );
        vec![
            ("Location".to_owned(), link),
            ("Retry-After".to_owned(), self.options.retry_after.to_string()),
        ]
    }

    fn start(&mut self, id: &str, effect: Effect, twist: &Twist, namespace: &'static str, location: &str) -> String {
        let name = guid(self.serial());
        let operation = Operation {
            target: id.to_owned(),
            effect,
            started: Timestamp::now(),
            failure: twist.failure.clone(),
            ended: None,
            namespace,
            location: location.to_owned(),
        };
        self.operations.insert(name.clone(), operation);
        if !twist.never_ends {
            self.due.insert((Instant::now() + self.options.settle, name.clone()));
        }
        name
    }

    /// Ends all operations whose time has come.
    pub(super) fn advance(&mut self) {
        let now = Instant::now();
        while let Some(first) = self.due.first()
            && first.0 <= now
        {
            if let Some((_, name)) = self.due.pop_first() {
                self.end(&name);
            }
        }
    }

    fn end(&mut self, name: &str) {
        let Some(operation) = self.operations.get_mut(name).filter(|o| o.ended.is_none()) else {
            return;
        };
        operation.ended = Some(Timestamp::now());
        let Operation {
            target,
            effect,
            failure,
            ..
        } = operation.clone();
        if let Some(failure) = failure {
            if let Effect::RemoveGroup(group) = &effect
                && let Some(group) = self.groups.get_mut(&group.to_ascii_lowercase())
            {
                group.deleting = false;
            }
            if let Some(resource) = self.get_mut(&target) {
                resource.state = State::Failed;
                resource.failure = Some(failure);
            }
            return;
        }
        match effect {
            Effect::Settle => self.settle(&target),
            Effect::Remove => self.remove(&target),
            Effect::RemoveSubnet(subnet) => {
                self.drop_subnet(&target, &subnet);
                self.settle(&target);
            }
            Effect::RemoveGroup(group) => self.remove_group(&group),
            Effect::Power(power) => {
                self.settle(&target);
                self.set_power(&target, power);
            }
        }
    }

    fn settle(&mut self, id: &str) {
        let Some(resource) = self.get_mut(id) else {
            return;
        };
        resource.state = State::Succeeded;
        resource.failure = None;
        if resource.is("virtualMachines") && resource.power.is_none() {
            resource.power = Some(Power::Running);
            let id = resource.id.clone();
            if let Some(machine) = self.virtual_machine(&id) {
                self.tell(Event::Created(Box::new(machine)));
            }
        }
    }

    pub(super) fn set_power(&mut self, id: &str, power: Power) {
        let Some(resource) = self.get_mut(id) else {
            return;
        };
        resource.power = Some(power);
        let id = resource.id.clone();
        self.tell(Event::Power { id, power });
    }

    fn remove_group(&mut self, group: &str) {
        let inside: Vec<String> = self
            .resources
            .values()
            .filter(|r| r.group.eq_ignore_ascii_case(group))
            .map(|r| r.id.clone())
            .collect();
        for id in inside {
            self.remove(&id);
        }
        self.groups.remove(&group.to_ascii_lowercase());
    }

    /// What an operation's own address answers: its state.
    pub(super) fn operation_status(&self, name: &str) -> Result<Reply, Refusal> {
        let operation = self.operation(name)?;
        let mut status = json!({"name": name, "startTime": operation.started.to_string()});
        match (&operation.ended, &operation.failure) {
            (None, _) => {
                status["status"] = json!("InProgress");
                return Ok(Reply::with(200, &status).header("Retry-After", &self.options.retry_after.to_string()));
            }
            (Some(ended), None) => {
                status["status"] = json!("Succeeded");
                status["endTime"] = json!(ended.to_string());
            }
            (Some(ended), Some(failure)) => {
                status["status"] = json!("Failed");
                status["endTime"] = json!(ended.to_string());
                status["error"] = failure.error();
            }
        }
        Ok(Reply::with(200, &status))
    }

    /// What an operation's `Location` answers: 202 until it ends, then its result.
    pub(super) fn operation_result(&self, name: &str, link: &str) -> Result<Reply, Refusal> {
        let operation = self.operation(name)?;
        if operation.ended.is_none() {
            return Ok(Reply::empty(202)
                .header("Location", link)
                .header("Retry-After", &self.options.retry_after.to_string()));
        }
        if let Some(failure) = &operation.failure {
            return Err(failure.clone());
        }
        match operation.effect {
            Effect::Settle => match self.get(&operation.target) {
                Some(resource) => Ok(Reply::with(200, &self.render(resource, &self.uses()))),
                None => Ok(Reply::empty(204)),
            },
            Effect::RemoveGroup(_) | Effect::Power(_) => Ok(Reply::empty(200)),
            Effect::Remove | Effect::RemoveSubnet(_) => Ok(Reply::empty(204)),
        }
    }

    fn operation(&self, name: &str) -> Result<&Operation, Refusal> {
        self.operations
            .get(name)
            .ok_or_else(|| Refusal::new(404, "NotFound", format!("The operation '{name}' was not found.")))
    }

    /// The address of the operation under way on a resource, for errors that name it.
    pub(super) fn under_way(&self, id: &str) -> Value {
        let link = self
            .operations
            .iter()
            .find(|(_, o)| o.ended.is_none() && o.target.eq_ignore_ascii_case(id))
            .map(|(name, o)| {
                format!(
                    "{}{}/providers/{}/locations/{}/operations/{name}",
                    self.endpoint,
                    self.scope(),
                    o.namespace,
                    o.location
                )
            });
        json!(link.unwrap_or_default())
    }
}
