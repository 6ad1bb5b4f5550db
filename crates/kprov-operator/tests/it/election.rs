//! Electors on a real API server: never two writers at once, and never none for long.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::coordination::v1::Lease;
use kprov_operator::election::{Elector, Leadership, Terms};
use kube::Client;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use serde_json::json;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::api_server::{ApiServer, binaries};

const NAME: &str = "test";
const DURATION: Duration = Duration::from_secs(3);

fn terms() -> Terms {
    Terms::new(DURATION, Duration::from_millis(300), Duration::from_secs(1)).unwrap()
}

/// Who works now, and how often two did at once.
#[derive(Default)]
struct Work {
    now: AtomicUsize,
    together: AtomicUsize,
    done: AtomicUsize,
}

/// A piece of work, for as long as it's done.
struct Piece(Arc<Work>);

impl Piece {
    fn begin(work: &Arc<Work>) -> Self {
        if work.now.fetch_add(1, Ordering::SeqCst) > 0 {
            work.together.fetch_add(1, Ordering::SeqCst);
        }
        Self(Arc::clone(work))
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::SeqCst);
        self.0.done.fetch_add(1, Ordering::SeqCst);
    }
}

/// An operator: an elector, and work that is done only while it permits it.
struct Candidate {
    elector: JoinHandle<Elector>,
    worker: JoinHandle<()>,
    stop: CancellationToken,
    leadership: Leadership,
}

impl Candidate {
    fn start(client: Client, me: &str, work: &Arc<Work>) -> Self {
        let mut elector = Elector::new(client, "default", NAME, me.to_owned(), terms());
        let (stop, leadership) = (CancellationToken::new(), elector.leadership());
        let stood = stop.clone();
        let (work, permit) = (Arc::clone(work), leadership.clone());
        Self {
            leadership,
            stop,
            elector: tokio::spawn(async move {
                elector.run(&stood).await;
                elector
            }),
            worker: tokio::spawn(async move {
                loop {
                    if permit.permits() {
                        // As long as a request may take at most.
                        let _piece = Piece::begin(&work);
                        sleep(Duration::from_millis(900)).await;
                    }
                    sleep(Duration::from_millis(20)).await;
                }
            }),
        }
    }

    /// As a process that is killed.
    fn kill(self) {
        self.elector.abort();
        self.worker.abort();
    }

    async fn release(self) -> Result<()> {
        self.worker.abort();
        let _ = self.worker.await;
        self.stop.cancel();
        self.elector.await?.release().await;
        Ok(())
    }

    async fn leads(&self, within: Duration) -> Result<Duration> {
        let (mut leadership, begun) = (self.leadership.clone(), Instant::now());
        timeout(within, leadership.begins())
            .await
            .context("nobody took the lead")?;
        Ok(begun.elapsed())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn never_two_lead_and_never_none_for_long() {
    let Some(directory) = binaries("never_two_lead_and_never_none_for_long") else {
        return;
    };
    election(&ApiServer::start(&directory).await.unwrap()).await.unwrap();
}

async fn election(server: &ApiServer) -> Result<()> {
    let work = Arc::new(Work::default());
    let start = |me: &str| Ok::<_, anyhow::Error>(Candidate::start(server.admin()?, me, &work));
    // There is no Lease yet, and all begin at once.
    let mut candidates = Vec::new();
    for me in ["a", "b", "c"] {
        candidates.push(start(me)?);
    }
    let leader = leading(&candidates).await?;
    // Killed: another leads after the lease's time, and not before it.
    candidates.swap_remove(leader).kill();
    let killed = Instant::now();
    let leader = leading(&candidates).await?;
    let gap = killed.elapsed();
    ensure!(gap < DURATION + Duration::from_secs(2), "{gap:?} without anybody");
    println!("a killed leader was replaced after {gap:?}");
    // Told to stop: another leads at its next look.
    let stopped = Instant::now();
    candidates.swap_remove(leader).release().await?;
    candidates[0].leads(DURATION).await?;
    let gap = stopped.elapsed();
    ensure!(gap < Duration::from_secs(2), "{gap:?} without anybody");
    println!("a leader that stopped was replaced after {gap:?}");

    // Nothing answers for longer than the lead lasts: it ends in time, and comes back.
    candidates.push(start("d")?);
    server.suspend(true)?;
    let mut leadership = candidates[0].leadership.clone();
    let ended = timeout(DURATION, leadership.ends()).await;
    sleep(DURATION).await;
    server.suspend(false)?;
    ended.context("the lead went on without being renewed")?;
    leading(&candidates).await?;

    // Somebody deletes the Lease, and somebody writes into it.
    let leases: Api<Lease> = Api::namespaced(server.admin()?, "default");
    leases.delete(NAME, &DeleteParams::default()).await?;
    while leases.get_opt(NAME).await?.is_none() {
        sleep(Duration::from_millis(50)).await;
    }
    leading(&candidates).await?;
    let stranger = json!({ "spec": { "holderIdentity": "stranger", "leaseDurationSeconds": 2 } });
    leases
        .patch(NAME, &PatchParams::default(), &Patch::Merge(stranger))
        .await?;
    sleep(Duration::from_millis(700)).await;
    ensure!(
        candidates.iter().all(|c| !c.leadership.permits()),
        "somebody leads beside the stranger"
    );
    leading(&candidates).await?;

    let (done, together) = (work.done.load(Ordering::SeqCst), work.together.load(Ordering::SeqCst));
    ensure!(done > 3, "only {done} pieces of work were done");
    ensure!(together == 0, "two worked at once, {together} times");
    for candidate in candidates {
        candidate.release().await?;
    }
    let lease = leases.get(NAME).await?.spec.unwrap_or_default();
    ensure!(
        lease.holder_identity.is_none_or(|holder| holder.is_empty()),
        "the Lease is still held"
    );
    ensure!(lease.lease_transitions.unwrap_or(0) >= 1);
    Ok(())
}

/// The index of the one that leads, once one does.
async fn leading(candidates: &[Candidate]) -> Result<usize> {
    let deadline = Instant::now() + DURATION * 5;
    loop {
        let leaders: Vec<usize> = (0..candidates.len())
            .filter(|i| candidates[*i].leadership.permits())
            .collect();
        ensure!(leaders.len() < 2, "{leaders:?} lead at once");
        if let [leader] = leaders[..] {
            return Ok(leader);
        }
        ensure!(Instant::now() < deadline, "nobody leads");
        sleep(Duration::from_millis(20)).await;
    }
}
