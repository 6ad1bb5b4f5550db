//! How long a large cluster's upgrade takes, against how long it has to take.

use std::fmt;

use kprov_types::api::{MaxUnavailable, UpdatePolicy};

use crate::run::run;
use crate::script::{Millis, ReleaseShape, SECOND, Script, Shape};

/// What a simulated fleet took.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Workers.
    pub workers: usize,
    /// How many of them were out of service at once, at most.
    pub limit: usize,
    /// From the moment the first worker after the canary is taken out of service to when the last is back.
    pub took: Millis,
    /// From the moment the canary is taken out of service to when the first of the others is.
    pub canary: Millis,
    /// How long one worker is out of service, on average.
    pub each: Millis,
    /// The whole upgrade.
    pub elapsed: Millis,
    /// Why it didn't come to its end.
    pub failed: Option<String>,
}

impl Measured {
    /// `ceil(workers / limit)` times the time of one, the canary apart: it can't take less.
    pub fn floor(&self) -> Millis {
        let rounds = self.workers.saturating_sub(1).div_ceil(self.limit.max(1));
        self.each * u64::try_from(rounds).unwrap_or(u64::MAX)
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |ms: Millis| format!("{}.{:01} s", ms / 1000, ms % 1000 / 100);
        write!(
            f,
            "{} workers, {} at once: {} for all after the canary ({} the least possible, {} each), canary {}, all in all {}",
            self.workers,
            self.limit,
            seconds(self.took),
            seconds(self.floor()),
            seconds(self.each),
            seconds(self.canary),
            seconds(self.elapsed),
        )?;
        self.failed.as_ref().map_or(Ok(()), |why| write!(f, "; {why}"))
    }
}

/// Upgrades a fleet by one patch, three control-plane machines and `workers` workers, and measures.
pub fn measure(workers: usize, max_unavailable: MaxUnavailable) -> Measured {
    let release = |version: &str| ReleaseShape {
        version: version.to_owned(),
        etcd: 1,
        addons: 1,
        defect: None,
        fixed_by: None,
    };
    let script = Script {
        seed: 1,
        cluster: Shape {
            control_plane: 3,
            workers,
            pools: 1,
            // A pod on each, which takes all the time that Kubernetes gives it by default.
            apps: workers / 3,
            grace: 30 * SECOND,
            policy: UpdatePolicy {
                max_unavailable,
                ..UpdatePolicy::default()
            },
            even: true,
        },
        releases: vec![release("1.35.1"), release("1.35.2")],
        wanted: 1,
        faults: Vec::new(),
    };
    let report = run(&script);
    // Control-plane machines come before the other workers, the canary before both.
    let mut outages = report.outages;
    outages.sort_unstable();
    let canary = outages.first().copied().unwrap_or_default();
    let others = outages.split_off(outages.len().min(4));
    let begun = others.first().map_or(0, |(from, _)| *from);
    let ended = others.iter().map(|(_, until)| *until).max().unwrap_or_default();
    let out: Millis = others.iter().map(|(from, until)| until - from).sum();
    Measured {
        workers,
        limit: max_unavailable.of(workers),
        took: ended - begun,
        canary: outages.get(1).map_or(0, |(from, _)| *from) - canary.0,
        each: out / u64::try_from(others.len().max(1)).unwrap_or(1),
        elapsed: report.elapsed,
        failed: report.violation.map(|violation| violation.to_string()),
    }
}
