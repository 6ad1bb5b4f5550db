//! From what Azure answers to what a person should know, and whether to try again. Pure.
//!
//! Codes and messages are those of Azure's own error documents (["common deployment
//! errors"](https://learn.microsoft.com/azure/azure-resource-manager/troubleshooting/common-deployment-errors)).

use std::fmt;
use std::time::Duration;

use kprov_provider::ProviderError;
use serde_json::Value;

use crate::credentials::Unanswered;
use crate::reply::{Reply, THROTTLED};

/// How long to wait for what is being worked on by somebody else.
const BUSY: Duration = Duration::from_secs(5);
/// How long a network interface stays reserved for a machine whose creation failed (Azure's `NicReservedForAnotherVm`).
const RESERVED: Duration = Duration::from_mins(3);

/// What Entra says of a person's login that isn't good any more: too old, not used for too long, or withdrawn.
const EXPIRED_LOGINS: [&str; 4] = ["AADSTS700082", "AADSTS70043", "AADSTS50173", "AADSTS700084"];

/// An error as ARM writes it: with details, or an inner error, that often say more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ArmError {
    pub(crate) code: String,
    pub(crate) message: String,
    pub(crate) inner: Option<Box<Self>>,
}

impl ArmError {
    /// From `{"error": {...}}`, or from the bare object that compute's operations answer with.
    pub(crate) fn of(body: &Value) -> Option<Self> {
        Self::parse(body.get("error").unwrap_or(body), 0)
    }

    fn parse(error: &Value, depth: usize) -> Option<Self> {
        let text = |name: &str| error.get(name).and_then(Value::as_str).unwrap_or("").to_owned();
        let (code, message) = (text("code"), text("message"));
        if (code.is_empty() && message.is_empty()) || depth > 4 {
            return None;
        }
        // Some services put a whole error document into `message`.
        let nested = serde_json::from_str::<Value>(&message).ok();
        let nested = nested.and_then(|v| Self::parse(v.get("error").unwrap_or(&v), depth + 1));
        let details = error.get("details").and_then(Value::as_array);
        let inner = details.and_then(|d| d.iter().find_map(|e| Self::parse(e, depth + 1)));
        let inner = inner
            .or_else(|| error.get("innererror").and_then(|e| Self::parse(e, depth + 1)))
            .or(nested)
            .filter(|i| i.code != code || i.message != message);
        Some(Self {
            code,
            message,
            inner: inner.map(Box::new),
        })
    }

    /// The error of an operation that ended as `status`.
    pub(crate) fn of_operation(body: &Value, status: &str) -> Self {
        let error = body.get("error").and_then(|e| Self::parse(e, 0));
        error.unwrap_or_else(|| Self::bare(status, "the operation ended without saying why"))
    }

    /// The error of a resource whose `provisioningState` is `state`: among its statuses, where it has any.
    pub(crate) fn of_resource(body: &Value, state: &str) -> Self {
        let statuses = body
            .pointer("/properties/instanceView/statuses")
            .and_then(Value::as_array);
        let failed = statuses.into_iter().flatten().find_map(|status| {
            let code = status
                .get("code")?
                .as_str()?
                .strip_prefix("ProvisioningState/failed/")?;
            let message = status.get("message").and_then(Value::as_str).unwrap_or("");
            Some(Self::bare(code, message))
        });
        failed.unwrap_or_else(|| Self::bare(state, "its `provisioningState` says so, and nothing says why"))
    }

    fn bare(code: &str, message: &str) -> Self {
        Self {
            code: code.to_owned(),
            message: message.to_owned(),
            inner: None,
        }
    }

    /// The error at the bottom, which says what happened.
    pub(crate) fn innermost(&self) -> &Self {
        self.inner.as_ref().map_or(self, |inner| inner.innermost())
    }

    fn chain(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |e| e.inner.as_deref())
    }
}

impl fmt::Display for ArmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = self.message.trim().trim_end_matches('.');
        match (self.code.as_str(), message) {
            ("", message) => f.write_str(message),
            (code, "") => write!(f, "`{code}`"),
            (code, message) => write!(f, "`{code}`: {message}"),
        }
    }
}

impl std::error::Error for ArmError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.inner.as_deref().map(|inner| inner as _)
    }
}

/// What became of a request.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Azure answered with an error; nothing took effect.
    Refused {
        status: u16,
        error: ArmError,
        retry_after: Option<Duration>,
        limit: Option<String>,
    },
    /// The operation began, and failed.
    Ended(ArmError),
    /// The operation has not ended in time.
    NeverEnded { url: String, after: Duration },
    /// There was no answer: it may have taken effect.
    Lost(Cause),
    /// Nothing was sent.
    Unsent(Cause),
    /// There is no token to send.
    NoCredential(Cause),
    /// The answer isn't what it should be.
    Unreadable(Cause),
}

/// An error beneath.
pub(crate) type Cause = Box<dyn std::error::Error + Send + Sync>;

impl Failure {
    /// From a reply that is an error.
    pub(crate) fn refused(reply: &Reply) -> Self {
        let error = ArmError::of(&reply.body);
        Self::Refused {
            status: reply.status,
            error: error.unwrap_or_else(|| ArmError::bare(&format!("HTTP {}", reply.status), "")),
            retry_after: reply.retry_after(),
            limit: reply.exhausted_limit().map(ToOwned::to_owned),
        }
    }

    /// Whether the answer was that there is no such thing (or no group that it could be in).
    pub(crate) const fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { status: 404, .. })
    }

    /// Whether the role is missing.
    pub(crate) fn is_forbidden(&self) -> bool {
        matches!(self, Self::Refused { status: 403, .. })
    }
}

/// What was being done: `make` a `virtual machine` called `demo-cp-0`.
#[derive(Clone, Debug)]
pub(crate) struct Doing {
    pub(crate) verb: &'static str,
    pub(crate) noun: &'static str,
    pub(crate) name: String,
    /// The size and the zone, where it is a machine.
    pub(crate) size: Option<String>,
    pub(crate) zone: Option<String>,
    pub(crate) location: Option<String>,
    /// Whether it can be asked again without a look: reads, and what is the same when done twice.
    pub(crate) reads: bool,
}

impl Doing {
    pub(crate) fn read(noun: &'static str, name: impl Into<String>) -> Self {
        Self {
            reads: true,
            ..Self::new("read", noun, name)
        }
    }

    pub(crate) fn new(verb: &'static str, noun: &'static str, name: impl Into<String>) -> Self {
        Self {
            verb,
            noun,
            name: name.into(),
            size: None,
            zone: None,
            location: None,
            reads: false,
        }
    }

    fn subject(&self) -> String {
        format!("can't {} {} `{}`", self.verb, self.noun, self.name)
    }

    /// The error for whoever asked.
    pub(crate) fn failed(&self, failure: Failure) -> ProviderError {
        match failure {
            Failure::Refused {
                status,
                error,
                retry_after,
                limit,
            } => self.refused(status, error, retry_after, limit.as_deref()),
            Failure::Ended(error) => self.ended(error),
            Failure::NeverEnded { url, after } => ProviderError::look_first(format!(
                "{} `{}` is still not done after {} s: Azure's operation has not ended",
                self.noun,
                self.name,
                after.as_secs()
            ))
            .hint(format!(
                "run the same command again to go on waiting; where it never ends, look at the operation `{}` in the activity log",
                operation(&url)
            )),
            Failure::Lost(cause) if self.reads => {
                ProviderError::retry_after(self.subject(), Duration::from_secs(1)).caused_by(cause)
            }
            Failure::Lost(cause) => {
                ProviderError::look_first(format!("{}: no answer came", self.subject())).caused_by(cause)
            }
            Failure::Unsent(cause) => {
                ProviderError::retry_after(format!("{}: Azure can't be reached", self.subject()), Duration::from_secs(1))
                    .hint("check the network, and the proxy settings in `HTTPS_PROXY`")
                    .caused_by(cause)
            }
            Failure::NoCredential(cause) => no_credential(cause),
            Failure::Unreadable(cause) => {
                let error = if self.reads {
                    ProviderError::never(format!("{}: the answer makes no sense", self.subject()))
                } else {
                    ProviderError::look_first(format!("{}: the answer makes no sense", self.subject()))
                };
                error.caused_by(cause)
            }
        }
    }

    fn refused(
        &self,
        status: u16,
        error: ArmError,
        retry_after: Option<Duration>,
        limit: Option<&str>,
    ) -> ProviderError {
        let known = error.chain().find_map(|e| self.known(e));
        if let Some(known) = known {
            return known.caused_by(error);
        }
        let busy = matches!(
            error.innermost().code.as_str(),
            "AnotherOperationInProgress"
                | "Conflict"
                | "OperationPreempted"
                | "RetryableError"
                | "RetryableErrorDueToAnotherOperation"
                | "ReferencedResourceNotProvisioned"
                | "ResourceGroupBeingDeleted"
                | "ConflictingConcurrentWriteNotAllowed"
                | "ServerBusy"
        );
        match status {
            429 => {
                let what = limit.map(|l| format!("its limit `{l}` is used up")).unwrap_or_default();
                let what = if what.is_empty() {
                    "there were too many requests".to_owned()
                } else {
                    what
                };
                ProviderError::retry_after(format!("{}: {what}", self.subject()), retry_after.unwrap_or(THROTTLED))
            }
            409 if busy => ProviderError::wait(
                format!("{}: another operation is at work on it", self.subject()),
                retry_after.unwrap_or(BUSY),
            ),
            412 => ProviderError::look_first(format!("{}: somebody else has changed it meanwhile", self.subject())),
            // Before it answered with an error, a server may have done something.
            408 | 500..=599 if !self.reads => {
                ProviderError::look_first(format!("{}: Azure failed (HTTP {status})", self.subject()))
            }
            408 | 500..=599 => ProviderError::retry_after(
                format!("{}: Azure failed (HTTP {status})", self.subject()),
                retry_after.unwrap_or(Duration::from_secs(1)),
            ),
            _ if busy => ProviderError::wait(self.subject(), retry_after.unwrap_or(BUSY)),
            _ => ProviderError::never(self.subject()),
        }
        .caused_by(error)
    }

    fn ended(&self, error: ArmError) -> ProviderError {
        let known = error.chain().find_map(|e| self.known(e));
        if let Some(known) = known {
            return known.caused_by(error);
        }
        let retryable = matches!(
            error.innermost().code.as_str(),
            "OperationPreempted" | "RetryableError" | "InternalExecutionError" | "InternalServerError"
        );
        let message = format!("{} `{}` has failed", self.noun, self.name);
        let wrong = if retryable {
            ProviderError::retry_after(message, BUSY)
        } else {
            ProviderError::never(message).hint("see what Azure says above; the same command tries again")
        };
        wrong.caused_by(error)
    }

    /// Errors that a person can do something about, by their code.
    fn known(&self, error: &ArmError) -> Option<ProviderError> {
        let ArmError { code, message, .. } = error;
        let place = self.place();
        let size = self.size.as_deref().map_or_else(String::new, |s| format!(" `{s}`"));
        Some(match code.as_str() {
            "ExpiredAuthenticationToken" => ProviderError::never("the Azure access token has expired")
                .hint("log in again (`az login`), or let whatever gave the token give a new one"),
            "InvalidAuthenticationTokenTenant" => {
                ProviderError::never("the Azure credentials are of another tenant than the subscription")
                    .hint("log in to the subscription's tenant (`az login --tenant ID`), or set `AZURE_TENANT_ID`")
            }
            "InvalidAuthenticationToken" | "AuthenticationFailed" | "AuthenticationFailedMissingToken" => {
                ProviderError::never("Azure does not accept the credentials")
                    .hint("log in again (`az login`), or check `AZURE_CLIENT_ID`, `AZURE_TENANT_ID` and `AZURE_CLIENT_SECRET`")
            }
            "SubscriptionNotFound" | "InvalidSubscriptionId" => {
                ProviderError::never("the subscription is not there, or the credentials don't reach it")
                    .hint("check `spec.azure.subscription` or `AZURE_SUBSCRIPTION_ID`; `az account list` shows those that you have")
            }
            "ReadOnlyDisabledSubscription" => ProviderError::never("the subscription is disabled and can only be read")
                .hint("enable it, or name another one in `spec.azure.subscription`"),
            "AuthorizationFailed" | "LinkedAuthorizationFailed" => self.forbidden(message),
            "RequestDisallowedByPolicy" => ProviderError::never(format!("{}: a policy forbids it", self.subject()))
                .hint("see which policy below; its owner can make an exception"),
            "MissingSubscriptionRegistration" => {
                ProviderError::never(format!("{}: the subscription is not registered for it", self.subject())).hint(
                    "run `az provider register --namespace Microsoft.Compute`, and the same for `Microsoft.Network`",
                )
            }
            "SkuNotAvailable" => ProviderError::never(format!("size{size} can't be had{place}"))
                .hint("`az vm list-skus --location LOCATION --zone` shows what can be had; choose another size, zone or location"),
            "AllocationFailed" | "ZonalAllocationFailed" | "OverconstrainedAllocationRequest"
            | "OverconstrainedZonalAllocationRequest" => {
                ProviderError::never(format!("Azure has no room for a machine of size{size}{place} at this time"))
                    .hint("try again later, or choose another size, zone or location")
            }
            "QuotaExceeded" => quota(message, &place, self),
            "OperationNotAllowed" if quota_family(message).is_some() => quota(message, &place, self),
            "PublicIPCountLimitReached" | "PublicIpAddressCountLimitReached" | "SubscriptionQuotaExceeded"
            | "ResourceQuotaExceeded" => {
                ProviderError::never(format!("{}: the subscription's quota for it is used up{place}", self.subject()))
                    .hint("ask for more in the portal (Subscriptions, Usage + quotas), or set `spec.azure.private`")
            }
            "LocationNotAvailableForResourceGroup" | "LocationNotAvailableForResourceType" | "InvalidLocation"
            | "NoRegisteredProviderFound" => ProviderError::never(format!("{}: there is no such location{place}", self.subject()))
                .hint("`az account list-locations -o table` shows those there are; name one in `spec.azure.location`"),
            "InvalidResourceGroupLocation" => {
                ProviderError::never(format!("{}: it exists already, in another location", self.subject()))
                    .hint("name another location or another cluster, or remove what is there")
            }
            "PlatformImageNotFound" | "ImageNotFound" | "GalleryImageNotFound" => {
                ProviderError::never(format!("{}: its image is not there{place}", self.subject()))
                    .hint("`az vm image list --all --publisher PUBLISHER` shows what there is; name it in `spec.image`")
            }
            "MarketplacePurchaseEligibilityFailed" | "ResourcePurchaseValidationFailed" | "VMMarketplaceInvalidInput" => {
                ProviderError::never(format!("{}: the terms of its image are not accepted", self.subject()))
                    .hint("accept them once: `az vm image terms accept --urn URN`")
            }
            "InvalidParameter" if message.contains("VM size") => {
                ProviderError::never(format!("there is no size{size}{place}"))
                    .hint("`az vm list-skus --location LOCATION` shows what can be had")
            }
            "NicReservedForAnotherVm" => {
                ProviderError::wait(format!("{}: its network interface is still held", self.subject()), RESERVED)
            }
            "ScopeLocked" => ProviderError::never(format!("{}: a lock protects it", self.subject()))
                .hint("remove the lock (`az lock list`, `az lock delete`)"),
            "InUseSubnetCannotBeDeleted" | "InUseNetworkSecurityGroupCannotBeDeleted" | "PublicIPAddressCannotBeDeleted"
            | "NicInUse" | "InUseNatGatewayCannotBeDeleted" | "LoadBalancerInUseByVirtualMachineScaleSet" => {
                ProviderError::retry_after(format!("{}: something still uses it", self.subject()), BUSY)
            }
            _ => return None,
        })
    }

    fn place(&self) -> String {
        let mut place = String::new();
        if let Some(location) = &self.location {
            place = format!(" in `{location}`");
        }
        if let Some(zone) = &self.zone {
            place.push_str(", zone ");
            place.push_str(zone);
        }
        place
    }

    /// "The client 'x' with object id 'y' does not have authorization to perform action 'A' over scope 'S' or ...", or "... has
    /// permission to perform action 'B' on scope 'T'; however, it does not have permission to perform action(s) 'A' on the linked
    /// scope(s) 'S' ...": what is missing is A over S.
    fn forbidden(&self, message: &str) -> ProviderError {
        let action = between(message, "perform action(s) '", "'").or_else(|| between(message, "perform action '", "'"));
        let scope = between(message, "linked scope(s) '", "'").or_else(|| between(message, "over scope '", "'"));
        let what = match (action, scope) {
            (Some(action), Some(scope)) => format!("the action `{action}` over `{scope}` is not allowed"),
            (Some(action), None) => format!("the action `{action}` is not allowed"),
            _ => "the role for it is missing".to_owned(),
        };
        let who = between(message, "The client '", "'").unwrap_or("ID");
        let scope = scope.unwrap_or("SCOPE");
        ProviderError::never(format!("{}: {what}", self.subject())).hint(format!(
            "give a role that has it, such as Contributor: `az role assignment create --assignee {who} --role Contributor --scope {scope}`; \
             a new assignment takes some minutes"
        ))
    }
}

fn no_credential(cause: Cause) -> ProviderError {
    if cause.is::<Unanswered>() {
        return ProviderError::retry_after("the Azure login does not answer", BUSY)
            .hint("check the network, and the proxy settings in `HTTPS_PROXY`")
            .caused_by(cause);
    }
    let text = cause.to_string();
    let error = if text.contains("AADSTS90002") || text.contains("AADSTS900023") {
        ProviderError::never("the Azure tenant is not there").hint("check `AZURE_TENANT_ID`")
    } else if text.contains("AADSTS7000215") || text.contains("AADSTS7000222") {
        ProviderError::never("the Azure client secret is wrong, or has expired").hint("check `AZURE_CLIENT_SECRET`")
    } else if text.contains("AADSTS700016") {
        ProviderError::never("the Azure tenant has no such application")
            .hint("check `AZURE_CLIENT_ID` and `AZURE_TENANT_ID`")
    } else if EXPIRED_LOGINS.iter().any(|code| text.contains(code)) {
        ProviderError::never("the Azure login has expired, or was withdrawn").hint("log in again: `az login`")
    } else if text.contains("AADSTS700027") {
        ProviderError::never("the Azure application does not know this certificate, or it has expired").hint(
            "check `AZURE_CLIENT_CERTIFICATE_PATH`; `az ad app credential list --cert --id ID` shows those that it has",
        )
    } else if text.contains("AADSTS700024") {
        ProviderError::never("the workload identity's service account token has expired").hint(
            "whatever writes `AZURE_FEDERATED_TOKEN_FILE` has stopped renewing it, or this machine's clock is wrong",
        )
    } else if text.contains("AADSTS70021") {
        ProviderError::never("the Azure application does not trust this workload identity's service account").hint(
            "give it a federated credential of this issuer and subject: `az identity federated-credential create`, or `az ad app \
             federated-credential create`",
        )
    } else if text.contains("AADSTS50027") {
        ProviderError::never("the workload identity's file holds no service account token")
            .hint("check `AZURE_FEDERATED_TOKEN_FILE`")
    } else {
        ProviderError::never("there are no Azure credentials that work").hint(
            "log in with `az login`, or set `AZURE_TENANT_ID`, `AZURE_CLIENT_ID` and `AZURE_CLIENT_SECRET`; workload and managed \
             identities are taken where there are any",
        )
    };
    error.caused_by(cause)
}

fn quota(message: &str, place: &str, doing: &Doing) -> ProviderError {
    let family = quota_family(message).unwrap_or("cores");
    let figure = |name: &str| {
        between(message, name, ",")
            .or_else(|| between(message, name, "."))
            .map(str::trim)
    };
    let figures = match (
        figure("Current Limit:"),
        figure("Current Usage:"),
        figure("Additional Required:"),
    ) {
        (Some(limit), Some(used), Some(more)) => format!(" ({used} of {limit} are used, {more} more are needed)"),
        _ => String::new(),
    };
    ProviderError::never(format!(
        "the quota `{family}` is used up{place}{figures}: {} `{}` can't be made",
        doing.noun, doing.name
    ))
    .hint(format!(
        "ask for more of `{family}` in the portal (Subscriptions, Usage + quotas), or choose a smaller size, one of another family, or \
         fewer machines; `az vm list-usage` shows what is used"
    ))
}

/// "... exceeding approved standardDSv5Family Cores quota ...", "... exceeding approved Total Regional Cores quota ...".
fn quota_family(message: &str) -> Option<&str> {
    let family = between(message, "exceeding approved ", " quota")?;
    Some(
        family
            .strip_suffix(" Cores")
            .filter(|f| !f.contains(' '))
            .unwrap_or(family),
    )
}

fn between<'a>(text: &'a str, before: &str, after: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(before)?;
    Some(rest.split_once(after).map_or(rest, |(found, _)| found))
}

/// The last part of an operation's URL: the id that Azure's activity log knows it by.
fn operation(url: &str) -> &str {
    let path = url.split('?').next().unwrap_or(url);
    path.rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests;
