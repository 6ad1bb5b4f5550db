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
        let config: serde_json::Value = serde_saphyr::from_str(kubeconfig).context("the kubeconfig is not YAML")?;
        let server = match server {
            Some(server) => server.to_owned(),
            None => config["clusters"][0]["cluster"]["server"]
                .as_str()
                .context("the kubeconfig names no server")?
                .to_owned(),
        };
        let field = |value: &serde_json::Value| -> Result<Vec<u8>> {
            let text = value.as_str().context("the kubeconfig lacks a certificate or key")?;
            Ok(base64::engine::general_purpose::STANDARD.decode(text)?)
        };
        let ca = field(&config["clusters"][0]["cluster"]["certificate-authority-data"])?;
        let mut identity = field(&config["users"][0]["user"]["client-certificate-data"])?;
        identity.extend(field(&config["users"][0]["user"]["client-key-data"])?);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(probe(
                &format!("{server}/api/v1/namespaces/default"),
                &ca,
                &identity,
                rate,
                &stopped,
            ))
        });
        Ok(Self {
            stop,
            thread: Some(thread),
        })
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

async fn probe(url: &str, ca: &[u8], identity: &[u8], rate: u32, stop: &AtomicBool) -> Result<Probes> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder()
        .tls_certs_only([reqwest::Certificate::from_pem(ca)?])
        .identity(reqwest::Identity::from_pem(identity)?)
        .pool_max_idle_per_host(0)
        .no_proxy()
        .timeout(Duration::from_secs(10))
        .build()?;
    let mut tick = tokio::time::interval(Duration::from_secs(1) / rate);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut probes = Probes::default();
    let mut first: Option<Instant> = None;
    let mut running = tokio::task::JoinSet::new();
    while !stop.load(Ordering::Relaxed) {
        tick.tick().await;
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
            count(&mut probes, &mut first, done);
        }
    }
    while let Some(Ok(done)) = running.join_next().await {
        count(&mut probes, &mut first, done);
    }
    Ok(probes)
}

fn count(
    probes: &mut Probes,
    first: &mut Option<Instant>,
    (start, took, result): (Instant, Duration, Result<(), String>),
) {
    match result {
        Ok(()) => {
            first.get_or_insert(start);
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
