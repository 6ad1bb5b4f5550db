//! What each call does.

use std::collections::BTreeMap;
use std::time::Instant;

use http::Method;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::catalogue;
use super::groups::{being_deleted, check_tags, no_such_method};
use super::kind::Kind;
use super::network::no_such_reference;
use super::operations::{Effect, Twist};
use super::place::{place, preconditions, same_place};
use super::refusal::Refusal;
use super::room::Power;
use super::route::Route;
use super::server::Reply;
use super::shapes;
use super::store::{Resource, State, Store, child, references, text};
use super::strict::{self, Dialect};

/// One request, read.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) route: Route,
    pub(super) query: BTreeMap<String, String>,
    pub(super) headers: http::HeaderMap,
    pub(super) body: Option<Value>,
}

impl Call {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.query.get(&name.to_ascii_lowercase()).map(String::as_str)
    }

    pub(super) fn body(&self) -> Result<&Value, Refusal> {
        self.body.as_ref().ok_or_else(|| {
            Refusal::new(
                400,
                "InvalidRequestContent",
                "The request content was invalid and could not be deserialized: there is no JSON in it.",
            )
        })
    }
}

impl Store {
    /// Answers a call that's authenticated.
    pub(super) fn answer(&mut self, call: &Call, twist: &Twist) -> Result<Reply, Refusal> {
        self.check_scope(call)?;
        let get = call.method == Method::GET;
        match &call.route {
            Route::Subscription if get => Ok(self.subscription()),
            Route::Locations if get => Ok(Reply::with(200, &catalogue::locations(&self.scope()))),
            Route::Namespace(name) if get => Ok(self.namespace(name)),
            Route::Register(name) if call.method == Method::POST => Ok(self.register(name)),
            Route::Group(name) => self.resource_group(call, name, twist),
            Route::Operation(name) if get => self.operation_status(name),
            Route::OperationResult(name) if get => self.operation_result(name, &self.link(call)),
            Route::Groups
            | Route::Resources(_)
            | Route::Skus
            | Route::Usages(_)
            | Route::ImageVersions { .. }
            | Route::List(..)
            | Route::Subnets(..)
                if get =>
            {
                self.list(call)
            }
            Route::One(kind, group, name) => match call.method {
                Method::GET => self.get_one(call, kind, group, name),
                Method::PUT => self.put(call, kind, group, name, twist),
                Method::PATCH => self.patch(call, kind, group, name, twist),
                Method::DELETE => self.delete(call, kind, group, name, twist),
                _ => Err(no_such_method(&call.method)),
            },
            Route::Action(kind, group, name, action) => self.act(call, kind, group, name, action, twist),
            Route::Subnet(group, network, name) => self.subnet(call, group, network, name, twist),
            Route::Nowhere => Err(Refusal::new(
                404,
                "InvalidResourceType",
                format!("The resource type could not be found for the path '{}'.", call.path),
            )),
            _ => Err(no_such_method(&call.method)),
        }
    }

    fn check_scope(&self, call: &Call) -> Result<(), Refusal> {
        let versions = call.route.versions();
        match call.parameter("api-version") {
            None if !versions.is_empty() => {
                return Err(Refusal::new(
                    400,
                    "MissingApiVersionParameter",
                    "The api-version query parameter (?api-version=) is required for all requests.",
                ));
            }
            Some(version) if !versions.is_empty() && !versions.contains(&version) => {
                return Err(Refusal::new(
                    400,
                    "InvalidApiVersionParameter",
                    format!(
                        "The api-version '{version}' is invalid. The supported versions are '{}'.",
                        versions.join(",")
                    ),
                ));
            }
            _ => {}
        }
        if let Some(namespace) = call.route.namespace()
            && self.catalogue.unregistered.contains(&namespace.to_ascii_lowercase())
        {
            return Err(Refusal::new(
                409,
                "MissingSubscriptionRegistration",
                format!(
                    "The subscription is not registered to use namespace '{namespace}'. See https://aka.ms/rps-not-found for how \
                     to register subscriptions."
                ),
            ));
        }
        Ok(())
    }

    /// The call's own address.
    pub(super) fn link(&self, call: &Call) -> String {
        let query: Vec<String> = call
            .query
            .iter()
            .map(|(k, v)| format!("{k}={}", super::server::escaped(v)))
            .collect();
        format!("{}{}?{}", self.endpoint, call.path, query.join("&"))
    }

    fn found(&self, kind: &Kind, group: &str, name: &str) -> Result<&Resource, Refusal> {
        self.group(group)?;
        self.get(&self.id(group, kind, name))
            .ok_or_else(|| Refusal::not_found(&kind.full(), name, group))
    }

    fn get_one(&self, call: &Call, kind: &Kind, group: &str, name: &str) -> Result<Reply, Refusal> {
        let resource = self.found(kind, group, name)?;
        let mut rendered = self.render(resource, &self.uses());
        match call.parameter("$expand") {
            Some(expand) if resource.is("virtualMachines") && expand.eq_ignore_ascii_case("instanceView") => {
                rendered["properties"]["instanceView"] = Self::instance_view(resource);
            }
            Some(expand) if resource.is("virtualMachines") && !expand.eq_ignore_ascii_case("userData") => {
                return Err(Refusal::new(
                    400,
                    "InvalidParameter",
                    format!("The value '{expand}' of $expand is not allowed."),
                ));
            }
            _ => {}
        }
        Ok(Reply::with(200, &rendered))
    }

    fn put(
        &mut self,
        call: &Call,
        kind: &'static Kind,
        group: &str,
        name: &str,
        twist: &Twist,
    ) -> Result<Reply, Refusal> {
        let known = self.group(group)?;
        if known.deleting {
            return Err(being_deleted(group));
        }
        let group = known.name.clone();
        kind.check_name(name)?;
        let body = strict::check(kind.put, call.body()?, kind.dialect)?;
        check_tags(&body)?;
        let Value::Object(mut body) = body else {
            return Err(no_such_method(&call.method));
        };
        place(&mut body, kind)?;
        let id = self.id(&group, kind, name);
        let old = self.get(&id).cloned();
        preconditions(call, old.as_ref())?;
        if let Some(old) = &old {
            same_place(&body, old)?;
            self.idle(old)?;
        }
        self.check_references(&id, &body, kind)?;
        match kind.plural {
            "disks" => self.prepare_disk(&id, &mut body, old.as_ref())?,
            "virtualMachines" => self.prepare_machine(&id, &group, &mut body, old.as_ref())?,
            plural => self.prepare_network(plural, &id, &mut body, old.as_ref())?,
        }
        let made = old.is_none();
        let serial = self.serial();
        let resource = Resource {
            kind,
            id: old.as_ref().map_or_else(|| id.clone(), |o| o.id.clone()),
            group,
            name: old.as_ref().map_or_else(|| name.to_owned(), |o| o.name.clone()),
            body,
            state: if made { State::Creating } else { State::Updating },
            etag: serial,
            created: old.as_ref().map_or_else(Timestamp::now, |o| o.created),
            listed: old.as_ref().map_or_else(
                || Instant::now() + twist.hidden.unwrap_or(self.options.list_lag),
                |o| o.listed,
            ),
            power: old.as_ref().and_then(|o| o.power),
            failure: None,
        };
        self.resources.insert(id.to_ascii_lowercase(), resource.clone());
        let headers = self.begin(kind, &id, Effect::Settle, twist);
        let status = if made || kind.created == 202 { kind.created } else { 200 };
        Ok(Reply::with(status, &self.render(&resource, &self.uses())).headers(headers))
    }

    fn patch(
        &mut self,
        call: &Call,
        kind: &'static Kind,
        group: &str,
        name: &str,
        twist: &Twist,
    ) -> Result<Reply, Refusal> {
        let resource = self.found(kind, group, name)?.clone();
        let body = strict::check(kind.patch, call.body()?, kind.dialect)?;
        check_tags(&body)?;
        preconditions(call, Some(&resource))?;
        self.idle(&resource)?;
        if let Some(size) = body.pointer("/properties/diskSizeGB").and_then(Value::as_i64)
            && resource
                .properties()
                .get("diskSizeGB")
                .and_then(Value::as_i64)
                .is_some_and(|b| size < b)
        {
            return Err(Refusal::new(
                400,
                "BadRequest",
                format!("Disk {} cannot be made smaller.", resource.id),
            ));
        }
        let serial = self.serial();
        let Some(found) = self.get_mut(&resource.id) else {
            return Err(Refusal::not_found(&kind.full(), name, group));
        };
        for field in ["tags", "sku"] {
            if let Some(value) = body.get(field) {
                found.body.insert(field.to_owned(), value.clone());
            }
        }
        if let Some(size) = body.pointer("/properties/diskSizeGB") {
            found.body["properties"]["diskSizeGB"] = size.clone();
        }
        found.etag = serial;
        found.state = State::Updating;
        let after = found.clone();
        let headers = self.begin(kind, &resource.id, Effect::Settle, twist);
        let status = if kind.created == 202 { 202 } else { 200 };
        Ok(Reply::with(status, &self.render(&after, &self.uses())).headers(headers))
    }

    fn delete(
        &mut self,
        call: &Call,
        kind: &'static Kind,
        group: &str,
        name: &str,
        twist: &Twist,
    ) -> Result<Reply, Refusal> {
        self.group(group)?;
        let Some(resource) = self.get(&self.id(group, kind, name)).cloned() else {
            return Ok(Reply::empty(204));
        };
        preconditions(call, Some(&resource))?;
        match kind.plural {
            "virtualMachines" => {}
            "disks" => self.check_disk_delete(&resource)?,
            _ => self.check_network_delete(&resource)?,
        }
        if resource.state == State::Deleting || kind.dialect == Dialect::Network {
            self.idle(&resource)?;
        }
        self.abandon(&resource.id);
        if let Some(found) = self.get_mut(&resource.id) {
            found.state = State::Deleting;
        }
        let headers = self.begin(kind, &resource.id, Effect::Remove, twist);
        Ok(Reply::empty(202).headers(headers))
    }

    /// Deleting a machine that is being made ends its making.
    fn abandon(&mut self, id: &str) {
        let now = Timestamp::now();
        for operation in self.operations.values_mut() {
            if operation.ended.is_none() && operation.target.eq_ignore_ascii_case(id) {
                operation.ended = Some(now);
                operation.failure = Some(Refusal::new(
                    409,
                    "OperationPreempted",
                    "Operation execution has been preempted by a more recent operation.",
                ));
            }
        }
    }

    fn act(
        &mut self,
        call: &Call,
        kind: &'static Kind,
        group: &str,
        name: &str,
        action: &str,
        twist: &Twist,
    ) -> Result<Reply, Refusal> {
        let resource = self.found(kind, group, name)?.clone();
        let unknown = || {
            Refusal::new(
                404,
                "InvalidResourceType",
                format!("The resource type could not be found for the path '{}'.", call.path),
            )
        };
        if !resource.is("virtualMachines") {
            return Err(unknown());
        }
        let action = action.to_ascii_lowercase();
        if action == "instanceview" && call.method == Method::GET {
            return Ok(Reply::with(200, &Self::instance_view(&resource)));
        }
        if call.method != Method::POST {
            return Err(no_such_method(&call.method));
        }
        let power = match action.as_str() {
            "start" | "restart" => Power::Running,
            "poweroff" => Power::Stopped,
            "deallocate" => Power::Deallocated,
            "retrievebootdiagnosticsdata" => return self.boot_diagnostics(&resource),
            _ => return Err(unknown()),
        };
        self.idle(&resource)?;
        if resource.state == State::Failed && resource.power.is_none() {
            return Err(Refusal::new(
                409,
                "OperationNotAllowed",
                format!("VM '{name}' failed to be provisioned, so that it can't be started or stopped."),
            ));
        }
        if let Some(found) = self.get_mut(&resource.id) {
            found.state = State::Updating;
        }
        let headers = self.begin(kind, &resource.id, Effect::Power(power), twist);
        Ok(Reply::empty(202).headers(headers))
    }

    fn boot_diagnostics(&self, machine: &Resource) -> Result<Reply, Refusal> {
        if machine
            .properties()
            .get("diagnosticsProfile")
            .and_then(|d| d.pointer("/bootDiagnostics/enabled"))
            != Some(&json!(true))
        {
            return Err(Refusal::new(
                409,
                "OperationNotAllowed",
                format!("Boot diagnostics is not enabled on VM '{}'.", machine.name),
            ));
        }
        let uri = format!(
            "{}/console/{}?sig=emulated",
            self.endpoint,
            text(&Value::Object(machine.body.clone()), "/properties/vmId").unwrap_or_default()
        );
        Ok(Reply::with(
            200,
            &json!({"serialConsoleLogBlobUri": uri, "consoleScreenshotBlobUri": uri}),
        ))
    }

    fn subnet(&mut self, call: &Call, group: &str, network: &str, name: &str, twist: &Twist) -> Result<Reply, Refusal> {
        let Some(kind) = Kind::named("virtualNetworks") else {
            return Err(no_such_method(&call.method));
        };
        let parent = self.found(kind, group, network)?.clone();
        let there = child(parent.properties(), "subnets", name).is_some();
        let missing = || {
            Refusal::new(
                404,
                "NotFound",
                format!("Resource {}/subnets/{name} not found.", parent.id),
            )
        };
        match call.method {
            Method::GET => Ok(Reply::with(
                200,
                &self.render_subnet(&parent, name).ok_or_else(missing)?,
            )),
            Method::DELETE if !there => Ok(Reply::empty(204)),
            Method::DELETE => {
                self.idle(&parent)?;
                self.check_subnet_delete(&parent, name)?;
                if let Some(found) = self.get_mut(&parent.id) {
                    found.state = State::Updating;
                }
                let headers = self.begin(kind, &parent.id, Effect::RemoveSubnet(name.to_owned()), twist);
                Ok(Reply::empty(202).headers(headers))
            }
            Method::PUT => {
                kind.check_name(name)?;
                let mut subnet = strict::check(&shapes::SUBNET_ALONE, call.body()?, Dialect::Network)?;
                subnet["name"] = json!(name);
                self.idle(&parent)?;
                let mut body = parent.body.clone();
                let properties = body
                    .get_mut("properties")
                    .and_then(Value::as_object_mut)
                    .ok_or_else(missing)?;
                let list = properties.entry("subnets").or_insert_with(|| json!([]));
                let list = list.as_array_mut().ok_or_else(missing)?;
                list.retain(|s| !text(s, "/name").is_some_and(|n| n.eq_ignore_ascii_case(name)));
                list.push(subnet);
                self.check_references(&parent.id, &body, kind)?;
                self.prepare_network(kind.plural, &parent.id, &mut body, Some(&parent))?;
                let serial = self.serial();
                if let Some(found) = self.get_mut(&parent.id) {
                    found.body = body;
                    found.state = State::Updating;
                    found.etag = serial;
                }
                let headers = self.begin(kind, &parent.id, Effect::Settle, twist);
                let after = self
                    .get(&parent.id)
                    .and_then(|p| self.render_subnet(p, name))
                    .ok_or_else(missing)?;
                Ok(Reply::with(if there { 200 } else { 201 }, &after).headers(headers))
            }
            _ => Err(no_such_method(&call.method)),
        }
    }

    /// Refuses where an operation is under way on it.
    fn idle(&self, resource: &Resource) -> Result<(), Refusal> {
        if !resource.state.busy() {
            return Ok(());
        }
        Err(match resource.kind.dialect {
            Dialect::Network | Dialect::Resources => Refusal::new(
                429,
                "AnotherOperationInProgress",
                format!(
                    "Another operation on this or dependent resource is in progress. To retrieve status of the operation use uri: {}.",
                    self.under_way(&resource.id).as_str().unwrap_or_default()
                ),
            )
            .retry_after(self.options.retry_after.max(1)),
            Dialect::Compute => Refusal::new(
                409,
                "Conflict",
                "The request failed due to conflict with a concurrent request. To resolve it, please refer to \
                 https://aka.ms/activitylog to get more details on the conflicting requests.",
            ),
        })
    }

    /// Everything that is referred to has to be there, in the same location, and ready.
    fn check_references(&self, id: &str, body: &Map<String, Value>, kind: &Kind) -> Result<(), Refusal> {
        let own = format!("{}/", id.to_ascii_lowercase());
        let location = body.get("location").and_then(Value::as_str).unwrap_or_default();
        for (by, of) in references(id, body) {
            if of.to_ascii_lowercase().starts_with(&own) {
                continue;
            }
            let disk = strict::type_of(&of).eq_ignore_ascii_case("disks");
            let Some(target) = self.owner(&of) else {
                return Err(if disk {
                    Refusal::not_found(
                        "Microsoft.Compute/disks",
                        of.rsplit('/').next().unwrap_or_default(),
                        of.split('/').nth(4).unwrap_or_default(),
                    )
                } else {
                    no_such_reference(&of, &by)
                });
            };
            if target.location() != location {
                return Err(no_such_reference(&of, &by));
            }
            if target.state == State::Succeeded {
                continue;
            }
            if kind.dialect == Dialect::Compute && disk {
                return Err(Refusal::new(
                    409,
                    "Conflict",
                    format!(
                        "Disk {} is in state {} and cannot be attached to {by} now.",
                        target.name,
                        target.state.as_str()
                    ),
                ));
            }
            return Err(Refusal::retryable(
                "ReferencedResourceNotProvisioned",
                format!(
                    "Cannot proceed with operation because resource {of} used by resource {by} is not in Succeeded state. \
                     Resource is in {} state and the last operation that updated/is updating the resource is Put{}Operation.",
                    target.state.as_str(),
                    target.kind.plural
                ),
            ));
        }
        Ok(())
    }
}
