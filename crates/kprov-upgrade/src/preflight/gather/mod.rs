//! Gathers [`Facts`] from the API. Each part has its own time, and holds one page of a list in memory at most.

mod admission;
mod apis;
mod budgets;
mod metrics;
mod programs;
#[cfg(test)]
mod tests;

use std::error::Error;
use std::fmt::Debug;
use std::time::Duration;

use futures::future::try_join_all;
use kube::Client;
use kube::api::{Api, ListParams, PartialObjectMeta};
use kube::core::DynamicObject;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::{Facts, Inputs, PreflightError, Unchecked};

/// How many pods of a budget, or objects of a kind, are told at most.
pub(super) const MOST_EXAMPLES: usize = 10;
/// How long the first answer may take.
const FIRST: Duration = Duration::from_secs(15);
/// How long each part may take.
const PART: Duration = Duration::from_mins(1);
/// How many objects a page of a list has.
const PAGE: u32 = 250;

/// Why a part could not be gathered.
#[derive(Debug, thiserror::Error)]
pub(super) enum GatherError {
    /// The API server refused, or the way there is broken.
    #[error("could not ask the API server")]
    Api(#[from] kube::Error),
    /// A stream broke off.
    #[error("could not read the API server's answer")]
    Read(#[from] std::io::Error),
    /// The answer is not what was expected.
    #[error("{0}")]
    Odd(String),
}

/// Gathers everything, all parts at once.
pub(super) async fn facts(client: &Client, api_servers: &[Client], inputs: &Inputs) -> Result<Facts, PreflightError> {
    // Without this a cluster that is away would read as one where nothing could be checked.
    match timeout(FIRST, client.apiserver_version()).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => return Err(PreflightError::Api(Box::new(error))),
        Err(_) => {
            return Err(PreflightError::NoAnswer {
                seconds: FIRST.as_secs(),
            });
        }
    }
    let from = inputs.current.version.minor();
    let to = inputs
        .hops
        .iter()
        .map(|hop| hop.release.version.minor())
        .max()
        .unwrap_or(from);
    let requests = async {
        let each = try_join_all(
            api_servers
                .iter()
                .map(|server| metrics::requests(server, from.minor, to.minor)),
        )
        .await?;
        Ok(metrics::merge(each))
    };
    let (programs, settings, requests, stored, budgets, webhooks, refused) = futures::join!(
        part(programs::programs(client)),
        part(programs::settings(client)),
        part(requests),
        part(apis::stored(client, from.minor, to.minor)),
        part(budgets::budgets(client, from)),
        part(admission::webhooks(client)),
        part(admission::refused(client, inputs.nodes.keys().next())),
    );
    Ok(Facts {
        programs,
        settings,
        requests,
        stored,
        budgets,
        webhooks,
        refused,
    })
}

/// Gives a part its time, and puts into words why it failed.
async fn part<T>(gather: impl Future<Output = Result<T, GatherError>>) -> Result<T, Unchecked> {
    match timeout(PART, gather).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Unchecked(words(&error))),
        Err(_) => Err(Unchecked(format!("it took longer than {} s", PART.as_secs()))),
    }
}

/// An error with all that caused it.
fn words(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Goes through a list page by page, until it ends or `each` has seen enough (`false`).
async fn pages<K>(api: &Api<K>, params: ListParams, mut each: impl FnMut(K) -> bool) -> Result<(), kube::Error>
where
    K: Clone + DeserializeOwned + Debug,
{
    let mut params = params.limit(PAGE);
    loop {
        let page = api.list(&params).await?;
        let next = page.metadata.continue_.filter(|token| !token.is_empty());
        if !page.items.into_iter().all(&mut each) {
            return Ok(());
        }
        match next {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(()),
        }
    }
}

/// As [`pages`], with the objects' metadata alone.
async fn metadata_pages(
    api: &Api<DynamicObject>,
    mut each: impl FnMut(&PartialObjectMeta<DynamicObject>),
) -> Result<(), kube::Error> {
    let mut params = ListParams::default().limit(PAGE);
    loop {
        let page = api.list_metadata(&params).await?;
        page.items.iter().for_each(&mut each);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(()),
        }
    }
}

/// Whether an error says that there is no such thing.
fn not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}
