//! Hosts by their management controller (BMC), over Redfish (DMTF DSP0266): power, what to boot from once, virtual media.
//!
//! Vendors differ, so that nothing is taken for done because a controller said so: what it can do is read from what it
//! offers, and every change is read back until it is there or a deadline has passed. Credentials are
//! read from where the inventory says when a controller is opened, kept nowhere else and never printed.

mod access;
mod error;
mod http;
mod model;

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::Instant;

use self::http::Http;
use self::model::{System, action, allowed_by_info, image, link, members, reset_type, takes_cds};
use crate::inventory::Bmc as Entry;

pub use access::Login;
pub use error::BmcError;
pub use model::{BootTarget, Power, PowerState};

/// Where Redfish begins.
const ROOT: &str = "/redfish/v1/";

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// One request.
    pub request: Duration,
    /// A controller that gives no answer.
    pub silence: Duration,
    /// From a change that was accepted until it can be read back.
    pub change: Duration,
    /// How often to look meanwhile.
    pub look: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            request: Duration::from_secs(20),
            silence: Duration::from_mins(1),
            change: Duration::from_mins(2),
            look: Duration::from_secs(1),
        }
    }
}

/// A management controller and the one system of it that an inventory means.
#[derive(Clone, Debug)]
pub struct Bmc {
    http: Http,
    system: String,
    limits: Limits,
}

impl Bmc {
    /// Reads the credentials and finds the system.
    pub async fn open(entry: &Entry, limits: Limits) -> Result<Self, BmcError> {
        let login = access::login(entry, |name| std::env::var(name).ok())?;
        Self::open_with(entry, login, limits).await
    }

    /// The same with credentials at hand.
    pub async fn open_with(entry: &Entry, login: Login, limits: Limits) -> Result<Self, BmcError> {
        let base = entry.address.trim_end_matches('/');
        let base = base.strip_suffix("/redfish/v1").unwrap_or(base);
        let base = if base.contains("://") {
            base.to_owned()
        } else {
            format!("https://{base}")
        };
        let http = Http {
            client: access::client(entry, limits.request)?,
            base,
            login,
            patience: limits.silence,
        };
        let system = find_system(&http, entry.system.as_deref()).await?;
        Ok(Self { http, system, limits })
    }

    /// The controller's URL.
    pub fn address(&self) -> &str {
        &self.http.base
    }

    /// Whether the system has power.
    pub async fn power(&self) -> Result<PowerState, BmcError> {
        Ok(self.read().await?.power())
    }

    /// Ensures that it has power.
    pub async fn power_on(&self) -> Result<(), BmcError> {
        self.change_power(Power::On, &PowerState::On).await
    }

    /// Ensures that it has none, at once.
    pub async fn power_off(&self) -> Result<(), BmcError> {
        self.change_power(Power::Off, &PowerState::Off).await
    }

    /// Has it start anew, whatever it does now.
    pub async fn restart(&self) -> Result<(), BmcError> {
        // Off is something that can be read back; whether a system was restarted isn't.
        self.power_off().await?;
        self.power_on().await
    }

    async fn read(&self) -> Result<System, BmcError> {
        let answer = self.http.get(&self.system).await?;
        Ok(System::new(answer.value, answer.etag))
    }

    fn unsupported(&self, what: impl Into<String>, offered: Vec<String>) -> BmcError {
        BmcError::Unsupported {
            bmc: self.http.base.clone(),
            what: what.into(),
            offered,
        }
    }

    /// Asks until it is so; again after half of the time, as some controllers forget what they are asked while they are busy.
    async fn change_power(&self, power: Power, wanted: &PowerState) -> Result<(), BmcError> {
        let start = Instant::now();
        let mut asked = 0_u32;
        let mut last_error = None;
        loop {
            let system = self.read().await?;
            let state = system.power();
            if state == *wanted {
                return Ok(());
            }
            let elapsed = start.elapsed();
            if elapsed >= self.limits.change {
                return Err(last_error
                    .unwrap_or_else(|| BmcError::ignored(&self.http.base, power.words(), asked, elapsed, &state)));
            }
            if asked == 0 || (asked == 1 && elapsed >= self.limits.change / 2) {
                let reset = system
                    .reset()
                    .ok_or_else(|| self.unsupported(power.words(), Vec::new()))?;
                let allowed = match (&reset.allowed, &reset.info) {
                    (Some(allowed), _) => Some(allowed.clone()),
                    (None, Some(info)) => allowed_by_info(&self.http.get(info).await?.value, "ResetType"),
                    (None, None) => None,
                };
                let way = reset_type(power, allowed.as_deref())
                    .ok_or_else(|| self.unsupported(power.words(), allowed.unwrap_or_default()))?;
                asked += 1;
                let body = json!({ "ResetType": way });
                let done = self
                    .http
                    .change(Method::POST, &reset.target, &body, None, power.words());
                last_error = match done.await {
                    Ok(()) => None,
                    // It may have taken effect all the same: looked at, and asked again later.
                    Err(error) if error.is_passing() => Some(error),
                    Err(error) => return Err(error),
                };
            }
            tokio::time::sleep(self.limits.look).await;
        }
    }

    /// Sets what it boots from the next time.
    pub async fn boot_once(&self, target: BootTarget) -> Result<(), BmcError> {
        let word = target.as_str();
        let what = format!("boot from `{word}` once");
        let system = self.read().await?;
        if let Some(targets) = system.boot_targets()
            && !targets.iter().any(|t| t == word)
        {
            return Err(self.unsupported(what, targets));
        }
        self.set_boot(
            system,
            json!({ "BootSourceOverrideTarget": word, "BootSourceOverrideEnabled": "Once" }),
            &what,
            |s| s.boots_from(word),
        )
        .await
    }

    /// Sets that it boots from its disk again, for controllers that take `Once` for always.
    pub async fn boot_as_before(&self) -> Result<(), BmcError> {
        let system = self.read().await?;
        let network = |s: &System| {
            [BootTarget::Pxe, BootTarget::UefiHttp, BootTarget::Cd]
                .iter()
                .any(|t| s.boots_from(t.as_str()))
        };
        if !network(&system) {
            return Ok(());
        }
        let offered = system.boot_targets().unwrap_or_default();
        // Some offer no "None", and keep the override.
        let boot = if offered.iter().any(|t| t == "None") || !offered.iter().any(|t| t == "Hdd") {
            json!({ "BootSourceOverrideTarget": "None", "BootSourceOverrideEnabled": "Disabled" })
        } else {
            json!({ "BootSourceOverrideTarget": "Hdd", "BootSourceOverrideEnabled": "Continuous" })
        };
        self.set_boot(system, boot, "boot from its disk again", |s| !network(s))
            .await
    }

    async fn set_boot(
        &self,
        mut system: System,
        boot: Value,
        what: &str,
        done: impl Fn(&System) -> bool,
    ) -> Result<(), BmcError> {
        let start = Instant::now();
        let body = json!({ "Boot": boot });
        let mut asked = 0_u32;
        let mut path = self.system.clone();
        while !done(&system) || asked == 0 {
            let waited = start.elapsed();
            if waited >= self.limits.change {
                return Err(BmcError::Ignored {
                    bmc: self.http.base.clone(),
                    what: what.to_owned(),
                    asked,
                    waited,
                    state: system.boot_words(),
                });
            }
            if asked == 0 || (asked == 1 && waited >= self.limits.change / 2) {
                let etag = system.etag.as_deref().filter(|_| path == self.system);
                match self.http.change(Method::PATCH, &path, &body, etag, what).await {
                    Ok(()) => asked += 1,
                    // Somebody else changed it meanwhile, or an ETag is wanted and has just been read anew.
                    Err(BmcError::Refused { status: 412 | 428, .. }) => {}
                    // Some take changes for the next boot elsewhere.
                    Err(error @ BmcError::Refused { status: 405, .. }) => match system.settings() {
                        Some(settings) if settings != path => path = settings,
                        _ => return Err(error),
                    },
                    Err(error) if error.is_passing() => asked += 1,
                    Err(error) => return Err(error),
                }
            }
            system = self.read().await?;
            if !done(&system) {
                tokio::time::sleep(self.limits.look).await;
            }
        }
        Ok(())
    }

    /// The virtual CD drives: of the system, else of its managers.
    async fn drive(&self) -> Result<String, BmcError> {
        let system = self.read().await?;
        let mut collections: Vec<String> = system.virtual_media().into_iter().collect();
        for manager in system.managers() {
            let answer = self.http.get(&manager).await?;
            collections.extend(answer.value.get("VirtualMedia").and_then(link));
        }
        let mut seen = Vec::new();
        for collection in collections {
            for path in all_members(&self.http, &collection).await? {
                let medium = self.http.get(&path).await?.value;
                if takes_cds(&medium) {
                    return Ok(path);
                }
                seen.push(path);
            }
        }
        Err(self.unsupported("insert a virtual CD", seen))
    }

    /// Ensures that this image is in the virtual CD drive. The controller itself fetches it from the URL.
    pub async fn insert_media(&self, url: &str) -> Result<(), BmcError> {
        let what = "insert a virtual CD";
        let path = self.drive().await?;
        let medium = self.http.get(&path).await?;
        match image(&medium.value) {
            Some(now) if now == url => return Ok(()),
            Some(_) => self.eject_media().await?,
            None => {}
        }
        let full = json!({ "Image": url, "Inserted": true, "WriteProtected": true });
        let bare = json!({ "Image": url });
        let (method, target, etag) = match action(&medium.value, "#VirtualMedia.InsertMedia", "Image") {
            Some(action) => (Method::POST, action.target, None),
            // Before VirtualMedia 1.3 an image was inserted by changing the resource.
            None => (Method::PATCH, path.clone(), medium.etag.as_deref()),
        };
        let done = self.http.change(method.clone(), &target, &full, etag, what).await;
        match done {
            Err(BmcError::Refused { status: 400, .. }) => {
                self.http.change(method, &target, &bare, etag, what).await?;
            }
            Err(error) if !error.is_passing() => return Err(error),
            // Not known: looked at.
            _ => {}
        }
        self.until_media(&path, what, |now| now.is_some()).await
    }

    /// Ensures that nothing is in the virtual CD drive.
    pub async fn eject_media(&self) -> Result<(), BmcError> {
        let what = "eject the virtual CD";
        let path = self.drive().await?;
        let medium = self.http.get(&path).await?;
        if image(&medium.value).is_none() {
            return Ok(());
        }
        let done = if let Some(action) = action(&medium.value, "#VirtualMedia.EjectMedia", "Image") {
            self.http
                .change(Method::POST, &action.target, &json!({}), None, what)
                .await
        } else {
            let body = json!({ "Image": null, "Inserted": false });
            self.http
                .change(Method::PATCH, &path, &body, medium.etag.as_deref(), what)
                .await
        };
        match done {
            Err(error) if !error.is_passing() => Err(error),
            _ => self.until_media(&path, what, |now| now.is_none()).await,
        }
    }

    async fn until_media(&self, path: &str, what: &str, wanted: impl Fn(Option<&str>) -> bool) -> Result<(), BmcError> {
        let start = Instant::now();
        loop {
            let medium = self.http.get(path).await?.value;
            if wanted(image(&medium)) {
                return Ok(());
            }
            if start.elapsed() >= self.limits.change {
                return Err(BmcError::Ignored {
                    bmc: self.http.base.clone(),
                    what: what.to_owned(),
                    asked: 1,
                    waited: start.elapsed(),
                    state: image(&medium).map_or("empty".into(), |image| format!("holding `{image}`")),
                });
            }
            tokio::time::sleep(self.limits.look).await;
        }
    }
}

/// All members of a collection, whatever pages it has.
async fn all_members(http: &Http, path: &str) -> Result<Vec<String>, BmcError> {
    let mut found = Vec::new();
    let mut next = Some(path.to_owned());
    let mut pages = 0;
    while let Some(page) = next.take().filter(|_| pages < 100) {
        let answer = http.get(&page).await?;
        let (some, more) = members(&answer.value).ok_or_else(|| BmcError::NotRedfish {
            bmc: http.base.clone(),
            path: page.clone(),
            why: "it has no `Members`".into(),
        })?;
        found.extend(some);
        next = more;
        pages += 1;
    }
    Ok(found)
}

async fn find_system(http: &Http, name: Option<&str>) -> Result<String, BmcError> {
    let root = match http.get(ROOT).await {
        Err(BmcError::Refused { status, .. }) => {
            return Err(BmcError::NotRedfish {
                bmc: http.base.clone(),
                path: ROOT.into(),
                why: format!("HTTP {status}"),
            });
        }
        other => other?,
    };
    let systems = root.value.get("Systems").and_then(link);
    let systems = systems.ok_or_else(|| BmcError::NotRedfish {
        bmc: http.base.clone(),
        path: ROOT.into(),
        why: "it names no `Systems`".into(),
    })?;
    let all = all_members(http, &systems).await?;
    let last = |path: &String| path.trim_end_matches('/').rsplit('/').next().map(str::to_owned);
    match (name, &all[..]) {
        (None, [one]) => return Ok(one.clone()),
        (Some(name), _) => {
            if let Some(found) = all.iter().find(|path| last(path).as_deref() == Some(name)) {
                return Ok(found.clone());
            }
            for path in &all {
                let system = System::new(http.get(path).await?.value, None);
                if system.is_called(name) || system.id() == name {
                    return Ok(path.clone());
                }
            }
        }
        (None, _) => {}
    }
    Err(BmcError::System {
        bmc: http.base.clone(),
        found: all.iter().filter_map(last).collect(),
    })
}
