//! The command line as clap sees it: definitions only, no logic.

mod boot;

use camino::Utf8PathBuf;
use clap::{Args, Parser, Subcommand, ValueEnum};
use kprov_types::api::MaxUnavailable;
use kprov_types::cluster::Provider;
use kprov_types::{ClusterName, KubernetesVersion, MachineName};

pub(crate) use boot::{BootCommand, BootImageArgs, BootServeArgs};

/// Launch self-hosted Kubernetes clusters, and change their version through the Kubernetes API.
///
/// `kprov up` makes machines, network and disks and ends in a running self-hosted cluster. Run again, it makes only what
/// is missing. `kprov upgrade --to VERSION` changes the cluster's Kubernetes version, and loses no request.
#[derive(Debug, Parser)]
#[command(name = "kprov", version, arg_required_else_help = true, max_term_width = 110)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Options every command has.
    #[command(flatten)]
    pub global: Global,
}

/// Options every command has.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// How progress is shown on stderr.
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t,
        value_name = "HOW",
        help_heading = "Output"
    )]
    pub progress: Progress,
    /// Show no progress; the same as `--progress none`.
    #[arg(long, global = true, help_heading = "Output")]
    pub no_progress: bool,
    /// Say more (`-v` what is done, `-vv` every detail); `RUST_LOG` overrides.
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Output")]
    pub verbose: u8,
    /// Where clusters' secrets and kubeconfigs are kept [default: ~/.kprov].
    #[arg(long, global = true, env = "KPROV_HOME", value_name = "DIR", help_heading = "Output")]
    pub home: Option<Utf8PathBuf>,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct OutputArgs {
    /// How the result is printed on stdout.
    #[arg(
        short,
        long,
        value_enum,
        default_value_t,
        value_name = "FORMAT",
        help_heading = "Output"
    )]
    pub(crate) output: Output,
}

/// Output formats.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    #[default]
    Human,
    /// One JSON document.
    Json,
    /// One YAML document.
    Yaml,
}

/// Ways to show progress.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Progress {
    /// Live lines on a terminal, plain lines elsewhere.
    #[default]
    Auto,
    /// One line an event.
    Plain,
    /// One JSON object a line.
    Json,
    /// Nothing.
    None,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a cluster, or what is missing of it.
    Up(UpArgs),
    /// Remove a cluster with everything that was made for it, its data disks included.
    Down(DownArgs),
    /// Show what `up` would do, and do nothing.
    Plan(PlanArgs),
    /// Show a cluster's machines, nodes and control plane.
    Status(StatusArgs),
    /// Change a cluster's Kubernetes version, or join a change that is under way.
    Upgrade(Box<UpgradeArgs>),
    /// Begin no new step of an upgrade until `resume`.
    Pause(AccessArgs),
    /// Go on with a paused upgrade.
    Resume(AccessArgs),
    /// Take the unfinished hop of an upgrade back.
    Rollback(RollbackArgs),
    /// List snapshots of etcd, or go back to one.
    #[command(subcommand)]
    Etcd(EtcdCommand),
    /// List the clusters that are known here.
    List(OutputArgs),
    /// Print a cluster's kubeconfig, or merge it into yours.
    Kubeconfig(KubeconfigArgs),
    /// Make, check and offer release payloads.
    #[command(subcommand)]
    Release(ReleaseCommand),
    /// Boot hosts without an operating system over the network.
    #[command(subcommand)]
    Boot(BootCommand),
    /// Check inventories of bare-metal hosts, and take hosts out of a cluster.
    #[command(subcommand)]
    Inventory(InventoryCommand),
    /// Print the JSON Schema of cluster files.
    Schema,
    /// Print a shell's completion script.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write all of them.
    Man {
        /// Write a page for each command into this directory.
        #[arg(long, value_name = "DIR")]
        out: Option<Utf8PathBuf>,
    },
    /// What local machines run on the host; not for people.
    #[command(hide = true)]
    MachineRoom,
}

/// Which cluster, for commands that work on one that exists.
#[derive(Debug, Clone, Args)]
pub(crate) struct NameArgs {
    /// The cluster; may be left out where only one is known.
    #[arg(long, value_name = "NAME")]
    pub name: Option<ClusterName>,
}

/// Which cluster, for commands that need its API and nothing else.
#[derive(Debug, Clone, Args)]
pub(crate) struct AccessArgs {
    /// The cluster; may be left out where only one is known.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["kubeconfig", "context"])]
    pub name: Option<ClusterName>,
    /// Reach the cluster by this kubeconfig, as kubectl does, instead of by what is kept of it here.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<Utf8PathBuf>,
    /// The context in the kubeconfig.
    #[arg(long, value_name = "CONTEXT")]
    pub context: Option<String>,
}

/// Arguments of `upgrade`.
#[derive(Debug, Clone, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own")]
pub(crate) struct UpgradeArgs {
    /// Which cluster.
    #[command(flatten)]
    pub access: AccessArgs,
    /// The Kubernetes version to run, such as `1.36.3`; may be several minors ahead.
    #[arg(long, value_name = "VERSION")]
    pub to: KubernetesVersion,
    /// Release payload of that version, or of a minor on the way; may be given more than once. Also looked for: payloads
    /// beside the one that the cluster runs, in `releases/` of the home directory, and those the cluster knows.
    #[arg(long, value_name = "DIR", env = "KPROV_RELEASES", value_delimiter = ':')]
    pub release: Vec<Utf8PathBuf>,
    /// Which signatures are trusted.
    #[command(flatten)]
    pub trust: TrustArgs,
    /// Show hops, steps and what preflight finds, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Begin, and don't wait; `kprov status` shows how it stands.
    #[arg(long)]
    pub detach: bool,
    /// Don't ask.
    #[arg(short, long)]
    pub yes: bool,
    /// Go on in spite of this preflight finding (its name); may be given more than once.
    #[arg(long, value_name = "FINDING")]
    pub force: Vec<String>,
    /// How many workers of a pool may be out of service at once: a number, or a share such as `10%`.
    #[arg(long, value_name = "N|N%", value_parser = parse_max_unavailable)]
    pub max_unavailable: Option<MaxUnavailable>,
    /// How many workers go first, alone.
    #[arg(long, value_name = "N")]
    pub canary: Option<u32>,
    /// How long a machine's pods are given to leave, in seconds.
    #[arg(long, value_name = "SECONDS")]
    pub drain_timeout: Option<u32>,
    /// How long each instance and machine may take to become healthy, in seconds, before the release counts as bad.
    #[arg(long, value_name = "SECONDS")]
    pub health_timeout: Option<u32>,
    /// Show how long each step took.
    #[arg(long)]
    pub timings: bool,
    /// How the result is printed.
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

fn parse_max_unavailable(text: &str) -> Result<MaxUnavailable, kprov_types::api::MaxUnavailableError> {
    MaxUnavailable::try_from(serde_json::Value::from(text))
}

/// Arguments of `rollback`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RollbackArgs {
    /// Which cluster.
    #[command(flatten)]
    pub access: AccessArgs,
    /// Begin, and don't wait.
    #[arg(long)]
    pub detach: bool,
    /// How the result is printed.
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// The `etcd` commands.
#[derive(Debug, Subcommand)]
pub(crate) enum EtcdCommand {
    /// List the snapshots that the control-plane machines keep.
    Snapshots {
        /// Which cluster.
        #[command(flatten)]
        access: AccessArgs,
        /// How the result is printed.
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Go back to a snapshot: everything that was written to the API since is lost.
    ///
    /// The old data is kept beside the new on each machine. Where the API does not answer any more, run
    /// `kprov-node etcd restore NAME` on the machine that has the snapshot.
    Restore {
        /// The snapshot's name.
        snapshot: String,
        /// Which cluster.
        #[command(flatten)]
        access: AccessArgs,
        /// Don't ask.
        #[arg(short, long)]
        yes: bool,
    },
}

/// What a cluster should be: a file, flags, or a file with flags on top.
#[derive(Debug, Clone, Args)]
pub(crate) struct ClusterArgs {
    /// Cluster file (YAML); `-` for stdin. Flags override what it says.
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<Utf8PathBuf>,
    /// The cluster's name; without it the file's, without a file `kprov`.
    #[arg(long, value_name = "NAME")]
    pub name: Option<ClusterName>,
    /// Where the machines are: `local`, `aws`, `azure` or `baremetal`.
    #[arg(long, value_name = "PROVIDER")]
    pub provider: Option<Provider>,
    /// The Kubernetes version to start with, such as `1.36.3`.
    #[arg(long, value_name = "VERSION")]
    pub kubernetes: Option<KubernetesVersion>,
    /// How many control-plane machines: 1, 3 or 5.
    #[arg(long, value_name = "N")]
    pub control_plane: Option<u32>,
    /// How many worker machines.
    #[arg(long, value_name = "N")]
    pub workers: Option<u32>,
    /// The release payload: a directory made by `kprov release create`.
    #[arg(long, value_name = "DIR", env = "KPROV_RELEASE")]
    pub release: Option<Utf8PathBuf>,
    /// Where machines fetch that payload from, if not from this program: what `kprov release serve` offers, or the payload's
    /// files on any HTTP server; may be given more than once.
    #[arg(long, value_name = "URL")]
    pub release_url: Vec<String>,
    /// The machines' address range, such as `10.89.7.0/24`.
    #[arg(long, value_name = "CIDR")]
    pub network: Option<ipnet::Ipv4Net>,
    /// AWS: the region, such as `eu-central-1`; as the profile or `AWS_REGION` says where left out.
    #[arg(long, value_name = "REGION")]
    pub region: Option<String>,
    /// AWS: the profile in the shared configuration files.
    #[arg(long, value_name = "PROFILE")]
    pub profile: Option<String>,
    /// The hosts of a bare-metal cluster: kprov's own inventory file, or an Ansible inventory (YAML or INI) as it is.
    #[arg(long, value_name = "FILE")]
    pub inventory: Option<Utf8PathBuf>,
}

/// Arguments of `plan`.
#[derive(Debug, Clone, Args)]
pub(crate) struct PlanArgs {
    /// What the cluster should be.
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// How the result is printed.
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Arguments of `status`.
#[derive(Debug, Clone, Args)]
pub(crate) struct StatusArgs {
    /// Which cluster.
    #[command(flatten)]
    pub(crate) access: AccessArgs,
    /// How the result is printed.
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Arguments of `up`.
#[derive(Debug, Clone, Args)]
pub(crate) struct UpArgs {
    /// What the cluster should be.
    #[command(flatten)]
    pub cluster: ClusterArgs,
    /// Which signatures are trusted.
    #[command(flatten)]
    pub trust: TrustArgs,
    /// Wipe the data disk of this bare-metal host if it holds something; may be given more than once.
    #[arg(long, value_name = "HOST")]
    pub wipe: Vec<MachineName>,
    /// Show how long each step took.
    #[arg(long)]
    pub timings: bool,
    /// Give up after this many seconds without the cluster being ready.
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    pub timeout: u64,
    /// How the result is printed.
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Which signatures are trusted.
#[derive(Debug, Clone, Args)]
pub(crate) struct TrustArgs {
    /// Trust payloads signed by this public key (PEM), beside those in `keys/` of the home directory.
    #[arg(long, value_name = "FILE")]
    pub release_key: Vec<Utf8PathBuf>,
    /// Use a payload although its signature is missing or unknown. Digests are checked all the same.
    #[arg(long)]
    pub insecure_release: bool,
}

/// Arguments of `down`.
#[derive(Debug, Clone, Args)]
pub(crate) struct DownArgs {
    /// Which cluster.
    #[command(flatten)]
    pub name: NameArgs,
    /// Don't ask.
    #[arg(short, long)]
    pub yes: bool,
    /// Switch bare-metal hosts off that have a management controller, once nothing of the cluster is left on them.
    #[arg(long)]
    pub power_off: bool,
    /// How the result is printed.
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Arguments of `kubeconfig`.
#[derive(Debug, Clone, Args)]
pub(crate) struct KubeconfigArgs {
    /// Which cluster.
    #[command(flatten)]
    pub name: NameArgs,
    /// Merge it into `$KUBECONFIG` or ~/.kube/config, and make it the current context.
    #[arg(long)]
    pub merge: bool,
}

/// The `release` commands.
#[derive(Debug, Subcommand)]
pub(crate) enum ReleaseCommand {
    /// Make a payload from directories of Kubernetes binaries, or from the official registries.
    Create(ReleaseCreateArgs),
    /// Check a payload's signature and every digest.
    Verify {
        /// The payload's directory.
        path: Utf8PathBuf,
        /// Which signatures are trusted.
        #[command(flatten)]
        trust: TrustArgs,
        /// How the result is printed.
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show what a payload consists of.
    Show {
        /// The payload's directory.
        path: Utf8PathBuf,
        /// How the result is printed.
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Give a payload to a cluster, so that `spec.desiredVersion` can name its version.
    Push {
        /// The payload's directory.
        path: Utf8PathBuf,
        /// Which cluster.
        #[command(flatten)]
        access: AccessArgs,
        /// Which signatures are trusted.
        #[command(flatten)]
        trust: TrustArgs,
    },
    /// Offer a payload to machines over HTTP.
    Serve {
        /// The payload's directory.
        path: Utf8PathBuf,
        /// Address and port to listen on.
        #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:10202")]
        listen: std::net::SocketAddr,
    },
    /// Make a signing key; its public half goes beside it, with `.pub` at the end.
    Keygen {
        /// File to write the private key to.
        #[arg(short, long, value_name = "FILE")]
        out: Utf8PathBuf,
    },
}

/// The `inventory` commands.
#[derive(Debug, Subcommand)]
pub(crate) enum InventoryCommand {
    /// Check an inventory, then try every host in it.
    ///
    /// A host is tried by logging in and looking: nothing is changed. Exit code 1 if any can't be used.
    Check {
        /// kprov's own inventory file, or an Ansible inventory (YAML or INI).
        file: Utf8PathBuf,
        /// The cluster that the hosts may belong to already.
        #[arg(long, value_name = "NAME")]
        name: Option<ClusterName>,
        /// Check the file alone, and try no host.
        #[arg(long)]
        offline: bool,
        /// How many hosts are tried at once.
        #[arg(long, value_name = "N", default_value_t = 20)]
        parallel: usize,
        /// How the result is printed.
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Print the JSON Schema of kprov's own inventory files.
    Schema,
    /// Take a worker out of its cluster: its Node goes, and all that kprov put on the host.
    ///
    /// Drain it first (`kubectl drain`), if pods are to leave in good order. Take it out of the inventory file too, or the
    /// next `up` sets it up again.
    Remove {
        /// The host.
        host: MachineName,
        /// Which cluster.
        #[command(flatten)]
        name: NameArgs,
        /// The host is gone for good: don't try to clean it.
        #[arg(long)]
        lost: bool,
        /// Don't ask.
        #[arg(short, long)]
        yes: bool,
        /// How the result is printed.
        #[command(flatten)]
        output: OutputArgs,
    },
}

/// Arguments of `release create`.
#[derive(Debug, Clone, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own")]
pub(crate) struct ReleaseCreateArgs {
    /// Directory of binaries; may be given more than once, the first that has a program wins.
    #[arg(long, value_name = "DIR", required_unless_present = "online")]
    pub from: Vec<Utf8PathBuf>,
    /// Refer to the official registries and download sites instead of carrying anything.
    #[arg(long, conflicts_with = "from")]
    pub online: bool,
    /// The Kubernetes version that this is.
    #[arg(long, value_name = "VERSION")]
    pub version: KubernetesVersion,
    /// Directory to write.
    #[arg(short, long, value_name = "PATH")]
    pub out: Utf8PathBuf,
    /// Sign with this private key [default: your own, made at first use in `keys/` of the home directory].
    #[arg(long, value_name = "FILE")]
    pub sign_key: Option<Utf8PathBuf>,
    /// Don't sign.
    #[arg(long, conflicts_with = "sign_key")]
    pub unsigned: bool,
    /// Take nothing from this host: etcd, containerd, runc and CNI plugins must be in DIR too.
    #[arg(long)]
    pub no_host: bool,
    /// Leave out kprov-node and kprov-operator, which are taken from DIR or from beside kprov. No upgrade to such a payload
    /// renews kprov itself.
    #[arg(long)]
    pub without_kprov: bool,
    /// Payload whose blobs are linked where this one has the same, instead of being written again; may be given more than once.
    #[arg(long, value_name = "PAYLOAD")]
    pub reuse: Vec<Utf8PathBuf>,
    /// Lowest version a cluster may be upgraded from to this one.
    #[arg(long, value_name = "VERSION")]
    pub minimum_from: Option<KubernetesVersion>,
    /// Security advisory that this version fixes (CVE or GHSA id); may be given more than once.
    #[arg(long, value_name = "ID")]
    pub advisory: Vec<String>,
    /// Download site, for `--online`.
    #[arg(long, value_name = "URL", requires = "online")]
    pub download_site: Option<String>,
    /// Image registry, for `--online`.
    #[arg(long, value_name = "URL", requires = "online")]
    pub registry: Option<String>,
    /// How the result is printed on stdout (`-o` is the payload's directory here).
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT", help_heading = "Output")]
    pub(crate) output: Output,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn options_do_not_contradict_each_other() {
        super::Cli::command().debug_assert();
    }
}
