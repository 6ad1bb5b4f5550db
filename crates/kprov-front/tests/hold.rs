//! Clients wait while something is changed beneath the API servers, or are led to other machines.

#![expect(clippy::panic_in_result_fn, reason = "tests assert")]

mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kprov_front::{Front, FrontConfig, FrontHandle, Listener, ListenerState, Pool, WhenEmpty};
use support::{Pki, TestBackend, free_address, free_port, revision_address, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(10);
const LONG: Duration = Duration::from_secs(30);

/// A control-plane machine: its own API server, another machine's, and its two listeners.
struct Machine {
    pki: Arc<Pki>,
    own: TestBackend,
    other: TestBackend,
    address: SocketAddr,
    loopback: SocketAddr,
    front: FrontHandle,
}

impl Machine {
    async fn start() -> Result<Self> {
        let pki = Arc::new(Pki::new()?);
        let port = free_port(2);
        let own = TestBackend::start(&pki, revision_address(2, port), 200)?;
        let other = TestBackend::start(&pki, "127.0.0.1:0".parse()?, 200)?;
        let (address, loopback) = (free_address(), free_address());
        let listener = |address, pool, when_empty| Listener {
            address,
            pool,
            when_empty,
        };
        let front = Front::start(FrontConfig {
            listeners: vec![
                listener(address, Pool::Local, WhenEmpty::Close),
                listener(loopback, Pool::LocalThenRemote, WhenEmpty::Hold(PATIENCE)),
            ],
            ..pki.front(Some(port), vec![other.address])
        })?;
        let ready = |state: &kprov_front::FrontState| {
            state.ready().count() == 2 && state.listeners.get(&address) == Some(&ListenerState::Open)
        };
        until(&front, "both backends", ready).await;
        Ok(Self {
            pki,
            own,
            other,
            address,
            loopback,
            front,
        })
    }

    async fn who(&self, address: SocketAddr) -> Result<String> {
        Ok(timeout(PATIENCE, self.pki.who(address)).await.context("no answer")??)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_wait_while_the_front_holds() -> Result<()> {
    let machine = Machine::start().await?;
    let mut before = TcpStream::connect(machine.address).await?;
    before.write_all(b"E").await?;
    assert_eq!(before.read_u8().await?, b'E');

    let hold = machine.front.hold(LONG);
    before.write_all(b"1").await?;
    let waits = timeout(Duration::from_millis(300), before.read_u8()).await;
    assert!(waits.is_err(), "what a client sends waits: {waits:?}");
    let (pki, address) = (Arc::clone(&machine.pki), machine.address);
    let newcomer = tokio::spawn(async move { pki.who(address).await });
    // The listener stays open although nothing is ready.
    machine.own.set_status(500);
    until(&machine.front, "the backend to fail", |s| s.ready().count() == 1).await;
    let asked = machine.own.asked();
    assert_eq!(
        machine.front.watch().borrow().listeners.get(&machine.address),
        Some(&ListenerState::Open)
    );
    // What other machines can answer needs not wait.
    assert_eq!(machine.who(machine.loopback).await?, "127.0.0.1");
    machine.own.set_status(200);
    until(&machine.front, "the backend", |s| s.ready().count() == 2).await;
    assert!(!newcomer.is_finished());
    assert_eq!(machine.own.asked(), asked);

    drop(hold);
    assert_eq!(timeout(PATIENCE, before.read_u8()).await??, b'1');
    let answer = timeout(PATIENCE, newcomer).await???;
    assert_eq!(answer, machine.own.address.ip().to_string());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_go_on_while_the_front_holds() -> Result<()> {
    const LENGTH: usize = 32 << 20;
    let machine = Machine::start().await?;
    let stream = TcpStream::connect(machine.address).await?;
    let (mut reader, mut writer) = stream.into_split();
    let sending = tokio::spawn(async move {
        writer.write_all(b"E").await?;
        writer.write_all(&vec![7; LENGTH]).await?;
        writer.shutdown().await
    });
    reader.read_u8().await?;
    let hold = machine.front.hold(LONG);
    // What had reached the backend comes back, and then no more.
    let mut buffer = vec![0; 1 << 16];
    let mut got = 0;
    while let Ok(read) = timeout(Duration::from_millis(500), reader.read(&mut buffer)).await {
        got += read?;
    }
    assert!(got < LENGTH, "it was all there before the front held");
    drop(hold);
    while got < LENGTH {
        let read = timeout(PATIENCE, reader.read(&mut buffer)).await??;
        assert!(read > 0, "the connection ended after {got} bytes");
        got += read;
    }
    sending.await??;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hold_has_an_end() -> Result<()> {
    let machine = Machine::start().await?;
    let start = Instant::now();
    let hold = machine.front.hold(Duration::from_millis(400));
    machine.who(machine.address).await?;
    assert!(start.elapsed() >= Duration::from_millis(400));
    assert!(!machine.front.watch().borrow().held);
    drop(hold);
    machine.who(machine.address).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_machine_leads_to_others() -> Result<()> {
    let machine = Machine::start().await?;
    let own = machine.own.address.ip().to_string();
    assert_eq!(machine.who(machine.loopback).await?, own);
    let mut before = TcpStream::connect(machine.address).await?;
    before.write_all(b"E").await?;
    assert_eq!(before.read_u8().await?, b'E');

    let drain = machine.front.drain_local();
    let closed = |s: &kprov_front::FrontState| s.listeners.get(&machine.address) == Some(&ListenerState::Closed);
    until(&machine.front, "the machine's listener to close", closed).await;
    let refused = TcpStream::connect(machine.address).await.map(drop).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    assert_eq!(machine.who(machine.loopback).await?, "127.0.0.1");
    before.write_all(b"2").await?;
    assert_eq!(timeout(PATIENCE, before.read_u8()).await??, b'2', "connections go on");
    // Better its own than none.
    machine.other.set_status(500);
    until(&machine.front, "the other to fail", |s| s.ready().count() == 1).await;
    assert_eq!(machine.who(machine.loopback).await?, own);

    drop(drain);
    let open = |s: &kprov_front::FrontState| s.listeners.get(&machine.address) == Some(&ListenerState::Open);
    until(&machine.front, "the machine's listener to open", open).await;
    assert_eq!(machine.who(machine.address).await?, own);
    Ok(())
}
