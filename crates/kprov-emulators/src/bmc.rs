//! A management controller that speaks Redfish (DMTF DSP0266) for one system, whose power is whatever its owner makes of it; and that
//! misbehaves on request, in the ways that real ones do and sushy-tools does not.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::record::Record;

/// The system's path.
pub const SYSTEM: &str = "/redfish/v1/Systems/1";
const DRIVE: &str = "/redfish/v1/Managers/bmc/VirtualMedia/1";
/// Who may.
pub const USER: &str = "admin";
/// With which password.
pub const PASSWORD: &str = "pass:word";

/// How it behaves.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fault of its own")]
pub struct Manners {
    /// Answers nothing at all.
    pub silent: bool,
    /// Answers so many requests with 503 first.
    pub busy: u32,
    /// Accepts so many power actions without doing them.
    pub ignores: u32,
    /// Does a power action, and never answers it.
    pub loses_replies: bool,
    /// The reset types offered; `None` says nothing of them.
    pub resets: Option<Vec<&'static str>>,
    /// Offers them by an `ActionInfo` resource rather than in the system.
    pub by_info: bool,
    /// The boot targets offered; a target that isn't offered is accepted all the same, and nothing comes of it.
    pub targets: Vec<&'static str>,
    /// Wants `If-Match` with the current `ETag` for each change.
    pub wants_etag: bool,
    /// Takes boot settings at `@Redfish.Settings` only.
    pub settings_apart: bool,
    /// Reports `Continuous` for what was to be done once.
    pub continuous: bool,
    /// Refuses members of `InsertMedia` other than `Image`.
    pub plain_media: bool,
    /// Offers no actions for virtual media: the resource itself is changed.
    pub old_media: bool,
    /// Accepts what to boot from, and forgets it.
    pub forgets_boot: bool,
    /// How many systems it lists.
    pub systems: u32,
}

impl Default for Manners {
    fn default() -> Self {
        Self {
            silent: false,
            busy: 0,
            ignores: 0,
            loses_replies: false,
            resets: Some(vec!["On", "ForceOff", "GracefulShutdown"]),
            by_info: false,
            targets: vec!["None", "Pxe", "Cd", "Hdd"],
            wants_etag: false,
            settings_apart: false,
            continuous: false,
            plain_media: false,
            old_media: false,
            forgets_boot: false,
            systems: 1,
        }
    }
}

/// What a system boots from.
#[derive(Clone, Copy, Debug)]
pub struct Boot<'a> {
    /// The boot target, such as `Pxe`.
    pub target: &'a str,
    /// The URL of what is in its virtual drive.
    pub image: Option<&'a str>,
}

/// Called with what the system boots from when it gets power, and with nothing when it loses it.
pub type PowerHook = Box<dyn FnMut(Option<Boot<'_>>) + Send>;

struct Machine {
    manners: Manners,
    on: bool,
    /// What to boot from once; `None` is the disk.
    boot: Option<String>,
    image: Option<String>,
    version: u32,
    hook: PowerHook,
}

struct Shared {
    machine: Mutex<Machine>,
    record: Record,
}

impl Shared {
    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running controller. Dropping it ends it; the system stays as it is.
pub struct StandIn {
    /// Where it is.
    pub address: SocketAddr,
    /// What it was asked.
    pub record: Record,
    shared: Arc<Shared>,
    serving: JoinHandle<()>,
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl StandIn {
    /// Starts on a free port of loopback.
    pub async fn start(manners: Manners, hook: PowerHook) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let record = Record::default();
        let shared = Arc::new(Shared {
            machine: Mutex::new(Machine {
                manners,
                on: false,
                boot: None,
                image: None,
                version: 1,
                hook,
            }),
            record: record.clone(),
        });
        let router = Router::new().fallback(answer).with_state(shared.clone());
        let serving = tokio::spawn(async move {
            // Ends with the test.
            let _ = axum::serve(listener, router).await;
        });
        Ok(Self {
            address,
            record,
            shared,
            serving,
        })
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Behaves differently from now on.
    pub fn behave(&self, change: impl FnOnce(&mut Manners)) {
        change(&mut self.shared.machine().manners);
    }

    /// Whether the system has power.
    pub fn is_on(&self) -> bool {
        self.shared.machine().on
    }

    /// What it boots from the next time, if not from its disk.
    pub fn boots_from(&self) -> Option<String> {
        self.shared.machine().boot.clone()
    }

    /// What is in its virtual drive.
    pub fn image(&self) -> Option<String> {
        self.shared.machine().image.clone()
    }
}

fn may(headers: &HeaderMap) -> bool {
    let wanted = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
    headers.get("authorization").and_then(|v| v.to_str().ok()) == Some(&format!("Basic {wanted}"))
}

fn refuse(status: StatusCode, message: &str) -> Response {
    let error = json!({ "error": { "code": "Base.1.0.GeneralError", "message": "A general error has occurred.",
        "@Message.ExtendedInfo": [{ "MessageId": "Base.1.0.GeneralError", "Message": message }] } });
    (status, axum::Json(error)).into_response()
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let Ok(body) = axum::body::to_bytes(body, 1 << 20).await else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    let path = parts.uri.path().to_owned();
    shared.record.count(&format!("{} {path}", parts.method));
    let silent = {
        let mut machine = shared.machine();
        if machine.manners.busy > 0 {
            machine.manners.busy -= 1;
            return refuse(StatusCode::SERVICE_UNAVAILABLE, "The service is starting.");
        }
        machine.manners.silent
    };
    if silent {
        tokio::time::sleep(Duration::from_hours(1)).await;
    }
    // The root tells what there is to everybody (DSP0266 section 9.1).
    if path != "/redfish/v1/" && !may(&parts.headers) {
        return refuse(StatusCode::UNAUTHORIZED, "Who are you?");
    }
    let (response, lost) = {
        let mut machine = shared.machine();
        let response = if parts.method == Method::GET {
            machine.read(&path)
        } else {
            machine.change(&parts.method, &path, &parts.headers, &body)
        };
        (response, parts.method == Method::POST && machine.manners.loses_replies)
    };
    if lost {
        tokio::time::sleep(Duration::from_hours(1)).await;
    }
    response
}

impl Machine {
    fn etag(&self) -> String {
        format!("W/\"{}\"", self.version)
    }

    fn read(&self, path: &str) -> Response {
        let link = |path: &str| json!({ "@odata.id": path });
        let value = match path {
            "/redfish/v1/" => json!({ "RedfishVersion": "1.6.0", "Systems": link("/redfish/v1/Systems") }),
            // In pages of one.
            "/redfish/v1/Systems" | "/redfish/v1/Systems/page2" => {
                let second = path.ends_with("page2");
                let more = !second && self.manners.systems > 1;
                let mut page = json!({ "Members": [link(if second { "/redfish/v1/Systems/2" } else { SYSTEM })] });
                if self.manners.systems == 0 {
                    page["Members"] = json!([]);
                }
                if more {
                    page["Members@odata.nextLink"] = "/redfish/v1/Systems/page2".into();
                }
                page
            }
            SYSTEM => self.system(),
            "/redfish/v1/Systems/2" => json!({ "Id": "2", "SerialNumber": "S2", "PowerState": "Off" }),
            "/redfish/v1/reset-info" => json!({ "Parameters": [
                { "Name": "ResetType", "AllowableValues": self.manners.resets }] }),
            "/redfish/v1/Managers/bmc" => json!({ "VirtualMedia": link("/redfish/v1/Managers/bmc/VirtualMedia") }),
            "/redfish/v1/Managers/bmc/VirtualMedia" => {
                json!({ "Members": [link("/redfish/v1/Managers/bmc/VirtualMedia/0"), link(DRIVE)] })
            }
            "/redfish/v1/Managers/bmc/VirtualMedia/0" => json!({ "MediaTypes": ["Floppy", "USBStick"] }),
            DRIVE => {
                let mut drive =
                    json!({ "MediaTypes": ["CD", "DVD"], "Image": self.image, "Inserted": self.image.is_some() });
                if !self.manners.old_media {
                    drive["Actions"] = json!({
                        "#VirtualMedia.InsertMedia": { "target": format!("{DRIVE}/insert") },
                        "#VirtualMedia.EjectMedia": { "target": format!("{DRIVE}/eject") } });
                }
                drive
            }
            _ => return refuse(StatusCode::NOT_FOUND, "There is no such resource."),
        };
        let mut response = axum::Json(value).into_response();
        if let Ok(etag) = self.etag().parse() {
            response.headers_mut().insert("etag", etag);
        }
        response
    }

    fn system(&self) -> Value {
        let (enabled, target) = match &self.boot {
            Some(target) if self.manners.continuous => ("Continuous", target.as_str()),
            Some(target) => ("Once", target.as_str()),
            None => ("Disabled", "None"),
        };
        let mut reset = json!({ "target": format!("{SYSTEM}/reset") });
        match &self.manners.resets {
            Some(_) if self.manners.by_info => reset["@Redfish.ActionInfo"] = "/redfish/v1/reset-info".into(),
            Some(resets) => reset["ResetType@Redfish.AllowableValues"] = json!(resets),
            None => {}
        }
        json!({
            "Id": "1", "UUID": "5a0e0000-0000-0000-0000-000000000001",
            "PowerState": if self.on { "On" } else { "Off" },
            "Boot": { "BootSourceOverrideEnabled": enabled, "BootSourceOverrideTarget": target,
                      "BootSourceOverrideTarget@Redfish.AllowableValues": self.manners.targets },
            "Links": { "ManagedBy": [{ "@odata.id": "/redfish/v1/Managers/bmc" }] },
            "@Redfish.Settings": { "SettingsObject": { "@odata.id": format!("{SYSTEM}/settings") } },
            "Actions": { "#ComputerSystem.Reset": reset },
        })
    }

    fn change(&mut self, method: &Method, path: &str, headers: &HeaderMap, body: &Bytes) -> Response {
        let value: Value = serde_json::from_slice(body).unwrap_or_default();
        let done = || StatusCode::NO_CONTENT.into_response();
        let insert = format!("{DRIVE}/insert");
        let settings = format!("{SYSTEM}/settings");
        match (method.as_str(), path) {
            ("POST", "/redfish/v1/Systems/1/reset") => {
                let word = value["ResetType"].as_str().unwrap_or_default();
                if self.manners.resets.as_ref().is_some_and(|r| !r.contains(&word)) {
                    return refuse(
                        StatusCode::BAD_REQUEST,
                        &format!("The value {word} is not in the list."),
                    );
                }
                if self.manners.ignores > 0 {
                    self.manners.ignores -= 1;
                    return done();
                }
                self.set_power(match word {
                    "PushPowerButton" => !self.on,
                    word => word.contains("On"),
                });
                done()
            }
            ("PATCH", path) if path == SYSTEM || path == settings => {
                if self.manners.settings_apart && path == SYSTEM {
                    return refuse(StatusCode::METHOD_NOT_ALLOWED, "It is read only.");
                }
                let matches = headers.get("if-match").and_then(|v| v.to_str().ok()) == Some(&self.etag());
                if self.manners.wants_etag && path == SYSTEM && !matches {
                    return refuse(StatusCode::PRECONDITION_REQUIRED, "An ETag is wanted.");
                }
                let boot = &value["Boot"];
                let target = boot["BootSourceOverrideTarget"].as_str().unwrap_or("None");
                self.version += 1;
                if self.manners.targets.contains(&target) && !self.manners.forgets_boot {
                    let kept = target != "None" && target != "Hdd" && boot["BootSourceOverrideEnabled"] != "Disabled";
                    self.boot = kept.then(|| target.to_owned());
                }
                done()
            }
            ("POST", path) if path == insert => {
                let members = value.as_object().map_or(0, serde_json::Map::len);
                if self.manners.plain_media && members > 1 {
                    return refuse(StatusCode::BAD_REQUEST, "The parameter Inserted is not supported.");
                }
                self.image = value["Image"].as_str().map(str::to_owned);
                done()
            }
            ("POST", path) if path == format!("{DRIVE}/eject") => {
                self.image = None;
                done()
            }
            ("PATCH", DRIVE) if self.manners.old_media => {
                self.image = value["Image"].as_str().map(str::to_owned);
                done()
            }
            _ => refuse(StatusCode::METHOD_NOT_ALLOWED, "That cannot be done here."),
        }
    }

    fn set_power(&mut self, on: bool) {
        if on == self.on {
            return;
        }
        self.on = on;
        self.version += 1;
        if on {
            let target = if self.manners.continuous {
                self.boot.clone()
            } else {
                self.boot.take()
            };
            (self.hook)(Some(Boot {
                target: target.as_deref().unwrap_or("Hdd"),
                image: self.image.as_deref(),
            }));
        } else {
            (self.hook)(None);
        }
    }
}
