//! Networks, interfaces, public addresses, load balancers, NAT gateways.

use super::*;

fn gateway(client: &Client, address: &str) -> Value {
    json!({
        "location": "westeurope", "sku": {"name": "Standard"},
        "properties": {"publicIpAddresses": [{"id": client.id(&format!("Microsoft.Network/publicIPAddresses/{address}"))}]},
    })
}

/// A load balancer `b` with the public address `p`.
fn balancer_body(client: &Client) -> Value {
    let own = |part: &str| json!({"id": client.id(&format!("Microsoft.Network/loadBalancers/b/{part}"))});
    json!({
        "location": "westeurope",
        "sku": {"name": "Standard"},
        "properties": {
            "frontendIPConfigurations": [
                {"name": "f", "properties": {"publicIPAddress": {"id": client.id("Microsoft.Network/publicIPAddresses/p")}}},
            ],
            "backendAddressPools": [{"name": "pool"}],
            "probes": [{"name": "ready", "properties": {"protocol": "Https", "port": 6443, "requestPath": "/readyz", "intervalInSeconds": 5, "probeThreshold": 2}}],
            "loadBalancingRules": [{"name": "api", "properties": {
                "frontendIPConfiguration": own("frontendIPConfigurations/f"),
                "backendAddressPool": own("backendAddressPools/pool"),
                "probe": own("probes/ready"),
                "protocol": "Tcp", "frontendPort": 6443, "backendPort": 6443,
            }}],
        },
    })
}

#[tokio::test]
async fn unknown_and_missing_fields_are_refused_and_read_only_ones_come_back() {
    let client = Client::with_group().await;
    let mut body = virtual_network();
    body["properties"]["addressSpace"]["prefix"] = json!("x");
    let answer = client
        .refused(&network("v"), NETWORK, body, 400, "InvalidRequestFormat")
        .await;
    assert_eq!(answer.inner(), "InvalidJson");
    assert!(
        answer
            .body
            .to_string()
            .contains("Could not find member 'prefix' on object of type 'AddressSpace'"),
        "{answer:?}"
    );
    let mut body = virtual_network();
    body["subnets"] = json!([]);
    client
        .refused(&network("v"), NETWORK, body, 400, "InvalidRequestContent")
        .await;
    let mut body = virtual_network();
    body["properties"].as_object_mut().unwrap().remove("addressSpace");
    client
        .refused(&network("v"), NETWORK, body, 400, "InvalidRequestFormat")
        .await;
    let mut body = virtual_network();
    body["properties"]["subnets"][0]["properties"]["addressPrefix"] = json!(24);
    client
        .refused(&network("v"), NETWORK, body, 400, "InvalidRequestFormat")
        .await;
    // What was read can be written back.
    let read = client.network().await;
    assert!(read["properties"]["resourceGuid"].is_string());
    let written = client.made(&network("v"), NETWORK, read.clone()).await;
    assert_eq!(
        written["properties"],
        read["properties"]
            .clone()
            .tap(|p| p["subnets"][0]["etag"] = written["etag"].clone())
    );
}

trait Tap: Sized {
    fn tap(self, change: impl FnOnce(&mut Self)) -> Self;
}

impl Tap for Value {
    fn tap(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}

#[tokio::test]
async fn address_ranges_are_checked() {
    let client = Client::with_group().await;
    let with = |subnets: Value| virtual_network().tap(|v| v["properties"]["subnets"] = subnets);
    let subnet = |name: &str, range: &str| json!({"name": name, "properties": {"addressPrefix": range}});
    for (subnets, code) in [
        (
            json!([subnet("a", "10.0.0.0/24"), subnet("b", "10.0.0.128/25")]),
            "NetcfgSubnetRangesOverlap",
        ),
        (json!([subnet("a", "10.1.0.0/24")]), "NetcfgSubnetRangeOutsideVnet"),
        (json!([subnet("a", "10.0.0.1/24")]), "InvalidCIDRNotation"),
        (json!([subnet("a", "10.0.0.0/30")]), "NetcfgInvalidSubnet"),
        (
            json!([subnet("a", "10.0.0.0/24"), subnet("A", "10.0.1.0/24")]),
            "InvalidRequestFormat",
        ),
    ] {
        client.refused(&network("v"), NETWORK, with(subnets), 400, code).await;
    }
    client.network().await;
    // A subnet on its own joins the others, and is checked against them.
    let path = format!("{}/subnets/t", network("v"));
    let alone = |range: &str| json!({"properties": {"addressPrefix": range}});
    client
        .refused(&path, NETWORK, alone("10.0.0.0/25"), 400, "NetcfgSubnetRangesOverlap")
        .await;
    let put = client
        .call(Method::PUT, &path, NETWORK, Some(alone("10.0.1.0/24")))
        .await;
    assert_eq!(put.status, 201);
    client.followed(&put).await;
    assert_eq!(
        client.got(&format!("{}/subnets", network("v")), NETWORK).await["value"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    client.deleted(&path, NETWORK).await;
}

#[tokio::test]
async fn interfaces_get_the_lowest_free_address_and_keep_it() {
    let client = Client::with_group().await;
    let small =
        virtual_network().tap(|v| v["properties"]["subnets"][0]["properties"]["addressPrefix"] = json!("10.0.0.0/29"));
    client.made(&network("v"), NETWORK, small).await;
    let address = |n: &Value| {
        n["properties"]["ipConfigurations"][0]["properties"]["privateIPAddress"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let mut all = Vec::new();
    for name in ["a", "b", "c"] {
        all.push(address(&client.interface(name).await));
    }
    assert_eq!(all, ["10.0.0.4", "10.0.0.5", "10.0.0.6"]);
    client
        .refused(&interface("d"), NETWORK, client.interface_body(), 400, "SubnetIsFull")
        .await;
    client.deleted(&interface("b"), NETWORK).await;
    let fixed = |address: &str| {
        client.interface_body().tap(|n| {
            let properties = &mut n["properties"]["ipConfigurations"][0]["properties"];
            properties["privateIPAllocationMethod"] = json!("Static");
            properties["privateIPAddress"] = json!(address);
        })
    };
    for (address, code) in [
        ("10.0.0.4", "PrivateIPAddressInUse"),
        ("10.0.0.3", "PrivateIPAddressInReservedRange"),
        ("10.0.0.7", "PrivateIPAddressInReservedRange"),
        ("10.0.1.9", "PrivateIPAddressNotInSubnet"),
    ] {
        client
            .refused(&interface("d"), NETWORK, fixed(address), 400, code)
            .await;
    }
    assert_eq!(
        address(&client.made(&interface("d"), NETWORK, fixed("10.0.0.5")).await),
        "10.0.0.5"
    );
    assert_eq!(
        address(&client.made(&interface("c"), NETWORK, client.interface_body()).await),
        "10.0.0.6"
    );
}

#[tokio::test]
async fn what_is_referred_to_has_to_be_there() {
    let client = Client::with_group().await;
    let answer = client
        .refused(
            &interface("n"),
            NETWORK,
            client.interface_body(),
            400,
            "InvalidResourceReference",
        )
        .await;
    assert!(
        answer
            .message()
            .contains("/virtualNetworks/v/subnets/s referenced by resource"),
        "{answer:?}"
    );
    client.network().await;
    let elsewhere = client.interface_body().tap(|n| n["location"] = json!("northeurope"));
    client
        .refused(&interface("n"), NETWORK, elsewhere, 400, "InvalidResourceReference")
        .await;
    let wrong = client.interface_body().tap(|n| {
        n["properties"]["ipConfigurations"][0]["properties"]["subnet"]["id"] = json!("s");
    });
    client
        .refused(&interface("n"), NETWORK, wrong, 400, "LinkedInvalidPropertyId")
        .await;
}

#[tokio::test]
async fn public_addresses_are_standard_static_and_used_once() {
    let client = Client::with_group().await;
    client.network().await;
    let dynamic = public_address().tap(|p| p["properties"]["publicIPAllocationMethod"] = json!("Dynamic"));
    client
        .refused(
            &public("p"),
            NETWORK,
            dynamic,
            400,
            "StandardSkuPublicIPAddressesMustBeStatic",
        )
        .await;
    let made = client.made(&public("p"), NETWORK, public_address()).await;
    assert_eq!(made["properties"]["ipAddress"], "203.0.113.1");
    client.arm.limit_public_addresses(Some(1));
    client
        .refused(
            &public("q"),
            NETWORK,
            public_address(),
            400,
            "PublicIPCountLimitReached",
        )
        .await;
    let zoned = public_address().tap(|p| p["zones"] = json!(["1", "2", "3"]));
    client
        .refused(
            &public("p"),
            NETWORK,
            zoned,
            400,
            "ResourceAvailabilityZonesCannotBeModified",
        )
        .await;
    client.made(&balancer("b"), NETWORK, balancer_body(&client)).await;
    let mut body = client.interface_body();
    body["properties"]["ipConfigurations"][0]["properties"]["publicIPAddress"] =
        json!({"id": client.id("Microsoft.Network/publicIPAddresses/p")});
    client
        .refused(&interface("n"), NETWORK, body, 400, "PublicIPAddressInUse")
        .await;
    let used = client.got(&public("p"), NETWORK).await;
    assert!(
        used["properties"]["ipConfiguration"]["id"]
            .as_str()
            .unwrap()
            .ends_with("/frontendIPConfigurations/f")
    );
}

#[tokio::test]
async fn nothing_in_use_can_be_deleted() {
    let client = Client::with_group().await;
    let group = "resourceGroups/g/providers/Microsoft.Network/networkSecurityGroups/sg";
    client
        .made(
            group,
            NETWORK,
            json!({"location": "westeurope", "properties": {"securityRules": []}}),
        )
        .await;
    client.made(&public("p"), NETWORK, public_address()).await;
    client.made(&public("out"), NETWORK, public_address()).await;
    let nat = "resourceGroups/g/providers/Microsoft.Network/natGateways/nat";
    client.made(nat, NETWORK, gateway(&client, "out")).await;
    let body = virtual_network().tap(|v| {
        let subnet = &mut v["properties"]["subnets"][0]["properties"];
        subnet["networkSecurityGroup"] = json!({"id": client.id("Microsoft.Network/networkSecurityGroups/sg")});
        subnet["natGateway"] = json!({"id": client.id("Microsoft.Network/natGateways/nat")});
    });
    client.made(&network("v"), NETWORK, body.clone()).await;
    client.made(&balancer("b"), NETWORK, balancer_body(&client)).await;
    client.machine("m").await;
    let subnet = format!("{}/subnets/s", network("v"));
    for (path, code) in [
        (network("v").as_str(), "InUseSubnetCannotBeDeleted"),
        (subnet.as_str(), "InUseSubnetCannotBeDeleted"),
        (group, "InUseNetworkSecurityGroupCannotBeDeleted"),
        (nat, "CannotDeleteNatGatewayAssociatedToSubnet"),
        (public("out").as_str(), "PublicIPAddressCannotBeDeleted"),
        (public("p").as_str(), "PublicIPAddressCannotBeDeleted"),
        (interface("m").as_str(), "NicInUse"),
    ] {
        let answer = client.call(Method::DELETE, path, NETWORK, None).await;
        assert_eq!((answer.status, answer.code()), (400, code), "{path}: {answer:?}");
    }
    let without = body.clone().tap(|v| v["properties"]["subnets"] = json!([]));
    client
        .refused(&network("v"), NETWORK, without, 400, "InUseSubnetCannotBeDeleted")
        .await;
    let moved = body.tap(|v| v["properties"]["subnets"][0]["properties"]["addressPrefix"] = json!("10.0.1.0/24"));
    client
        .refused(&network("v"), NETWORK, moved, 400, "InUsePrefixCannotBeDeleted")
        .await;
    // In the order of dependencies it all goes.
    client.deleted(&machine("m"), COMPUTE).await;
    for path in [
        interface("m"),
        balancer("b"),
        public("p"),
        network("v"),
        nat.to_owned(),
        public("out"),
        group.to_owned(),
    ] {
        client.deleted(&path, NETWORK).await;
    }
    assert_eq!(client.arm.resources().len(), 1);
}

#[tokio::test]
async fn load_balancers_hold_together() {
    type Change = fn(&mut Value);
    let client = Client::with_group().await;
    client.network().await;
    client
        .refused(
            &balancer("b"),
            NETWORK,
            balancer_body(&client),
            400,
            "InvalidResourceReference",
        )
        .await;
    client.made(&public("p"), NETWORK, public_address()).await;
    let cases: [(Change, &str); 6] = [
        (|b| b["properties"]["probes"] = json!([]), "InvalidResourceReference"),
        (|b| b["sku"]["name"] = json!("Basic"), "PublicIPAndLBSkuDoNotMatch"),
        (
            |b| {
                let rules = &mut b["properties"]["loadBalancingRules"];
                let mut second = rules[0].clone();
                second["name"] = json!("again");
                rules.as_array_mut().unwrap().push(second);
            },
            "RulesUseSameFrontendPortProtocolAndIPConfig",
        ),
        (
            |b| b["properties"]["probes"][0]["properties"]["protocol"] = json!("Tcp"),
            "InvalidProbeRequestPath",
        ),
        (
            |b| b["properties"]["probes"][0]["properties"]["intervalInSeconds"] = json!(1),
            "InvalidRequestFormat",
        ),
        (
            |b| b["properties"]["frontendIPConfigurations"][0]["properties"] = json!({}),
            "InvalidRequestFormat",
        ),
    ];
    for (change, code) in cases {
        client
            .refused(&balancer("b"), NETWORK, balancer_body(&client).tap(change), 400, code)
            .await;
    }
    client.made(&balancer("b"), NETWORK, balancer_body(&client)).await;
    let member = client.interface_body().tap(|n| {
        n["properties"]["ipConfigurations"][0]["properties"]["loadBalancerBackendAddressPools"] =
            json!([{"id": client.id("Microsoft.Network/loadBalancers/b/backendAddressPools/pool")}]);
    });
    client.made(&interface("n"), NETWORK, member).await;
    let read = client.got(&balancer("b"), NETWORK).await;
    let members = &read["properties"]["backendAddressPools"][0]["properties"]["backendIPConfigurations"];
    assert!(
        members[0]["id"]
            .as_str()
            .unwrap()
            .ends_with("/networkInterfaces/n/ipConfigurations/c"),
        "{read}"
    );
    // Interfaces leave the pools of a load balancer that goes.
    client.deleted(&balancer("b"), NETWORK).await;
    let left = client.got(&interface("n"), NETWORK).await;
    assert_eq!(
        left["properties"]["ipConfigurations"][0]["properties"]["loadBalancerBackendAddressPools"],
        json!([])
    );
}

#[tokio::test]
async fn security_rules_are_checked() {
    let client = Client::with_group().await;
    let path = "resourceGroups/g/providers/Microsoft.Network/networkSecurityGroups/sg";
    let rule = |name: &str, priority: i64, port: &str, from: &str| {
        json!({"name": name, "properties": {
            "protocol": "Tcp", "access": "Allow", "direction": "Inbound", "priority": priority, "sourcePortRange": "*",
            "destinationPortRange": port, "sourceAddressPrefix": from, "destinationAddressPrefix": "VirtualNetwork",
        }})
    };
    let body = |rules: Value| json!({"location": "westeurope", "properties": {"securityRules": rules}});
    for (rules, code) in [
        (json!([rule("a", 99, "22", "*")]), "SecurityRuleInvalidPriority"),
        (json!([rule("a", 100, "70000", "*")]), "SecurityRuleInvalidPortRange"),
        (
            json!([rule("a", 100, "22", "10.0.0.1/8")]),
            "SecurityRuleInvalidAddressPrefix",
        ),
        (
            json!([rule("a", 100, "22", "*"), rule("b", 100, "23", "*")]),
            "SecurityRuleConflict",
        ),
    ] {
        client.refused(path, NETWORK, body(rules), 400, code).await;
    }
    let made = client
        .made(
            path,
            NETWORK,
            body(json!([
                rule("a", 100, "6443", "Internet"),
                rule("b", 101, "30000-32767", "10.0.0.0/8")
            ])),
        )
        .await;
    assert_eq!(made["properties"]["securityRules"].as_array().unwrap().len(), 2);
}
