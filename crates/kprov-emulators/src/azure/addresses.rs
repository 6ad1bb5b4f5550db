//! Address ranges, and which private and public addresses are taken.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde_json::Value;

use super::refusal::Refusal;
use super::store::{Store, child, text};

/// How many addresses at the beginning of a subnet Azure keeps: network, gateway, and two for its name servers.
const KEPT: u32 = 4;

/// Reads an address range; bits beyond the prefix have to be zero.
pub(super) fn range(prefix: &str, resource: &str) -> Result<Ipv4Net, Refusal> {
    let bad = |hint: String| {
        Refusal::new(
            400,
            "InvalidCIDRNotation",
            format!("The address prefix {prefix} in resource {resource} has an invalid CIDR notation.{hint}"),
        )
    };
    let net: Ipv4Net = prefix.parse().map_err(|_| bad(String::new()))?;
    if net.trunc() == net {
        return Ok(net);
    }
    Err(bad(format!(
        " For the given prefix length, the address prefix should be {}.",
        net.trunc()
    )))
}

/// Whether two ranges have an address in common.
pub(super) fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b) || b.contains(&a)
}

/// The address ranges of a subnet, as its properties have them.
pub(super) fn prefixes(properties: &Value) -> Vec<&str> {
    let many = properties.get("addressPrefixes").and_then(Value::as_array);
    let one = properties.get("addressPrefix").and_then(Value::as_str);
    one.into_iter()
        .chain(many.into_iter().flatten().filter_map(Value::as_str))
        .collect()
}

impl Store {
    /// A private address in a subnet for `holder` (an IP configuration's or frontend's id): the one asked for, the one it had, or
    /// the lowest that is free.
    pub(super) fn private_address(
        &self,
        subnet: &str,
        holder: &str,
        asked: Option<&str>,
        before: Option<&str>,
        also_taken: &BTreeSet<Ipv4Addr>,
    ) -> Result<Ipv4Addr, Refusal> {
        let net = self.subnet_range(subnet)?;
        let mut taken = self.taken(subnet, holder);
        taken.extend(also_taken);
        let first = u32::from(net.network());
        let last = u32::from(net.broadcast());
        let usable = |address: Ipv4Addr| (first + KEPT..last).contains(&u32::from(address));
        if let Some(asked) = asked {
            let address: Ipv4Addr = asked.parse().map_err(|_| {
                Refusal::new(
                    400,
                    "InvalidIPAddressFormat",
                    format!("The IP address {asked} of {holder} is not a valid IPv4 address."),
                )
            })?;
            if !net.contains(&address) {
                return Err(Refusal::new(
                    400,
                    "PrivateIPAddressNotInSubnet",
                    format!("Private static IP address {asked} does not belong to the range of subnet prefix {net}."),
                ));
            }
            if !usable(address) {
                return Err(Refusal::new(
                    400,
                    "PrivateIPAddressInReservedRange",
                    format!("Private static IP address {asked} falls within reserved IP range of subnet prefix {net}."),
                ));
            }
            if taken.contains(&address) {
                return Err(Refusal::new(
                    400,
                    "PrivateIPAddressInUse",
                    format!(
                        "IP configuration {holder} is using the private IP address {asked} which is already allocated to another resource."
                    ),
                ));
            }
            return Ok(address);
        }
        if let Some(before) = before.and_then(|b| b.parse().ok())
            && usable(before)
            && !taken.contains(&before)
        {
            return Ok(before);
        }
        (first + KEPT..last)
            .map(Ipv4Addr::from)
            .find(|a| !taken.contains(a))
            .ok_or_else(|| {
                Refusal::new(
                    400,
                    "SubnetIsFull",
                    format!(
                        "Subnet {} with address prefix {net} does not have enough capacity for 1 IP addresses.",
                        subnet.rsplit('/').next().unwrap_or_default()
                    ),
                )
            })
    }

    fn subnet_range(&self, subnet: &str) -> Result<Ipv4Net, Refusal> {
        let missing = || {
            Refusal::new(
                400,
                "InvalidResourceReference",
                format!("Resource {subnet} was not found. Please make sure that the referenced resource exists."),
            )
        };
        let name = subnet.rsplit('/').next().unwrap_or_default();
        let network = self.owner(subnet).ok_or_else(missing)?;
        let found = child(network.properties(), "subnets", name).ok_or_else(missing)?;
        let prefix = found.get("properties").map(prefixes).unwrap_or_default();
        range(prefix.first().copied().unwrap_or_default(), subnet)
    }

    /// The addresses taken in a subnet, those of `holder` itself left out.
    fn taken(&self, subnet: &str, holder: &str) -> BTreeSet<Ipv4Addr> {
        let mut taken = BTreeSet::new();
        for (kind, list) in [
            ("networkInterfaces", "ipConfigurations"),
            ("loadBalancers", "frontendIPConfigurations"),
        ] {
            for resource in self.of_kind(kind) {
                for item in resource
                    .properties()
                    .get(list)
                    .and_then(Value::as_array)
                    .into_iter()
                    .flatten()
                {
                    let id = format!("{}/{list}/{}", resource.id, text(item, "/name").unwrap_or_default());
                    if text(item, "/properties/subnet/id").is_some_and(|s| s.eq_ignore_ascii_case(subnet))
                        && !id.eq_ignore_ascii_case(holder)
                    {
                        taken.extend(
                            text(item, "/properties/privateIPAddress").and_then(|a| a.parse::<Ipv4Addr>().ok()),
                        );
                    }
                }
            }
        }
        taken
    }

    /// A public address that nobody has: of the test's own where it has given some, else one of 203.0.113.0/24 and beyond.
    pub(super) fn new_public_address(&self, name: &str) -> Result<Ipv4Addr, Refusal> {
        if let Some(given) = self.given.get(&name.to_ascii_lowercase()) {
            return Ok(*given);
        }
        let taken: BTreeSet<Ipv4Addr> = self
            .of_kind("publicIPAddresses")
            .filter_map(|p| p.properties().get("ipAddress")?.as_str()?.parse().ok())
            .collect();
        let limit = self.catalogue.addresses.unwrap_or(usize::MAX);
        if taken.len() >= limit {
            return Err(Refusal::new(
                400,
                "PublicIPCountLimitReached",
                format!("Cannot create more than {limit} public IP addresses for this subscription in this region."),
            ));
        }
        let beyond = (u32::from(Ipv4Addr::new(203, 0, 113, 1))..).map(Ipv4Addr::from);
        let mut all = self.options.public_addresses.iter().copied().chain(beyond);
        all.find(|a| !taken.contains(a)).ok_or_else(|| {
            Refusal::new(
                409,
                "PublicIPAddressPoolExhausted",
                "There are no public IP addresses left.",
            )
        })
    }
}
