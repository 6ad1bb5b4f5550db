//! The operator's life: it stands for election, and while it leads makes one pass after the other.

use std::error::Error;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use jiff::Timestamp;
use kprov_bootstrap::apply::{ApplyError, apply};
use kprov_bootstrap::manifests::{self, Manifest, NAMESPACE, OPERATOR, Policy};
use kprov_types::Minor;
use kprov_types::api::ReleaseRef;
use kprov_upgrade::drive::{Pass, PassError, pass};
use kprov_upgrade::kubernetes::KubeCluster;
use kprov_upgrade::model::{Action, Input};
use kprov_upgrade::plan::Plan;
use kprov_upgrade::{Cluster, ClusterError, Outcome};
use kube::{Client, Config};
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::election::{Elector, Leadership, TermsError, chain};
use crate::health::{Health, router};
use crate::metrics::{Metrics, action_name};
use crate::options::Options;
use crate::supervise::random;

/// A pass is made at least so often while something is under way: deadlines come without any change of the cluster.
const BUSY: Duration = Duration::from_secs(1);
/// And so often when nothing is.
const IDLE: Duration = Duration::from_secs(30);
/// Two passes are no closer than this: changes come in swarms.
const APART: Duration = Duration::from_millis(100);
/// After a pass that failed, the next one waits so long at first, and twice as long each time, up to [`LONGEST`].
const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(10);
/// How long bringing the kinds' definitions up to date may take.
const DEFINITIONS: Duration = Duration::from_secs(5);
/// How long a pass may go on when the operator was told to stop; its next write is refused in any case.
const GRACE: Duration = Duration::from_secs(5);
/// Who doesn't lead goes round so often all the same.
const STANDBY: Duration = Duration::from_secs(10);

/// Why an operator ends that was not told to.
#[derive(Debug, thiserror::Error)]
pub enum OperateError {
    /// The terms of the election make no sense.
    #[error(transparent)]
    Terms(#[from] TermsError),
    /// No client can be made.
    #[error("could not make a client of the API server")]
    Client(#[source] Box<kube::Error>),
    /// Nobody can ask how it is.
    #[error("could not listen on `{address}`")]
    Listen {
        /// Where.
        address: std::net::SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The name of this process can't be made.
    #[error("the system gives no random numbers")]
    Random(#[source] getrandom::Error),
}

/// Runs until `stop`, then gives the lead up.
///
/// # Errors
///
/// The operator can't begin. Once it has, whatever goes wrong is tried again.
pub async fn operate(mut config: Config, options: &Options, stop: CancellationToken) -> Result<(), OperateError> {
    // Where other crates have rustls built with another provider too, it does not choose. A second time nothing changes.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let terms = options.terms()?;
    // Every pass is a try of its own; 429 is how the API refuses an eviction.
    config.default_retry = false;
    let client = Client::try_from(config.clone()).map_err(|error| OperateError::Client(Box::new(error)))?;
    let listener = TcpListener::bind(options.listen)
        .await
        .map_err(|source| OperateError::Listen {
            address: options.listen,
            source,
        })?;
    let me = match &options.worker {
        Some(start) => start.name(&options.identity),
        None => format!("{}_{}", options.identity, random().map_err(OperateError::Random)?),
    };
    let (health, metrics) = (Health::default(), Arc::new(Metrics::default()));
    let answers = axum::serve(listener, router(health.clone(), Arc::clone(&metrics)));
    let answers = tokio::spawn(answers.into_future());

    let mut elector = Elector::new(client.clone(), NAMESPACE, OPERATOR, me.clone(), terms);
    let leadership = elector.leadership();
    let standing = CancellationToken::new();
    let stood = standing.clone();
    let election = tokio::spawn(async move {
        elector.run(&stood).await;
        elector
    });

    let permit = {
        let (leadership, stop) = (leadership.clone(), stop.clone());
        move || leadership.permits() && !stop.is_cancelled()
    };
    let cluster = KubeCluster::watch(client.clone(), permit.clone()).reaching(move |address| at(&config, address));
    let cluster = Arc::new(cluster);
    let synced = {
        let (cluster, health) = (Arc::clone(&cluster), health.clone());
        // One that waits for the lead reads everything too: it can go on at once.
        tokio::spawn(async move {
            cluster.synced().await;
            health.ready();
        })
    };
    tracing::info!(identity = me, "operates");
    let operator = Operator {
        client,
        cluster,
        leadership,
        health,
        metrics,
        defined: None,
        failing: Failing::default(),
    };
    operator.run(permit, &stop).await;

    // Nothing is written any more; now another may lead.
    standing.cancel();
    if let Ok(elector) = election.await {
        elector.release().await;
    }
    synced.abort();
    answers.abort();
    Ok(())
}

/// A client of the API server on one machine.
fn at(config: &Config, address: IpAddr) -> Option<Client> {
    let host = match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    };
    let mut config = config.clone();
    config.cluster_url = format!("https://{host}:{}", kprov_types::ports::API).parse().ok()?;
    Client::try_from(config).ok()
}

struct Operator {
    client: Client,
    cluster: Arc<KubeCluster>,
    leadership: Leadership,
    health: Health,
    metrics: Arc<Metrics>,
    /// The minor that the kinds' definitions were brought up to date for, by this operator, since it leads.
    defined: Option<Minor>,
    failing: Failing,
}

/// What fails, and how long to leave it alone. Told once for as long as it stays the same.
#[derive(Debug, Default)]
struct Failing {
    told: Option<String>,
    pause: Duration,
}

impl Failing {
    fn failed(&mut self, what: &'static str, error: &dyn Error) {
        let text = chain(error);
        if self.told.as_ref() == Some(&text) {
            tracing::debug!(error = text, "still can't {what}");
        } else {
            tracing::warn!(error = text, "can't {what}");
            self.told = Some(text);
        }
        self.pause = (self.pause * 2).clamp(FIRST, LONGEST);
    }

    fn passed(&mut self) {
        if self.told.take().is_some() {
            tracing::info!("what failed works again");
        }
        self.pause = Duration::ZERO;
    }
}

impl Operator {
    async fn run(mut self, permit: impl Fn() -> bool, stop: &CancellationToken) {
        let mut led = false;
        while !stop.is_cancelled() {
            self.health.turn();
            let leads = permit();
            if leads != led {
                self.defined = None;
                self.metrics.lead(leads);
                led = leads;
            }
            if !leads {
                tokio::select! {
                    () = self.leadership.begins() => {}
                    () = sleep(STANDBY) => {}
                    () = stop.cancelled() => {}
                }
                continue;
            }
            // What isn't read yet would look like nothing there.
            let synced = tokio::select! {
                () = self.cluster.synced() => true,
                () = sleep(STANDBY) => false,
                () = stop.cancelled() => false,
            };
            if !synced {
                continue;
            }
            let pause = tokio::select! {
                pause = self.turn() => pause,
                () = over(stop) => break,
            };
            let woken = async {
                sleep(APART.max(self.failing.pause)).await;
                self.cluster.changed().await;
            };
            tokio::select! {
                () = woken => {}
                () = sleep(pause) => {}
                () = self.leadership.ends() => {}
                () = stop.cancelled() => {}
            }
        }
    }

    /// Makes one pass; returns when to make the next, unless something changes before.
    async fn turn(&mut self) -> Duration {
        let span = tracing::info_span!("pass");
        async {
            let begun = Instant::now();
            let watched = Watched {
                cluster: &*self.cluster,
                metrics: &self.metrics,
                hop: OnceLock::new(),
            };
            let result = pass(&watched).await;
            // After it: what changes from the pass's picture on leads to another turn, and so is seen by one or the other.
            let ensured = self.cluster.ensure().await;
            let defined = match &result {
                Ok(Pass::Planned(planned)) => self.define(&planned.input).await,
                _ => Ok(()),
            };
            let (outcome, pause) = match &result {
                Ok(Pass::Planned(planned)) if planned.stale.is_some() => ("stale", BUSY),
                Ok(Pass::Planned(planned)) if planned.done > 0 || is_busy(&planned.plan) => ("done", BUSY),
                Ok(_) => ("done", IDLE),
                Err(_) => ("failed", BUSY),
            };
            let failure: Option<(&'static str, &dyn Error)> = match (&ensured, &result, &defined) {
                (_, Err(error), _) if !is_over(error) => Some(("make a pass", error)),
                (Err(error), ..) if !matches!(error, ClusterError::NotLeading) => {
                    Some(("keep what always has to be there", error))
                }
                (.., Err(error)) => Some(("bring the definitions up to date", error)),
                _ => None,
            };
            match failure {
                Some((what, error)) => self.failing.failed(what, error),
                None => self.failing.passed(),
            }
            self.metrics
                .pass(failure.map_or(outcome, |_| "failed"), begun.elapsed());
            pause.max(self.failing.pause)
        }
        .instrument(span)
        .await
    }

    /// Brings the definitions of kprov's kinds up to date with the cluster's version: each hop may bring what they can say.
    async fn define(&mut self, input: &Input) -> Result<(), ApplyError> {
        let minor = input.observed.current.version.minor();
        if self.defined == Some(minor) || !self.leadership.permits() {
            return Ok(());
        }
        let Ok(definitions) = manifests::crds(minor) else {
            return Ok(());
        };
        let enforced: Vec<Manifest> = definitions
            .into_iter()
            .map(|manifest| Manifest {
                policy: Policy::Enforce,
                ..manifest
            })
            .collect();
        let applied = apply(&self.client, &enforced, Instant::now() + DEFINITIONS, |_| ());
        // What gets no answer is tried again with the next pass.
        if let Ok(applied) = timeout(DEFINITIONS, applied).await {
            applied?;
            self.defined = Some(minor);
        }
        Ok(())
    }
}

/// Resolves when the operator was told to stop, and a pass has had time to end.
async fn over(stop: &CancellationToken) {
    stop.cancelled().await;
    sleep(GRACE).await;
}

fn is_busy(plan: &Plan) -> bool {
    !plan.steps.is_empty() || !plan.running.is_empty() || !plan.waiting.is_empty()
}

/// The lead ended during the pass: no failure.
const fn is_over(error: &PassError) -> bool {
    matches!(
        error,
        PassError::Act {
            source: ClusterError::NotLeading,
            ..
        } | PassError::Report(ClusterError::NotLeading)
    )
}

/// A cluster whose steps and plans are told of, for one pass.
struct Watched<'a, C> {
    cluster: &'a C,
    metrics: &'a Metrics,
    /// When the hop under way began, and what the cluster runs until it's finished.
    hop: OnceLock<(Timestamp, ReleaseRef)>,
}

impl<C: Cluster + Sync> Cluster for Watched<'_, C> {
    async fn observe(&self) -> Result<Option<Input>, ClusterError> {
        let input = self.cluster.observe().await?;
        if let Some(observed) = input.as_ref().map(|input| &input.observed)
            && let Some(started) = observed.hop_started
        {
            let _ = self.hop.set((started, observed.current.clone()));
        }
        Ok(input)
    }

    async fn act(&self, action: &Action) -> Result<Outcome, ClusterError> {
        let span = tracing::info_span!("step", action = action_name(action));
        async {
            let outcome = self.cluster.act(action).await?;
            tracing::debug!(?action, ?outcome);
            if let (Action::Finish { release }, Outcome::Done, Some((started, from))) =
                (action, outcome, self.hop.get())
                && release != from
            {
                let duration = Timestamp::now().duration_since(*started);
                self.metrics.hop(Duration::try_from(duration).unwrap_or_default());
            }
            Ok(outcome)
        }
        .instrument(span)
        .await
    }

    async fn report(&self, input: &Input, plan: &Plan) -> Result<(), ClusterError> {
        self.metrics.plan(input, plan);
        self.cluster.report(input, plan).await
    }
}
