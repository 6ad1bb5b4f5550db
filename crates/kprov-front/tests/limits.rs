//! A front that runs out of file descriptors. A test binary of its own: the limit is the process's.

mod support;

use std::time::Duration;

use anyhow::Result;
use kprov_front::{Front, FrontConfig, Listener, Pool, WhenEmpty};
use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit};
use nix::sys::time::TimeValLike;
use support::{Pki, TestBackend, free_address, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

fn processor_time_ms() -> Result<i64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    Ok(usage.user_time().num_milliseconds() + usage.system_time().num_milliseconds())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_file_descriptors_it_waits_and_goes_on() -> Result<()> {
    const CLIENTS: usize = 60;
    let pki = Pki::new()?;
    let backend = TestBackend::start(&pki, "127.0.0.1:0".parse()?, 200)?;
    let address = free_address();
    let listener = Listener {
        address,
        pool: Pool::Remote,
        when_empty: WhenEmpty::Hold(Duration::from_secs(20)),
    };
    let config = FrontConfig {
        listeners: vec![listener],
        ..pki.front(None, vec![backend.address])
    };
    let front = Front::start(config)?;
    until(&front, "the backend", |s| s.ready().count() == 1).await;

    let sockets = (0..CLIENTS)
        .map(|_| TcpSocket::new_v4())
        .collect::<Result<Vec<_>, _>>()?;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let open = std::fs::read_dir("/proc/self/fd")?.count();
    setrlimit(Resource::RLIMIT_NOFILE, open as u64 + 15, hard)?;
    let mut clients = Vec::new();
    for socket in sockets {
        let mut client = socket.connect(address).await?;
        client.write_all(b"E").await?;
        clients.push(client);
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let before = processor_time_ms()?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let spent = processor_time_ms()? - before;
    assert!(spent < 200, "{spent} ms of processor time in a second of waiting");
    assert!(front.connections().values().sum::<usize>() < CLIENTS, "the limit holds");
    assert_eq!(front.watch().borrow().ready().count(), 1, "the backend is not to blame");

    setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;
    for client in &mut clients {
        assert_eq!(
            tokio::time::timeout(Duration::from_secs(10), client.read_u8()).await??,
            b'E'
        );
    }
    Ok(())
}
