//! Many machines: calls grow with machines / 100, names are right, and `up` with nothing to do is quick.

use std::collections::BTreeSet;
use std::time::Instant;

use kprov_emulators::aws::Moto;
use kprov_provider::Provider as _;
use kprov_provision::Goal;

use crate::account::Account;
use crate::room::{self, drive, wanted};

#[tokio::test]
async fn a_hundred_machines_take_hardly_more_calls_than_four() {
    let Some(moto) = room::moto().await else { return };
    let few = calls_for(&moto, 1).await;
    let many = calls_for(&moto, 97).await;
    // A launch for each zone beside that of the control plane, whatever the number.
    assert!(many <= few + 20, "{few} calls for 4 machines, {many} for 100");
}

/// The calls of `up` for 3 control-plane machines and so many workers; everything is removed again.
async fn calls_for(moto: &Moto, workers: u32) -> u64 {
    let (account, cluster) = (Account::new(moto), room::cluster("many"));
    let before = account.everything().await;
    moto.record().reset();
    let goal = wanted(&cluster, 3, workers);
    let names: BTreeSet<_> = goal.machines.iter().map(|m| m.name.clone()).collect();
    let start = Instant::now();
    let provider = room::provider(moto).await;
    let seen = drive(&provider, &cluster, &Goal::Present(goal)).await.unwrap();
    let (took, calls) = (start.elapsed(), moto.record().calls());
    assert_eq!(
        seen.machines.iter().map(|m| m.name.clone()).collect::<BTreeSet<_>>(),
        names
    );
    let zones: BTreeSet<_> = seen.machines.iter().map(|m| m.zone.clone()).collect();
    assert_eq!(zones.len(), 3);
    let launches = calls["RunInstances"];
    let zone = u64::from(workers.div_ceil(3));
    assert_eq!(launches, 3 + zone.div_ceil(100) * u64::from(workers.min(3)));
    let total = moto.record().total();
    eprintln!(
        "{} machines: {total} calls, {launches} of them RunInstances, {took:.1?}",
        names.len()
    );

    // Nothing to do: one call for each kind of thing.
    moto.record().reset();
    let start = Instant::now();
    let again = drive(&provider, &cluster, &Goal::Present(wanted(&cluster, 3, workers)))
        .await
        .unwrap();
    eprintln!("again: {} calls, {:.1?}", moto.record().total(), start.elapsed());
    assert_eq!(again.machines.len(), names.len());
    assert!(moto.record().total() <= 20, "{:?}", moto.record().calls());

    drive(&provider, &cluster, &Goal::Nothing).await.unwrap();
    assert_eq!(provider.leftovers(&cluster).await.unwrap(), []);
    assert_eq!(account.everything().await, before);
    total
}

#[tokio::test]
async fn a_thousand_machines() {
    if !room::full() {
        eprintln!("skipped: takes minutes; `cargo xtask test --full` runs it");
        return;
    }
    let Some(moto) = room::moto().await else { return };
    calls_for(&moto, 997).await;
}

#[tokio::test]
async fn listings_of_many_pages_are_whole() {
    let Some(moto) = room::moto().await else { return };
    let cluster = room::cluster("pages");
    let mut wanted = wanted(&cluster, 1, 30);
    // A page holds so many calls' instances, so each machine is told something else and made by itself.
    for machine in &mut wanted.machines {
        machine.first_boot.0.push_str(machine.name.as_str());
    }
    let goal = Goal::Present(wanted);
    let provider = room::provider(&moto).await;
    drive(&provider, &cluster, &goal).await.unwrap();
    moto.faults().page_size(5);
    moto.record().reset();
    assert_eq!(provider.observe(&cluster).await.unwrap().machines.len(), 31);
    assert!(moto.record().calls()["DescribeInstances"] > 3);
    moto.faults().clear();
    drive(&provider, &cluster, &Goal::Nothing).await.unwrap();
}

#[tokio::test]
async fn machines_deleted_by_hand_are_put_back_with_their_disk_and_zone() {
    let Some(moto) = room::moto().await else { return };
    let (account, cluster) = (Account::new(&moto), room::cluster("hand"));
    let goal = Goal::Present(wanted(&cluster, 3, 4));
    let provider = room::provider(&moto).await;
    let seen = drive(&provider, &cluster, &goal).await.unwrap();
    let lost = |name: &str| seen.machines.iter().find(|m| m.name.as_str() == name).unwrap();
    for name in ["hand-cp-1", "hand-worker-0"] {
        account.terminate(&lost(name).id).await;
    }
    // Another process finds them missing.
    let other = room::provider(&moto).await;
    let again = drive(&other, &cluster, &goal).await.unwrap();
    assert_eq!(again.machines.len(), 7);
    let back = again.machines.iter().find(|m| m.name.as_str() == "hand-cp-1").unwrap();
    assert_ne!(back.id, lost("hand-cp-1").id);
    assert_eq!(back.zone, lost("hand-cp-1").zone);
    assert_eq!(again.disks, seen.disks);
    assert_eq!(account.count("instance").await, 7);
    drive(&other, &cluster, &Goal::Nothing).await.unwrap();
    assert_eq!(account.count("instance").await, 0);
}

#[tokio::test]
async fn machines_are_made_as_promised() {
    let Some(moto) = room::moto().await else { return };
    let (account, cluster) = (Account::new(&moto), room::cluster("shape"));
    let provider = room::provider(&moto).await;
    drive(&provider, &cluster, &Goal::Present(wanted(&cluster, 1, 2)))
        .await
        .unwrap();
    for instance in account.instances().await {
        let options = instance.metadata_options().unwrap();
        assert_eq!(
            options.http_tokens(),
            Some(&aws_sdk_ec2::types::HttpTokensState::Required)
        );
        assert_eq!(instance.image_id(), Some(kprov_emulators::aws::DEBIAN_IMAGE));
        assert!(Account::tag(instance.tags(), "Name").is_some());
        assert_eq!(Account::tag(instance.tags(), "kprov.io/cluster"), Some("shape"));
    }
    let volumes = account.ec2.describe_volumes().send().await.unwrap();
    assert_eq!(volumes.volumes().len(), 4);
    for volume in volumes.volumes() {
        assert_eq!(volume.encrypted(), Some(true));
        assert_eq!(volume.volume_type(), Some(&aws_sdk_ec2::types::VolumeType::Gp3));
        assert_eq!(Account::tag(volume.tags(), "kprov.io/cluster"), Some("shape"));
    }
    drive(&provider, &cluster, &Goal::Nothing).await.unwrap();
}
