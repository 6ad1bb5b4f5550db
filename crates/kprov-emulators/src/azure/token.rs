//! Tokens: where they come from, and which are good.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::Method;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::Options;
use super::refusal::Refusal;
use super::server::Reply;

/// How long tokens live, in seconds.
const LIFE: i64 = 3_600;
/// Who issues the service account tokens that are trusted (workload identity), to whom, and for which audience.
const ISSUER: &str = "https://oidc.emulator.invalid/";
const SUBJECT: &str = "system:serviceaccount:kprov:kprov";
const AUDIENCE: &str = "api://AzureADTokenExchange";

#[derive(Clone, Debug)]
struct Claims {
    tenant: String,
    expires: Timestamp,
}

/// The tokens given out.
#[derive(Debug)]
pub(super) struct Tokens {
    tenant: String,
    /// Tenants that are there, and have nothing to do with the subscription.
    others: Vec<String>,
    client: String,
    secret: String,
    /// SHA-256 of the application's certificates, as `x5t#S256` has it.
    certificates: Vec<String>,
    identity_header: String,
    given: BTreeMap<String, Claims>,
}

impl Tokens {
    pub(super) fn new(options: &Options) -> Self {
        Self {
            tenant: options.tenant.clone(),
            others: options.other_tenants.clone(),
            client: options.client_id.clone(),
            secret: options.client_secret.clone(),
            certificates: options.client_certificates.clone(),
            identity_header: format!("{}-header", options.client_secret),
            given: BTreeMap::new(),
        }
    }

    /// A token of this tenant that lives for so many seconds from now, which may be in the past.
    pub(super) fn issue(&mut self, tenant: &str, life: i64) -> String {
        let now = Timestamp::now();
        let expires = now + SignedDuration::from_secs(life);
        let encode = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let header = encode(json!({"typ": "JWT", "alg": "RS256", "kid": "emulator"}));
        let payload = encode(json!({
            "aud": "https://management.azure.com/",
            "iss": format!("https://sts.windows.net/{tenant}/"),
            "iat": now.as_second(), "nbf": now.as_second(), "exp": expires.as_second(),
            "appid": self.client, "oid": self.client, "tid": tenant, "ver": "1.0",
        }));
        let signature = URL_SAFE_NO_PAD.encode(format!("emulated signature {}", self.given.len()));
        let token = format!("{header}.{payload}.{signature}");
        let tenant = tenant.to_owned();
        self.given.insert(token.clone(), Claims { tenant, expires });
        token
    }

    pub(super) fn own(&mut self) -> String {
        self.issue(&self.tenant.clone(), LIFE)
    }

    pub(super) fn identity_header(&self) -> &str {
        &self.identity_header
    }

    /// Checks an `Authorization` header.
    pub(super) fn check(&self, header: Option<&str>) -> Result<(), Refusal> {
        let Some(header) = header else {
            return Err(Refusal::new(
                401,
                "AuthenticationFailed",
                "Authentication failed. The 'Authorization' header is missing.",
            ));
        };
        let token = header.strip_prefix("Bearer ").map(str::trim);
        let Some(claims) = token.and_then(|t| self.given.get(t)) else {
            return Err(Refusal::new(
                401,
                "InvalidAuthenticationToken",
                "The access token is invalid.",
            ));
        };
        if claims.tenant != self.tenant {
            return Err(wrong_tenant(&claims.tenant, &self.tenant));
        }
        if claims.expires <= Timestamp::now() {
            return Err(expired(claims.expires));
        }
        Ok(())
    }

    /// The token endpoint: client credentials by secret or by assertion (workload identity).
    pub(super) fn oauth(&mut self, tenant: &str, method: &Method, form: &BTreeMap<String, String>) -> Reply {
        let field = |name: &str| form.get(name).map(String::as_str).unwrap_or_default();
        let refuse = |status: u16, error: &str, number: u32, text: String| {
            Reply::with(
                status,
                &json!({
                    "error": error,
                    "error_description": format!("AADSTS{number}: {text}"),
                    "error_codes": [number],
                    "timestamp": Timestamp::now().to_string(),
                    "trace_id": "00000000-0000-0000-0000-000000000000",
                    "correlation_id": "00000000-0000-0000-0000-000000000000",
                }),
            )
        };
        if *method != Method::POST {
            return refuse(
                400,
                "invalid_request",
                900_561,
                "The endpoint only accepts POST requests.".to_owned(),
            );
        }
        if tenant != self.tenant && !self.others.iter().any(|t| t == tenant) {
            return refuse(
                400,
                "invalid_request",
                90_002,
                format!(
                    "Tenant '{tenant}' not found. Check to make sure you have the correct tenant ID and are signing into the correct cloud."
                ),
            );
        }
        if field("grant_type") != "client_credentials" {
            return refuse(
                400,
                "unsupported_grant_type",
                70_003,
                format!("The app requested an unsupported grant type '{}'.", field("grant_type")),
            );
        }
        if field("client_id") != self.client {
            return refuse(
                400,
                "unauthorized_client",
                700_016,
                format!(
                    "Application with identifier '{}' was not found in the directory '{tenant}'.",
                    field("client_id")
                ),
            );
        }
        let by_assertion = field("client_assertion_type") == "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
        if by_assertion {
            if let Err((status, error, number, text)) = self.trusted(tenant, field("client_assertion")) {
                return refuse(status, error, number, text);
            }
        } else if field("client_secret") != self.secret {
            return refuse(
                401,
                "invalid_client",
                7_000_215,
                "Invalid client secret provided. Ensure the secret being sent in the request is the client secret value, not the client secret ID.".to_owned(),
            );
        }
        if !field("scope").ends_with("/.default") {
            return refuse(
                400,
                "invalid_scope",
                70_011,
                "The provided value for the input parameter 'scope' is not valid.".to_owned(),
            );
        }
        let token = self.issue(tenant, LIFE);
        Reply::with(
            200,
            &json!({"token_type": "Bearer", "expires_in": LIFE, "ext_expires_in": LIFE, "access_token": token}),
        )
    }

    /// Where managed identities get theirs, as in App Service: `IDENTITY_ENDPOINT` and `IDENTITY_HEADER`.
    pub(super) fn managed_identity(&mut self, header: Option<&str>) -> Reply {
        if header != Some(self.identity_header.as_str()) {
            return Reply::with(
                401,
                &json!({"statusCode": 401, "message": "X-IDENTITY-HEADER is missing or wrong"}),
            );
        }
        let token = self.own();
        let expires = Timestamp::now().as_second() + LIFE;
        Reply::with(
            200,
            &json!({
                "access_token": token, "expires_on": expires.to_string(), "resource": "https://management.azure.com/",
                "token_type": "Bearer", "client_id": self.client,
            }),
        )
    }
}

/// A service account's token, as a workload identity's pod finds it in a file.
pub(super) fn assertion(subject: Option<&str>, life: i64) -> String {
    let now = Timestamp::now().as_second();
    let encode = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let header = encode(json!({"alg": "RS256", "kid": "emulator"}));
    let payload = encode(json!({
        "iss": ISSUER, "sub": subject.unwrap_or(SUBJECT), "aud": [AUDIENCE],
        "iat": now + life - LIFE, "nbf": now + life - LIFE, "exp": now + life,
    }));
    format!("{header}.{payload}.{}", URL_SAFE_NO_PAD.encode("emulated signature"))
}

type Untrusted = (u16, &'static str, u32, String);

impl Tokens {
    /// Whether an assertion is trusted: the application's own, by a certificate, or a service account's token; else status, error,
    /// number and text of the refusal, in Entra's words. Signatures are not looked at.
    fn trusted(&self, tenant: &str, assertion: &str) -> Result<(), Untrusted> {
        let mut parts = assertion.split('.').map(|part| {
            let bytes = URL_SAFE_NO_PAD.decode(part).ok()?;
            serde_json::from_slice::<Value>(&bytes).ok()
        });
        let (Some(Some(header)), Some(Some(claims))) = (parts.next(), parts.next()) else {
            let text = "JWT token is invalid or malformed.".to_owned();
            return Err((400, "invalid_request", 50_027, text));
        };
        if claims["iss"] == json!(self.client) {
            self.own_statement(tenant, &header, &claims)?;
        } else {
            federated(&claims)?;
        }
        let now = Timestamp::now();
        let time = |name: &str| claims[name].as_i64().unwrap_or_default();
        if (time("nbf")..time("exp")).contains(&now.as_second()) {
            return Ok(());
        }
        Err((
            401,
            "invalid_client",
            700_024,
            format!(
                "Client assertion is not within its valid time range. Current time: {now}, assertion valid from {}, expiry time of \
                 assertion {}.",
                time("nbf"),
                time("exp")
            ),
        ))
    }

    fn own_statement(&self, tenant: &str, header: &Value, claims: &Value) -> Result<(), Untrusted> {
        let thumbprint = header["x5t#S256"].as_str().unwrap_or_default();
        if header["alg"] != "PS256" || !self.certificates.iter().any(|c| c == thumbprint) {
            return Err((
                401,
                "invalid_client",
                700_027,
                format!(
                    "The certificate with identifier used to sign the client assertion is not registered on application. [Reason - The \
                     key was not found., Thumbprint of key used by client: '{thumbprint}']"
                ),
            ));
        }
        let audience = claims["aud"].as_str().unwrap_or_default();
        if claims["sub"] != claims["iss"] || !audience.ends_with(&format!("/{tenant}/oauth2/v2.0/token")) {
            return Err((
                401,
                "invalid_client",
                700_023,
                format!(
                    "Client assertion audience claim does not match Realm issuer. Review the documentation. '{audience}'"
                ),
            ));
        }
        Ok(())
    }
}

fn federated(claims: &Value) -> Result<(), Untrusted> {
    let text = |name: &str| claims[name].as_str().unwrap_or_default().to_owned();
    let unknown = |number, what: &str, value: &str| {
        Err((
            400,
            "invalid_request",
            number,
            format!(
                "No matching federated identity record found for presented assertion {what} '{value}'. Check your federated identity \
                 credential Subject, Audience and Issuer against the presented assertion. \
                 https://learn.microsoft.com/entra/workload-id/workload-identity-federation"
            ),
        ))
    };
    if text("iss") != ISSUER {
        return unknown(700_211, "issuer", &text("iss"));
    }
    if claims["aud"] != json!([AUDIENCE]) {
        return unknown(700_212, "audience", &claims["aud"].to_string());
    }
    if text("sub") != SUBJECT {
        return unknown(700_213, "subject", &text("sub"));
    }
    Ok(())
}

/// A token of another tenant.
pub(super) fn wrong_tenant(issuer: &str, tenant: &str) -> Refusal {
    Refusal::new(
        401,
        "InvalidAuthenticationTokenTenant",
        format!(
            "The access token is from the wrong issuer 'https://sts.windows.net/{issuer}/'. It must match the tenant \
             'https://sts.windows.net/{tenant}/' associated with this subscription. Please use the authority (URL) \
             'https://login.windows.net/{tenant}' to get the token."
        ),
    )
}

/// A token that was good once.
pub(super) fn expired(at: Timestamp) -> Refusal {
    Refusal::new(
        401,
        "ExpiredAuthenticationToken",
        format!(
            "The access token expiry UTC time '{at}' is earlier than current UTC time '{}'.",
            Timestamp::now()
        ),
    )
}
