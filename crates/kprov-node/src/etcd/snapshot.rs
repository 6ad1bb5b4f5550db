//! Snapshots of etcd's database: taken from a running member, verified, kept for a while.

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use camino::{Utf8Path, Utf8PathBuf};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use jiff::{SignedDuration, Timestamp};
use kprov_types::Digest;
use kprov_types::api::SnapshotStatus;
use kprov_types::ports;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

use super::client::{EtcdClient, EtcdError};
use crate::files::{self, FileError, failed};
use crate::https::HttpsError;

/// So many of the newest are kept, however old.
const KEPT: usize = 3;
/// At most so many are kept.
const MOST: usize = 10;
/// Others than the newest [`KEPT`] are kept no longer than this.
const OLDEST: SignedDuration = SignedDuration::from_hours(30 * 24);
/// How long etcd may take from one piece to the next.
const PIECE_LIMIT: Duration = Duration::from_secs(30);
/// etcd sends 32 KiB a piece; a line of more than this is not its answer.
const LINE_LIMIT: usize = 8 << 20;
/// A snapshot ends with the SHA-256 over all before it.
const SUM: usize = 32;

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A name that cannot be a file's.
    #[error("`{0}` is no name for a snapshot: small letters, digits, `-` and `.` between them")]
    Name(String),
    /// etcd.
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is not what etcd has sent, or was changed since.
    #[error("the snapshot `{path}` is damaged: {why}")]
    Damaged {
        /// The file.
        path: Utf8PathBuf,
        /// What is wrong.
        why: &'static str,
    },
    /// What is told of it cannot be written.
    #[error("the snapshot's description cannot be written")]
    Note(#[source] serde_json::Error),
}

/// Adds up a snapshot's bytes as they come.
#[derive(Default)]
struct Sums {
    /// Over all but the last bytes, which are in `tail`.
    hash: Sha256,
    tail: Vec<u8>,
    size: u64,
}

impl Sums {
    fn update(&mut self, bytes: &[u8]) {
        self.size += bytes.len() as u64;
        self.tail.extend_from_slice(bytes);
        let sure = self.tail.len().saturating_sub(SUM);
        self.hash.update(self.tail.get(..sure).unwrap_or_default());
        self.tail.drain(..sure);
    }

    /// The whole file's digest and size, if what it ends with is the sum of what is before.
    fn finish(self) -> Result<(Digest, u64), &'static str> {
        // Databases are whole pages, the smallest of which is 512 bytes.
        if self.size % 512 != SUM as u64 {
            return Err("it has not the length of a database and its checksum");
        }
        if self.hash.clone().finalize().as_slice() != self.tail {
            return Err("its checksum is of other bytes");
        }
        Ok((
            Digest::from_bytes(self.hash.chain_update(&self.tail).finalize().into()),
            self.size,
        ))
    }
}

/// A database as etcd sends it, piece by piece.
pub struct SnapshotStream {
    address: IpAddr,
    body: Incoming,
    line: Vec<u8>,
    ended: bool,
    _connection: AbortOnDropHandle<Result<(), hyper::Error>>,
}

#[derive(Deserialize)]
struct Line {
    result: Option<Piece>,
    error: Option<Refusal>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Piece {
    #[serde(alias = "remainingBytes")]
    remaining_bytes: Option<String>,
    blob: String,
}

#[derive(Deserialize)]
struct Refusal {
    #[serde(default)]
    message: String,
}

const PATH: &str = "/v3/maintenance/snapshot";

impl SnapshotStream {
    pub(super) async fn open(
        tls: &Arc<ClientConfig>,
        address: IpAddr,
        request: http::Request<Full<Bytes>>,
    ) -> Result<Self, EtcdError> {
        let target = SocketAddr::new(address, ports::ETCD_CLIENT);
        let open = async {
            let stream = TcpStream::connect(target).await.map_err(|source| HttpsError::Connect {
                address: target,
                source,
            })?;
            let stream = TlsConnector::from(tls.clone())
                .connect(ServerName::from(address), stream)
                .await;
            let stream = stream.map_err(|source| exchange(target, source))?;
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
                .await
                .map_err(|source| exchange(target, source))?;
            let connection = AbortOnDropHandle::new(tokio::spawn(connection));
            let answer = sender
                .send_request(request)
                .await
                .map_err(|source| exchange(target, source))?;
            Ok((answer, connection))
        };
        let opened = tokio::time::timeout(PIECE_LIMIT, open).await.unwrap_or_else(|_| {
            let limit = PIECE_LIMIT;
            Err(HttpsError::TimedOut { address: target, limit })
        });
        let (answer, connection) = opened.map_err(|source| EtcdError::NoAnswer { address, source })?;
        if !answer.status().is_success() {
            let message = answer.status().to_string();
            return Err(EtcdError::Refused {
                address,
                path: PATH,
                message,
            });
        }
        Ok(Self {
            address,
            body: answer.into_body(),
            line: Vec::new(),
            ended: false,
            _connection: connection,
        })
    }

    /// The next bytes; `None` after the last.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, EtcdError> {
        let address = self.address;
        let target = SocketAddr::new(address, ports::ETCD_CLIENT);
        let no_answer = |source| EtcdError::NoAnswer { address, source };
        loop {
            if let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.line.drain(..=end).collect();
                return self.piece(&line).map(Some);
            }
            let frame = tokio::time::timeout(PIECE_LIMIT, self.body.frame())
                .await
                .map_err(|_| {
                    no_answer(HttpsError::TimedOut {
                        address: target,
                        limit: PIECE_LIMIT,
                    })
                })?;
            match frame {
                Some(Ok(frame)) => self
                    .line
                    .extend_from_slice(frame.data_ref().map_or(&[][..], Bytes::as_ref)),
                Some(Err(error)) => return Err(no_answer(exchange(target, error))),
                None if self.line.is_empty() && self.ended => return Ok(None),
                None => {
                    return Err(no_answer(exchange(
                        target,
                        io::Error::from(io::ErrorKind::UnexpectedEof),
                    )));
                }
            }
            if self.line.len() > LINE_LIMIT {
                return Err(no_answer(exchange(target, io::Error::from(io::ErrorKind::InvalidData))));
            }
        }
    }

    fn piece(&mut self, line: &[u8]) -> Result<Vec<u8>, EtcdError> {
        let address = self.address;
        let answer = |source| EtcdError::Answer { address, source };
        let line: Line = serde_json::from_slice(line).map_err(answer)?;
        if let Some(Refusal { message }) = line.error {
            return Err(EtcdError::Refused {
                address,
                path: PATH,
                message,
            });
        }
        let piece = line.result.unwrap_or_default();
        // Zero is left out.
        self.ended = matches!(piece.remaining_bytes.as_deref(), None | Some("0"));
        let text = |error: base64::DecodeError| answer(serde::de::Error::custom(error));
        STANDARD.decode(piece.blob).map_err(text)
    }
}

fn exchange(address: SocketAddr, source: impl std::error::Error + Send + Sync + 'static) -> HttpsError {
    HttpsError::Exchange {
        address,
        source: Box::new(source),
    }
}

/// The snapshots in one directory: `<name>.db`, and `<name>.json`, which is written when the database is there.
#[derive(Clone, Debug)]
pub struct Snapshots(Utf8PathBuf);

impl Snapshots {
    /// Those in `directory`.
    pub fn new(directory: Utf8PathBuf) -> Self {
        Self(directory)
    }

    /// The directory.
    pub fn directory(&self) -> &Utf8Path {
        &self.0
    }

    /// The file of a snapshot's database.
    pub fn database(&self, name: &str) -> Result<Utf8PathBuf, SnapshotError> {
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
        let good = !name.is_empty() && name.len() <= 200 && !name.starts_with(['.', '-']) && name.chars().all(inner);
        if good {
            Ok(self.0.join(format!("{name}.db")))
        } else {
            Err(SnapshotError::Name(name.to_owned()))
        }
    }

    /// All of them, oldest first.
    pub fn list(&self) -> Vec<SnapshotStatus> {
        let entries = self.0.read_dir_utf8().into_iter().flatten().flatten();
        let mut found: Vec<SnapshotStatus> = entries
            .filter(|entry| entry.path().extension() == Some("json"))
            .filter_map(|entry| serde_json::from_slice(&std::fs::read(entry.path()).ok()?).ok())
            .filter(|snapshot: &SnapshotStatus| {
                let database = self.database(&snapshot.name).ok();
                database.is_some_and(|path| path.metadata().is_ok_and(|meta| meta.len() == snapshot.size))
            })
            .collect();
        found.sort_by(|a, b| (a.time, &a.name).cmp(&(b.time, &b.name)));
        found
    }

    /// Takes one from the member at `address`, unless it is there, and removes those that are no longer kept.
    pub async fn take(
        &self,
        client: &EtcdClient,
        address: IpAddr,
        name: &str,
    ) -> Result<SnapshotStatus, SnapshotError> {
        let path = self.database(name)?;
        if let Some(there) = self.list().into_iter().find(|snapshot| snapshot.name == name) {
            return Ok(there);
        }
        files::make_directory(&self.0, 0o700)?;
        let temporary = self.0.join(format!(".{name}.db.kprov-new"));
        let taken = fetch(client, address, &temporary).await;
        if taken.is_err() {
            files::remove(&temporary)?;
        }
        let (digest, size) = taken?;
        std::fs::rename(&temporary, &path).map_err(failed("write", &path))?;
        let snapshot = SnapshotStatus {
            name: name.to_owned(),
            time: Timestamp::now(),
            size,
            digest,
        };
        let json = serde_json::to_vec_pretty(&snapshot).map_err(SnapshotError::Note)?;
        files::write(&self.0.join(format!("{name}.json")), &json, 0o600)?;
        tracing::info!(name, size, "etcd snapshot taken");
        for old in expired(&self.list(), snapshot.time) {
            tracing::info!(name = old, "old etcd snapshot removed");
            files::remove(&self.0.join(format!("{old}.json")))?;
            files::remove(&self.database(&old)?)?;
        }
        Ok(snapshot)
    }

    /// Checks that a snapshot is there and what etcd has sent. Reads all of it: call it where that may block.
    pub fn verify(&self, name: &str) -> Result<(), SnapshotError> {
        let path = self.database(name)?;
        let read = failed("read", &path);
        let mut file = std::fs::File::open(&path).map_err(&read)?;
        let mut sums = Sums::default();
        let mut buffer = vec![0; 1 << 17];
        loop {
            match file.read(&mut buffer).map_err(&read)? {
                0 => break,
                count => sums.update(buffer.get(..count).unwrap_or_default()),
            }
        }
        drop(read);
        sums.finish()
            .map(drop)
            .map_err(|why| SnapshotError::Damaged { path, why })
    }
}

async fn fetch(client: &EtcdClient, address: IpAddr, path: &Utf8Path) -> Result<(Digest, u64), SnapshotError> {
    let write = failed("write", path);
    let file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(&write)?;
    let mut file = tokio::fs::File::from_std(file);
    let mut stream = client.snapshot(address).await?;
    let mut sums = Sums::default();
    while let Some(bytes) = stream.next().await? {
        sums.update(&bytes);
        file.write_all(&bytes).await.map_err(&write)?;
    }
    file.flush().await.map_err(&write)?;
    file.sync_all().await.map_err(&write)?;
    let path = path.to_owned();
    sums.finish().map_err(|why| SnapshotError::Damaged { path, why })
}

/// Which snapshots are not kept any longer; `all` are sorted, oldest first.
fn expired(all: &[SnapshotStatus], now: Timestamp) -> Vec<String> {
    let newest_first = all.iter().rev().enumerate();
    let old = newest_first
        .filter(|(place, snapshot)| *place >= MOST || (*place >= KEPT && now.duration_since(snapshot.time) > OLDEST));
    old.map(|(_, snapshot)| snapshot.name.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(name: &str, day: i64) -> SnapshotStatus {
        SnapshotStatus {
            name: name.into(),
            time: Timestamp::UNIX_EPOCH + SignedDuration::from_hours(24 * day),
            size: 0,
            digest: Digest::from_bytes([0; 32]),
        }
    }

    #[test]
    fn old_snapshots_go_and_the_newest_stay() {
        let now = Timestamp::UNIX_EPOCH + SignedDuration::from_hours(24 * 100);
        let all = |days: &[i64]| -> Vec<_> { days.iter().map(|day| snapshot(&format!("d{day}"), *day)).collect() };
        assert!(expired(&all(&[1, 2, 3]), now).is_empty(), "however old");
        assert_eq!(expired(&all(&[1, 60, 69, 70, 99]), now), ["d60", "d1"]);
        assert!(expired(&all(&[71, 72, 73, 74, 75]), now).is_empty());
        let many: Vec<i64> = (80..95).collect();
        assert_eq!(expired(&all(&many), now), ["d84", "d83", "d82", "d81", "d80"]);
    }

    #[test]
    fn names_are_file_names() {
        let snapshots = Snapshots::new("/x".into());
        assert_eq!(
            snapshots.database("before-1.36.3-20260412t091500z").unwrap(),
            "/x/before-1.36.3-20260412t091500z.db"
        );
        for bad in ["", ".", "../a", "a/b", "-a", ".a", "A", "a\0"] {
            assert!(
                matches!(snapshots.database(bad), Err(SnapshotError::Name(_))),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn sums_are_over_all_but_themselves() {
        let database = vec![3; 1024];
        let sum: [u8; 32] = Sha256::digest(&database).into();
        let whole = [database.as_slice(), &sum].concat();
        for piece in [1, 7, 31, 32, 33, 500, 2000] {
            let mut sums = Sums::default();
            whole.chunks(piece).for_each(|bytes| sums.update(bytes));
            let (digest, size) = sums.finish().unwrap();
            assert_eq!(
                (digest, size),
                (Digest::from_bytes(Sha256::digest(&whole).into()), 1056)
            );
        }
        for (bytes, word) in [(&whole[..1055], "length"), (&whole[..544], "checksum"), (&[], "length")] {
            let mut sums = Sums::default();
            sums.update(bytes);
            assert!(sums.finish().unwrap_err().contains(word));
        }
    }
}
