//! What instances are started with: their type and image, looked up once for all that are made.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use kprov_provider::ProviderError;
use kprov_types::machine::MachineSpec;

use crate::client::Client;
use crate::error::while_reading;
use crate::model::{Image, InstanceKind};

/// The instance type where none is named: 2 vCPUs and 8 GiB, in every region.
pub(crate) const SIZE: &str = "t3.large";

/// An image that is found by owner and name pattern.
struct Known {
    name: &'static str,
    owner: &'static str,
    /// Debian has the architecture in its names, in its own terms.
    pattern: fn(&str) -> String,
}

/// Debian's images ("Debian on Amazon EC2") and Flatcar's ("Running Flatcar on AWS EC2").
const KNOWN: &[Known] = &[
    Known {
        name: "debian-12",
        owner: "136693071363",
        pattern: |architecture| {
            let debian = if architecture == "arm64" { "arm64" } else { "amd64" };
            format!("debian-12-{debian}-*")
        },
    },
    Known {
        name: "flatcar",
        owner: "075585003325",
        pattern: |_| "Flatcar-stable-*-hvm".to_owned(),
    },
];

/// Types and images by what machines ask for.
#[derive(Debug, Default)]
pub(crate) struct Catalog {
    kinds: BTreeMap<String, InstanceKind>,
    images: BTreeMap<(Option<String>, String), Image>,
}

/// A machine's instance type.
pub(crate) fn size(spec: &MachineSpec) -> &str {
    spec.size.as_deref().unwrap_or(SIZE)
}

impl Catalog {
    /// Looks up what these machines need: one call for types, and one for each image.
    pub(crate) async fn look(client: &Client, machines: &[&MachineSpec]) -> Result<Self, ProviderError> {
        let sizes: BTreeSet<&str> = machines.iter().map(|m| size(m)).collect();
        if sizes.is_empty() {
            return Ok(Self::default());
        }
        let kinds = client.kinds(&sizes).await.map_err(while_reading)?;
        if let Some(missing) = sizes.iter().find(|s| !kinds.contains_key(**s)) {
            return Err(
                ProviderError::never(format!("region `{}` has no instance type `{missing}`", client.region))
                    .hint("choose another size; `aws ec2 describe-instance-type-offerings` lists those it has"),
            );
        }
        let mut images = BTreeMap::new();
        for machine in machines {
            let Some(kind) = kinds.get(size(machine)) else { continue };
            let key = (machine.image.clone(), kind.architecture.clone());
            if let Entry::Vacant(vacant) = images.entry(key) {
                vacant.insert(find(client, machine.image.as_deref(), &kind.architecture).await?);
            }
        }
        Ok(Self { kinds, images })
    }

    /// The image of a machine.
    pub(crate) fn image(&self, machine: &MachineSpec) -> Option<&Image> {
        let kind = self.kinds.get(size(machine))?;
        self.images.get(&(machine.image.clone(), kind.architecture.clone()))
    }
}

async fn find(client: &Client, image: Option<&str>, architecture: &str) -> Result<Image, ProviderError> {
    let region = &client.region;
    let missing = |what: String| {
        ProviderError::never(format!("region `{region}` has no image {what}"))
            .hint("images have another id in each region; `spec.image` takes an id, `debian-12` or `flatcar`")
    };
    let name = image.unwrap_or("debian-12");
    if name.starts_with("ami-") {
        let found = client.image_by_id(name).await.map_err(while_reading)?;
        return found.ok_or_else(|| missing(format!("`{name}`")));
    }
    let Some(known) = KNOWN.iter().find(|k| k.name == name) else {
        return Err(ProviderError::never(format!("`{name}` names no image on AWS"))
            .hint("`spec.image` takes an id such as `ami-0123456789abcdef0`, `debian-12` or `flatcar`"));
    };
    let pattern = (known.pattern)(architecture);
    let found = client.image_by_name(known.owner, &pattern, architecture).await;
    found
        .map_err(while_reading)?
        .ok_or_else(|| missing(format!("named `{pattern}` of owner {}", known.owner)))
}
