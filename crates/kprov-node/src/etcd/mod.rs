//! This machine's etcd member: how it starts, into a new cluster or into the one that its peers run; how it is moved to another
//! release ([`OwnMember::run`]); its snapshots, and what puts one back ([`OwnMember::carry_out_restores`]).
//!
//! [`decide`] is pure. Its rules keep the quorum safe: members are taken out or added one at a time, only while every
//! other member is healthy, and a new member begins as a learner, which counts for nothing until it has caught up.

mod client;
mod own;
mod restore;
mod snapshot;
#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::time::Duration;

use camino::Utf8Path;
use kprov_bootstrap::manifests::EtcdClusterState;
use kprov_types::MachineName;
use kprov_types::node::Member;
use kprov_types::ports;

pub use client::{EtcdClient, EtcdError, Header, MemberState};
pub use own::{MemberError, OwnMember, Places, RunError};
pub use restore::{RestoreError, order_restore, restored};
pub use snapshot::{SnapshotError, SnapshotStream, Snapshots};

/// How long to wait before looking again.
const PAUSE: Duration = Duration::from_secs(1);

/// A member as etcd lists it (`etcdserverpb.Member`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdMember {
    /// Its id, an unsigned 64-bit number in decimal digits.
    pub id: String,
    /// Its name; empty until it has started once after it was added.
    pub name: String,
    /// Where other members reach it.
    pub peer_urls: Vec<String>,
    /// Where clients reach it; empty until it has started once.
    pub client_urls: Vec<String>,
    /// Whether it is a learner: it gets the log and has no vote.
    pub learner: bool,
}

impl EtcdMember {
    fn started(&self) -> bool {
        !self.client_urls.is_empty()
    }
}

/// What is known before this machine's etcd runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observation {
    /// The data directory holds a member's data.
    pub data: bool,
    /// etcd ran on this machine before, so that missing data is lost data.
    pub started_before: bool,
    /// The members, as a peer lists them; `None` while no peer answers.
    pub members: Option<Vec<EtcdMember>>,
    /// The other members that do not answer or have no leader, by name or id.
    pub unhealthy: Vec<String>,
}

/// How to start: into which cluster, and with which members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// Whether the cluster is there already.
    pub state: EtcdClusterState,
    /// Its members, this machine included.
    pub members: Vec<Member>,
}

/// The next thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Start etcd.
    Start(Start),
    /// Take this machine's old member, whose data is lost, out of the cluster; then look again.
    Remove {
        /// Its id.
        id: String,
    },
    /// Add this machine as a learner; then look again.
    Add,
    /// Nothing can be done safely; look again.
    Wait {
        /// Why, in words.
        why: String,
    },
}

/// The URL of the peer port at `address`.
pub fn peer_url(address: IpAddr) -> String {
    url(address, ports::ETCD_PEER)
}

/// The URL of the client port at `address`.
pub fn client_url(address: IpAddr) -> String {
    url(address, ports::ETCD_CLIENT)
}

fn url(address: IpAddr, port: u16) -> String {
    format!("https://{}", std::net::SocketAddr::new(address, port))
}

/// Decides how the member of machine `me` starts. `all` are the control-plane machines of the bundle, `me` among them.
pub fn decide(me: &Member, all: &[Member], seen: &Observation) -> Decision {
    let initial = || all.to_vec();
    if seen.data {
        // etcd goes by its data then and does not look at the initial cluster.
        return Decision::Start(Start {
            state: EtcdClusterState::Existing,
            members: initial(),
        });
    }
    let Some(members) = &seen.members else {
        return if seen.started_before {
            Decision::Wait {
                why: "etcd's data on this machine is gone and no other member answers; a new cluster would be an empty one".into(),
            }
        } else {
            Decision::Start(Start {
                state: EtcdClusterState::New,
                members: initial(),
            })
        };
    };
    let mine = peer_url(me.address);
    let safe = |change: Decision, what: &str| match seen.unhealthy.as_slice() {
        [] => change,
        some => Decision::Wait {
            why: format!("{what} has to wait for unhealthy etcd members: {}", some.join(", ")),
        },
    };
    match members.iter().find(|m| m.peer_urls.contains(&mine)) {
        Some(member) if member.started() => safe(
            Decision::Remove { id: member.id.clone() },
            "replacing this machine's lost etcd member",
        ),
        // A peer that only now forms the cluster lists the members it was started with, none of them started yet.
        Some(_) if !members.iter().any(EtcdMember::started) && !seen.started_before => Decision::Start(Start {
            state: EtcdClusterState::New,
            members: initial(),
        }),
        Some(_) => {
            let members = members.iter().filter_map(|m| named(m, all));
            Decision::Start(Start {
                state: EtcdClusterState::Existing,
                members: members.collect(),
            })
        }
        None if members.iter().any(|m| m.learner) => Decision::Wait {
            why: "another etcd member is being added; there can be one learner at a time".into(),
        },
        None => safe(Decision::Add, "adding this machine's etcd member"),
    }
}

/// A listed member with its address, and the name that the bundle gives it where it knows it: etcd compares the addresses of
/// `--initial-cluster` with the cluster's, and of the names only its own.
fn named(listed: &EtcdMember, all: &[Member]) -> Option<Member> {
    let url = listed.peer_urls.first()?;
    if let Some(known) = all.iter().find(|known| peer_url(known.address) == *url) {
        return Some(known.clone());
    }
    let address = url.strip_prefix("https://")?.parse::<std::net::SocketAddr>().ok()?.ip();
    let name = MachineName::new(listed.name.clone()).or_else(|_| MachineName::new(format!("member-{}", listed.id)));
    Some(Member {
        name: name.ok()?,
        address,
    })
}

/// Whether a data directory holds a member's data.
pub fn has_data(directory: &Utf8Path) -> bool {
    directory
        .join("member/wal")
        .read_dir_utf8()
        .is_ok_and(|mut entries| entries.next().is_some())
}

/// Looks, decides and acts until this machine's etcd can start. `note` is told why it has to wait.
pub async fn settle(
    client: &EtcdClient,
    me: &Member,
    all: &[Member],
    data: &Utf8Path,
    started_before: bool,
    note: impl Fn(String),
) -> Start {
    loop {
        let mut seen = Observation {
            data: has_data(data),
            started_before,
            ..Observation::default()
        };
        if !seen.data {
            (seen.members, seen.unhealthy) = client.look(me, all).await;
        }
        let done = match decide(me, all, &seen) {
            Decision::Start(start) => return start,
            Decision::Remove { id } => {
                tracing::warn!(
                    member = id,
                    "this machine's etcd data is lost, taking its old member out of the cluster"
                );
                client.remove(me, all, &id).await
            }
            Decision::Add => {
                tracing::info!("adding this machine to the etcd cluster");
                client.add(me, all).await
            }
            Decision::Wait { why } => {
                note(why);
                Ok(())
            }
        };
        if let Err(error) = done {
            note(crate::chain(&error));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Gives this machine's member its vote once it has caught up; returns when it has it. Level-triggered: it does not matter
/// how the member came to be a learner.
pub async fn promote(client: &EtcdClient, me: &Member, all: &[Member]) {
    let mine = peer_url(me.address);
    loop {
        let (members, _) = client.look(me, all).await;
        match members.and_then(|all| all.into_iter().find(|m| m.peer_urls.contains(&mine))) {
            Some(member) if member.learner => {
                // etcd refuses until the learner is in sync with the leader; that is the expected answer for a while.
                match client.promote(me, all, &member.id).await {
                    Ok(()) => tracing::info!("this machine's etcd member votes now"),
                    Err(error) => tracing::debug!(error = crate::chain(&error), "not promoted yet"),
                }
            }
            Some(_) => return,
            None => {}
        }
        tokio::time::sleep(PAUSE).await;
    }
}
