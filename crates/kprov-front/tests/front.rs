//! Fronts over real TLS backends on this machine's loopback.

#![expect(clippy::panic_in_result_fn, reason = "tests assert")]

mod support;

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kprov_front::health::Standing;
use kprov_front::{
    Backend, BalancerConfig, BalancerFile, Front, FrontConfig, FrontError, Listener, ListenerState, Pool, WhenEmpty,
    run_balancer,
};
use support::{Pki, TestBackend, free_address, free_port, local, revision_address, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(10);

fn listener(address: SocketAddr, pool: Pool, when_empty: WhenEmpty) -> Listener {
    Listener {
        address,
        pool,
        when_empty,
    }
}

fn hold(address: SocketAddr, pool: Pool) -> Listener {
    listener(address, pool, WhenEmpty::Hold(Duration::from_secs(5)))
}

fn with(config: FrontConfig, listeners: Vec<Listener>) -> FrontConfig {
    FrontConfig { listeners, ..config }
}

/// Opens new TLS connections all the time, one after the other, and asks on each who answers.
struct Visitor {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<Visits>,
}

#[derive(Default)]
struct Visits {
    answers: Vec<String>,
    failures: Vec<anyhow::Error>,
}

impl Visitor {
    fn start(pki: &Arc<Pki>, address: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let count = Arc::new(AtomicUsize::new(0));
        let (pki, stopped, counted) = (Arc::clone(pki), Arc::clone(&stop), Arc::clone(&count));
        let task = tokio::spawn(async move {
            let mut visits = Visits::default();
            while !stopped.load(Ordering::SeqCst) {
                match timeout(PATIENCE, pki.who(address))
                    .await
                    .context("no answer")
                    .and_then(|r| Ok(r?))
                {
                    Ok(who) => visits.answers.push(who),
                    Err(error) => visits.failures.push(error),
                }
                counted.fetch_add(1, Ordering::SeqCst);
                sleep(Duration::from_millis(2)).await;
            }
            visits
        });
        Self { stop, count, task }
    }

    /// Waits until so many more visits have been made.
    async fn more(&self, visits: usize) -> Result<()> {
        let enough = self.count.load(Ordering::SeqCst) + visits;
        let waiting = async {
            while self.count.load(Ordering::SeqCst) < enough {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(6 * PATIENCE, waiting).await.context("the visitor is stuck")
    }

    async fn end(self) -> Result<Visits> {
        self.stop.store(true, Ordering::SeqCst);
        Ok(self.task.await?)
    }

    /// Ends, and lets no visit have failed.
    async fn end_unharmed(self) -> Result<Vec<String>> {
        let Visits { answers, failures } = self.end().await?;
        assert!(
            failures.is_empty(),
            "{} of {} failed: {failures:?}",
            failures.len(),
            failures.len() + answers.len()
        );
        Ok(answers)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_roll_costs_no_connection() -> Result<()> {
    let pki = Arc::new(Pki::new()?);
    let (port, address) = (free_port(2), free_address());
    let mut old = TestBackend::start(&pki, revision_address(2, port), 200)?;
    let front = Front::start(with(
        pki.front(Some(port), vec![]),
        vec![listener(address, Pool::Local, WhenEmpty::Close)],
    ))?;
    until(&front, "the listener", |s| {
        s.listeners.get(&address) == Some(&ListenerState::Open)
    })
    .await;
    let mut watch = pki.connect(address).await?;
    watch.write_all(b"ECHO\n").await?;
    until(&front, "revision 2", |s| s.revision_ready(2)).await;

    let visitor = Visitor::start(&pki, address);
    visitor.more(30).await?;
    let new = TestBackend::start(&pki, revision_address(3, port), 500)?;
    visitor.more(60).await?;
    assert_eq!(new.asked(), 0, "a newcomer that is not ready gets nothing");
    new.set_status(200);
    until(&front, "revision 3", |s| s.revision_ready(3)).await;
    // The old one shuts down: it says so, serves on for a while, stops listening, and ends.
    old.set_status(500);
    until(&front, "revision 2 to leave", |s| !s.revision_ready(2)).await;
    visitor.more(10).await?;
    old.close().await;
    until(&front, "revision 2 to be gone", |s| {
        !s.backends.contains_key(&local(2, port))
    })
    .await;
    assert_eq!(
        front.connections().get(&local(2, port)),
        Some(&1),
        "its open connection stays, and is counted"
    );
    watch.write_all(b"still here").await?;
    let mut answer = [0; 10];
    watch.read_exact(&mut answer).await?;
    assert_eq!(&answer, b"still here");
    old.kill().await;
    visitor.more(30).await?;

    let answers = visitor.end_unharmed().await?;
    let moved = answers
        .iter()
        .position(|who| who == "127.64.0.3")
        .context("nobody reached revision 3")?;
    assert!(moved > 0 && answers[..moved].iter().all(|who| who == "127.64.0.2"));
    assert!(
        answers[moved..].iter().all(|who| who == "127.64.0.3"),
        "nobody goes back"
    );
    front.shutdown(Duration::ZERO).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newcomer_that_crashes_gets_no_connection() -> Result<()> {
    let pki = Arc::new(Pki::new()?);
    let (port, address) = (free_port(2), free_address());
    let _old = TestBackend::start(&pki, revision_address(2, port), 200)?;
    let front = Front::start(with(pki.front(Some(port), vec![]), vec![hold(address, Pool::Local)]))?;
    until(&front, "revision 2", |s| s.revision_ready(2)).await;
    let visitor = Visitor::start(&pki, address);
    for status in [500, 503, 401] {
        let new = TestBackend::start(&pki, revision_address(3, port), status)?;
        until(&front, "revision 3 to be seen", |s| {
            s.backends.get(&local(3, port)).is_some_and(|b| b.last.is_some())
        })
        .await;
        visitor.more(10).await?;
        assert_eq!(new.asked(), 0);
        new.kill().await;
        until(&front, "revision 3 to be gone", |s| {
            !s.backends.contains_key(&local(3, port))
        })
        .await;
    }
    assert!(visitor.end_unharmed().await?.iter().all(|who| who == "127.64.0.2"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_backend_takes_no_later_connection_with_it() -> Result<()> {
    let pki = Arc::new(Pki::new()?);
    let (port, address) = (free_port(2), free_address());
    let _first = TestBackend::start(&pki, revision_address(2, port), 200)?;
    let second = TestBackend::start(&pki, revision_address(3, port), 200)?;
    let other = TestBackend::start(&pki, "127.0.0.1:0".parse()?, 200)?;
    let third = TestBackend::start(&pki, "127.0.0.1:0".parse()?, 200)?;
    let remotes = vec![other.address, third.address];
    let both = free_address();
    let listeners = vec![hold(address, Pool::LocalThenRemote), hold(both, Pool::Remote)];
    let front = Front::start(with(pki.front(Some(port), remotes), listeners))?;
    until(&front, "all backends", |s| s.ready().count() == 4).await;
    assert_eq!(pki.who(address).await?, "127.64.0.3");

    let visitors = [Visitor::start(&pki, address), Visitor::start(&pki, both)];
    for visitor in &visitors {
        visitor.more(20).await?;
    }
    second.kill().await;
    assert!(third.asked() > 0 && other.asked() > 0, "remotes take turns");
    let killed = third.address;
    third.kill().await;
    assert_eq!(pki.who(address).await?, "127.64.0.2");
    until(&front, "the killed ones to leave", |s| {
        !s.backends.contains_key(&local(3, port))
            && s.backends
                .get(&Backend::Remote(killed))
                .is_some_and(|b| b.standing == Standing::Down)
    })
    .await;
    for visitor in visitors {
        visitor.more(20).await?;
        let Visits { answers: _, failures } = visitor.end().await?;
        // The request that the killed process was just answering is lost with it; no later one is.
        assert!(failures.len() <= 1, "{failures:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn remotes_step_in_only_where_they_may() -> Result<()> {
    let pki = Pki::new()?;
    let (port, mixed, strict) = (free_port(2), free_address(), free_address());
    let remote = TestBackend::start(&pki, "127.0.0.1:0".parse()?, 200)?;
    let listeners = vec![
        hold(mixed, Pool::LocalThenRemote),
        listener(strict, Pool::Local, WhenEmpty::Close),
    ];
    let front = Front::start(with(pki.front(Some(port), vec![]), listeners))?;
    front.set_remote_backends(vec![remote.address]);
    until(&front, "the remote", |s| s.ready().count() == 1).await;
    assert_eq!(pki.who(mixed).await?, "127.0.0.1");
    let refused = TcpStream::connect(strict).await.map(drop).map_err(|e| e.kind());
    assert_eq!(refused, Err(ErrorKind::ConnectionRefused));

    let own = TestBackend::start(&pki, revision_address(2, port), 200)?;
    until(&front, "revision 2", |s| s.revision_ready(2)).await;
    assert_eq!(pki.who(mixed).await?, "127.64.0.2");
    own.kill().await;
    assert_eq!(pki.who(mixed).await?, "127.0.0.1");
    front.set_remote_backends(vec![]);
    until(&front, "no backend", |s| s.backends.is_empty()).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_listener_closes_and_reopens() -> Result<()> {
    let pki = Pki::new()?;
    let (port, address) = (free_port(2), free_address());
    let backend = TestBackend::start(&pki, revision_address(2, port), 500)?;
    let front = Front::start(with(
        pki.front(Some(port), vec![]),
        vec![listener(address, Pool::Local, WhenEmpty::Close)],
    ))?;
    let is = |state: ListenerState| move |s: &kprov_front::FrontState| s.listeners.get(&address) == Some(&state);
    until(&front, "the first check", |s| {
        s.backends.get(&local(2, port)).is_some_and(|b| b.last.is_some())
    })
    .await;
    let mut lasting = None;
    for round in 0..3 {
        until(&front, "closed", is(ListenerState::Closed)).await;
        assert_eq!(
            TcpStream::connect(address).await.map(drop).map_err(|e| e.kind()),
            Err(ErrorKind::ConnectionRefused)
        );
        backend.set_status(200);
        until(&front, "open", is(ListenerState::Open)).await;
        assert_eq!(pki.who(address).await?, "127.64.0.2", "round {round}");
        if lasting.is_none() {
            let mut client = pki.connect(address).await?;
            client.write_all(b"ECHO\n").await?;
            lasting = Some(client);
        }
        backend.set_status(500);
    }
    until(&front, "closed", is(ListenerState::Closed)).await;
    let mut lasting = lasting.context("a connection")?;
    lasting.write_all(b"x").await?;
    assert_eq!(
        lasting.read_u8().await?,
        b'x',
        "an open connection outlives its listener"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_planes_loopback_refuses_until_a_backend_starts_and_then_waits_for_it() -> Result<()> {
    let pki = Arc::new(Pki::new()?);
    let (port, address) = (free_port(2), free_address());
    let starting = WhenEmpty::CloseUnlessStarting(Duration::from_secs(20));
    // A machine of which nothing is known says nothing of whether it starts.
    let elsewhere = free_address();
    let front = Front::start(with(
        pki.front(Some(port), vec![elsewhere]),
        vec![listener(address, Pool::LocalThenRemote, starting)],
    ))?;
    let is = |state: ListenerState| move |s: &kprov_front::FrontState| s.listeners.get(&address) == Some(&state);
    until(&front, "closed", is(ListenerState::Closed)).await;
    let refused = TcpStream::connect(address).await.map(drop).map_err(|e| e.kind());
    assert_eq!(refused, Err(ErrorKind::ConnectionRefused));

    let backend = TestBackend::start(&pki, revision_address(2, port), 500)?;
    until(&front, "open", is(ListenerState::Open)).await;
    let early = tokio::spawn({
        let pki = Arc::clone(&pki);
        async move { pki.who(address).await }
    });
    backend.set_status(200);
    assert_eq!(early.await??, "127.64.0.2");
    backend.kill().await;
    until(&front, "closed again", is(ListenerState::Closed)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_taken_address_is_an_error_or_waited_for() -> Result<()> {
    let pki = Pki::new()?;
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = taken.local_addr()?;
    let refused = Front::start(with(pki.front(None, vec![]), vec![hold(address, Pool::Remote)]));
    assert!(matches!(refused.err(), Some(FrontError::Bind { address: a, .. }) if a == address));

    let port = free_port(2);
    let _backend = TestBackend::start(&pki, revision_address(2, port), 200)?;
    let front = Front::start(with(
        pki.front(Some(port), vec![]),
        vec![listener(address, Pool::Local, WhenEmpty::Close)],
    ))?;
    until(&front, "failed", |s| {
        matches!(s.listeners.get(&address), Some(ListenerState::Failed(_)))
    })
    .await;
    drop(taken);
    until(&front, "open", |s| {
        s.listeners.get(&address) == Some(&ListenerState::Open)
    })
    .await;
    assert_eq!(pki.who(address).await?, "127.64.0.2");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_loopback_client_waits_for_the_first_backend() -> Result<()> {
    let pki = Arc::new(Pki::new()?);
    let (port, address) = (free_port(2), free_address());
    let short = free_address();
    let listeners = vec![
        hold(address, Pool::Local),
        listener(short, Pool::Local, WhenEmpty::Hold(Duration::from_millis(100))),
    ];
    let _front = Front::start(with(pki.front(Some(port), vec![]), listeners))?;
    let begun = Instant::now();
    assert!(pki.who(short).await.is_err());
    assert!(
        (100..2000).contains(&begun.elapsed().as_millis()),
        "{:?}",
        begun.elapsed()
    );

    let early = tokio::spawn({
        let pki = Arc::clone(&pki);
        async move { pki.who(address).await }
    });
    sleep(Duration::from_millis(300)).await;
    let backend = TestBackend::start(&pki, revision_address(2, port), 500)?;
    sleep(Duration::from_millis(300)).await;
    assert!(!early.is_finished());
    backend.set_status(200);
    assert_eq!(timeout(PATIENCE, early).await???, "127.64.0.2");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_of_another_authority_is_never_ready() -> Result<()> {
    let (pki, stranger) = (Pki::new()?, Pki::new()?);
    let backend = TestBackend::start(&stranger, "127.0.0.1:0".parse()?, 200)?;
    let front = Front::start(pki.front(None, vec![backend.address]))?;
    let key = Backend::Remote(backend.address);
    until(&front, "a check", |s| {
        s.backends.get(&key).is_some_and(|b| b.last.is_some())
    })
    .await;
    sleep(Duration::from_millis(500)).await;
    assert_eq!(front.watch().borrow().ready().count(), 0);
    front.set_trust(&kprov_front::Trust::Ca(stranger.ca_pem.clone()))?;
    until(&front, "it to be trusted", |s| s.ready().count() == 1).await;
    Ok(())
}

/// A plain TCP connection through a front to a backend that is ready.
async fn through(pki: &Pki) -> Result<(kprov_front::FrontHandle, TestBackend, TcpStream)> {
    let backend = TestBackend::start(pki, "127.0.0.1:0".parse()?, 200)?;
    let address = free_address();
    let front = Front::start(with(
        pki.front(None, vec![backend.address]),
        vec![hold(address, Pool::Remote)],
    ))?;
    until(&front, "the backend", |s| s.ready().count() == 1).await;
    let client = TcpStream::connect(address).await?;
    Ok((front, backend, client))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_close_is_passed_on() -> Result<()> {
    let pki = Pki::new()?;
    let (_front, _backend, mut client) = through(&pki).await?;
    let mut data = vec![b'S'];
    data.extend(std::iter::repeat_n(1, 300_000));
    client.write_all(&data).await?;
    client.shutdown().await?;
    let mut answer = String::new();
    timeout(PATIENCE, client.read_to_string(&mut answer)).await??;
    assert_eq!(answer, (300_000 + u64::from(b'S')).to_string());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_transfers_arrive_intact() -> Result<()> {
    const TOTAL: usize = 96 * 1024 * 1024;
    let pki = Pki::new()?;
    let (_front, _backend, client) = through(&pki).await?;
    // A period that is no power of two, so that a block out of place is noticed.
    let pattern: Vec<u8> = std::iter::once(b'E').chain(1..=250).cycle().take(251 * 1009).collect();
    let (mut reader, mut writer) = client.into_split();
    let sent = pattern.clone();
    let sending = tokio::spawn(async move {
        let mut left = TOTAL;
        while left > 0 {
            let n = left.min(sent.len());
            writer.write_all(&sent[..n]).await?;
            left -= n;
        }
        writer.shutdown().await
    });
    let mut buffer = vec![0; 1 << 20];
    let mut received = 0;
    loop {
        let n = timeout(PATIENCE, reader.read(&mut buffer)).await??;
        if n == 0 {
            break;
        }
        for (i, byte) in buffer[..n].iter().enumerate() {
            assert_eq!(
                *byte,
                pattern[(received + i) % pattern.len()],
                "at byte {}",
                received + i
            );
        }
        received += n;
    }
    sending.await??;
    assert_eq!(received, TOTAL);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_holds_the_sender_back_and_loses_nothing() -> Result<()> {
    const TOTAL: usize = 80 * 1024 * 1024;
    let pki = Pki::new()?;
    let (_front, _backend, client) = through(&pki).await?;
    let (mut reader, mut writer) = client.into_split();
    let sending = tokio::spawn(async move {
        writer.write_all(&vec![b'E'; TOTAL]).await?;
        writer.shutdown().await
    });
    sleep(Duration::from_millis(500)).await;
    assert!(
        !sending.is_finished(),
        "nobody reads, so not everything can have been sent"
    );
    let mut all = Vec::new();
    timeout(PATIENCE, reader.read_to_end(&mut all)).await??;
    assert_eq!(all.len(), TOTAL);
    sending.await??;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_break_on_one_side_breaks_the_other() -> Result<()> {
    let pki = Pki::new()?;
    let (front, backend, mut client) = through(&pki).await?;
    let remote = Backend::Remote(backend.address);
    client.write_all(b"E").await?;
    assert_eq!(client.read_u8().await?, b'E');
    assert_eq!(front.connections().get(&remote), Some(&1));
    // A client that vanishes: reset, not closed.
    socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
    drop(client);
    let ended = async {
        while front.connections().get(&remote) != Some(&0) {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, ended)
        .await
        .context("the connection to the backend stayed")?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_lets_connections_end_and_then_ends_them() -> Result<()> {
    let pki = Pki::new()?;
    let (front, _backend, mut client) = through(&pki).await?;
    let address = client.peer_addr()?;
    client.write_all(b"E").await?;
    assert_eq!(client.read_u8().await?, b'E');
    let stopping = tokio::spawn(front.shutdown(Duration::from_millis(700)));
    sleep(Duration::from_millis(200)).await;
    assert!(TcpStream::connect(address).await.is_err(), "it listens no more");
    client.write_all(b"F").await?;
    assert_eq!(client.read_u8().await?, b'F', "an open connection goes on");
    timeout(PATIENCE, stopping).await??;
    assert!(!matches!(timeout(PATIENCE, client.read(&mut [0])).await?, Ok(1..)));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_balancer_follows_its_file() -> Result<()> {
    let pki = Pki::new()?;
    let first = TestBackend::start(&pki, "127.0.0.1:0".parse()?, 200)?;
    let second = TestBackend::start(&pki, "127.0.0.2:0".parse()?, 200)?;
    let directory = tempfile::tempdir()?;
    let backends_file = directory.path().join("backends.json");
    let listen = free_address();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let config = BalancerConfig {
        listen,
        backends_file: backends_file.clone(),
        ca_pem: None,
    };
    let balancer = tokio::spawn(run_balancer(config, async move { drop(stopped.await) }));
    let write = |backends: &[SocketAddr], ca: Option<&str>| -> Result<()> {
        let file = BalancerFile {
            backends: backends.to_vec(),
            ca: ca.map(Into::into),
        };
        Ok(std::fs::write(&backends_file, serde_json::to_vec(&file)?)?)
    };
    let until_answers = async |who: &str| -> Result<()> {
        let asking = async {
            while pki.who(listen).await.ok().as_deref() != Some(who) {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE, asking)
            .await
            .with_context(|| format!("{who} never answered"))
    };
    // It listens without any backend, and resets.
    let listening = async {
        while TcpStream::connect(listen).await.is_err() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, listening).await?;
    assert!(pki.who(listen).await.is_err());

    write(&[first.address], None)?;
    until_answers("127.0.0.1").await?;
    std::fs::write(&backends_file, "{")?;
    sleep(Duration::from_millis(1500)).await;
    assert_eq!(pki.who(listen).await?, "127.0.0.1", "a malformed file changes nothing");
    write(&[second.address], Some(&pki.ca_pem))?;
    until_answers("127.0.0.2").await?;
    assert_eq!(pki.who(listen).await?, "127.0.0.2");
    // One that is all there is gets connections even when it says that it is not ready.
    second.set_status(500);
    sleep(Duration::from_millis(1500)).await;
    assert_eq!(pki.who(listen).await?, "127.0.0.2");
    drop(stop);
    timeout(PATIENCE, balancer).await???;
    assert!(TcpStream::connect(listen).await.is_err());
    Ok(())
}
