//! A real control plane (etcd, kube-apiserver, controller-manager, scheduler) started with the rendered flags and files, and
//! the rendered objects applied to it. Only paths and addresses are changed, so that it runs beside others on one host.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, process};

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, Pod, Secret};
use kprov_bootstrap::apply::{ApplyError, Outcome, apply};
use kprov_bootstrap::manifests::{API_SERVICE, EtcdClusterState, EtcdStart, JoinGrant, Manifest, Policy, etcd_pod};
use kprov_bootstrap::pivot::{Expectation, Waiting, judge, observe};
use kprov_bootstrap::pki::{self, Authority, Credentials, Kubeconfig};
use kprov_bootstrap::{control_plane_files, self_hosted, standby_pods};
use kprov_types::node::{Bundle, KeyPairPem};
use kprov_types::ports::revision_address;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::config::KubeConfigOptions;
use kube::{Client, Config, ResourceExt as _};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::common::{bundle, machine, settings};
use crate::programs::{Running, directories, etcd, version_of};

const PATIENCE: Duration = Duration::from_secs(90);
/// An address for documentation.
pub(crate) const ADVERTISED: &str = "192.0.2.10";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_control_plane_takes_everything() {
    for directory in directories("a_real_control_plane_takes_everything") {
        let version = version_of(&directory.join("kube-apiserver"));
        let mut plane = Plane::start(&directory, &version);
        plane
            .check()
            .await
            .unwrap_or_else(|error| panic!("{version}: {error:?}"));
        println!("{version} with etcd {}: passed", version_of(&etcd(&directory)));
    }
}

/// Waits until something is so.
pub(crate) async fn until<T, F: Future<Output = Result<Option<T>>>>(
    what: &str,
    mut look: impl FnMut() -> F,
) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = look().await;
        match seen {
            Ok(Some(value)) => return Ok(value),
            Ok(None) if Instant::now() > deadline => bail!("gave up waiting for {what}"),
            Err(error) if Instant::now() > deadline => return Err(error.context(format!("gave up waiting for {what}"))),
            _ => sleep(Duration::from_millis(200)).await,
        }
    }
}

pub(crate) struct Plane {
    /// Before their directory, which has their logs.
    processes: Vec<Running>,
    directory: PathBuf,
    root: tempfile::TempDir,
    /// Unique to this test's process, and so are the addresses.
    revision: u16,
    machine_address: Ipv4Addr,
    pub(crate) bundle: Bundle,
    join: JoinGrant,
    manifests: Vec<Manifest>,
}

impl Plane {
    fn start(directory: &Path, version: &str) -> Self {
        let revision = 20_000 + u16::try_from(process::id() % 40_000).unwrap();
        let [high, low] = revision.to_be_bytes();
        let machine_address = Ipv4Addr::new(127, 65, high, low);
        let etcd_program = etcd(directory);
        let mut settings = settings(version, &version_of(&etcd_program), 1);
        settings.members[0].address = machine_address.into();
        settings.endpoint.host = revision_address(revision).to_string();
        let now = Timestamp::now();
        let join = JoinGrant {
            token: pki::generate_join_token().unwrap(),
            expires: now + SignedDuration::from_hours(1),
        };
        let mut manifests = self_hosted(&settings, revision, Some(&join)).unwrap();
        for manifest in &mut manifests {
            // No endpoint may be on loopback.
            if manifest.object["metadata"]["name"] == API_SERVICE {
                let text = manifest.object.to_string();
                manifest.object = text.replace(&machine_address.to_string(), ADVERTISED).parse().unwrap();
            }
        }
        let mut plane = Self {
            directory: directory.to_owned(),
            root: tempfile::tempdir().unwrap(),
            revision,
            machine_address,
            bundle: bundle(settings, now),
            join,
            manifests,
            processes: Vec::new(),
        };
        let member = &plane.bundle.settings.members[0];
        for file in control_plane_files(&plane.bundle, member, &|_| None, now).unwrap() {
            let path = PathBuf::from(plane.remap(&file.path));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, plane.remap(&file.content)).unwrap();
        }
        fs::create_dir_all(plane.root.path().join("log/audit")).unwrap();
        let (_, etcd_pod) = etcd_pod(&plane.bundle.settings, member, &plane.etcd_start()).unwrap();
        plane.run(&etcd_program, &etcd_pod["spec"]);
        for name in ["kube-apiserver", "kube-controller-manager", "kube-scheduler"] {
            let program = plane.directory.join(name);
            let manifest = plane
                .manifests
                .iter()
                .find(|m| m.object["metadata"]["name"] == name && m.object["spec"]["template"].is_object());
            let spec = manifest.unwrap().object["spec"]["template"]["spec"].clone();
            if program.is_file() {
                plane.run(&program, &spec);
            }
        }
        plane
    }

    fn etcd_start(&self) -> EtcdStart {
        EtcdStart {
            initial_cluster: self.bundle.settings.members.clone(),
            state: EtcdClusterState::New,
            data_dir: "/var/lib/etcd".into(),
        }
    }

    fn remap(&self, text: &str) -> String {
        let root = self.root.path().display();
        let api = revision_address(self.revision);
        text.replace("/etc/kubernetes", &format!("{root}/kubernetes"))
            .replace("/var/log/kubernetes", &format!("{root}/log"))
            .replace("/var/lib/etcd", &format!("{root}/etcd"))
            .replace("https://127.0.0.1:2379,", "")
            .replace("//127.0.0.1:2379", &format!("//{}:2379", self.machine_address))
            .replace("//127.0.0.1:2381", &format!("//{}:2381", self.machine_address))
            .replace("https://127.0.0.1:6443", &format!("https://{api}:6443"))
            // API servers refuse to advertise loopback.
            .replace("$(HOST_IP)", ADVERTISED)
    }

    fn run(&mut self, program: &Path, pod_spec: &Value) {
        let command: Vec<String> = serde_json::from_value(pod_spec["containers"][0]["command"].clone()).unwrap();
        let flags: Vec<String> = command[1..].iter().map(|flag| self.remap(flag)).collect();
        let log = self
            .root
            .path()
            .join(program.file_name().unwrap())
            .with_extension("log");
        self.processes.push(Running::start(program, &flags, log));
    }

    fn has(&self, program: &str) -> bool {
        self.directory.join(program).is_file()
    }

    async fn client(&self, credentials: Credentials<'_>) -> Result<Client> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        Ok(Client::try_from(self.config(credentials).await?)?)
    }

    pub(crate) async fn config(&self, credentials: Credentials<'_>) -> Result<Config> {
        let server = self.bundle.settings.endpoint.url();
        let text = Kubeconfig {
            cluster: "demo",
            user: "test",
            server: &server,
            authority: Authority::Inline(&self.bundle.secrets.ca.certificate),
            credentials,
        }
        .render();
        let kubeconfig = kube::config::Kubeconfig::from_yaml(&text)?;
        Ok(Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?)
    }

    pub(crate) async fn client_of(&self, pair: &KeyPairPem) -> Result<Client> {
        self.client(Credentials::Inline(pair)).await
    }

    /// The pair of a certificate among the machine's files.
    pub(crate) fn pair(&self, name: &str) -> Result<KeyPairPem> {
        let path = |suffix: &str| self.root.path().join("kubernetes/pki").join(format!("{name}.{suffix}"));
        Ok(KeyPairPem {
            certificate: fs::read_to_string(path("crt"))?,
            key: fs::read_to_string(path("key"))?,
        })
    }

    async fn check(&mut self) -> Result<()> {
        let secrets = &self.bundle.secrets;
        let setup = self.client_of(&pki::setup_admin(secrets, Timestamp::now())?).await?;
        let admin = self.client_of(&pki::admin(secrets, Timestamp::now())?).await?;
        self.applies_twice(&setup).await.context("apply")?;
        self.limits_anonymous().await.context("anonymous")?;
        self.encrypts_secrets(&admin).await.context("encryption at rest")?;
        self.limits_kprov_node(&admin).await.context("kprov-node's rights")?;
        self.keeps_own_kinds(&admin).await.context("kprov's own kinds")?;
        self.limits_the_operator(&admin)
            .await
            .context("the operator's rights")?;
        if self.has("kube-controller-manager") && self.has("kube-scheduler") {
            self.limits_pods(&admin).await.context("pod security")?;
            self.signs_certificates(&admin).await.context("certificates")?;
            self.creates_control_plane_pods(&admin)
                .await
                .context("self-hosted pods")?;
        } else {
            println!(
                "no kube-controller-manager and kube-scheduler in {}: only the API server is tested",
                self.directory.display()
            );
        }
        self.processes.iter_mut().try_for_each(|p| {
            ensure!(!p.has_ended(), "a program ended: {}", p.log());
            Ok(())
        })
    }

    async fn applies_twice(&self, client: &Client) -> Result<()> {
        let deadline = || Instant::now() + PATIENCE;
        let first = apply(client, &self.manifests, deadline(), |_| ()).await?;
        ensure!(first.len() == self.manifests.len());
        // All new but the one binding that API servers make themselves, and for which `kprov up` has its own opinion.
        let odd: Vec<_> = first
            .iter()
            .filter(|(_, outcome)| *outcome != Outcome::Created)
            .collect();
        ensure!(
            odd.iter()
                .all(|(o, outcome)| o.name == "system:public-info-viewer" && *outcome == Outcome::Changed),
            "{odd:?}"
        );
        // Until the controller-manager has given each ServiceAccount its token, in versions where it does.
        until("an apply that changes nothing", || async {
            let second = apply(client, &self.manifests, deadline(), |_| ()).await?;
            for ((object, outcome), manifest) in second.iter().zip(&self.manifests) {
                let wanted = if manifest.policy == Policy::Create {
                    Outcome::Kept
                } else {
                    Outcome::Unchanged
                };
                ensure!(*outcome == wanted, "{object}: {outcome:?}");
            }
            Ok(Some(()))
        })
        .await?;
        // What was changed by hand is repaired where it's `up`'s, and kept where it's not.
        let mut edited: Vec<Manifest> = self.manifests.clone();
        edited.retain(|m| {
            ["kprov:cluster-admins", "kube-scheduler"]
                .map(Value::from)
                .contains(&m.object["metadata"]["name"])
        });
        for manifest in &mut edited {
            manifest.object["metadata"]["labels"] = json!({ "edited": "yes" });
            manifest.policy = Policy::Enforce;
        }
        let outcomes = apply(client, &edited, deadline(), |_| ()).await?;
        ensure!(
            outcomes.iter().all(|(_, outcome)| *outcome == Outcome::Changed),
            "{outcomes:?}"
        );
        for (object, outcome) in apply(client, &self.manifests, deadline(), |_| ()).await? {
            let edited_here = [
                "ClusterRoleBinding kprov:cluster-admins",
                "PodDisruptionBudget kube-system/kube-scheduler",
            ];
            let repaired = edited_here.contains(&object.to_string().as_str());
            // The controller-manager may give one its token just now.
            if object.kind == "ServiceAccount" {
                continue;
            }
            ensure!((outcome == Outcome::Changed) == repaired, "{object}: {outcome:?}");
        }
        // A refusal is told at once, not at the deadline.
        let bad = Manifest {
            object: json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "Bad_Name", "namespace": "kube-system" } }),
            policy: Policy::Enforce,
        };
        let refused = apply(client, &[bad], deadline(), |_| ()).await;
        ensure!(matches!(refused, Err(ApplyError::Refused { .. })), "{refused:?}");
        Ok(())
    }

    async fn limits_anonymous(&self) -> Result<()> {
        let mut config = Config::new(self.bundle.settings.endpoint.url().parse()?);
        config.root_cert = Some(vec![der(&self.bundle.secrets.ca.certificate)?]);
        // As the fronts do, which know the server by this name whatever its address.
        config.tls_server_name = Some("kubernetes".into());
        let anonymous = Client::try_from(config)?;
        for path in ["/readyz", "/livez", "/livez?exclude=etcd", "/healthz"] {
            until(path, || async { Ok(Some(get(&anonymous, path).await?)) }).await?;
        }
        for path in [
            "/",
            "/api",
            "/apis",
            "/version",
            "/metrics",
            "/openapi/v2",
            "/api/v1/namespaces",
        ] {
            match get(&anonymous, path).await {
                Err(kube::Error::Api(status)) if matches!(status.code, 401 | 403) => {}
                other => bail!("{path} gave {other:?}"),
            }
        }
        Ok(())
    }

    async fn encrypts_secrets(&self, admin: &Client) -> Result<()> {
        let secrets: Api<Secret> = Api::namespaced(admin.clone(), "default");
        let secret = serde_json::from_value(
            json!({ "metadata": { "name": "hidden" }, "stringData": { "k": "in-plain-sight" } }),
        )?;
        secrets.create(&PostParams::default(), &secret).await?;
        let mut config = Config::new(format!("https://{}:2379", self.machine_address).parse()?);
        config.root_cert = Some(vec![der(&self.bundle.secrets.etcd_ca.certificate)?]);
        let pair = self.pair("etcd/healthcheck-client")?;
        config.auth_info.client_certificate_data = Some(STANDARD.encode(pair.certificate));
        config.auth_info.client_key_data = Some(STANDARD.encode(pair.key).into());
        let etcd = Client::try_from(config)?;
        let body = json!({ "key": STANDARD.encode("/registry/secrets/default/hidden") }).to_string();
        let request = http::Request::post("/v3/kv/range")
            .header("content-type", "application/json")
            .body(body.into_bytes())?;
        let answer: Value = serde_json::from_str(&etcd.request_text(request).await?)?;
        let raw = STANDARD.decode(answer["kvs"][0]["value"].as_str().context("no such key")?)?;
        ensure!(
            raw.starts_with(b"k8s:enc:secretbox:v1:key1:"),
            "{}",
            String::from_utf8_lossy(&raw)
        );
        let audit = fs::read_to_string(self.root.path().join("log/audit/audit.log"))?;
        ensure!(
            audit.contains("/api/v1/namespaces/default/secrets"),
            "the audit log knows nothing of the Secret"
        );
        ensure!(!audit.contains("in-plain-sight") && !audit.contains(&STANDARD.encode("in-plain-sight")));
        Ok(())
    }

    async fn limits_kprov_node(&self, admin: &Client) -> Result<()> {
        let nodes: Api<Node> = Api::all(admin.clone());
        for name in ["demo-cp-0", "demo-worker-0"] {
            let node = json!({ "metadata": { "name": name, "labels": { "kubernetes.io/hostname": name, "kubernetes.io/os": "linux" } },
                "status": { "capacity": { "cpu": "4", "memory": "8Gi", "pods": "110" } } });
            nodes
                .create(&PostParams::default(), &serde_json::from_value(node)?)
                .await?;
        }
        let client = self.client_of(&self.pair("control-plane-node/client")?).await?;
        let own: Api<Node> = Api::all(client.clone());
        let label = json!({ "metadata": { "labels": { "node-role.kubernetes.io/control-plane": "" } } });
        own.patch("demo-cp-0", &PatchParams::default(), &Patch::Merge(&label))
            .await?;
        forbidden(
            own.patch("demo-worker-0", &PatchParams::default(), &Patch::Merge(&label))
                .await,
        )?;
        ensure!(own.list(&ListParams::default()).await?.items.len() == 2);
        Api::<Pod>::namespaced(client.clone(), "kube-system")
            .list(&ListParams::default())
            .await?;
        forbidden(
            Api::<Secret>::namespaced(client.clone(), "kube-system")
                .list(&ListParams::default())
                .await,
        )?;
        // The pod network's view of a node: all nodes, and nothing more.
        let kubelet = self.client_of(&self.pair("kubelet/client")?).await?;
        ensure!(
            Api::<Node>::all(kubelet.clone())
                .list(&ListParams::default())
                .await?
                .items
                .len()
                == 2
        );
        forbidden(Api::<Secret>::all(kubelet).list(&ListParams::default()).await)
    }

    async fn limits_pods(&self, admin: &Client) -> Result<()> {
        for (name, namespace, privileged, admitted) in [
            ("plain", "default", false, true),
            ("privileged", "default", true, false),
            ("privileged", "kube-system", true, true),
        ] {
            let spec = json!({ "automountServiceAccountToken": false, "nodeName": "demo-worker-0", "hostNetwork": privileged,
                "containers": [{ "name": "c", "image": "none", "securityContext": { "privileged": privileged } }] });
            let set = json!({ "apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": { "name": name, "namespace": namespace },
                "spec": { "replicas": 1, "selector": { "matchLabels": { "x": name } },
                    "template": { "metadata": { "labels": { "x": name } }, "spec": spec } } });
            let sets: Api<k8s_openapi::api::apps::v1::ReplicaSet> = Api::namespaced(admin.clone(), namespace);
            sets.create(&PostParams::default(), &serde_json::from_value(set)?)
                .await?;
            let what = format!("the controller's word on {namespace}/{name}");
            let outcome = until(&what, || async {
                let status = sets.get(name).await?.status.unwrap_or_default();
                if status.replicas == 1 {
                    return Ok(Some(String::new()));
                }
                let failure = status
                    .conditions
                    .into_iter()
                    .flatten()
                    .find(|c| c.type_ == "ReplicaFailure");
                // Before the namespace's ServiceAccount is made, no pod is admitted at all.
                Ok(failure
                    .and_then(|c| c.message)
                    .filter(|m| !m.contains("serviceaccount")))
            })
            .await?;
            if admitted {
                ensure!(outcome.is_empty(), "{namespace}/{name}: {outcome}");
            } else {
                let refused = outcome.contains("PodSecurity") && outcome.to_lowercase().contains("privileged");
                ensure!(refused, "{namespace}/{name}: {outcome}");
            }
            sets.delete(name, &DeleteParams::foreground()).await?;
        }
        Ok(())
    }

    async fn signs_certificates(&self, admin: &Client) -> Result<()> {
        // A machine that joins: approved and signed by the controller-manager alone.
        let joining = self.client(Credentials::Join(&self.join.token)).await?;
        let usages = ["digital signature", "key encipherment", "client auth"];
        request(
            &joining,
            "join",
            "kubernetes.io/kube-apiserver-client-kubelet",
            "demo-worker-0",
            &usages,
            &[],
        )
        .await?;
        let certificate = signed(&joining, "join").await?;
        let (_, pem) = x509_parser::pem::parse_x509_pem(&certificate)?;
        let subject = pem.parse_x509()?.subject().to_string();
        ensure!(subject.contains("CN=system:node:demo-worker-0"), "{subject}");
        forbidden(
            Api::<Secret>::namespaced(joining, "kube-system")
                .list(&ListParams::default())
                .await,
        )?;
        // A kubelet's serving certificate: approved by kprov-node, for this signer and no other.
        let kubelet = self.client_of(&self.pair("kubelet/client")?).await?;
        let usages = ["digital signature", "key encipherment", "server auth"];
        request(
            &kubelet,
            "serving",
            "kubernetes.io/kubelet-serving",
            "demo-cp-0",
            &usages,
            &["demo-cp-0"],
        )
        .await?;
        let approver = self.client_of(&self.pair("control-plane-node/client")?).await?;
        approve(&approver, "serving").await?;
        signed(&approver, "serving").await?;
        let usages = ["digital signature", "key encipherment", "client auth"];
        request(
            admin,
            "other",
            "kubernetes.io/kube-apiserver-client",
            "anyone",
            &usages,
            &[],
        )
        .await?;
        forbidden(approve(&approver, "other").await)
    }

    async fn creates_control_plane_pods(&self, admin: &Client) -> Result<()> {
        let wanted = [
            "coredns",
            "kube-apiserver",
            "kube-controller-manager",
            "kube-proxy",
            "kube-scheduler",
        ];
        until("self-hosted pods", || async {
            let seen = observe(admin).await?;
            let placed = |name: &&str| {
                seen.pods
                    .iter()
                    .any(|p| p.component == **name && !p.mirror && (p.node.is_some() || *name == "coredns"))
            };
            Ok(wanted.iter().all(placed).then_some(()))
        })
        .await?;
        let settings = &self.bundle.settings;
        let expected = Expectation::new(settings, vec![machine("demo-worker-0")]);
        // Static pods as a kubelet mirrors them; the pivot tells them from self-hosted ones.
        let node = Api::<Node>::all(admin.clone()).get("demo-cp-0").await?;
        let kubelet = self.client_of(&self.pair("kubelet/client")?).await?;
        let pods: Api<Pod> = Api::namespaced(kubelet, "kube-system");
        let member = &settings.members[0];
        let mut manifests = standby_pods(settings, member)?;
        manifests.push(etcd_pod(settings, member, &self.etcd_start())?);
        for (_, mut pod) in manifests {
            let name = format!("{}-demo-cp-0", pod["metadata"]["name"].as_str().context("no name")?);
            pod["metadata"]["name"] = json!(name);
            pod["metadata"]["annotations"] =
                json!({ "kubernetes.io/config.mirror": "1", "kubernetes.io/config.source": "file" });
            pod["metadata"]["ownerReferences"] = json!([{ "apiVersion": "v1", "kind": "Node", "name": "demo-cp-0", "uid": node.uid(), "controller": true }]);
            pod["spec"]["nodeName"] = json!("demo-cp-0");
            pods.create(&PostParams::default(), &serde_json::from_value(pod)?)
                .await
                .with_context(|| name)?;
        }
        let standby = |components: &[&str]| -> Vec<Waiting> {
            components
                .iter()
                .map(|c| Waiting::Standby {
                    machine: machine("demo-cp-0"),
                    component: (*c).into(),
                })
                .collect()
        };
        let waiting = judge(&expected, &observe(admin).await?).waiting;
        for reason in standby(&["kube-apiserver", "kube-controller-manager", "kube-scheduler"]) {
            ensure!(waiting.contains(&reason), "{waiting:?}");
        }
        // No kubelet runs here, so nothing is ready and no kubelet answers.
        ensure!(
            waiting.contains(&Waiting::ApiServer(machine("demo-cp-0"))),
            "{waiting:?}"
        );
        ensure!(
            waiting.contains(&Waiting::Kubelet(machine("demo-worker-0"))),
            "{waiting:?}"
        );
        ensure!(
            !waiting.contains(&Waiting::StaticPods(machine("demo-cp-0"))),
            "{waiting:?}"
        );
        ensure!(!waiting.contains(&Waiting::Label(machine("demo-cp-0"))), "{waiting:?}");
        Ok(())
    }
}

fn der(pem: &str) -> Result<Vec<u8>> {
    Ok(x509_parser::pem::parse_x509_pem(pem.as_bytes())?.1.contents)
}

async fn get(client: &Client, path: &str) -> Result<String, kube::Error> {
    client
        .request_text(
            http::Request::get(path)
                .body(Vec::new())
                .map_err(kube::Error::HttpError)?,
        )
        .await
}

pub(crate) fn forbidden<T>(result: Result<T, kube::Error>) -> Result<()> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 403 => Ok(()),
        Err(error) => Err(error.into()),
        Ok(_) => bail!("it was allowed"),
    }
}

/// Asks for a certificate as a kubelet does.
async fn request(client: &Client, name: &str, signer: &str, node: &str, usages: &[&str], names: &[&str]) -> Result<()> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::new(names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>())?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    params
        .distinguished_name
        .push(DnType::CommonName, format!("system:node:{node}"));
    let pem = params.serialize_request(&key)?.pem()?;
    let body = json!({ "apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "metadata": { "name": name },
        "spec": { "request": STANDARD.encode(pem), "signerName": signer, "usages": usages } });
    let request = http::Request::post(REQUESTS).header("content-type", "application/json");
    client
        .request_text(request.body(body.to_string().into_bytes())?)
        .await?;
    Ok(())
}

const REQUESTS: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";

async fn approve(client: &Client, name: &str) -> Result<(), kube::Error> {
    let path = format!("{REQUESTS}/{name}/approval");
    let text = get(client, &format!("{REQUESTS}/{name}")).await?;
    let mut object: Value = serde_json::from_str(&text).map_err(kube::Error::SerdeError)?;
    object["status"]["conditions"] = json!([{ "type": "Approved", "status": "True", "reason": "Test", "message": "" }]);
    let request = http::Request::put(path).header("content-type", "application/json");
    client
        .request_text(
            request
                .body(object.to_string().into_bytes())
                .map_err(kube::Error::HttpError)?,
        )
        .await?;
    Ok(())
}

async fn signed(client: &Client, name: &str) -> Result<Vec<u8>> {
    until("a signed certificate", || async {
        let object: Value = serde_json::from_str(&get(client, &format!("{REQUESTS}/{name}")).await?)?;
        object["status"]["certificate"]
            .as_str()
            .map(|text| Ok(STANDARD.decode(text)?))
            .transpose()
    })
    .await
}
