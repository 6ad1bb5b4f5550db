//! `up` and `down` are killed at every call that changes something, before it took effect and after, and run again.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use kprov_emulators::azure::{Fault, What};

use crate::cloud::Cloud;

const CONTROL_PLANE: usize = 1;
const WORKERS: usize = 1;

/// Runs `work` until the server holds back an answer, and drops it there: as if the process had been killed. Says whether it came
/// to that.
async fn killed(cloud: &Arc<Cloud>, up: bool) -> bool {
    let inner = Arc::clone(cloud);
    let run = tokio::spawn(async move {
        if up {
            inner.up(CONTROL_PLANE, WORKERS).await
        } else {
            inner.down().await
        }
    });
    loop {
        if cloud.arm.hanging() > 0 {
            run.abort();
            let _ = run.await;
            return true;
        }
        if run.is_finished() {
            run.await.unwrap().unwrap();
            return false;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// What an undisturbed `up` makes.
async fn whole() -> BTreeSet<String> {
    let cloud = Cloud::fast().await;
    cloud.up(CONTROL_PLANE, WORKERS).await.unwrap();
    cloud.resources()
}

async fn interrupt(call: &str, what: &What, up: bool, whole: &BTreeSet<String>) -> u64 {
    for boundary in 0.. {
        let cloud = Arc::new(Cloud::fast().await);
        if !up {
            cloud.up(CONTROL_PLANE, WORKERS).await.unwrap();
        }
        cloud.arm.fault(Fault::on(call, what.clone()).after(boundary));
        let was_killed = killed(&cloud, up).await;
        cloud.arm.clear_faults();
        let at = format!("{call} {boundary} {what:?}");
        if up {
            cloud
                .up(CONTROL_PLANE, WORKERS)
                .await
                .unwrap_or_else(|e| panic!("{at}: {}", crate::cloud::shown(&e)));
            assert_eq!(cloud.resources(), *whole, "{at}");
        }
        cloud
            .down()
            .await
            .unwrap_or_else(|e| panic!("{at}: {}", crate::cloud::shown(&e)));
        assert_eq!(cloud.resources(), BTreeSet::new(), "{at}");
        if !was_killed {
            return boundary;
        }
    }
    unreachable!()
}

#[tokio::test(flavor = "multi_thread")]
async fn up_goes_on_where_it_was_killed() {
    let whole = whole().await;
    for what in [What::HangBefore, What::HangAfter] {
        let boundaries = interrupt("PUT *", &what, true, &whole).await;
        // A group, a firewall, two addresses, a NAT gateway, a load balancer, a network; a disk; an address, two interfaces, two machines.
        assert_eq!(boundaries, 13, "{what:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn down_goes_on_where_it_was_killed() {
    let whole = BTreeSet::new();
    for what in [What::HangBefore, What::HangAfter] {
        let boundaries = interrupt("DELETE *", &what, false, &whole).await;
        assert!(boundaries >= 9, "{boundaries} {what:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn up_goes_on_when_killed_while_it_looks() {
    let whole = whole().await;
    let cloud = Cloud::fast().await;
    cloud.up(CONTROL_PLANE, WORKERS).await.unwrap();
    let calls = cloud.arm.record.calls();
    for verb in ["GET", "LIST"] {
        let of_verb = calls.iter().filter(|(name, _)| name.split(' ').next() == Some(verb));
        let reads: u64 = of_verb.map(|(_, n)| n).sum();
        assert!(reads > 20, "{calls:?}");
        // Reads change nothing: every seventh is as good as all.
        for boundary in (0..reads).step_by(7) {
            let cloud = Arc::new(Cloud::fast().await);
            let call = format!("{verb} *");
            cloud.arm.fault(Fault::on(&call, What::HangBefore).after(boundary));
            killed(&cloud, true).await;
            cloud.arm.clear_faults();
            cloud.up(CONTROL_PLANE, WORKERS).await.unwrap();
            assert_eq!(cloud.resources(), whole, "{call} {boundary}");
            cloud.down().await.unwrap();
            assert_eq!(cloud.resources(), BTreeSet::new(), "{call} {boundary}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_requests_and_replies_make_nothing_twice() {
    let whole = whole().await;
    for what in [What::LoseRequest, What::LoseReply] {
        for call in ["PUT *", "DELETE *"] {
            for boundary in 0..14 {
                let cloud = Cloud::fast().await;
                cloud.arm.fault(Fault::on(call, what.clone()).after(boundary));
                cloud.up(CONTROL_PLANE, WORKERS).await.unwrap();
                assert_eq!(cloud.resources(), whole, "{call} {boundary} {what:?}");
                cloud.down().await.unwrap();
                assert_eq!(cloud.resources(), BTreeSet::new(), "{call} {boundary} {what:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_at_once_make_one_cluster() {
    let whole = whole().await;
    let cloud = Arc::new(Cloud::fast().await);
    let run = || {
        let cloud = Arc::clone(&cloud);
        tokio::spawn(async move { cloud.up(CONTROL_PLANE, WORKERS).await })
    };
    let (one, two) = (run(), run());
    one.await.unwrap().unwrap();
    two.await.unwrap().unwrap();
    assert_eq!(cloud.resources(), whole);
}
