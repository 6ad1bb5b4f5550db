//! What a cluster file says for Azure, checked.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::Ipv4Net;
use kprov_provider::ProviderError;
use kprov_types::infrastructure::AzureSettings;

/// How long one operation may take before it's given up on.
const OPERATION_LIMIT: Duration = Duration::from_mins(20);
/// The size of a machine's system disk where none is asked for, in GiB.
const ROOT_DISK_GIB: u32 = 30;

/// Where tokens come from.
#[derive(Clone, Default)]
pub enum Credentials {
    /// From the environment, a workload identity, a managed identity, or `az login`, whichever is there first.
    #[default]
    Default,
    /// One that the caller has already.
    Token(String),
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Default => "Default",
            Self::Token(_) => "Token(..)",
        })
    }
}

/// One of Azure's clouds: they share nothing but their API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cloud {
    /// The public one.
    #[default]
    Public,
    /// Azure Government.
    UsGovernment,
    /// Azure in China.
    China,
}

impl Cloud {
    fn parse(text: &str) -> Option<Self> {
        // The second names are those of `az cloud list`.
        Some(match text.to_ascii_lowercase().as_str() {
            "public" | "azurecloud" => Self::Public,
            "usgovernment" | "azureusgovernment" => Self::UsGovernment,
            "china" | "azurechinacloud" => Self::China,
            _ => return None,
        })
    }

    /// Where its logins are; of the public cloud the environment may name another place.
    pub(crate) fn authority(self) -> String {
        match self {
            Self::Public => std::env::var("AZURE_AUTHORITY_HOST")
                .ok()
                .filter(|v| !v.is_empty())
                .unwrap_or_else(|| "https://login.microsoftonline.com".to_owned()),
            Self::UsGovernment => "https://login.microsoftonline.us".to_owned(),
            Self::China => "https://login.chinacloudapi.cn".to_owned(),
        }
    }

    /// Where its resource manager is, which is what tokens are asked for, too.
    pub(crate) const fn resource_manager(self) -> &'static str {
        match self {
            Self::Public => "https://management.azure.com",
            Self::UsGovernment => "https://management.usgovcloudapi.net",
            Self::China => "https://management.chinacloudapi.cn",
        }
    }
}

/// What the provider needs to know.
#[derive(Clone, Debug)]
pub struct AzureConfig {
    pub(crate) subscription: String,
    pub(crate) location: String,
    pub(crate) cloud: Cloud,
    pub(crate) endpoint: String,
    pub(crate) resource_group: Option<String>,
    pub(crate) private: bool,
    pub(crate) access: Vec<Ipv4Net>,
    pub(crate) root_disk_gib: u32,
    pub(crate) identity: Option<String>,
    pub(crate) ssh_public_key: Option<String>,
    pub(crate) zones: Vec<String>,
    /// The sizes of machines that will be asked for: the zones spread over are those that have them all.
    pub sizes: BTreeSet<String>,
    /// Where tokens come from.
    pub credentials: Credentials,
    /// How long one operation of Azure may take.
    pub operation_limit: Duration,
}

/// What the process was started with, as far as Azure's tools look at it.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// `AZURE_SUBSCRIPTION_ID`, else the default subscription of `az login`.
    pub subscription: Option<String>,
    /// `AZURE_DEFAULTS_LOCATION`, which is what `az` takes.
    pub location: Option<String>,
}

impl Surroundings {
    /// What is there in this process.
    pub fn of_process() -> Self {
        let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        Self {
            subscription: var("AZURE_SUBSCRIPTION_ID").or_else(logged_in),
            location: var("AZURE_DEFAULTS_LOCATION"),
        }
    }
}

/// The default subscription of `az login`, from its profile (`azureProfile.json`).
fn logged_in() -> Option<String> {
    let dir = std::env::var_os("AZURE_CONFIG_DIR").map(PathBuf::from);
    let dir = dir.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".azure")))?;
    default_subscription(&std::fs::read_to_string(dir.join("azureProfile.json")).ok()?)
}

fn default_subscription(profile: &str) -> Option<String> {
    // The file begins with a byte order mark.
    let profile: serde_json::Value = serde_json::from_str(profile.trim_start_matches('\u{feff}')).ok()?;
    let all = profile.get("subscriptions")?.as_array()?;
    let default = all.iter().find(|s| s["isDefault"] == true)?;
    Some(default["id"].as_str()?.to_owned())
}

impl AzureConfig {
    /// Checks what a cluster file says. `zones` are the availability zones to spread machines over; all where empty.
    #[expect(clippy::too_many_lines, reason = "one check after the other, each of one setting")]
    pub fn new(settings: &AzureSettings, zones: &[String], around: &Surroundings) -> Result<Self, ProviderError> {
        let AzureSettings {
            subscription,
            location,
            cloud,
            endpoint_url,
            resource_group,
            private,
            access,
            root_disk_gib,
            identity,
            ssh_public_key,
        } = settings;
        let subscription = subscription.clone().or_else(|| around.subscription.clone());
        let subscription = subscription.ok_or_else(|| {
            ProviderError::never("no Azure subscription is named")
                .hint("name it in `spec.azure.subscription` or `AZURE_SUBSCRIPTION_ID`, or log in with `az login`")
        })?;
        if !is_guid(&subscription) {
            return Err(ProviderError::never(format!(
                "`spec.azure.subscription`: `{subscription}` is not a subscription's id"
            ))
            .hint("give the id, not the name; `az account list` shows both"));
        }
        let location = location.clone().or_else(|| around.location.clone()).ok_or_else(|| {
            ProviderError::never("no Azure location is named")
                .hint("name it in `spec.azure.location` or `AZURE_DEFAULTS_LOCATION`, such as `westeurope`")
        })?;
        // "West Europe" is what the portal shows for `westeurope`.
        let location = location.replace(' ', "").to_ascii_lowercase();
        if location.is_empty() || !location.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(wrong(
                "location",
                &location,
                "name one as `az account list-locations` does",
            ));
        }
        let cloud = match cloud.as_deref() {
            None => Cloud::default(),
            Some(name) => Cloud::parse(name)
                .ok_or_else(|| wrong("cloud", name, "there are `public`, `usgovernment` and `china`"))?,
        };
        let endpoint = endpoint_url
            .clone()
            .unwrap_or_else(|| cloud.resource_manager().to_owned());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        check_endpoint(&endpoint)?;
        if let Some(group) = resource_group.as_deref()
            && !is_group_name(group)
        {
            return Err(wrong(
                "resourceGroup",
                group,
                "use up to 90 letters, digits, `_`, `-`, `.` and brackets, without `.` at the end",
            ));
        }
        if let Some(zone) = zones.iter().find(|z| z.parse::<u8>().is_err()) {
            return Err(
                ProviderError::never(format!("`spec.zones`: `{zone}` is not an availability zone"))
                    .hint("Azure's zones are `1`, `2` and `3`"),
            );
        }
        if let Some(id) = identity.as_deref()
            && !(id.starts_with("/subscriptions/") && id.contains("/userAssignedIdentities/"))
        {
            return Err(wrong(
                "identity",
                id,
                "give the resource id of a user-assigned identity; `az identity list` shows them",
            ));
        }
        if let Some(key) = ssh_public_key.as_deref()
            && !["ssh-rsa ", "ssh-ed25519 "].iter().any(|kind| key.starts_with(kind))
        {
            return Err(wrong(
                "sshPublicKey",
                key,
                "Azure takes `ssh-rsa` and `ssh-ed25519` keys, as in `~/.ssh/id_ed25519.pub`",
            ));
        }
        let root_disk_gib = root_disk_gib.unwrap_or(ROOT_DISK_GIB);
        if !(ROOT_DISK_GIB..=4095).contains(&root_disk_gib) {
            return Err(wrong(
                "rootDiskGib",
                &root_disk_gib.to_string(),
                "Azure's images need 30, and its system disks have at most 4095",
            ));
        }
        Ok(Self {
            subscription,
            location,
            cloud,
            endpoint,
            resource_group: resource_group.clone(),
            private: *private,
            access: access.clone(),
            root_disk_gib,
            identity: identity.clone(),
            ssh_public_key: ssh_public_key.clone(),
            zones: zones.to_vec(),
            sizes: BTreeSet::new(),
            credentials: Credentials::Default,
            operation_limit: OPERATION_LIMIT,
        })
    }
}

fn wrong(field: &str, value: &str, hint: &str) -> ProviderError {
    ProviderError::never(format!("`spec.azure.{field}`: `{value}` can't be used")).hint(hint)
}

fn check_endpoint(endpoint: &str) -> Result<(), ProviderError> {
    let https = endpoint.starts_with("https://");
    // A token over plain http is for everybody on the way: an emulator on this host is the only use there is.
    let loopback = ["http://127.0.0.1:", "http://localhost:", "http://[::1]:"];
    if https || loopback.iter().any(|l| endpoint.starts_with(l)) {
        return Ok(());
    }
    Err(wrong(
        "endpointUrl",
        endpoint,
        "tokens are sent to it: use `https://`, or `http://` on the loopback address alone",
    ))
}

fn is_guid(text: &str) -> bool {
    let lengths: Vec<usize> = text.split('-').map(str::len).collect();
    lengths == [8, 4, 4, 4, 12] && text.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit())
}

fn is_group_name(name: &str) -> bool {
    (1..=90).contains(&name.chars().count())
        && !name.ends_with('.')
        && name.chars().all(|c| c.is_alphanumeric() || "_-.()".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0b1f6471-1bf0-4dda-aec3-cb9272f09590";

    fn settings() -> AzureSettings {
        AzureSettings {
            subscription: Some(ID.into()),
            location: Some("westeurope".into()),
            ..AzureSettings::default()
        }
    }

    fn check(settings: &AzureSettings) -> Result<AzureConfig, ProviderError> {
        AzureConfig::new(settings, &[], &Surroundings::default())
    }

    #[test]
    fn takes_what_is_left_out_from_around() {
        let config = check(&settings()).unwrap();
        assert_eq!(config.endpoint, "https://management.azure.com");
        assert_eq!(config.root_disk_gib, 30);
        let around = Surroundings {
            subscription: Some(ID.into()),
            location: Some("West Europe".into()),
        };
        let config = AzureConfig::new(&AzureSettings::default(), &[], &around).unwrap();
        assert_eq!(
            (config.subscription.as_str(), config.location.as_str()),
            (ID, "westeurope")
        );
        let profile =
            format!("\u{feff}{{\"subscriptions\": [{{\"id\": \"x\"}}, {{\"id\": \"{ID}\", \"isDefault\": true}}]}}");
        assert_eq!(default_subscription(&profile).as_deref(), Some(ID));
        let error = check(&AzureSettings::default()).unwrap_err();
        assert!(error.hint.unwrap().contains("AZURE_SUBSCRIPTION_ID"));
    }

    #[test]
    fn refuses_with_the_field() {
        type Edit = fn(&mut AzureSettings);
        let cases: &[(&str, Edit)] = &[
            ("subscription", |s| s.subscription = Some("My Subscription".into())),
            ("location", |s| s.location = Some("west/europe".into())),
            ("cloud", |s| s.cloud = Some("germany".into())),
            ("endpointUrl", |s| {
                s.endpoint_url = Some("http://arm.example.com".into());
            }),
            ("resourceGroup", |s| s.resource_group = Some("a/b".into())),
            ("identity", |s| s.identity = Some("me".into())),
            ("sshPublicKey", |s| {
                s.ssh_public_key = Some("ecdsa-sha2-nistp256 AAAA".into());
            }),
            ("rootDiskGib", |s| s.root_disk_gib = Some(8)),
        ];
        for (field, edit) in cases {
            let mut settings = settings();
            edit(&mut settings);
            let error = check(&settings).unwrap_err();
            assert!(
                error.to_string().starts_with(&format!("`spec.azure.{field}`: ")),
                "{error}"
            );
            assert!(error.hint.is_some(), "{error}");
        }
        let zones = ["a".to_owned()];
        assert!(AzureConfig::new(&settings(), &zones, &Surroundings::default()).is_err());
    }

    #[test]
    fn clouds_have_endpoints_of_their_own() {
        for (name, host) in [
            ("AzureCloud", "management.azure.com"),
            ("usgovernment", "management.usgovcloudapi.net"),
            ("china", "management.chinacloudapi.cn"),
        ] {
            let mut settings = settings();
            settings.cloud = Some(name.into());
            assert_eq!(check(&settings).unwrap().endpoint, format!("https://{host}"));
        }
        let mut settings = settings();
        settings.endpoint_url = Some("http://127.0.0.1:4000/".into());
        assert_eq!(check(&settings).unwrap().endpoint, "http://127.0.0.1:4000");
    }
}
