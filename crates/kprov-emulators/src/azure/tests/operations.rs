//! Operations that take a while, end badly or don't end; etags.

use super::*;
use crate::azure::{Fault, Refusal, What};

#[tokio::test]
async fn a_put_is_created_in_progress_and_then_succeeded() {
    let client = Client::with_group().await;
    client.arm.configure(|o| {
        o.settle = Duration::from_millis(200);
        o.retry_after = 3;
    });
    let put = client
        .call(Method::PUT, &network("v"), NETWORK, Some(virtual_network()))
        .await;
    assert_eq!((put.status, put.header("retry-after")), (201, Some("3")));
    assert_eq!(put.body["properties"]["provisioningState"], "Creating");
    let busy = client
        .call(Method::PUT, &network("v"), NETWORK, Some(virtual_network()))
        .await;
    assert_eq!((busy.status, busy.code()), (429, "AnotherOperationInProgress"));
    let early = client
        .call(Method::PUT, &interface("n"), NETWORK, Some(client.interface_body()))
        .await;
    assert_eq!(
        (early.status, early.code(), early.inner()),
        (429, "RetryableError", "ReferencedResourceNotProvisioned")
    );
    assert_eq!(client.followed(&put).await["status"], "Succeeded");
    let link = put.header("location").unwrap();
    let result = client.link(Method::GET, link, None, &[]).await.unwrap();
    assert_eq!((result.status, result.body["name"].as_str()), (200, Some("v")));
    let again = client
        .call(Method::PUT, &network("v"), NETWORK, Some(virtual_network()))
        .await;
    assert_eq!(
        (again.status, again.body["properties"]["provisioningState"].as_str()),
        (200, Some("Updating"))
    );
}

#[tokio::test]
async fn a_disk_is_accepted_and_a_delete_is_followed_by_location() {
    let client = Client::with_group().await;
    let put = client.call(Method::PUT, &disk("d"), DISKS, Some(disk_body("1"))).await;
    assert_eq!(put.status, 202);
    assert_eq!(client.followed(&put).await["status"], "Succeeded");
    let gone = client.call(Method::DELETE, &disk("d"), DISKS, None).await;
    assert_eq!(gone.status, 202);
    let link = gone.header("location").unwrap().to_owned();
    assert!(link.contains("monitor=true"), "{link}");
    let last = loop {
        let answer = client.link(Method::GET, &link, None, &[]).await.unwrap();
        if answer.status != 202 {
            break answer.status;
        }
    };
    assert_eq!(last, 204);
    assert_eq!(client.call(Method::DELETE, &disk("d"), DISKS, None).await.status, 204);
}

#[tokio::test]
async fn an_operation_may_never_end() {
    let client = Client::with_group().await;
    client.network().await;
    client.interface("m").await;
    client.arm.fault(Fault::on("PUT virtualMachines", What::NeverEnds));
    let put = client
        .call(Method::PUT, &machine("m"), COMPUTE, Some(client.machine_body("m")))
        .await;
    assert_eq!(put.status, 201);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let link = put.header("azure-asyncoperation").unwrap();
    assert_eq!(
        client.link(Method::GET, link, None, &[]).await.unwrap().body["status"],
        "InProgress"
    );
    assert_eq!(
        client.got(&machine("m"), COMPUTE).await["properties"]["provisioningState"],
        "Creating"
    );
    // It can be deleted all the same.
    client.deleted(&machine("m"), COMPUTE).await;
    let status = client.link(Method::GET, link, None, &[]).await.unwrap().body;
    assert_eq!(
        (status["status"].as_str(), status["error"]["code"].as_str()),
        (Some("Failed"), Some("OperationPreempted"))
    );
}

#[tokio::test]
async fn a_failed_operation_tells_its_inner_error_and_leaves_what_failed() {
    let client = Client::with_group().await;
    client.network().await;
    client.interface("m").await;
    let why = Refusal::new(409, "ZonalAllocationFailed", "Allocation failed.").detail("Capacity", "zone 1 is full");
    client.arm.fault(Fault::on("PUT virtualMachines", What::Fail(why)));
    let put = client
        .call(Method::PUT, &machine("m"), COMPUTE, Some(client.machine_body("m")))
        .await;
    assert_eq!(put.status, 201);
    let status = client.followed(&put).await;
    assert_eq!(status["status"], "Failed");
    assert_eq!(status["error"]["code"], "ZonalAllocationFailed");
    assert_eq!(status["error"]["details"][0]["message"], "zone 1 is full");
    let there = client
        .got(&format!("{}?$expand=instanceView", machine("m")), COMPUTE)
        .await;
    assert_eq!(there["properties"]["provisioningState"], "Failed");
    assert_eq!(
        there["properties"]["instanceView"]["statuses"][0]["code"],
        "ProvisioningState/failed/ZonalAllocationFailed"
    );
    // A PUT of the same mends it.
    let mended = client.made(&machine("m"), COMPUTE, client.machine_body("m")).await;
    assert_eq!(mended["properties"]["provisioningState"], "Succeeded");
    let view = client.got(&format!("{}/instanceView", machine("m")), COMPUTE).await;
    assert_eq!(view["statuses"][1]["code"], "PowerState/running");
}

#[tokio::test]
async fn etags_guard_what_two_write() {
    let client = Client::with_group().await;
    let made = client.network().await;
    let etag = made["etag"].as_str().unwrap().to_owned();
    let path = network("v");
    let put = |name: &'static str, value: String| {
        let (client, path) = (&client, &path);
        async move {
            client
                .call_with(Method::PUT, path, NETWORK, Some(virtual_network()), &[(name, &value)])
                .await
                .unwrap()
        }
    };
    let only_new = put("if-none-match", "*".to_owned()).await;
    assert_eq!((only_new.status, only_new.code()), (412, "PreconditionFailed"));
    let good = put("if-match", etag.clone()).await;
    assert_eq!(good.status, 200);
    client.followed(&good).await;
    let stale = put("if-match", etag).await;
    assert_eq!((stale.status, stale.code()), (412, "PreconditionFailed"));
    let other = network("w");
    let absent = client
        .call_with(
            Method::PUT,
            &other,
            NETWORK,
            Some(virtual_network()),
            &[("if-match", "*")],
        )
        .await
        .unwrap();
    assert_eq!(absent.status, 412);
}
