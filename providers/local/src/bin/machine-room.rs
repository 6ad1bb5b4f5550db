//! The hidden subcommands that `kprov` offers, alone, so that the tests here can start machines without it; and what
//! these tests run inside machines. The balancer is the simplest there can be: it serves the first backend that answers.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use kprov_provider::Provider;
use kprov_provider_local::{LocalConfig, LocalProvider, machine_init};
use kprov_types::machine::{DiskSpec, FirstBoot, MachineSpec, NetworkSpec};
use kprov_types::{ClusterName, MachineName, Role};

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let [room, init, rest @ ..] = &arguments[..]
        && room == "machine-room"
        && init == "init"
    {
        return machine_init(rest.to_vec());
    }
    let arguments: Vec<String> = arguments.into_iter().filter_map(|a| a.into_string().ok()).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments[..] {
        ["machine-room", "balancer", "--listen", listen, "--state", state] => balance(listen, Path::new(state)),
        ["answer", listen, text] => answer(listen, text),
        ["ask", address] => ask(address),
        ["up", state, cluster, range, first_boot] => up(state, cluster, range, first_boot),
        _ => Err("it is for tests only".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    }
}

/// `machine-room balancer`.
fn balance(listen: &str, state: &Path) -> Result<(), Failure> {
    for client in TcpListener::bind(listen)?.incoming() {
        let file: serde_json::Value = serde_json::from_slice(&std::fs::read(state.join("backends.json"))?)?;
        let backends: Vec<SocketAddr> = serde_json::from_value(file["backends"].clone())?;
        let server = backends.into_iter().find_map(|backend| connect(backend).ok());
        let (Ok(client), Some(server)) = (client, server) else {
            continue;
        };
        for (mut from, mut to) in [(client.try_clone()?, server.try_clone()?), (server, client)] {
            thread::spawn(move || {
                let _ = io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Write);
            });
        }
    }
    Ok(())
}

/// Answers every connection with a text.
fn answer(listen: &str, text: &str) -> Result<(), Failure> {
    for client in TcpListener::bind(listen)?.incoming() {
        // One that has gone again is no reason to stop.
        let _ = client.and_then(|mut c| c.write_all(text.as_bytes()));
    }
    Ok(())
}

/// Prints what is answered at an address.
fn ask(address: &str) -> Result<(), Failure> {
    let mut text = String::new();
    connect(address.parse()?)?.read_to_string(&mut text)?;
    writeln!(io::stdout(), "{text}")?;
    Ok(())
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&address, Duration::from_secs(1))
}

/// Makes a small cluster: what tests kill half way.
fn up(state: &str, cluster: &str, range: &str, first_boot: &str) -> Result<(), Failure> {
    let room_exe = camino::Utf8PathBuf::try_from(std::env::current_exe()?)?;
    let config = LocalConfig {
        state_dir: state.into(),
        ..LocalConfig::new(room_exe)
    };
    let provider = LocalProvider::new(config)?;
    let cluster = ClusterName::new(cluster)?;
    let network = NetworkSpec {
        cidr: Some(range.parse()?),
        api_port: 6443,
    };
    let mut machines = Vec::new();
    for (suffix, role) in [("cp-0", Role::ControlPlane), ("worker-0", Role::Worker)] {
        machines.push(MachineSpec {
            name: MachineName::new(format!("{cluster}-{suffix}"))?,
            role,
            zone: None,
            size: None,
            image: None,
            first_boot: FirstBoot(std::fs::read_to_string(first_boot)?),
            data_disk: true,
        });
    }
    let disks: Vec<DiskSpec> = machines
        .iter()
        .map(|m| DiskSpec {
            machine: m.name.clone(),
            size_gib: 1,
        })
        .collect();
    tokio::runtime::Builder::new_current_thread().build()?.block_on(async {
        provider.ensure_network(&cluster, &network).await?;
        provider.ensure_disks(&cluster, &disks).await?;
        provider.ensure_machines(&cluster, &machines).await?;
        Ok(())
    })
}
