//! What a controller says of its system, read tolerantly, and which of the ways it offers fits what is wanted. Pure.
//!
//! The schema is DMTF's DSP8010 (`ComputerSystem`, `VirtualMedia`); what a controller can do is taken from its
//! `AllowableValues`, as DSP0266 section 7.7 says, and never from its name.

use std::fmt;

use serde::Deserialize;
use serde_json::Value;

/// Whether a system has power.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PowerState {
    /// It has.
    On,
    /// It hasn't.
    Off,
    /// On its way to the one or the other, or what its maker calls it.
    Other(String),
}

impl fmt::Display for PowerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::On => f.write_str("on"),
            Self::Off => f.write_str("off"),
            Self::Other(word) => write!(f, "`{word}`"),
        }
    }
}

/// What to boot from, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootTarget {
    /// The network, by PXE.
    Pxe,
    /// The network, by HTTP.
    UefiHttp,
    /// A CD, which may be virtual.
    Cd,
}

impl BootTarget {
    /// As Redfish spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pxe => "Pxe",
            Self::UefiHttp => "UefiHttp",
            Self::Cd => "Cd",
        }
    }
}

/// A change of power that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// On.
    On,
    /// Off, at once.
    Off,
}

impl Power {
    /// The ways to do it, best first.
    const fn ways(self) -> &'static [&'static str] {
        match self {
            Self::On => &["On", "ForceOn", "PushPowerButton"],
            Self::Off => &["ForceOff", "GracefulShutdown", "PushPowerButton"],
        }
    }

    /// In words.
    pub(super) const fn words(self) -> &'static str {
        match self {
            Self::On => "switch the system on",
            Self::Off => "switch the system off",
        }
    }
}

/// A system as its controller describes it.
#[derive(Clone, Debug)]
pub(super) struct System {
    /// The whole answer.
    value: Value,
    /// What changes of it have to name, where the controller told.
    pub(super) etag: Option<String>,
}

/// A link to another resource.
#[derive(Debug, Deserialize)]
struct Link {
    #[serde(rename = "@odata.id")]
    id: String,
}

/// A resource's links of a collection, and where the rest of it is.
pub(super) fn members(collection: &Value) -> Option<(Vec<String>, Option<String>)> {
    let members: Vec<Link> = serde_json::from_value(collection.get("Members")?.clone()).ok()?;
    let next = collection.get("Members@odata.nextLink").and_then(link);
    Some((members.into_iter().map(|member| member.id).collect(), next))
}

/// A link, which some write as text.
pub(super) fn link(value: &Value) -> Option<String> {
    let text = value.as_str().or_else(|| value.get("@odata.id")?.as_str())?;
    Some(text.to_owned())
}

/// Words of a list.
pub(super) fn words(value: &Value) -> Option<Vec<String>> {
    let list = value.as_array()?;
    Some(list.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect())
}

/// An action: where it's called, and the values allowed for one of its parameters, or where those are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Action {
    pub(super) target: String,
    pub(super) allowed: Option<Vec<String>>,
    pub(super) info: Option<String>,
}

/// The action of a resource by its name, such as `#ComputerSystem.Reset`.
pub(super) fn action(resource: &Value, name: &str, parameter: &str) -> Option<Action> {
    let action = resource.get("Actions")?.get(name)?;
    Some(Action {
        target: action.get("target")?.as_str()?.to_owned(),
        allowed: action
            .get(format!("{parameter}@Redfish.AllowableValues"))
            .and_then(words),
        info: action.get("@Redfish.ActionInfo").and_then(link),
    })
}

/// The values that an `ActionInfo` resource allows for a parameter.
pub(super) fn allowed_by_info(info: &Value, parameter: &str) -> Option<Vec<String>> {
    let parameters = info.get("Parameters")?.as_array()?;
    let found = parameters.iter().find(|p| p["Name"] == parameter)?;
    found.get("AllowableValues").and_then(words)
}

/// The way to change power that the controller offers; one that says nothing of what it offers is taken to offer the best.
pub(super) fn reset_type(power: Power, allowed: Option<&[String]>) -> Option<&'static str> {
    let offered = |way: &&&str| allowed.is_none_or(|allowed| allowed.iter().any(|a| a == **way));
    power.ways().iter().find(offered).copied()
}

impl System {
    pub(super) fn new(value: Value, etag: Option<String>) -> Self {
        let etag = etag.or_else(|| value.get("@odata.etag")?.as_str().map(str::to_owned));
        Self { value, etag }
    }

    pub(super) fn power(&self) -> PowerState {
        match self.value.get("PowerState").and_then(Value::as_str) {
            Some("On") => PowerState::On,
            Some("Off") => PowerState::Off,
            other => PowerState::Other(other.unwrap_or("unknown").to_owned()),
        }
    }

    pub(super) fn reset(&self) -> Option<Action> {
        action(&self.value, "#ComputerSystem.Reset", "ResetType")
    }

    /// The boot targets that can be asked for, where the controller tells.
    pub(super) fn boot_targets(&self) -> Option<Vec<String>> {
        let boot = self.value.get("Boot")?;
        boot.get("BootSourceOverrideTarget@Redfish.AllowableValues")
            .and_then(words)
    }

    /// Whether the next boot is from `target`. Some report `Continuous` for what they were asked to do once.
    pub(super) fn boots_from(&self, target: &str) -> bool {
        let boot = &self.value["Boot"];
        let enabled = boot["BootSourceOverrideEnabled"].as_str();
        boot["BootSourceOverrideTarget"] == target && matches!(enabled, Some("Once" | "Continuous"))
    }

    /// How booting is set, for a person.
    pub(super) fn boot_words(&self) -> String {
        let boot = &self.value["Boot"];
        let word = |key: &str| boot[key].as_str().unwrap_or("unknown").to_owned();
        format!(
            "set to boot from `{}` (`{}`)",
            word("BootSourceOverrideTarget"),
            word("BootSourceOverrideEnabled")
        )
    }

    /// Where changes for the next boot go, if not to the system itself (DSP0266 section 7.10).
    pub(super) fn settings(&self) -> Option<String> {
        self.value
            .get("@Redfish.Settings")?
            .get("SettingsObject")
            .and_then(link)
    }

    /// Collections of virtual media: the system's own and those of its managers.
    pub(super) fn virtual_media(&self) -> Option<String> {
        self.value.get("VirtualMedia").and_then(link)
    }

    pub(super) fn managers(&self) -> Vec<String> {
        let managers = self.value["Links"]["ManagedBy"].as_array();
        managers.into_iter().flatten().filter_map(link).collect()
    }

    /// Whether an inventory's `bmc.system` means this one.
    pub(super) fn is_called(&self, name: &str) -> bool {
        ["Id", "Name", "UUID", "SerialNumber", "HostName"]
            .iter()
            .any(|key| self.value[*key].as_str().is_some_and(|v| v.eq_ignore_ascii_case(name)))
    }

    pub(super) fn id(&self) -> String {
        self.value["Id"].as_str().unwrap_or("unknown").to_owned()
    }
}

/// Whether a virtual medium can be a CD.
pub(super) fn takes_cds(medium: &Value) -> bool {
    let types = medium.get("MediaTypes").and_then(words).unwrap_or_default();
    types.iter().any(|t| t == "CD" || t == "DVD")
}

/// The image in a virtual medium, if there is one.
pub(super) fn image(medium: &Value) -> Option<&str> {
    let inserted = medium["Inserted"].as_bool() != Some(false);
    medium["Image"].as_str().filter(|image| inserted && !image.is_empty())
}

/// What a controller says of an error: its messages in DSP0266's form (section 7.14), else the beginning of what it sent.
pub(super) fn explanation(body: &str) -> String {
    let value: Value = serde_json::from_str(body).unwrap_or_default();
    let error = &value["error"];
    let details = error["@Message.ExtendedInfo"].as_array().into_iter().flatten();
    let mut said: Vec<&str> = details.filter_map(|info| info["Message"].as_str()).collect();
    if said.is_empty() {
        said.extend(error["message"].as_str());
    }
    let text = said.join("; ");
    let text = if text.is_empty() { body.trim() } else { text.trim() };
    let mut short: String = text.chars().filter(|c| !c.is_control()).take(300).collect();
    if short.is_empty() {
        short.push_str("it says nothing more");
    }
    short
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn allowed(words: &[&str]) -> Vec<String> {
        words.iter().map(|w| (*w).to_owned()).collect()
    }

    /// What is asked for, what is offered, and what is chosen.
    type Case = (Power, Option<&'static [&'static str]>, Option<&'static str>);

    #[test]
    fn the_best_way_that_is_offered_is_taken() {
        let cases: &[Case] = &[
            (Power::On, None, Some("On")),
            (Power::On, Some(&["ForceOn", "ForceOff"]), Some("ForceOn")),
            (Power::On, Some(&["PushPowerButton"]), Some("PushPowerButton")),
            (Power::On, Some(&["ForceOff"]), None),
            (Power::Off, Some(&["GracefulShutdown", "ForceOff"]), Some("ForceOff")),
            (Power::Off, Some(&["On", "Nmi"]), None),
        ];
        for (power, offered, expected) in cases {
            let offered = offered.map(allowed);
            assert_eq!(
                reset_type(*power, offered.as_deref()),
                *expected,
                "{power:?} {offered:?}"
            );
        }
    }

    #[test]
    fn systems_are_read_tolerantly() {
        let full = json!({
            "@odata.etag": "W/\"7\"", "Id": "1", "UUID": "ABC", "PowerState": "On",
            "Boot": { "BootSourceOverrideEnabled": "Continuous", "BootSourceOverrideTarget": "Pxe",
                      "BootSourceOverrideTarget@Redfish.AllowableValues": ["None", "Pxe"] },
            "Links": { "ManagedBy": [{ "@odata.id": "/redfish/v1/Managers/1" }] },
            "Actions": { "#ComputerSystem.Reset": { "target": "/x", "@Redfish.ActionInfo": "/info" } },
        });
        let system = System::new(full, None);
        assert_eq!(system.etag.as_deref(), Some("W/\"7\""));
        assert_eq!(system.power(), PowerState::On);
        assert!(system.boots_from("Pxe") && !system.boots_from("Cd"));
        assert!(system.is_called("abc") && !system.is_called("2"));
        assert_eq!(system.managers(), ["/redfish/v1/Managers/1"]);
        let reset = system.reset().unwrap();
        assert_eq!((reset.allowed, reset.info.as_deref()), (None, Some("/info")));

        let bare = System::new(json!({ "PowerState": null }), Some("e".into()));
        assert_eq!(bare.power(), PowerState::Other("unknown".into()));
        assert_eq!(bare.boot_targets(), None);
        assert!(!bare.boots_from("Pxe"));
        assert!(bare.reset().is_none() && bare.managers().is_empty());
    }

    #[test]
    fn values_come_from_action_info_too() {
        let info = json!({ "Parameters": [{ "Name": "ResetType", "AllowableValues": ["On"] }] });
        assert_eq!(allowed_by_info(&info, "ResetType"), Some(allowed(&["On"])));
        assert_eq!(allowed_by_info(&info, "Other"), None);
    }

    #[test]
    fn explanations_are_short_and_always_there() {
        let body = json!({ "error": { "message": "general", "@Message.ExtendedInfo": [
            { "Message": "The property Boot is read only." }, { "MessageId": "x" }] } });
        assert_eq!(explanation(&body.to_string()), "The property Boot is read only.");
        assert_eq!(explanation(r#"{"error":{"message":"general"}}"#), "general");
        assert_eq!(explanation("<html>"), "<html>");
        assert_eq!(explanation(" \n"), "it says nothing more");
        assert_eq!(explanation(&"x".repeat(5000)).len(), 300);
    }

    #[test]
    fn collections_may_have_pages() {
        let page = json!({ "Members": [{ "@odata.id": "/a" }], "Members@odata.nextLink": "/next" });
        assert_eq!(members(&page), Some((vec!["/a".into()], Some("/next".into()))));
        assert_eq!(members(&json!({ "Members": "none" })), None);
    }
}
