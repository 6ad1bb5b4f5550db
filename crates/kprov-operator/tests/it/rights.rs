//! The operator's rights against what it is known to need.

use kprov_bootstrap::self_hosted;
use kprov_bootstrap::versions::{NEWEST, OLDEST};
use kprov_types::ports::FIRST_REVISION;
use kprov_upgrade::preflight::removals::REMOVALS;
use serde_json::Value;

use crate::cluster::settings;

/// Preflight lists the objects of every kind of which a version goes, by whichever version the cluster has.
#[test]
fn preflight_may_list_what_goes() {
    let objects = self_hosted(&settings(&"1.36.3".parse().unwrap()), FIRST_REVISION, None).unwrap();
    let role = objects
        .iter()
        .map(|manifest| &manifest.object)
        .find(|object| object["kind"] == "ClusterRole" && object["metadata"]["name"] == "kprov:operator")
        .unwrap();
    let has = |list: &Value, wanted: &str| {
        list.as_array()
            .is_some_and(|list| list.iter().any(|entry| entry == wanted))
    };
    let may_list = |group: &str, resource: &str| {
        role["rules"].as_array().unwrap().iter().any(|rule| {
            has(&rule["apiGroups"], group)
                && has(&rule["resources"], resource)
                && has(&rule["verbs"], "list")
                && rule["resourceNames"].is_null()
        })
    };
    for minor in OLDEST.minor..=NEWEST.minor {
        for removal in REMOVALS
            .iter()
            .filter(|removal| removal.kept && removal.removed > minor)
        {
            let (group, _) = removal.listed_by(minor);
            assert!(
                may_list(group, removal.resource),
                "{group} {} at 1.{minor}",
                removal.resource
            );
        }
    }
    assert!(!may_list("", "secrets"));
}
