//! `kprov release create|verify|show|serve|keygen`.

use anyhow::{Context as _, Result};
use camino::{Utf8Path, Utf8PathBuf};
use kprov_release::serve::Content;
use kprov_release::{CreateOptions, Payload, SigningKey, TrustedKeys, VerifyOptions, create};
use kprov_types::Release;
use kprov_types::release::Arch;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::Context as Kprov;
use super::access::Access;
use super::upgrade::{payloads, upload};
use crate::cli::{AccessArgs, Output, ReleaseCommand, ReleaseCreateArgs, TrustArgs};
use crate::failure::{OrHint as _, UserError};
use crate::print;

/// One's own signing key in the home's `keys/`.
const OWN_KEY: &str = "release.key";

pub(super) async fn run(context: &Kprov, command: ReleaseCommand) -> Result<()> {
    match command {
        ReleaseCommand::Create(args) => make(context, args).await,
        ReleaseCommand::Verify { path, trust, output } => verify(context, &path, &trust, output.output).await,
        ReleaseCommand::Show { path, output } => show(&path, output.output),
        ReleaseCommand::Push { path, access, trust } => push(context, &path, &access, &trust).await,
        ReleaseCommand::Serve { path, listen } => serve(context, &path, listen).await,
        ReleaseCommand::Keygen { out } => keygen(context, &out),
    }
}

/// A payload as `show`, `create` and `verify` print it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown<'a> {
    schema_version: u32,
    path: &'a Utf8Path,
    digest: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    signature: Option<String>,
    release: &'a Release,
}

async fn make(context: &Kprov, args: ReleaseCreateArgs) -> Result<()> {
    let ReleaseCreateArgs {
        from,
        online,
        version,
        out,
        sign_key,
        unsigned,
        no_host,
        without_kprov,
        reuse,
        minimum_from,
        advisory,
        download_site,
        registry,
        output,
    } = args;
    let arch = Arch::current().ok_or_else(|| UserError::new("kprov makes payloads on amd64 and arm64 only"))?;
    let signing_key = match (unsigned, sign_key) {
        (true, _) => None,
        (false, Some(path)) => Some(load_key(&path)?),
        (false, None) => Some(own_key(context)?),
    };
    // The programs that a cluster renews kprov with are those that came with this one.
    let kprov_programs = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(Utf8Path::from_path(exe.parent()?)?.to_owned()));
    context
        .reporter
        .step("", &format!("make the payload of Kubernetes {version}"));
    let payload = if online {
        let mut options = kprov_release::OnlineOptions::official(version, arch, out);
        options.signing_key = signing_key;
        options.minimum_from = minimum_from;
        options.advisories = advisory;
        options.kprov_programs = kprov_programs;
        options.without_kprov = without_kprov;
        options.reuse = reuse;
        if let Some(url) = download_site {
            options.download_site = url;
        }
        if let Some(url) = registry {
            options.registry = url;
        }
        kprov_release::create_online(&options)
            .await
            .map_err(|e| hinted(e.hint(), e))?
    } else {
        let options = CreateOptions {
            from,
            version,
            out,
            arch,
            host_fallback: !no_host,
            signing_key,
            minimum_from,
            advisories: advisory,
            kprov_programs,
            without_kprov,
            reuse,
        };
        tokio::task::spawn_blocking(move || create(&options))
            .await?
            .map_err(|e| hinted(e.hint(), e))?
    };
    context.reporter.done("");
    describe(output, &payload, None)
}

async fn verify(context: &Kprov, path: &Utf8Path, trust: &TrustArgs, output: Output) -> Result<()> {
    let Trusted { payload, signature, .. } = verified(context, path, trust).await?;
    describe(output, &payload, Some(signature))
}

/// Opens a payload; nothing is verified.
pub(super) fn open(path: &Utf8Path) -> Result<Payload> {
    Payload::open(path).map_err(|e| hinted(e.hint(), e))
}

/// A payload whose digests are good, and what its signature is worth.
pub(super) struct Trusted {
    /// The payload.
    pub payload: Payload,
    /// Its signature in words.
    pub signature: String,
    /// The trusted key it is signed by, id and PEM.
    pub signer: Option<(String, String)>,
}

/// Opens a payload and checks its signature and every digest.
pub(super) async fn verified(context: &Kprov, path: &Utf8Path, trust: &TrustArgs) -> Result<Trusted> {
    let payload = open(path)?;
    let trusted = trusted_keys(context, trust)?;
    let options = VerifyOptions {
        allow_unsigned: trust.insecure_release,
    };
    tokio::task::spawn_blocking(move || {
        let verified = payload.verify(&trusted, options).map_err(|e| hinted(e.hint(), e))?;
        let (signature, signer) = match verified.signature {
            Ok(key) => (
                format!("signed by {key}"),
                trusted.get(&key).map(|public| (key.to_string(), public.to_pem())),
            ),
            Err(problem) => (
                format!("NOT trusted ({problem}); taken because of --insecure-release"),
                None,
            ),
        };
        Ok(Trusted {
            payload,
            signature,
            signer,
        })
    })
    .await?
}

fn show(path: &Utf8Path, output: Output) -> Result<()> {
    describe(output, &open(path)?, None)
}

fn describe(output: Output, payload: &Payload, signature: Option<String>) -> Result<()> {
    let shown = Shown {
        schema_version: 1,
        path: payload.root(),
        digest: payload.digest().to_string(),
        signature,
        release: payload.release(),
    };
    print::result(output, &shown, human)
}

fn human(shown: &Shown<'_>) -> String {
    use std::fmt::Write as _;
    let Shown {
        schema_version: _,
        path,
        digest,
        signature,
        release,
    } = shown;
    let mut text = format!("Kubernetes {} in `{path}`\nrelease.json {digest}\n", release.kubernetes);
    if let Some(signature) = signature {
        let _ = writeln!(text, "{signature}; every digest is right");
    }
    if let Some(from) = &release.minimum_from {
        let _ = writeln!(text, "may be reached from {from} on");
    }
    if !release.advisories.is_empty() {
        let _ = writeln!(text, "fixes {}", release.advisories.join(", "));
    }
    let version = |v: &Option<String>| v.clone().unwrap_or_else(|| "-".into());
    text.push('\n');
    text.push_str(&print::table(
        &["image", "version", "digest"],
        release
            .images
            .values()
            .map(|i| vec![i.reference.clone(), version(&i.version), short(i.digest.hex())]),
    ));
    text.push('\n');
    text.push_str(&print::table(
        &["host file", "arch", "version", "size", "digest"],
        release.host_files.iter().map(|f| {
            let mib = f.size.div_ceil(1024 * 1024);
            vec![
                f.name.clone(),
                f.arch.as_str().into(),
                version(&f.version),
                format!("{mib} MiB"),
                short(f.digest.hex()),
            ]
        }),
    ));
    text
}

fn short(hex: &str) -> String {
    hex.chars().take(16).collect()
}

async fn push(context: &Kprov, path: &Utf8Path, access: &AccessArgs, trust: &TrustArgs) -> Result<()> {
    let access = Access::open(context, access).await?;
    context.reporter.step("", "verify the release payload");
    let at_hand = payloads::verify(context, trust, path).await?;
    let release = upload::push(&access, &context.reporter, &at_hand).await?;
    context.reporter.done("");
    print::raw(&format!(
        "cluster `{}` knows Kubernetes {} now; `kprov upgrade --to {}` changes to it\n",
        access.name, release.version, release.version
    ))
}

async fn serve(context: &Kprov, path: &Utf8Path, listen: std::net::SocketAddr) -> Result<()> {
    let payload = Payload::open(path).map_err(|e| hinted(e.hint(), e))?;
    let listener = tokio::net::TcpListener::bind(listen).await.or_hint(
        format!("can't listen on `{listen}`"),
        "give another address or port with `--listen`",
    )?;
    context.reporter.note(&format!(
        "offering Kubernetes {} at http://{}; end with Ctrl-C",
        payload.release().kubernetes,
        listener.local_addr()?
    ));
    let stop = CancellationToken::new();
    let ended = stop.clone();
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::spawn(async move {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
        ended.cancel();
    });
    let offered = Content::new(payload).map_err(|e| hinted(e.hint(), e))?;
    kprov_release::serve::serve(listener, offered, stop)
        .await
        .context("the server ended")
}

fn keygen(context: &Kprov, out: &Utf8Path) -> Result<()> {
    if out.exists() {
        return Err(UserError::new(format!("`{out}` exists already"))
            .hint("a key that is lost can't be made again; choose another name")
            .into());
    }
    let key = SigningKey::generate().map_err(|e| hinted(e.hint(), e))?;
    let public = key.save(out).map_err(|e| hinted(e.hint(), e))?;
    context.reporter.note(&format!(
        "private key `{out}`; public key `{public}`, for the `keys/` directory of all who shall trust it"
    ));
    Ok(())
}

fn load_key(path: &Utf8Path) -> Result<SigningKey> {
    SigningKey::load(path).map_err(|e| hinted(e.hint(), e))
}

/// One's own key, made at first use. Its public half lies beside it, and so is trusted by this home alone.
fn own_key(context: &Kprov) -> Result<SigningKey> {
    let dir = context.home.keys();
    let path = dir.join(OWN_KEY);
    if path.exists() {
        return load_key(&path);
    }
    std::fs::create_dir_all(&dir).or_hint(format!("can't make `{dir}`"), "give another home with `--home DIR`")?;
    let key = SigningKey::generate().map_err(|e| hinted(e.hint(), e))?;
    let public = key.save(&path).map_err(|e| hinted(e.hint(), e))?;
    context.reporter.note(&format!(
        "made a signing key of your own, `{path}`; give `{public}` to those who shall trust your payloads"
    ));
    Ok(key)
}

fn trusted_keys(context: &Kprov, trust: &TrustArgs) -> Result<TrustedKeys> {
    let mut paths: Vec<Utf8PathBuf> = trust.release_key.clone();
    let dir = context.home.keys();
    if dir.is_dir() {
        paths.push(dir);
    }
    TrustedKeys::load(&paths).map_err(|e| hinted(e.hint(), e))
}

/// An error of the release crate as the user's own, with its hint.
pub(super) fn hinted(hint: Option<String>, error: impl std::error::Error + Send + Sync + 'static) -> anyhow::Error {
    let message = UserError::new(error.to_string());
    let error = anyhow::Error::from(error);
    match hint {
        Some(hint) => error.context(message.hint(hint)),
        None => error.context(message),
    }
}
