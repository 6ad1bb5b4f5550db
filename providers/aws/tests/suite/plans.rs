//! Private clusters, existing VPCs, other images, and the estimate that `kprov plan` shows.

use aws_sdk_ec2::types::Filter;
use kprov_emulators::aws::FLATCAR_IMAGE;
use kprov_provider::Provider as _;
use kprov_provision::{Goal, Wanted};

use crate::account::Account;
use crate::room::{self, drive, wanted};

#[tokio::test]
async fn a_private_cluster_has_no_public_addresses_but_that_of_its_nat_gateway() {
    let Some(moto) = room::moto().await else { return };
    let (account, cluster) = (Account::new(&moto), room::cluster("private"));
    let before = account.everything().await;
    let mut settings = room::settings(&moto);
    settings.private = true;
    let provider = room::with(settings, &[]).await;
    let seen = drive(&provider, &cluster, &Goal::Present(wanted(&cluster, 1, 1)))
        .await
        .unwrap();
    assert!(seen.machines.iter().all(|m| m.external_address.is_none()));
    assert_eq!((account.count("nat").await, account.count("address").await), (1, 1));
    assert_eq!(
        account.count("subnet").await - before.iter().filter(|(k, _)| *k == "subnet").count(),
        4
    );
    drive(&provider, &cluster, &Goal::Nothing).await.unwrap();
    assert_eq!(account.everything().await, before);
    // Tags outlive the gateway and its address; what they were on is gone.
    assert_eq!(provider.leftovers(&cluster).await.unwrap(), []);
    assert_eq!(provider.clusters().await.unwrap(), []);
}

#[tokio::test]
async fn a_given_vpc_is_used_and_stays() {
    let Some(moto) = room::moto().await else { return };
    let (account, cluster) = (Account::new(&moto), room::cluster("guest"));
    // The default VPC: it has subnets in part of its range, and moto gives it no gateway.
    let default = Filter::builder().name("is-default").values("true").build();
    let vpcs = account.ec2.describe_vpcs().filters(default).send().await.unwrap();
    let vpc = vpcs.vpcs()[0].vpc_id().unwrap().to_owned();
    let mut settings = room::settings(&moto);
    settings.vpc = Some(vpc.clone());
    let provider = room::with(settings, &[]).await;
    let goal = Goal::Present(wanted(&cluster, 1, 1));
    let gateways = account.ec2.describe_internet_gateways().send().await.unwrap();
    if !gateways
        .internet_gateways()
        .iter()
        .any(|g| g.attachments().iter().any(|a| a.vpc_id() == Some(&vpc)))
    {
        let error = drive(&provider, &cluster, &goal).await.unwrap_err();
        assert!(error.to_string().contains("no internet gateway"), "{error}");
        let made = account.ec2.create_internet_gateway().send().await.unwrap();
        let id = made
            .internet_gateway()
            .unwrap()
            .internet_gateway_id()
            .unwrap()
            .to_owned();
        let call = account.ec2.attach_internet_gateway().internet_gateway_id(id);
        call.vpc_id(&vpc).send().await.unwrap();
    }
    let before = account.everything().await;
    let seen = drive(&provider, &cluster, &goal).await.unwrap();
    assert_eq!(seen.machines.len(), 2);
    assert_eq!(seen.network.as_ref().unwrap().cidr.prefix_len(), 20);
    let again = drive(
        &room::with(
            {
                let mut settings = room::settings(&moto);
                settings.vpc = Some(vpc);
                settings
            },
            &[],
        )
        .await,
        &cluster,
        &goal,
    )
    .await
    .unwrap();
    assert_eq!(again, seen);
    drive(&provider, &cluster, &Goal::Nothing).await.unwrap();
    assert_eq!(account.everything().await, before);
}

#[tokio::test]
async fn flatcar_is_told_by_ignition() {
    use base64::Engine as _;
    let Some(moto) = room::moto().await else { return };
    let (account, cluster) = (Account::new(&moto), room::cluster("flatcar"));
    let mut goal = wanted(&cluster, 1, 0);
    goal.machines[0].image = Some("flatcar".into());
    let provider = room::provider(&moto).await;
    drive(&provider, &cluster, &Goal::Present(goal)).await.unwrap();
    let instance = account.instances().await.remove(0);
    assert_eq!(instance.image_id(), Some(FLATCAR_IMAGE));
    let call = account
        .ec2
        .describe_instance_attribute()
        .instance_id(instance.instance_id().unwrap());
    let reply = call
        .attribute(aws_sdk_ec2::types::InstanceAttributeName::UserData)
        .send()
        .await
        .unwrap();
    let data = reply.user_data().and_then(|d| d.value()).unwrap_or_default().to_owned();
    let text = String::from_utf8(base64::engine::general_purpose::STANDARD.decode(data).unwrap()).unwrap();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(config["ignition"]["version"], "3.3.0");
    drive(&provider, &cluster, &Goal::Nothing).await.unwrap();
}

#[tokio::test]
async fn the_estimate_is_near_what_is_made() {
    let Some(moto) = room::moto().await else { return };
    let cluster = room::cluster("estimate");
    let provider = room::provider(&moto).await;
    let goal = wanted(&cluster, 3, 30);
    let Wanted {
        network,
        disks,
        machines,
    } = &goal;
    let estimate = provider
        .estimate(&cluster, Some(network), disks, machines)
        .await
        .unwrap()
        .unwrap();
    let shown = estimate.things.join("\n");
    for words in [
        "VPC with a free range",
        "subnet for machines in `eu-central-1c`",
        "`estimate-worker-0..27..3`",
        "network load balancer",
    ] {
        assert!(shown.contains(words), "{shown}");
    }
    moto.record().reset();
    drive(&provider, &cluster, &Goal::Present(goal.clone())).await.unwrap();
    let made = moto.record().total();
    assert!(
        made.abs_diff(estimate.calls) * 3 <= made,
        "estimated {} calls, made {made}: {:?}",
        estimate.calls,
        moto.record().calls()
    );
    let rest = provider.estimate(&cluster, None, &[], &[]).await.unwrap().unwrap();
    assert_eq!(rest.things, Vec::<String>::new());
    drive(&provider, &cluster, &Goal::Nothing).await.unwrap();
}

#[tokio::test]
async fn where_few_may_reach_the_api_workers_are_told_another_way() {
    use base64::Engine as _;
    let Some(moto) = room::moto().await else { return };
    let (account, cluster) = (Account::new(&moto), room::cluster("few"));
    let mut settings = room::settings(&moto);
    settings.access = vec!["192.0.2.0/24".parse().unwrap()];
    let provider = room::with(settings, &[]).await;
    let seen = drive(&provider, &cluster, &Goal::Present(wanted(&cluster, 1, 1)))
        .await
        .unwrap();
    let by_role = |role| seen.machines.iter().find(|m| m.role == role).unwrap();
    let worker = &by_role(kprov_types::Role::Worker).id;
    let call = account.ec2.describe_instance_attribute().instance_id(worker);
    let reply = call
        .attribute(aws_sdk_ec2::types::InstanceAttributeName::UserData)
        .send()
        .await
        .unwrap();
    let data = reply.user_data().and_then(|d| d.value()).unwrap_or_default().to_owned();
    let text = String::from_utf8(base64::engine::general_purpose::STANDARD.decode(data).unwrap()).unwrap();
    let (address, host) = (
        by_role(kprov_types::Role::ControlPlane).address.unwrap(),
        &seen.network.as_ref().unwrap().endpoint.host,
    );
    assert!(text.contains(&format!("{address} {host}")), "{text}");
    let groups = account.ec2.describe_security_groups().send().await.unwrap();
    let open = groups
        .security_groups()
        .iter()
        .filter(|g| Account::tag(g.tags(), "kprov.io/cluster") == Some("few"))
        .flat_map(aws_sdk_ec2::types::SecurityGroup::ip_permissions)
        .flat_map(aws_sdk_ec2::types::IpPermission::ip_ranges)
        .any(|r| r.cidr_ip() == Some("0.0.0.0/0"));
    assert!(!open, "{groups:?}");
    drive(&provider, &cluster, &Goal::Nothing).await.unwrap();
}
