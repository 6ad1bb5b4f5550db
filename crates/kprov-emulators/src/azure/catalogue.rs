//! What can be had: locations, sizes, images, quotas; and what a test has taken away.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::refusal::Refusal;
use super::store::Store;

/// A size of machine.
#[derive(Debug)]
pub(super) struct Size {
    pub(super) name: &'static str,
    /// As quotas call it.
    pub(super) family: &'static str,
    pub(super) cores: u64,
    memory_gib: &'static str,
    pub(super) data_disks: usize,
    /// The Hyper-V generations it starts.
    pub(super) generations: &'static str,
    pub(super) trusted_launch: bool,
    pub(super) premium: bool,
    pub(super) accelerated: bool,
    pub(super) architecture: &'static str,
}

macro_rules! sizes {
    ($($name:literal $family:literal $cores:literal $memory:literal $disks:literal $generations:literal $trusted:literal
       $premium:literal $accelerated:literal $architecture:literal)*) => {
        &[$(Size {
            name: $name,
            family: $family,
            cores: $cores,
            memory_gib: $memory,
            data_disks: $disks,
            generations: $generations,
            trusted_launch: $trusted,
            premium: $premium,
            accelerated: $accelerated,
            architecture: $architecture,
        }),*]
    };
}

/// The sizes; figures as in Azure's documentation of each series.
pub(super) static SIZES: &[Size] = sizes! {
    "Standard_B1s" "standardBSFamily" 1 "1" 2 "V1,V2" true true false "x64"
    "Standard_B2s" "standardBSFamily" 2 "4" 4 "V1,V2" true true false "x64"
    "Standard_B2ms" "standardBSFamily" 2 "8" 4 "V1,V2" true true false "x64"
    "Standard_B4ms" "standardBSFamily" 4 "16" 8 "V1,V2" true true false "x64"
    "Standard_B2s_v2" "standardBsv2Family" 2 "8" 4 "V1,V2" true true true "x64"
    "Standard_D2s_v3" "standardDSv3Family" 2 "8" 4 "V1,V2" true true true "x64"
    "Standard_D4s_v3" "standardDSv3Family" 4 "16" 8 "V1,V2" true true true "x64"
    "Standard_D2s_v4" "standardDSv4Family" 2 "8" 4 "V1,V2" true true true "x64"
    "Standard_D2s_v5" "standardDSv5Family" 2 "8" 4 "V1,V2" true true true "x64"
    "Standard_D4s_v5" "standardDSv5Family" 4 "16" 8 "V1,V2" true true true "x64"
    "Standard_D8s_v5" "standardDSv5Family" 8 "32" 16 "V1,V2" true true true "x64"
    "Standard_D2as_v5" "standardDASv5Family" 2 "8" 4 "V1,V2" true true true "x64"
    "Standard_D4as_v5" "standardDASv5Family" 4 "16" 8 "V1,V2" true true true "x64"
    "Standard_E2s_v5" "standardESv5Family" 2 "16" 4 "V1,V2" true true true "x64"
    "Standard_D2ps_v5" "standardDPSv5Family" 2 "8" 4 "V2" false true true "Arm64"
    "Standard_A2_v2" "standardAv2Family" 2 "4" 4 "V1" false false false "x64"
};

/// An image of the marketplace.
#[derive(Debug)]
pub(super) struct Image {
    publisher: &'static str,
    offer: &'static str,
    sku: &'static str,
    pub(super) versions: &'static [&'static str],
    pub(super) generation: &'static str,
    pub(super) architecture: &'static str,
    pub(super) trusted_launch: bool,
    /// Whether it's bought, so that a machine of it names the plan.
    pub(super) plan: bool,
    pub(super) disk_gib: i64,
}

macro_rules! images {
    ($($publisher:literal $offer:literal $sku:literal $versions:expr, $generation:literal $architecture:literal $trusted:literal
       $plan:literal $gib:literal)*) => {
        &[$(Image {
            publisher: $publisher,
            offer: $offer,
            sku: $sku,
            versions: $versions,
            generation: $generation,
            architecture: $architecture,
            trusted_launch: $trusted,
            plan: $plan,
            disk_gib: $gib,
        }),*]
    };
}

static IMAGES: &[Image] = images! {
    "Debian" "debian-12" "12" &["0.20250115.1993", "0.20250428.2096"], "V1" "x64" false false 30
    "Debian" "debian-12" "12-gen2" &["0.20250115.1993", "0.20250428.2096"], "V2" "x64" true false 30
    "Debian" "debian-12" "12-arm64" &["0.20250115.1993"], "V2" "Arm64" false false 30
    "Debian" "debian-13" "13-gen2" &["0.20250911.2232"], "V2" "x64" true false 30
    "Canonical" "ubuntu-24_04-lts" "server" &["24.04.202504010"], "V2" "x64" true false 30
    "Canonical" "ubuntu-24_04-lts" "server-gen1" &["24.04.202504010"], "V1" "x64" false false 30
    "kinvolk" "flatcar-container-linux-corevm-amd64" "stable-gen2" &["4152.2.3"], "V2" "x64" false false 30
    "kinvolk" "flatcar-container-linux-corevm-amd64" "stable" &["4152.2.3"], "V1" "x64" false false 30
    "kinvolk" "flatcar-container-linux-free" "stable-gen2" &["4152.2.3"], "V2" "x64" false true 30
};

/// Locations, and whether each has availability zones.
static LOCATIONS: &[(&str, bool)] = &[
    ("westeurope", true),
    ("northeurope", true),
    ("germanywestcentral", true),
    ("eastus", true),
    ("westus2", true),
    ("westus", false),
    ("ukwest", false),
];

const ZONES: [&str; 3] = ["1", "2", "3"];

/// What a test has changed about what can be had.
#[derive(Debug, Default)]
pub(super) struct Catalogue {
    /// Sizes, in lower case, that can't be had: everywhere, or in one zone.
    pub(super) restricted: BTreeSet<(String, Option<String>)>,
    /// Limits of families, and of `cores` for all together, in lower case.
    pub(super) limits: BTreeMap<String, u64>,
    /// Namespaces, in lower case, that the subscription isn't registered for.
    pub(super) unregistered: BTreeSet<String>,
    /// How many public addresses there may be.
    pub(super) addresses: Option<usize>,
}

/// What a limit is where no test has set one.
const LIMIT: u64 = 10_000;

/// `West Europe` and `westeurope` are the same place.
pub(super) fn canonical(location: &str) -> String {
    location.replace(' ', "").to_ascii_lowercase()
}

/// Checks a location and returns it as Azure writes it.
pub(super) fn check_location(location: &str, kind: &str) -> Result<String, Refusal> {
    let name = canonical(location);
    if LOCATIONS.iter().any(|(l, _)| *l == name) {
        return Ok(name);
    }
    let known = LOCATIONS.iter().map(|(l, _)| *l).collect::<Vec<_>>().join(",");
    Err(Refusal::new(
        400,
        "LocationNotAvailableForResourceType",
        format!(
            "The provided location '{location}' is not available for resource type '{kind}'. List of available regions for the \
             resource type is '{known}'."
        ),
    ))
}

/// Checks that a location has these zones.
pub(super) fn check_zones(zones: &[&str], location: &str, kind: &str, several: bool) -> Result<(), Refusal> {
    let zonal = LOCATIONS.iter().any(|(l, zonal)| *l == location && *zonal);
    if zones.is_empty() {
        return Ok(());
    }
    if !zonal {
        return Err(Refusal::new(
            400,
            "LocationNotSupportAvailabilityZones",
            format!("The resource type '{kind}' does not support availability zones at location '{location}'."),
        ));
    }
    if let Some(zone) = zones.iter().find(|z| !ZONES.contains(z)) {
        return Err(Refusal::new(
            400,
            "AvailabilityZoneNotSupported",
            format!(
                "The zone(s) '{zone}' for resource '{kind}' is not supported. The supported zones for location '{location}' \
                 are '1,2,3'"
            ),
        ));
    }
    if zones.len() > 1 && !several {
        return Err(Refusal::new(
            400,
            "InvalidParameter",
            "The value of parameter zones is invalid: a resource can be in one zone at most.",
        )
        .target("zones"));
    }
    Ok(())
}

/// All locations, as `GET locations` has them.
pub(super) fn locations(scope: &str) -> Value {
    let list: Vec<Value> = LOCATIONS
        .iter()
        .map(|(name, _)| json!({"id": format!("{scope}/locations/{name}"), "name": name, "type": "Region", "displayName": name}))
        .collect();
    json!({"value": list})
}

/// The size of this name.
pub(super) fn size(name: &str) -> Option<&'static Size> {
    SIZES.iter().find(|s| s.name.eq_ignore_ascii_case(name))
}

/// The image of this name; the version isn't looked at.
pub(super) fn image(publisher: &str, offer: &str, sku: &str) -> Option<&'static Image> {
    IMAGES.iter().find(|i| {
        i.publisher.eq_ignore_ascii_case(publisher)
            && i.offer.eq_ignore_ascii_case(offer)
            && i.sku.eq_ignore_ascii_case(sku)
    })
}

impl Store {
    /// Whether this size can't be had there.
    pub(super) fn restricted(&self, size: &str, zone: Option<&str>) -> bool {
        let size = size.to_ascii_lowercase();
        self.catalogue.restricted.contains(&(size.clone(), None))
            || zone.is_some_and(|z| self.catalogue.restricted.contains(&(size, Some(z.to_owned()))))
    }

    pub(super) fn limit(&self, family: &str) -> u64 {
        self.catalogue
            .limits
            .get(&family.to_ascii_lowercase())
            .copied()
            .unwrap_or(LIMIT)
    }

    /// Cores in use in a location: of one family, or of all.
    pub(super) fn cores(&self, location: &str, family: Option<&str>) -> u64 {
        self.of_kind("virtualMachines")
            .filter(|m| m.location() == location)
            .filter_map(|m| size(m.properties().get("hardwareProfile")?.get("vmSize")?.as_str()?))
            .filter(|s| family.is_none_or(|f| f == s.family))
            .map(|s| s.cores)
            .sum()
    }

    /// `GET locations/<location>/usages` of Microsoft.Compute.
    pub(super) fn usages(&self, location: &str) -> Vec<Value> {
        let usage = |name: &str, local: String, used: u64| {
            json!({
                "unit": "Count", "currentValue": used, "limit": self.limit(name),
                "name": {"value": name, "localizedValue": local},
            })
        };
        let mut list = vec![
            usage("cores", "Total Regional vCPUs".to_owned(), self.cores(location, None)),
            usage(
                "virtualMachines",
                "Virtual Machines".to_owned(),
                self.of_kind("virtualMachines")
                    .filter(|m| m.location() == location)
                    .count() as u64,
            ),
        ];
        let families: BTreeSet<&str> = SIZES.iter().map(|s| s.family).collect();
        list.extend(
            families
                .into_iter()
                .map(|f| usage(f, format!("{f} vCPUs"), self.cores(location, Some(f)))),
        );
        list
    }

    /// `GET skus`: sizes by location, with what they can do and what is restricted.
    pub(super) fn skus(&self, location: Option<&str>) -> Vec<Value> {
        let places = LOCATIONS.iter().filter(|(l, _)| location.is_none_or(|only| only == *l));
        places
            .flat_map(|(place, zonal)| SIZES.iter().map(move |size| self.sku(size, place, *zonal)))
            .collect()
    }

    fn sku(&self, size: &Size, place: &str, zonal: bool) -> Value {
        let zones: &[&str] = if zonal { &ZONES } else { &[] };
        let capability = |name: &str, value: &str| json!({"name": name, "value": value});
        let yes = |b: bool| if b { "True" } else { "False" };
        let mut restrictions = Vec::new();
        if self.restricted(size.name, None) {
            restrictions.push(json!({
                "type": "Location", "values": [place], "reasonCode": "NotAvailableForSubscription",
                "restrictionInfo": {"locations": [place]},
            }));
        }
        let out: Vec<&&str> = zones.iter().filter(|z| self.restricted(size.name, Some(z))).collect();
        if !out.is_empty() {
            restrictions.push(json!({
                "type": "Zone", "values": [place], "reasonCode": "NotAvailableForSubscription",
                "restrictionInfo": {"locations": [place], "zones": out},
            }));
        }
        json!({
            "resourceType": "virtualMachines",
            "name": size.name,
            "tier": "Standard",
            "size": size.name.trim_start_matches("Standard_"),
            "family": size.family,
            "locations": [place],
            "locationInfo": [{"location": place, "zones": zones, "zoneDetails": []}],
            "capabilities": [
                capability("vCPUs", &size.cores.to_string()),
                capability("MemoryGB", size.memory_gib),
                capability("MaxDataDiskCount", &size.data_disks.to_string()),
                capability("HyperVGenerations", size.generations),
                capability("CpuArchitectureType", size.architecture),
                capability("PremiumIO", yes(size.premium)),
                capability("AcceleratedNetworkingEnabled", yes(size.accelerated)),
                capability("TrustedLaunchDisabled", yes(!size.trusted_launch)),
            ],
            "restrictions": restrictions,
        })
    }

    /// `GET .../artifacttypes/vmimage/offers/<offer>/skus/<sku>/versions`.
    pub(super) fn image_versions(
        &self,
        location: &str,
        publisher: &str,
        offer: &str,
        sku: &str,
    ) -> Result<Value, Refusal> {
        let image = image(publisher, offer, sku).ok_or_else(|| no_image(publisher, offer, sku, "latest"))?;
        let versions = image.versions.iter().map(|version| {
            json!({
                "location": location,
                "name": version,
                "id": format!(
                    "{}/Providers/Microsoft.Compute/Locations/{location}/Publishers/{publisher}/ArtifactTypes/VMImage/Offers/\
                     {offer}/Skus/{sku}/Versions/{version}",
                    self.scope()
                ),
            })
        });
        Ok(versions.collect())
    }
}

/// An image that isn't there.
pub(super) fn no_image(publisher: &str, offer: &str, sku: &str, version: &str) -> Refusal {
    Refusal::new(
        404,
        "PlatformImageNotFound",
        format!(
            "The platform image '{publisher}:{offer}:{sku}:{version}' is not available. Verify that all fields in the storage \
             profile are correct. For more details about storage profile information, please refer to \
             https://aka.ms/storageprofile"
        ),
    )
    .target("imageReference")
}
