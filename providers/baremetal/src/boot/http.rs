//! What hosts fetch while they boot: iPXE's script, kernel, initrd, image and first-boot data; and what they report.

use std::fmt::Write as _;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use camino::{Utf8Path, Utf8PathBuf};
use tokio::net::TcpListener;
use tokio_util::io::ReaderStream;

use super::{BootHost, CD, Event, Mac, Mode, Shared, dnsmasq};

/// What hosts say (`init.sh`) when they need nothing more from here.
const DONE: [&str; 2] = ["running from memory", "installed"];
/// Reports are a line.
const REPORT_LIMIT: usize = 1000;

pub(super) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/boot.ipxe", get(chain))
        .route("/kernel", get(kernel))
        .route("/initrd", get(initrd))
        .route("/image", get(image))
        .route("/image.sha256", get(image_digest))
        .route("/ipxe.efi", get(ipxe))
        .route("/ipxe.iso", get(cd))
        .route("/hosts/{mac}/ipxe", get(script))
        .route("/hosts/{mac}/first-boot", get(first_boot))
        .route("/hosts/{mac}/report", post(report))
        .with_state(shared)
}

pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    if let Err(error) = axum::serve(listener, router(shared)).await {
        tracing::error!(%error, "the boot server has ended");
    }
}

/// iPXE knows only when it runs which interface it got here by, and its hardware address.
async fn chain(State(shared): State<Arc<Shared>>) -> String {
    format!("#!ipxe\nchain {}/hosts/${{netX/mac:hexhyp}}/ipxe || exit\n", shared.url)
}

/// What a host boots: the installer's environment while it's to be installed, else whatever comes next in its order.
async fn script(State(shared): State<Arc<Shared>>, Path(mac): Path<String>) -> String {
    let Some(host) = shared.host(&mac) else {
        return "#!ipxe\nexit\n".into();
    };
    if host.mode == Mode::Install && shared.is_installed(host.mac) {
        return "#!ipxe\nexit\n".into();
    }
    shared.tell(&host.name, Event::Boots);
    ipxe_script(&shared.url, &host, shared.console.as_deref())
}

pub(super) fn ipxe_script(url: &str, host: &BootHost, console: Option<&str>) -> String {
    let mut arguments = format!(
        "kprov.server={url} kprov.mac={} kprov.name={}",
        host.mac.hyphens(),
        host.name
    );
    // Only writing to a text can fail, and that cannot.
    let _ = match &host.mode {
        Mode::Memory => write!(arguments, " kprov.mode=memory"),
        Mode::Install => write!(
            arguments,
            " kprov.mode=install kprov.disk={} kprov.wipe={}",
            host.disk.as_deref().unwrap_or_default(),
            if host.wipe { "yes" } else { "no" }
        ),
    };
    if let Some(console) = console {
        let _ = write!(arguments, " console={console}");
    }
    format!("#!ipxe\nkernel {url}/kernel initrd=initrd panic=30 {arguments}\ninitrd --name initrd {url}/initrd\nboot\n")
}

async fn kernel(State(shared): State<Arc<Shared>>) -> Response {
    file(&shared.files.kernel).await
}

async fn initrd(State(shared): State<Arc<Shared>>) -> Response {
    file(&shared.files.initrd).await
}

async fn image(State(shared): State<Arc<Shared>>) -> Response {
    match &shared.files.image {
        Some((path, _)) => file(path).await,
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn image_digest(State(shared): State<Arc<Shared>>) -> Response {
    match &shared.files.image {
        Some((_, digest)) => digest.clone().into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn ipxe(State(shared): State<Arc<Shared>>) -> Response {
    program(&shared, "ipxe.efi").await
}

async fn cd(State(shared): State<Arc<Shared>>) -> Response {
    program(&shared, CD).await
}

async fn program(shared: &Shared, name: &str) -> Response {
    match dnsmasq::program(&shared.directory, name) {
        Some(path) => file(&path).await,
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

/// First-boot data are for one host, and for one time: they have what identifies it until it is set up.
async fn first_boot(State(shared): State<Arc<Shared>>, Path(mac): Path<String>) -> Response {
    let Some(host) = shared.host(&mac) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    match host.first_boot {
        Some(text) => {
            shared.tell(&host.name, Event::FirstBoot);
            text.0.into_response()
        }
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn report(State(shared): State<Arc<Shared>>, Path(mac): Path<String>, body: String) -> StatusCode {
    let Some(host) = shared.host(&mac) else {
        return StatusCode::NOT_FOUND;
    };
    let words: String = body.chars().filter(|c| !c.is_control()).take(REPORT_LIMIT).collect();
    if words == "installed" {
        shared.installed(host.mac);
    }
    let event = match words.strip_prefix("failed: ") {
        Some(why) => Event::Failed(why.to_owned()),
        None if DONE.contains(&words.as_str()) => Event::Done(words),
        None => Event::Reports(words),
    };
    shared.tell(&host.name, event);
    StatusCode::NO_CONTENT
}

async fn file(path: &Utf8Path) -> Response {
    match open(path).await {
        Ok((file, length)) => {
            let body = Body::from_stream(ReaderStream::with_capacity(file, 1 << 16));
            ([(header::CONTENT_LENGTH, length)], body).into_response()
        }
        Err(error) => {
            tracing::error!(%path, %error, "a file that hosts boot from cannot be read");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

async fn open(path: &Utf8Path) -> std::io::Result<(tokio::fs::File, u64)> {
    let file = tokio::fs::File::open(path).await?;
    let length = file.metadata().await?.len();
    Ok((file, length))
}

/// Files that hosts boot from.
#[derive(Clone, Debug)]
pub(super) struct Files {
    pub(super) kernel: Utf8PathBuf,
    pub(super) initrd: Utf8PathBuf,
    /// With its SHA-256 in hexadecimal digits.
    pub(super) image: Option<(Utf8PathBuf, String)>,
}

impl Shared {
    /// The host with this hardware address, as it stands in a URL.
    fn host(&self, mac: &str) -> Option<BootHost> {
        let mac: Mac = mac.parse().ok()?;
        self.hosts().iter().find(|host| host.mac == mac).cloned()
    }
}
