//! The virtual address of the API: one healthy control-plane machine at a time has it, and says so by gratuitous ARP.
//!
//! [`elect`] decides, without I/O. A machine wants the address while its front listens on the machine's own address, which is the
//! sign that load balancers go by too: while one of its API servers is ready, and it isn't drained. It drops the address before it tells
//! the others that they may have it, and before its lease can run out. Should this process die or hang, the kernel drops the address
//! in time: it was added with a lifetime.
//!
//! Before the cluster exists the machines know each other by their bundles: the first one whose temporary API server is ready
//! takes the address as soon as a majority has its bundle. IPv4 only, as all of kprov-node.

mod address;
pub mod elect;
mod wire;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use kprov_front::{FrontState, ListenerState};
use kprov_types::node::{Bundle, Member};
use kprov_types::{MachineName, ports};
use serde::{Deserialize, Serialize};
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{MissedTickBehavior, interval, sleep};

use self::address::Address;
use self::elect::{Election, Output, Promise, Round, Terms};
use self::wire::Seal;
use crate::files;
use crate::nodes::Nodes;

pub use address::AddressError;

/// How often the election is looked at.
const TICK: Duration = Duration::from_millis(50);
/// When a new holder announces itself, after it has the address: Linux ignores news of an entry that is less than a second old
/// (`locktime` in arp(7)), and packets are lost.
const ANNOUNCE: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(300),
    Duration::from_millis(1100),
    Duration::from_millis(2500),
];
/// How often it does so afterwards, for switches that forget.
const ANNOUNCE_AGAIN: Duration = Duration::from_secs(10);
/// How long to wait for the others' promises before the process is replaced.
const BRIDGE_LIMIT: Duration = Duration::from_secs(1);
/// Binding and the like are tried again after this.
const PAUSE: Duration = Duration::from_secs(1);

/// What the virtual address needs to know of its machine.
pub struct Settings {
    /// The virtual address.
    pub address: Ipv4Addr,
    /// The machine's own address.
    pub own: Ipv4Addr,
    /// The machine's name.
    pub name: MachineName,
    /// Where promises are noted that outlive this process.
    pub directory: Utf8PathBuf,
}

/// How an owner asks for something.
enum Request {
    Release(oneshot::Sender<()>),
    Bridge(oneshot::Sender<()>),
}

/// The running election. Dropping it leaves the address to its lifetime.
#[derive(Clone)]
pub struct Handle {
    requests: mpsc::Sender<Request>,
}

impl Handle {
    /// Starts it. The bundle may come later.
    pub fn start(
        settings: Settings,
        front: watch::Receiver<FrontState>,
        bundle: watch::Receiver<Option<Arc<Bundle>>>,
        nodes: watch::Receiver<Arc<Nodes>>,
    ) -> Self {
        let (requests, asked) = mpsc::channel(1);
        tokio::spawn(run(settings, front, bundle, nodes, asked));
        Self { requests }
    }

    /// Gives the address up, and returns when the others know.
    pub async fn release(&self) {
        self.ask(Request::Release).await;
    }

    /// Keeps the address, where this machine has it, for the seconds in which this process is replaced.
    pub async fn bridge(&self) {
        self.ask(Request::Bridge).await;
    }

    async fn ask(&self, request: impl FnOnce(oneshot::Sender<()>) -> Request) {
        let (done, wait) = oneshot::channel();
        if self.requests.send(request(done)).await.is_ok() {
            // An error means that the task is gone, and with it whatever was to be given up.
            let _ = wait.await;
        }
    }
}

async fn run(
    settings: Settings,
    front: watch::Receiver<FrontState>,
    mut bundle: watch::Receiver<Option<Arc<Bundle>>>,
    nodes: watch::Receiver<Arc<Nodes>>,
    mut requests: mpsc::Receiver<Request>,
) {
    let known = tokio::select! {
        known = bundle.wait_for(Option::is_some) => known.ok().and_then(|bundle| bundle.clone()),
        // There is nothing to give up yet.
        request = requests.recv() => {
            drop(request);
            return;
        }
    };
    let Some(bundle) = known else { return };
    let mut ended = false;
    while !ended {
        match Runner::begin(&settings, &bundle, front.clone(), nodes.clone()).await {
            Ok(mut runner) => ended = runner.run(&mut requests).await,
            Err(error) => tracing::error!(error = %error, "the virtual address is not available on this machine"),
        }
        sleep(if ended { Duration::ZERO } else { PAUSE }).await;
    }
}

/// Why the election does not run.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error("`{0}` is not among the bundle's members")]
    NotAMember(MachineName),
    #[error("cannot listen on `{address}`: {source}")]
    Listen {
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error(transparent)]
    Address(#[from] AddressError),
}

struct Runner {
    began: Instant,
    election: Election,
    members: Vec<Member>,
    me: usize,
    own: Ipv4Addr,
    seal: Seal,
    socket: UdpSocket,
    address: Address,
    virtual_address: Ipv4Addr,
    front: watch::Receiver<FrontState>,
    nodes: watch::Receiver<Arc<Nodes>>,
    /// Where promises are noted.
    note: Utf8PathBuf,
    /// Since when this machine has the address.
    held_since: Option<Instant>,
    announced: usize,
    last_announced: Instant,
}

impl Runner {
    async fn begin(
        settings: &Settings,
        bundle: &Bundle,
        front: watch::Receiver<FrontState>,
        nodes: watch::Receiver<Arc<Nodes>>,
    ) -> Result<Self, RunError> {
        let members = bundle.settings.members.clone();
        let me = members.iter().position(|member| member.name == settings.name);
        let me = me.ok_or_else(|| RunError::NotAMember(settings.name.clone()))?;
        let listen = SocketAddr::from((settings.own, ports::VIRTUAL_ADDRESS));
        let socket = UdpSocket::bind(listen).await.map_err(|source| RunError::Listen {
            address: listen,
            source,
        })?;
        let began = Instant::now();
        let process = jiff::Timestamp::now().as_nanosecond().unsigned_abs();
        let process = u64::try_from(process).unwrap_or(u64::from(std::process::id()));
        let note = settings.directory.join("virtual-address.json");
        let promise = bridging_promise(&note);
        Ok(Self {
            began,
            election: Election::new(Terms::DEFAULT, me, members.len(), process, Duration::ZERO, promise),
            me,
            own: settings.own,
            seal: Seal::new(bundle),
            socket,
            address: Address::open(settings.address, settings.own)?,
            virtual_address: settings.address,
            members,
            front,
            nodes,
            note,
            held_since: None,
            announced: 0,
            last_announced: began,
        })
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Runs until asked to end, or (false) until the socket fails.
    async fn run(&mut self, requests: &mut mpsc::Receiver<Request>) -> bool {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut buffer = vec![0; 2048];
        let mut bridge: Option<(oneshot::Sender<()>, Instant)> = None;
        loop {
            let received = tokio::select! {
                request = requests.recv(), if bridge.is_none() => {
                    match request {
                        Some(Request::Bridge(done)) if self.election.holds(self.now()).is_some() => {
                            let outputs = self.election.bridge(self.now());
                            bridge = Some((done, Instant::now()));
                            self.carry_out(outputs).await;
                            if self.bridged() {
                                return true;
                            }
                        }
                        Some(Request::Bridge(_)) => return true,
                        Some(Request::Release(done)) => {
                            let outputs = self.election.release(self.now());
                            self.carry_out(outputs).await;
                            // Whoever asked may be gone, too.
                            let _ = done.send(());
                            return true;
                        }
                        None => {
                            let outputs = self.election.release(self.now());
                            self.carry_out(outputs).await;
                            return true;
                        }
                    }
                    None
                }
                _ = tick.tick() => None,
                received = self.socket.recv_from(&mut buffer) => Some(received),
            };
            let outputs = match received {
                Some(Ok((length, _))) => match self.seal.open(buffer.get(..length).unwrap_or_default()) {
                    Some((from, message)) => self.election.receive(self.now(), from, message),
                    None => Vec::new(),
                },
                // Somebody's port was closed (ICMP); nothing is wrong with this socket.
                Some(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => Vec::new(),
                Some(Err(error)) => {
                    tracing::error!(%error, "virtual address: the socket failed");
                    let outputs = self.election.release(self.now());
                    self.carry_out(outputs).await;
                    return false;
                }
                None if bridge.is_some() => Vec::new(),
                None => self.election.tick(self.now(), self.fit()),
            };
            self.carry_out(outputs).await;
            self.announce_again();
            if let Some((_, since)) = &bridge {
                if self.bridged() {
                    // The promises bridge now: the address stays for as long.
                    return true;
                }
                if since.elapsed() > BRIDGE_LIMIT {
                    tracing::warn!("virtual address: the others promise no longer time; it is given up for now");
                    let outputs = self.election.release(self.now());
                    self.carry_out(outputs).await;
                    return true;
                }
            }
        }
    }

    /// Whether clients that come to this machine find an API.
    fn fit(&self) -> bool {
        let own = SocketAddr::new(self.own.into(), ports::API);
        self.front.borrow().listeners.get(&own) == Some(&ListenerState::Open)
    }

    /// Whether the others' promises bridge the time in which this process is replaced.
    fn bridged(&self) -> bool {
        let now = self.now();
        let until = self.election.holds(now);
        until.is_some_and(|until| until > now + Terms::DEFAULT.lease)
    }

    /// Does what was decided.
    async fn carry_out(&mut self, outputs: Vec<Output>) {
        if outputs.is_empty() {
            return;
        }
        for output in outputs {
            match output {
                Output::Hold { others, .. } => {
                    if let Err(error) = self.address.have(others.saturating_sub(self.now())).await {
                        tracing::error!(error = crate::chain(&error), "virtual address");
                        continue;
                    }
                    if self.held_since.is_none() {
                        tracing::info!(address = %self.virtual_address, "virtual address: this machine has it");
                        self.held_since = Some(Instant::now());
                        self.announced = 0;
                        self.announce_again();
                    }
                }
                Output::Drop => {
                    if self.held_since.take().is_some() {
                        tracing::info!(address = %self.virtual_address, "virtual address: this machine gives it up");
                    }
                    if let Err(error) = self.address.drop_it().await {
                        tracing::error!(error = crate::chain(&error), "virtual address");
                    }
                }
                Output::Send(to, message) => {
                    if let Some(peer) = self.address_of(to) {
                        // A datagram that is lost is sent again in another round.
                        let _ = self.socket.send_to(&self.seal.seal(self.me, message), peer).await;
                    }
                }
            }
        }
        self.note_promise();
    }

    /// Where a machine is: as the API tells, else as the bundle did.
    fn address_of(&self, place: usize) -> Option<SocketAddr> {
        let member = self.members.get(place)?;
        let nodes = self.nodes.borrow();
        let told = nodes
            .get(member.name.as_str())
            .and_then(|node| node.addresses.iter().find(|a| a.is_ipv4()));
        let address: IpAddr = told.copied().unwrap_or(member.address);
        Some(SocketAddr::new(address, ports::VIRTUAL_ADDRESS))
    }

    fn announce_again(&mut self) {
        let Some(since) = self.held_since else { return };
        let due = match ANNOUNCE.get(self.announced) {
            Some(after) => since.elapsed() >= *after,
            None => self.last_announced.elapsed() >= ANNOUNCE_AGAIN,
        };
        if due {
            self.announced += 1;
            self.last_announced = Instant::now();
            if let Err(error) = self.address.announce() {
                tracing::warn!(error = crate::chain(&error), "virtual address");
            }
        }
    }

    /// A promise that outlives the silence of a new process is kept for it.
    fn note_promise(&self) {
        let now = self.now();
        let long = |promise: &Promise| promise.until > now + Terms::DEFAULT.lease;
        let Some(promise) = self.election.promise(now).filter(long) else {
            return;
        };
        let Some(uptime) = uptime() else { return };
        let note = Note {
            to: promise.to,
            round: promise.round,
            until: uptime + promise.until.saturating_sub(now),
        };
        let written = serde_json::to_vec(&note)
            .map_err(|error| error.to_string())
            .and_then(|json| files::write(&self.note, &json, 0o644).map_err(|error| crate::chain(&error)));
        if let Err(error) = written {
            tracing::warn!(error, "virtual address: a promise cannot be noted");
        }
    }
}

/// A promise on disk. Time is that since the host's start, which every process agrees on.
#[derive(Serialize, Deserialize)]
struct Note {
    to: usize,
    round: Round,
    until: Duration,
}

/// The promise that an earlier process noted, with its end from now on.
fn bridging_promise(path: &Utf8Path) -> Option<Promise> {
    let note: Note = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    // After a restart of the host this is wrong, and longer than any promise.
    let left = note.until.checked_sub(uptime()?)?.min(Terms::DEFAULT.bridge);
    Some(Promise {
        to: note.to,
        round: note.round,
        until: left,
    })
}

fn uptime() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/uptime").ok()?;
    Duration::try_from_secs_f64(text.split(' ').next()?.parse().ok()?).ok()
}
