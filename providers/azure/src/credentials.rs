//! Tokens for Azure Resource Manager: from `azure_identity` to what the resource manager's crates take.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use azure_core::auth::{AccessToken, Secret};
use azure_core::error::ErrorKind;
use azure_core_1::cloud::CloudConfiguration;
use azure_core_1::credentials::{Secret as IdentitySecret, TokenCredential as IdentityCredential};
use azure_core_1::http::{ClientOptions, ExponentialRetryOptions, RetryOptions};
use azure_identity::{
    AzureCliCredential, AzureCliCredentialOptions, AzureDeveloperCliCredential, ClientAssertionCredential,
    ClientAssertionCredentialOptions, ClientSecretCredential, ClientSecretCredentialOptions, ManagedIdentityCredential,
    ManagedIdentityCredentialOptions, UserAssignedId, WorkloadIdentityCredential, WorkloadIdentityCredentialOptions,
};
use time::OffsetDateTime;
use tokio::sync::Mutex;

use crate::certificate::Certificate;
use crate::config::{AzureConfig, Cloud, Credentials};
use crate::error::Cause;

/// Azure's instance metadata service, which gives managed identities of virtual machines their tokens.
const METADATA: &str = "169.254.169.254:80";
/// It is one hop away, or not there.
const METADATA_LIMIT: Duration = Duration::from_millis(500);
/// Tokens are replaced this long before they expire.
const MARGIN: Duration = Duration::from_mins(5);

type Identity = Arc<dyn IdentityCredential>;

/// Gives tokens, and keeps them while they last: `az` takes half a second to give one.
pub(crate) struct Tokens {
    scope: String,
    cloud: Cloud,
    subscription: String,
    given: Option<Secret>,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    identity: Option<Identity>,
    token: Option<AccessToken>,
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct NoToken(pub(crate) String);

/// Nobody has said whether there is a token: asking again may help.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Unanswered(String);

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens")
            .field("scope", &self.scope)
            .finish_non_exhaustive()
    }
}

impl Tokens {
    pub(crate) fn new(config: &AzureConfig) -> Self {
        Self {
            scope: format!("{}/.default", config.cloud.resource_manager()),
            cloud: config.cloud,
            subscription: config.subscription.clone(),
            given: match &config.credentials {
                Credentials::Default => None,
                Credentials::Token(token) => Some(Secret::new(token.clone())),
            },
            kept: Mutex::default(),
        }
    }

    /// A token that lasts a while yet.
    pub(crate) async fn token(&self) -> Result<Secret, Cause> {
        if let Some(given) = &self.given {
            return Ok(given.clone());
        }
        let mut kept = self.kept.lock().await;
        let soon = OffsetDateTime::now_utc() + MARGIN;
        if let Some(token) = kept.token.as_ref().filter(|t| t.expires_on > soon) {
            return Ok(token.token.clone());
        }
        let (identity, token) = match kept.identity.clone() {
            Some(identity) => {
                let token = self.ask(&identity).await?;
                (identity, token)
            }
            None => self.first().await?,
        };
        kept.identity = Some(identity);
        let secret = token.token.clone();
        kept.token = Some(token);
        Ok(secret)
    }

    /// Azure doesn't take this token any more: says whether another one can be had, which the next [`Tokens::token`] gives.
    pub(crate) async fn refused(&self, token: &Secret) -> bool {
        if self.given.is_some() {
            return false;
        }
        let mut kept = self.kept.lock().await;
        // Identities keep their tokens too. Of many requests that are refused at once only the first does this.
        if kept.token.as_ref().is_some_and(|t| t.token.secret() == token.secret()) {
            *kept = Kept::default();
        }
        true
    }

    async fn ask(&self, identity: &Identity) -> Result<AccessToken, Cause> {
        let token = identity.get_token(&[&self.scope], None).await;
        let token = token.map_err(|error| {
            let text = first_lines(&error.to_string());
            if is_unanswered(&error) {
                Cause::from(Unanswered(text))
            } else {
                Cause::from(NoToken(text))
            }
        })?;
        Ok(AccessToken::new(token.token.secret().to_owned(), token.expires_on))
    }

    /// What was set up on purpose counts alone; else whichever login works.
    async fn first(&self) -> Result<(Identity, AccessToken), Cause> {
        if let Some(identity) = self.on_purpose()? {
            let token = self.ask(&identity).await?;
            return Ok((identity, token));
        }
        let mut reasons = Vec::new();
        let cli = AzureCliCredential::new(Some(AzureCliCredentialOptions {
            subscription: Some(self.subscription.clone()),
            ..AzureCliCredentialOptions::default()
        }))?;
        let developer = AzureDeveloperCliCredential::new(None)?;
        for identity in [cli as Identity, developer as Identity] {
            match self.ask(&identity).await {
                Ok(token) => return Ok((identity, token)),
                Err(error) => reasons.push(error.to_string()),
            }
        }
        if metadata_answers().await {
            let identity = self.managed()?;
            match self.ask(&identity).await {
                Ok(token) => return Ok((identity, token)),
                Err(error) => reasons.push(error.to_string()),
            }
        }
        Err(NoToken(reasons.join("; ")).into())
    }

    /// What the environment asks for.
    fn on_purpose(&self) -> Result<Option<Identity>, Cause> {
        let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        if let Some(secret) = var("AZURE_CLIENT_SECRET") {
            let both = var("AZURE_TENANT_ID").zip(var("AZURE_CLIENT_ID"));
            let (tenant, client) = both.ok_or_else(|| {
                NoToken("`AZURE_CLIENT_SECRET` is set without `AZURE_TENANT_ID` and `AZURE_CLIENT_ID`".into())
            })?;
            let options = ClientSecretCredentialOptions {
                client_options: self.options(),
            };
            let secret = IdentitySecret::new(secret);
            return Ok(Some(ClientSecretCredential::new(
                &tenant,
                client,
                secret,
                Some(options),
            )?));
        }
        if let Some(path) = var("AZURE_CLIENT_CERTIFICATE_PATH") {
            let both = var("AZURE_TENANT_ID").zip(var("AZURE_CLIENT_ID"));
            let (tenant, client) = both.ok_or_else(|| {
                NoToken("`AZURE_CLIENT_CERTIFICATE_PATH` is set without `AZURE_TENANT_ID` and `AZURE_CLIENT_ID`".into())
            })?;
            let authority = self.cloud.authority();
            let audience = format!("{}/{tenant}/oauth2/v2.0/token", authority.trim_end_matches('/'));
            let certificate = Certificate::open(path.as_ref(), &client, audience)?;
            let options = ClientAssertionCredentialOptions {
                client_options: self.options(),
            };
            return Ok(Some(ClientAssertionCredential::new(
                tenant,
                client,
                certificate,
                Some(options),
            )?));
        }
        if var("AZURE_FEDERATED_TOKEN_FILE").is_some() {
            let options = WorkloadIdentityCredentialOptions {
                credential_options: ClientAssertionCredentialOptions {
                    client_options: self.options(),
                },
                ..WorkloadIdentityCredentialOptions::default()
            };
            return Ok(Some(WorkloadIdentityCredential::new(Some(options))?));
        }
        // App Service, Functions, Container Apps and their like say where they give tokens.
        if var("IDENTITY_ENDPOINT").is_some() {
            return Ok(Some(self.managed()?));
        }
        Ok(None)
    }

    fn managed(&self) -> Result<Identity, Cause> {
        let client = std::env::var("AZURE_CLIENT_ID").ok().filter(|v| !v.is_empty());
        Ok(ManagedIdentityCredential::new(Some(
            ManagedIdentityCredentialOptions {
                user_assigned_id: client.map(UserAssignedId::ClientId),
                client_options: self.options(),
            },
        ))?)
    }

    fn options(&self) -> ClientOptions {
        ClientOptions {
            // Where none is named, `AZURE_AUTHORITY_HOST` may say another one.
            cloud: match self.cloud {
                Cloud::Public => None,
                Cloud::UsGovernment => Some(Arc::new(CloudConfiguration::AzureGovernment)),
                Cloud::China => Some(Arc::new(CloudConfiguration::AzureChina)),
            },
            // The loop that calls providers tries again for longer, and says so.
            retry: RetryOptions::exponential(ExponentialRetryOptions {
                max_retries: 2,
                ..ExponentialRetryOptions::default()
            }),
            ..ClientOptions::default()
        }
    }
}

#[async_trait]
impl azure_core::auth::TokenCredential for Tokens {
    async fn get_token(&self, _scopes: &[&str]) -> azure_core::Result<AccessToken> {
        let token = self.token().await;
        let token = token.map_err(|cause| azure_core::Error::new(ErrorKind::Credential, NoToken(cause.to_string())))?;
        Ok(AccessToken::new(token, OffsetDateTime::now_utc() + MARGIN))
    }

    async fn clear_cache(&self) -> azure_core::Result<()> {
        self.kept.lock().await.token = None;
        Ok(())
    }
}

async fn metadata_answers() -> bool {
    let connected = tokio::time::timeout(METADATA_LIMIT, tokio::net::TcpStream::connect(METADATA)).await;
    matches!(connected, Ok(Ok(_)))
}

/// Whether the login wasn't reached, or had no time.
fn is_unanswered(error: &azure_core_1::Error) -> bool {
    let first: &(dyn std::error::Error + 'static) = error;
    std::iter::successors(Some(first), |cause| cause.source()).any(|cause| {
        let lost = cause.is::<reqwest::Error>();
        let status = cause
            .downcast_ref::<azure_core_1::Error>()
            .and_then(azure_core_1::Error::http_status);
        lost || status.is_some_and(|s| matches!(u16::from(s), 429 | 500..=599))
    })
}

/// The part of an identity's error that isn't a pointer to documentation.
fn first_lines(text: &str) -> String {
    let text = text.split("\nTo troubleshoot").next().unwrap_or(text);
    text.trim().replace(['\r', '\n'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_one_line() {
        let text = "AzureCliCredential authentication failed. Please run\r\n'az login'\nTo troubleshoot, visit https://aka.ms/x#y";
        assert_eq!(
            first_lines(text),
            "AzureCliCredential authentication failed. Please run  'az login'"
        );
    }
}
