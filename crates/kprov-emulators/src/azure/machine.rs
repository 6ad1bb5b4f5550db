//! What Microsoft.Compute asks of a machine's image and operating system, told from the request alone.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::catalogue::{self, Image, Size};
use super::refusal::Refusal;
use super::store::{Resource, text};

/// The most that custom data may be, before it's encoded.
const CUSTOM_DATA: usize = 65_535;

/// Names that no user of a machine may have.
const TAKEN_USERS: &[&str] = &[
    "administrator",
    "admin",
    "user",
    "user1",
    "test",
    "user2",
    "test1",
    "user3",
    "admin1",
    "1",
    "123",
    "a",
    "actuser",
    "adm",
    "admin2",
    "aspnet",
    "backup",
    "console",
    "david",
    "guest",
    "john",
    "owner",
    "root",
    "server",
    "sql",
    "support",
    "support_388945a0",
    "sys",
    "test2",
    "test3",
    "user4",
    "user5",
];

/// A parameter of a request that won't do.
pub(super) fn parameter(target: &str, message: impl Into<String>) -> Refusal {
    Refusal::new(400, "InvalidParameter", message).target(target)
}

/// Something that can't be changed on what exists.
pub(super) fn unchangeable(target: &str) -> Refusal {
    Refusal::new(
        409,
        "PropertyChangeNotAllowed",
        format!("Changing property '{target}' is not allowed."),
    )
    .target(target)
}

/// The image that a machine is made of, and whether the size starts it.
pub(super) fn check_image(whole: &Value, size: &Size) -> Result<&'static Image, Refusal> {
    let at = |p: &str| text(whole, &format!("/properties/storageProfile/imageReference/{p}")).unwrap_or_default();
    if !at("id").is_empty() || at("publisher").is_empty() {
        return Err(parameter(
            "imageReference",
            "This server has images of the marketplace alone: publisher, offer, sku and version.",
        ));
    }
    let (publisher, offer, sku, version) = (at("publisher"), at("offer"), at("sku"), at("version"));
    let image = catalogue::image(publisher, offer, sku)
        .filter(|i| version.eq_ignore_ascii_case("latest") || i.versions.contains(&version))
        .ok_or_else(|| catalogue::no_image(publisher, offer, sku, version))?;
    if image.plan && whole.get("plan").is_none() {
        return Err(Refusal::new(
            400,
            "VMMarketplaceInvalidInput",
            format!(
                "Creating a virtual machine from Marketplace image or a custom image sourced from a Marketplace image requires Plan \
                 information in the request. VM: '{}'.",
                text(whole, "/properties/osProfile/computerName").unwrap_or_default()
            ),
        ));
    }
    let bad = |message: String| Err(Refusal::new(400, "BadRequest", message));
    if !size.generations.split(',').any(|g| g == image.generation) {
        return bad(format!(
            "The selected VM size '{}' cannot boot Hypervisor Generation '{}'. If this was a Create operation please check that \
             the Hypervisor Generation of the Image matches the Hypervisor Generation of the selected VM Size.",
            size.name,
            image.generation.trim_start_matches('V')
        ));
    }
    if size.architecture != image.architecture {
        return bad(format!(
            "Cannot create a VM of size '{}' because this VM size only supports a CPU Architecture of '{}', but an image or disk \
             with CPU Architecture '{}' was given.",
            size.name, size.architecture, image.architecture
        ));
    }
    if text(whole, "/properties/securityProfile/securityType") == Some("TrustedLaunch") {
        if !size.trusted_launch {
            return bad(format!(
                "The VM size '{}' is not supported for creation of VMs and Virtual Machine Scale Set with 'TrustedLaunch' security type.",
                size.name
            ));
        }
        if !image.trusted_launch {
            return bad("Use of TrustedLaunch setting is not supported for the provided image. Please select Trusted Launch Supported Gen2 OS Image. For more information, see https://aka.ms/TrustedLaunch-FAQ.".to_owned());
        }
    } else if whole.pointer("/properties/securityProfile/uefiSettings").is_some() {
        return bad("Use of UEFI settings is not supported for the provided security type: UefiSettings can be set with TrustedLaunch or ConfidentialVM alone.".to_owned());
    }
    Ok(image)
}

/// The version that an image reference stands for: the newest one for `latest`.
pub(super) fn exact_version(reference: &Value) -> Option<String> {
    let at = |p: &str| text(reference, p).unwrap_or_default();
    let version = at("/version");
    if !version.eq_ignore_ascii_case("latest") {
        return Some(version.to_owned());
    }
    let image = catalogue::image(at("/publisher"), at("/offer"), at("/sku"))?;
    image.versions.last().map(|v| (*v).to_owned())
}

/// Host name, user, keys and custom data.
pub(super) fn check_os(whole: &Value, old: Option<&Resource>) -> Result<(), Refusal> {
    let Some(os) = whole.pointer("/properties/osProfile") else {
        return match old {
            Some(_) => Ok(()),
            None => Err(parameter(
                "osProfile",
                "Required parameter 'osProfile' is missing (null).",
            )),
        };
    };
    let host = text(os, "/computerName").unwrap_or_default();
    let good = (1..=64).contains(&host.len())
        && host.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '.')
        && !host.starts_with('-')
        && !host.ends_with(['-', '.']);
    if !good {
        return Err(parameter(
            "computerName",
            format!(
                "Linux host name cannot exceed 64 characters in length or contain the following characters: ` ~ ! @ # $ % ^ & * ( ) = + _ [ ] {{ }} \\ | ; : ' \" , < > / ?. It was '{host}'."
            ),
        ));
    }
    let Some(user) = text(os, "/adminUsername") else {
        return Err(parameter(
            "adminUsername",
            "Required parameter 'adminUsername' is missing (null).",
        ));
    };
    if TAKEN_USERS.contains(&user.to_ascii_lowercase().as_str()) {
        return Err(parameter(
            "adminUsername",
            "The Admin Username specified is not allowed.",
        ));
    }
    let keyed = os.pointer("/linuxConfiguration/disablePasswordAuthentication") == Some(&json!(true));
    let keys = os
        .pointer("/linuxConfiguration/ssh/publicKeys")
        .and_then(Value::as_array);
    if keyed && keys.is_none_or(Vec::is_empty) && old.is_none() {
        return Err(parameter(
            "linuxConfiguration.ssh.publicKeys",
            "Authentication using either SSH or by user name and password must be enabled in Linux profile. For more information, \
             see https://aka.ms/linuxvmaccess.",
        ));
    }
    if !keyed && text(os, "/adminPassword").is_none() && old.is_none() {
        return Err(parameter(
            "adminPassword",
            "Required parameter 'adminPassword' is missing (null).",
        ));
    }
    for key in keys.into_iter().flatten() {
        let path = format!("/home/{user}/.ssh/authorized_keys");
        if text(key, "/path") != Some(path.as_str()) {
            return Err(parameter(
                "linuxConfiguration.ssh.publicKeys.path",
                format!(
                    "Destination path for SSH public keys is currently limited to its default value {path} due to a known issue in Linux provisioning agent."
                ),
            ));
        }
        if !ssh_key(text(key, "/keyData").unwrap_or_default()) {
            return Err(parameter(
                "linuxConfiguration.ssh.publicKeys.keyData",
                "The value of parameter linuxConfiguration.ssh.publicKeys.keyData is invalid.",
            ));
        }
    }
    match text(os, "/customData") {
        Some(data) if !STANDARD.decode(data).is_ok_and(|d| d.len() <= CUSTOM_DATA) => Err(parameter(
            "customData",
            "Custom data in OSProfile must be in Base64 encoding and with a maximum length of 87380 characters.",
        )),
        _ => Ok(()),
    }
}

/// Whether this is a public key of a kind that Azure takes.
fn ssh_key(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let (Some(kind @ ("ssh-rsa" | "ssh-ed25519")), Some(data)) = (words.next(), words.next()) else {
        return false;
    };
    // The blob begins with the length of the kind's name, and that name.
    STANDARD.decode(data).is_ok_and(|blob| {
        let name = kind.as_bytes();
        blob.get(..4) == Some(&u32::try_from(name.len()).unwrap_or_default().to_be_bytes())
            && blob.get(4..4 + name.len()) == Some(name)
            && blob.len()
                > if kind == "ssh-rsa" {
                    256
                } else {
                    4 + name.len() + 4 + 31
                }
    })
}

/// Refuses to change what can't be changed on a machine that exists. What is left out stays as it is.
pub(super) fn unchanged(new: &Value, old: &Value) -> Result<(), Refusal> {
    for path in [
        "osProfile.customData",
        "osProfile.adminUsername",
        "osProfile.computerName",
        "osProfile.linuxConfiguration.ssh.publicKeys",
        "imageReference.publisher",
        "imageReference.offer",
        "imageReference.sku",
        "imageReference.version",
    ] {
        let place = if path.starts_with("imageReference") {
            "/properties/storageProfile/"
        } else {
            "/properties/"
        };
        let pointer = format!("{place}{}", path.replace('.', "/"));
        if let Some(after) = new.pointer(&pointer)
            && old.pointer(&pointer) != Some(after)
        {
            return Err(unchangeable(if path.starts_with("imageReference") {
                "imageReference"
            } else {
                path
            }));
        }
    }
    Ok(())
}
