//! From what is wanted to the bodies of requests, written with the SDK's models. Pure.

use std::net::IpAddr;

use azure_mgmt_compute::package_2024_07_01::models as compute;
use azure_mgmt_network::package_2024_03::models as network;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::VerifyingKey;
use ipnet::Ipv4Net;
use kprov_provider::{ProviderError, first_boot};
use kprov_types::machine::{FirstBoot, MachineSpec};
use kprov_types::{MachineName, Role, ports};
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::config::AzureConfig;
use crate::image::Image;
use crate::kind::{CLUSTER_TAG, Kind, MACHINE_TAG, Names, POOL, RANGE_TAG, ROLE_TAG, SUBNET, data_disk, system_disk};
use crate::seen::Seen;
use crate::sizes::Size;

/// The most that custom data may hold, in bytes before they are encoded
/// ([virtual machines](https://learn.microsoft.com/azure/virtual-machines/custom-data)).
const CUSTOM_DATA_LIMIT: usize = 65_535;
/// The user that Azure wants on every Linux machine.
const USER: &str = "kprov";
/// The rule that lets people in.
const RULE: &str = "kprov-api";
/// The name of the only one of its kind in something.
const ONLY: &str = "api";

/// A model as it is sent: without the nulls that the SDK's models write for times that are left out.
fn body(model: &impl Serialize) -> Value {
    // Models hold strings, numbers and lists alone: they can always be written.
    let mut value = serde_json::to_value(model).unwrap_or(Value::Null);
    without_nulls(&mut value);
    value
}

fn without_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            map.values_mut().for_each(without_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(without_nulls),
        _ => {}
    }
}

/// The tags of what belongs to the cluster as a whole.
pub(crate) fn network_tags(names: &Names, range: Ipv4Net) -> Value {
    json!({CLUSTER_TAG: names.cluster.as_str(), RANGE_TAG: range.to_string()})
}

fn machine_tags(names: &Names, machine: &MachineName, role: Role) -> Value {
    json!({CLUSTER_TAG: names.cluster.as_str(), MACHINE_TAG: machine.as_str(), ROLE_TAG: role.as_str()})
}

fn network_resource(config: &AzureConfig, tags: Value) -> network::Resource {
    network::Resource {
        location: Some(config.location.clone()),
        tags: Some(tags),
        ..network::Resource::default()
    }
}

fn reference(id: String) -> network::SubResource {
    network::SubResource { id: Some(id) }
}

/// What the firewall opens besides what the configuration says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opening {
    /// The API's port.
    pub(crate) api_port: u16,
    /// The address by which machines go out: they come in by it, when they reach the API through its public address.
    pub(crate) way_out: Option<IpAddr>,
}

/// The firewall: besides what Azure's default rules let through inside of the network and from its load balancer's probes, the API
/// and the setup endpoint of machines.
pub(crate) fn security_group(config: &AzureConfig, names: &Names, range: Ipv4Net, opening: Opening) -> Value {
    body(&network::NetworkSecurityGroup {
        resource: network_resource(config, network_tags(names, range)),
        properties: Some(network::NetworkSecurityGroupPropertiesFormat {
            security_rules: vec![rule(config, opening)],
            ..network::NetworkSecurityGroupPropertiesFormat::default()
        }),
        etag: None,
    })
}

fn rule(config: &AzureConfig, opening: Opening) -> network::SecurityRule {
    use network::security_rule_properties_format::Protocol;
    let mut properties = network::SecurityRulePropertiesFormat::new(
        Protocol::Tcp,
        network::SecurityRuleAccess::Allow,
        100,
        network::SecurityRuleDirection::Inbound,
    );
    properties.description = Some("Kubernetes' API, and the setup of control-plane machines".into());
    properties.source_port_range = Some("*".into());
    properties.destination_address_prefix = Some("*".into());
    properties.destination_port_ranges = vec![opening.api_port.to_string(), ports::NODE_SETUP.to_string()];
    match sources(config, opening) {
        Some(sources) => properties.source_address_prefixes = sources,
        None => properties.source_address_prefix = Some("Internet".into()),
    }
    network::SecurityRule {
        name: Some(RULE.into()),
        properties: Some(properties),
        ..network::SecurityRule::default()
    }
}

/// Who may come in, where it isn't everybody.
fn sources(config: &AzureConfig, opening: Opening) -> Option<Vec<String>> {
    if config.access.is_empty() {
        return None;
    }
    let mut sources: Vec<String> = config.access.iter().map(|net| net.trunc().to_string()).collect();
    if !config.private {
        sources.extend(opening.way_out.map(|address| format!("{address}/32")));
    }
    sources.sort_unstable();
    sources.dedup();
    Some(sources)
}

/// Whether a security group lets in who should come in, and nobody else by kprov's rule.
pub(crate) fn is_open(config: &AzureConfig, group: &Seen, opening: Opening) -> bool {
    let rules = group.list("/properties/securityRules");
    let Some(rule) = rules.iter().find(|r| r["name"] == RULE).map(|r| &r["properties"]) else {
        return false;
    };
    let list = |name: &str| -> Vec<String> {
        let many = rule[name].as_array().into_iter().flatten();
        let mut all: Vec<String> = many.filter_map(|v| v.as_str().map(ToOwned::to_owned)).collect();
        all.sort_unstable();
        all
    };
    let mut wanted_ports = vec![opening.api_port.to_string(), ports::NODE_SETUP.to_string()];
    wanted_ports.sort_unstable();
    let from = match sources(config, opening) {
        Some(sources) => list("sourceAddressPrefixes") == sources,
        None => rule["sourceAddressPrefix"] == "Internet",
    };
    from && list("destinationPortRanges") == wanted_ports && rule["access"] == "Allow"
}

/// An existing security group with kprov's rule put right; other rules stay.
pub(crate) fn reopened(config: &AzureConfig, group: &Seen, opening: Opening) -> Value {
    let mut rules: Vec<Value> = group.list("/properties/securityRules").to_vec();
    rules.retain(|r| r["name"] != RULE);
    rules.insert(0, body(&rule(config, opening)));
    json!({
        "location": group.raw["location"],
        "tags": group.raw["tags"],
        "properties": {"securityRules": rules},
    })
}

/// A public address of the standard kind.
pub(crate) fn public_ip(config: &AzureConfig, tags: Value, zones: &[String]) -> Value {
    body(&network::PublicIpAddress {
        resource: network_resource(config, tags),
        sku: Some(network::PublicIpAddressSku {
            name: Some(network::public_ip_address_sku::Name::Standard),
            tier: None,
        }),
        properties: Some(Box::new(network::PublicIpAddressPropertiesFormat {
            public_ip_allocation_method: Some(network::IpAllocationMethod::Static),
            ..network::PublicIpAddressPropertiesFormat::default()
        })),
        zones: zones.to_vec(),
        ..network::PublicIpAddress::default()
    })
}

/// The way out for machines without a public address.
pub(crate) fn nat_gateway(config: &AzureConfig, names: &Names, range: Ipv4Net) -> Value {
    body(&network::NatGateway {
        resource: network_resource(config, network_tags(names, range)),
        sku: Some(network::NatGatewaySku {
            name: Some(network::nat_gateway_sku::Name::Standard),
        }),
        properties: Some(network::NatGatewayPropertiesFormat {
            public_ip_addresses: vec![reference(names.id(Kind::PublicIp, &names.nat()))],
            ..network::NatGatewayPropertiesFormat::default()
        }),
        ..network::NatGateway::default()
    })
}

/// The network: one subnet over the whole range, in all zones.
pub(crate) fn virtual_network(config: &AzureConfig, names: &Names, range: Ipv4Net) -> Value {
    let subnet = network::Subnet {
        name: Some(SUBNET.into()),
        properties: Some(network::SubnetPropertiesFormat {
            address_prefix: Some(range.to_string()),
            network_security_group: Some(network::NetworkSecurityGroup {
                resource: network::Resource {
                    id: Some(names.id(Kind::SecurityGroup, &names.security_group())),
                    ..network::Resource::default()
                },
                ..network::NetworkSecurityGroup::default()
            }),
            nat_gateway: Some(reference(names.id(Kind::NatGateway, &names.nat()))),
            ..network::SubnetPropertiesFormat::default()
        }),
        ..network::Subnet::default()
    };
    body(&network::VirtualNetwork {
        resource: network_resource(config, network_tags(names, range)),
        properties: Some(network::VirtualNetworkPropertiesFormat {
            address_space: Some(network::AddressSpace {
                address_prefixes: vec![range.to_string()],
            }),
            subnets: vec![subnet],
            ..network::VirtualNetworkPropertiesFormat::default()
        }),
        ..network::VirtualNetwork::default()
    })
}

fn subnet_reference(names: &Names) -> network::Subnet {
    network::Subnet {
        sub_resource: reference(names.subnet_id()),
        ..network::Subnet::default()
    }
}

fn public_ip_reference(id: String) -> network::PublicIpAddress {
    network::PublicIpAddress {
        resource: network::Resource {
            id: Some(id),
            ..network::Resource::default()
        },
        ..network::PublicIpAddress::default()
    }
}

/// The load balancer of the API: a frontend outside or inside, and a probe of the machines' own port.
pub(crate) fn load_balancer(
    config: &AzureConfig,
    names: &Names,
    range: Ipv4Net,
    api_port: u16,
    zones: &[String],
) -> Value {
    let port = i32::from(api_port);
    let front = if config.private {
        network::FrontendIpConfigurationPropertiesFormat {
            private_ip_allocation_method: Some(network::IpAllocationMethod::Dynamic),
            subnet: Some(subnet_reference(names)),
            ..network::FrontendIpConfigurationPropertiesFormat::default()
        }
    } else {
        network::FrontendIpConfigurationPropertiesFormat {
            public_ip_address: Some(public_ip_reference(names.id(Kind::PublicIp, &names.api()))),
            ..network::FrontendIpConfigurationPropertiesFormat::default()
        }
    };
    let mut probe = network::ProbePropertiesFormat::new(network::probe_properties_format::Protocol::Tcp, port);
    probe.interval_in_seconds = Some(5);
    probe.probe_threshold = Some(2);
    let mut rule = network::LoadBalancingRulePropertiesFormat::new(network::TransportProtocol::Tcp, port);
    rule.backend_port = Some(port);
    rule.frontend_ip_configuration = Some(reference(names.api_part_id("frontendIPConfigurations", ONLY)));
    rule.backend_address_pool = Some(reference(names.pool_id()));
    rule.probe = Some(reference(names.api_part_id("probes", ONLY)));
    rule.idle_timeout_in_minutes = Some(30);
    rule.enable_tcp_reset = Some(true);
    // Machines have their own ways out; a rule that is one too is refused beside them.
    rule.disable_outbound_snat = Some(true);
    body(&network::LoadBalancer {
        resource: network_resource(config, network_tags(names, range)),
        sku: Some(network::LoadBalancerSku {
            name: Some(network::load_balancer_sku::Name::Standard),
            tier: None,
        }),
        properties: Some(network::LoadBalancerPropertiesFormat {
            frontend_ip_configurations: vec![network::FrontendIpConfiguration {
                name: Some(ONLY.into()),
                properties: Some(front),
                // An address from outside brings its own zones.
                zones: if config.private { zones.to_vec() } else { Vec::new() },
                ..network::FrontendIpConfiguration::default()
            }],
            backend_address_pools: vec![network::BackendAddressPool {
                name: Some(POOL.into()),
                ..network::BackendAddressPool::default()
            }],
            probes: vec![network::Probe {
                name: Some(ONLY.into()),
                properties: Some(probe),
                ..network::Probe::default()
            }],
            load_balancing_rules: vec![network::LoadBalancingRule {
                name: Some(ONLY.into()),
                properties: Some(rule),
                ..network::LoadBalancingRule::default()
            }],
            ..network::LoadBalancerPropertiesFormat::default()
        }),
        ..network::LoadBalancer::default()
    })
}

/// Whether a machine has a public address of its own: people reach the setup of control-plane machines by it.
pub(crate) fn has_public_ip(config: &AzureConfig, role: Role) -> bool {
    role == Role::ControlPlane && !config.private
}

/// A machine's public address.
pub(crate) fn machine_public_ip(config: &AzureConfig, names: &Names, spec: &MachineSpec, zone: Option<&str>) -> Value {
    let zones: Vec<String> = zone.map(ToOwned::to_owned).into_iter().collect();
    public_ip(config, machine_tags(names, &spec.name, spec.role), &zones)
}

/// A machine's network interface.
pub(crate) fn nic(config: &AzureConfig, names: &Names, spec: &MachineSpec) -> Value {
    let mut address = network::NetworkInterfaceIpConfigurationPropertiesFormat {
        primary: Some(true),
        private_ip_allocation_method: Some(network::IpAllocationMethod::Dynamic),
        subnet: Some(subnet_reference(names)),
        ..network::NetworkInterfaceIpConfigurationPropertiesFormat::default()
    };
    if spec.role == Role::ControlPlane {
        address.load_balancer_backend_address_pools = vec![network::BackendAddressPool {
            sub_resource: reference(names.pool_id()),
            ..network::BackendAddressPool::default()
        }];
    }
    if has_public_ip(config, spec.role) {
        let id = names.id(Kind::PublicIp, spec.name.as_str());
        address.public_ip_address = Some(public_ip_reference(id));
    }
    body(&network::NetworkInterface {
        resource: network_resource(config, machine_tags(names, &spec.name, spec.role)),
        properties: Some(network::NetworkInterfacePropertiesFormat {
            ip_configurations: vec![network::NetworkInterfaceIpConfiguration {
                name: Some("primary".into()),
                properties: Some(address),
                ..network::NetworkInterfaceIpConfiguration::default()
            }],
            ..network::NetworkInterfacePropertiesFormat::default()
        }),
        ..network::NetworkInterface::default()
    })
}

/// A data disk. Solid state with a promise of its own: etcd waits for every write.
pub(crate) fn disk(
    config: &AzureConfig,
    names: &Names,
    machine: &MachineName,
    size_gib: u32,
    zone: Option<&str>,
) -> Value {
    let mut resource = compute::Resource::new(config.location.clone());
    resource.tags = Some(machine_tags(names, machine, Role::ControlPlane));
    let empty = compute::CreationData::new(compute::creation_data::CreateOption::Empty);
    let mut properties = compute::DiskProperties::new(empty);
    properties.disk_size_gb = Some(i32::try_from(size_gib).unwrap_or(i32::MAX));
    let mut disk = compute::Disk::new(resource);
    disk.sku = Some(compute::DiskSku {
        name: Some(compute::disk_sku::Name::PremiumLrs),
        tier: None,
    });
    disk.zones = zone.map(ToOwned::to_owned).into_iter().collect();
    disk.properties = Some(properties);
    body(&disk)
}

/// A machine.
pub(crate) fn machine(
    config: &AzureConfig,
    names: &Names,
    spec: &MachineSpec,
    size: &Size,
    zone: Option<&str>,
) -> Result<Value, ProviderError> {
    let image = Image::parse(spec.image.as_deref())?;
    let mut resource = compute::Resource::new(config.location.clone());
    resource.tags = Some(machine_tags(names, &spec.name, spec.role));
    let mut vm = compute::VirtualMachine::new(resource);
    vm.zones = zone.map(ToOwned::to_owned).into_iter().collect();
    vm.plan = plan(&image);
    let nic = compute::NetworkInterfaceReference {
        sub_resource: compute::SubResource {
            id: Some(names.id(Kind::Nic, spec.name.as_str())),
        },
        properties: Some(compute::NetworkInterfaceReferenceProperties {
            primary: Some(true),
            delete_option: Some(compute::network_interface_reference_properties::DeleteOption::Delete),
        }),
    };
    vm.properties = Some(compute::VirtualMachineProperties {
        hardware_profile: Some(compute::HardwareProfile {
            vm_size: Some(compute::hardware_profile::VmSize::UnknownValue(size.name.clone())),
            vm_size_properties: None,
        }),
        storage_profile: Some(compute::StorageProfile {
            image_reference: Some(image_reference(&image)),
            os_disk: Some(os_disk(config, spec)),
            data_disks: if spec.data_disk {
                vec![attached(names, &spec.name)]
            } else {
                Vec::new()
            },
            disk_controller_type: None,
        }),
        os_profile: Some(os_profile(config, spec, &image)?),
        network_profile: Some(compute::NetworkProfile {
            network_interfaces: vec![nic],
            ..compute::NetworkProfile::default()
        }),
        security_profile: (image.has_trusted_launch() && size.trusted_launch).then(trusted_launch),
        diagnostics_profile: Some(compute::DiagnosticsProfile {
            boot_diagnostics: Some(compute::BootDiagnostics {
                enabled: Some(true),
                storage_uri: None,
            }),
        }),
        ..compute::VirtualMachineProperties::default()
    });
    let mut body = body(&vm);
    if let Some(identity) = &config.identity {
        // The SDK's model of identities has no room for which they are.
        body["identity"] = json!({"type": "UserAssigned", "userAssignedIdentities": {identity: {}}});
    }
    Ok(body)
}

fn plan(image: &Image) -> Option<compute::Plan> {
    let Image::Marketplace {
        publisher, offer, sku, ..
    } = image
    else {
        return None;
    };
    // Offers of a third party carry their terms as a plan; Debian's has none.
    image.is_flatcar().then(|| compute::Plan {
        name: Some(sku.clone()),
        publisher: Some(publisher.clone()),
        product: Some(offer.clone()),
        promotion_code: None,
    })
}

fn image_reference(image: &Image) -> compute::ImageReference {
    match image {
        Image::Marketplace {
            publisher,
            offer,
            sku,
            version,
        } => compute::ImageReference {
            publisher: Some(publisher.clone()),
            offer: Some(offer.clone()),
            sku: Some(sku.clone()),
            version: Some(version.clone()),
            ..compute::ImageReference::default()
        },
        Image::Id(id) => compute::ImageReference {
            sub_resource: compute::SubResource { id: Some(id.clone()) },
            ..compute::ImageReference::default()
        },
    }
}

fn os_disk(config: &AzureConfig, spec: &MachineSpec) -> compute::OsDisk {
    let mut disk = compute::OsDisk::new(compute::CreateOption::FromImage);
    disk.name = Some(system_disk(&spec.name));
    disk.caching = Some(compute::Caching::ReadWrite);
    disk.disk_size_gb = Some(i32::try_from(config.root_disk_gib).unwrap_or(i32::MAX));
    disk.managed_disk = Some(compute::ManagedDiskParameters {
        storage_account_type: Some(compute::StorageAccountType::StandardSsdLrs),
        ..compute::ManagedDiskParameters::default()
    });
    disk.delete_option = Some(compute::DeleteOption::Delete);
    disk
}

/// The machine's data disk, which outlives it.
fn attached(names: &Names, machine: &MachineName) -> compute::DataDisk {
    let mut disk = compute::DataDisk::new(0, compute::CreateOption::Attach);
    disk.caching = Some(compute::Caching::None);
    disk.managed_disk = Some(compute::ManagedDiskParameters {
        sub_resource: compute::SubResource {
            id: Some(names.id(Kind::Disk, &data_disk(machine))),
        },
        ..compute::ManagedDiskParameters::default()
    });
    disk.delete_option = Some(compute::DeleteOption::Detach);
    disk
}

fn os_profile(config: &AzureConfig, spec: &MachineSpec, image: &Image) -> Result<compute::OsProfile, ProviderError> {
    let key = config
        .ssh_public_key
        .as_deref()
        .map_or_else(|| nobodys_key(&spec.name), ToOwned::to_owned);
    Ok(compute::OsProfile {
        computer_name: Some(spec.name.to_string()),
        admin_username: Some(USER.into()),
        custom_data: Some(custom_data(&spec.first_boot, &spec.name, image)?),
        linux_configuration: Some(compute::LinuxConfiguration {
            disable_password_authentication: Some(true),
            ssh: Some(compute::SshConfiguration {
                public_keys: vec![compute::SshPublicKey {
                    path: Some(format!("/home/{USER}/.ssh/authorized_keys")),
                    key_data: Some(key),
                }],
            }),
            ..compute::LinuxConfiguration::default()
        }),
        ..compute::OsProfile::default()
    })
}

fn trusted_launch() -> compute::SecurityProfile {
    compute::SecurityProfile {
        security_type: Some(compute::security_profile::SecurityType::TrustedLaunch),
        uefi_settings: Some(compute::UefiSettings {
            secure_boot_enabled: Some(true),
            v_tpm_enabled: Some(true),
        }),
        ..compute::SecurityProfile::default()
    }
}

fn custom_data(data: &FirstBoot, machine: &MachineName, image: &Image) -> Result<String, ProviderError> {
    let data = if image.is_flatcar() {
        first_boot::ignition(&data.0)
    } else {
        data.0.clone()
    };
    if data.len() > CUSTOM_DATA_LIMIT {
        return Err(ProviderError::never(format!(
            "the first-boot data of `{machine}` has {} bytes; Azure takes {CUSTOM_DATA_LIMIT}",
            data.len()
        )));
    }
    Ok(STANDARD.encode(data))
}

/// A public SSH key that nobody has the private half of: a point of the curve that a hash happened to hit. The same for each
/// machine whenever it's asked for, as Azure refuses a repeated PUT with another one.
fn nobodys_key(machine: &MachineName) -> String {
    let point = (0_u32..).find_map(|n| {
        let hash: [u8; 32] = Sha256::digest(format!("kprov: nobody's key {n} for {machine}")).into();
        VerifyingKey::from_bytes(&hash).ok()
    });
    // About every second hash is a point.
    let point = point.map_or([0; 32], |p| p.to_bytes());
    let kind = b"ssh-ed25519";
    let mut blob = Vec::new();
    for part in [kind.as_slice(), point.as_slice()] {
        // RFC 4251: a string is its length in four bytes, and itself.
        blob.extend(u32::try_from(part.len()).unwrap_or(0).to_be_bytes());
        blob.extend(part);
    }
    format!("ssh-ed25519 {} kprov", STANDARD.encode(blob))
}

/// An existing machine to be put again, with its data disk attached: what Azure says to do when provisioning failed. What a
/// machine was first booted with isn't shown, and stays.
pub(crate) fn again(vm: &Seen, names: &Names, spec: &MachineSpec) -> Value {
    let mut again = vm.raw.clone();
    if let Some(top) = again.as_object_mut() {
        for read_only in ["id", "name", "type", "etag", "resources"] {
            top.remove(read_only);
        }
    }
    if let Some(properties) = again.get_mut("properties").and_then(Value::as_object_mut) {
        for read_only in ["provisioningState", "vmId", "timeCreated", "instanceView"] {
            properties.remove(read_only);
        }
    }
    if spec.data_disk
        && vm.attached_disk().is_none()
        && let Some(storage) = again.pointer_mut("/properties/storageProfile")
    {
        storage["dataDisks"] = json!([body(&attached(names, &spec.name))]);
    }
    again
}

#[cfg(test)]
mod tests;
