//! Sizes of machines, as one location has them: zones, and what they can do. Pure.

use std::collections::{BTreeMap, BTreeSet};

use kprov_provider::ProviderError;
use kprov_types::MachineName;
use serde_json::Value;

/// The size where none is asked for: 2 processors and 8 GiB.
pub(crate) const DEFAULT: &str = "Standard_D2s_v5";

/// The sizes of one location.
#[derive(Debug, Default)]
pub(crate) struct Sizes {
    location: String,
    /// By name in lower case.
    sizes: BTreeMap<String, Size>,
}

/// One size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Size {
    /// Its name as Azure writes it.
    pub(crate) name: String,
    /// The zones that have it.
    pub(crate) zones: BTreeSet<String>,
    /// Zones that have it, but not for this subscription.
    pub(crate) withheld: BTreeSet<String>,
    /// Not for this subscription at all.
    pub(crate) is_withheld: bool,
    /// Whether it can start with Secure Boot and a virtual TPM.
    pub(crate) trusted_launch: bool,
}

impl Sizes {
    /// From a listing of `Microsoft.Compute/skus`.
    pub(crate) fn new(location: &str, listed: &[Value]) -> Self {
        let machines = listed.iter().filter(|sku| sku["resourceType"] == "virtualMachines");
        let sizes = machines.filter_map(|sku| Self::size(location, sku));
        Self {
            location: location.to_owned(),
            sizes: sizes.map(|s| (s.name.to_ascii_lowercase(), s)).collect(),
        }
    }

    fn size(location: &str, sku: &Value) -> Option<Size> {
        let here = |v: &Value| v.as_str().is_some_and(|l| l.eq_ignore_ascii_case(location));
        if !each(&sku["locations"]).any(here) {
            return None;
        }
        let infos = each(&sku["locationInfo"]).filter(|info| here(&info["location"]));
        let mut size = Size {
            name: sku["name"].as_str()?.to_owned(),
            zones: infos.flat_map(|info| strings(&info["zones"])).collect(),
            ..Size::default()
        };
        let can = |name: &str| {
            let mut all = each(&sku["capabilities"]);
            all.find(|c| c["name"] == name)
                .and_then(|c| c["value"].as_str())
                .unwrap_or("")
        };
        // Azure says who can't; generation 2 is needed for it.
        size.trusted_launch =
            !can("TrustedLaunchDisabled").eq_ignore_ascii_case("true") && can("HyperVGenerations").contains("V2");
        for restriction in each(&sku["restrictions"]) {
            match restriction["type"].as_str() {
                Some("Location") => size.is_withheld |= each(&restriction["restrictionInfo"]["locations"]).any(here),
                Some("Zone") => size.withheld.extend(strings(&restriction["restrictionInfo"]["zones"])),
                _ => {}
            }
        }
        Some(size)
    }

    /// A size by its name.
    pub(crate) fn get(&self, name: &str) -> Result<&Size, ProviderError> {
        let Some(size) = self.sizes.get(&name.to_ascii_lowercase()) else {
            return Err(
                ProviderError::never(format!("there is no size `{name}` in `{}`", self.location)).hint(format!(
                    "`az vm list-skus --location {} -o table` shows what can be had",
                    self.location
                )),
            );
        };
        if size.is_withheld {
            return Err(ProviderError::never(format!(
                "size `{name}` can't be had in `{}` by this subscription",
                self.location
            ))
            .hint("choose another size or location, or ask Azure's support for it"));
        }
        Ok(size)
    }

    /// Checks that a size can be had in a zone.
    pub(crate) fn check_zone(&self, size: &Size, zone: &str) -> Result<(), ProviderError> {
        if size.zones.contains(zone) && !size.withheld.contains(zone) {
            return Ok(());
        }
        let zones: Vec<&str> = size.zones.difference(&size.withheld).map(String::as_str).collect();
        let hint = if zones.is_empty() {
            "it can be had in no zone there; choose another size or location".to_owned()
        } else {
            format!(
                "it can be had in zones {}; name those in `spec.zones`, or choose another size",
                zones.join(", ")
            )
        };
        Err(ProviderError::never(format!(
            "size `{}` can't be had in `{}`, zone {zone}",
            size.name, self.location
        ))
        .hint(hint))
    }

    /// The zones that have all of these sizes; none where the location has no zones.
    pub(crate) fn zones_of(&self, names: &BTreeSet<String>) -> Result<Vec<String>, ProviderError> {
        let mut common: Option<BTreeSet<String>> = None;
        let default = DEFAULT.to_owned();
        let names: Vec<&String> = if names.is_empty() {
            vec![&default]
        } else {
            names.iter().collect()
        };
        for name in names {
            let size = self.get(name)?;
            let zones: BTreeSet<String> = size.zones.difference(&size.withheld).cloned().collect();
            common = Some(match common {
                None => zones,
                Some(common) => common.intersection(&zones).cloned().collect(),
            });
        }
        Ok(common.unwrap_or_default().into_iter().collect())
    }
}

fn each(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn strings(value: &Value) -> impl Iterator<Item = String> {
    each(value).filter_map(|v| v.as_str().map(ToOwned::to_owned))
}

/// The zone of a machine: the number at the end of its name, around the zones. The same each time it's asked.
pub(crate) fn zone_of(machine: &MachineName, zones: &[String]) -> Option<String> {
    let name = machine.as_str();
    let digits = name.rsplit('-').next().and_then(|n| n.parse::<usize>().ok());
    let index = digits.unwrap_or_else(|| name.bytes().map(usize::from).sum());
    zones.get(index.checked_rem(zones.len())?).cloned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sizes() -> Sizes {
        let sku = |name: &str, zones: &[&str], restrictions: Value, disabled: &str| {
            json!({"resourceType": "virtualMachines", "name": name, "locations": ["WestEurope"],
                "locationInfo": [{"location": "westeurope", "zones": zones}], "restrictions": restrictions,
                "capabilities": [{"name": "HyperVGenerations", "value": "V1,V2"}, {"name": "TrustedLaunchDisabled", "value": disabled}]})
        };
        Sizes::new(
            "westeurope",
            &[
                sku(DEFAULT, &["3", "1", "2"], json!([]), "False"),
                sku("Standard_A", &["1", "2"], json!([]), "True"),
                sku(
                    "Standard_B",
                    &["1", "2", "3"],
                    json!([{"type": "Zone", "restrictionInfo": {"zones": ["2"]}}]),
                    "",
                ),
                sku(
                    "Standard_C",
                    &[],
                    json!([{"type": "Location", "restrictionInfo": {"locations": ["westeurope"]}}]),
                    "",
                ),
                json!({"resourceType": "disks", "name": "Premium_LRS", "locations": ["westeurope"]}),
            ],
        )
    }

    #[test]
    fn tells_what_a_size_can_do_and_where() {
        let sizes = sizes();
        assert!(sizes.get("standard_d2S_v5").unwrap().trusted_launch);
        let a = sizes.get("Standard_A").unwrap();
        assert!(!a.trusted_launch);
        let error = sizes.check_zone(a, "3").unwrap_err();
        assert_eq!(
            error.to_string(),
            "size `Standard_A` can't be had in `westeurope`, zone 3"
        );
        assert!(error.hint.unwrap().contains("zones 1, 2"));
        assert!(sizes.check_zone(sizes.get("Standard_B").unwrap(), "2").is_err());
        assert!(
            sizes
                .get("Standard_C")
                .unwrap_err()
                .to_string()
                .contains("by this subscription")
        );
        assert!(
            sizes
                .get("Premium_LRS")
                .unwrap_err()
                .to_string()
                .starts_with("there is no size")
        );
    }

    #[test]
    fn zones_are_those_that_have_every_size() {
        let named = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        assert_eq!(sizes().zones_of(&named(&[])).unwrap(), ["1", "2", "3"]);
        assert_eq!(sizes().zones_of(&named(&["Standard_A", "Standard_B"])).unwrap(), ["1"]);
    }

    #[test]
    fn machines_are_spread_by_their_number() {
        let zones = ["1", "2", "3"].map(str::to_owned);
        let zone = |name: &str| zone_of(&MachineName::new(name).unwrap(), &zones);
        assert_eq!(zone("demo-cp-0").as_deref(), Some("1"));
        assert_eq!(zone("demo-cp-2").as_deref(), Some("3"));
        assert_eq!(zone("demo-worker-3").as_deref(), Some("1"));
        assert!(zone("gateway").is_some());
        assert_eq!(zone_of(&MachineName::new("demo-cp-0").unwrap(), &[]), None);
    }
}
