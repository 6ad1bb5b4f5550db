//! What the front adds, and what it lets through, next to a direct connection on this machine's loopback.
//!
//! `cargo run --release -p kprov-front --example front-bench`

#![expect(clippy::print_stdout, reason = "its output is the result")]
#![expect(clippy::cast_precision_loss, reason = "figures for people")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kprov_front::{Front, FrontConfig, Listener, Pool, WhenEmpty};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use support::{Pki, TestBackend, free_address, until};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

const REQUESTS: usize = 20_000;
const CONNECTIONS: usize = 1_500;
const ROUNDS: usize = 5;
const BYTES: usize = 1 << 30;
const MESSAGE: usize = 200;

/// A thread with a runtime of its own that does `work` until the process ends.
fn thread<T, F>(work: impl FnOnce(mpsc::Sender<T>) -> F + Send + 'static) -> Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<()>>,
{
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(work(sender))
    });
    receiver.recv().context("a thread failed to start")
}

fn median(mut samples: Vec<Duration>) -> Duration {
    samples.sort_unstable();
    samples.get(samples.len() / 2).copied().unwrap_or_default()
}

fn quantile(samples: &mut [Duration], at: f64) -> Duration {
    samples.sort_unstable();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index within the samples"
    )]
    let index = (samples.len() as f64 * at) as usize;
    samples.get(index.min(samples.len() - 1)).copied().unwrap_or_default()
}

async fn requests(pki: &Pki, address: SocketAddr, count: usize) -> Result<Vec<Duration>> {
    let mut client = pki.connect(address).await?;
    client.write_all(b"ECHO\n").await?;
    let (message, mut answer) = ([7; MESSAGE], [0; MESSAGE]);
    let mut samples = Vec::with_capacity(count);
    for _ in 0..count {
        let begun = Instant::now();
        client.write_all(&message).await?;
        client.read_exact(&mut answer).await?;
        samples.push(begun.elapsed());
    }
    Ok(samples)
}

async fn connections(pki: &Pki, address: SocketAddr, count: usize) -> Result<Vec<Duration>> {
    let mut samples = Vec::with_capacity(count);
    for _ in 0..count {
        let begun = Instant::now();
        pki.who(address).await?;
        samples.push(begun.elapsed());
    }
    Ok(samples)
}

/// Bytes a second from the client to the backend.
async fn transfer<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, first: &[u8], total: usize) -> Result<f64> {
    let block = vec![7; 256 * 1024];
    stream.write_all(first).await?;
    let begun = Instant::now();
    for _ in 0..total / block.len() {
        stream.write_all(&block).await?;
    }
    stream.flush().await?;
    stream.shutdown().await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    anyhow::ensure!(!answer.is_empty(), "no answer");
    Ok(total as f64 / begun.elapsed().as_secs_f64())
}

fn processor_time() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(micros.try_into()?))
}

/// Processor time of one thread so far, in seconds (the first field of `schedstat`, in nanoseconds).
fn thread_time(thread: i32) -> Result<f64> {
    let statistics = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat"))?;
    let nanoseconds: f64 = statistics.split(' ').next().context("a field")?.parse()?;
    Ok(nanoseconds / 1e9)
}

fn main() -> Result<()> {
    let pki: &'static Pki = Box::leak(Box::new(Pki::new()?));
    let direct: SocketAddr = thread(move |ready| async move {
        let backend = TestBackend::start(pki, "127.0.0.1:0".parse()?, 200)?;
        ready.send(backend.address)?;
        std::future::pending().await
    })?;
    let (front, front_thread): (SocketAddr, i32) = thread(move |ready| async move {
        let address = free_address();
        let listener = Listener {
            address,
            pool: Pool::Remote,
            when_empty: WhenEmpty::Close,
        };
        let handle = Front::start(FrontConfig {
            listeners: vec![listener],
            ..pki.front(Some(6443), vec![direct])
        })?;
        until(&handle, "the backend", |s| {
            s.listeners.values().all(|l| *l == kprov_front::ListenerState::Open)
        })
        .await;
        ready.send((address, nix::unistd::gettid().as_raw()))?;
        std::future::pending().await
    })?;

    let begun = (Instant::now(), processor_time()?);
    std::thread::sleep(Duration::from_secs(5));
    let spent = processor_time()?.saturating_sub(begun.1);
    println!(
        "idle, one backend checked every 500 ms and this machine's listeners listed every 200 ms (both ends): {:.2}% of a core",
        100.0 * spent.as_secs_f64() / begun.0.elapsed().as_secs_f64()
    );

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (mut open, mut new) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
        let (mut plain, mut tls) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
        let (mut plain_time, mut tls_time) = (0.0, 0.0);
        for _ in 0..ROUNDS {
            for (i, address) in [direct, front].into_iter().enumerate() {
                open[i].extend(requests(pki, address, REQUESTS / ROUNDS).await?);
                new[i].extend(connections(pki, address, CONNECTIONS / ROUNDS).await?);
                let before = thread_time(front_thread)?;
                plain[i].push(transfer(TcpStream::connect(address).await?, b"S", BYTES).await?);
                let between = thread_time(front_thread)?;
                tls[i].push(transfer(pki.connect(address).await?, b"SUM\n", BYTES / 2).await?);
                if address == front {
                    plain_time += between - before;
                    tls_time += thread_time(front_thread)? - between;
                }
            }
        }
        for (what, [direct, front]) in
            [("request on an open TLS connection", &mut open), ("new TLS connection with one request", &mut new)]
        {
            let medians = [median(direct.clone()), median(front.clone())];
            println!(
                "{what}: direct {:.1} us, through the front {:.1} us, added {:.1} us at the median (99th percentile {:.1} and {:.1} us)",
                medians[0].as_secs_f64() * 1e6,
                medians[1].as_secs_f64() * 1e6,
                (medians[1].as_secs_f64() - medians[0].as_secs_f64()) * 1e6,
                quantile(direct, 0.99).as_secs_f64() * 1e6,
                quantile(front, 0.99).as_secs_f64() * 1e6,
            );
        }
        let gigabytes = (ROUNDS * BYTES) as f64 / 1e9;
        for (what, rates, time) in
            [("TCP", &mut plain, plain_time / gigabytes), ("TLS", &mut tls, tls_time / gigabytes * 2.0)]
        {
            let [direct, front] = rates.each_mut().map(|rates| {
                rates.sort_by(f64::total_cmp);
                rates.get(rates.len() / 2).copied().unwrap_or_default()
            });
            println!(
                "{what} throughput: direct {:.0} MB/s, through the front {:.0} MB/s, {:.0}%; the front spends {:.0} ms of \
                 processor time a GB",
                direct / 1e6,
                front / 1e6,
                100.0 * front / direct,
                time * 1e3
            );
        }
        anyhow::Ok(())
    })
}
