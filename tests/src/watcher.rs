//! One long watch from outside, resumed whenever its connection ends, while another client writes: nothing may be missing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::prober::Login;

/// What a watcher has seen.
#[derive(Debug, Clone, Default)]
pub struct Watched {
    /// Writes that the API accepted.
    pub written: u64,
    /// Writes that it did not, each in words.
    pub failed_writes: Vec<String>,
    /// The numbers that the watch told of, in order.
    pub seen: Vec<u64>,
    /// How often the watch's connection ended and it was resumed.
    pub resumed: u64,
}

impl Watched {
    /// Every write that was accepted was seen, once, in order.
    pub fn without_gap(&self) -> Result<()> {
        ensure!(self.written > 10, "only {} writes were made", self.written);
        ensure!(
            self.failed_writes.is_empty(),
            "writes failed: {:#?}",
            self.failed_writes
        );
        let gaps: Vec<_> = self.seen.windows(2).filter(|pair| pair[1] != pair[0] + 1).collect();
        ensure!(gaps.is_empty(), "the watch has gaps: {gaps:?}");
        ensure!(
            self.seen.last() == Some(&self.written),
            "the watch ends at {:?}, {} were written",
            self.seen.last(),
            self.written
        );
        Ok(())
    }
}

/// Runs until stopped.
pub struct Watcher {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Watched>>>,
}

const NAME: &str = "e2e-ticker";

impl Watcher {
    /// Writes the ConfigMap `e2e-ticker` twice a second, and watches it.
    pub fn start(kubeconfig: &str) -> Result<Self> {
        let login = Login::from_kubeconfig(kubeconfig)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(run(&login, &stopped))
        });
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    /// Stops, and tells what was seen.
    pub fn stop(mut self) -> Result<Watched> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            _ => bail!("the watcher died"),
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

async fn run(login: &Login, stop: &AtomicBool) -> Result<Watched> {
    let client = login.builder()?.build()?;
    let maps = format!("{}/api/v1/namespaces/default/configmaps", login.server);
    let map = |n: u64| json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": NAME }, "data": { "n": n.to_string() } });
    client.delete(format!("{maps}/{NAME}")).send().await?;
    let made: Value = client
        .post(&maps)
        .json(&map(0))
        .send()
        .await?
        .error_for_status()?
        .json()
        .await?;
    let version = made["metadata"]["resourceVersion"]
        .as_str()
        .context("no resourceVersion")?
        .to_owned();
    let write = async {
        let (mut failed, mut n) = (Vec::new(), 0);
        let mut tick = tokio::time::interval(Duration::from_millis(500));
        while !stop.load(Ordering::Relaxed) {
            tick.tick().await;
            let request = client
                .put(format!("{maps}/{NAME}"))
                .timeout(Duration::from_secs(10))
                .json(&map(n + 1));
            match request.send().await.and_then(reqwest::Response::error_for_status) {
                Ok(_) => n += 1,
                // A lost reply may have been a write; so the number is looked up before it goes on.
                Err(error) => {
                    failed.push(format!("{error:?}"));
                    if let Ok(reply) = client.get(format!("{maps}/{NAME}")).send().await
                        && let Ok(now) = reply.json::<Value>().await
                    {
                        n = now["data"]["n"].as_str().and_then(|n| n.parse().ok()).unwrap_or(n);
                    }
                }
            }
        }
        (n, failed)
    };
    let seen = Mutex::new((Vec::new(), 0));
    let watch = follow(&client, &maps, version, &seen);
    let all = async {
        let (written, failed_writes) = write.await;
        // What was written last may be on its way still.
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while lock(&seen).0.last() != Some(&written) && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        (written, failed_writes)
    };
    let (written, failed_writes) = tokio::select! {
        done = all => done,
        gap = watch => return Err(gap),
    };
    let (seen, resumed) = lock(&seen).clone();
    Ok(Watched {
        written,
        failed_writes,
        seen,
        resumed,
    })
}

/// The numbers seen, and how often the watch was resumed.
type Seen = Mutex<(Vec<u64>, u64)>;

fn lock(seen: &Seen) -> std::sync::MutexGuard<'_, (Vec<u64>, u64)> {
    seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Watches from `version` on, and resumes from the last event seen whenever the connection ends. Returns only for a gap:
/// the API says that it can't resume from there.
async fn follow(client: &reqwest::Client, maps: &str, mut version: String, seen: &Seen) -> anyhow::Error {
    loop {
        let url = format!(
            "{maps}?watch=1&allowWatchBookmarks=true&fieldSelector=metadata.name%3D{NAME}&resourceVersion={version}"
        );
        let Ok(mut reply) = client.get(&url).send().await else {
            tokio::time::sleep(Duration::from_millis(200)).await;
            continue;
        };
        if reply.status() == reqwest::StatusCode::GONE {
            return anyhow::anyhow!("the watch can't resume from {version}");
        }
        let mut buffer = Vec::new();
        while let Ok(Some(bytes)) = reply.chunk().await {
            buffer.extend_from_slice(&bytes);
            while let Some(end) = buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                let Ok(event) = serde_json::from_slice::<Value>(&line) else {
                    continue;
                };
                if event["type"] == "ERROR" {
                    if event["object"]["code"] == 410 {
                        return anyhow::anyhow!("the watch can't resume from {version}: {event}");
                    }
                    break;
                }
                if let Some(new) = event["object"]["metadata"]["resourceVersion"].as_str() {
                    new.clone_into(&mut version);
                }
                if event["type"] != "BOOKMARK"
                    && let Some(n) = event["object"]["data"]["n"].as_str().and_then(|n| n.parse().ok())
                {
                    lock(seen).0.push(n);
                }
            }
        }
        lock(seen).1 += 1;
    }
}
