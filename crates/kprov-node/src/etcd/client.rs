//! etcd's cluster and maintenance API by its JSON gateway (etcd's documentation, "gRPC gateway"): a few calls need no generated
//! client.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use http_body_util::Full;
use kprov_types::node::Member;
use kprov_types::ports;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::snapshot::SnapshotStream;
use super::{EtcdMember, peer_url};
use crate::https::{self, HttpsError};

/// How long a peer may take to list members or tell its state.
const LOOK_LIMIT: Duration = Duration::from_secs(2);
/// How long a change of membership may take: it needs the quorum's agreement.
const CHANGE_LIMIT: Duration = Duration::from_secs(10);

/// Why etcd did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// There is no other member to ask.
    #[error("no other etcd member could be asked for `{path}`")]
    NoPeer {
        /// The call.
        path: &'static str,
    },
    /// No answer.
    #[error("etcd at `{address}` did not answer")]
    NoAnswer {
        /// The member asked.
        address: IpAddr,
        /// Why.
        #[source]
        source: HttpsError,
    },
    /// etcd refused.
    #[error("etcd at `{address}` refused `{path}`: {message}")]
    Refused {
        /// The member asked.
        address: IpAddr,
        /// The call.
        path: &'static str,
        /// Its words.
        message: String,
    },
    /// The answer is not what the API says.
    #[error("etcd at `{address}` gave an answer that is not understood")]
    Answer {
        /// The member asked.
        address: IpAddr,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

#[derive(Deserialize)]
struct MemberList {
    #[serde(default)]
    members: Vec<WireMember>,
}

/// The gateway leaves out what is empty, zero or false, and writes 64-bit numbers as text.
#[derive(Deserialize)]
#[serde(default)]
struct WireMember {
    #[serde(rename = "ID")]
    id: String,
    name: String,
    #[serde(rename = "peerURLs")]
    peer_urls: Vec<String>,
    #[serde(rename = "clientURLs")]
    client_urls: Vec<String>,
    #[serde(rename = "isLearner")]
    learner: bool,
}

impl Default for WireMember {
    fn default() -> Self {
        Self {
            id: "0".into(),
            name: String::new(),
            peer_urls: Vec::new(),
            client_urls: Vec::new(),
            learner: false,
        }
    }
}

impl From<WireMember> for EtcdMember {
    fn from(member: WireMember) -> Self {
        let WireMember {
            id,
            name,
            peer_urls,
            client_urls,
            learner,
        } = member;
        Self {
            id,
            name,
            peer_urls,
            client_urls,
            learner,
        }
    }
}

/// What a member tells of itself (`etcdserverpb.StatusResponse`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct MemberState {
    /// Which cluster it is in.
    pub header: Header,
    /// Its version.
    pub version: String,
    /// The size of its database in bytes, a number in decimal digits.
    #[serde(rename = "dbSize")]
    pub database_size: String,
    /// The leader's id; empty or `0` where it knows none.
    pub leader: String,
    /// It is a learner, without a vote.
    #[serde(rename = "isLearner")]
    pub learner: bool,
}

/// `etcdserverpb.ResponseHeader`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Header {
    /// The cluster's id, a number in decimal digits.
    pub cluster_id: String,
}

impl MemberState {
    /// Whether it knows a leader.
    pub fn has_leader(&self) -> bool {
        !matches!(self.leader.as_str(), "" | "0")
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct AlarmList {
    alarms: Vec<Alarm>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Alarm {
    alarm: String,
}

/// A client of the cluster's members.
#[derive(Clone)]
pub struct EtcdClient {
    tls: Arc<ClientConfig>,
}

impl EtcdClient {
    /// `tls` trusts etcd's CA and shows a client certificate of it.
    pub const fn new(tls: Arc<ClientConfig>) -> Self {
        Self { tls }
    }

    async fn send(
        &self,
        address: IpAddr,
        request: http::Request<Full<Bytes>>,
        limit: Duration,
    ) -> Result<http::Response<Bytes>, EtcdError> {
        let target = SocketAddr::new(address, ports::ETCD_CLIENT);
        https::send(&self.tls, target, ServerName::from(address), request, limit)
            .await
            .map_err(|source| EtcdError::NoAnswer { address, source })
    }

    async fn call<T: DeserializeOwned>(
        &self,
        address: IpAddr,
        path: &'static str,
        body: &Value,
        limit: Duration,
    ) -> Result<T, EtcdError> {
        let request = request(http::Method::POST, path, body.to_string());
        let answer = self.send(address, request, limit).await?;
        if !answer.status().is_success() {
            let body: Value = serde_json::from_slice(answer.body()).unwrap_or_default();
            let message = body
                .get("message")
                .or_else(|| body.get("error"))
                .and_then(Value::as_str)
                .map(str::to_owned);
            let message = message.unwrap_or_else(|| answer.status().to_string());
            return Err(EtcdError::Refused { address, path, message });
        }
        serde_json::from_slice(answer.body()).map_err(|source| EtcdError::Answer { address, source })
    }

    /// The members as the first peer that answers lists them, and those among them, this machine's aside, that are not
    /// well. Asks all peers at once.
    pub async fn look(&self, me: &Member, all: &[Member]) -> (Option<Vec<EtcdMember>>, Vec<String>) {
        let peers: Vec<_> = all.iter().filter(|m| m.address != me.address).collect();
        let nothing = json!({});
        let list = |address| self.call::<MemberList>(address, "/v3/cluster/member/list", &nothing, LOOK_LIMIT);
        let well = |address| self.well(address);
        let (lists, states) = tokio::join!(
            join_all(peers.iter().map(|m| list(m.address))),
            join_all(peers.iter().map(|m| well(m.address)))
        );
        let members = lists.into_iter().find_map(|answer| match answer {
            Ok(list) => Some(list.members),
            Err(error) => {
                tracing::debug!(error = crate::chain(&error), "an etcd peer did not answer");
                None
            }
        });
        let Some(members) = members else {
            return (None, Vec::new());
        };
        let members: Vec<EtcdMember> = members.into_iter().map(EtcdMember::from).collect();
        let mine = peer_url(me.address);
        let unhealthy = members
            .iter()
            .filter(|m| !m.peer_urls.contains(&mine))
            .filter(|m| {
                let state = peers
                    .iter()
                    .zip(&states)
                    .find(|(p, _)| m.peer_urls.contains(&peer_url(p.address)));
                !state.is_some_and(|(_, well)| *well)
            })
            .map(|m| {
                if m.name.is_empty() {
                    m.id.clone()
                } else {
                    m.name.clone()
                }
            })
            .collect();
        (Some(members), unhealthy)
    }

    /// Whether the member at `address` answers and knows a leader.
    pub async fn well(&self, address: IpAddr) -> bool {
        self.state(address).await.is_ok_and(|state| state.has_leader())
    }

    /// What the member at `address` tells of itself.
    pub async fn state(&self, address: IpAddr) -> Result<MemberState, EtcdError> {
        self.call(address, "/v3/maintenance/status", &json!({}), LOOK_LIMIT)
            .await
    }

    /// The members as the one at `address` lists them.
    pub async fn members(&self, address: IpAddr) -> Result<Vec<EtcdMember>, EtcdError> {
        let list: MemberList = self
            .call(address, "/v3/cluster/member/list", &json!({}), LOOK_LIMIT)
            .await?;
        Ok(list.members.into_iter().map(EtcdMember::from).collect())
    }

    /// The alarms that the cluster has raised, such as `NOSPACE`.
    pub async fn alarms(&self, address: IpAddr) -> Result<Vec<String>, EtcdError> {
        let body = json!({ "action": "GET" });
        let list: AlarmList = self.call(address, "/v3/maintenance/alarm", &body, LOOK_LIMIT).await?;
        Ok(list.alarms.into_iter().map(|alarm| alarm.alarm).collect())
    }

    /// What tells one process of the member at `address` from the next: when it was started, as it says itself; `None` where
    /// it does not say.
    pub async fn process(&self, address: IpAddr) -> Result<Option<String>, EtcdError> {
        let request = request(http::Method::GET, "/metrics", String::new());
        let answer = self.send(address, request, LOOK_LIMIT).await?;
        let text = String::from_utf8_lossy(answer.body()).into_owned();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("process_start_time_seconds "));
        Ok(line.map(str::to_owned))
    }

    /// Has the member at `address` send its database.
    pub async fn snapshot(&self, address: IpAddr) -> Result<SnapshotStream, EtcdError> {
        let path = "/v3/maintenance/snapshot";
        let request = request(http::Method::POST, path, "{}".into());
        SnapshotStream::open(&self.tls, address, request).await
    }

    /// Asks the peers one after the other until one agrees.
    async fn change(&self, me: &Member, all: &[Member], path: &'static str, body: Value) -> Result<(), EtcdError> {
        let mut last = EtcdError::NoPeer { path };
        for peer in all.iter().filter(|m| m.address != me.address) {
            match self.call::<Value>(peer.address, path, &body, CHANGE_LIMIT).await {
                Ok(_) => return Ok(()),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Adds this machine as a learner.
    pub async fn add(&self, me: &Member, all: &[Member]) -> Result<(), EtcdError> {
        let body = json!({ "peerURLs": [peer_url(me.address)], "isLearner": true });
        self.change(me, all, "/v3/cluster/member/add", body).await
    }

    /// Takes a member out of the cluster.
    pub async fn remove(&self, me: &Member, all: &[Member], id: &str) -> Result<(), EtcdError> {
        self.change(me, all, "/v3/cluster/member/remove", json!({ "ID": id }))
            .await
    }

    /// Makes a learner a voting member.
    pub async fn promote(&self, me: &Member, all: &[Member], id: &str) -> Result<(), EtcdError> {
        self.change(me, all, "/v3/cluster/member/promote", json!({ "ID": id }))
            .await
    }
}

fn request(method: http::Method, path: &'static str, body: String) -> http::Request<Full<Bytes>> {
    let mut request = http::Request::new(Full::new(Bytes::from(body)));
    *request.method_mut() = method;
    *request.uri_mut() = http::Uri::from_static(path);
    let headers = request.headers_mut();
    headers.insert(http::header::HOST, http::HeaderValue::from_static("etcd"));
    headers.insert(
        http::header::CONTENT_TYPE,
        http::HeaderValue::from_static("application/json"),
    );
    request
}
