//! What a person reads when something is wrong, and what the executor is told to do.

use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider, future};
use kprov_emulators::aws::{Effect, Fault};
use kprov_provider::{Advice, Provider as _, ProviderError};
use kprov_provider_aws::{AwsConfig, AwsProvider};
use kprov_provision::{DriveError, Goal, Wanted};
use kprov_types::infrastructure::AwsSettings;

use crate::account::Account;
use crate::room::{self, drive, wanted};

/// The provider's error of an `up` that has to fail.
async fn refused(settings: AwsSettings, zones: &[&str], goal: Wanted) -> ProviderError {
    let provider = room::with(settings, zones).await;
    match drive(&provider, &room::cluster("wrong"), &Goal::Present(goal)).await {
        Err(DriveError::Provider(error)) => error,
        other => panic!("not refused: {other:?}"),
    }
}

fn small() -> Wanted {
    wanted(&room::cluster("wrong"), 1, 1)
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    let Some(moto) = room::moto().await else { return };
    let account = Account::new(&moto);
    let before = account.everything().await;
    let cases: &[(&str, Effect, &[&str])] = &[
        ("CreateVpc", Effect::unauthorized(), &["`ec2:CreateVpc`"]),
        (
            "CreateLoadBalancer",
            Effect::unauthorized(),
            &["`elasticloadbalancing:CreateLoadBalancer`"],
        ),
        ("RunInstances", Effect::unauthorized(), &["`ec2:RunInstances`"]),
        ("DescribeVpcs", Effect::expired(), &["expired"]),
        (
            "DescribeVpcs",
            Effect::refuse(
                "AuthFailure",
                "AWS was not able to validate the provided access credentials",
            ),
            &["does not know these credentials"],
        ),
        (
            "RunInstances",
            Effect::refuse(
                "VcpuLimitExceeded",
                "You have requested more vCPU capacity than your current limit",
            ),
            &["L-1216C47A", "Running On-Demand Standard"],
        ),
        (
            "CreateVpc",
            Effect::refuse("VpcLimitExceeded", "The maximum number of VPCs has been reached."),
            &["VPCs per Region", "L-F678F1CE"],
        ),
        (
            "CreateVpc",
            Effect::refuse("InvalidVpc.Range", "The CIDR '10.32.0.0/16' is invalid."),
            &["overlaps"],
        ),
    ];
    for (action, effect, words) in cases {
        moto.faults().add(Fault::on(action, effect.clone()));
        let error = refused(room::settings(&moto), &[], small()).await;
        moto.faults().clear();
        assert_eq!(error.advice, Advice::Never, "{action}: {error}");
        assert!(words.iter().all(|w| error.message.contains(w)), "{action}: {error}");
        assert!(error.hint.is_some(), "{action}: {error}");
        drive(&room::provider(&moto).await, &room::cluster("wrong"), &Goal::Nothing)
            .await
            .unwrap();
    }
    assert_eq!(account.everything().await, before);
}

#[tokio::test]
async fn wishes_that_cannot_be_met_are_named() {
    let Some(moto) = room::moto().await else { return };
    let check = |error: &ProviderError, words: &str| {
        assert_eq!(error.advice, Advice::Never, "{error}");
        assert!(error.message.contains(words), "{error}");
        assert!(error.hint.is_some(), "{error}");
    };
    let mut goal = small();
    goal.machines[1].size = Some("t9.enormous".into());
    check(&refused(room::settings(&moto), &[], goal).await, "t9.enormous");
    let mut goal = small();
    goal.machines[1].image = Some("ami-00000000000000404".into());
    check(&refused(room::settings(&moto), &[], goal).await, "image");
    let mut goal = small();
    goal.machines[1].image = Some("windows".into());
    check(&refused(room::settings(&moto), &[], goal).await, "`windows`");
    drive(&room::provider(&moto).await, &room::cluster("wrong"), &Goal::Nothing)
        .await
        .unwrap();

    let mut settings = room::settings(&moto);
    settings.vpc = Some("vpc-0404".into());
    check(&refused(settings, &[], small()).await, "no VPC `vpc-0404`");
    check(
        &refused(room::settings(&moto), &["eu-central-1z"], small()).await,
        "eu-central-1z",
    );
    drive(&room::provider(&moto).await, &room::cluster("wrong"), &Goal::Nothing)
        .await
        .unwrap();
}

/// A provider of credentials that has none.
#[derive(Debug)]
struct Nothing;

impl ProvideCredentials for Nothing {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::ready(Err(CredentialsError::not_loaded("there are none")))
    }
}

#[tokio::test]
async fn missing_credentials_and_hosts_are_told_apart() {
    let cluster = room::cluster("wrong");
    let open = async |settings: AwsSettings, credentials| {
        let config = AwsConfig {
            settings,
            zones: Vec::new(),
        };
        AwsProvider::open_with(config, Some(credentials)).await.unwrap()
    };
    let settings = |url: &str| AwsSettings {
        region: Some(room::REGION.into()),
        endpoint_url: Some(url.into()),
        ..AwsSettings::default()
    };
    let without = open(settings("http://127.0.0.1:9"), SharedCredentialsProvider::new(Nothing)).await;
    let error = without.observe(&cluster).await.unwrap_err();
    assert_eq!(error.advice, Advice::Never);
    assert!(error.hint.as_ref().unwrap().contains("aws sso login"), "{error}");

    let closed = open(settings("http://127.0.0.1:9"), room::credentials()).await;
    let error = closed.observe(&cluster).await.unwrap_err();
    assert!(matches!(error.advice, Advice::RetryAfter(_)), "{error:?}");
    assert!(error.message.contains("can't be reached"), "{error}");

    let nowhere = open(settings("http://ec2.nowhere.invalid"), room::credentials()).await;
    let error = nowhere.observe(&cluster).await.unwrap_err();
    assert_eq!(error.advice, Advice::Never, "{error:?}");
    assert!(error.hint.as_ref().unwrap().contains("region"), "{error}");
}

#[tokio::test]
async fn a_full_zone_is_named_and_others_are_tried() {
    let Some(moto) = room::moto().await else { return };
    let (account, cluster) = (Account::new(&moto), room::cluster("full"));
    moto.faults().no_capacity("eu-central-1b");
    let provider = room::provider(&moto).await;
    let seen = drive(&provider, &cluster, &Goal::Present(wanted(&cluster, 3, 6)))
        .await
        .unwrap();
    assert_eq!(seen.machines.len(), 9);
    assert!(seen.machines.iter().all(|m| m.zone.as_deref() != Some("eu-central-1b")));
    // Volumes went with their machines, and none stayed behind.
    assert_eq!(seen.disks.len(), 3);
    assert_eq!(account.count("volume").await, 9 + 3);
    drive(&provider, &cluster, &Goal::Nothing).await.unwrap();

    for zone in ["eu-central-1a", "eu-central-1c"] {
        moto.faults().no_capacity(zone);
    }
    let error = refused(room::settings(&moto), &[], small()).await;
    assert_eq!(error.advice, Advice::Never);
    for words in [
        "no capacity",
        "eu-central-1a",
        "eu-central-1b",
        "eu-central-1c",
        "t3.large",
    ] {
        assert!(error.message.contains(words), "{error}");
    }
    moto.faults().clear();
    drive(&room::provider(&moto).await, &room::cluster("wrong"), &Goal::Nothing)
        .await
        .unwrap();
}

#[tokio::test]
async fn what_somebody_put_into_the_vpc_stays_and_is_named() {
    let Some(moto) = room::moto().await else { return };
    let (account, cluster) = (Account::new(&moto), room::cluster("guest"));
    let provider = room::provider(&moto).await;
    drive(&provider, &cluster, &Goal::Present(wanted(&cluster, 1, 0)))
        .await
        .unwrap();
    let own = account.ec2.describe_subnets().filters(
        aws_sdk_ec2::types::Filter::builder()
            .name("tag:kprov.io/cluster")
            .values("guest")
            .build(),
    );
    let subnets = own.send().await.unwrap();
    let subnet = subnets.subnets()[0].subnet_id().unwrap().to_owned();
    let made = account
        .ec2
        .run_instances()
        .image_id(kprov_emulators::aws::DEBIAN_IMAGE)
        .instance_type(aws_sdk_ec2::types::InstanceType::T3Micro)
        .min_count(1)
        .max_count(1)
        .subnet_id(&subnet)
        .send()
        .await
        .unwrap();
    let guest = made.instances()[0].instance_id().unwrap().to_owned();
    let error = match drive(&provider, &cluster, &Goal::Nothing).await {
        Err(DriveError::Provider(error)) => error,
        other => panic!("not refused: {other:?}"),
    };
    assert!(
        error.message.contains(&guest) && error.advice == Advice::Never,
        "{error}"
    );
    assert!(
        account
            .instances()
            .await
            .iter()
            .any(|i| i.instance_id() == Some(guest.as_str()))
    );
    account.terminate(&guest).await;
    drive(&provider, &cluster, &Goal::Nothing).await.unwrap();
}

#[tokio::test]
async fn protected_machines_are_not_removed_until_they_are_unprotected() {
    let Some(moto) = room::moto().await else { return };
    let (account, cluster) = (Account::new(&moto), room::cluster("safe"));
    let mut settings = room::settings(&moto);
    settings.termination_protection = true;
    let provider = room::with(settings, &[]).await;
    drive(&provider, &cluster, &Goal::Present(wanted(&cluster, 1, 0)))
        .await
        .unwrap();
    let error = match drive(&provider, &cluster, &Goal::Nothing).await {
        Err(DriveError::Provider(error)) => error,
        other => panic!("not refused: {other:?}"),
    };
    assert!(
        error.hint.as_ref().unwrap().contains("terminationProtection"),
        "{error}"
    );
    assert_eq!(account.count("instance").await, 1);
    drive(&room::provider(&moto).await, &cluster, &Goal::Nothing)
        .await
        .unwrap();
    assert_eq!(account.count("instance").await, 0);
}
