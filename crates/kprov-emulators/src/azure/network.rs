//! What Microsoft.Network checks and adds when something is put, and when it's deleted.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde_json::{Map, Value, json};

use super::addresses::{overlap, prefixes, range};
use super::refusal::Refusal;
use super::rules::{check_rules, prepare_security_group};
use super::store::{Resource, Store, child, text};

/// The members of a list in `properties`.
pub(super) fn items<'a>(body: &'a Map<String, Value>, list: &str) -> impl Iterator<Item = &'a Value> {
    body.get("properties")
        .and_then(|p| p.get(list))
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

pub(super) fn items_mut<'a>(body: &'a mut Map<String, Value>, list: &str) -> impl Iterator<Item = &'a mut Value> {
    body.get_mut("properties")
        .and_then(|p| p.get_mut(list))
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
}

pub(super) fn name_of(item: &Value) -> &str {
    text(item, "/name").unwrap_or_default()
}

/// The SKU's name; `Basic` where none is given, as in the API.
fn sku(body: &Map<String, Value>) -> &str {
    body.get("sku").and_then(|s| text(s, "/name")).unwrap_or("Basic")
}

impl Store {
    /// Checks what is about to be put and fills in what the service decides.
    pub(super) fn prepare_network(
        &mut self,
        plural: &str,
        id: &str,
        body: &mut Map<String, Value>,
        old: Option<&Resource>,
    ) -> Result<(), Refusal> {
        for list in LISTS {
            unique_names(body, list, id)?;
        }
        let serial = self.serial();
        if let Some(properties) = body.get_mut("properties") {
            let kept = old.and_then(|o| o.properties().get("resourceGuid"));
            properties["resourceGuid"] = kept.cloned().unwrap_or_else(|| json!(super::store::guid(serial)));
        }
        match plural {
            "virtualNetworks" => self.prepare_virtual_network(id, body, old),
            "networkSecurityGroups" => prepare_security_group(body),
            "publicIPAddresses" => self.prepare_public_address(id, body, old),
            "loadBalancers" => self.prepare_load_balancer(id, body, old),
            "networkInterfaces" => self.prepare_interface(id, body, old),
            _ => Ok(()),
        }
    }

    fn prepare_virtual_network(
        &self,
        id: &str,
        body: &Map<String, Value>,
        old: Option<&Resource>,
    ) -> Result<(), Refusal> {
        let network = id.rsplit('/').next().unwrap_or_default();
        let space = body
            .get("properties")
            .and_then(|p| p.pointer("/addressSpace/addressPrefixes"))
            .and_then(Value::as_array);
        let space: Vec<Ipv4Net> = space
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .map(|p| range(p, id))
            .collect::<Result<_, _>>()?;
        for (index, one) in space.iter().enumerate() {
            if space[index + 1..].iter().any(|other| overlap(*one, *other)) {
                return Err(Refusal::new(
                    400,
                    "AddressSpaceOverlap",
                    format!("The address prefixes of virtual network '{network}' overlap: {one}."),
                ));
            }
        }
        let mut seen: Vec<(Ipv4Net, &str)> = Vec::new();
        for subnet in items(body, "subnets") {
            let name = name_of(subnet);
            let own = subnet.get("properties").map(prefixes).unwrap_or_default();
            if own.len() != 1 {
                return Err(Refusal::new(
                    400,
                    "NetcfgInvalidSubnet",
                    format!(
                        "Subnet '{name}' is not valid in virtual network '{network}': it needs one address prefix."
                    ),
                ));
            }
            let net = range(own[0], &format!("{id}/subnets/{name}"))?;
            if net.prefix_len() > 29 {
                return Err(Refusal::new(
                    400,
                    "NetcfgInvalidSubnet",
                    format!("Subnet '{name}' is not valid in virtual network '{network}': {net} is smaller than /29."),
                ));
            }
            if !space.iter().any(|s| s.contains(&net)) {
                return Err(Refusal::new(
                    400,
                    "NetcfgSubnetRangeOutsideVnet",
                    format!(
                        "Subnet '{name}' is not valid because its IP address range is outside the IP address range of virtual \
                         network '{network}'."
                    ),
                ));
            }
            if let Some((_, other)) = seen.iter().find(|(n, _)| overlap(*n, net)) {
                return Err(Refusal::new(
                    400,
                    "NetcfgSubnetRangesOverlap",
                    format!(
                        "Subnet '{name}' is not valid because its IP address range overlaps with that of an existing subnet in \
                         virtual network '{network}': '{other}'."
                    ),
                ));
            }
            seen.push((net, name));
        }
        old.map_or(Ok(()), |old| self.subnets_kept(body, old))
    }

    /// A subnet in use can neither go nor move.
    fn subnets_kept(&self, body: &Map<String, Value>, old: &Resource) -> Result<(), Refusal> {
        let all = self.uses();
        for before in items(&old.body, "subnets") {
            let name = name_of(before);
            let subnet = format!("{}/subnets/{name}", old.id);
            let Some(by) = all.of(&subnet).first() else {
                continue;
            };
            let after = items(body, "subnets").find(|s| name_of(s).eq_ignore_ascii_case(name));
            let Some(after) = after else {
                return Err(subnet_in_use(name, by));
            };
            let range = |s: &Value| s.get("properties").map(|p| prefixes(p).join(","));
            if range(after) != range(before) {
                return Err(Refusal::new(
                    400,
                    "InUsePrefixCannotBeDeleted",
                    format!(
                        "IpPrefix {} on Subnet {name} has active allocations and cannot be deleted.",
                        range(before).unwrap_or_default()
                    ),
                ));
            }
        }
        Ok(())
    }

    fn prepare_public_address(
        &self,
        id: &str,
        body: &mut Map<String, Value>,
        old: Option<&Resource>,
    ) -> Result<(), Refusal> {
        let standard = sku(body).eq_ignore_ascii_case("Standard");
        if let Some(old) = old
            && !sku(&old.body).eq_ignore_ascii_case(sku(body))
        {
            return Err(Refusal::new(
                400,
                "PublicIPSkuCannotBeChanged",
                format!(
                    "Sku of public IP address {id} cannot be changed from {} to {}.",
                    sku(&old.body),
                    sku(body)
                ),
            ));
        }
        let properties = &mut body["properties"];
        let method = text(properties, "/publicIPAllocationMethod").unwrap_or("Dynamic");
        if standard && !method.eq_ignore_ascii_case("Static") {
            return Err(Refusal::new(
                400,
                "StandardSkuPublicIPAddressesMustBeStatic",
                format!("Standard sku publicIp {id} must have AllocationMethod set to Static."),
            ));
        }
        let kept = old.and_then(|o| o.properties().get("ipAddress")).cloned();
        let address = match kept {
            Some(kept) => kept,
            None => json!(self.new_public_address(id.rsplit('/').next().unwrap_or_default())?),
        };
        properties["ipAddress"] = address;
        Ok(())
    }

    fn prepare_load_balancer(
        &self,
        id: &str,
        body: &mut Map<String, Value>,
        old: Option<&Resource>,
    ) -> Result<(), Refusal> {
        check_inner_references(id, body)?;
        check_rules(id, body)?;
        if let Some(old) = old {
            self.pools_kept(body, old)?;
        }
        let balancer_sku = sku(body).to_owned();
        let mut chosen = BTreeSet::new();
        for frontend in items_mut(body, "frontendIPConfigurations") {
            let holder = format!("{id}/frontendIPConfigurations/{}", name_of(frontend));
            let subnet = text(frontend, "/properties/subnet/id").map(str::to_owned);
            let public = text(frontend, "/properties/publicIPAddress/id").map(str::to_owned);
            match (subnet, public) {
                (Some(subnet), None) => {
                    self.private_in(&subnet, &holder, frontend, old, "frontendIPConfigurations", &mut chosen)?;
                }
                (None, Some(public)) => {
                    let address = self.get(&public);
                    let address_sku = address.map_or("Basic", |a| sku(&a.body));
                    if !address_sku.eq_ignore_ascii_case(&balancer_sku) {
                        return Err(Refusal::new(
                            400,
                            "PublicIPAndLBSkuDoNotMatch",
                            format!(
                                "{balancer_sku} sku load balancer {id} cannot reference {address_sku} sku publicIP {public}."
                            ),
                        ));
                    }
                    self.public_free(&public, &holder)?;
                }
                _ => {
                    return Err(
                        Refusal::new(400, "InvalidRequestFormat", "Cannot parse the request.").detail(
                            "FrontendIPConfigurationInvalid",
                            format!("{holder} has to have either a subnet or a public IP address."),
                        ),
                    );
                }
            }
        }
        Ok(())
    }

    fn pools_kept(&self, body: &Map<String, Value>, old: &Resource) -> Result<(), Refusal> {
        let uses = self.uses();
        for pool in items(&old.body, "backendAddressPools") {
            let name = name_of(pool);
            let id = format!("{}/backendAddressPools/{name}", old.id);
            let outside = uses
                .outside(&id)
                .into_iter()
                .find(|(_, by)| by.contains("/networkInterfaces/"));
            if let Some((_, by)) = outside
                && !items(body, "backendAddressPools").any(|p| name_of(p).eq_ignore_ascii_case(name))
            {
                return Err(Refusal::new(
                    400,
                    "InUseBackendAddressPoolCannotBeDeleted",
                    format!("Backend address pool {id} is in use by {by} and cannot be deleted."),
                ));
            }
        }
        Ok(())
    }

    fn prepare_interface(
        &self,
        id: &str,
        body: &mut Map<String, Value>,
        old: Option<&Resource>,
    ) -> Result<(), Refusal> {
        let count = items(body, "ipConfigurations").count();
        let marked = items(body, "ipConfigurations")
            .filter(|c| c.pointer("/properties/primary") == Some(&Value::Bool(true)))
            .count();
        if count == 0 {
            return Err(Refusal::new(
                400,
                "NetworkInterfaceMustHaveAtLeastOneIpConfiguration",
                format!("Network interface {id} must have at least one IP configuration."),
            ));
        }
        if marked > 1 || (count > 1 && marked == 0) {
            return Err(Refusal::new(
                400,
                "NetworkInterfaceMustHaveExactlyOnePrimaryIpConfiguration",
                format!("Network interface {id} must have exactly one primary IP configuration."),
            ));
        }
        let mut chosen = BTreeSet::new();
        for configuration in items_mut(body, "ipConfigurations") {
            let holder = format!("{id}/ipConfigurations/{}", name_of(configuration));
            if count == 1 {
                configuration["properties"]["primary"] = json!(true);
            }
            let subnet = text(configuration, "/properties/subnet/id")
                .unwrap_or_default()
                .to_owned();
            self.private_in(&subnet, &holder, configuration, old, "ipConfigurations", &mut chosen)?;
            if let Some(public) = text(configuration, "/properties/publicIPAddress/id").map(str::to_owned) {
                self.public_free(&public, &holder)?;
            }
        }
        let serial = self.serial;
        let kept = old.and_then(|o| o.properties().get("macAddress")).cloned();
        body["properties"]["macAddress"] = kept.unwrap_or_else(|| {
            json!(format!(
                "00-0D-3A-{:02X}-{:02X}-{:02X}",
                (serial >> 16) & 255,
                (serial >> 8) & 255,
                serial & 255
            ))
        });
        Ok(())
    }

    /// Gives an IP configuration or frontend its private address.
    fn private_in(
        &self,
        subnet: &str,
        holder: &str,
        item: &mut Value,
        old: Option<&Resource>,
        list: &str,
        chosen: &mut BTreeSet<Ipv4Addr>,
    ) -> Result<(), Refusal> {
        let fixed =
            text(item, "/properties/privateIPAllocationMethod").is_some_and(|m| m.eq_ignore_ascii_case("Static"));
        let asked = text(item, "/properties/privateIPAddress").filter(|_| fixed);
        if fixed && asked.is_none() {
            return Err(Refusal::new(
                400,
                "PrivateIPAddressRequiredForStaticAllocation",
                format!("{holder} has static allocation and no private IP address."),
            ));
        }
        let before = old
            .and_then(|o| child(o.properties(), list, name_of(item)))
            .filter(|b| text(b, "/properties/subnet/id").is_some_and(|s| s.eq_ignore_ascii_case(subnet)))
            .and_then(|b| text(b, "/properties/privateIPAddress"));
        let address = self.private_address(subnet, holder, asked, before, chosen)?;
        chosen.insert(address);
        item["properties"]["privateIPAddress"] = json!(address);
        item["properties"]["privateIPAllocationMethod"] = json!(if fixed { "Static" } else { "Dynamic" });
        Ok(())
    }

    /// A public address serves one configuration alone.
    fn public_free(&self, public: &str, holder: &str) -> Result<(), Refusal> {
        let uses = self.uses();
        match uses.of(public).iter().find(|by| !by.eq_ignore_ascii_case(holder)) {
            None => Ok(()),
            Some(by) => Err(Refusal::new(
                400,
                "PublicIPAddressInUse",
                format!(
                    "Resource {holder} is referencing public IP address {public} that is already allocated to resource {by}."
                ),
            )),
        }
    }

    /// Whether something of the network provider can be deleted now.
    pub(super) fn check_network_delete(&self, resource: &Resource) -> Result<(), Refusal> {
        let all = self.uses();
        let outside = all.outside(&resource.id);
        let Some((of, by)) = outside.first() else {
            return Ok(());
        };
        let id = &resource.id;
        let name = &resource.name;
        let (code, message) = match resource.kind.plural {
            "virtualNetworks" => return Err(subnet_in_use(of.rsplit('/').next().unwrap_or_default(), by)),
            "networkSecurityGroups" => (
                "InUseNetworkSecurityGroupCannotBeDeleted",
                format!(
                    "Network security group {id} cannot be deleted because it is in use by the following resources: {by}. In \
                     order to delete the Network security group, remove the association with the resource(s). To learn how to \
                     do this, see aka.ms/deletensg."
                ),
            ),
            "publicIPAddresses" => (
                "PublicIPAddressCannotBeDeleted",
                format!(
                    "Public IP address {id} can not be deleted since it is still allocated to resource {by}. In order to delete \
                     the public IP, disassociate/detach the Public IP address from the resource. To learn how to do this, see \
                     aka.ms/deletepublicip."
                ),
            ),
            "natGateways" => (
                "CannotDeleteNatGatewayAssociatedToSubnet",
                format!(
                    "NAT Gateway {id} is still configured on {} subnets. Remove NAT Gateway from all referenced subnets and then \
                     delete NAT Gateway.",
                    outside.len()
                ),
            ),
            "networkInterfaces" => (
                "NicInUse",
                format!(
                    "Network Interface {id} is used by existing resource {by}. In order to delete the network interface, it must \
                     be dissociated from the resource. To learn more, see aka.ms/deletenic."
                ),
            ),
            // Interfaces leave its pools by themselves.
            _ => return Ok(()),
        };
        tracing::debug!(name, code, "refused to delete");
        Err(Refusal::new(400, code, message))
    }

    /// Whether a subnet can be deleted now.
    pub(super) fn check_subnet_delete(&self, network: &Resource, subnet: &str) -> Result<(), Refusal> {
        match self.uses().of(&format!("{}/subnets/{subnet}", network.id)).first() {
            Some(by) => Err(subnet_in_use(subnet, by)),
            None => Ok(()),
        }
    }

    pub(super) fn drop_subnet(&mut self, network: &str, subnet: &str) {
        if let Some(network) = self.get_mut(network)
            && let Some(list) = network.body["properties"]
                .get_mut("subnets")
                .and_then(Value::as_array_mut)
        {
            list.retain(|s| !name_of(s).eq_ignore_ascii_case(subnet));
        }
    }

    /// Takes interfaces out of the pools and rules of a load balancer that is gone.
    pub(super) fn leave_pools(&mut self, balancer: &str) {
        let own = format!("{}/", balancer.to_ascii_lowercase());
        let inside = |v: &Value| text(v, "/id").is_some_and(|id| id.to_ascii_lowercase().starts_with(&own));
        for interface in self.resources.values_mut().filter(|r| r.is("networkInterfaces")) {
            for configuration in items_mut(&mut interface.body, "ipConfigurations") {
                for list in ["loadBalancerBackendAddressPools", "loadBalancerInboundNatRules"] {
                    if let Some(list) = configuration["properties"].get_mut(list).and_then(Value::as_array_mut) {
                        list.retain(|v| !inside(v));
                    }
                }
            }
        }
    }
}

/// Lists in bodies whose members have names.
pub(super) const LISTS: [&str; 9] = [
    "subnets",
    "securityRules",
    "frontendIPConfigurations",
    "backendAddressPools",
    "probes",
    "loadBalancingRules",
    "outboundRules",
    "inboundNatRules",
    "ipConfigurations",
];

fn unique_names(body: &Map<String, Value>, list: &str, id: &str) -> Result<(), Refusal> {
    let mut seen = BTreeSet::new();
    for item in items(body, list) {
        let name = name_of(item);
        if !seen.insert(name.to_ascii_lowercase()) {
            return Err(
                Refusal::new(400, "InvalidRequestFormat", "Cannot parse the request.").detail(
                    "DuplicateResourceName",
                    format!("Resource {id} has two child resources with the same name ({name})."),
                ),
            );
        }
    }
    Ok(())
}

fn subnet_in_use(subnet: &str, by: &str) -> Refusal {
    Refusal::new(
        400,
        "InUseSubnetCannotBeDeleted",
        format!(
            "Subnet {subnet} is in use by {by} and cannot be deleted. In order to delete the subnet, delete all the resources \
             within the subnet. See aka.ms/deletesubnet."
        ),
    )
}

/// A reference to something that isn't there.
pub(super) fn no_such_reference(of: &str, by: &str) -> Refusal {
    Refusal::new(
        400,
        "InvalidResourceReference",
        format!(
            "Resource {of} referenced by resource {by} was not found. Please make sure that the referenced resource exists, and \
             that both resources are in the same region."
        ),
    )
}

/// References of a load balancer to parts of itself, which are to be there in what is put.
fn check_inner_references(id: &str, body: &Map<String, Value>) -> Result<(), Refusal> {
    let own = format!("{}/", id.to_ascii_lowercase());
    for (by, of) in super::store::references(id, body) {
        let lower = of.to_ascii_lowercase();
        if let Some(rest) = lower.strip_prefix(&own)
            && let Some((list, name)) = rest.split_once('/')
            && body
                .get("properties")
                .and_then(Value::as_object)
                .is_none_or(|p| child(p, list, name).is_none())
        {
            return Err(no_such_reference(&of, &by));
        }
    }
    Ok(())
}
