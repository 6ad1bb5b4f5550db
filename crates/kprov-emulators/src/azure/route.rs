//! What a request is about, told from its path.

use http::Method;

use super::kind::{COMPUTE_VERSIONS, Kind, RESOURCE_VERSIONS, SKU_VERSIONS};

/// What a path leads to.
#[derive(Clone, Debug)]
pub(super) enum Route {
    /// `/<tenant>/oauth2/v2.0/token`.
    Token(String),
    /// Where managed identities get their tokens.
    ManagedIdentity,
    /// What a machine has printed.
    Console(String),
    Subscription,
    Locations,
    Namespace(String),
    Register(String),
    Groups,
    Group(String),
    /// Resources of all types: of a group, or of all.
    Resources(Option<String>),
    Skus,
    Usages(String),
    ImageVersions {
        location: String,
        publisher: String,
        offer: String,
        sku: String,
    },
    Operation(String),
    OperationResult(String),
    List(&'static Kind, Option<String>),
    One(&'static Kind, String, String),
    Action(&'static Kind, String, String, String),
    Subnets(String, String),
    Subnet(String, String, String),
    Nowhere,
}

/// Tells what a path leads to, and the subscription it names.
pub(super) fn route(path: &str, monitor: bool) -> (Route, Option<String>) {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let lower: Vec<String> = parts.iter().map(|p| p.to_ascii_lowercase()).collect();
    let lower: Vec<&str> = lower.iter().map(String::as_str).collect();
    let own = |index: usize| parts[index].to_owned();
    let (subscription, rest) = match lower.as_slice() {
        [_, "oauth2", "v2.0", "token"] => return (Route::Token(own(0)), None),
        ["msi", "token"] => return (Route::ManagedIdentity, None),
        ["console", _] => return (Route::Console(own(1)), None),
        ["subscriptions", _, rest @ ..] => (own(1), rest),
        _ => return (Route::Nowhere, None),
    };
    let route = match rest {
        [] => Route::Subscription,
        ["locations"] => Route::Locations,
        ["resources"] => Route::Resources(None),
        ["resourcegroups"] => Route::Groups,
        ["resourcegroups", _] => Route::Group(own(3)),
        ["resourcegroups", _, "resources"] => Route::Resources(Some(own(3))),
        ["operationresults", _] => Route::OperationResult(own(3)),
        ["providers", _] => Route::Namespace(own(3)),
        ["providers", _, "register"] => Route::Register(own(3)),
        ["providers", "microsoft.compute", "skus"] => Route::Skus,
        ["providers", "microsoft.compute", "locations", _, "usages"] => Route::Usages(own(5)),
        ["providers", _, "locations", _, "operations", _] if monitor => Route::OperationResult(own(7)),
        ["providers", _, "locations", _, "operations", _] => Route::Operation(own(7)),
        ["providers", _, "locations", _, "operationresults", _] => Route::OperationResult(own(7)),
        [
            "providers",
            "microsoft.compute",
            "locations",
            _,
            "publishers",
            _,
            "artifacttypes",
            "vmimage",
            "offers",
            _,
            "skus",
            _,
            "versions",
        ] => Route::ImageVersions {
            location: own(5),
            publisher: own(7),
            offer: own(11),
            sku: own(13),
        },
        ["providers", namespace, plural] => {
            Kind::find(namespace, plural).map_or(Route::Nowhere, |k| Route::List(k, None))
        }
        ["resourcegroups", _, "providers", namespace, plural, inner @ ..] => {
            let group = own(3);
            match (Kind::find(namespace, plural), inner) {
                (Some(kind), []) => Route::List(kind, Some(group)),
                (Some(kind), [_]) => Route::One(kind, group, own(7)),
                (Some(kind), [_, "subnets"]) if kind.plural == "virtualNetworks" => Route::Subnets(group, own(7)),
                (Some(kind), [_, "subnets", _]) if kind.plural == "virtualNetworks" => {
                    Route::Subnet(group, own(7), own(9))
                }
                (Some(kind), [_, _]) => Route::Action(kind, group, own(7), own(8)),
                _ => Route::Nowhere,
            }
        }
        _ => Route::Nowhere,
    };
    (route, Some(subscription))
}

impl Route {
    /// The call's name, as it's counted: `PUT virtualMachines`, `LIST resources`, `POST virtualMachines/start`.
    pub(super) fn name(&self, method: &Method) -> String {
        let (verb, what) = match self {
            Self::Token(_) | Self::ManagedIdentity => (None, "token".to_owned()),
            Self::Console(_) => (None, "console".to_owned()),
            Self::Subscription => (None, "subscription".to_owned()),
            Self::Locations => (Some("LIST"), "locations".to_owned()),
            Self::Namespace(_) => (None, "providers".to_owned()),
            Self::Register(_) => (None, "providers/register".to_owned()),
            Self::Groups => (Some("LIST"), "resourceGroups".to_owned()),
            Self::Group(_) => (None, "resourceGroups".to_owned()),
            Self::Resources(_) => (Some("LIST"), "resources".to_owned()),
            Self::Skus => (Some("LIST"), "skus".to_owned()),
            Self::Usages(_) => (Some("LIST"), "usages".to_owned()),
            Self::ImageVersions { .. } => (Some("LIST"), "images".to_owned()),
            Self::Operation(_) | Self::OperationResult(_) => (None, "operations".to_owned()),
            Self::List(kind, _) => (Some("LIST"), kind.plural.to_owned()),
            Self::One(kind, ..) => (None, kind.plural.to_owned()),
            Self::Action(kind, _, _, action) => (None, format!("{}/{action}", kind.plural)),
            Self::Subnets(..) => (Some("LIST"), "virtualNetworks/subnets".to_owned()),
            Self::Subnet(..) => (None, "virtualNetworks/subnets".to_owned()),
            Self::Nowhere => (None, "unknown".to_owned()),
        };
        let verb = verb.filter(|_| *method == Method::GET).unwrap_or(method.as_str());
        format!("{verb} {what}")
    }

    /// The name of the thing it's about, where it's about one.
    pub(super) fn subject(&self) -> Option<&str> {
        match self {
            Self::Group(name) | Self::One(_, _, name) | Self::Action(_, _, name, _) | Self::Subnet(_, _, name) => {
                Some(name)
            }
            _ => None,
        }
    }

    /// The permission it needs.
    pub(super) fn action(&self, method: &Method) -> String {
        let verb = match *method {
            Method::GET | Method::HEAD => "read",
            Method::DELETE => "delete",
            Method::POST => "action",
            _ => "write",
        };
        match self {
            Self::Group(_) | Self::Groups => format!("Microsoft.Resources/subscriptions/resourceGroups/{verb}"),
            Self::Resources(_) => "Microsoft.Resources/subscriptions/resources/read".to_owned(),
            Self::Skus => "Microsoft.Compute/skus/read".to_owned(),
            Self::Usages(_) => "Microsoft.Compute/locations/usages/read".to_owned(),
            Self::ImageVersions { .. } => {
                "Microsoft.Compute/locations/publishers/artifacttypes/offers/skus/versions/read".to_owned()
            }
            Self::Operation(_) | Self::OperationResult(_) => "Microsoft.Resources/operations/read".to_owned(),
            Self::List(kind, _) | Self::One(kind, ..) => format!("{}/{verb}", kind.full()),
            Self::Action(kind, _, _, action) => format!("{}/{action}/action", kind.full()),
            Self::Subnets(..) | Self::Subnet(..) => format!("Microsoft.Network/virtualNetworks/subnets/{verb}"),
            Self::Register(namespace) => format!("{namespace}/register/action"),
            _ => format!("Microsoft.Resources/subscriptions/{verb}"),
        }
    }

    /// The api-versions it's served under; none where it has none.
    pub(super) fn versions(&self) -> &'static [&'static str] {
        match self {
            Self::Token(_)
            | Self::ManagedIdentity
            | Self::Console(_)
            | Self::Operation(_)
            | Self::OperationResult(_) => &[],
            Self::Skus => SKU_VERSIONS,
            Self::Usages(_) | Self::ImageVersions { .. } => COMPUTE_VERSIONS,
            Self::List(kind, _) | Self::One(kind, ..) | Self::Action(kind, ..) => kind.versions,
            Self::Subnets(..) | Self::Subnet(..) => Kind::named("virtualNetworks").map_or(&[], |k| k.versions),
            _ => RESOURCE_VERSIONS,
        }
    }

    /// The namespace that the subscription has to be registered for.
    pub(super) fn namespace(&self) -> Option<&'static str> {
        match self {
            Self::List(kind, _) | Self::One(kind, ..) | Self::Action(kind, ..) => Some(kind.namespace),
            Self::Skus | Self::Usages(_) | Self::ImageVersions { .. } => Some("Microsoft.Compute"),
            Self::Subnets(..) | Self::Subnet(..) => Some("Microsoft.Network"),
            _ => None,
        }
    }
}
