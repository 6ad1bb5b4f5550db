//! What a machine room sees.

use std::net::Ipv4Addr;

use super::*;
use crate::azure::{Event, Power};

async fn next(events: &mut tokio::sync::broadcast::Receiver<Event>) -> Event {
    tokio::time::timeout(Duration::from_secs(5), events.recv())
        .await
        .expect("an event in time")
        .unwrap()
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "one life of a room")]
async fn a_room_sees_machines_balancers_and_what_changes() {
    let client = Client::new(Options {
        public_addresses: vec![Ipv4Addr::new(198, 51, 100, 7)],
        public_is_private: true,
        ..Options::default()
    })
    .await;
    client
        .call(
            Method::PUT,
            "resourceGroups/g",
            GROUPS,
            Some(json!({"location": "westeurope"})),
        )
        .await;
    let mut events = client.arm.events();
    client.network().await;
    client.made(&public("api"), NETWORK, public_address()).await;
    client.made(&public("m"), NETWORK, public_address()).await;
    let part = |part: &str| json!({"id": client.id(&format!("Microsoft.Network/loadBalancers/b/{part}"))});
    client
        .made(&balancer("b"), NETWORK, json!({
            "location": "westeurope", "sku": {"name": "Standard"},
            "properties": {
                "frontendIPConfigurations": [
                    {"name": "f", "properties": {"publicIPAddress": {"id": client.id("Microsoft.Network/publicIPAddresses/api")}}},
                ],
                "backendAddressPools": [{"name": "pool"}],
                "probes": [{"name": "up", "properties": {"protocol": "Tcp", "port": 6443}}],
                "loadBalancingRules": [{"name": "api", "properties": {
                    "frontendIPConfiguration": part("frontendIPConfigurations/f"), "backendAddressPool": part("backendAddressPools/pool"),
                    "probe": part("probes/up"), "protocol": "Tcp", "frontendPort": 443, "backendPort": 6443,
                }}],
            },
        }))
        .await;
    let mut body = client.interface_body();
    let properties = &mut body["properties"]["ipConfigurations"][0]["properties"];
    properties["publicIPAddress"] = json!({"id": client.id("Microsoft.Network/publicIPAddresses/m")});
    properties["loadBalancerBackendAddressPools"] = json!([part("backendAddressPools/pool")]);
    client.made(&interface("m"), NETWORK, body).await;
    client.made(&disk("d"), DISKS, disk_body("1")).await;
    let mut body = client.machine_body("m");
    body["properties"]["diagnosticsProfile"] = json!({"bootDiagnostics": {"enabled": true}});
    body["properties"]["storageProfile"]["dataDisks"] =
        json!([{"lun": 0, "createOption": "Attach", "managedDisk": {"id": client.id("Microsoft.Compute/disks/d")}}]);
    client.made(&machine("m"), COMPUTE, body.clone()).await;

    let Event::Created(made) = next(&mut events).await else {
        panic!("created first")
    };
    assert_eq!(made.private_address, Some(Ipv4Addr::new(10, 0, 0, 4)));
    assert_eq!(made.public_address, made.private_address);
    assert_eq!(made.custom_data.as_deref(), Some(b"#!/bin/sh\n".as_slice()));
    assert_eq!(
        (
            made.data_disks[0].lun,
            made.data_disks[0].name.as_str(),
            made.data_disks[0].size_gib
        ),
        (0, "d", 8)
    );
    assert!(client.arm.disks().contains(&made.data_disks[0].unique_id));
    assert_eq!(
        (made.zone.as_deref(), made.power, made.subnet.as_deref()),
        (Some("1"), Some(Power::Running), Some("10.0.0.0/24"))
    );
    let read = client.got(&public("m"), NETWORK).await;
    assert_eq!(read["properties"]["ipAddress"], "10.0.0.4");

    let rule = client.arm.load_balancers()[0].rules[0].clone();
    assert_eq!(
        (rule.address, rule.public, rule.port, rule.backend_port),
        (Some(Ipv4Addr::new(198, 51, 100, 7)), true, 443, 6443)
    );
    assert_eq!(rule.backends[0].address, Ipv4Addr::new(10, 0, 0, 4));
    assert_eq!(rule.backends[0].machine.as_deref(), Some(made.id.as_str()));
    assert_eq!(rule.probe.unwrap().port, 6443);
    client.arm.give_address("api", Ipv4Addr::new(172, 30, 0, 2));
    assert_eq!(
        client.arm.load_balancers()[0].rules[0].address,
        Some(Ipv4Addr::new(172, 30, 0, 2))
    );

    assert!(client.arm.set_console("m", "kernel: hello"));
    let answer = client
        .call(
            Method::POST,
            &format!("{}/retrieveBootDiagnosticsData", machine("m")),
            COMPUTE,
            None,
        )
        .await;
    let log = client
        .http
        .get(answer.body["serialConsoleLogBlobUri"].as_str().unwrap())
        .send()
        .await
        .unwrap();
    assert_eq!(log.text().await.unwrap(), "kernel: hello");

    assert!(client.arm.set_power("m", Power::Stopped));
    assert!(matches!(
        next(&mut events).await,
        Event::Power {
            power: Power::Stopped,
            ..
        }
    ));
    assert!(client.arm.delete_by_hand("m"));
    assert!(matches!(next(&mut events).await, Event::Deleted { name, .. } if name == "m"));
    assert!(matches!(next(&mut events).await, Event::DiskDeleted { name, .. } if name == "m-os"));
    assert_eq!(client.call(Method::GET, &machine("m"), COMPUTE, None).await.status, 404);

    client.made(&machine("m"), COMPUTE, body).await;
    assert_ne!(client.arm.virtual_machines()[0].vm_id, made.vm_id);
}

#[tokio::test]
async fn bodies_are_kept_as_they_came() {
    let client = Client::with_group().await;
    client.network().await;
    let bodies = client.arm.bodies();
    assert_eq!(bodies[1].call, "PUT virtualNetworks");
    assert_eq!(bodies[1].api_version.as_deref(), Some(NETWORK));
    assert_eq!(bodies[1].body, virtual_network());
}
