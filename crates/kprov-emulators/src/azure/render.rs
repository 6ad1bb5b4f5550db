//! How resources look in answers.

use serde_json::{Map, Value, json};

use super::network::{LISTS, items_mut};
use super::room::Power;
use super::store::{Resource, State, Store, Uses, text};

impl Store {
    /// A resource as a GET has it.
    pub(super) fn render(&self, resource: &Resource, uses: &Uses) -> Value {
        let mut body = resource.body.clone();
        body.insert("id".to_owned(), json!(resource.id));
        body.insert("name".to_owned(), json!(resource.name));
        body.insert("type".to_owned(), json!(resource.kind.full()));
        if !resource.is("disks") {
            let etag = if resource.is("virtualMachines") {
                format!("\"{}\"", resource.etag)
            } else {
                resource.etag()
            };
            body.insert("etag".to_owned(), json!(etag));
        }
        if let Some(properties) = body.get_mut("properties") {
            properties["provisioningState"] = json!(resource.state.as_str());
        }
        match resource.kind.plural {
            "disks" => render_disk(&mut body, resource, uses),
            "virtualMachines" => render_machine(&mut body),
            _ => self.render_network(&mut body, resource, uses),
        }
        Value::Object(body)
    }

    fn render_network(&self, body: &mut Map<String, Value>, resource: &Resource, uses: &Uses) {
        for list in LISTS {
            for item in items_mut(body, list) {
                let id = format!("{}/{list}/{}", resource.id, text(item, "/name").unwrap_or_default());
                render_child(item, list, &id, resource, uses);
            }
        }
        let properties = &mut body["properties"];
        let first = uses.of(&resource.id).first().map(|id| json!({"id": id}));
        match resource.kind.plural {
            "publicIPAddresses" => {
                properties["ipConfiguration"] = first.unwrap_or_default();
                if let Some(address) = self.public_address(&resource.id) {
                    properties["ipAddress"] = json!(address);
                }
            }
            "networkInterfaces" => {
                properties["primary"] = json!(first.is_some());
                properties["virtualMachine"] = first.unwrap_or_default();
            }
            "networkSecurityGroups" => {
                let (interfaces, subnets): (Vec<&String>, Vec<&String>) = uses
                    .of(&resource.id)
                    .iter()
                    .partition(|id| id.contains("/networkInterfaces/"));
                for (name, ids) in [("networkInterfaces", interfaces), ("subnets", subnets)] {
                    if !ids.is_empty() {
                        properties[name] = ids.iter().map(|id| json!({"id": id})).collect();
                    }
                }
                properties["defaultSecurityRules"] = json!([]);
            }
            "natGateways" => {
                if let Some(subnets) = uses.listed(&resource.id) {
                    properties["subnets"] = subnets;
                }
            }
            _ => {}
        }
        without_nulls(properties);
    }

    /// The subnet of this name, as a resource of its own.
    pub(super) fn render_subnet(&self, network: &Resource, subnet: &str) -> Option<Value> {
        let rendered = self.render(network, &self.uses());
        let list = rendered.pointer("/properties/subnets")?.as_array()?;
        list.iter()
            .find(|s| text(s, "/name").is_some_and(|n| n.eq_ignore_ascii_case(subnet)))
            .cloned()
    }

    /// A machine's `instanceView`.
    pub(super) fn instance_view(machine: &Resource) -> Value {
        let mut statuses = vec![match (&machine.state, &machine.failure) {
            (State::Failed, Some(failure)) => json!({
                "code": format!("ProvisioningState/failed/{}", failure.code),
                "level": "Error",
                "displayStatus": "Provisioning failed",
                "message": failure.message,
            }),
            (state, _) => json!({
                "code": format!("ProvisioningState/{}", state.as_str().to_lowercase()),
                "level": "Info",
                "displayStatus": format!("Provisioning {}", state.as_str().to_lowercase()),
                "time": machine.created.to_string(),
            }),
        }];
        if let Some(power) = machine.power {
            let code = power.code();
            statuses.push(
                json!({"code": format!("PowerState/{code}"), "level": "Info", "displayStatus": format!("VM {code}")}),
            );
        }
        let mut view = json!({"statuses": statuses, "hyperVGeneration": "V2"});
        if machine.properties().get("diagnosticsProfile").is_some() {
            view["bootDiagnostics"] = json!({});
        }
        if machine.power == Some(Power::Running) {
            view["computerName"] = machine.properties()["osProfile"]["computerName"].clone();
        }
        view
    }

    /// What `statusOnly=true` shows of a machine.
    pub(super) fn render_status(machine: &Resource) -> Value {
        json!({
            "id": machine.id,
            "name": machine.name,
            "type": machine.kind.full(),
            "location": machine.location(),
            "properties": {
                "vmId": machine.properties().get("vmId"),
                "provisioningState": machine.state.as_str(),
                "instanceView": Self::instance_view(machine),
            },
        })
    }

    /// A resource in a list of resources of all types.
    pub(super) fn render_briefly(resource: &Resource, with_tags: bool) -> Value {
        let mut brief = Map::new();
        brief.insert("id".to_owned(), json!(resource.id));
        brief.insert("name".to_owned(), json!(resource.name));
        brief.insert("type".to_owned(), json!(resource.kind.full()));
        for field in ["location", "sku", "zones", "identity", "plan"] {
            if let Some(value) = resource.body.get(field) {
                brief.insert(field.to_owned(), value.clone());
            }
        }
        if let Some(tags) = resource.body.get("tags")
            && with_tags
        {
            brief.insert("tags".to_owned(), tags.clone());
        }
        Value::Object(brief)
    }
}

fn render_child(item: &mut Value, list: &str, id: &str, resource: &Resource, uses: &Uses) {
    item["id"] = json!(id);
    item["etag"] = json!(resource.etag());
    item["type"] = json!(format!("{}/{list}", resource.kind.full()));
    if !item["properties"].is_object() {
        item["properties"] = json!({});
    }
    let properties = &mut item["properties"];
    properties["provisioningState"] = json!(resource.state.as_str());
    let (inside, outside): (Vec<&String>, Vec<&String>) = uses
        .of(id)
        .iter()
        .partition(|by| by.to_ascii_lowercase().starts_with(&resource.id.to_ascii_lowercase()));
    let refer = |ids: Vec<&String>| -> Option<Value> {
        (!ids.is_empty()).then(|| ids.iter().map(|id| json!({"id": id})).collect())
    };
    let mut set = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            properties[name] = value;
        }
    };
    match list {
        "subnets" => set("ipConfigurations", refer(outside)),
        "backendAddressPools" => {
            set("backendIPConfigurations", refer(outside));
            set(
                "loadBalancingRules",
                refer(
                    inside
                        .into_iter()
                        .filter(|i| i.contains("/loadBalancingRules/"))
                        .collect(),
                ),
            );
        }
        "frontendIPConfigurations" | "probes" => {
            set(
                "loadBalancingRules",
                refer(
                    inside
                        .into_iter()
                        .filter(|i| i.contains("/loadBalancingRules/"))
                        .collect(),
                ),
            );
        }
        _ => {}
    }
}

fn render_disk(body: &mut Map<String, Value>, resource: &Resource, uses: &Uses) {
    let by = uses.of(&resource.id).first();
    if let Some(by) = by {
        body.insert("managedBy".to_owned(), json!(by));
    }
    body["properties"]["diskState"] = json!(if by.is_some() { "Attached" } else { "Unattached" });
}

/// Secrets and custom data are never answered.
fn render_machine(body: &mut Map<String, Value>) {
    if let Some(os) = body["properties"].get_mut("osProfile").and_then(Value::as_object_mut) {
        os.remove("customData");
        os.remove("adminPassword");
        os.insert("requireGuestProvisionSignal".to_owned(), json!(true));
    }
    if let Some(image) = body["properties"].pointer_mut("/storageProfile/imageReference")
        && let Some(version) = super::machine::exact_version(image)
    {
        image["exactVersion"] = json!(version);
    }
    if let Some(profile) = body["properties"].as_object_mut() {
        profile.remove("userData");
    }
}

fn without_nulls(value: &mut Value) {
    if let Some(object) = value.as_object_mut() {
        object.retain(|_, v| !v.is_null());
    }
}
