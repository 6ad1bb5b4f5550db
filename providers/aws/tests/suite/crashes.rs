//! Killed after any change, of `up` and of `down`: run again it completes, and nothing is there twice or left.

use std::time::{Duration, Instant};

use kprov_emulators::aws::{Effect, Fault, Moto};
use kprov_provision::Goal;
use kprov_types::ClusterName;
use kprov_types::infrastructure::AwsSettings;

use crate::account::Account;
use crate::room::{self, drive, drive_until_killed, wanted};

/// After so many changes everything has been done long ago.
const END: u64 = 120;

/// The changes to be killed after: all of them with `--full`, else every third.
fn kills() -> impl Iterator<Item = (usize, u64)> {
    (0..END).step_by(if room::full() { 1 } else { 3 }).enumerate()
}

/// Works towards a goal until `changes` were made, and is gone then. Whether it came to its end before.
async fn killed_after(moto: &Moto, cluster: &ClusterName, goal: &Goal, changes: u64) -> bool {
    moto.faults().add(Fault::on_changes(Effect::LoseRequest).after(changes));
    let provider = room::provider(moto).await;
    let outcome = drive_until_killed(&provider, cluster, goal).await;
    moto.faults().clear();
    match outcome {
        None => false,
        Some(Ok(_)) => true,
        Some(Err(error)) => panic!("after {changes} changes: {error:?}"),
    }
}

/// Checks that there is one of everything, and as many machines and volumes as were asked for.
async fn check_once(account: &Account, before: usize, machines: usize, volumes: usize) {
    let all = account.everything().await;
    let count = |kind: &str| all.iter().filter(|(k, _)| *k == kind).count();
    assert_eq!(count("instance"), machines, "{all:?}");
    // Each instance has a root disk beside.
    assert_eq!(count("volume"), machines + volumes, "{all:?}");
    let endpoint = (count("balancer"), count("listener"), count("target group"));
    assert_eq!(endpoint, (1, 1, 1), "{all:?}");
    assert_eq!((count("vpc"), count("gateway")), (before + 1, 1), "{all:?}");
}

#[tokio::test]
async fn up_killed_at_changes() {
    let Some(moto) = room::moto().await else { return };
    let (account, cluster) = (Account::new(&moto), room::cluster("crash"));
    let before = account.everything().await;
    let vpcs = account.count("vpc").await;
    let up = Goal::Present(wanted(&cluster, 1, 2));
    for (turn, changes) in kills() {
        let ended = killed_after(&moto, &cluster, &up, changes).await;
        // Every other time it is `down` that finds half a cluster.
        if ended || room::full() || turn % 2 == 0 {
            let seen = drive(&room::provider(&moto).await, &cluster, &up).await.unwrap();
            assert_eq!(seen.machines.len(), 3, "after {changes} changes");
            check_once(&account, vpcs, 3, 1).await;
            if room::full() && !ended {
                drive(&room::provider(&moto).await, &cluster, &Goal::Nothing)
                    .await
                    .unwrap();
                killed_after(&moto, &cluster, &up, changes).await;
            }
        }
        drive(&room::provider(&moto).await, &cluster, &Goal::Nothing)
            .await
            .unwrap();
        nothing_left(&moto, &cluster).await;
        assert_eq!(account.everything().await, before, "after {changes} changes");
        if ended {
            eprintln!("`up` makes {changes} changes at most");
            return;
        }
    }
    panic!("`up` never came to an end");
}

#[tokio::test]
async fn down_killed_at_changes() {
    let Some(moto) = room::moto().await else { return };
    let (account, cluster) = (Account::new(&moto), room::cluster("crash"));
    let before = account.everything().await;
    let up = Goal::Present(wanted(&cluster, 1, 2));
    for (_, changes) in kills() {
        drive(&room::provider(&moto).await, &cluster, &up).await.unwrap();
        let ended = killed_after(&moto, &cluster, &Goal::Nothing, changes).await;
        if !ended {
            drive(&room::provider(&moto).await, &cluster, &Goal::Nothing)
                .await
                .unwrap();
        }
        nothing_left(&moto, &cluster).await;
        assert_eq!(account.everything().await, before, "after {changes} changes");
        if ended {
            eprintln!("`down` makes {changes} changes at most");
            return;
        }
    }
    panic!("`down` never came to an end");
}

async fn nothing_left(moto: &Moto, cluster: &ClusterName) {
    use kprov_provider::Provider as _;
    let left = room::provider(moto).await.leftovers(cluster).await.unwrap();
    assert_eq!(left, []);
}

#[tokio::test]
async fn two_at_once_end_in_one_cluster() {
    two_at_once(false).await;
}

#[tokio::test]
async fn two_at_once_end_in_one_private_cluster() {
    two_at_once(true).await;
}

/// Calls of the two meet in another order each time.
async fn two_at_once(private: bool) {
    let Some(moto) = room::moto().await else { return };
    let (account, cluster) = (Account::new(&moto), room::cluster("twins"));
    let before = account.everything().await;
    let vpcs = account.count("vpc").await;
    let up = Goal::Present(wanted(&cluster, 1, 2));
    let open = || async {
        let settings = AwsSettings {
            private,
            ..room::settings(&moto)
        };
        room::with(settings, &[]).await
    };
    for seed in 0..if room::full() { 40 } else { 3 } {
        eprintln!("calls are delayed by seed {seed}");
        let start = Instant::now();
        moto.faults().add(Fault::on_all(Effect::Jitter {
            most: Duration::from_millis(20),
            seed,
        }));
        let (one, other) = (open().await, open().await);
        let results = futures::join!(drive(&one, &cluster, &up), drive(&other, &cluster, &up));
        assert!(results.0.is_ok() && results.1.is_ok(), "{results:?}");
        moto.faults().clear();
        // Both have come to their end: nothing is there that another `up` would have to put in order.
        check_once(&account, vpcs, 3, 1).await;
        let nats = usize::from(private);
        let there = (account.count("nat").await, account.count("address").await);
        assert_eq!(there, (nats, nats));
        eprintln!("both were done after {:.1} s", start.elapsed().as_secs_f32());
        let seen = drive(&open().await, &cluster, &up).await.unwrap();
        assert_eq!(seen.machines.len(), 3);
        drive(&one, &cluster, &Goal::Nothing).await.unwrap();
        nothing_left(&moto, &cluster).await;
        assert_eq!(account.everything().await, before);
    }
}
