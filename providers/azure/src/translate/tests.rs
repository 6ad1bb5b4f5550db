//! What is sent, in whole.

use kprov_types::ClusterName;
use kprov_types::infrastructure::AzureSettings;

use super::*;
use crate::config::Surroundings;

fn config(edit: impl FnOnce(&mut AzureSettings)) -> AzureConfig {
    let mut settings = AzureSettings {
        subscription: Some("0b1f6471-1bf0-4dda-aec3-cb9272f09590".into()),
        location: Some("westeurope".into()),
        ..AzureSettings::default()
    };
    edit(&mut settings);
    AzureConfig::new(&settings, &[], &Surroundings::default()).unwrap()
}

fn names() -> Names {
    Names {
        cluster: ClusterName::new("demo").unwrap(),
        group: "kprov-demo".into(),
        group_id: "/g".into(),
    }
}

fn spec(role: Role) -> MachineSpec {
    MachineSpec {
        name: MachineName::new("demo-cp-0").unwrap(),
        role,
        zone: None,
        size: None,
        image: None,
        first_boot: FirstBoot("#!/bin/sh\n".into()),
        data_disk: role == Role::ControlPlane,
    }
}

fn size() -> Size {
    Size {
        name: "Standard_D2s_v5".into(),
        trusted_launch: true,
        ..Size::default()
    }
}

fn range() -> Ipv4Net {
    "10.3.0.0/16".parse().unwrap()
}

#[test]
fn a_control_plane_machine() {
    let config = config(|s| s.identity = Some("/subscriptions/s/x/userAssignedIdentities/me".into()));
    let seen = machine(&config, &names(), &spec(Role::ControlPlane), &size(), Some("2")).unwrap();
    let key = nobodys_key(&MachineName::new("demo-cp-0").unwrap());
    assert_eq!(
        seen,
        json!({
            "location": "westeurope",
            "tags": {"kprov-cluster": "demo", "kprov-machine": "demo-cp-0", "kprov-role": "control-plane"},
            "zones": ["2"],
            "identity": {"type": "UserAssigned", "userAssignedIdentities": {"/subscriptions/s/x/userAssignedIdentities/me": {}}},
            "properties": {
                "hardwareProfile": {"vmSize": "Standard_D2s_v5"},
                "storageProfile": {
                    "imageReference": {"publisher": "Debian", "offer": "debian-12", "sku": "12-gen2", "version": "latest"},
                    "osDisk": {"name": "demo-cp-0-os", "createOption": "FromImage", "caching": "ReadWrite", "diskSizeGB": 30,
                        "managedDisk": {"storageAccountType": "StandardSSD_LRS"}, "deleteOption": "Delete"},
                    "dataDisks": [{"lun": 0, "createOption": "Attach", "caching": "None", "deleteOption": "Detach",
                        "managedDisk": {"id": "/g/providers/Microsoft.Compute/disks/demo-cp-0-data"}}],
                },
                "osProfile": {"computerName": "demo-cp-0", "adminUsername": "kprov", "customData": "IyEvYmluL3NoCg==",
                    "linuxConfiguration": {"disablePasswordAuthentication": true, "ssh": {"publicKeys": [
                        {"path": "/home/kprov/.ssh/authorized_keys", "keyData": key}]}}},
                "networkProfile": {"networkInterfaces": [{"id": "/g/providers/Microsoft.Network/networkInterfaces/demo-cp-0",
                    "properties": {"primary": true, "deleteOption": "Delete"}}]},
                "securityProfile": {"securityType": "TrustedLaunch", "uefiSettings": {"secureBootEnabled": true, "vTpmEnabled": true}},
                "diagnosticsProfile": {"bootDiagnostics": {"enabled": true}},
            },
        })
    );
    // A repeated PUT has to be the same.
    assert_eq!(
        machine(&config, &names(), &spec(Role::ControlPlane), &size(), Some("2")).unwrap(),
        seen
    );
}

#[test]
fn flatcar_has_a_plan_and_reads_ignition() {
    let flatcar = MachineSpec {
        image: Some("flatcar".into()),
        ..spec(Role::Worker)
    };
    let seen = machine(&config(|_| {}), &names(), &flatcar, &size(), None).unwrap();
    assert_eq!(
        seen["plan"],
        json!({"name": "stable-gen2", "publisher": "kinvolk", "product": "flatcar-container-linux-free"})
    );
    assert_eq!(seen.pointer("/properties/securityProfile"), None);
    assert_eq!(seen.pointer("/properties/storageProfile/dataDisks"), None);
    let data = seen
        .pointer("/properties/osProfile/customData")
        .unwrap()
        .as_str()
        .unwrap();
    assert!(STANDARD.decode(data).unwrap().starts_with(b"{\"ignition\""));
}

#[test]
fn custom_data_has_a_limit() {
    let large = |bytes: usize| MachineSpec {
        first_boot: FirstBoot("x".repeat(bytes)),
        ..spec(Role::Worker)
    };
    assert!(machine(&config(|_| {}), &names(), &large(CUSTOM_DATA_LIMIT), &size(), None).is_ok());
    let error = machine(&config(|_| {}), &names(), &large(CUSTOM_DATA_LIMIT + 1), &size(), None).unwrap_err();
    assert!(error.to_string().contains("65536 bytes"), "{error}");
}

#[test]
fn interfaces_of_both_roles() {
    let public = nic(&config(|_| {}), &names(), &spec(Role::ControlPlane));
    let address = public.pointer("/properties/ipConfigurations/0/properties").unwrap();
    assert_eq!(
        address["publicIPAddress"],
        json!({"id": "/g/providers/Microsoft.Network/publicIPAddresses/demo-cp-0"})
    );
    assert_eq!(
        address["loadBalancerBackendAddressPools"],
        json!([{"id": "/g/providers/Microsoft.Network/loadBalancers/demo-api/backendAddressPools/control-plane"}])
    );
    let worker = nic(&config(|_| {}), &names(), &spec(Role::Worker));
    let address = worker.pointer("/properties/ipConfigurations/0/properties").unwrap();
    assert_eq!(
        *address,
        json!({"primary": true, "privateIPAllocationMethod": "Dynamic",
            "subnet": {"id": "/g/providers/Microsoft.Network/virtualNetworks/demo/subnets/machines"}})
    );
    let private = nic(&config(|s| s.private = true), &names(), &spec(Role::ControlPlane));
    assert_eq!(
        private.pointer("/properties/ipConfigurations/0/properties/publicIPAddress"),
        None
    );
}

#[test]
fn the_firewall_opens_two_ports_and_is_recognized() {
    let open = config(|_| {});
    let at = |api_port| Opening {
        api_port,
        way_out: Some([203, 0, 113, 7].into()),
    };
    let group = security_group(&open, &names(), range(), at(6443));
    let rule = group.pointer("/properties/securityRules/0/properties").unwrap();
    assert_eq!(rule["destinationPortRanges"], json!(["6443", "10201"]));
    assert_eq!(rule["sourceAddressPrefix"], "Internet");
    let seen = Seen::new(Kind::SecurityGroup, group);
    assert!(is_open(&open, &seen, at(6443)));
    assert!(!is_open(&open, &seen, at(443)));
    let narrow = config(|s| s.access = vec!["192.0.2.0/24".parse().unwrap(), "10.0.0.1/32".parse().unwrap()]);
    assert!(!is_open(&narrow, &seen, at(6443)));
    // Rules that somebody else added stay.
    let mut with_another = seen.raw.clone();
    let rules = with_another
        .pointer_mut("/properties/securityRules")
        .unwrap()
        .as_array_mut()
        .unwrap();
    rules.push(json!({"name": "ssh", "properties": {}}));
    let reopened = reopened(&narrow, &Seen::new(Kind::SecurityGroup, with_another), at(6443));
    assert_eq!(reopened.pointer("/properties/securityRules/1/name").unwrap(), "ssh");
    // Machines come in by their own way out.
    assert_eq!(
        reopened
            .pointer("/properties/securityRules/0/properties/sourceAddressPrefixes")
            .unwrap(),
        &json!(["10.0.0.1/32", "192.0.2.0/24", "203.0.113.7/32"])
    );
    assert!(is_open(&narrow, &Seen::new(Kind::SecurityGroup, reopened), at(6443)));
}

#[test]
fn the_load_balancer_outside_and_inside() {
    let zones = ["1".to_owned(), "2".to_owned()];
    let outside = load_balancer(&config(|_| {}), &names(), range(), 6443, &zones);
    let front = outside.pointer("/properties/frontendIPConfigurations/0").unwrap();
    assert_eq!(
        *front,
        json!({"name": "api", "properties": {"publicIPAddress": {"id": "/g/providers/Microsoft.Network/publicIPAddresses/demo-api"}}})
    );
    let inside = load_balancer(&config(|s| s.private = true), &names(), range(), 6443, &zones);
    let front = inside.pointer("/properties/frontendIPConfigurations/0").unwrap();
    assert_eq!(front["zones"], json!(["1", "2"]));
    assert_eq!(
        front.pointer("/properties/subnet/id").unwrap(),
        "/g/providers/Microsoft.Network/virtualNetworks/demo/subnets/machines"
    );
}

#[test]
fn nobody_has_the_key_and_it_is_the_same_each_time() {
    let name = |n: &str| MachineName::new(n).unwrap();
    let key = nobodys_key(&name("demo-cp-0"));
    assert_eq!(key, nobodys_key(&name("demo-cp-0")));
    assert_ne!(key, nobodys_key(&name("demo-cp-1")));
    let blob = STANDARD.decode(key.split(' ').nth(1).unwrap()).unwrap();
    assert_eq!(blob.len(), 4 + 11 + 4 + 32);
    assert!(VerifyingKey::from_bytes(blob[19..].try_into().unwrap()).is_ok());
}

#[test]
fn a_machine_is_put_again_without_what_can_only_be_read() {
    let vm = Seen::new(
        Kind::Machine,
        json!({"id": "/x", "name": "demo-cp-0", "type": "t", "etag": "1", "location": "l", "tags": {}, "properties": {
            "provisioningState": "Failed", "vmId": "v", "timeCreated": "t", "instanceView": {},
            "osProfile": {"computerName": "demo-cp-0"}, "storageProfile": {"osDisk": {}}}}),
    );
    let seen = again(&vm, &names(), &spec(Role::ControlPlane));
    let disk = body(&attached(&names(), &MachineName::new("demo-cp-0").unwrap()));
    assert_eq!(
        seen,
        json!({"location": "l", "tags": {}, "properties": {"osProfile": {"computerName": "demo-cp-0"},
            "storageProfile": {"osDisk": {}, "dataDisks": [disk]}}})
    );
}
