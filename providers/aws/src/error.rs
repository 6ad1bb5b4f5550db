//! From what the SDK reports to what the caller should do.
//!
//! [`explain`] is pure and has a table of AWS' error codes (EC2's "Error codes for the Amazon EC2 API", and the load balancers'
//! "Common errors"); [`failed`] takes an SDK's error apart for it.

use std::error::Error;
use std::fmt;
use std::time::Duration;

use aws_credential_types::provider::error::CredentialsError;
use aws_smithy_runtime_api::client::result::SdkError;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use kprov_provider::{Advice, ProviderError};

/// What AWS, or the way to it, said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// AWS refused the call.
    Refused {
        /// The error's code.
        code: String,
        /// Its message.
        message: String,
    },
    /// There are no usable credentials.
    Credentials,
    /// The endpoint's name is not known.
    NoSuchHost,
    /// Nothing was sent.
    NotSent,
    /// It was sent, or may have been, and no reply came.
    NoReply,
    /// The call itself is malformed.
    Malformed,
}

/// An error of AWS, as the cause beneath a message of ours.
#[derive(Debug)]
struct Refusal {
    action: &'static str,
    code: String,
    message: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { action, code, message } = self;
        write!(f, "`{action}` was refused with `{code}`: {message}")
    }
}

impl Error for Refusal {}

/// The causes of an error, in one line.
#[derive(Debug)]
struct Chain(String);

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Chain {}

/// What went wrong with one call.
#[derive(Debug)]
pub(crate) struct CallError {
    /// The API's name of the call, such as `RunInstances`.
    pub(crate) action: &'static str,
    /// What it was for: goes on after "can't".
    pub(crate) what: String,
    pub(crate) failure: Failure,
    /// The SDK's own words, where AWS has said nothing.
    words: String,
}

impl CallError {
    /// The code that AWS refused with.
    pub(crate) fn code(&self) -> Option<&str> {
        match &self.failure {
            Failure::Refused { code, .. } => Some(code),
            _ => None,
        }
    }

    /// Whether a thing that the call names is not there.
    pub(crate) fn is_not_found(&self) -> bool {
        self.code().is_some_and(is_not_found)
    }

    /// Whether it says that something is there already.
    pub(crate) fn is_duplicate(&self) -> bool {
        let Failure::Refused { code, message } = &self.failure else {
            return false;
        };
        code.contains("Duplicate")
            || matches!(code.as_str(), "Resource.AlreadyAssociated" | "RouteAlreadyExists")
            // A VPC's second internet gateway has no code of its own.
            || (code == "InvalidParameterValue" && message.contains("already has an internet gateway"))
    }

    /// Whether a zone has no capacity, or not for this type.
    pub(crate) fn is_capacity(&self) -> bool {
        self.code().is_some_and(|code| {
            matches!(
                code,
                "InsufficientInstanceCapacity" | "InsufficientCapacity" | "InsufficientHostCapacity" | "Unsupported"
            )
        })
    }
}

/// Takes an SDK's error apart.
pub(crate) fn failed<E, R>(action: &'static str, what: impl Into<String>) -> impl FnOnce(SdkError<E, R>) -> CallError
where
    E: Error + ProvideErrorMetadata + 'static,
    R: fmt::Debug + 'static,
{
    let what = what.into();
    move |error| CallError {
        action,
        what,
        words: chain(&error),
        failure: failure(&error),
    }
}

fn failure<E, R>(error: &SdkError<E, R>) -> Failure
where
    E: Error + ProvideErrorMetadata + 'static,
    R: fmt::Debug + 'static,
{
    if causes(error).any(<dyn Error>::is::<CredentialsError>) {
        return Failure::Credentials;
    }
    match error {
        SdkError::ServiceError(service) => {
            let meta = service.err().meta();
            Failure::Refused {
                code: meta.code().unwrap_or("Unknown").to_owned(),
                message: meta.message().unwrap_or_default().to_owned(),
            }
        }
        // Only what failed while connecting was certainly not sent.
        SdkError::DispatchFailure(_) => {
            let words = chain(error).to_lowercase();
            if words.contains("dns error") || words.contains("failed to lookup address") {
                Failure::NoSuchHost
            } else if words.contains("connection refused") || words.contains("tcp connect error") {
                Failure::NotSent
            } else {
                Failure::NoReply
            }
        }
        SdkError::ConstructionFailure(_) => Failure::Malformed,
        // Timeouts, garbled replies, and whatever the SDK will think of.
        _ => Failure::NoReply,
    }
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |e: &&'a (dyn Error + 'static)| (*e).source())
}

fn chain(error: &(dyn Error + 'static)) -> String {
    let mut words: Vec<String> = causes(error).map(ToString::to_string).collect();
    words.dedup();
    words.join(": ")
}

fn is_not_found(code: &str) -> bool {
    code.ends_with("NotFound")
        || code.ends_with("NotFoundException")
        || code == "InvalidVpcID"
        || code == "NatGatewayNotFound"
}

/// A quota by the code of the error that says it's used up: its name in the Service Quotas console, and its own code there.
const QUOTAS: &[(&str, &str, &str)] = &[
    (
        "VcpuLimitExceeded",
        "Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances",
        "L-1216C47A",
    ),
    (
        "InstanceLimitExceeded",
        "Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances",
        "L-1216C47A",
    ),
    ("VpcLimitExceeded", "VPCs per Region", "L-F678F1CE"),
    ("SubnetLimitExceeded", "Subnets per VPC", "L-407747CB"),
    (
        "InternetGatewayLimitExceeded",
        "Internet gateways per Region",
        "L-A4707A72",
    ),
    (
        "NatGatewayLimitExceeded",
        "NAT gateways per Availability Zone",
        "L-FE5A380F",
    ),
    ("AddressLimitExceeded", "EC2-VPC Elastic IPs", "L-0263D0A3"),
    ("RouteTableLimitExceeded", "Route tables per VPC", "L-589F43AA"),
    (
        "SecurityGroupLimitExceeded",
        "VPC security groups per Region",
        "L-E79EC296",
    ),
    (
        "RulesPerSecurityGroupLimitExceeded",
        "Inbound or outbound rules per security group",
        "L-0EA8095F",
    ),
    (
        "VolumeLimitExceeded",
        "Storage for General Purpose SSD (gp3) volumes, in TiB",
        "L-7A658B76",
    ),
    (
        "MaxIOPSLimitExceeded",
        "Storage for General Purpose SSD (gp3) volumes, in TiB",
        "L-7A658B76",
    ),
    (
        "TooManyLoadBalancers",
        "Network Load Balancers per Region",
        "L-69A177A2",
    ),
    ("TooManyTargetGroups", "Target Groups per Region", "L-B22855CB"),
    ("TooManyTargets", "Targets per Target Group per Region", "L-A0D0B863"),
];

impl From<CallError> for ProviderError {
    fn from(error: CallError) -> Self {
        explain(error)
    }
}

/// What to do about a failed call. Pure.
pub(crate) fn explain(error: CallError) -> ProviderError {
    let CallError {
        action,
        what,
        failure,
        words,
    } = error;
    match failure {
        Failure::Refused { code, message } => refused(action, &what, &code, &message).caused_by(Refusal {
            action,
            code,
            message,
        }),
        Failure::Credentials => ProviderError::never("no AWS credentials can be used")
            .hint("name a profile with `--profile` or AWS_PROFILE, sign in with `aws sso login`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
            .caused_by(Chain(words)),
        Failure::NoSuchHost => ProviderError::never(format!("can't {what}: the API's host is not known"))
            .hint("is the region right (`--region`, AWS_REGION, `spec.aws.region`), and does DNS work here?")
            .caused_by(Chain(words)),
        Failure::NotSent => ProviderError::retry_after(
            format!("can't {what}: the API can't be reached"),
            Duration::from_secs(1),
        )
        .hint("does this machine reach the internet, or the endpoint that `spec.aws.endpointUrl` names?")
        .caused_by(Chain(words)),
        Failure::NoReply => ProviderError::look_first(format!("can't tell whether it went well to {what}: no reply to `{action}`"))
            .caused_by(Chain(words)),
        Failure::Malformed => ProviderError::never(format!("can't {what}: `{action}` can't be built")).caused_by(Chain(words)),
    }
}

fn refused(action: &str, what: &str, code: &str, message: &str) -> ProviderError {
    if let Some((_, quota, id)) = QUOTAS.iter().find(|(c, ..)| *c == code) {
        return ProviderError::never(format!("can't {what}: the quota `{quota}` ({id}) is used up"))
            .hint("ask for a higher one in the Service Quotas console, or remove what is not needed");
    }
    let never = |why: &str| ProviderError::never(format!("can't {what}: {why}"));
    match code {
        "RequestLimitExceeded"
        | "Throttling"
        | "ThrottlingException"
        | "TooManyRequestsException"
        | "SlowDown"
        | "EC2ThrottledException"
        | "RequestThrottled" => ProviderError::retry_after(format!("AWS throttles `{action}`"), Duration::from_secs(2)),
        "UnauthorizedOperation" | "AccessDenied" | "AccessDeniedException" => {
            let service = service_of(action);
            let hint = if message.contains("Encoded authorization failure message") {
                "ask for that permission; `aws sts decode-authorization-message` tells which policy denies it"
            } else {
                "ask whoever manages the account for that permission"
            };
            never(&format!("these credentials don't allow `{service}:{action}`")).hint(hint)
        }
        "ExpiredToken" | "ExpiredTokenException" | "RequestExpired" => never("the AWS credentials have expired")
            .hint("sign in again (`aws sso login`), and check this machine's clock"),
        "AuthFailure"
        | "InvalidClientTokenId"
        | "UnrecognizedClientException"
        | "SignatureDoesNotMatch"
        | "InvalidAccessKeyId"
        | "IncompleteSignature"
        | "MissingAuthenticationToken" => {
            never("AWS does not know these credentials").hint("check the profile, and whether the key was deactivated")
        }
        "OptInRequired" | "PendingVerification" | "Blocked" => never("the account is not enabled for this")
            .hint("a region may have to be enabled first; see the account's page in the console"),
        "InsufficientInstanceCapacity" | "InsufficientCapacity" | "InsufficientHostCapacity" => {
            never("AWS has no capacity of that size there at the moment")
                .hint("choose another size (`size`), other zones (`spec.zones`), or try again later")
        }
        "Unsupported" => {
            never("that size is not offered there").hint("choose another size (`size`) or other zones (`spec.zones`)")
        }
        "InvalidInstanceType" | "InvalidInstanceType.NotFound" => never("the region knows no such instance type")
            .hint("`aws ec2 describe-instance-type-offerings` lists those it has"),
        "InvalidAMIID.NotFound" | "InvalidAMIID.Malformed" | "InvalidAMIID.Unavailable" => {
            never("there is no such image in this region")
                .hint("images have another id in each region; leave `spec.image` out to take Debian 12")
        }
        "InvalidSubnet.Conflict" | "InvalidVpc.Range" | "InvalidSubnet.Range" | "CidrConflict" | "InvalidVpcRange" => {
            never("the address range overlaps another one, or does not fit")
                .hint("choose another range with `spec.network.machines`")
        }
        "InsufficientFreeAddressesInSubnet" => never("the subnet has no free address left")
            .hint("a cluster with a larger `spec.network.machines` has room"),
        "InsufficientAddressCapacity" => never("AWS has no free public address at the moment").hint("try again later"),
        "OperationNotPermitted" => never("the instance is protected against it").hint(
            "set `spec.aws.terminationProtection: false` in the cluster file, run `kprov up` with it, and try again",
        ),
        "DependencyViolation"
        | "InvalidIPAddress.InUse"
        | "ResourceInUse"
        | "VolumeInUse"
        | "IncorrectState"
        | "IncorrectInstanceState" => ProviderError::wait(
            format!("can't {what} yet: something else has to come to its end"),
            Duration::from_secs(3),
        ),
        "InternalError" | "InternalFailure" | "ServiceUnavailable" | "Unavailable" | "ServiceUnavailableException" => {
            ProviderError::look_first(format!("can't tell whether it went well to {what}: AWS has failed"))
        }
        _ if is_not_found(code) => ProviderError::retry_after(
            format!("can't {what}: something it needs is not there, or not yet known everywhere"),
            Duration::from_secs(1),
        ),
        _ if code.contains("Duplicate") || code == "IdempotentParameterMismatch" => ProviderError::retry_after(
            format!("can't {what}: it is there already, or not yet known everywhere"),
            Duration::from_secs(2),
        ),
        _ => never(if message.is_empty() { code } else { "AWS refuses it" }),
    }
}

/// The service's prefix in permissions.
fn service_of(action: &str) -> &'static str {
    let balancers = ["LoadBalancer", "TargetGroup", "Targets", "TargetHealth", "Listener"];
    if balancers.iter().any(|b| action.contains(b)) {
        "elasticloadbalancing"
    } else {
        "ec2"
    }
}

/// The advice of an error that is met while looking: nothing was changed by it.
pub(crate) fn while_reading(error: CallError) -> ProviderError {
    let mut error = explain(error);
    if error.advice == Advice::LookFirst {
        error.advice = Advice::RetryAfter(Duration::from_millis(500));
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(action: &'static str, code: &str) -> ProviderError {
        explain(CallError {
            action,
            what: "start `demo-cp-0`".into(),
            failure: Failure::Refused {
                code: code.into(),
                message: "words".into(),
            },
            words: String::new(),
        })
    }

    #[test]
    fn every_code_has_its_advice() {
        let second = Duration::from_secs;
        let cases: &[(&str, Advice, &str)] = &[
            (
                "RequestLimitExceeded",
                Advice::RetryAfter(second(2)),
                "throttles `RunInstances`",
            ),
            ("Throttling", Advice::RetryAfter(second(2)), "throttles"),
            ("UnauthorizedOperation", Advice::Never, "`ec2:RunInstances`"),
            ("RequestExpired", Advice::Never, "have expired"),
            ("AuthFailure", Advice::Never, "does not know these credentials"),
            ("VcpuLimitExceeded", Advice::Never, "L-1216C47A"),
            ("InsufficientInstanceCapacity", Advice::Never, "no capacity"),
            ("InvalidInstanceType", Advice::Never, "no such instance type"),
            ("InvalidAMIID.NotFound", Advice::Never, "no such image"),
            ("InvalidSubnet.Conflict", Advice::Never, "overlaps"),
            ("InvalidGroup.NotFound", Advice::RetryAfter(second(1)), "not there"),
            ("InvalidGroup.Duplicate", Advice::RetryAfter(second(2)), "already"),
            ("DependencyViolation", Advice::Wait(second(3)), "yet"),
            // The address of the machine before, which is still going.
            ("InvalidIPAddress.InUse", Advice::Wait(second(3)), "yet"),
            ("InternalError", Advice::LookFirst, "can't tell"),
            ("SomethingNew", Advice::Never, "AWS refuses it"),
        ];
        for (code, advice, words) in cases {
            let error = of("RunInstances", code);
            assert_eq!(error.advice, *advice, "{code}");
            assert!(error.message.contains(words), "{code}: {error}");
            let cause = error.source.unwrap().to_string();
            assert!(cause.contains(code) && cause.contains("words"), "{cause}");
        }
    }

    #[test]
    fn what_is_there_already_is_known_by_code_or_words() {
        let is_duplicate = |code: &str, message: &str| {
            let failure = Failure::Refused {
                code: code.into(),
                message: message.into(),
            };
            CallError {
                action: "AttachInternetGateway",
                what: "attach".into(),
                failure,
                words: String::new(),
            }
            .is_duplicate()
        };
        assert!(is_duplicate("InvalidGroup.Duplicate", ""));
        assert!(is_duplicate("Resource.AlreadyAssociated", ""));
        let second = "Network vpc-1 already has an internet gateway attached";
        assert!(is_duplicate("InvalidParameterValue", second));
        assert!(!is_duplicate("InvalidParameterValue", "The value is not valid"));
    }

    #[test]
    fn quotas_are_named_and_permissions_too() {
        for (code, quota, id) in QUOTAS {
            let error = of("RunInstances", code);
            assert_eq!(error.advice, Advice::Never);
            assert!(error.message.contains(quota) && error.message.contains(id), "{error}");
            assert!(error.hint.is_some());
        }
        let error = of("RegisterTargets", "AccessDenied");
        assert!(
            error.message.contains("`elasticloadbalancing:RegisterTargets`"),
            "{error}"
        );
    }

    #[test]
    fn what_was_lost_is_looked_for() {
        let lost = |failure| {
            explain(CallError {
                action: "RunInstances",
                what: "start `demo-cp-0`".into(),
                failure,
                words: "dispatch failure: io error".into(),
            })
        };
        assert_eq!(lost(Failure::NoReply).advice, Advice::LookFirst);
        assert!(matches!(lost(Failure::NotSent).advice, Advice::RetryAfter(_)));
        assert_eq!(lost(Failure::NoSuchHost).advice, Advice::Never);
        assert!(lost(Failure::Credentials).hint.unwrap().contains("aws sso login"));
    }
}
