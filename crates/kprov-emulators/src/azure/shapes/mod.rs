//! The fields of every resource type, as the REST API of the api-versions in [`super::kind`] describes them; what is left out
//! there is something that this server doesn't do.

use super::strict::{Field, Shape, optional, read_only, required};

use Shape::{Any, Flag, List, Number, Object, OneOf, Reference, Strings, Text};

const PORT: Shape = Number(0, 65_534);
const ADDRESS_VERSION: Shape = OneOf(&["IPv4", "IPv6"]);
const ALLOCATION: Shape = OneOf(&["Static", "Dynamic"]);
const ZONES: Shape = List(&Text);

macro_rules! resource {
    ($name:literal, $properties:expr, [$($field:expr),* $(,)?]) => {
        Object(
            "ResourceDefinition",
            &[
                read_only("id"),
                read_only("name"),
                read_only("type"),
                read_only("etag"),
                required("location", Text),
                optional("tags", Strings),
                required("properties", Object($name, $properties)),
                $($field),*
            ],
        )
    };
}

mod compute;

pub(super) use compute::{DISK, DISK_UPDATE, VIRTUAL_MACHINE};

/// `PUT resourceGroups`.
pub(super) static GROUP: Shape = Object(
    "ResourceGroup",
    &[
        read_only("id"),
        read_only("name"),
        read_only("type"),
        read_only("properties"),
        required("location", Text),
        optional("managedBy", Text),
        optional("tags", Strings),
    ],
);

/// `PATCH` of anything whose tags alone can be changed.
pub(super) static TAGS: Shape = Object("TagsObject", &[optional("tags", Strings)]);

macro_rules! child {
    ($name:literal, [$($field:expr),* $(,)?]) => {
        Object(
            $name,
            &[
                required("name", Text),
                read_only("id"),
                read_only("etag"),
                read_only("type"),
                optional("zones", ZONES),
                required("properties", Object(concat!($name, "Properties"), &[read_only("provisioningState"), $($field),*])),
            ],
        )
    };
}

const SUBNET: &[Field] = &[
    read_only("provisioningState"),
    read_only("ipConfigurations"),
    read_only("purpose"),
    optional("addressPrefix", Text),
    optional("addressPrefixes", List(&Text)),
    optional("networkSecurityGroup", Reference("networkSecurityGroups")),
    optional("natGateway", Reference("natGateways")),
    optional("privateEndpointNetworkPolicies", OneOf(&["Enabled", "Disabled"])),
    optional("privateLinkServiceNetworkPolicies", OneOf(&["Enabled", "Disabled"])),
    optional("defaultOutboundAccess", Flag),
    optional("delegations", List(&Any)),
    optional("serviceEndpoints", List(&Any)),
];

/// `PUT virtualNetworks/subnets`.
pub(super) static SUBNET_ALONE: Shape = Object(
    "Subnet",
    &[
        read_only("name"),
        read_only("id"),
        read_only("etag"),
        read_only("type"),
        required("properties", Object("SubnetProperties", SUBNET)),
    ],
);

/// `PUT virtualNetworks`.
pub(super) static VIRTUAL_NETWORK: Shape = resource!(
    "VirtualNetworkProperties",
    &[
        read_only("provisioningState"),
        read_only("resourceGuid"),
        read_only("virtualNetworkPeerings"),
        required(
            "addressSpace",
            Object("AddressSpace", &[required("addressPrefixes", List(&Text))])
        ),
        optional(
            "dhcpOptions",
            Object("DhcpOptions", &[optional("dnsServers", List(&Text))])
        ),
        optional("enableDdosProtection", Flag),
        optional(
            "subnets",
            List(&Object(
                "Subnet",
                &[
                    required("name", Text),
                    read_only("id"),
                    read_only("etag"),
                    read_only("type"),
                    required("properties", Object("SubnetProperties", SUBNET)),
                ]
            ))
        ),
    ],
    []
);

/// `PUT networkSecurityGroups`.
pub(super) static SECURITY_GROUP: Shape = resource!(
    "NetworkSecurityGroupProperties",
    &[
        read_only("provisioningState"),
        read_only("resourceGuid"),
        read_only("defaultSecurityRules"),
        read_only("networkInterfaces"),
        read_only("subnets"),
        optional("flushConnection", Flag),
        optional(
            "securityRules",
            List(&child!(
                "SecurityRule",
                [
                    optional("description", Text),
                    required("protocol", OneOf(&["Tcp", "Udp", "Icmp", "Esp", "Ah", "*"])),
                    optional("sourcePortRange", Text),
                    optional("sourcePortRanges", List(&Text)),
                    optional("destinationPortRange", Text),
                    optional("destinationPortRanges", List(&Text)),
                    optional("sourceAddressPrefix", Text),
                    optional("sourceAddressPrefixes", List(&Text)),
                    optional("destinationAddressPrefix", Text),
                    optional("destinationAddressPrefixes", List(&Text)),
                    required("access", OneOf(&["Allow", "Deny"])),
                    required("priority", Number(0, 65_535)),
                    required("direction", OneOf(&["Inbound", "Outbound"])),
                ]
            ))
        ),
    ],
    []
);

const NETWORK_SKU: Field = optional(
    "sku",
    Object(
        "Sku",
        &[
            optional("name", OneOf(&["Basic", "Standard"])),
            optional("tier", OneOf(&["Regional", "Global"])),
        ],
    ),
);

/// `PUT publicIPAddresses`.
pub(super) static PUBLIC_ADDRESS: Shape = resource!(
    "PublicIpAddressProperties",
    &[
        read_only("provisioningState"),
        read_only("resourceGuid"),
        read_only("ipConfiguration"),
        read_only("ipAddress"),
        optional("publicIPAllocationMethod", ALLOCATION),
        optional("publicIPAddressVersion", ADDRESS_VERSION),
        optional("idleTimeoutInMinutes", Number(4, 30)),
        optional(
            "dnsSettings",
            Object(
                "PublicIpAddressDnsSettings",
                &[
                    optional("domainNameLabel", Text),
                    read_only("fqdn"),
                    optional("reverseFqdn", Text)
                ]
            )
        ),
        optional("ipTags", List(&Any)),
        optional("deleteOption", OneOf(&["Delete", "Detach"])),
    ],
    [NETWORK_SKU, optional("zones", ZONES)]
);

/// `PUT natGateways`.
pub(super) static NAT_GATEWAY: Shape = resource!(
    "NatGatewayProperties",
    &[
        read_only("provisioningState"),
        read_only("resourceGuid"),
        read_only("subnets"),
        optional("idleTimeoutInMinutes", Number(4, 120)),
        optional("publicIpAddresses", List(&Reference("publicIPAddresses"))),
    ],
    [
        required(
            "sku",
            Object("NatGatewaySku", &[required("name", OneOf(&["Standard"]))])
        ),
        optional("zones", ZONES)
    ]
);

/// `PUT loadBalancers`.
pub(super) static LOAD_BALANCER: Shape = resource!(
    "LoadBalancerProperties",
    &[
        read_only("provisioningState"),
        read_only("resourceGuid"),
        read_only("inboundNatPools"),
        optional(
            "frontendIPConfigurations",
            List(&child!(
                "FrontendIpConfiguration",
                [
                    read_only("loadBalancingRules"),
                    read_only("outboundRules"),
                    read_only("inboundNatRules"),
                    optional("privateIPAddress", Text),
                    optional("privateIPAllocationMethod", ALLOCATION),
                    optional("privateIPAddressVersion", ADDRESS_VERSION),
                    optional("subnet", Reference("virtualNetworks/subnets")),
                    optional("publicIPAddress", Reference("publicIPAddresses")),
                ]
            ))
        ),
        optional(
            "backendAddressPools",
            List(&Object(
                "BackendAddressPool",
                &[
                    required("name", Text),
                    read_only("id"),
                    read_only("etag"),
                    read_only("type"),
                    optional(
                        "properties",
                        Object(
                            "BackendAddressPoolProperties",
                            &[
                                read_only("provisioningState"),
                                read_only("backendIPConfigurations"),
                                read_only("loadBalancingRules"),
                                read_only("outboundRules"),
                                read_only("loadBalancerBackendAddresses"),
                            ]
                        )
                    ),
                ]
            ))
        ),
        optional(
            "probes",
            List(&child!(
                "Probe",
                [
                    read_only("loadBalancingRules"),
                    required("protocol", OneOf(&["Tcp", "Http", "Https"])),
                    required("port", Number(1, 65_535)),
                    optional("intervalInSeconds", Number(5, 2_147_483_646)),
                    optional("numberOfProbes", Number(1, 100)),
                    optional("probeThreshold", Number(1, 100)),
                    optional("requestPath", Text),
                ]
            ))
        ),
        optional(
            "loadBalancingRules",
            List(&child!(
                "LoadBalancingRule",
                [
                    required(
                        "frontendIPConfiguration",
                        Reference("loadBalancers/frontendIPConfigurations")
                    ),
                    optional("backendAddressPool", Reference("loadBalancers/backendAddressPools")),
                    optional(
                        "backendAddressPools",
                        List(&Reference("loadBalancers/backendAddressPools"))
                    ),
                    optional("probe", Reference("loadBalancers/probes")),
                    required("protocol", OneOf(&["Tcp", "Udp", "All"])),
                    optional("loadDistribution", OneOf(&["Default", "SourceIP", "SourceIPProtocol"])),
                    required("frontendPort", PORT),
                    optional("backendPort", PORT),
                    optional("idleTimeoutInMinutes", Number(4, 100)),
                    optional("enableFloatingIP", Flag),
                    optional("enableTcpReset", Flag),
                    optional("disableOutboundSnat", Flag),
                ]
            ))
        ),
        optional(
            "outboundRules",
            List(&child!(
                "OutboundRule",
                [
                    required(
                        "frontendIPConfigurations",
                        List(&Reference("loadBalancers/frontendIPConfigurations"))
                    ),
                    required("backendAddressPool", Reference("loadBalancers/backendAddressPools")),
                    required("protocol", OneOf(&["Tcp", "Udp", "All"])),
                    optional("allocatedOutboundPorts", Number(0, 64_000)),
                    optional("idleTimeoutInMinutes", Number(4, 100)),
                    optional("enableTcpReset", Flag),
                ]
            ))
        ),
        optional(
            "inboundNatRules",
            List(&child!(
                "InboundNatRule",
                [
                    read_only("backendIPConfiguration"),
                    required(
                        "frontendIPConfiguration",
                        Reference("loadBalancers/frontendIPConfigurations")
                    ),
                    required("protocol", OneOf(&["Tcp", "Udp", "All"])),
                    required("frontendPort", PORT),
                    required("backendPort", PORT),
                    optional("idleTimeoutInMinutes", Number(4, 30)),
                    optional("enableFloatingIP", Flag),
                    optional("enableTcpReset", Flag),
                ]
            ))
        ),
    ],
    [NETWORK_SKU]
);

/// `PUT networkInterfaces`.
pub(super) static NETWORK_INTERFACE: Shape = resource!(
    "NetworkInterfaceProperties",
    &[
        read_only("provisioningState"),
        read_only("resourceGuid"),
        read_only("virtualMachine"),
        read_only("macAddress"),
        read_only("primary"),
        read_only("hostedWorkloads"),
        read_only("tapConfigurations"),
        read_only("vnetEncryptionSupported"),
        optional("enableAcceleratedNetworking", Flag),
        optional("enableIPForwarding", Flag),
        optional("disableTcpStateTracking", Flag),
        optional("nicType", OneOf(&["Standard", "Elastic"])),
        optional("auxiliaryMode", OneOf(&["None"])),
        optional("auxiliarySku", OneOf(&["None"])),
        optional(
            "dnsSettings",
            Object(
                "NetworkInterfaceDnsSettings",
                &[
                    optional("dnsServers", List(&Text)),
                    optional("internalDnsNameLabel", Text),
                    read_only("appliedDnsServers"),
                    read_only("internalFqdn"),
                    read_only("internalDomainNameSuffix"),
                ]
            )
        ),
        optional("networkSecurityGroup", Reference("networkSecurityGroups")),
        required(
            "ipConfigurations",
            List(&child!(
                "NetworkInterfaceIpConfiguration",
                [
                    optional("privateIPAddress", Text),
                    optional("privateIPAllocationMethod", ALLOCATION),
                    optional("privateIPAddressVersion", ADDRESS_VERSION),
                    optional("primary", Flag),
                    required("subnet", Reference("virtualNetworks/subnets")),
                    optional("publicIPAddress", Reference("publicIPAddresses")),
                    optional(
                        "loadBalancerBackendAddressPools",
                        List(&Reference("loadBalancers/backendAddressPools"))
                    ),
                    optional(
                        "loadBalancerInboundNatRules",
                        List(&Reference("loadBalancers/inboundNatRules"))
                    ),
                ]
            ))
        ),
    ],
    []
);
