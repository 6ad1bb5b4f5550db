//! Disks and machines: what can't be had, what doesn't fit, what can't be changed.

use super::*;

fn with(body: &Value, pointer: &str, value: Value) -> Value {
    let mut body = body.clone();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    body.pointer_mut(parent).unwrap()[key] = value;
    body
}

fn attached(client: &Client, body: &Value, disk: &str, lun: i64) -> Value {
    let disk = json!({
        "lun": lun, "createOption": "Attach", "managedDisk": {"id": client.id(&format!("Microsoft.Compute/disks/{disk}"))},
    });
    let mut body = body.clone();
    let list = &mut body["properties"]["storageProfile"]["dataDisks"];
    if list.is_null() {
        *list = json!([]);
    }
    list.as_array_mut().unwrap().push(disk);
    body
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "a table of what is refused")]
async fn what_a_machine_is_made_of_is_checked() {
    let client = Client::with_group().await;
    client.network().await;
    let body = client.machine_body("m");
    client
        .refused(&machine("m"), COMPUTE, body.clone(), 400, "InvalidResourceReference")
        .await;
    client.interface("m").await;
    let storage = "/properties/storageProfile";
    let os = "/properties/osProfile";
    for (pointer, value, status, code) in [
        (
            "/properties/hardwareProfile/vmSize",
            json!("Standard_Z9"),
            400,
            "InvalidParameter",
        ),
        (
            "/properties/hardwareProfile/vmSize",
            json!("Standard_A2_v2"),
            400,
            "BadRequest",
        ),
        (
            "/properties/hardwareProfile/vmSize",
            json!("Standard_D2ps_v5"),
            400,
            "BadRequest",
        ),
        ("/properties/hardwareProfile/cores", json!(2), 400, "BadRequest"),
        ("/zones", json!(["4"]), 400, "AvailabilityZoneNotSupported"),
        ("/zones", json!(["1", "2"]), 400, "InvalidParameter"),
        (
            &format!("{storage}/imageReference/sku"),
            json!("12-gen3"),
            404,
            "PlatformImageNotFound",
        ),
        (
            &format!("{storage}/imageReference/version"),
            json!("1.0.0"),
            404,
            "PlatformImageNotFound",
        ),
        (
            &format!("{storage}/osDisk/diskSizeGB"),
            json!(10),
            400,
            "InvalidParameter",
        ),
        (&format!("{os}/computerName"), json!("a_b"), 400, "InvalidParameter"),
        (&format!("{os}/adminUsername"), json!("root"), 400, "InvalidParameter"),
        (
            &format!("{os}/customData"),
            json!("not base64"),
            400,
            "InvalidParameter",
        ),
        (
            &format!("{os}/customData"),
            json!("A".repeat(87_388)),
            400,
            "InvalidParameter",
        ),
        (
            &format!("{os}/linuxConfiguration/ssh/publicKeys/0/path"),
            json!("/root/.ssh/authorized_keys"),
            400,
            "InvalidParameter",
        ),
        (
            &format!("{os}/linuxConfiguration/ssh/publicKeys/0/keyData"),
            json!("ssh-rsa AAAA"),
            400,
            "InvalidParameter",
        ),
        (
            &format!("{os}/linuxConfiguration/ssh/publicKeys"),
            json!([]),
            400,
            "InvalidParameter",
        ),
        (
            "/properties/securityProfile",
            json!({"uefiSettings": {"vTpmEnabled": true}}),
            400,
            "BadRequest",
        ),
    ] {
        client
            .refused(&machine("m"), COMPUTE, with(&body, pointer, value), status, code)
            .await;
    }
    let flatcar = json!({"publisher": "kinvolk", "offer": "flatcar-container-linux-free", "sku": "stable-gen2", "version": "latest"});
    let bought = with(&body, "/properties/storageProfile/imageReference", flatcar);
    client
        .refused(&machine("m"), COMPUTE, bought.clone(), 400, "VMMarketplaceInvalidInput")
        .await;
    let plan = json!({"name": "stable-gen2", "publisher": "kinvolk", "product": "flatcar-container-linux-free"});
    let bought = with(&bought, "/plan", plan);
    let trusted =
        json!({"securityType": "TrustedLaunch", "uefiSettings": {"secureBootEnabled": true, "vTpmEnabled": true}});
    client
        .refused(
            &machine("m"),
            COMPUTE,
            with(&bought, "/properties/securityProfile", trusted.clone()),
            400,
            "BadRequest",
        )
        .await;
    client
        .refused(
            &machine("m"),
            COMPUTE,
            with(
                &body,
                "/identity",
                json!({"type": "UserAssigned", "userAssignedIdentities": {
                    client.id("Microsoft.ManagedIdentity/userAssignedIdentities/i"): {},
                }}),
            ),
            400,
            "FailedIdentityOperation",
        )
        .await;
    assert!(client.arm.virtual_machines().is_empty());
    // The largest custom data there can be.
    let most = with(&body, "/properties/osProfile/customData", json!("A".repeat(87_380)));
    client
        .made(
            &machine("m"),
            COMPUTE,
            with(&most, "/properties/securityProfile", trusted),
        )
        .await;
    assert_eq!(
        client.arm.virtual_machines()[0].custom_data.as_ref().unwrap().len(),
        65_535
    );
}

#[tokio::test]
async fn sizes_run_out_and_quotas_are_named() {
    let client = Client::with_group().await;
    client.network().await;
    client.interface("m").await;
    client.interface("n").await;
    let body = client.machine_body("m");
    client.arm.restrict_size("Standard_D2s_v5", Some("1"));
    let answer = client
        .refused(&machine("m"), COMPUTE, body.clone(), 409, "SkuNotAvailable")
        .await;
    assert!(
        answer.message().contains("Standard_D2s_v5") && answer.message().contains("'westeurope'"),
        "{answer:?}"
    );
    client
        .made(
            &machine("n"),
            COMPUTE,
            with(&client.machine_body("n"), "/zones", json!(["2"])),
        )
        .await;
    let mut next = Some(format!(
        "{}/subscriptions/{}/providers/Microsoft.Compute/skus?api-version=2021-07-01&$filter=location%20eq%20'westeurope'",
        client.arm.endpoint(),
        client.arm.subscription()
    ));
    let mut restricted = Vec::new();
    while let Some(link) = next {
        let page = client.link(Method::GET, &link, None, &[]).await.unwrap().body;
        for sku in page["value"].as_array().unwrap() {
            if sku["restrictions"] != json!([]) {
                restricted.push((
                    sku["name"].clone(),
                    sku["restrictions"][0]["restrictionInfo"]["zones"].clone(),
                ));
            }
        }
        next = page["nextLink"].as_str().map(str::to_owned);
    }
    assert_eq!(restricted, [(json!("Standard_D2s_v5"), json!(["1"]))]);
    client.arm.unrestrict();
    client.arm.set_quota("standardDSv5Family", 3);
    let answer = client
        .refused(&machine("m"), COMPUTE, body.clone(), 409, "OperationNotAllowed")
        .await;
    assert!(
        answer
            .message()
            .contains("exceeding approved standardDSv5Family Cores quota"),
        "{answer:?}"
    );
    assert!(
        answer
            .message()
            .contains("Current Limit: 3, Current Usage: 2, Additional Required: 2"),
        "{answer:?}"
    );
    client.arm.set_quota("standardDSv5Family", 4);
    client.arm.set_quota("cores", 3);
    let answer = client
        .refused(&machine("m"), COMPUTE, body, 409, "OperationNotAllowed")
        .await;
    assert!(answer.message().contains("Total Regional Cores quota"), "{answer:?}");
    let usages = client
        .got("providers/Microsoft.Compute/locations/westeurope/usages", COMPUTE)
        .await;
    assert_eq!(usages["value"][0]["limit"], 3);
    assert_eq!(usages["value"][0]["currentValue"], 2);
}

#[tokio::test]
async fn disks_stay_with_one_machine_of_their_zone() {
    let client = Client::with_group().await;
    client.network().await;
    client.interface("m").await;
    client.interface("n").await;
    let body = client.machine_body("m");
    client
        .refused(
            &machine("m"),
            COMPUTE,
            attached(&client, &body, "d", 0),
            404,
            "ResourceNotFound",
        )
        .await;
    client
        .refused(
            &disk("d"),
            DISKS,
            json!({"location": "westeurope", "properties": {"creationData": {"createOption": "Empty"}}}),
            400,
            "InvalidParameter",
        )
        .await;
    client.made(&disk("d"), DISKS, disk_body("1")).await;
    client.made(&disk("far"), DISKS, disk_body("2")).await;
    let answer = client
        .refused(
            &machine("m"),
            COMPUTE,
            attached(&client, &body, "far", 0),
            400,
            "BadRequest",
        )
        .await;
    assert!(answer.message().contains("VM zone: '1'. Disk zone: '2'."), "{answer:?}");
    let twice = attached(&client, &attached(&client, &body, "d", 0), "d", 0);
    client
        .refused(&machine("m"), COMPUTE, twice, 400, "InvalidParameter")
        .await;
    client
        .made(&machine("m"), COMPUTE, attached(&client, &body, "d", 0))
        .await;
    let seen = client.got(&disk("d"), DISKS).await;
    assert!(seen["managedBy"].as_str().unwrap().ends_with("/virtualMachines/m"));
    assert_eq!(seen["properties"]["diskState"], "Attached");
    let other = client.machine_body("n");
    client
        .refused(
            &machine("n"),
            COMPUTE,
            attached(&client, &other, "d", 0),
            409,
            "ConflictingUserInput",
        )
        .await;
    let taken = with(
        &other,
        "/properties/networkProfile/networkInterfaces/0/id",
        json!(client.id("Microsoft.Network/networkInterfaces/m")),
    );
    client.refused(&machine("n"), COMPUTE, taken, 400, "NicInUse").await;
    let answer = client.call(Method::DELETE, &disk("d"), DISKS, None).await;
    assert_eq!((answer.status, answer.code()), (409, "OperationNotAllowed"));
    let smaller = with(&disk_body("1"), "/properties/diskSizeGB", json!(4));
    client.refused(&disk("d"), DISKS, smaller, 400, "BadRequest").await;
    // The machine takes its system disk along, and leaves the data disk.
    assert_eq!(client.got(&disk("m-os"), DISKS).await["tags"]["kprov-cluster"], "c");
    client.deleted(&machine("m"), COMPUTE).await;
    assert_eq!(client.call(Method::GET, &disk("m-os"), DISKS, None).await.status, 404);
    assert_eq!(
        client.got(&disk("d"), DISKS).await["properties"]["diskState"],
        "Unattached"
    );
    client
        .made(&machine("n"), COMPUTE, attached(&client, &other, "d", 0))
        .await;
}

#[tokio::test]
async fn a_repeated_put_is_the_same_machine_and_some_things_stay_as_they_are() {
    let client = Client::with_group().await;
    client.network().await;
    let first = client.machine("m").await;
    let body = client.machine_body("m");
    let again = client.made(&machine("m"), COMPUTE, body.clone()).await;
    assert_eq!(again["properties"]["vmId"], first["properties"]["vmId"]);
    assert!(
        again["properties"]["osProfile"].get("customData").is_none(),
        "custom data is never answered"
    );
    for (pointer, value, target) in [
        (
            "/properties/osProfile/customData",
            json!("aGVsbG8K"),
            "osProfile.customData",
        ),
        (
            "/properties/osProfile/computerName",
            json!("other"),
            "osProfile.computerName",
        ),
        (
            "/properties/storageProfile/imageReference/sku",
            json!("12"),
            "imageReference",
        ),
    ] {
        let answer = client
            .refused(
                &machine("m"),
                COMPUTE,
                with(&body, pointer, value),
                409,
                "PropertyChangeNotAllowed",
            )
            .await;
        assert_eq!(answer.body["error"]["target"], target);
    }
    client
        .refused(
            &machine("m"),
            COMPUTE,
            with(&body, "/zones", json!(["2"])),
            400,
            "ResourceAvailabilityZonesCannotBeModified",
        )
        .await;
    let moved = with(&body, "/location", json!("northeurope"));
    client
        .refused(&machine("m"), COMPUTE, moved, 409, "InvalidResourceLocation")
        .await;
    // What was read can be put back, and keeps the custom data that isn't in it.
    client.made(&machine("m"), COMPUTE, again).await;
    assert_eq!(
        client.arm.virtual_machines()[0].custom_data.as_deref(),
        Some(b"#!/bin/sh\n".as_slice())
    );
}

#[tokio::test]
async fn machines_are_stopped_started_and_shown_with_their_state() {
    let client = Client::with_group().await;
    client.network().await;
    client.machine("m").await;
    let status = |list: Value| list["value"][0]["properties"]["instanceView"]["statuses"][1]["code"].clone();
    let all = "providers/Microsoft.Compute/virtualMachines?statusOnly=true";
    for (action, code) in [
        ("powerOff", "stopped"),
        ("deallocate", "deallocated"),
        ("start", "running"),
    ] {
        let answer = client
            .call(Method::POST, &format!("{}/{action}", machine("m")), COMPUTE, None)
            .await;
        assert_eq!(answer.status, 202);
        assert_eq!(client.followed(&answer).await["status"], "Succeeded");
        assert_eq!(
            status(client.got(all, COMPUTE).await),
            json!(format!("PowerState/{code}"))
        );
    }
    let plain = client.got("providers/Microsoft.Compute/virtualMachines", COMPUTE).await;
    assert!(plain["value"][0]["properties"].get("instanceView").is_none());
    let expanded = client
        .call(
            Method::GET,
            "providers/Microsoft.Compute/virtualMachines?$expand=instanceView",
            COMPUTE,
            None,
        )
        .await;
    assert_eq!(expanded.status, 400);
    let answer = client
        .call(
            Method::POST,
            &format!("{}/retrieveBootDiagnosticsData", machine("m")),
            COMPUTE,
            None,
        )
        .await;
    assert_eq!((answer.status, answer.code()), (409, "OperationNotAllowed"));
}
