//! How the provider is set up: as written, and as checked.

use ipnet::Ipv4Net;
use kprov_provider::ProviderError;
use kprov_types::infrastructure::AwsSettings;

/// Size of a root disk where nothing else is said, in GiB.
const ROOT_DISK_GIB: u32 = 30;
/// The largest gp3 volume, in GiB.
const LARGEST_DISK_GIB: u32 = 16 * 1024;

/// How the provider is set up, as a cluster file says it.
#[derive(Clone, Debug, Default)]
pub struct AwsConfig {
    /// The `aws` part of a cluster file.
    pub settings: AwsSettings,
    /// The availability zones to spread over; all that the region has where empty.
    pub zones: Vec<String>,
}

/// The same, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) region: Option<String>,
    pub(crate) profile: Option<String>,
    pub(crate) endpoint_url: Option<String>,
    pub(crate) vpc: Option<String>,
    pub(crate) private: bool,
    /// Never empty.
    pub(crate) access: Vec<Ipv4Net>,
    /// In order, each once.
    pub(crate) zones: Vec<String>,
    pub(crate) root_disk_gib: i32,
    pub(crate) termination_protection: bool,
    pub(crate) instance_profile: Option<InstanceProfile>,
}

/// An instance profile as it was named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum InstanceProfile {
    Name(String),
    Arn(String),
}

fn refuse<T>(field: &str, value: &str, why: &str) -> Result<T, ProviderError> {
    Err(ProviderError::never(format!("`{field}` is `{value}`, {why}"))
        .hint(format!("correct `spec.{field}` in the cluster file, or leave it out")))
}

impl AwsConfig {
    /// Checks what can be checked without asking AWS.
    pub(crate) fn validate(self) -> Result<Settings, ProviderError> {
        let Self { settings, mut zones } = self;
        let AwsSettings {
            region,
            profile,
            endpoint_url,
            vpc,
            private,
            mut access,
            root_disk_gib,
            termination_protection,
            instance_profile,
        } = settings;
        if let Some(region) = &region
            && !is_region(region)
        {
            return refuse("aws.region", region, "which is no region, such as `eu-central-1`");
        }
        if let Some(url) = &endpoint_url
            && !(url.starts_with("http://") || url.starts_with("https://"))
        {
            return refuse("aws.endpointUrl", url, "which is no URL");
        }
        if let Some(vpc) = &vpc
            && !vpc.starts_with("vpc-")
        {
            return refuse("aws.vpc", vpc, "which is no VPC's id, such as `vpc-0123456789abcdef0`");
        }
        zones.sort();
        zones.dedup();
        if let Some(region) = &region
            && let Some(zone) = zones.iter().find(|z| !z.starts_with(region.as_str()))
        {
            return refuse("zones", zone, &format!("which is not in the region `{region}`"));
        }
        let gib = root_disk_gib.unwrap_or(ROOT_DISK_GIB);
        if !(8..=LARGEST_DISK_GIB).contains(&gib) {
            return refuse("aws.rootDiskGib", &gib.to_string(), "which is not between 8 and 16384");
        }
        if access.is_empty() {
            access.push(Ipv4Net::default());
        }
        access.sort();
        access.dedup();
        Ok(Settings {
            region,
            profile,
            endpoint_url,
            vpc,
            private,
            access: access.into_iter().map(|net| net.trunc()).collect(),
            zones,
            root_disk_gib: i32::try_from(gib).unwrap_or(i32::MAX),
            termination_protection,
            instance_profile: instance_profile.map(|profile| {
                if profile.starts_with("arn:") {
                    InstanceProfile::Arn(profile)
                } else {
                    InstanceProfile::Name(profile)
                }
            }),
        })
    }
}

/// `eu-central-1`, `us-gov-west-1`: parts of letters, and a number.
fn is_region(text: &str) -> bool {
    let mut parts: Vec<&str> = text.split('-').collect();
    let number = parts.pop().unwrap_or_default();
    parts.len() >= 2
        && !number.is_empty()
        && number.bytes().all(|b| b.is_ascii_digit())
        && parts
            .iter()
            .all(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_lowercase()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults() {
        let settings = AwsConfig::default().validate().unwrap();
        assert_eq!(settings.access, ["0.0.0.0/0".parse::<Ipv4Net>().unwrap()]);
        assert_eq!(settings.root_disk_gib, 30);
        assert_eq!(settings.instance_profile, None);
    }

    #[test]
    fn refuses_what_cannot_be_right() {
        type Edit = fn(&mut AwsConfig);
        let cases: &[(&str, Edit)] = &[
            ("aws.region", |c| c.settings.region = Some("Frankfurt".into())),
            ("aws.region", |c| c.settings.region = Some("eu-central-1a".into())),
            ("aws.endpointUrl", |c| {
                c.settings.endpoint_url = Some("localhost:5000".into());
            }),
            ("aws.vpc", |c| c.settings.vpc = Some("main".into())),
            ("aws.rootDiskGib", |c| c.settings.root_disk_gib = Some(1)),
            ("zones", |c| {
                c.settings.region = Some("eu-central-1".into());
                c.zones = vec!["us-east-1a".into()];
            }),
        ];
        for (field, edit) in cases {
            let mut config = AwsConfig::default();
            edit(&mut config);
            let error = config.validate().unwrap_err();
            assert!(error.message.contains(field), "{field}: {error}");
            assert!(error.hint.is_some());
        }
    }

    #[test]
    fn profiles_by_name_or_arn() {
        let of = |text: &str| {
            let mut config = AwsConfig::default();
            config.settings.instance_profile = Some(text.into());
            config.validate().unwrap().instance_profile.unwrap()
        };
        assert_eq!(of("nodes"), InstanceProfile::Name("nodes".into()));
        let arn = "arn:aws:iam::1:instance-profile/nodes";
        assert_eq!(of(arn), InstanceProfile::Arn(arn.into()));
    }
}
