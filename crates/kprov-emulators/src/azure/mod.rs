//! Azure Resource Manager, for the resource types that kprov uses: small, strict, stateful, on loopback.
//!
//! It refuses what Azure refuses and in the same words where they are known: unknown fields, other api-versions, missing
//! dependencies, deletion while in use, bad names, what can't be changed. Long-running operations take their time, lists come in
//! pages, tokens are asked for. What a test wants to go wrong goes wrong ([`Fault`], [`Arm::deny`], [`Arm::restrict_size`], ...).
//! Nothing runs here: a machine room follows [`Arm::virtual_machines`], [`Arm::load_balancers`] and [`Arm::events`] and makes
//! machines that do.
//!
//! Start reading at [`Arm`]; requests go through `server`, `route` and `handle`.

mod addresses;
mod catalogue;
mod compute;
mod faults;
mod groups;
mod handle;
mod kind;
mod list;
mod machine;
mod models;
mod network;
mod operations;
mod place;
mod refusal;
mod render;
mod room;
mod route;
mod rules;
mod server;
mod shapes;
mod store;
mod strict;
#[cfg(test)]
mod tests;
mod token;

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::broadcast;
use tokio::task::JoinHandle;

pub use faults::{Fault, What};
pub use models::{VARIABLE as MODELS_VARIABLE, Verdict, held_against_models};
pub use refusal::Refusal;
pub use room::{Backend, DataDisk, Event, LoadBalancer, Power, Probe, Rule, VirtualMachine};
pub use server::Recorded;

use crate::record::Record;
use server::{Denied, Shared};
use store::{Resource, Store};
use token::Tokens;

/// How the server behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// The subscription's id.
    pub subscription: String,
    /// The tenant's id.
    pub tenant: String,
    /// Other tenants, whose tokens the subscription doesn't take.
    pub other_tenants: Vec<String>,
    /// The only application that gets tokens, in any tenant.
    pub client_id: String,
    /// Its secret.
    pub client_secret: String,
    /// SHA-256 of its certificates, as `x5t#S256` of a JSON web token has it.
    pub client_certificates: Vec<String>,
    /// How long every operation takes.
    pub settle: Duration,
    /// What `Retry-After` says while an operation is under way, in seconds.
    pub retry_after: u32,
    /// How many things are on a page of a list.
    pub page: usize,
    /// How long it takes until something just made is in lists; a GET finds it at once.
    pub list_lag: Duration,
    /// Public addresses to give out, in this order; 203.0.113.1 and on when they are used up.
    pub public_addresses: Vec<Ipv4Addr>,
    /// The public address of a machine's interface reads as its private address: what a machine room without translation needs.
    pub public_is_private: bool,
    /// Resource ids of the user-assigned identities there are.
    pub identities: Vec<String>,
    /// How many requests there may be; any number where left out.
    pub rate: Option<Rate>,
}

/// A bucket of requests.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// How many at once.
    pub burst: f64,
    /// How many a second after that.
    pub per_second: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            subscription: "11111111-2222-4333-8444-555555555555".to_owned(),
            tenant: "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee".to_owned(),
            other_tenants: Vec::new(),
            client_id: "99999999-8888-4777-8666-555555555555".to_owned(),
            client_secret: "emulated-secret".to_owned(),
            client_certificates: Vec::new(),
            settle: Duration::from_millis(30),
            retry_after: 0,
            page: 5,
            list_lag: Duration::ZERO,
            public_addresses: Vec::new(),
            public_is_private: false,
            identities: Vec::new(),
            rate: None,
        }
    }
}

/// A running server; it stops when this is dropped.
#[derive(Debug)]
pub struct Arm {
    /// The calls it got.
    pub record: Record,
    endpoint: String,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Drop for Arm {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Arm {
    /// Starts a server on a free port of loopback.
    pub async fn start(options: Options) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        let record = Record::default();
        let tokens = Tokens::new(&options);
        let store = Store::new(options, endpoint.clone());
        let shared = Arc::new(Shared::new(store, tokens, record.clone()));
        let task = tokio::spawn(server::serve(listener, Arc::clone(&shared)));
        Ok(Self {
            record,
            endpoint,
            shared,
            task,
        })
    }

    /// Its address: `http://127.0.0.1:<port>`, without a slash at the end.
    pub fn endpoint(&self) -> String {
        self.endpoint.clone()
    }

    /// The subscription's id.
    pub fn subscription(&self) -> String {
        self.shared.store().options.subscription.clone()
    }

    /// Changes how it behaves from now on.
    pub fn configure(&self, change: impl FnOnce(&mut Options)) {
        change(&mut self.shared.store().options);
    }

    /// A bearer token that's good for an hour.
    pub fn token(&self) -> String {
        self.shared.tokens().own()
    }

    /// A bearer token that was good until a minute ago.
    pub fn expired_token(&self) -> String {
        let tenant = self.shared.store().options.tenant.clone();
        self.shared.tokens().issue(&tenant, -60)
    }

    /// A bearer token of another tenant.
    pub fn token_of(&self, tenant: &str) -> String {
        self.shared.tokens().issue(tenant, 3_600)
    }

    /// Variables by which credentials of managed identities find this server: `IDENTITY_ENDPOINT` and `IDENTITY_HEADER`, as App
    /// Service sets them. (Credentials by secret or workload identity want `https` for `AZURE_AUTHORITY_HOST`: something that ends
    /// TLS before `/<tenant>/oauth2/v2.0/token` here.)
    pub fn identity_variables(&self) -> [(&'static str, String); 2] {
        [
            ("IDENTITY_ENDPOINT", format!("{}/msi/token", self.endpoint)),
            ("IDENTITY_HEADER", self.shared.tokens().identity_header().to_owned()),
        ]
    }

    /// The token of a service account, as workload identity finds it in a file: that of the one which is trusted, or of another
    /// subject; good for so many seconds, which may be less than none.
    pub fn assertion(&self, subject: Option<&str>, life: i64) -> String {
        token::assertion(subject, life)
    }

    /// Lets something go wrong. Faults are tried in the order they were added; of those that match one call, all count it.
    pub fn fault(&self, fault: Fault) {
        self.shared.faults().add(fault);
    }

    /// Nothing goes wrong any more.
    pub fn clear_faults(&self) {
        self.shared.faults().clear();
    }

    /// How many calls wait for an answer that never comes: what a test waits for before it kills the caller.
    pub fn hanging(&self) -> usize {
        self.shared.hanging.load(Ordering::SeqCst)
    }

    /// Takes a permission away: an action such as `Microsoft.Network/loadBalancers/write` below a scope (`/` for everywhere).
    /// `.../join/action` of what is referred to is asked for as well, as in Azure.
    pub fn deny(&self, action: &str, scope: &str) {
        self.shared.denied().push(Denied {
            action: action.to_owned(),
            scope: scope.to_owned(),
        });
    }

    /// Gives all permissions back.
    pub fn permit_all(&self) {
        self.shared.denied().clear();
    }

    /// A size can't be had any more: in one zone, or nowhere.
    pub fn restrict_size(&self, size: &str, zone: Option<&str>) {
        let restriction = (size.to_ascii_lowercase(), zone.map(str::to_owned));
        self.shared.store().catalogue.restricted.insert(restriction);
    }

    /// All sizes can be had again.
    pub fn unrestrict(&self) {
        self.shared.store().catalogue.restricted.clear();
    }

    /// How many cores there may be of a family (`standardDSv5Family`), or of all together (`cores`).
    pub fn set_quota(&self, family: &str, limit: u64) {
        self.shared
            .store()
            .catalogue
            .limits
            .insert(family.to_ascii_lowercase(), limit);
    }

    /// How many public addresses there may be.
    pub fn limit_public_addresses(&self, limit: Option<usize>) {
        self.shared.store().catalogue.addresses = limit;
    }

    /// The subscription isn't registered for a namespace, until somebody registers it.
    pub fn unregister(&self, namespace: &str) {
        self.shared
            .store()
            .catalogue
            .unregistered
            .insert(namespace.to_ascii_lowercase());
    }

    /// Bodies of all PUT and PATCH requests, as they came.
    pub fn bodies(&self) -> Vec<Recorded> {
        self.shared.bodies().clone()
    }

    /// The ids of all resource groups and resources.
    pub fn resources(&self) -> Vec<String> {
        let store = self.shared.store();
        let groups = store
            .groups
            .values()
            .map(|g| format!("{}/resourceGroups/{}", store.scope(), g.name));
        groups.chain(store.resources.values().map(|r| r.id.clone())).collect()
    }

    /// All machines.
    pub fn virtual_machines(&self) -> Vec<VirtualMachine> {
        let store = self.shared.store();
        store
            .of_kind("virtualMachines")
            .filter_map(|m| store.virtual_machine(&m.id))
            .collect()
    }

    /// The `uniqueId`s of all disks.
    pub fn disks(&self) -> BTreeSet<String> {
        let store = self.shared.store();
        store.of_kind("disks").map(Resource::unique_id).collect()
    }

    /// All load balancers.
    pub fn load_balancers(&self) -> Vec<LoadBalancer> {
        let store = self.shared.store();
        store.of_kind("loadBalancers").map(|b| store.load_balancer(b)).collect()
    }

    /// What changes from now on. Whoever falls more than 4,096 events behind misses some, and looks at everything again.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.shared.store().events.subscribe()
    }

    /// Decides which address the public address of this name has, or is going to have.
    pub fn give_address(&self, public_address: &str, address: Ipv4Addr) {
        self.shared
            .store()
            .given
            .insert(public_address.to_ascii_lowercase(), address);
    }

    /// What a machine has printed: what boot diagnostics show from now on.
    pub fn set_console(&self, machine: &str, text: &str) -> bool {
        let mut store = self.shared.store();
        let Some(id) = machine_id(&store, machine) else {
            return false;
        };
        store.consoles.insert(id.to_ascii_lowercase(), text.to_owned());
        true
    }

    /// Starts or stops a machine by hand, as from inside or in the portal. Says whether it's there.
    pub fn set_power(&self, machine: &str, power: Power) -> bool {
        let mut store = self.shared.store();
        let Some(id) = machine_id(&store, machine) else {
            return false;
        };
        store.set_power(&id, power);
        true
    }

    /// Deletes any resource by hand, by its id or name, without asking who uses it. Says whether it was there.
    pub fn delete_by_hand(&self, resource: &str) -> bool {
        let mut store = self.shared.store();
        let id = store
            .resources
            .values()
            .find(|r| r.id.eq_ignore_ascii_case(resource) || r.name.eq_ignore_ascii_case(resource))
            .map(|r| r.id.clone());
        let Some(id) = id else {
            return false;
        };
        store.remove(&id);
        true
    }
}

fn machine_id(store: &Store, machine: &str) -> Option<String> {
    store
        .of_kind("virtualMachines")
        .find(|m| m.name.eq_ignore_ascii_case(machine) || m.id.eq_ignore_ascii_case(machine))
        .map(|m| m.id.clone())
}
