//! What people have changed of a template, carried over to the template of another release. Pure: a three-way merge of what kprov
//! rendered for the release before, what there is, and what it renders for the next.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

/// The parts of a template that people may change and that are carried over.
pub(super) fn essentials(template: &Value) -> Value {
    let spec = &template["spec"];
    let containers = spec["containers"].as_array().into_iter().flatten().map(|container| {
        let mut kept = Map::new();
        for field in ["name", "command", "args", "env", "resources", "volumeMounts"] {
            if let Some(value) = container.get(field) {
                kept.insert(field.to_owned(), value.clone());
            }
        }
        Value::Object(kept)
    });
    let volumes = spec["volumes"].as_array().into_iter().flatten();
    json!({
        "containers": containers.collect::<Vec<_>>(),
        "volumes": volumes.map(|v| json!({ "name": v["name"] })).collect::<Vec<_>>(),
    })
}

/// A template for another release: as rendered (`new`), with what `live` has otherwise than was rendered for the release
/// before (`base`, as [`essentials`]).
pub(super) fn carry_over(base: &Value, live: &Value, mut new: Value) -> Value {
    let empty = json!({});
    for container in array(&mut new["spec"]["containers"]) {
        let named = |list: &'_ Value| -> Option<Value> {
            let list = list.as_array()?;
            list.iter().find(|c| c["name"] == container["name"]).cloned()
        };
        let Some(live) = named(&live["spec"]["containers"]) else {
            continue;
        };
        let base = named(&base["containers"]).unwrap_or_else(|| empty.clone());
        for field in ["command", "args"] {
            let merged = flags(
                &strings(&base[field]),
                &strings(&live[field]),
                &strings(&container[field]),
            );
            if !merged.is_empty() {
                container[field] = json!(merged);
            }
        }
        let merged = env(&base["env"], &live["env"], &container["env"]);
        if !merged.is_empty() {
            container["env"] = json!(merged);
        }
        if live["resources"] != base["resources"] && !live["resources"].is_null() {
            container["resources"] = live["resources"].clone();
        }
        add(
            &base["volumeMounts"],
            &live["volumeMounts"],
            &mut container["volumeMounts"],
            "mountPath",
        );
    }
    add(
        &base["volumes"],
        &live["spec"]["volumes"],
        &mut new["spec"]["volumes"],
        "name",
    );
    new
}

fn array(value: &mut Value) -> impl Iterator<Item = &mut Value> {
    value.as_array_mut().into_iter().flatten()
}

fn strings(value: &Value) -> Vec<String> {
    let list = value.as_array().into_iter().flatten();
    list.filter_map(Value::as_str).map(str::to_owned).collect()
}

fn flag_name(word: &str) -> &str {
    word.split('=').next().unwrap_or_default()
}

/// A program's flags by three-way merge, each flag (with all its values) for itself. What is no flag (the program) is as in
/// `new`.
fn flags(base: &[String], live: &[String], new: &[String]) -> Vec<String> {
    let of = |list: &[String], name: &str| -> Vec<String> {
        list.iter().filter(|word| flag_name(word) == name).cloned().collect()
    };
    let mut merged = Vec::new();
    let mut done = BTreeSet::new();
    for word in new.iter().chain(live) {
        let name = flag_name(word);
        if !name.starts_with('-') {
            if new.contains(word) && !merged.contains(word) {
                merged.push(word.clone());
            }
            continue;
        }
        if !done.insert(name.to_owned()) {
            continue;
        }
        let (base, live, new) = (of(base, name), of(live, name), of(new, name));
        merged.extend(if live == base { new } else { live });
    }
    merged
}

/// Environment variables by three-way merge. The API fills in defaults, which are no change of anybody's.
fn env(base: &Value, live: &Value, new: &Value) -> Vec<Value> {
    let of = |list: &Value, name: &Value| -> Option<Value> {
        list.as_array()?
            .iter()
            .find(|variable| variable["name"] == *name)
            .cloned()
    };
    let lists = [new, live].map(|list| list.as_array().into_iter().flatten());
    let mut merged: Vec<Value> = Vec::new();
    let mut done: Vec<&Value> = Vec::new();
    for variable in lists.into_iter().flatten() {
        let name = &variable["name"];
        if done.contains(&name) {
            continue;
        }
        done.push(name);
        let (base, live, new) = (of(base, name), of(live, name), of(new, name));
        let same = match (&base, &live) {
            (Some(base), Some(live)) => within(base, live),
            (base, live) => base.is_none() && live.is_none(),
        };
        merged.extend(if same { new } else { live });
    }
    merged
}

/// Whether all that `part` says is so in `whole`.
fn within(part: &Value, whole: &Value) -> bool {
    match (part, whole) {
        (Value::Object(part), Value::Object(whole)) => part
            .iter()
            .all(|(key, value)| whole.get(key).is_some_and(|other| within(value, other))),
        (part, whole) => part == whole,
    }
}

/// Adds what people have added to a list.
fn add(base: &Value, live: &Value, new: &mut Value, key: &str) {
    let has = |list: &Value, item: &Value| {
        list.as_array()
            .into_iter()
            .flatten()
            .any(|other| other[key] == item[key])
    };
    let added: Vec<Value> = live
        .as_array()
        .into_iter()
        .flatten()
        .filter(|item| !has(base, item) && !has(new, item))
        .cloned()
        .collect();
    if added.is_empty() {
        return;
    }
    if let Some(list) = new.as_array_mut() {
        list.extend(added);
    } else {
        *new = json!(added);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &[&str]) -> Vec<String> {
        list.iter().map(|w| (*w).to_owned()).collect()
    }

    #[test]
    fn flags_of_people_are_kept() {
        let base = words(&["/bin/x", "--bind=a", "--audit=1", "--old", "--profiling=false"]);
        // Changed, added, removed; and what only kprov changes between releases.
        let live = words(&["/bin/x", "--bind=a", "--audit=2", "--old", "--v=4", "--v=5"]);
        let new = words(&["/bin/x", "--bind=b", "--audit=1", "--profiling=false", "--new"]);
        let merged = flags(&base, &live, &new);
        assert_eq!(
            merged,
            words(&["/bin/x", "--bind=b", "--audit=2", "--new", "--v=4", "--v=5"])
        );
        assert_eq!(flags(&base, &base, &new), new, "nobody has changed anything");
        assert_eq!(flags(&[], &new, &new), new);
    }

    #[test]
    fn templates_carry_over_what_people_changed_and_nothing_else() {
        let base = json!({ "spec": {
            "containers": [{ "name": "c", "image": "i:1", "command": ["/c", "--a=1"],
                "env": [{ "name": "HOST_IP", "valueFrom": { "fieldRef": { "fieldPath": "status.hostIP" } } }],
                "resources": { "requests": { "cpu": "100m" } }, "volumeMounts": [{ "name": "pki", "mountPath": "/pki" }] }],
            "volumes": [{ "name": "pki", "hostPath": { "path": "/pki" } }],
        } });
        let mut defaulted = base.clone();
        defaulted["spec"]["restartPolicy"] = json!("Always");
        let container = &mut defaulted["spec"]["containers"][0];
        container["terminationMessagePath"] = json!("/dev/termination-log");
        container["env"][0]["valueFrom"]["fieldRef"]["apiVersion"] = json!("v1");
        let mut new = base.clone();
        let container = &mut new["spec"]["containers"][0];
        container["image"] = json!("i:2");
        container["command"] = json!(["/c", "--a=2", "--b"]);
        container["resources"] = json!({ "requests": { "cpu": "200m" } });
        assert_eq!(carry_over(&essentials(&base), &defaulted, new.clone()), new);

        let mut live = defaulted;
        let container = &mut live["spec"]["containers"][0];
        container["command"] = json!(["/c", "--a=1", "--v=4"]);
        container["env"]
            .as_array_mut()
            .unwrap()
            .push(json!({ "name": "GOGC", "value": "50" }));
        container["resources"] = json!({ "requests": { "cpu": "1" }, "limits": { "memory": "4Gi" } });
        container["volumeMounts"]
            .as_array_mut()
            .unwrap()
            .push(json!({ "name": "extra", "mountPath": "/extra" }));
        live["spec"]["volumes"]
            .as_array_mut()
            .unwrap()
            .push(json!({ "name": "extra", "hostPath": { "path": "/x" } }));
        let carried = carry_over(&essentials(&base), &live, new);
        let container = &carried["spec"]["containers"][0];
        assert_eq!(container["image"], "i:2");
        assert_eq!(container["command"], json!(["/c", "--a=2", "--b", "--v=4"]));
        assert_eq!(container["env"][1], json!({ "name": "GOGC", "value": "50" }));
        assert_eq!(
            container["env"][0]["valueFrom"]["fieldRef"],
            json!({ "fieldPath": "status.hostIP" })
        );
        assert_eq!(container["resources"]["limits"]["memory"], "4Gi");
        assert_eq!(container["volumeMounts"][1]["mountPath"], "/extra");
        assert_eq!(carried["spec"]["volumes"][1]["name"], "extra");
        assert!(carried["spec"].get("restartPolicy").is_none());
    }

    #[test]
    fn a_removed_variable_stays_removed() {
        let one = json!([{ "name": "A", "value": "1" }]);
        assert!(env(&one, &json!(null), &one).is_empty());
        assert_eq!(env(&json!(null), &json!(null), &one), vec![one[0].clone()]);
    }
}
