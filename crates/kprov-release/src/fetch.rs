//! What machines fetch releases and host files with: any source, but only the right bytes.

use std::fs;
use std::io::{self, Seek as _};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use flate2::read::GzDecoder;
use futures::StreamExt as _;
use kprov_types::Digest;
use kprov_types::release::{FileSource, HostFile, Release};
use reqwest::{Client, Response, StatusCode, header};
use tokio::fs::File;
use tokio::io::{AsyncSeekExt as _, AsyncWriteExt as _};
use tokio::sync::Mutex;

use crate::digest::{self, Hasher};
use crate::layout::BLOBS;
use crate::payload::{self, DOCUMENT_LIMIT, RELEASE, ReleaseFormatError};

/// How often one transfer from one URL is resumed after its connection broke.
const RESUMES: usize = 4;
/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a transfer may stand still.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// Why something could not be fetched. `file` is what was wanted, `url` where from (the last one tried).
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The HTTP client could not be made.
    #[error("cannot make an HTTP client")]
    Client(#[source] reqwest::Error),
    /// No URL was given.
    #[error("no URL to fetch `{file}` from")]
    NoUrl {
        /// What was wanted.
        file: String,
    },
    /// No answer.
    #[error("cannot fetch `{file}` from {url}")]
    Request {
        /// What was wanted.
        file: String,
        /// Where from.
        url: String,
        /// Why.
        source: reqwest::Error,
    },
    /// An answer that is not the file.
    #[error("cannot fetch `{file}` from {url}: the server answered {status}")]
    Status {
        /// What was wanted.
        file: String,
        /// Where from.
        url: String,
        /// The answer.
        status: StatusCode,
    },
    /// The connection broke again and again.
    #[error("cannot fetch `{file}` from {url}: the connection broke after {received} of {size} bytes")]
    Broken {
        /// What was wanted.
        file: String,
        /// Where from.
        url: String,
        /// What had come by then.
        received: u64,
        /// What was expected.
        size: u64,
    },
    /// More bytes than expected.
    #[error("`{file}` from {url} is larger than {limit} bytes")]
    TooLarge {
        /// What was wanted.
        file: String,
        /// Where from.
        url: String,
        /// How many bytes were expected at most.
        limit: u64,
    },
    /// Another number of bytes than expected.
    #[error("`{file}` from {url} has {found} bytes, not {expected}")]
    WrongSize {
        /// What was wanted.
        file: String,
        /// Where from.
        url: String,
        /// How many bytes were expected.
        expected: u64,
        /// How many there are.
        found: u64,
    },
    /// Other bytes than expected.
    #[error("`{file}` from {url} has digest `{found}`, not `{expected}`")]
    Digest {
        /// What was wanted.
        file: String,
        /// Where from.
        url: String,
        /// What was expected.
        expected: Digest,
        /// What came.
        found: Digest,
    },
    /// The right bytes are no release that this kprov knows.
    #[error("`{RELEASE}` from {url} is not a release")]
    Format {
        /// Where from.
        url: String,
        /// Why.
        source: ReleaseFormatError,
    },
    /// An archive is not what it should be.
    #[error("cannot take `{member}` for `{file}` from the archive at {url}")]
    Archive {
        /// What was wanted.
        file: String,
        /// Where from.
        url: String,
        /// The member of the archive.
        member: String,
        /// Why.
        source: io::Error,
    },
    /// The file could not be kept.
    #[error("cannot write `{path}`")]
    Write {
        /// The path.
        path: Utf8PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl FetchError {
    /// Whether what there is was altered or made wrongly: trying again is of no use. Else it could not be had, which may
    /// pass: a source does not answer, or does not have it (yet), or the file could not be written.
    ///
    /// Where there are several sources, an error is bad only if none of them was out of reach.
    pub fn is_bad(&self) -> bool {
        match self {
            Self::TooLarge { .. } | Self::WrongSize { .. } | Self::Digest { .. } | Self::Format { .. } => true,
            // The disk may be full as well.
            Self::Archive { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
            ),
            Self::Client(_)
            | Self::NoUrl { .. }
            | Self::Request { .. }
            | Self::Status { .. }
            | Self::Broken { .. }
            | Self::Write { .. } => false,
        }
    }

    /// Of two sources' errors the one that says more: what may pass, before wrong bytes, before what a source does not have.
    fn or(self, later: Self) -> Self {
        let weight = |error: &Self| match error {
            Self::NoUrl { .. } => 0,
            Self::Status { status, .. } if matches!(*status, StatusCode::NOT_FOUND | StatusCode::GONE) => 1,
            error if error.is_bad() => 2,
            _ => 3,
        };
        if weight(&self) > weight(&later) { self } else { later }
    }
}

/// Something to fetch: what it is called, what it must be, and where it is.
struct Wanted<'a> {
    file: &'a str,
    digest: &'a Digest,
    size: u64,
    urls: Vec<String>,
}

/// Fetches from one release's sources. Retrying later, after all of them failed, is the caller's.
#[derive(Debug)]
pub struct Fetcher {
    client: Client,
    bases: Vec<String>,
    /// The last archive, for the next member: an unnamed file.
    archive: Mutex<Option<(Digest, fs::File)>>,
}

/// An HTTP client that trusts the system's certificates.
pub(crate) fn client() -> Result<Client, reqwest::Error> {
    // Fails where another part of the process has chosen already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = || {
        Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
    };
    // A machine without any certificates can still fetch by HTTP.
    builder().build().or_else(|_| builder().tls_certs_only([]).build())
}

impl Fetcher {
    /// From these base URLs, tried in order; see [`kprov_types::node::ReleaseSource::urls`].
    pub fn new(bases: Vec<String>) -> Result<Self, FetchError> {
        let bases = bases.into_iter().map(|b| b.trim_end_matches('/').to_owned()).collect();
        Ok(Self {
            client: client().map_err(FetchError::Client)?,
            bases,
            archive: Mutex::default(),
        })
    }

    fn urls(&self, path: &str) -> Vec<String> {
        self.bases.iter().map(|base| format!("{base}/{path}")).collect()
    }

    /// Fetches `release.json`, which must have this digest.
    pub async fn release(&self, digest: &Digest) -> Result<Release, FetchError> {
        let mut failure = FetchError::NoUrl { file: RELEASE.into() };
        for url in self.urls(RELEASE) {
            match document(&self.client, RELEASE, &url).await {
                Ok(bytes) => {
                    let found = digest::of_bytes(&bytes);
                    if found == *digest {
                        return payload::parse_release(&bytes).map_err(|source| FetchError::Format { url, source });
                    }
                    failure = failure.or(FetchError::Digest {
                        file: RELEASE.into(),
                        url,
                        expected: digest.clone(),
                        found,
                    });
                }
                Err(error) => failure = failure.or(error),
            }
        }
        Err(failure)
    }

    /// Fetches a host file to `dest`, executable. Nothing is at `dest` until all of it is there and verified; what was
    /// there before is replaced in one step. A file that has the right bytes already is not fetched again.
    pub async fn host_file(&self, file: &HostFile, dest: &Utf8Path) -> Result<(), FetchError> {
        let HostFile {
            name,
            digest,
            size,
            source,
            ..
        } = file;
        let failed = |source| FetchError::Write {
            path: dest.to_owned(),
            source,
        };
        if let Some(parent) = dest.parent() {
            tokio::fs::create_dir_all(parent).await.map_err(failed)?;
        }
        let (urls, member) = match source {
            FileSource::Carried => (self.urls(&format!("{BLOBS}/{}", digest.hex())), None),
            FileSource::Url { url, member } => (vec![url.clone()], member.as_ref()),
        };
        let wanted = Wanted {
            file: name,
            digest,
            size: *size,
            urls,
        };
        let part = Utf8PathBuf::from(format!("{dest}.part"));
        let result = match member {
            None if has_bytes(dest, digest, *size).await => {
                return set_executable(dest).await.map_err(failed);
            }
            None => self.plain(&wanted, &part).await,
            Some(member) => self.member(&wanted, member, &part).await,
        };
        let result = match result {
            Ok(()) => finish(&part, dest).await.map_err(failed),
            Err(error) => Err(error),
        };
        if result.is_err() {
            let _ = tokio::fs::remove_file(&part).await;
        }
        result
    }

    async fn plain(&self, wanted: &Wanted<'_>, part: &Utf8Path) -> Result<(), FetchError> {
        let failed = |source| FetchError::Write {
            path: part.to_owned(),
            source,
        };
        let mut file = File::create(part).await.map_err(failed)?;
        self.download(wanted, &mut file, part).await
    }

    async fn member(&self, wanted: &Wanted<'_>, member: &str, part: &Utf8Path) -> Result<(), FetchError> {
        let failed = |source| FetchError::Write {
            path: part.to_owned(),
            source,
        };
        let mut last = self.archive.lock().await;
        let archive = match last.take() {
            Some((digest, archive)) if digest == *wanted.digest => archive,
            _ => {
                let dir = part.parent().map_or_else(|| Utf8PathBuf::from("."), Utf8Path::to_owned);
                let unnamed = tempfile::tempfile_in(dir).map_err(failed)?;
                let mut file = File::from_std(unnamed);
                self.download(wanted, &mut file, part).await?;
                file.into_std().await
            }
        };
        let (archive, part, name) = (
            last.insert((wanted.digest.clone(), archive)),
            part.to_owned(),
            member.to_owned(),
        );
        let mut archive = archive.1.try_clone().map_err(failed)?;
        let extracted = tokio::task::spawn_blocking(move || extract(&mut archive, &name, &part)).await;
        extracted
            .map_err(io::Error::other)
            .flatten()
            .map_err(|source| FetchError::Archive {
                file: wanted.file.to_owned(),
                url: wanted.urls.last().cloned().unwrap_or_default(),
                member: member.to_owned(),
                source,
            })
    }

    /// Downloads into an empty file, trying one URL after the other and going on where the one before broke.
    async fn download(&self, wanted: &Wanted<'_>, file: &mut File, path: &Utf8Path) -> Result<(), FetchError> {
        let mut failure = FetchError::NoUrl {
            file: wanted.file.into(),
        };
        let mut hasher = Hasher::default();
        for url in &wanted.urls {
            // Whether the bytes are all of this source: another's may be what makes the whole wrong.
            let mut alone = hasher.size() == 0;
            loop {
                let error = match self.download_from(wanted, url, file, path, &mut hasher).await {
                    Ok(()) => {
                        let found = std::mem::take(&mut hasher).digest();
                        if found == *wanted.digest {
                            return Ok(());
                        }
                        FetchError::Digest {
                            file: wanted.file.into(),
                            url: url.clone(),
                            expected: wanted.digest.clone(),
                            found,
                        }
                    }
                    Err(error @ FetchError::Write { .. }) => return Err(error),
                    Err(error) => error,
                };
                if error.is_bad() {
                    hasher = Hasher::default();
                    if !alone {
                        alone = true;
                        continue;
                    }
                }
                failure = failure.or(error);
                break;
            }
        }
        Err(failure)
    }

    /// Downloads what `hasher` has not seen yet from one URL, resuming a few times.
    async fn download_from(
        &self,
        wanted: &Wanted<'_>,
        url: &str,
        file: &mut File,
        path: &Utf8Path,
        hasher: &mut Hasher,
    ) -> Result<(), FetchError> {
        let Wanted { file: name, size, .. } = wanted;
        let failed = |source| FetchError::Write {
            path: path.to_owned(),
            source,
        };
        for _ in 0..=RESUMES {
            let mut request = self.client.get(url);
            if hasher.size() > 0 {
                request = request.header(header::RANGE, format!("bytes={}-", hasher.size()));
            }
            let response = match request.send().await {
                Ok(response) => response,
                // Nothing came from here yet, so it did not break; it is not there.
                Err(source) if hasher.size() == 0 => {
                    return Err(FetchError::Request {
                        file: (*name).into(),
                        url: url.into(),
                        source,
                    });
                }
                Err(_) => continue,
            };
            let status = response.status();
            let (first, length) = content_range(&response);
            let length = match status {
                StatusCode::OK => response.content_length(),
                StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => length,
                _ => None,
            };
            if let Some(found) = length.filter(|length| length != size) {
                return Err(FetchError::WrongSize {
                    file: (*name).into(),
                    url: url.into(),
                    expected: *size,
                    found,
                });
            }
            if !(status == StatusCode::PARTIAL_CONTENT && first == Some(hasher.size())) {
                if status != StatusCode::OK {
                    return Err(FetchError::Status {
                        file: (*name).into(),
                        url: url.into(),
                        status,
                    });
                }
                *hasher = Hasher::default();
            }
            file.seek(io::SeekFrom::Start(hasher.size())).await.map_err(failed)?;
            file.set_len(hasher.size()).await.map_err(failed)?;
            let mut body = response.bytes_stream();
            while let Some(Ok(piece)) = body.next().await {
                if hasher.size() + piece.len() as u64 > *size {
                    return Err(FetchError::TooLarge {
                        file: (*name).into(),
                        url: url.into(),
                        limit: *size,
                    });
                }
                hasher.update(&piece);
                file.write_all(&piece).await.map_err(failed)?;
            }
            file.flush().await.map_err(failed)?;
            if hasher.size() == *size {
                return Ok(());
            }
            tracing::debug!(file = name, url, received = hasher.size(), size, "transfer broke");
        }
        Err(FetchError::Broken {
            file: (*name).into(),
            url: url.into(),
            received: hasher.size(),
            size: *size,
        })
    }
}

/// The first byte of a partial answer, and how long the whole is: `bytes 5-9/10`, `bytes */10`, `bytes 5-9/*`.
fn content_range(response: &Response) -> (Option<u64>, Option<u64>) {
    let range = response
        .headers()
        .get(header::CONTENT_RANGE)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.strip_prefix("bytes "));
    let Some((part, whole)) = range.and_then(|r| r.split_once('/')) else {
        return (None, None);
    };
    let first = part.split('-').next().and_then(|first| first.parse().ok());
    (first, whole.parse().ok())
}

/// Fetches a small document into memory.
pub(crate) async fn document(client: &Client, file: &str, url: &str) -> Result<Vec<u8>, FetchError> {
    let failed = |source| FetchError::Request {
        file: file.into(),
        url: url.into(),
        source,
    };
    let response = client.get(url).send().await.map_err(failed)?;
    let status = response.status();
    if status != StatusCode::OK {
        return Err(FetchError::Status {
            file: file.into(),
            url: url.into(),
            status,
        });
    }
    read_document(response, file, url).await
}

/// Reads the body of an answer that should be small.
pub(crate) async fn read_document(response: Response, file: &str, url: &str) -> Result<Vec<u8>, FetchError> {
    let mut bytes = Vec::new();
    let mut body = response.bytes_stream();
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(|source| FetchError::Request {
            file: file.into(),
            url: url.into(),
            source,
        })?;
        bytes.extend_from_slice(&piece);
        if bytes.len() as u64 > DOCUMENT_LIMIT {
            return Err(FetchError::TooLarge {
                file: file.into(),
                url: url.into(),
                limit: DOCUMENT_LIMIT,
            });
        }
    }
    Ok(bytes)
}

async fn has_bytes(path: &Utf8Path, digest: &Digest, size: u64) -> bool {
    let (path, digest) = (path.to_owned(), digest.clone());
    let check = move || -> io::Result<bool> {
        let file = fs::File::open(path)?;
        Ok(file.metadata()?.len() == size && digest::of_reader(file, |_| Ok(()))?.digest() == digest)
    };
    matches!(tokio::task::spawn_blocking(check).await, Ok(Ok(true)))
}

/// Writes one member of a gzip-compressed tar archive to a file.
fn extract(archive: &mut fs::File, member: &str, to: &Utf8Path) -> io::Result<()> {
    archive.rewind()?;
    let wanted = Utf8Path::new(member.trim_start_matches("./"));
    for entry in tar::Archive::new(GzDecoder::new(archive)).entries()? {
        let mut entry = entry?;
        let found = entry.header().entry_type().is_file()
            && entry
                .path()?
                .strip_prefix("./")
                .map_or(entry.path()? == wanted, |path| path == wanted);
        if found {
            io::copy(&mut entry, &mut fs::File::create(to)?)?;
            return Ok(());
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "the archive has no such file"))
}

async fn set_executable(path: &Utf8Path) -> io::Result<()> {
    tokio::fs::set_permissions(path, fs::Permissions::from_mode(0o755)).await
}

/// Puts a finished file in its place. It is on disk before its name is, so that a power cut leaves no torn program.
async fn finish(part: &Utf8Path, dest: &Utf8Path) -> io::Result<()> {
    set_executable(part).await?;
    File::open(part).await?.sync_all().await?;
    tokio::fs::rename(part, dest).await
}
