//! The command line, and what it means.

use std::net::SocketAddr;
use std::time::Duration;

use clap::Parser;
use jiff::SignedDuration;

use crate::election::{Terms, TermsError};
use crate::supervise::Start;

/// The longest that a request to the API may take once it was begun: [`kprov_upgrade::kubernetes::KubeCluster`] gives up then.
pub const REQUEST: Duration = Duration::from_secs(10);

/// Keeps a kprov cluster at the version it should run.
#[derive(Clone, Debug, Parser)]
#[command(name = "kprov-operator", version)]
pub struct Options {
    /// Where to answer for health and metrics.
    #[arg(long, default_value = "0.0.0.0:8080", value_name = "ADDRESS")]
    pub listen: SocketAddr,
    /// This operator's name in the election.
    #[arg(long, env = "POD_NAME", default_value = "kprov-operator", value_name = "NAME")]
    pub identity: String,
    /// How long the lead lasts without being renewed: at most so long nobody leads after an operator has died.
    #[arg(long, default_value = "15s", value_name = "DURATION", value_parser = duration)]
    pub lease_duration: Duration,
    /// How often the lead is renewed, and looked at by who waits for it.
    #[arg(long, default_value = "2s", value_name = "DURATION", value_parser = duration)]
    pub renew_interval: Duration,
    /// This process does the work, and was started for that by the container's first one, which passes this on.
    #[arg(long, hide = true, value_name = "START")]
    pub worker: Option<Start>,
}

impl Options {
    /// The terms of the election.
    pub fn terms(&self) -> Result<Terms, TermsError> {
        Terms::new(self.lease_duration, self.renew_interval, REQUEST)
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let duration: SignedDuration = text.parse().map_err(|error: jiff::Error| error.to_string())?;
    Duration::try_from(duration).map_err(|_| "it must not be negative".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(arguments: &[&str]) -> Result<Options, clap::Error> {
        Options::try_parse_from([&["kprov-operator"], arguments].concat())
    }

    #[test]
    fn the_defaults_are_fit_to_run_with() {
        Options::command().debug_assert();
        let options = parse(&["--identity", "a"]).unwrap();
        assert_eq!(options.listen.port(), 8080);
        assert_eq!(options.terms().unwrap().duration(), Duration::from_secs(15));
    }

    #[test]
    fn durations_are_checked() {
        assert_eq!(
            parse(&["--lease-duration", "1m"]).unwrap().lease_duration,
            Duration::from_mins(1)
        );
        for wrong in ["-3s", "soon", ""] {
            assert!(parse(&["--lease-duration", wrong]).is_err(), "{wrong}");
        }
        // A lead that can end while a request runs is none.
        assert!(parse(&["--lease-duration", "10s"]).unwrap().terms().is_err());
    }
}
