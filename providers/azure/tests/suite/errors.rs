//! What a person is told when Azure says no.

use std::collections::BTreeSet;

use kprov_emulators::azure::{Fault, Refusal, What};
use kprov_provider::{Advice, ProviderError};
use kprov_provider_azure::{AzureConfig, AzureProvider, Credentials};
use kprov_provision::Goal;

use crate::cloud::{Cloud, provider_error, shown, wanted};

async fn fails(cloud: &Cloud, edit: impl FnOnce(&mut AzureConfig)) -> ProviderError {
    let mut config = cloud.config(|_| {});
    edit(&mut config);
    let provider = AzureProvider::open(config).unwrap();
    let goal = Goal::Present(wanted(&cloud.cluster, 1, 1));
    provider_error(cloud.reach(&provider, &goal).await.unwrap_err())
}

fn check(error: &ProviderError, message: &str, hint: &str) {
    assert_eq!(error.to_string(), message, "{}", shown(error));
    assert_eq!(error.advice, Advice::Never, "{}", shown(error));
    let said = error.hint.clone().unwrap_or_default();
    assert!(said.contains(hint), "`{hint}` is not in `{said}`");
}

#[tokio::test]
async fn tokens() {
    let cloud = Cloud::fast().await;
    let expired = cloud.arm.expired_token();
    let error = fails(&cloud, |c| c.credentials = Credentials::Token(expired)).await;
    check(&error, "the Azure access token has expired", "az login");
    let other = cloud.arm.token_of("bbbbbbbb-bbbb-4ccc-8ddd-eeeeeeeeeeee");
    let error = fails(&cloud, |c| c.credentials = Credentials::Token(other)).await;
    check(
        &error,
        "the Azure credentials are of another tenant than the subscription",
        "--tenant",
    );
    assert!(shown(&error).contains("wrong issuer"), "{}", shown(&error));
    let error = fails(&cloud, |c| c.credentials = Credentials::Token("nonsense".into())).await;
    check(&error, "Azure does not accept the credentials", "az login");
    assert_eq!(cloud.resources(), BTreeSet::new());
}

#[tokio::test]
async fn missing_roles_name_the_action_and_the_scope() {
    let cloud = Cloud::fast().await;
    cloud.arm.deny("Microsoft.Network/loadBalancers/write", "/");
    let error = fails(&cloud, |_| {}).await;
    let scope = format!(
        "/subscriptions/{}/resourceGroups/kprov-demo/providers/Microsoft.Network/loadBalancers/demo-api",
        cloud.arm.subscription()
    );
    check(
        &error,
        &format!(
            "can't make load balancer `demo-api`: the action `Microsoft.Network/loadBalancers/write` over `{scope}` is not allowed"
        ),
        &format!("--scope {scope}"),
    );
    // The network is made, and machines may not be put into it.
    cloud.arm.permit_all();
    cloud
        .arm
        .deny("Microsoft.Network/virtualNetworks/subnets/join/action", "/");
    let error = fails(&cloud, |_| {}).await;
    assert!(
        error
            .to_string()
            .contains("the action `Microsoft.Network/virtualNetworks/subnets/join/action` over `/subscriptions/"),
        "{}",
        shown(&error)
    );
    // With the role it goes on where it was.
    cloud.arm.permit_all();
    cloud.up(1, 1).await.unwrap();
}

#[tokio::test]
async fn run_time_states_are_had_without_a_role_over_the_subscription() {
    let cloud = Cloud::fast().await;
    let before = cloud.up(1, 1).await.unwrap();
    let subscription = format!("/subscriptions/{}", cloud.arm.subscription());
    cloud.arm.fault(
        Fault::on("GET virtualMachines", What::Forbidden)
            .named(&subscription)
            .always(),
    );
    let after = cloud.up(1, 1).await.unwrap();
    assert_eq!(after, before);
}

#[tokio::test]
async fn sizes_that_are_not_there() {
    let cloud = Cloud::fast().await;
    cloud.arm.restrict_size("Standard_D2s_v5", None);
    let error = fails(&cloud, |_| {}).await;
    check(
        &error,
        "size `Standard_D2s_v5` can't be had in `westeurope` by this subscription",
        "another size",
    );
    cloud.arm.unrestrict();
    // One zone less: the others are taken.
    cloud.arm.restrict_size("Standard_D2s_v5", Some("1"));
    let observed = cloud.up(1, 1).await.unwrap();
    let zones: BTreeSet<_> = observed.machines.iter().filter_map(|m| m.zone.as_deref()).collect();
    assert_eq!(zones, BTreeSet::from(["2"]));

    let cloud = Cloud::fast().await;
    let zones = ["1".to_owned()];
    cloud.arm.restrict_size("Standard_D2s_v5", Some("1"));
    let settings = kprov_types::infrastructure::AzureSettings {
        subscription: Some(cloud.arm.subscription()),
        location: Some("westeurope".into()),
        endpoint_url: Some(cloud.arm.endpoint()),
        ..Default::default()
    };
    let around = kprov_provider_azure::Surroundings::default();
    let mut named = AzureConfig::new(&settings, &zones, &around).unwrap();
    named.credentials = Credentials::Token(cloud.arm.token());
    let error = fails(&cloud, |c| *c = named).await;
    check(
        &error,
        "size `Standard_D2s_v5` can't be had in `westeurope`, zone 1",
        "zones 2, 3",
    );
    let mut goal = wanted(&cloud.cluster, 1, 0);
    goal.machines[0].size = Some("Standard_Imaginary".into());
    let error = provider_error(cloud.reach(&cloud.provider(), &Goal::Present(goal)).await.unwrap_err());
    check(
        &error,
        "there is no size `Standard_Imaginary` in `westeurope`",
        "az vm list-skus",
    );
}

#[tokio::test]
async fn quotas_name_the_family() {
    let cloud = Cloud::fast().await;
    cloud.arm.set_quota("standardDSv5Family", 3);
    let error = fails(&cloud, |_| {}).await;
    assert!(
        error
            .to_string()
            .starts_with("the quota `standardDSv5Family` is used up in `westeurope`"),
        "{}",
        shown(&error)
    );
    assert!(
        error.to_string().contains("of 3 are used, 2 more are needed"),
        "{error}"
    );
    assert_eq!(error.advice, Advice::Never);
    let cloud = Cloud::fast().await;
    cloud.arm.limit_public_addresses(Some(1));
    let error = fails(&cloud, |_| {}).await;
    assert!(error.to_string().contains("quota"), "{}", shown(&error));
}

#[tokio::test]
async fn places_images_and_subscriptions_that_are_not_there() {
    let cloud = Cloud::fast().await;
    let config = cloud.config(|s| s.location = Some("atlantis".into()));
    let error = fails(&cloud, |c| *c = config).await;
    assert!(
        error.to_string().contains("there is no such location in `atlantis`"),
        "{}",
        shown(&error)
    );
    let mut goal = wanted(&cloud.cluster, 1, 0);
    goal.machines[0].image = Some("Debian:debian-12:13-gen2:latest".into());
    let error = provider_error(cloud.reach(&cloud.provider(), &Goal::Present(goal)).await.unwrap_err());
    assert!(
        error.to_string().contains("its image is not there"),
        "{}",
        shown(&error)
    );
    let config = cloud.config(|s| s.subscription = Some("00000000-0000-4000-8000-000000000000".into()));
    let error = fails(&cloud, |c| *c = config).await;
    check(
        &error,
        "the subscription is not there, or the credentials don't reach it",
        "az account list",
    );
    let config = cloud.config(|s| s.resource_group = Some("nowhere".into()));
    let error = fails(&cloud, |c| *c = config).await;
    check(
        &error,
        "there is no resource group `nowhere`",
        "spec.azure.resourceGroup",
    );
    cloud.arm.unregister("Microsoft.Compute");
    let error = fails(&cloud, |_| {}).await;
    assert!(
        error.hint.clone().unwrap_or_default().contains("az provider register"),
        "{}",
        shown(&error)
    );
}

#[tokio::test]
async fn names_that_are_taken() {
    let cloud = Cloud::fast().await;
    let provider = cloud.provider();
    let goal = Goal::Present(wanted(&cloud.cluster, 1, 0));
    // Somebody else's address of the name that the load balancer's is to have.
    let network = wanted(&cloud.cluster, 1, 0).network;
    kprov_provider::Provider::ensure_network(&provider, &cloud.cluster, &network)
        .await
        .unwrap();
    let url = format!(
        "{}/subscriptions/{}/resourceGroups/kprov-demo/providers/Microsoft.Network/networkInterfaces/demo-cp-0?api-version=2024-03-01",
        cloud.arm.endpoint(),
        cloud.arm.subscription()
    );
    let subnet = format!(
        "/subscriptions/{}/resourceGroups/kprov-demo/providers/Microsoft.Network/virtualNetworks/demo/subnets/machines",
        cloud.arm.subscription()
    );
    let body = serde_json::json!({"location": "westeurope", "properties": {"ipConfigurations": [
        {"name": "a", "properties": {"subnet": {"id": subnet}}}]}});
    let made = reqwest::Client::new()
        .put(url)
        .bearer_auth(cloud.arm.token())
        .json(&body)
        .send()
        .await
        .unwrap();
    assert!(made.status().is_success(), "{made:?}");
    let error = provider_error(cloud.reach(&provider, &goal).await.unwrap_err());
    check(
        &error,
        "network interface `demo-cp-0` exists already and is not of cluster `demo`",
        "another name",
    );
}

#[tokio::test]
async fn other_operations_are_waited_for() {
    let cloud = Cloud::fast().await;
    let busy = Refusal::new(
        409,
        "AnotherOperationInProgress",
        "Another operation on this or dependent resource is in progress.",
    );
    cloud
        .arm
        .fault(Fault::on("PUT virtualNetworks", What::Refuse(busy)).times(3));
    let changed = Refusal::new(412, "PreconditionFailed", "changed");
    cloud.arm.fault(Fault::on("PUT virtualMachines", What::Refuse(changed)));
    cloud.up(1, 1).await.unwrap();
}
