//! Where a new connection goes. Pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use kprov_types::ports;
use serde::{Deserialize, Serialize};

/// One API server that connections can go to. The order is that of preference: local ones last to first revision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Backend {
    /// A process on this machine, bound to its revision's address ([`ports::revision_address`]).
    Local {
        /// Its revision.
        revision: u16,
        /// Its port, [`ports::API`] outside tests.
        port: u16,
    },
    /// Anything else: another control-plane machine's front, or the cluster's endpoint.
    Remote(SocketAddr),
}

impl Backend {
    /// The address to connect to.
    pub fn address(&self) -> SocketAddr {
        match *self {
            Self::Local { revision, port } => SocketAddr::from((ports::revision_address(revision), port)),
            Self::Remote(address) => address,
        }
    }

    /// Whether it is on this machine.
    pub fn is_local(&self) -> bool {
        matches!(self, Self::Local { .. })
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local { revision, .. } => write!(f, "revision {revision}"),
            Self::Remote(address) => address.fmt(f),
        }
    }
}

/// Which backends a listener may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// This machine's own revisions only.
    Local,
    /// This machine's own revisions, and then the remote ones.
    LocalThenRemote,
    /// The remote ones only.
    Remote,
}

/// What a listener does when none of its backends is usable ([`Standing`](crate::health::Standing)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenEmpty {
    /// It stops listening until one is, so that a load balancer's TCP check fails at once.
    Close,
    /// It stops listening too, but not while a process of this machine listens that is not ready yet: then it is as with
    /// [`WhenEmpty::Hold`].
    CloseUnlessStarting(Duration),
    /// It accepts, waits this long for one to become usable, and then resets the connection. Zero resets at once.
    Hold(Duration),
    /// It accepts, and tries those that are down too, as cloud load balancers do ("fail open", in AWS' words), for two seconds
    /// before it resets the connection: what refused it may be about to take it.
    TryAll,
}

/// One address that the front listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// The address.
    pub address: SocketAddr,
    /// Where its connections go.
    pub pool: Pool,
    /// What happens when they can go nowhere.
    pub when_empty: WhenEmpty,
}

impl Listener {
    /// How long loopback clients are held while nothing is ready.
    pub const LOOPBACK_HOLD: Duration = Duration::from_secs(5);

    /// A control-plane machine's own address: this machine's revisions, closed while none is usable.
    pub fn machine(address: IpAddr) -> Self {
        Self {
            address: SocketAddr::new(address, ports::API),
            pool: Pool::Local,
            when_empty: WhenEmpty::Close,
        }
    }

    /// 127.0.0.1 on a control-plane machine: this machine's revisions, then the other machines'.
    ///
    /// Clients are held only for an API server that is on its way. A kubelet that starts with pods from before its machine
    /// was switched off asks for its Node before it starts anything, etcd included: client-go takes a refused connection for
    /// an answer, but tries ten times again, in more than a minute, when it was held and then reset.
    pub fn control_plane_loopback() -> Self {
        Self {
            pool: Pool::LocalThenRemote,
            when_empty: WhenEmpty::CloseUnlessStarting(Self::LOOPBACK_HOLD),
            ..Self::worker_loopback()
        }
    }

    /// 127.0.0.1 on a worker: all control-plane machines in turn.
    pub fn worker_loopback() -> Self {
        Self {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, ports::API)),
            pool: Pool::Remote,
            when_empty: WhenEmpty::Hold(Self::LOOPBACK_HOLD),
        }
    }
}

/// The backends to try for one new connection, best first: the highest revision and then the lower ones; then the
/// remotes, beginning with the one that `cursor` points at.
///
/// `ready` lists the backends that are equally well, in any order. A caller that raises `cursor` by one for each connection gets
/// round robin.
pub fn candidates(pool: Pool, ready: impl IntoIterator<Item = Backend>, cursor: usize) -> Vec<Backend> {
    let (mut local, mut remote): (Vec<_>, Vec<_>) = ready.into_iter().partition(Backend::is_local);
    local.sort_unstable_by(|a, b| b.cmp(a));
    remote.sort_unstable();
    if !remote.is_empty() {
        let first = cursor % remote.len();
        remote.rotate_left(first);
    }
    match pool {
        Pool::Local => local,
        Pool::Remote => remote,
        Pool::LocalThenRemote => {
            local.append(&mut remote);
            local
        }
    }
}

/// The backend a new connection goes to if it can be reached: the first of [`candidates`].
pub fn choose(pool: Pool, ready: impl IntoIterator<Item = Backend>, cursor: usize) -> Option<Backend> {
    candidates(pool, ready, cursor).into_iter().next()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn local(revision: u16) -> Backend {
        Backend::Local {
            revision,
            port: ports::API,
        }
    }

    fn remote(last: u8) -> Backend {
        Backend::Remote(SocketAddr::from(([10, 0, 0, last], ports::API)))
    }

    #[test]
    fn the_highest_ready_revision_goes_first() {
        assert_eq!(choose(Pool::Local, [local(1), local(3), local(2)], 7), Some(local(3)));
        assert_eq!(
            candidates(Pool::Local, [local(2), local(300)], 0),
            [local(300), local(2)]
        );
    }

    #[test]
    fn remotes_are_used_only_where_allowed_and_after_local_ones() {
        let ready = [remote(1), local(2)];
        assert_eq!(candidates(Pool::Local, ready, 0), [local(2)]);
        assert_eq!(candidates(Pool::Remote, ready, 0), [remote(1)]);
        assert_eq!(candidates(Pool::LocalThenRemote, ready, 0), [local(2), remote(1)]);
        assert_eq!(choose(Pool::Local, [remote(1)], 0), None);
        assert_eq!(choose(Pool::LocalThenRemote, [remote(1)], 0), Some(remote(1)));
    }

    #[test]
    fn remotes_take_turns() {
        let ready = [remote(3), remote(1), remote(2)];
        let turns: Vec<_> = (0..4)
            .filter_map(|cursor| choose(Pool::Remote, ready, cursor))
            .collect();
        assert_eq!(turns, [remote(1), remote(2), remote(3), remote(1)]);
        assert_eq!(candidates(Pool::Remote, ready, 1), [remote(2), remote(3), remote(1)]);
    }

    #[test]
    fn addresses() {
        assert_eq!(local(258).address(), "127.64.1.2:6443".parse().unwrap());
        assert_eq!(remote(9).address(), "10.0.0.9:6443".parse().unwrap());
    }

    proptest! {
        #[test]
        fn every_allowed_backend_is_tried_once(
            revisions in prop::collection::btree_set(any::<u16>(), 0..5),
            machines in prop::collection::btree_set(any::<u8>(), 0..5),
            cursor: usize,
        ) {
            let ready: Vec<_> = revisions.iter().map(|r| local(*r)).chain(machines.iter().map(|m| remote(*m))).collect();
            let mut tried = candidates(Pool::LocalThenRemote, ready.clone(), cursor);
            prop_assert_eq!(choose(Pool::LocalThenRemote, ready.clone(), cursor), tried.first().copied());
            tried.sort_unstable();
            let mut all = ready;
            all.sort_unstable();
            prop_assert_eq!(tried, all);
        }
    }
}
