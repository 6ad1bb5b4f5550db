//! etcd members join, are lost, and are replaced: with real etcd processes and TLS, on loopback addresses of their own.

#![cfg(test)]

mod support;

use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use kprov_bootstrap::manifests::EtcdClusterState;
use kprov_bootstrap::pki::{self, Leaf};
use kprov_node::etcd::{EtcdClient, Start, client_url, peer_url, promote, settle};
use kprov_node::https;
use kprov_types::node::{KeyPairPem, Member};
use support::{members, server};

const LIMIT: Duration = Duration::from_secs(40);

struct Cluster {
    dir: tempfile::TempDir,
    members: Vec<Member>,
    client: EtcdClient,
    processes: Vec<Option<Child>>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for process in self.processes.iter_mut().flatten() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Cluster {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let secrets = pki::generate_secrets(&"demo".parse().unwrap(), Timestamp::now()).unwrap();
        let members = members(3, 80);
        let write = |name: &str, pair: &KeyPairPem| {
            std::fs::write(dir.path().join(format!("{name}.crt")), &pair.certificate).unwrap();
            std::fs::write(dir.path().join(format!("{name}.key")), &pair.key).unwrap();
        };
        write("ca", &secrets.etcd_ca);
        for member in &members {
            write(member.name.as_str(), &server(&secrets, member));
        }
        let pair = pki::issue(&secrets.etcd_ca, &Leaf::client("test", None), Timestamp::now()).unwrap();
        let identity = Some((pair.certificate.as_str(), pair.key.as_str()));
        let client = EtcdClient::new(https::client(&secrets.etcd_ca.certificate, identity).unwrap());
        Self {
            dir,
            members,
            client,
            processes: vec![None, None, None],
        }
    }

    fn root(&self) -> &Utf8Path {
        Utf8Path::from_path(self.dir.path()).unwrap()
    }

    fn data(&self, n: usize) -> Utf8PathBuf {
        self.root().join(format!("data-{n}"))
    }

    async fn settle(&self, n: usize, started_before: bool) -> Start {
        let note = |why| println!("cp-{n}: {why}");
        let data = self.data(n);
        let settled = settle(
            &self.client,
            &self.members[n],
            &self.members,
            &data,
            started_before,
            note,
        );
        tokio::time::timeout(LIMIT, settled).await.expect("etcd settles")
    }

    fn start(&mut self, n: usize, start: &Start) {
        let member = &self.members[n];
        let (name, root) = (member.name.as_str(), self.root());
        let list: Vec<_> = start
            .members
            .iter()
            .map(|m| format!("{}={}", m.name, peer_url(m.address)))
            .collect();
        let state = match start.state {
            EtcdClusterState::New => "new",
            EtcdClusterState::Existing => "existing",
        };
        let (client, peer) = (client_url(member.address), peer_url(member.address));
        let mut arguments = vec![
            format!("--name={name}"),
            format!("--data-dir={}", self.data(n)),
            format!("--listen-client-urls={client}"),
            format!("--advertise-client-urls={client}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster={}", list.join(",")),
            format!("--initial-cluster-state={state}"),
            "--initial-cluster-token=demo".into(),
            "--heartbeat-interval=50".into(),
            "--election-timeout=500".into(),
        ];
        for prefix in ["", "peer-"] {
            arguments.push(format!("--{prefix}client-cert-auth=true"));
            arguments.push(format!("--{prefix}trusted-ca-file={root}/ca.crt"));
            arguments.push(format!("--{prefix}cert-file={root}/{name}.crt"));
            arguments.push(format!("--{prefix}key-file={root}/{name}.key"));
        }
        let mut etcd = Command::new("etcd");
        etcd.args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        self.processes[n] = Some(etcd.spawn().expect("etcd is installed"));
    }

    fn kill(&mut self, n: usize) {
        let mut process = self.processes[n].take().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    async fn well(&self, n: usize) {
        let well = async {
            while !self.client.well(self.members[n].address).await {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(LIMIT, well)
            .await
            .unwrap_or_else(|_| panic!("cp-{n} does not get well"));
    }
}

#[tokio::test]
async fn a_cluster_begins_and_a_member_that_lost_its_data_is_replaced() {
    https::use_ring();
    let mut cluster = Cluster::new();
    for n in 0..3 {
        // The second one already finds a peer that answers and has no quorum yet.
        let start = cluster.settle(n, false).await;
        if n == 0 {
            assert_eq!(
                start,
                Start {
                    state: EtcdClusterState::New,
                    members: cluster.members.clone()
                }
            );
        }
        cluster.start(n, &start);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    for n in 0..3 {
        cluster.well(n).await;
    }
    let (before, unhealthy) = cluster.client.look(&cluster.members[2], &cluster.members).await;
    assert!(unhealthy.is_empty(), "{unhealthy:?}");
    let before = before.unwrap().into_iter().find(|m| m.name == "cp-2").unwrap();

    // With its data it simply goes on.
    cluster.kill(2);
    let start = cluster.settle(2, true).await;
    assert_eq!(start.state, EtcdClusterState::Existing);
    cluster.start(2, &start);
    cluster.well(2).await;

    // Without its data, and with another member down, nothing may be changed.
    cluster.kill(2);
    std::fs::remove_dir_all(cluster.data(2)).unwrap();
    cluster.kill(1);
    let notes = Mutex::new(Vec::new());
    let note = |why| notes.lock().unwrap().push(why);
    let data = cluster.data(2);
    let waiting = settle(
        &cluster.client,
        &cluster.members[2],
        &cluster.members,
        &data,
        true,
        note,
    );
    assert!(
        tokio::time::timeout(Duration::from_secs(4), waiting).await.is_err(),
        "it must wait"
    );
    assert!(!notes.lock().unwrap().is_empty());

    // Once the other is back, it is taken out, added, and gets its vote.
    let start = cluster.settle(1, true).await;
    cluster.start(1, &start);
    cluster.well(1).await;
    let start = cluster.settle(2, true).await;
    assert_eq!(start.state, EtcdClusterState::Existing);
    cluster.start(2, &start);
    tokio::time::timeout(LIMIT, promote(&cluster.client, &cluster.members[2], &cluster.members))
        .await
        .unwrap();
    cluster.well(2).await;
    let (after, unhealthy) = cluster.client.look(&cluster.members[0], &cluster.members).await;
    let after = after.unwrap();
    assert_eq!((after.len(), unhealthy), (3, Vec::new()), "{after:?}");
    let mine = after.iter().find(|m| m.name == "cp-2").unwrap();
    assert!(!mine.learner && mine.id != before.id, "{mine:?}");
}
