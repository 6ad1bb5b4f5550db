//! Resource groups, tags, lists of everything, pages.

use std::collections::BTreeSet;

use super::*;
use crate::azure::{Fault, What};

#[tokio::test]
async fn groups_are_made_found_and_deleted_with_all_that_is_in_them() {
    let client = Client::with_group().await;
    client.network().await;
    client.machine("m").await;
    let again = client
        .call(
            Method::PUT,
            "resourceGroups/G",
            GROUPS,
            Some(json!({"location": "westeurope"})),
        )
        .await;
    assert_eq!((again.status, again.body["name"].as_str()), (200, Some("g")));
    let moved = client
        .call(
            Method::PUT,
            "resourceGroups/g",
            GROUPS,
            Some(json!({"location": "northeurope"})),
        )
        .await;
    assert_eq!((moved.status, moved.code()), (409, "InvalidResourceGroupLocation"));

    client.arm.configure(|o| o.settle = Duration::from_millis(300));
    let gone = client.call(Method::DELETE, "resourceGroups/g", GROUPS, None).await;
    assert_eq!(gone.status, 202);
    let link = gone.header("location").unwrap().to_owned();
    assert_eq!(
        client.got("resourceGroups/g", GROUPS).await["properties"]["provisioningState"],
        "Deleting"
    );
    client
        .refused(
            &network("w"),
            NETWORK,
            virtual_network(),
            409,
            "ResourceGroupBeingDeleted",
        )
        .await;
    assert_eq!(client.link(Method::GET, &link, None, &[]).await.unwrap().status, 202);
    while client.link(Method::GET, &link, None, &[]).await.unwrap().status == 202 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(
        client.call(Method::HEAD, "resourceGroups/g", GROUPS, None).await.status,
        404
    );
    let answer = client.call(Method::DELETE, "resourceGroups/g", GROUPS, None).await;
    assert_eq!((answer.status, answer.code()), (404, "ResourceGroupNotFound"));
    assert_eq!(client.arm.resources(), Vec::<String>::new());
}

#[tokio::test]
async fn names_locations_and_tags_are_checked() {
    let client = Client::with_group().await;
    let place = json!({"location": "westeurope"});
    client
        .refused(
            "resourceGroups/bad.",
            GROUPS,
            place.clone(),
            400,
            "InvalidResourceGroup",
        )
        .await;
    client
        .refused(
            "resourceGroups/h",
            GROUPS,
            json!({"location": "atlantis"}),
            400,
            "LocationNotAvailableForResourceType",
        )
        .await;
    client
        .refused("resourceGroups/h", GROUPS, json!({}), 400, "LocationRequired")
        .await;
    client
        .refused(
            "resourceGroups/h",
            GROUPS,
            json!({"location": "westeurope", "sku": 1}),
            400,
            "InvalidRequestContent",
        )
        .await;
    let tags = json!({"location": "westeurope", "tags": {"kprov.io/cluster": "c"}});
    client
        .refused("resourceGroups/h", GROUPS, tags, 400, "InvalidTagNameCharacters")
        .await;
    client
        .refused(&network("-v"), NETWORK, virtual_network(), 400, "InvalidResourceName")
        .await;
    client
        .refused(&disk("d-"), DISKS, disk_body("1"), 400, "InvalidParameter")
        .await;
    let elsewhere = "resourceGroups/none/providers/Microsoft.Network/virtualNetworks/v";
    client
        .refused(elsewhere, NETWORK, virtual_network(), 404, "ResourceGroupNotFound")
        .await;
    let unknown = client
        .call(
            Method::GET,
            "resourceGroups/g/providers/Microsoft.Network/gateways/x",
            NETWORK,
            None,
        )
        .await;
    assert_eq!((unknown.status, unknown.code()), (404, "InvalidResourceType"));
}

#[tokio::test]
async fn everything_is_listed_by_tag_page_by_page() {
    let client = Client::with_group().await;
    let mut body = public_address();
    for index in 0..12 {
        body["tags"] = json!({"kprov-cluster": if index % 2 == 0 { "a" } else { "b" }});
        client.made(&public(&format!("p{index}")), NETWORK, body.clone()).await;
    }
    let mut names = BTreeSet::new();
    let filter = "resources?$filter=tagName%20eq%20'kprov-cluster'%20and%20tagValue%20eq%20'a'";
    let mut answer = client.call(Method::GET, filter, GROUPS, None).await;
    let mut pages = 1;
    loop {
        assert_eq!(answer.status, 200, "{answer:?}");
        for item in answer.body["value"].as_array().unwrap() {
            assert_eq!(item["type"], "Microsoft.Network/publicIPAddresses");
            assert!(item.get("tags").is_none(), "a filter by tag hides the tags: {item}");
            names.insert(item["name"].as_str().unwrap().to_owned());
        }
        let Some(next) = answer.body["nextLink"].as_str().map(str::to_owned) else {
            break;
        };
        pages += 1;
        answer = client.link(Method::GET, &next, None, &[]).await.unwrap();
    }
    assert_eq!((names.len(), pages), (6, 2));
    let all = client
        .got("providers/Microsoft.Network/publicIPAddresses", NETWORK)
        .await;
    assert_eq!(all["value"].as_array().unwrap().len(), 5);
    assert!(all["nextLink"].is_string());
    let bad = client
        .call(
            Method::GET,
            "resources?$filter=tagName%20eq%20'a'%20and%20resourceType%20eq%20'b'",
            GROUPS,
            None,
        )
        .await;
    assert_eq!((bad.status, bad.code()), (400, "InvalidFilterInQueryString"));
    let bad = client.call(Method::GET, "resources?$filter=tags", GROUPS, None).await;
    assert_eq!((bad.status, bad.code()), (400, "InvalidFilterInQueryString"));
}

#[tokio::test]
async fn something_new_may_be_missing_from_lists_for_a_while() {
    let client = Client::with_group().await;
    let list = "resourceGroups/g/providers/Microsoft.Network/publicIPAddresses";
    client.arm.fault(Fault::on(
        "PUT publicIPAddresses",
        What::Unlisted(Duration::from_millis(400)),
    ));
    client.made(&public("p"), NETWORK, public_address()).await;
    assert_eq!(client.got(list, NETWORK).await["value"], json!([]));
    assert_eq!(client.got("resources", GROUPS).await["value"], json!([]));
    while client.got(list, NETWORK).await["value"] == json!([]) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
