//! A client outside the machines: new TLS connections at a steady rate, every answer counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use base64::Engine as _;

/// What a prober has seen since the first answer.
#[derive(Debug, Clone, Default)]
pub struct Probes {
    /// Requests answered with success.
    pub succeeded: u64,
    /// Requests that failed, each in words with its time since the first answer.
    pub failed: Vec<String>,
    /// The slowest successful request.
    pub longest: Duration,
    /// The longest time from one answer to the next, whichever requests they were to.
    pub silence: Duration,
}

/// Runs until stopped.
pub struct Prober {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Probes>>>,
}

impl Prober {
    /// Asks `server` (such as `https://10.89.0.1:6443`) for a namespace, with the credentials of a kubeconfig, on `rate` new TLS
    /// connections a second. Counts from the first success on, as before there is no API to lose.
    pub fn start(kubeconfig: &str, server: Option<&str>, rate: u32) -> Result<Self> {
        let login = Login::from_kubeconfig(kubeconfig)?;
        let server = server.unwrap_or(&login.server);
        let urls = vec![format!("{server}/api/v1/namespaces/default")];
        Ok(Self::run(login.client()?, urls, rate))
    }

    /// Asks `urls` in turn, over plain HTTP, on `rate` new connections a second. Counts once each has answered.
    pub fn start_http(urls: Vec<String>, rate: u32) -> Result<Self> {
        let client = builder().build()?;
        Ok(Self::run(client, urls, rate))
    }

    fn run(client: reqwest::Client, urls: Vec<String>, rate: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            Ok(runtime.block_on(probe(client, &urls, rate, &stopped)))
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    /// Stops, and tells what was seen.
    pub fn stop(mut self) -> Result<Probes> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            _ => anyhow::bail!("the prober died"),
        }
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Who a kubeconfig says one is, and where.
pub(crate) struct Login {
    pub(crate) server: String,
    ca: Vec<u8>,
    identity: Vec<u8>,
}

impl Login {
    pub(crate) fn from_kubeconfig(kubeconfig: &str) -> Result<Self> {
        let config: serde_json::Value = serde_saphyr::from_str(kubeconfig).context("the kubeconfig is not YAML")?;
        let field = |value: &serde_json::Value| -> Result<Vec<u8>> {
            let text = value.as_str().context("the kubeconfig lacks a certificate or key")?;
            Ok(base64::engine::general_purpose::STANDARD.decode(text)?)
        };
        let mut identity = field(&config["users"][0]["user"]["client-certificate-data"])?;
        identity.extend(field(&config["users"][0]["user"]["client-key-data"])?);
        Ok(Self {
            server: config["clusters"][0]["cluster"]["server"]
                .as_str()
                .context("the kubeconfig names no server")?
                .to_owned(),
            ca: field(&config["clusters"][0]["cluster"]["certificate-authority-data"])?,
            identity,
        })
    }

    /// A client that makes a new connection for each request, and gives each 10 s.
    fn client(&self) -> Result<reqwest::Client> {
        Ok(self.builder()?.timeout(Duration::from_secs(10)).build()?)
    }

    /// The same without a limit of time.
    pub(crate) fn builder(&self) -> Result<reqwest::ClientBuilder> {
        Ok(builder()
            .tls_certs_only([reqwest::Certificate::from_pem(&self.ca)?])
            .identity(reqwest::Identity::from_pem(&self.identity)?))
    }
}

fn builder() -> reqwest::ClientBuilder {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().pool_max_idle_per_host(0).no_proxy()
}

async fn probe(client: reqwest::Client, urls: &[String], rate: u32, stop: &AtomicBool) -> Probes {
    // What has not answered yet has nothing to lose: machines learn of a service one after the other.
    for url in urls {
        while !stop.load(Ordering::Relaxed) && !client.get(url).send().await.is_ok_and(|r| r.status().is_success()) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    let mut tick = tokio::time::interval(Duration::from_secs(1) / rate);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut probes = Probes::default();
    let mut first: Option<Instant> = None;
    let mut answers = Vec::new();
    let mut running = tokio::task::JoinSet::new();
    let mut next = urls.iter().cycle();
    while !stop.load(Ordering::Relaxed) {
        tick.tick().await;
        let Some(url) = next.next() else { break };
        let request = client.get(url);
        running.spawn(async move {
            let start = Instant::now();
            let result = match request.send().await {
                Ok(reply) if reply.status().is_success() => {
                    reply.bytes().await.map(|_| ()).map_err(|e| format!("{e:?}"))
                }
                Ok(reply) => Err(format!("status {}", reply.status())),
                Err(e) => Err(format!("{e:?}")),
            };
            (start, start.elapsed(), result)
        });
        while let Some(Ok(done)) = running.try_join_next() {
            count(&mut probes, &mut first, &mut answers, done);
        }
    }
    while let Some(Ok(done)) = running.join_next().await {
        count(&mut probes, &mut first, &mut answers, done);
    }
    answers.sort_unstable();
    let between = answers.windows(2).map(|pair| pair[1] - pair[0]);
    probes.silence = between.max().unwrap_or_default();
    probes
}

fn count(
    probes: &mut Probes,
    first: &mut Option<Instant>,
    answers: &mut Vec<Instant>,
    (start, took, result): (Instant, Duration, Result<(), String>),
) {
    match result {
        Ok(()) => {
            first.get_or_insert(start);
            answers.push(start + took);
            probes.succeeded += 1;
            probes.longest = probes.longest.max(took);
        }
        // Requests sent before the first one that succeeded met no API yet.
        Err(error) => {
            if let Some(first) = first
                && start >= *first
            {
                probes.failed.push(format!(
                    "{:.1} s after the first answer: {error}",
                    start.duration_since(*first).as_secs_f64()
                ));
            }
        }
    }
}
