//! Subscriptions, namespaces and resource groups.

use http::Method;
use serde_json::{Value, json};

use super::catalogue;
use super::handle::Call;
use super::operations::Twist;
use super::refusal::Refusal;
use super::server::Reply;
use super::shapes;
use super::store::{Group, Store, text};
use super::strict::{self, Dialect};

impl Store {
    pub(super) fn subscription(&self) -> Reply {
        Reply::with(
            200,
            &json!({
                "id": self.scope(),
                "subscriptionId": self.options.subscription,
                "tenantId": self.options.tenant,
                "displayName": "emulated",
                "state": "Enabled",
                "subscriptionPolicies": {},
            }),
        )
    }

    pub(super) fn namespace(&self, namespace: &str) -> Reply {
        let registered = !self.catalogue.unregistered.contains(&namespace.to_ascii_lowercase());
        Reply::with(
            200,
            &json!({
                "id": format!("{}/providers/{namespace}", self.scope()),
                "namespace": namespace,
                "registrationState": if registered { "Registered" } else { "NotRegistered" },
                "resourceTypes": [],
            }),
        )
    }

    pub(super) fn register(&mut self, namespace: &str) -> Reply {
        self.catalogue.unregistered.remove(&namespace.to_ascii_lowercase());
        self.namespace(namespace)
    }

    pub(super) fn render_group(&self, group: &Group) -> Value {
        let mut value = json!({
            "id": format!("{}/resourceGroups/{}", self.scope(), group.name),
            "name": group.name,
            "type": "Microsoft.Resources/resourceGroups",
            "location": group.location,
            "properties": {"provisioningState": if group.deleting { "Deleting" } else { "Succeeded" }},
        });
        if let Some(tags) = &group.tags {
            value["tags"] = tags.clone();
        }
        if let Some(by) = &group.managed_by {
            value["managedBy"] = by.clone();
        }
        value
    }

    pub(super) fn resource_group(&mut self, call: &Call, name: &str, twist: &Twist) -> Result<Reply, Refusal> {
        match call.method {
            Method::HEAD => Ok(Reply::empty(if self.group(name).is_ok() { 204 } else { 404 })),
            Method::GET => Ok(Reply::with(200, &self.render_group(self.group(name)?))),
            Method::PUT => self.put_group(name, call.body()?),
            Method::PATCH => {
                let body = strict::check(&shapes::TAGS, call.body()?, Dialect::Resources)?;
                check_tags(&body)?;
                self.group(name)?;
                if let Some(group) = self.groups.get_mut(&name.to_ascii_lowercase()) {
                    group.tags = body.get("tags").cloned().or_else(|| group.tags.clone());
                }
                Ok(Reply::with(200, &self.render_group(self.group(name)?)))
            }
            Method::DELETE => {
                let group = self.group(name)?.name.clone();
                if let Some(found) = self.groups.get_mut(&name.to_ascii_lowercase()) {
                    found.deleting = true;
                }
                let id = format!("{}/resourceGroups/{group}", self.scope());
                let headers = self.begin_removal_of_group(&id, group, twist);
                Ok(Reply::empty(202).headers(headers))
            }
            _ => Err(no_such_method(&call.method)),
        }
    }

    fn put_group(&mut self, name: &str, body: &Value) -> Result<Reply, Refusal> {
        check_group_name(name)?;
        let body = strict::check(&shapes::GROUP, body, Dialect::Resources)?;
        check_tags(&body)?;
        let location = text(&body, "/location").unwrap_or_default();
        let location = catalogue::check_location(location, "Microsoft.Resources/resourceGroups")?;
        let before = self.groups.get(&name.to_ascii_lowercase());
        if let Some(before) = before {
            if before.deleting {
                return Err(being_deleted(name));
            }
            if before.location != location {
                return Err(Refusal::new(
                    409,
                    "InvalidResourceGroupLocation",
                    format!(
                        "Invalid resource group location '{location}'. The Resource group already exists in location '{}'.",
                        before.location
                    ),
                ));
            }
        }
        let status = if before.is_some() { 200 } else { 201 };
        let group = Group {
            name: before.map_or_else(|| name.to_owned(), |b| b.name.clone()),
            location,
            tags: body.get("tags").cloned(),
            managed_by: body.get("managedBy").cloned(),
            deleting: false,
        };
        let rendered = self.render_group(&group);
        self.groups.insert(name.to_ascii_lowercase(), group);
        Ok(Reply::with(status, &rendered))
    }
}

fn check_group_name(name: &str) -> Result<(), Refusal> {
    let good = (1..=90).contains(&name.chars().count())
        && name
            .chars()
            .all(|c| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '(' | ')'))
        && !name.ends_with('.');
    if good {
        return Ok(());
    }
    Err(Refusal::new(
        400,
        "InvalidResourceGroup",
        format!(
            "The provided resource group name '{name}' has these invalid characters or ends with a period. The name can only be \
             letters, digits, '-', '.', '(', ')' or '_', and have up to 90 of them."
        ),
    ))
}

pub(super) fn being_deleted(name: &str) -> Refusal {
    Refusal::new(
        409,
        "ResourceGroupBeingDeleted",
        format!("The resource group '{name}' is in deprovisioning state and cannot perform this operation."),
    )
}

pub(super) fn no_such_method(method: &Method) -> Refusal {
    Refusal::new(
        405,
        "HttpMethodNotAllowed",
        format!("The HTTP method '{method}' is not supported at scope."),
    )
}

/// Tags: 50 at most, names up to 512 characters without some that URLs have, values up to 256.
pub(super) fn check_tags(body: &Value) -> Result<(), Refusal> {
    const RESERVED: [char; 7] = ['<', '>', '%', '&', '\\', '?', '/'];
    let Some(tags) = body.get("tags").and_then(Value::as_object) else {
        return Ok(());
    };
    if tags.len() > 50 {
        return Err(Refusal::new(
            400,
            "InvalidTagCount",
            format!("The number of tags '{}' exceeds the maximum of 50.", tags.len()),
        ));
    }
    for (name, value) in tags {
        if name.contains(RESERVED) || name.chars().any(char::is_control) {
            return Err(Refusal::new(
                400,
                "InvalidTagNameCharacters",
                format!("The tag names '{name}' have reserved characters '<,>,%,&,\\,?,/' or control characters."),
            ));
        }
        let reserved = ["microsoft", "azure", "windows"];
        if name.is_empty() || name.len() > 512 || reserved.iter().any(|r| name.to_ascii_lowercase().starts_with(r)) {
            return Err(Refusal::new(
                400,
                "InvalidTagName",
                format!(
                    "The tag name '{name}' is empty, longer than 512 characters, or begins with a reserved prefix."
                ),
            ));
        }
        if value.as_str().is_some_and(|v| v.len() > 256) {
            return Err(Refusal::new(
                400,
                "InvalidTagValueLength",
                format!("The value of tag '{name}' is longer than 256 characters."),
            ));
        }
    }
    Ok(())
}
