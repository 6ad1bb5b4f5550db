//! A certificate authority, TLS backends that answer `/readyz`, and clients: what tests and the benchmark share.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test binary and the benchmark use a part of it"
)]

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::atomic::{AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kprov_front::{Backend, FrontConfig, FrontHandle, FrontState, Trust};
use kprov_types::ports;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::{TlsAcceptor, TlsConnector};

pub type Client = tokio_rustls::client::TlsStream<TcpStream>;

/// A CA and a serving certificate for `kubernetes`.
pub struct Pki {
    pub ca_pem: String,
    pub server: Arc<ServerConfig>,
    pub client: Arc<ClientConfig>,
}

impl Pki {
    pub fn new() -> anyhow::Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let ca_key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = params.self_signed(&ca_key)?;
        let key = KeyPair::generate()?;
        let leaf = CertificateParams::new(vec!["kubernetes".into()])?
            .signed_by(&key, &Issuer::from_params(&params, &ca_key))?;
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from(leaf)],
                PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?,
            )?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.der().clone())?;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        // Every connection makes a full handshake, as different clients' connections do.
        client.resumption = rustls::client::Resumption::disabled();
        Ok(Self {
            ca_pem: ca.pem(),
            server: Arc::new(server),
            client: Arc::new(client),
        })
    }

    /// A front's settings with this CA, without listeners.
    pub fn front(&self, local_port: Option<u16>, remotes: Vec<SocketAddr>) -> FrontConfig {
        FrontConfig {
            local_port,
            remote_backends: remotes,
            trust: Trust::Ca(self.ca_pem.clone()),
            remote_interval: Duration::from_millis(500),
            ..FrontConfig::worker(Vec::new(), self.ca_pem.clone())
        }
    }

    /// A new TLS connection.
    pub async fn connect(&self, address: SocketAddr) -> io::Result<Client> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        TlsConnector::from(Arc::clone(&self.client))
            .connect(ServerName::try_from("kubernetes").expect("a name"), stream)
            .await
    }

    /// Which backend answers on a new connection.
    pub async fn who(&self, address: SocketAddr) -> io::Result<String> {
        let mut client = self.connect(address).await?;
        client.write_all(b"WHO\n").await?;
        let mut answer = String::new();
        BufReader::new(client).read_line(&mut answer).await?;
        if answer.ends_with('\n') {
            Ok(answer.trim().to_owned())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }
}

/// A backend: over TLS it answers `GET /readyz` with `status` and a body, `WHO` with its address, `ECHO` by echoing what
/// follows, and `SUM` with the sum of all bytes once the client has ended its half. Without TLS, what begins with `E` is
/// echoed and what begins with `S` summed up, first byte included.
pub struct TestBackend {
    pub address: SocketAddr,
    pub status: Arc<AtomicU16>,
    /// How many `WHO` and `ECHO` it was asked.
    pub asked: Arc<AtomicUsize>,
    delay: Arc<AtomicU64>,
    body: Arc<Mutex<String>>,
    accepting: Option<JoinHandle<()>>,
    connections: Arc<Mutex<HashMap<usize, JoinHandle<()>>>>,
}

impl TestBackend {
    pub fn start(pki: &Pki, address: SocketAddr, status: u16) -> io::Result<Self> {
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        let listener = socket.listen(4096)?;
        Self::on(pki, listener, status)
    }

    pub fn on(pki: &Pki, listener: TcpListener, status: u16) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let status = Arc::new(AtomicU16::new(status));
        let asked = Arc::new(AtomicUsize::new(0));
        let delay = Arc::new(AtomicU64::new(0));
        let body = Arc::new(Mutex::new("ok".to_owned()));
        let connections = Arc::new(Mutex::new(HashMap::new()));
        let server = Server {
            tls: Arc::clone(&pki.server).into(),
            status: Arc::clone(&status),
            asked: Arc::clone(&asked),
            delay: Arc::clone(&delay),
            body: Arc::clone(&body),
            address,
        };
        let held = Arc::clone(&connections);
        let accepting = Some(tokio::spawn(async move {
            let mut next = 0;
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                };
                let _ = stream.set_nodelay(true);
                let (server, mine) = (server.clone(), Arc::clone(&held));
                next += 1;
                let id = next;
                let mut held = held.lock().expect("not poisoned");
                let task = tokio::spawn(async move {
                    let _ = server.serve(stream).await;
                    mine.lock().expect("not poisoned").remove(&id);
                });
                held.insert(id, task);
            }
        }));
        Ok(Self {
            address,
            status,
            asked,
            delay,
            body,
            accepting,
            connections,
        })
    }

    pub fn set_status(&self, status: u16) {
        self.status.store(status, Ordering::SeqCst);
    }

    /// From now on `/readyz` says this.
    pub fn say(&self, status: u16, body: &str) {
        body.clone_into(&mut self.body.lock().expect("not poisoned"));
        self.set_status(status);
    }

    /// From now on each answer takes so long.
    pub fn set_delay(&self, delay: Duration) {
        self.delay
            .store(delay.as_millis().try_into().expect("short"), Ordering::SeqCst);
    }

    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    /// Stops listening; connections go on.
    pub async fn close(&mut self) {
        if let Some(accepting) = self.accepting.take() {
            accepting.abort();
            let _ = accepting.await;
        }
    }

    /// Ends as a killed process does: when this returns, all its sockets are closed.
    pub async fn kill(mut self) {
        self.close().await;
        let held = std::mem::take(&mut *self.connections.lock().expect("not poisoned"));
        for connection in held.into_values() {
            connection.abort();
            let _ = connection.await;
        }
    }
}

impl Drop for TestBackend {
    fn drop(&mut self) {
        self.accepting.iter().for_each(JoinHandle::abort);
        if let Ok(connections) = self.connections.lock() {
            connections.values().for_each(JoinHandle::abort);
        }
    }
}

#[derive(Clone)]
struct Server {
    tls: TlsAcceptor,
    status: Arc<AtomicU16>,
    asked: Arc<AtomicUsize>,
    delay: Arc<AtomicU64>,
    body: Arc<Mutex<String>>,
    address: SocketAddr,
}

impl Server {
    async fn think(&self) {
        tokio::time::sleep(Duration::from_millis(self.delay.load(Ordering::SeqCst))).await;
    }

    async fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        let mut first = [0];
        if stream.peek(&mut first).await? == 0 {
            return Ok(());
        }
        match first[0] {
            b'E' => echo(&mut stream).await,
            b'S' => sum(&mut stream).await,
            // Boxed, so that a connection that says nothing stays small.
            _ => Box::pin(self.serve_tls(stream)).await,
        }
    }

    async fn serve_tls(&self, stream: TcpStream) -> io::Result<()> {
        let mut stream = BufReader::new(self.tls.accept(stream).await?);
        let mut line = String::new();
        loop {
            line.clear();
            if stream.read_line(&mut line).await? == 0 {
                return Ok(());
            }
            match line.trim() {
                "" => {
                    self.think().await;
                    let status = self.status.load(Ordering::SeqCst);
                    let body = self.body.lock().expect("not poisoned").clone();
                    let answer = format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                    stream.write_all(answer.as_bytes()).await?;
                }
                "WHO" => {
                    self.asked.fetch_add(1, Ordering::SeqCst);
                    self.think().await;
                    stream.write_all(format!("{}\n", self.address.ip()).as_bytes()).await?;
                }
                "ECHO" => {
                    self.asked.fetch_add(1, Ordering::SeqCst);
                    return echo(&mut stream).await;
                }
                "SUM" => return sum(&mut stream).await,
                // What is left are the lines of a GET, which an empty one ends.
                _ => continue,
            }
            stream.flush().await?;
        }
    }
}

async fn echo<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> io::Result<()> {
    let mut buffer = vec![0; 128 * 1024];
    loop {
        match stream.read(&mut buffer).await? {
            0 => return stream.shutdown().await,
            n => stream.write_all(&buffer[..n]).await?,
        }
        stream.flush().await?;
    }
}

async fn sum<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> io::Result<()> {
    let mut sum = 0_u64;
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match stream.read(&mut buffer).await? {
            0 => break,
            n => sum += buffer[..n].iter().map(|b| u64::from(*b)).sum::<u64>(),
        }
    }
    stream.write_all(sum.to_string().as_bytes()).await?;
    stream.shutdown().await
}

/// A port that is free on this revision's address.
pub fn free_port(revision: u16) -> u16 {
    let listener = std::net::TcpListener::bind((ports::revision_address(revision), 0)).expect("a free port");
    listener.local_addr().expect("bound").port()
}

/// A loopback address that is free now.
pub fn free_address() -> SocketAddr {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("bound")
}

pub fn revision_address(revision: u16, port: u16) -> SocketAddr {
    SocketAddrV4::new(ports::revision_address(revision), port).into()
}

/// Waits until the front's state is as wanted.
pub async fn until(front: &FrontHandle, what: &str, wanted: impl FnMut(&FrontState) -> bool) {
    let mut state = front.watch();
    let waiting = tokio::time::timeout(Duration::from_secs(10), state.wait_for(wanted)).await;
    assert!(
        waiting.is_ok(),
        "waited for {what} in vain; state: {:?}",
        *front.watch().borrow()
    );
}

pub fn local(revision: u16, port: u16) -> Backend {
    Backend::Local { revision, port }
}
