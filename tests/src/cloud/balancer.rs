//! A cloud's load balancer: connections go to targets that pass its health checks.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::{HealthCheck, Listener, Probe};

/// How long a target may take to accept a client's connection.
const CONNECT: Duration = Duration::from_secs(5);

/// One port of a balancer, until dropped.
#[derive(Debug)]
pub(super) struct Port {
    wanted: watch::Sender<Listener>,
    // Ends its tasks when dropped; connections that are open go with them.
    _tasks: JoinSet<()>,
}

/// What is known of a target.
#[derive(Debug, Clone, Copy, Default)]
struct Health {
    healthy: bool,
    /// Answers in a row that say the opposite.
    against: u32,
}

type Targets = Arc<Mutex<BTreeMap<SocketAddrV4, Health>>>;

impl Port {
    /// Listens on a port of an address that this host has.
    pub(super) async fn open(address: Ipv4Addr, want: &Listener) -> Result<Self> {
        let listen = SocketAddrV4::new(address, want.port);
        let socket = TcpListener::bind(listen)
            .await
            .with_context(|| format!("can't listen on `{listen}`"))?;
        let (wanted, watched) = watch::channel(want.clone());
        let targets = Targets::default();
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(socket, watched.clone(), targets.clone()));
        tasks.spawn(check(watched, targets));
        Ok(Self { wanted, _tasks: tasks })
    }

    /// Takes on other targets or another check.
    pub(super) fn set(&self, want: &Listener) {
        self.wanted.send_if_modified(|now| {
            let changes = now != want;
            now.clone_from(want);
            changes
        });
    }
}

async fn accept(socket: TcpListener, wanted: watch::Receiver<Listener>, targets: Targets) {
    let mut connections = JoinSet::new();
    let mut turn = 0;
    loop {
        let Ok((client, _)) = socket.accept().await else {
            continue;
        };
        while connections.try_join_next().is_some() {}
        let candidates = candidates(&wanted.borrow(), &targets);
        if candidates.is_empty() {
            continue;
        }
        turn = (turn + 1) % candidates.len();
        connections.spawn(forward(client, candidates[turn]));
    }
}

/// Where a new connection may go.
fn candidates(wanted: &Listener, targets: &Targets) -> Vec<SocketAddrV4> {
    let known = targets.lock().unwrap_or_else(PoisonError::into_inner);
    let healthy: Vec<_> = wanted
        .targets
        .iter()
        .filter(|t| known.get(t).is_some_and(|h| h.healthy))
        .copied()
        .collect();
    if healthy.is_empty() && wanted.fails_open {
        return wanted.targets.clone();
    }
    healthy
}

async fn forward(mut client: TcpStream, target: SocketAddrV4) {
    // A client that can't be served is reset, as any that the target itself resets.
    let Ok(Ok(mut server)) = timeout(CONNECT, TcpStream::connect(target)).await else {
        let _ = client.set_zero_linger();
        return;
    };
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
}

/// Asks all targets, each in its turn, for as long as there are any.
async fn check(mut wanted: watch::Receiver<Listener>, targets: Targets) {
    let Ok(http) = client() else { return };
    loop {
        let Listener {
            targets: list, health, ..
        } = wanted.borrow_and_update().clone();
        let next = Instant::now() + health.interval;
        let mut asked = JoinSet::new();
        for target in &list {
            let (http, health, target) = (http.clone(), health.clone(), *target);
            asked.spawn(async move {
                let answer = timeout(health.timeout, ask(&http, &health, target)).await;
                (target, matches!(answer, Ok(Ok(()))))
            });
        }
        while let Some(result) = asked.join_next().await {
            let Ok((target, well)) = result else { continue };
            note(&targets, target, well, &health);
        }
        targets
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|target, _| list.contains(target));
        tokio::select! {
            () = tokio::time::sleep_until(next) => {}
            changed = wanted.changed() => if changed.is_err() { return },
        }
    }
}

fn note(targets: &Targets, target: SocketAddrV4, well: bool, check: &HealthCheck) {
    let mut known = targets.lock().unwrap_or_else(PoisonError::into_inner);
    let health = known.entry(target).or_default();
    if health.healthy == well {
        health.against = 0;
        return;
    }
    health.against += 1;
    let limit = if well { check.healthy } else { check.unhealthy };
    if health.against >= limit {
        *health = Health {
            healthy: well,
            against: 0,
        };
        tracing::info!(%target, healthy = well, "target");
    }
}

async fn ask(http: &reqwest::Client, check: &HealthCheck, target: SocketAddrV4) -> io::Result<()> {
    let address = SocketAddr::from((*target.ip(), check.port.unwrap_or(target.port())));
    match &check.probe {
        Probe::Tcp => TcpStream::connect(address).await.map(drop),
        Probe::Http { tls, path } => {
            let scheme = if *tls { "https" } else { "http" };
            let reply = http.get(format!("{scheme}://{address}{path}")).send().await;
            reply
                .and_then(reqwest::Response::error_for_status)
                .map(drop)
                .map_err(io::Error::other)
        }
    }
}

fn client() -> Result<reqwest::Client> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Ok(reqwest::Client::builder()
        .pool_max_idle_per_host(0)
        .no_proxy()
        .tls_danger_accept_invalid_certs(true)
        .build()?)
}
