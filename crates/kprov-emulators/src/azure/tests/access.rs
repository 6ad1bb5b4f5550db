//! Tokens, tenants, permissions, api-versions, throttling, lost answers.

use std::time::Duration;

use super::*;
use crate::azure::{Fault, Rate, What};

async fn get_groups(client: &Client) -> Answer {
    client.call(Method::GET, "resourcegroups", GROUPS, None).await
}

#[tokio::test]
async fn a_token_is_needed_and_has_to_be_good() {
    let mut client = Client::with_group().await;
    let url = format!(
        "{}/subscriptions/{}/resourcegroups?api-version={GROUPS}",
        client.arm.endpoint(),
        client.arm.subscription()
    );
    let bare = client.http.get(&url).send().await.unwrap();
    assert_eq!(bare.status(), 401);
    assert!(bare.headers().contains_key("www-authenticate"));
    for (token, code) in [
        ("nonsense".to_owned(), "InvalidAuthenticationToken"),
        (client.arm.expired_token(), "ExpiredAuthenticationToken"),
        (
            client.arm.token_of("bbbbbbbb-0000-4000-8000-000000000000"),
            "InvalidAuthenticationTokenTenant",
        ),
    ] {
        client.token = token;
        let answer = get_groups(&client).await;
        assert_eq!((answer.status, answer.code()), (401, code));
    }
}

#[tokio::test]
async fn tokens_come_by_secret_by_assertion_and_by_managed_identity() {
    let mut client = Client::with_group().await;
    let options = Options::default();
    let url = format!("{}/{}/oauth2/v2.0/token", client.arm.endpoint(), options.tenant);
    let form = |secret: &str| {
        format!(
            "grant_type=client_credentials&client_id={}&scope=https%3A%2F%2Fmanagement.azure.com%2F.default&{secret}",
            options.client_id
        )
    };
    let asserted = |assertion: &str| {
        let kind = "client_assertion_type=urn%3Aietf%3Aparams%3Aoauth%3Aclient-assertion-type%3Ajwt-bearer";
        format!("client_assertion={assertion}&{kind}")
    };
    for (secret, status, number) in [
        ("client_secret=emulated-secret".to_owned(), 200, ""),
        (asserted(&client.arm.assertion(None, 600)), 200, ""),
        ("client_secret=wrong".to_owned(), 401, "AADSTS7000215: "),
        (asserted("x"), 400, "AADSTS50027: "),
        (asserted(&client.arm.assertion(None, -600)), 401, "AADSTS700024: "),
        (
            asserted(&client.arm.assertion(Some("system:serviceaccount:a:b"), 600)),
            400,
            "AADSTS700213: ",
        ),
    ] {
        let answer = client.http.post(&url).body(form(&secret)).send().await.unwrap();
        assert_eq!(answer.status(), status, "{secret}");
        let body: Value = answer.json().await.unwrap();
        if status == 200 {
            client.token = body["access_token"].as_str().unwrap().to_owned();
            assert_eq!(get_groups(&client).await.status, 200);
        } else {
            assert!(
                body["error_description"].as_str().unwrap().starts_with(number),
                "{body}"
            );
        }
    }
    let [(_, endpoint), (_, header)] = client.arm.identity_variables();
    let asked = client
        .http
        .get(&endpoint)
        .header("x-identity-header", header)
        .send()
        .await
        .unwrap();
    let body: Value = asked.json().await.unwrap();
    client.token = body["access_token"].as_str().unwrap().to_owned();
    assert_eq!(get_groups(&client).await.status, 200);
}

#[tokio::test]
async fn subscriptions_and_api_versions_are_checked() {
    let client = Client::with_group().await;
    let answer = client.call(Method::GET, &network("v"), "2019-01-01", None).await;
    assert_eq!((answer.status, answer.code()), (400, "InvalidApiVersionParameter"));
    assert!(
        answer.message().contains("The supported versions are '2024-03-01'"),
        "{answer:?}"
    );
    let url = format!(
        "{}/subscriptions/{}/resourcegroups",
        client.arm.endpoint(),
        client.arm.subscription()
    );
    let answer = client.link(Method::GET, &url, None, &[]).await.unwrap();
    assert_eq!((answer.status, answer.code()), (400, "MissingApiVersionParameter"));
    for (subscription, status, code) in [
        ("22222222-2222-4333-8444-555555555555", 404, "SubscriptionNotFound"),
        ("mine", 400, "InvalidSubscriptionId"),
    ] {
        let url = format!(
            "{}/subscriptions/{subscription}/resourcegroups?api-version={GROUPS}",
            client.arm.endpoint()
        );
        let answer = client.link(Method::GET, &url, None, &[]).await.unwrap();
        assert_eq!((answer.status, answer.code()), (status, code));
    }
    client.arm.unregister("Microsoft.Network");
    let answer = client.call(Method::GET, &network("v"), NETWORK, None).await;
    assert_eq!((answer.status, answer.code()), (409, "MissingSubscriptionRegistration"));
    client
        .call(Method::POST, "providers/Microsoft.Network/register", GROUPS, None)
        .await;
    assert_eq!(
        client.call(Method::GET, &network("v"), NETWORK, None).await.code(),
        "ResourceNotFound"
    );
}

#[tokio::test]
async fn a_missing_role_names_action_and_scope() {
    let client = Client::with_group().await;
    client.network().await;
    client.arm.deny("Microsoft.Network/loadBalancers/write", "/");
    let answer = client
        .refused(&balancer("b"), NETWORK, json!({}), 403, "AuthorizationFailed")
        .await;
    assert!(
        answer
            .message()
            .contains("'Microsoft.Network/loadBalancers/write' over scope '/subscriptions/"),
        "{answer:?}"
    );
    client.arm.deny(
        "Microsoft.Network/virtualNetworks/subnets/join/action",
        &client.id("Microsoft.Network/virtualNetworks"),
    );
    let answer = client
        .refused(
            &interface("n"),
            NETWORK,
            client.interface_body(),
            403,
            "LinkedAuthorizationFailed",
        )
        .await;
    assert!(answer.message().contains("subnets/join/action"), "{answer:?}");
    client.arm.permit_all();
    client.interface("n").await;
}

#[tokio::test]
async fn throttling_says_when_to_come_back() {
    let client = Client::with_group().await;
    client
        .arm
        .fault(Fault::on("LIST resourceGroups", What::Throttle(7)).after(1).times(2));
    assert_eq!(get_groups(&client).await.status, 200);
    for _ in 0..2 {
        let answer = get_groups(&client).await;
        assert_eq!(
            (answer.status, answer.code(), answer.header("retry-after")),
            (429, "TooManyRequests", Some("7"))
        );
        assert_eq!(answer.header("x-ms-ratelimit-remaining-subscription-reads"), Some("0"));
    }
    assert_eq!(get_groups(&client).await.status, 200);
    assert_eq!(client.arm.record.calls()["LIST resourceGroups"], 4);

    let client = Client::new(Options {
        rate: Some(Rate {
            burst: 3.0,
            per_second: 0.5,
        }),
        ..Options::default()
    })
    .await;
    let mut statuses = Vec::new();
    for _ in 0..5 {
        statuses.push(get_groups(&client).await.status);
    }
    assert_eq!(statuses, [200, 200, 200, 429, 429]);
    assert_eq!(get_groups(&client).await.header("retry-after"), Some("2"));
}

#[tokio::test]
async fn answers_get_lost_before_or_after_it_is_done() {
    let client = Client::with_group().await;
    for (what, there) in [(What::LoseRequest, 404), (What::LoseReply, 200)] {
        client.arm.fault(Fault::on("PUT virtualNetworks", what).named("v"));
        let put = client
            .call_with(Method::PUT, &network("v"), NETWORK, Some(virtual_network()), &[])
            .await;
        assert!(put.is_err(), "{put:?}");
        assert_eq!(
            client.call(Method::GET, &network("v"), NETWORK, None).await.status,
            there
        );
    }
}

#[tokio::test]
async fn a_call_that_hangs_is_noticed_and_forgotten_with_its_caller() {
    let client = Client::with_group().await;
    client.arm.fault(Fault::on("PUT virtualNetworks", What::HangAfter));
    let path = network("v");
    {
        let call = client.call_with(Method::PUT, &path, NETWORK, Some(virtual_network()), &[]);
        tokio::pin!(call);
        while client.arm.hanging() == 0 {
            tokio::select! {
                answer = &mut call => panic!("{answer:?}"),
                () = tokio::time::sleep(Duration::from_millis(5)) => {}
            }
        }
        assert_eq!(client.arm.hanging(), 1);
    }
    assert_eq!(client.call(Method::GET, &network("v"), NETWORK, None).await.status, 200);
}
