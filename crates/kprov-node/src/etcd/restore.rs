//! Puts a snapshot in the place of etcd's data.
//!
//! The machine that has the snapshot begins a new cluster of one member; the others join it with empty data, as a member does
//! that has lost them. Nothing is deleted: what was there is moved aside, in the same directory.
//!
//! The order is a file ([`order_restore`]), so that it works without the API and after a power cut. How far it came is what the
//! directory holds: old data aside, a copy being restored, or restored data in place.

use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use kprov_types::api::RestoreOrder;
use kprov_types::node::{ControlPlaneSettings, Member};
use kprov_types::release::ImageComponent;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::own::{MemberError, OwnMember, Places, read_json, write_json};
use super::snapshot::SnapshotError;
use super::{has_data, peer_url, promote, settle};
use crate::files::{self, failed};

/// How often to look for an order.
const LOOK: Duration = Duration::from_secs(1);
/// How long to wait before something is tried again that went wrong.
const AGAIN: Duration = Duration::from_secs(5);
/// How long clients of the API wait at most.
const HOLD: Duration = Duration::from_mins(3);
/// How long etcd may take to end.
const STOP_LIMIT: Duration = Duration::from_mins(1);
/// How long etcd may take to be restored and healthy: databases are up to 8 GiB.
const RESTORE_LIMIT: Duration = Duration::from_mins(10);
/// Where the restored data are until they are known to work, below the data directory.
const COPY: &str = "restored";
/// Where the containers see snapshots.
const SNAPSHOTS: &str = "/snapshots";

/// Why data cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The member.
    #[error(transparent)]
    Member(#[from] MemberError),
    /// One at a time.
    #[error("the restore `{0}` is under way")]
    Busy(String),
    /// It takes longer than it should; what is there stays as it is.
    #[error("etcd is not healthy with the restored data yet")]
    Slow,
    /// Another order has come.
    #[error("another restore was ordered meanwhile")]
    Superseded,
    /// The restored etcd does not work.
    #[error("etcd did not get healthy from the snapshot `{0}`; the data of before are back")]
    Unhealthy(String),
    /// The processes of the control plane.
    #[error("this machine's processes cannot be listed")]
    Processes(#[source] std::io::Error),
}

impl From<files::FileError> for RestoreError {
    fn from(error: files::FileError) -> Self {
        Self::Member(error.into())
    }
}

impl RestoreError {
    /// Whether trying again can't help, and everything is as it was before.
    fn is_final(&self) -> bool {
        matches!(self, Self::Unhealthy(_) | Self::Snapshot(_))
    }
}

/// A restore that is under way, or failed.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Restoring {
    order: RestoreOrder,
    /// Where the data of before are moved to, below the data directory.
    aside: String,
    /// It has begun here, and the snapshot is on this machine.
    #[serde(default)]
    begins: Option<bool>,
    /// The cluster that this machine was in before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cluster: Option<String>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    failed: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Restored {
    id: String,
}

impl Places {
    fn restoring(&self) -> Utf8PathBuf {
        self.state.join("etcd-restore.json")
    }

    fn restored(&self) -> Utf8PathBuf {
        self.state.join("etcd-restored.json")
    }
}

/// Writes down that data are to be restored, unless that was done before: on a machine where kprov-node runs, it does it.
/// Each id is carried out once, and one that has failed stays so: order another.
pub fn order_restore(order: &RestoreOrder) -> Result<(), RestoreError> {
    write_order(&Places::default(), order)
}

fn write_order(places: &Places, order: &RestoreOrder) -> Result<(), RestoreError> {
    places.snapshots().database(&order.snapshot)?;
    let done: Option<Restored> = read_json(&places.restored())?;
    if done.is_some_and(|done| done.id == order.id) {
        return Ok(());
    }
    let now: Option<Restoring> = read_json(&places.restoring())?;
    let aside = format!("data.{}", Timestamp::now().strftime("%Y%m%dT%H%M%SZ"));
    let (aside, cluster) = match now {
        Some(now) if now.order.id == order.id => return Ok(()),
        // It waits for another machine, with its data aside already.
        Some(now) if now.failed.is_none() && now.begins == Some(false) => (now.aside, now.cluster),
        Some(now) if now.failed.is_none() => return Err(RestoreError::Busy(now.order.id)),
        _ => (aside, None),
    };
    let restoring = Restoring {
        order: order.clone(),
        aside,
        begins: None,
        cluster,
        failed: None,
    };
    Ok(write_json(&places.restoring(), &restoring)?)
}

/// The id of the last restore that was carried out on this machine, and what the one under way does or failed at: for
/// `kprov-node etcd restore`, which waits for it.
pub fn restored() -> (Option<String>, Option<String>) {
    look(&Places::default())
}

fn look(places: &Places) -> (Option<String>, Option<String>) {
    let done: Option<Restored> = read_json(&places.restored()).ok().flatten();
    let now: Option<Restoring> = read_json(&places.restoring()).ok().flatten();
    let message = now.map(|Restoring { order, failed, .. }| match failed {
        None => format!("restoring etcd from the snapshot `{}`", order.snapshot),
        Some(why) => format!(
            "etcd could not be restored from the snapshot `{}`: {why}",
            order.snapshot
        ),
    });
    (done.map(|done| done.id), message)
}

/// What is to be done next on the machine that begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Stop etcd and move its data aside.
    MoveAside,
    /// Restore a copy, beside.
    Restore,
    /// Go on with the restored data, which are in place.
    GoOn,
}

/// Decides by what the data directory holds.
fn next(aside: bool, data: bool) -> Next {
    match (aside, data) {
        (false, _) => Next::MoveAside,
        (true, false) => Next::Restore,
        (true, true) => Next::GoOn,
    }
}

impl OwnMember {
    /// Writes down that data are to be restored (`spec.restore`), unless that was done before. [`Self::carry_out_restores`] does
    /// it.
    pub fn order_restore(&self, order: &RestoreOrder) -> Result<(), RestoreError> {
        write_order(&self.places, order)
    }

    /// The id of the last restore that was carried out here (`status.restored`), and what the one under way does or failed at.
    pub fn restored(&self) -> (Option<String>, Option<String>) {
        look(&self.places)
    }

    fn restoring(&self) -> Option<Restoring> {
        let now: Option<Restoring> = read_json(&self.places.restoring()).ok().flatten();
        now.filter(|now| now.failed.is_none())
    }

    pub(super) fn restore_is_due(&self) -> bool {
        self.restoring().is_some()
    }

    /// Carries out restores as they are ordered. Never ends: spawn it before [`Self::start`]. `running` are the settings of the
    /// release that runs.
    pub async fn carry_out_restores(self, running: ControlPlaneSettings) {
        loop {
            if let Some(restoring) = self.restoring()
                && let Err(error) = self.restore(restoring.clone(), &running).await
            {
                tracing::error!(error = crate::chain(&error), "etcd is not restored");
                let failed = Restoring {
                    failed: Some(crate::chain(&error)),
                    ..restoring
                };
                if error.is_final()
                    && let Err(error) = write_json(&self.places.restoring(), &failed)
                {
                    tracing::error!(error = crate::chain(&error), "the restore's end cannot be noted");
                }
                sleep(AGAIN).await;
            }
            sleep(LOOK).await;
        }
    }

    async fn restore(&self, mut restoring: Restoring, running: &ControlPlaneSettings) -> Result<(), RestoreError> {
        let _one = self.work.lock().await;
        let order = restoring.order.clone();
        let begins = order.from == self.me.name.as_str();
        tracing::warn!(
            snapshot = order.snapshot,
            id = order.id,
            begins,
            "etcd's data are being restored"
        );
        if begins {
            let (snapshots, name) = (self.places.snapshots(), order.snapshot.clone());
            let verified = tokio::task::spawn_blocking(move || snapshots.verify(&name)).await;
            verified.map_err(|error| failed("read", self.places.snapshots().directory())(error.into()))??;
        }
        if restoring.begins.is_none() {
            restoring.begins = Some(begins);
            restoring.cluster = match restoring.cluster {
                None => self.cluster().await,
                known => known,
            };
            write_json(&self.places.restoring(), &restoring)?;
        }
        let served = self.api_servers();
        let _held = self.front.hold(HOLD);
        let aside = self.data.join(&restoring.aside);
        if next(aside.exists(), has_data(&self.data)) == Next::MoveAside {
            self.stop(&self.data.join("member")).await?;
            self.move_aside(&aside)?;
        }
        if begins {
            if next(aside.exists(), has_data(&self.data)) == Next::Restore {
                self.restore_copy(&order, &aside, running).await?;
            }
            self.go_on(running)?;
        } else {
            self.join(&order, restoring.cluster.as_deref(), running).await?;
        }
        if !self.healthy(None, RESTORE_LIMIT).await {
            return Err(RestoreError::Slow);
        }
        // What they remember is of a later time than what etcd holds now; they would wait for it to come again.
        let ended = (self.restart_control_plane)().map_err(RestoreError::Processes)?;
        tracing::info!(ended, "the control plane starts again, with what etcd holds now");
        self.api_is_ready(&served).await;
        write_json(&self.places.restored(), &Restored { id: order.id.clone() })?;
        files::remove(&self.places.restoring())?;
        tracing::warn!(snapshot = order.snapshot, aside = %aside, "etcd's data are restored; those of before are kept");
        Ok(())
    }

    /// The cluster that this machine's member, or another one, is in.
    async fn cluster(&self) -> Option<String> {
        for member in std::iter::once(&self.me).chain(&self.all) {
            if let Ok(state) = self.client.state(member.address).await {
                return Some(state.header.cluster_id);
            }
        }
        None
    }

    /// Takes etcd's static pod away, and waits until its process is gone from `member`.
    async fn stop(&self, member: &Utf8Path) -> Result<(), RestoreError> {
        files::remove(&self.places.manifest())?;
        Ok(self.released(member, STOP_LIMIT).await?)
    }

    /// In one step, so that a crash leaves one state or the other.
    fn move_aside(&self, aside: &Utf8Path) -> Result<(), RestoreError> {
        let member = self.data.join("member");
        if member.exists() {
            std::fs::rename(&member, aside).map_err(failed("move", &member))?;
        } else {
            files::make_directory(aside, 0o700)?;
        }
        Ok(())
    }

    /// Restores into a directory beside, has etcd run from there until it is healthy, and then puts the data in place.
    async fn restore_copy(
        &self,
        order: &RestoreOrder,
        aside: &Utf8Path,
        running: &ControlPlaneSettings,
    ) -> Result<(), RestoreError> {
        let copy = self.data.join(COPY);
        let member = copy.join("member");
        // From an attempt that was cut off.
        self.stop(&member).await?;
        remove_tree(&copy)?;
        let settings = self.own_settings(running)?;
        let pod = self.render(&settings, self.with_data())?;
        self.place(&self.restore_pod(pod, order, &settings))?;
        let healthy = self.healthy(None, RESTORE_LIMIT).await;
        self.stop(&member).await?;
        if healthy {
            let place = self.data.join("member");
            std::fs::rename(&member, &place).map_err(failed("move", &member))?;
            return Ok(remove_tree(&copy)?);
        }
        remove_tree(&copy)?;
        if aside.join("wal").exists() {
            let place = self.data.join("member");
            std::fs::rename(aside, &place).map_err(failed("move", aside))?;
            self.go_on(running)?;
        }
        Err(RestoreError::Unhealthy(order.snapshot.clone()))
    }

    /// etcd's static pod with a container before it that restores, both with the copy's directory.
    fn restore_pod(&self, mut pod: Value, order: &RestoreOrder, settings: &ControlPlaneSettings) -> Value {
        let version = settings
            .release
            .image(ImageComponent::Etcd)
            .and_then(|image| image.version.as_deref());
        let name = self.me.name.as_str();
        let peer = peer_url(self.me.address);
        let container = &mut pod["spec"]["containers"][0];
        let command = container["command"].as_array().cloned().unwrap_or_default();
        let arguments = command.iter().filter_map(Value::as_str);
        let data = arguments.clone().find_map(|flag| flag.strip_prefix("--data-dir="));
        let copy = format!("--data-dir={}/{COPY}", data.unwrap_or_default());
        let here: Vec<&str> = arguments
            .map(|flag| {
                if flag.starts_with("--data-dir=") {
                    copy.as_str()
                } else {
                    flag
                }
            })
            .collect();
        let mut before = container.clone();
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
            if let Some(fields) = before.as_object_mut() {
                fields.remove(probe);
            }
        }
        before["name"] = json!("restore");
        before["command"] = json!([
            format!("/usr/local/bin/{}", restore_program(version)),
            "snapshot",
            "restore",
            format!("{SNAPSHOTS}/{}.db", order.snapshot),
            format!("--name={name}"),
            copy,
            format!("--initial-cluster={name}={peer}"),
            // A token of its own, so that members of the cluster of before can't meet it by mistake.
            format!("--initial-cluster-token={}-{}", settings.cluster, order.id),
            format!("--initial-advertise-peer-urls={peer}"),
        ]);
        if let Some(mounts) = before["volumeMounts"].as_array_mut() {
            mounts.push(json!({ "name": "snapshots", "mountPath": SNAPSHOTS, "readOnly": true }));
        }
        container["command"] = json!(here);
        pod["spec"]["initContainers"] = json!([before]);
        if let Some(volumes) = pod["spec"]["volumes"].as_array_mut() {
            let path = self.places.snapshots().directory().to_owned();
            volumes.push(json!({ "name": "snapshots", "hostPath": { "path": path, "type": "Directory" } }));
        }
        pod
    }

    /// Has etcd run with the data that are in place.
    fn go_on(&self, running: &ControlPlaneSettings) -> Result<(), RestoreError> {
        let settings = self.own_settings(running)?;
        Ok(self.place(&self.render(&settings, self.with_data())?)?)
    }

    /// Joins the cluster that the machine `order.from` has begun.
    async fn join(
        &self,
        order: &RestoreOrder,
        before: Option<&str>,
        running: &ControlPlaneSettings,
    ) -> Result<(), RestoreError> {
        let (first, others): (Vec<Member>, Vec<Member>) = self
            .all
            .iter()
            .cloned()
            .partition(|member| member.name.as_str() == order.from);
        let start = if has_data(&self.data) {
            self.with_data()
        } else {
            for member in &first {
                while !self.has_begun(member, before).await {
                    if self.restoring().is_none_or(|now| now.order.id != order.id) {
                        return Err(RestoreError::Superseded);
                    }
                    sleep(LOOK).await;
                }
            }
            // It is asked before the others, which may not have left the cluster of before yet.
            let all = [first, others].concat();
            let note = |why: String| tracing::info!(why, "joining the restored cluster");
            settle(&self.client, &self.me, &all, &self.data, true, note).await
        };
        let settings = self.own_settings(running)?;
        self.place(&self.render(&settings, start)?)?;
        let deadline = Instant::now() + RESTORE_LIMIT;
        while !self.client.well(self.me.address).await && Instant::now() < deadline {
            sleep(LOOK).await;
        }
        promote(&self.client, &self.me, &self.all).await;
        Ok(())
    }

    /// Whether the member serves another cluster than the one of before; where that is not known, one that this machine is no
    /// started member of.
    async fn has_begun(&self, member: &Member, before: Option<&str>) -> bool {
        let Ok(state) = self.client.state(member.address).await else {
            return false;
        };
        if let Some(before) = before {
            return state.has_leader() && state.header.cluster_id != before;
        }
        let mine = peer_url(self.me.address);
        let members = self.client.members(member.address).await;
        members.is_ok_and(|members| !members.iter().any(|m| m.peer_urls.contains(&mine) && m.started()))
    }
}

/// The program of an etcd image that restores snapshots: 3.6 has taken that out of `etcdctl`.
fn restore_program(version: Option<&str>) -> &'static str {
    let mut numbers = version
        .unwrap_or_default()
        .trim_start_matches('v')
        .split('.')
        .map(|number| number.parse().unwrap_or(0_u32));
    let line = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if line >= (3, 6) { "etcdutl" } else { "etcdctl" }
}

fn remove_tree(path: &Utf8Path) -> Result<(), files::FileError> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_directory_holds_says_what_is_next() {
        // Data that are there before anything was moved aside are the old ones; afterwards they are the restored ones.
        assert_eq!(next(false, true), Next::MoveAside);
        assert_eq!(next(false, false), Next::MoveAside);
        assert_eq!(next(true, false), Next::Restore);
        assert_eq!(next(true, true), Next::GoOn);
    }

    #[test]
    fn the_program_that_restores() {
        for (version, program) in [
            (None, "etcdctl"),
            (Some("3.4.23"), "etcdctl"),
            (Some("v3.5.30"), "etcdctl"),
            (Some("3.6.5-0"), "etcdutl"),
            (Some("4.0.0"), "etcdutl"),
        ] {
            assert_eq!(restore_program(version), program, "{version:?}");
        }
    }

    #[test]
    fn an_order_is_taken_once() {
        let dir = tempfile::tempdir().unwrap();
        let state = Utf8Path::from_path(dir.path()).unwrap().to_owned();
        let places = Places {
            state,
            ..Places::default()
        };
        let order = |id: &str| RestoreOrder {
            snapshot: "before".into(),
            id: id.into(),
            from: "cp-0".into(),
        };
        write_order(&places, &order("one")).unwrap();
        let first: Restoring = read_json(&places.restoring()).unwrap().unwrap();
        write_order(&places, &order("one")).unwrap();
        let again: Restoring = read_json(&places.restoring()).unwrap().unwrap();
        assert_eq!(first.aside, again.aside, "where the data went is not forgotten");
        assert!(matches!(write_order(&places, &order("two")), Err(RestoreError::Busy(id)) if id == "one"));
        assert!(look(&places).1.unwrap().contains("`before`"));

        let failed = Restoring {
            failed: Some("no".into()),
            ..first
        };
        write_json(&places.restoring(), &failed).unwrap();
        write_order(&places, &order("one")).unwrap();
        assert!(
            look(&places).1.unwrap().contains("could not"),
            "what has failed is not tried again"
        );
        write_order(&places, &order("two")).unwrap();
        write_json(&places.restored(), &Restored { id: "two".into() }).unwrap();
        files::remove(&places.restoring()).unwrap();
        write_order(&places, &order("two")).unwrap();
        assert_eq!(
            look(&places),
            (Some("two".into()), None),
            "what was done is not done again"
        );
        let bad = RestoreOrder {
            snapshot: "../x".into(),
            ..order("three")
        };
        assert!(matches!(write_order(&places, &bad), Err(RestoreError::Snapshot(_))));
    }
}
