//! What can go wrong with one host, and what a person does about it.

use kprov_provider::ProviderError;
use kprov_types::{ClusterName, MachineName, Role};

/// Something about one host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("host `{host}` {trouble}")]
pub struct HostError {
    /// The host.
    pub host: MachineName,
    /// What it is.
    pub trouble: Trouble,
}

/// What is wrong with a host; reads on after its name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    /// No connection.
    #[error("can't be reached: {0}")]
    Unreachable(String),
    /// Too many connections at once, at the host or at a jump host; passes by itself.
    #[error("turned the connection away: {0}")]
    Busy(String),
    /// Nobody knows its key.
    #[error("shows a host key that is not known")]
    HostKeyUnknown {
        /// What was connected to.
        address: String,
    },
    /// It shows another key than it should.
    #[error("shows another host key than the one that is known")]
    HostKeyChanged {
        /// What was connected to.
        address: String,
        /// Whether the inventory has the key that is expected.
        pinned: bool,
    },
    /// The key is not accepted.
    #[error("doesn't let `{user}` in: {message}")]
    Login {
        /// The user, as the inventory has it.
        user: String,
        /// What `ssh` said.
        message: String,
    },
    /// `sudo` doesn't work without a password.
    #[error("doesn't let its user become root: {0}")]
    Sudo(String),
    /// Not root, and `sudo` isn't to be used.
    #[error("is reached as a user who is not root, and the inventory says not to use `sudo`")]
    NotRoot,
    /// It carries another cluster's marker.
    #[error("belongs to the cluster `{cluster}`")]
    OtherCluster {
        /// The cluster.
        cluster: ClusterName,
    },
    /// It carries this cluster's marker with another name or role.
    #[error("is set up as {role} `{name}` already")]
    OtherMachine {
        /// The name it has.
        name: MachineName,
        /// The role it has.
        role: Role,
    },
    /// Something is there that kprov would have to share it with.
    #[error("runs something that kprov-node would clash with: {0}")]
    InUse(String),
    /// Programs are missing.
    #[error("lacks programs that kprov-node calls: {0}")]
    Lacks(String),
    /// It's another kind of processor.
    #[error("is a `{found}` machine, and kprov-node here is for `{wanted}`")]
    Architecture {
        /// What the host is.
        found: String,
        /// What kprov-node is for.
        wanted: String,
    },
    /// It doesn't have the address that the inventory gives it.
    #[error("doesn't have the address `{wanted}` that the inventory gives it; it has {found}")]
    Address {
        /// In the inventory.
        wanted: String,
        /// On the host.
        found: String,
    },
    /// No disk, or more than one, fits.
    #[error("has no data disk as described: {0}")]
    NoDisk(String),
    /// The disk holds something.
    #[error("has data on its disk `{device}`: {found}")]
    DiskNotEmpty {
        /// The disk.
        device: String,
        /// What is on it.
        found: String,
        /// Whether it's in use, so that wiping is out of the question.
        in_use: bool,
    },
    /// A step failed there.
    #[error("failed at `{step}`: {message}")]
    Failed {
        /// The step.
        step: String,
        /// What was printed.
        message: String,
    },
    /// The inventory doesn't have it.
    #[error("is not in the inventory")]
    NotInInventory,
    /// It has no SSH settings.
    #[error("has no operating system to log in to: the inventory gives it a BMC and no `ssh`")]
    NoSsh,
}

impl Trouble {
    /// What a person does about it.
    pub fn hint(&self, host: &MachineName) -> String {
        match self {
            Self::Unreachable(_) => "check that it runs, its address and port, and that no firewall is in between".into(),
            Self::Busy(_) => "try again, with a lower `parallel`, or raise `MaxStartups` in its sshd_config".into(),
            Self::HostKeyUnknown { address } => format!(
                "compare `ssh-keyscan {address}` with the key on the host's console, then add it to ~/.ssh/known_hosts or pin it as `ssh.hostKey` in the inventory"
            ),
            Self::HostKeyChanged { pinned: true, .. } => {
                "if the host was installed anew, put its new key into the inventory; if not, somebody may be in between".into()
            }
            Self::HostKeyChanged { address, .. } => format!(
                "if the host was installed anew, remove its old key with `ssh-keygen -R {address}` and add the new one; if not, somebody may be in between"
            ),
            Self::Login { .. } => {
                "check user and key in the inventory (`ssh.user`, `ssh.key`), the agent, and `authorized_keys` on the host".into()
            }
            Self::Sudo(_) => "install `sudo` there and let the user run everything without a password (`NOPASSWD: ALL`), or log in as root".into(),
            Self::NotRoot => "log in as root, or allow `sudo`".into(),
            Self::OtherCluster { cluster } => {
                format!("`kprov down --name {cluster}` frees it, or take it out of the inventory")
            }
            Self::OtherMachine { .. } => format!("`kprov inventory remove {host}` frees it; then run `kprov up` again"),
            Self::InUse(_) => "give a host that runs neither Kubernetes nor containers, or remove them there".into(),
            Self::Lacks(programs) => format!("install what has `{programs}` there"),
            Self::Architecture { .. } => "give hosts of one kind of processor".into(),
            Self::Address { .. } => "correct `address` (Ansible: `ip`) in the inventory".into(),
            Self::NoDisk(_) => "`lsblk -o NAME,SIZE,MODEL,SERIAL` on the host shows what there is; correct `disk` in the inventory".into(),
            Self::DiskNotEmpty { in_use: true, .. } => "it is in use: correct `disk` in the inventory".into(),
            Self::DiskNotEmpty { .. } => format!(
                "if nothing on it is needed any more, run `kprov up` with `--wipe {host}`; else correct `disk` in the inventory"
            ),
            Self::Failed { .. } => format!("look at the host, then run the same command again; `kprov inventory check` tries `{host}` alone"),
            Self::NotInInventory => "give the inventory that names it".into(),
            Self::NoSsh => "give it `ssh` settings once it has an operating system".into(),
        }
    }
}

/// What all hosts together came to: one error that names each host in trouble. The others are done.
pub(crate) fn together(what: &str, errors: &[HostError], all: usize) -> Result<(), ProviderError> {
    let Some(first) = errors.first() else {
        return Ok(());
    };
    let hint = first.trouble.hint(&first.host);
    if errors.len() == 1 {
        let rest = match all - 1 {
            0 => String::new(),
            1 => format!("; the other host is {what}, and running the same command again carries on"),
            n => format!("; the other {n} hosts are {what}, and running the same command again carries on"),
        };
        return Err(ProviderError::never(first.to_string()).hint(format!("{hint}{rest}")));
    }
    let lines: Vec<String> = errors.iter().map(|error| format!("\n    {error}")).collect();
    let message = format!("{} of {all} hosts are not {what}:{}", errors.len(), lines.concat());
    Err(ProviderError::never(message).hint(format!(
        "of the first: {hint}; running the same command again carries on where this one ended"
    )))
}
