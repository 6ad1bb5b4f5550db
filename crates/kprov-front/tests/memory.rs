//! What idle connections cost. A test binary of its own: it looks at the process as a whole.

mod support;

use std::time::Duration;

use anyhow::{Context, Result};
use kprov_front::{Front, FrontConfig, Listener, Pool, WhenEmpty};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use support::{Pki, TestBackend, free_address, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Resident memory of this process, in bytes.
fn resident() -> Result<usize> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: usize = statm.split(' ').nth(1).context("statm has a second field")?.parse()?;
    Ok(pages * 4096)
}

fn open_files() -> Result<usize> {
    Ok(std::fs::read_dir("/proc/self/fd")?.count())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_idle_connections_are_cheap() -> Result<()> {
    const COUNT: usize = 1000;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let pki = Pki::new()?;
    let backend = TestBackend::start(&pki, "127.0.0.1:0".parse()?, 200)?;
    let address = free_address();
    let listener = Listener {
        address,
        pool: Pool::Remote,
        when_empty: WhenEmpty::Hold(Duration::ZERO),
    };
    let config = FrontConfig {
        listeners: vec![listener],
        ..pki.front(None, vec![backend.address])
    };
    let front = Front::start(config)?;
    until(&front, "the backend", |s| s.ready().count() == 1).await;

    let (memory, files) = (resident()?, open_files()?);
    let mut clients = Vec::with_capacity(COUNT);
    for _ in 0..COUNT {
        clients.push(TcpStream::connect(address).await?);
    }
    let all = async {
        while front.connections().values().sum::<usize>() < COUNT {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), all).await?;
    let each = resident()?.saturating_sub(memory) / COUNT;
    let sockets = open_files()?.saturating_sub(files);
    println!("{each} bytes of memory a connection (front, test client and test backend together), {sockets} files");
    assert!(each < 8 * 1024, "{each} bytes for each idle connection");
    // Two for the front, one each for the test's client and backend; no pipes.
    assert!(sockets <= 4 * COUNT + 16, "{sockets} files");

    for client in &mut clients {
        client.write_all(b"E").await?;
        assert_eq!(client.read_u8().await?, b'E');
    }
    Ok(())
}
