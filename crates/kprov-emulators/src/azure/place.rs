//! Where something is to be, and whether what is there is what the caller expects.

use serde_json::{Map, Value, json};

use super::catalogue;
use super::handle::Call;
use super::kind::Kind;
use super::refusal::Refusal;
use super::store::Resource;
use super::strict::Dialect;

/// Checks location and zones, and writes the location as Azure does.
pub(super) fn place(body: &mut Map<String, Value>, kind: &Kind) -> Result<(), Refusal> {
    let location = body.get("location").and_then(Value::as_str).unwrap_or_default();
    let location = catalogue::check_location(location, &kind.full())?;
    let zones: Vec<&str> = body
        .get("zones")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    debug_assert!(kind.zonal || zones.is_empty());
    catalogue::check_zones(&zones, &location, &kind.full(), kind.dialect == Dialect::Network)?;
    body.insert("location".to_owned(), json!(location));
    Ok(())
}

/// Neither location nor zones of what exists can change.
pub(super) fn same_place(body: &Map<String, Value>, old: &Resource) -> Result<(), Refusal> {
    let location = body.get("location").and_then(Value::as_str).unwrap_or_default();
    if old.location() != location {
        return Err(Refusal::new(
            409,
            "InvalidResourceLocation",
            format!(
                "The resource '{}' already exists in location '{}' in resource group '{}'. A resource with the same name cannot be \
                 created in location '{location}'. Please select a new resource name.",
                old.name,
                old.location(),
                old.group
            ),
        ));
    }
    let zones = |v: Option<&Value>| v.map(ToString::to_string).unwrap_or_default();
    if zones(body.get("zones")) != zones(old.body.get("zones")) {
        return Err(Refusal::new(
            400,
            "ResourceAvailabilityZonesCannotBeModified",
            format!(
                "Resource {} has an existing availability zone constraint {} and the request has availability zone constraint {}, \
                 which do not match. Zones cannot be added/updated/removed once the resource is created. The resource cannot be \
                 updated from regional to zonal or vice-versa.",
                old.id,
                zones(old.body.get("zones")),
                zones(body.get("zones"))
            ),
        ));
    }
    Ok(())
}

/// `If-Match` and `If-None-Match`.
pub(super) fn preconditions(call: &Call, old: Option<&Resource>) -> Result<(), Refusal> {
    let bare = |tag: &str| tag.trim().trim_start_matches("W/").trim_matches('"').to_owned();
    let failed = |why: String| {
        Err(Refusal::new(
            412,
            "PreconditionFailed",
            format!("Precondition failed. {why}"),
        ))
    };
    let current = old.map(|o| {
        if o.is("virtualMachines") {
            o.etag.to_string()
        } else {
            bare(&o.etag())
        }
    });
    if let Some(none) = call.header("if-none-match")
        && let Some(current) = &current
        && (none.trim() == "*" || bare(none) == *current)
    {
        return failed(format!("The resource exists, and If-None-Match was {none}."));
    }
    if let Some(wanted) = call.header("if-match") {
        match &current {
            None => return failed(format!("The resource does not exist, and If-Match was {wanted}.")),
            Some(current) if wanted.trim() != "*" && bare(wanted) != *current => {
                return failed(format!("The resource has etag {current}, and If-Match was {wanted}."));
            }
            Some(_) => {}
        }
    }
    Ok(())
}
