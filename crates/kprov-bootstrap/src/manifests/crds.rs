//! The definitions of kprov's own kinds. Their schemas come from the types in [`kprov_types::api`], so that what the API takes
//! and what the programs read can't drift apart.

use kprov_types::Minor;
use kprov_types::api::{
    GROUP, MachineSpec, MachineStatus, ReleaseSpec, ReleaseStatus, VERSION, VersionUpdateSpec, VersionUpdateStatus,
};
use kube::core::ApiResource;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::{Manifest, create};
use crate::versions::{Features, Unsupported};

/// A kind of group `kprov.io`; all are cluster-scoped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Its kind.
    pub kind: &'static str,
    /// Its name in paths.
    pub plural: &'static str,
    /// Its name for one object.
    pub singular: &'static str,
    /// What people may type instead.
    pub short: Option<&'static str>,
}

/// VersionUpdate.
pub const VERSION_UPDATES: Resource = Resource {
    kind: "VersionUpdate",
    plural: "versionupdates",
    singular: "versionupdate",
    short: Some("vu"),
};
/// Machine.
pub const MACHINES: Resource = Resource {
    kind: "Machine",
    plural: "machines",
    singular: "machine",
    short: None,
};
/// Release.
pub const RELEASES: Resource = Resource {
    kind: "Release",
    plural: "releases",
    singular: "release",
    short: None,
};

impl Resource {
    /// As the API's client knows it.
    pub fn api_resource(&self) -> ApiResource {
        ApiResource {
            group: GROUP.into(),
            version: VERSION.into(),
            api_version: format!("{GROUP}/{VERSION}"),
            kind: self.kind.into(),
            plural: self.plural.into(),
        }
    }

    /// The name of its definition, such as `machines.kprov.io`.
    pub fn definition(&self) -> String {
        format!("{}.{GROUP}", self.plural)
    }
}

/// The definitions of all three kinds, for API servers of `minor` and newer: with validation rules where it has them. Made by
/// `kprov up`, and brought up to date by the operator after each hop.
pub fn crds(minor: Minor) -> Result<Vec<Manifest>, Unsupported> {
    Ok(of(&Features::of(minor)?))
}

pub(super) fn of(features: &Features) -> Vec<Manifest> {
    let rules = features.validation_rules;
    let mut version_update = schema::<VersionUpdateSpec, VersionUpdateStatus>(
        "Which Kubernetes version the cluster should run, and how it gets there.",
    );
    let mut release = schema::<ReleaseSpec, ReleaseStatus>("A Kubernetes version that the cluster may run.");
    if rules {
        version_update_rules(&mut version_update);
        release_rules(&mut release);
    }
    let machine = schema::<MachineSpec, MachineStatus>(
        "What the operator orders of a machine, and what the machine tells. It has the name of its Node.",
    );
    let text = |name: &str, path: &str| column(name, "string", path);
    let age = column("Age", "date", ".metadata.creationTimestamp");
    [
        definition(
            VERSION_UPDATES,
            &version_update,
            &[
                text("Desired", ".spec.desiredVersion"),
                text("Current", ".status.currentVersion"),
                text("Phase", ".status.phase"),
                text("Message", ".status.message"),
                age.clone(),
            ],
        ),
        definition(
            MACHINES,
            &machine,
            &[
                text("Role", ".status.role"),
                text("Running", ".status.running.version"),
                column("Order", "integer", ".spec.order"),
                text("Message", ".status.message"),
            ],
        ),
        definition(
            RELEASES,
            &release,
            &[
                text("Version", ".spec.version"),
                column("Verified", "boolean", ".status.verified"),
                age,
            ],
        ),
    ]
    // Upgrades own them: an `up` of an older kprov must not take fields away from what newer programs write.
    .map(create)
    .into()
}

fn column(name: &str, kind: &str, path: &str) -> Value {
    json!({ "name": name, "type": kind, "jsonPath": path })
}

fn definition(resource: Resource, schema: &Value, columns: &[Value]) -> Value {
    let mut names = json!({
        "kind": resource.kind,
        "listKind": format!("{}List", resource.kind),
        "plural": resource.plural,
        "singular": resource.singular,
        "categories": ["kprov"],
    });
    if let Some(short) = resource.short {
        names["shortNames"] = json!([short]);
    }
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": { "name": resource.definition() },
        "spec": {
            "group": GROUP,
            "scope": "Cluster",
            "names": names,
            "versions": [{
                "name": VERSION,
                "served": true,
                "storage": true,
                "schema": { "openAPIV3Schema": schema },
                "subresources": { "status": {} },
                "additionalPrinterColumns": columns,
            }],
        },
    })
}

/// The longest `desiredVersion`. Rules are only allowed where their cost has a bound.
const LONGEST_VERSION: u32 = 64;
/// The most pools that may have values of their own, for the same reason.
const MOST_POOLS: u32 = 256;

fn version_update_rules(schema: &mut Value) {
    // All that `KubernetesVersion` reads.
    let version = r"^v?(0|[1-9][0-9]*)[.](0|[1-9][0-9]*)[.](0|[1-9][0-9]*)(-[0-9A-Za-z.-]+)?([+][0-9A-Za-z.-]+)?$";
    let share = r"^([0-9]+|[0-9]{1,2}%|100%)$";
    let desired = &mut schema["properties"]["spec"]["properties"]["desiredVersion"];
    desired["maxLength"] = json!(LONGEST_VERSION);
    rule(
        desired,
        &format!("self.matches('{version}')"),
        "desiredVersion must be MAJOR.MINOR.PATCH, such as 1.36.3",
    );
    let release = &mut schema["properties"]["spec"]["properties"]["release"];
    release["maxLength"] = json!(71);
    rule(
        release,
        "self.matches('^sha256:[0-9a-f]{64}$')",
        "release must be a digest: sha256: and 64 hexadecimal digits",
    );
    let policy = &mut schema["properties"]["spec"]["properties"]["policy"]["properties"];
    policy["pools"]["maxProperties"] = json!(MOST_POOLS);
    let unavailable = |value: &mut Value| {
        value["maxLength"] = json!(10);
        rule(
            value,
            &format!("type(self) == int ? self >= 0 : self.matches('{share}')"),
            "maxUnavailable must be a number of machines, or a share such as 10%",
        );
    };
    unavailable(&mut policy["maxUnavailable"]);
    unavailable(&mut policy["pools"]["additionalProperties"]["properties"]["maxUnavailable"]);
}

fn release_rules(schema: &mut Value) {
    rule(
        &mut schema["properties"]["spec"],
        "self.digest == oldSelf.digest && self.manifest == oldSelf.manifest",
        "a Release stays what it is; make another one",
    );
}

fn rule(schema: &mut Value, rule: &str, message: &str) {
    schema["x-kubernetes-validations"] = json!([{ "rule": rule, "message": message }]);
}

/// The schema of a kind, from the types of its spec and status.
fn schema<Spec: JsonSchema, Status: JsonSchema>(description: &str) -> Value {
    json!({
        "description": description,
        "type": "object",
        "required": ["spec"],
        "properties": { "spec": structural::<Spec>(), "status": structural::<Status>() },
    })
}

/// A type's schema in the form that CustomResourceDefinitions want ("structural schemas", Kubernetes' documentation on
/// CustomResourceDefinitions): no references, no alternatives.
fn structural<T: JsonSchema>() -> Value {
    let generator = SchemaSettings::openapi3()
        .with(|settings| settings.inline_subschemas = true)
        .into_generator();
    let mut schema = generator.into_root_schema_for::<T>().to_value();
    rewrite(&mut schema);
    schema
}

fn rewrite(schema: &mut Value) {
    let Value::Object(fields) = schema else { return };
    // Defaults are the programs' own, and optional fields are left out, never null.
    for keyword in ["$schema", "title", "default", "nullable"] {
        fields.remove(keyword);
    }
    for keyword in ["anyOf", "oneOf"] {
        if let Some(Value::Array(alternatives)) = fields.remove(keyword) {
            merge(fields, alternatives);
        }
    }
    if let Some(Value::Array(values)) = fields.get_mut("enum") {
        values.retain(|v| !v.is_null());
    }
    if let Some(Value::String(format)) = fields.get("format")
        && let Some(bits) = format.strip_prefix("uint")
    {
        // API servers know signed formats only.
        let bounded = bits == "32";
        fields.insert("format".into(), json!(if bits == "16" { "int32" } else { "int64" }));
        if bounded {
            fields.insert("maximum".into(), json!(u32::MAX));
        }
    }
    if let Some(Value::String(text)) = fields.get_mut("description") {
        *text = plain(text);
    }
    for keyword in ["items", "additionalProperties"] {
        if let Some(inner) = fields.get_mut(keyword) {
            rewrite(inner);
        }
    }
    if let Some(Value::Object(properties)) = fields.get_mut("properties") {
        properties.values_mut().for_each(rewrite);
    }
}

/// Makes one schema of a type that may be missing, or of an enum of words.
fn merge(into: &mut Map<String, Value>, alternatives: Vec<Value>) {
    let mut words = Vec::new();
    for alternative in alternatives {
        let Value::Object(mut alternative) = alternative else {
            continue;
        };
        match alternative.remove("enum") {
            Some(Value::Array(values)) => {
                words.extend(values.into_iter().filter(|v| !v.is_null()));
                if let Some(kind) = alternative.remove("type") {
                    into.insert("type".into(), kind);
                }
            }
            _ => {
                for (keyword, value) in alternative {
                    into.entry(keyword).or_insert(value);
                }
            }
        }
    }
    if !words.is_empty() {
        into.insert("enum".into(), words.into());
    }
}

/// A doc comment without rustdoc's links.
fn plain(text: &str) -> String {
    text.replace("[`", "`").replace("`]", "`")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every schema within a schema, with its path.
    fn visit(schema: &Value, path: &str, seen: &mut dyn FnMut(&str, &Value)) {
        seen(path, schema);
        for keyword in ["items", "additionalProperties"] {
            if let Some(inner) = schema.get(keyword) {
                visit(inner, &format!("{path}.{keyword}"), seen);
            }
        }
        for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
            visit(inner, &format!("{path}.{name}"), seen);
        }
    }

    #[test]
    fn schemas_are_structural() {
        for minor in [20, 36] {
            for manifest in crds(Minor::v1(minor)).unwrap() {
                let schema = &manifest.object["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
                let mut count = 0;
                visit(schema, "", &mut |path, schema| {
                    count += 1;
                    let fields = schema.as_object().unwrap_or_else(|| panic!("{path}"));
                    assert!(
                        fields.contains_key("type") || fields.contains_key("x-kubernetes-int-or-string"),
                        "{path}: {schema}"
                    );
                    for keyword in fields.keys() {
                        assert!(
                            [
                                "type",
                                "format",
                                "description",
                                "properties",
                                "required",
                                "items",
                                "enum",
                                "minimum",
                                "maximum",
                                "maxLength",
                                "maxProperties",
                                "additionalProperties",
                                "x-kubernetes-int-or-string",
                                "x-kubernetes-list-type",
                                "x-kubernetes-list-map-keys",
                                "x-kubernetes-validations",
                            ]
                            .contains(&keyword.as_str()),
                            "{path} has {keyword}"
                        );
                    }
                    let format = fields.get("format").and_then(Value::as_str);
                    assert!(
                        [None, Some("int32"), Some("int64"), Some("date-time")].contains(&format),
                        "{path}: {format:?}"
                    );
                    let description = fields.get("description").map_or("", |d| d.as_str().unwrap());
                    assert!(!description.contains("[`"), "{path}: {description}");
                });
                assert!(count > 8, "{count}");
            }
        }
    }

    #[test]
    fn words_are_an_enum_and_options_are_their_value() {
        let machine = structural::<MachineStatus>();
        let role = &machine["properties"]["role"];
        assert_eq!(
            (&role["type"], &role["enum"]),
            (&json!("string"), &json!(["control-plane", "worker"]))
        );
        let run = &structural::<MachineSpec>()["properties"]["run"];
        assert_eq!(run["type"], "object");
        assert_eq!(run["properties"]["since"]["format"], "date-time");
        assert_eq!(run["properties"]["release"]["properties"]["version"]["type"], "string");
        assert_eq!(run["required"], json!(["release", "since", "timeoutSeconds"]));
    }

    #[test]
    fn rules_go_only_where_they_are_known() {
        for minor in 20..=37 {
            let text = json!(
                crds(Minor::v1(minor))
                    .unwrap()
                    .iter()
                    .map(|m| &m.object)
                    .collect::<Vec<_>>()
            )
            .to_string();
            assert_eq!(text.contains("x-kubernetes-validations"), minor >= 25, "{minor}");
        }
    }
}
