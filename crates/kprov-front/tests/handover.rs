//! A program with a front replaces itself by `execve(2)`, again and again, under clients that must not notice.

#![expect(clippy::panic_in_result_fn, reason = "tests assert")]
#![expect(clippy::print_stdout, reason = "the program tells the test where it is")]

mod support;

use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use kprov_front::{Front, FrontConfig, Handover, Listener, Pool, WhenEmpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use support::{Pki, TestBackend, free_address, free_port, revision_address};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdout, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(20);
/// How often the program is replaced.
const TIMES: usize = 8;
/// Set for the process that is the program and not the test.
const PROGRAM: &str = "KPROV_FRONT_TEST_PROGRAM";

#[derive(Serialize, Deserialize)]
struct Settings {
    listen: SocketAddr,
    port: u16,
    ca: String,
}

/// What the program does: it serves until a signal tells it to replace itself.
async fn program(settings: &str) -> Result<()> {
    let Settings { listen, port, ca } = serde_json::from_str(settings)?;
    let mut replace = signal(SignalKind::user_defined1())?;
    let listener = Listener {
        address: listen,
        pool: Pool::Local,
        when_empty: WhenEmpty::Close,
    };
    let config = FrontConfig {
        local_port: Some(port),
        ..FrontConfig::worker(vec![listener], ca)
    };
    let (front, carried) = match Handover::take()? {
        Some(handover) => {
            let carried = handover.connections();
            (Front::resume(config, handover)?, carried)
        }
        None => (Front::start(config)?, 0),
    };
    println!("front {carried}");
    replace.recv().await;
    front.hand_over().await.leave()?;
    let error = std::process::Command::new(std::env::current_exe()?)
        .args(std::env::args().skip(1))
        .exec();
    Err(error.into())
}

/// The program as the test sees it.
struct Program {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Program {
    fn start(settings: &Settings) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--exact", "nobody_notices_that_the_program_is_replaced", "--nocapture"])
            .env(PROGRAM, serde_json::to_string(settings)?)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().context("piped")?).lines();
        Ok(Self { child, lines })
    }

    /// Waits until it serves; tells how many connections were handed over to it.
    async fn serves(&mut self) -> Result<usize> {
        let found = async {
            while let Some(line) = self.lines.next_line().await? {
                if let Some((_, carried)) = line.split_once("front ") {
                    return Ok(carried.parse()?);
                }
            }
            bail!("it has ended");
        };
        timeout(PATIENCE, found).await?
    }

    async fn replace(&mut self) -> Result<usize> {
        let pid = self.child.id().context("it runs")?;
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGUSR1)?;
        self.serves().await
    }
}

/// Bytes that differ from place to place and from one seed to another.
fn data(seed: u8, length: usize) -> Vec<u8> {
    let mut state = u32::from(seed) + 1;
    let next = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// Sends and gets back data without pause, in pieces of all sizes, until it is told to stop.
async fn echo(address: SocketAddr, seed: u8, stop: Arc<AtomicBool>, bytes: Arc<AtomicUsize>) -> Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(b"E").await?;
    ensure!(stream.read_u8().await? == b'E');
    let mut length = usize::from(seed) + 1;
    while !stop.load(Ordering::SeqCst) {
        let sent = data(seed, length);
        let mut got = vec![0; length];
        let (mut reader, mut writer) = stream.split();
        let exchange = async { tokio::try_join!(writer.write_all(&sent), reader.read_exact(&mut got)) };
        timeout(PATIENCE, exchange).await.context("stuck")??;
        ensure!(sent == got, "other bytes came back");
        bytes.fetch_add(length, Ordering::SeqCst);
        length = length * 3 % 700_001 + 1;
    }
    stream.shutdown().await?;
    ensure!(stream.read(&mut [0; 1]).await? == 0, "more than was sent");
    Ok(())
}

/// New TLS connections all the time, each with one question.
async fn visit(pki: Arc<Pki>, address: SocketAddr, stop: Arc<AtomicBool>, visits: Arc<AtomicUsize>) -> Result<()> {
    while !stop.load(Ordering::SeqCst) {
        timeout(PATIENCE, pki.who(address)).await.context("no answer")??;
        visits.fetch_add(1, Ordering::SeqCst);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_notices_that_the_program_is_replaced() -> Result<()> {
    if let Ok(settings) = std::env::var(PROGRAM) {
        return program(&settings).await;
    }
    let pki = Arc::new(Pki::new()?);
    let (address, port) = (free_address(), free_port(2));
    let _backend = TestBackend::start(&pki, revision_address(2, port), 200)?;
    let mut program = Program::start(&Settings {
        listen: address,
        port,
        ca: pki.ca_pem.clone(),
    })?;
    assert_eq!(program.serves().await?, 0);
    let pid = program.child.id();
    let first = async {
        while pki.who(address).await.is_err() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, first).await?;

    let (stop, bytes, visits) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
        Arc::new(AtomicUsize::new(0)),
    );
    let mut clients = tokio::task::JoinSet::new();
    for seed in 0..4 {
        clients.spawn(echo(address, seed, Arc::clone(&stop), Arc::clone(&bytes)));
    }
    for _ in 0..2 {
        clients.spawn(visit(Arc::clone(&pki), address, Arc::clone(&stop), Arc::clone(&visits)));
    }
    // A client that sends and does not read: what is on its way fills every buffer there is, pipes included.
    let slow = TcpStream::connect(address).await?;
    let (mut reader, mut writer) = slow.into_split();
    let sent = [b"E".to_vec(), data(99, 24 << 20)].concat();
    let sending = {
        let sent = sent.clone();
        tokio::spawn(async move {
            writer.write_all(&sent).await?;
            writer.shutdown().await
        })
    };
    // One that has ended its half before the program is replaced, and is answered afterwards.
    let mut half = pki.connect(address).await?;
    half.write_all(b"SUM\n").await?;
    half.write_all(&[1; 1000]).await?;
    let mut idle = pki.connect(address).await?;
    idle.write_all(b"ECHO\n").await?;

    for time in 0..TIMES {
        let before = (visits.load(Ordering::SeqCst), bytes.load(Ordering::SeqCst));
        let going_on = async {
            while visits.load(Ordering::SeqCst) < before.0 + 10 || bytes.load(Ordering::SeqCst) < before.1 + (1 << 20) {
                sleep(Duration::from_millis(5)).await;
                if let Some(ended) = clients.try_join_next() {
                    ended??;
                }
            }
            anyhow::Ok(())
        };
        timeout(PATIENCE, going_on).await.context("clients are stuck")??;
        if time == TIMES / 2 {
            half.shutdown().await?;
        }
        let carried = program.replace().await?;
        assert!(carried >= 6, "{carried} connections were handed over");
    }
    assert_eq!(program.child.id(), pid, "it is one process all the time");
    stop.store(true, Ordering::SeqCst);
    while let Some(ended) = clients.join_next().await {
        ended??;
    }

    let mut got = Vec::new();
    timeout(PATIENCE, reader.read_to_end(&mut got)).await??;
    sending.await??;
    assert!(got == sent, "{} of {} bytes, or others", got.len(), sent.len());
    let mut sum = String::new();
    timeout(PATIENCE, half.read_to_string(&mut sum)).await??;
    assert_eq!(sum, "1000");
    idle.write_all(b"still here").await?;
    let mut answer = [0; 10];
    timeout(PATIENCE, idle.read_exact(&mut answer)).await??;
    assert_eq!(&answer, b"still here");
    println!(
        "{} visits, {} bytes",
        visits.load(Ordering::SeqCst),
        bytes.load(Ordering::SeqCst)
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_exec_costs_nothing() -> Result<()> {
    let pki = Pki::new()?;
    let backend = TestBackend::start(&pki, "127.0.0.1:0".parse()?, 200)?;
    let listener = Listener {
        address: free_address(),
        pool: Pool::Remote,
        when_empty: WhenEmpty::Hold(Duration::from_secs(5)),
    };
    let config = FrontConfig {
        listeners: vec![listener],
        ..pki.front(None, vec![backend.address])
    };
    assert!(Handover::take()?.is_none(), "nothing was left yet");
    let front = Front::start(config.clone())?;
    let mut client = pki.connect(listener.address).await?;
    client.write_all(b"ECHO\n").await?;
    front.hand_over().await.leave()?;
    drop(front);
    let error = std::process::Command::new("/nonexistent").exec();
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    client.write_all(b"x").await?;
    let before = TcpStream::connect(listener.address)
        .await
        .context("the kernel accepts meanwhile")?;
    let handover = Handover::take()?.context("it was left")?;
    // What the new front knows of backends it has from the old one.
    let config = FrontConfig {
        remote_backends: Vec::new(),
        ..config
    };
    let front = Front::resume(config, handover)?;
    assert_eq!(front.watch().borrow().ready().count(), 1);
    assert_eq!(timeout(PATIENCE, client.read_u8()).await??, b'x');
    drop(before);
    pki.who(listener.address).await?;
    assert!(Handover::take()?.is_none(), "it can be taken once");
    Ok(())
}
