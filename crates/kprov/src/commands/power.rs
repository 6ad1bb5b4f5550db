//! Power of bare-metal hosts, by their management controllers: on before `up` logs in to them, off after `down` if asked.

use std::time::Duration;

use futures::StreamExt as _;
use kprov_provider_baremetal::inventory::Host;
use kprov_provider_baremetal::redfish::{Bmc, BmcError, Limits, PowerState};
use tokio::time::Instant;

use crate::progress::Reporter;

/// How many controllers are asked at once.
const PARALLEL: usize = 20;
/// How long a host may take from power to `sshd`: servers test their memory for minutes.
const BOOT_LIMIT: Duration = Duration::from_mins(10);
const ASK: Duration = Duration::from_secs(1);

/// Switches on those of the hosts that have a controller and no power, and waits until they can be logged in to. What stands
/// against it is noted and no error: that a host can't be reached is told by who reaches for it.
pub(super) async fn wake(reporter: &Reporter, hosts: &[Host]) {
    each(hosts, |host| async move {
        let name = host.name.as_str();
        match switch_on(host).await {
            Ok(false) => {}
            Ok(true) => {
                reporter.step(name, "switched on, waiting for SSH");
                until_ssh(host).await;
                reporter.done(name);
            }
            Err(error) => reporter.note(&format!("warning: host `{name}`: {error}; {}", error.hint())),
        }
    })
    .await;
}

/// Switches off those of the hosts that have a controller; tells what could not be.
pub(super) async fn off(reporter: &Reporter, hosts: &[Host]) -> Vec<(Host, BmcError)> {
    let all = each(hosts, |host| async move {
        reporter.step(host.name.as_str(), "switch off");
        let done = switch_off(host).await;
        reporter.done(host.name.as_str());
        done.err().map(|error| (host.clone(), error))
    })
    .await;
    all.into_iter().flatten().collect()
}

async fn each<'a, T, F: Future<Output = T>>(hosts: &'a [Host], work: impl Fn(&'a Host) -> F) -> Vec<T> {
    let with_power: Vec<F> = hosts.iter().filter(|host| host.bmc.is_some()).map(work).collect();
    futures::stream::iter(with_power)
        .buffer_unordered(PARALLEL)
        .collect()
        .await
}

async fn switch_on(host: &Host) -> Result<bool, BmcError> {
    let Some(entry) = &host.bmc else { return Ok(false) };
    let bmc = Bmc::open(entry, Limits::default()).await?;
    if bmc.power().await? != PowerState::Off {
        return Ok(false);
    }
    bmc.power_on().await?;
    Ok(true)
}

async fn switch_off(host: &Host) -> Result<(), BmcError> {
    let Some(entry) = &host.bmc else { return Ok(()) };
    Bmc::open(entry, Limits::default()).await?.power_off().await
}

/// Waits until something listens where the host is logged in to; not for hosts behind others, which can't be seen from here.
async fn until_ssh(host: &Host) {
    let Some(ssh) = host.ssh.as_ref().filter(|ssh| ssh.jump.is_empty()) else {
        return;
    };
    let start = Instant::now();
    while start.elapsed() < BOOT_LIMIT {
        let connecting = tokio::net::TcpStream::connect((ssh.host.as_str(), ssh.port.unwrap_or(22)));
        if let Ok(Ok(_)) = tokio::time::timeout(ASK * 3, connecting).await {
            return;
        }
        tokio::time::sleep(ASK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Global, Progress};
    use kprov_provider_baremetal::inventory::{Bmc as Entry, Credentials};
    use kprov_types::{MachineName, Role};

    #[tokio::test]
    async fn hosts_without_a_controller_are_left_alone_and_errors_name_the_host() {
        let host = |name: &str, bmc: bool| Host {
            name: MachineName::new(name).unwrap(),
            role: Role::Worker,
            address: None,
            external_address: None,
            zone: None,
            labels: [].into(),
            ssh: None,
            bmc: bmc.then(|| Entry {
                address: "http://127.0.0.1:1".into(),
                credentials: Credentials::Env("KPROV_TEST_NO_SUCH_VARIABLE".into()),
                system: None,
                ca_file: None,
                insecure: false,
                mac: None,
            }),
            disk: None,
        };
        let hosts = [host("plain", false), host("managed", true)];
        let reporter = Reporter::new(&Global {
            progress: Progress::None,
            no_progress: true,
            verbose: 0,
            home: None,
        });
        let failed = off(&reporter, &hosts).await;
        assert_eq!(failed.len(), 1);
        assert_eq!(failed[0].0.name.as_str(), "managed");
        assert!(matches!(failed[0].1, BmcError::Credentials { .. }));
    }
}
