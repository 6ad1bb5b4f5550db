//! What a person is told, and whether to try again.

use kprov_provider::Advice;
use serde_json::json;

use super::*;

fn machine() -> Doing {
    Doing {
        size: Some("Standard_D2s_v5".into()),
        zone: Some("1".into()),
        location: Some("westeurope".into()),
        ..Doing::new("make", "virtual machine", "demo-cp-0")
    }
}

fn refused(status: u16, code: &str, message: &str, headers: &[(&str, &str)]) -> ProviderError {
    machine().failed(Failure::refused(&Reply {
        status,
        headers: headers
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect(),
        body: json!({"error": {"code": code, "message": message}}),
    }))
}

const QUOTA: &str = "Operation could not be completed as it results in exceeding approved standardDSv5Family Cores quota. Additional \
    details - Deployment Model: Resource Manager, Location: westeurope, Current Limit: 10, Current Usage: 9, Additional Required: 2, \
    (Minimum) New Limit Required: 11. Submit a request for Quota increase.";

#[test]
fn says_what_is_wrong_and_what_to_do() {
    let cases: &[(u16, &str, &str, &str, &str)] = &[
        (
            401,
            "ExpiredAuthenticationToken",
            "...",
            "the Azure access token has expired",
            "az login",
        ),
        (
            401,
            "InvalidAuthenticationTokenTenant",
            "The access token is from the wrong issuer 'a'. It must match the tenant 'b' associated with this subscription.",
            "the Azure credentials are of another tenant than the subscription",
            "--tenant",
        ),
        (
            403,
            "AuthorizationFailed",
            "The client 'me' with object id 'me' does not have authorization to perform action \
             'Microsoft.Compute/virtualMachines/write' over scope '/subscriptions/s/resourceGroups/g' or the scope is invalid. If \
             access was recently granted, please refresh your credentials.",
            "can't make virtual machine `demo-cp-0`: the action `Microsoft.Compute/virtualMachines/write` over \
             `/subscriptions/s/resourceGroups/g` is not allowed",
            "--assignee me --role Contributor --scope /subscriptions/s/resourceGroups/g",
        ),
        (
            403,
            "LinkedAuthorizationFailed",
            "The client 'me' with object id 'me' has permission to perform action 'Microsoft.Compute/virtualMachines/write' on scope \
             '/subscriptions/s/resourceGroups/g'; however, it does not have permission to perform action(s) \
             'Microsoft.Network/virtualNetworks/subnets/join/action' on the linked scope(s) '/subscriptions/s/resourceGroups/n' \
             (respectively) or the linked scope(s) are invalid.",
            "can't make virtual machine `demo-cp-0`: the action `Microsoft.Network/virtualNetworks/subnets/join/action` over \
             `/subscriptions/s/resourceGroups/n` is not allowed",
            "--assignee me --role Contributor --scope /subscriptions/s/resourceGroups/n",
        ),
        (
            409,
            "SkuNotAvailable",
            "The requested VM size is not available",
            "size `Standard_D2s_v5` can't be had in `westeurope`, zone 1",
            "az vm list-skus",
        ),
        (
            409,
            "OperationNotAllowed",
            QUOTA,
            "the quota `standardDSv5Family` is used up in `westeurope`, zone 1 (9 of 10 are used, 2 more are needed): virtual machine \
             `demo-cp-0` can't be made",
            "standardDSv5Family",
        ),
        (
            409,
            "QuotaExceeded",
            "Operation results in exceeding approved Total Regional Cores quota.",
            "the quota `Total Regional Cores` is used up in `westeurope`, zone 1: virtual machine `demo-cp-0` can't be made",
            "Total Regional Cores",
        ),
        (
            404,
            "SubscriptionNotFound",
            "...",
            "the subscription is not there, or the credentials don't reach it",
            "AZURE_SUBSCRIPTION_ID",
        ),
        (
            400,
            "NobodyKnows",
            "Something else.",
            "can't make virtual machine `demo-cp-0`",
            "",
        ),
    ];
    for (status, code, message, expected, hint) in cases {
        let error = refused(*status, code, message, &[]);
        assert_eq!(error.to_string(), *expected);
        assert_eq!(error.advice, Advice::Never, "{code}");
        assert!(
            error.hint.clone().unwrap_or_default().contains(hint),
            "{:?}",
            error.hint
        );
        let beneath = error.source.map(|s| s.to_string()).unwrap_or_default();
        assert!(beneath.starts_with(&format!("`{code}`")), "{beneath}");
    }
}

#[test]
fn says_when_to_try_again() {
    let after = |seconds| Advice::RetryAfter(Duration::from_secs(seconds));
    let limited = [
        ("retry-after", "27"),
        ("x-ms-ratelimit-remaining-resource", "Microsoft.Compute/PutVM3Min;0"),
    ];
    let error = refused(429, "OperationRateLimited", "slow down", &limited);
    assert_eq!(error.advice, after(27));
    assert!(error.to_string().contains("`Microsoft.Compute/PutVM3Min`"), "{error}");
    assert_eq!(
        refused(429, "TooManyRequests", "", &[]).advice,
        Advice::RetryAfter(THROTTLED)
    );
    assert_eq!(
        refused(409, "AnotherOperationInProgress", "", &[("retry-after", "3")]).advice,
        Advice::Wait(Duration::from_secs(3))
    );
    assert_eq!(
        refused(400, "ReferencedResourceNotProvisioned", "", &[]).advice,
        Advice::Wait(BUSY)
    );
    assert_eq!(refused(412, "PreconditionFailed", "", &[]).advice, Advice::LookFirst);
    assert_eq!(refused(503, "", "", &[]).advice, Advice::LookFirst);
    assert_eq!(machine().failed(Failure::Lost("gone".into())).advice, Advice::LookFirst);
    assert_eq!(machine().failed(Failure::Unsent("down".into())).advice, after(1));
    let reading = Doing::read("virtual machines of", "g");
    assert_eq!(reading.failed(Failure::Lost("gone".into())).advice, after(1));
    let never = Failure::NeverEnded {
        url: "https://arm/x/operations/op-1?v=1".into(),
        after: Duration::from_secs(9),
    };
    let error = machine().failed(never);
    assert_eq!(error.advice, Advice::LookFirst);
    assert!(error.hint.unwrap().contains("`op-1`"));
}

#[test]
fn finds_the_error_within() {
    let body = json!({"error": {"code": "ResourceDeploymentFailure", "message": "The resource operation completed with terminal state.",
        "details": [{"code": "Conflict", "message":
            "{\"error\":{\"code\":\"ZonalAllocationFailed\",\"message\":\"We do not have sufficient capacity\"}}"}]}});
    let error = ArmError::of(&body).unwrap();
    assert_eq!(error.innermost().code, "ZonalAllocationFailed");
    let shown = machine().failed(Failure::Ended(error));
    assert!(
        shown
            .to_string()
            .starts_with("Azure has no room for a machine of size `Standard_D2s_v5`"),
        "{shown}"
    );
    let unknown = ArmError::bare("VMExtensionProvisioningError", "it broke");
    assert_eq!(
        machine().failed(Failure::Ended(unknown)).to_string(),
        "virtual machine `demo-cp-0` has failed"
    );
    let bare = ArmError::of(&json!({"code": "A", "message": "b"})).unwrap();
    assert_eq!(bare.to_string(), "`A`: b");
    assert_eq!(ArmError::of(&Value::Null), None);
}
