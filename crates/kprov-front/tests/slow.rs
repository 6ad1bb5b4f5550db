//! Backends that are slow, or that nobody can take for up: who waits, who goes elsewhere, and who is turned away.

#![expect(clippy::panic_in_result_fn, reason = "tests assert")]

mod support;

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kprov_front::health::{Outcome, Standing};
use kprov_front::{Backend, Front, FrontConfig, FrontHandle, FrontState, Listener, ListenerState, Pool, WhenEmpty};
use support::{Pki, TestBackend, free_address, free_port, local, revision_address, until};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// Longer than a check waits for an answer.
const SLOW: Duration = Duration::from_secs(3);
const WITHOUT_ETCD: &str = "[+]ping ok\n[-]etcd failed: reason withheld\n[+]shutdown ok\nreadyz check failed\n";
const ENDING: &str = "[+]ping ok\n[+]etcd ok\n[-]shutdown failed: reason withheld\nreadyz check failed\n";

/// A machine: its own revisions, behind a listener that closes when it has nobody to offer.
fn machine(pki: &Pki, port: u16, address: SocketAddr) -> Result<FrontHandle> {
    let listener = Listener {
        address,
        pool: Pool::Local,
        when_empty: WhenEmpty::Close,
    };
    Ok(Front::start(FrontConfig {
        listeners: vec![listener],
        ..pki.front(Some(port), vec![])
    })?)
}

/// What the balancer does, with these backends.
fn balancer(pki: &Pki, address: SocketAddr, backends: Vec<SocketAddr>) -> Result<FrontHandle> {
    let listener = Listener {
        address,
        pool: Pool::Remote,
        when_empty: WhenEmpty::TryAll,
    };
    Ok(Front::start(FrontConfig {
        listeners: vec![listener],
        ..pki.front(None, backends)
    })?)
}

fn stands(backend: Backend, standing: Standing) -> impl Fn(&FrontState) -> bool {
    move |state| state.backends.get(&backend).is_some_and(|b| b.standing == standing)
}

fn is(address: SocketAddr, listener: ListenerState) -> impl Fn(&FrontState) -> bool {
    move |state| state.listeners.get(&address) == Some(&listener)
}

async fn refuses(address: SocketAddr) -> bool {
    matches!(TcpStream::connect(address).await, Err(error) if error.kind() == ErrorKind::ConnectionRefused)
}

/// New TLS connections, four at a time, until told to stop; tells how many there were. Each has to be answered.
fn visit(pki: &Arc<Pki>, address: SocketAddr, stop: &Arc<AtomicBool>) -> Vec<JoinHandle<Result<usize>>> {
    let one = |_| {
        let (pki, stop) = (Arc::clone(pki), Arc::clone(stop));
        tokio::spawn(async move {
            let mut answered = 0;
            while !stop.load(Ordering::SeqCst) {
                let begun = Instant::now();
                let who = timeout(Duration::from_secs(20), pki.who(address)).await?;
                who.with_context(|| format!("failed after {:?}", begun.elapsed()))?;
                answered += 1;
                sleep(Duration::from_millis(10)).await;
            }
            Ok(answered)
        })
    };
    (0..4).map(one).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_answers_close_nothing_and_reset_nobody() -> Result<()> {
    let pki = Arc::new(Pki::new()?);
    let (port, address) = (free_port(2), free_address());
    let backend = TestBackend::start(&pki, revision_address(2, port), 200)?;
    let front = machine(&pki, port, address)?;
    until(&front, "the listener", is(address, ListenerState::Open)).await;
    let mut state = front.watch();
    let closing = tokio::spawn(async move {
        state
            .wait_for(|state| !is(address, ListenerState::Open)(state))
            .await
            .is_ok()
    });
    let stop = Arc::new(AtomicBool::new(false));
    let visits = visit(&pki, address, &stop);

    backend.set_delay(SLOW);
    until(&front, "it to be slow", stands(local(2, port), Standing::Slow)).await;
    {
        let state = front.watch().borrow().clone();
        assert!(!state.revision_ready(2), "what is slow proves nothing");
        assert_eq!(state.usable().collect::<Vec<_>>(), [local(2, port)]);
    }
    // Some checks more.
    sleep(3 * SLOW).await;
    assert!(stands(local(2, port), Standing::Slow)(&front.watch().borrow()));
    backend.set_delay(Duration::ZERO);
    until(&front, "it to be up", stands(local(2, port), Standing::Up)).await;
    // Quick answers as well: of slow ones four visitors get hardly twenty.
    sleep(Duration::from_secs(1)).await;

    stop.store(true, Ordering::SeqCst);
    let mut answered = 0;
    for visitor in visits {
        answered += visitor.await??;
    }
    ensure!(answered > 20, "only {answered} visits");
    assert!(!closing.is_finished(), "the listener was closed");
    closing.abort();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_one_is_used_when_nobody_else_takes_the_connection() -> Result<()> {
    let pki = Arc::new(Pki::new()?);
    let (strict, any) = (free_address(), free_address());
    let quick = TestBackend::start(&pki, "127.0.0.1:0".parse()?, 200)?;
    let slow = TestBackend::start(&pki, "127.0.0.2:0".parse()?, 200)?;
    let listener = |address, when_empty| Listener {
        address,
        pool: Pool::Remote,
        when_empty,
    };
    let front = Front::start(FrontConfig {
        listeners: vec![
            listener(strict, WhenEmpty::Hold(Duration::from_secs(5))),
            listener(any, WhenEmpty::TryAll),
        ],
        ..pki.front(None, vec![quick.address, slow.address])
    })?;
    until(&front, "both", |s| s.ready().count() == 2).await;
    slow.set_delay(SLOW);
    until(
        &front,
        "one to be slow",
        stands(Backend::Remote(slow.address), Standing::Slow),
    )
    .await;
    for _ in 0..10 {
        for address in [strict, any] {
            assert_eq!(pki.who(address).await?, "127.0.0.1", "the quick one goes first");
        }
    }
    // At once, before any check has seen that it is gone.
    quick.kill().await;
    let (strict, any) = tokio::join!(pki.who(strict), pki.who(any));
    assert_eq!((strict?.as_str(), any?.as_str()), ("127.0.0.2", "127.0.0.2"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_process_that_ends_closes_its_listener() -> Result<()> {
    let pki = Pki::new()?;
    let (port, address) = (free_port(2), free_address());
    let backend = TestBackend::start(&pki, revision_address(2, port), 200)?;
    let front = machine(&pki, port, address)?;
    until(&front, "the listener", is(address, ListenerState::Open)).await;
    backend.set_delay(SLOW);
    until(&front, "it to be slow", stands(local(2, port), Standing::Slow)).await;
    assert!(!refuses(address).await);
    backend.kill().await;
    let killed = Instant::now();
    while !refuses(address).await {
        assert!(killed.elapsed() < Duration::from_millis(500), "still open");
        sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_answer_says_decides() -> Result<()> {
    let pki = Pki::new()?;
    let (port, address) = (free_port(2), free_address());
    let backend = TestBackend::start(&pki, revision_address(2, port), 200)?;
    let front = machine(&pki, port, address)?;
    until(&front, "the listener", is(address, ListenerState::Open)).await;
    backend.say(500, WITHOUT_ETCD);
    until(&front, "it to be slow", stands(local(2, port), Standing::Slow)).await;
    assert_eq!(pki.who(address).await?, "127.64.0.2", "it still takes connections");
    backend.say(200, "ok");
    until(&front, "it to be up", stands(local(2, port), Standing::Up)).await;

    let mut state = front.watch();
    let until_down = state.wait_for(|state| !stands(local(2, port), Standing::Up)(state));
    backend.say(500, ENDING);
    let standing = timeout(Duration::from_secs(10), until_down).await??.backends[&local(2, port)].standing;
    assert_eq!(standing, Standing::Down, "at once, and not slow before");
    until(&front, "the listener to close", is(address, ListenerState::Closed)).await;
    // One that is down does not become slow.
    backend.say(500, WITHOUT_ETCD);
    until(&front, "the answer", |s| {
        s.backends
            .get(&local(2, port))
            .is_some_and(|b| b.last == Some(Outcome::WithoutEtcd))
    })
    .await;
    assert!(stands(local(2, port), Standing::Down)(&front.watch().borrow()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_try_all_tries_them_again() -> Result<()> {
    let pki = Arc::new(Pki::new()?);
    let (up, down, address) = (
        TestBackend::start(&pki, "127.0.0.1:0".parse()?, 200)?,
        TestBackend::start(&pki, "127.0.0.2:0".parse()?, 500)?,
        free_address(),
    );
    let (first, second) = (up.address, down.address);
    let front = balancer(&pki, address, vec![first, second])?;
    until(&front, "one", |s| s.ready().count() == 1).await;
    assert_eq!(pki.who(address).await?, "127.0.0.1");
    // The only one that is up is gone: one that is down takes it.
    up.kill().await;
    assert_eq!(pki.who(address).await?, "127.0.0.2");

    // All are gone, and one comes back in time.
    down.kill().await;
    let asking = tokio::spawn({
        let pki = Arc::clone(&pki);
        async move { pki.who(address).await }
    });
    sleep(Duration::from_millis(800)).await;
    assert!(!asking.is_finished(), "it waits");
    let back = TestBackend::start(&pki, second, 500)?;
    assert_eq!(asking.await??, "127.0.0.2");

    // Nobody comes.
    back.kill().await;
    let begun = Instant::now();
    assert!(pki.who(address).await.is_err());
    let took = begun.elapsed().as_millis();
    assert!((1_800..4_000).contains(&took), "{took} ms");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_takes_no_connection_is_not_slow() -> Result<()> {
    let pki = Pki::new()?;
    // The kernel drops what does not fit into its queue.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
    socket.listen(0)?;
    let address = socket.local_addr()?.as_socket().context("an address")?;
    let _fill = std::net::TcpStream::connect(address)?;
    let key = Backend::Remote(address);
    let front = balancer(&pki, free_address(), vec![address])?;
    until(&front, "a check", |s| {
        s.backends
            .get(&key)
            .is_some_and(|b| b.last == Some(Outcome::Unreachable))
    })
    .await;
    assert!(stands(key, Standing::Down)(&front.watch().borrow()));
    Ok(())
}
