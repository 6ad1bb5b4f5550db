//! `kprov kubeconfig`: print a cluster's kubeconfig, or merge it into the user's.

use anyhow::{Context as _, Result};
use camino::{Utf8Path, Utf8PathBuf};
use serde_json::{Value, json};

use super::Context;
use crate::cli::KubeconfigArgs;
use crate::failure::{OrHint as _, UserError};
use crate::home::write_private;
use crate::print;

pub(super) fn run(context: &Context, args: &KubeconfigArgs) -> Result<()> {
    let cluster = context.home.pick(args.name.name.as_ref())?;
    let path = cluster.kubeconfig();
    let text = std::fs::read_to_string(&path).or_hint(
        format!("there is no kubeconfig of cluster `{}` yet", cluster.name),
        format!("make the cluster with `kprov up --name {}`", cluster.name),
    )?;
    if !args.merge {
        return print::raw(&text);
    }
    let target = user_kubeconfig()?;
    let ours: Value = serde_saphyr::from_str(&text).with_context(|| format!("`{path}` is damaged"))?;
    let theirs: Value = match std::fs::read_to_string(&target) {
        Ok(text) if !text.trim().is_empty() => serde_saphyr::from_str(&text).or_hint(
            format!("`{target}` is no kubeconfig"),
            "mend it, or point KUBECONFIG at another file",
        )?,
        Ok(_) => json!({}),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => json!({}),
        Err(e) => return Err(e).with_context(|| format!("can't read `{target}`")),
    };
    let merged = merge(theirs, &ours).ok_or_else(|| {
        UserError::new(format!("`{target}` is no kubeconfig")).hint("mend it, or point KUBECONFIG at another file")
    })?;
    if let Some(dir) = target.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("can't make `{dir}`"))?;
    }
    write_private(&target, serde_saphyr::to_string(&merged)?.as_bytes())?;
    context.reporter.note(&format!(
        "merged into `{target}`; the current context is `{}`",
        merged["current-context"].as_str().unwrap_or_default()
    ));
    Ok(())
}

/// The first file of `$KUBECONFIG`, else ~/.kube/config, as kubectl writes to.
fn user_kubeconfig() -> Result<Utf8PathBuf> {
    if let Ok(list) = std::env::var("KUBECONFIG")
        && let Some(first) = list.split(':').find(|p| !p.is_empty())
    {
        return Ok(Utf8PathBuf::from(first));
    }
    std::env::home_dir()
        .and_then(|h| Utf8PathBuf::from_path_buf(h).ok())
        .map(|h| h.join(Utf8Path::new(".kube/config")))
        .context("can't tell your home directory; set HOME or KUBECONFIG")
}

/// Puts `ours`' clusters, users and contexts into `theirs`, replacing those of the same name and keeping all else; `None`
/// if `theirs` isn't a kubeconfig.
fn merge(theirs: Value, ours: &Value) -> Option<Value> {
    let mut merged = match theirs {
        Value::Object(map) => map,
        Value::Null => serde_json::Map::new(),
        _ => return None,
    };
    merged.entry("apiVersion").or_insert_with(|| json!("v1"));
    merged.entry("kind").or_insert_with(|| json!("Config"));
    for list in ["clusters", "users", "contexts"] {
        let entry = merged.entry(list).or_insert_with(|| json!([]));
        if entry.is_null() {
            *entry = json!([]);
        }
        let existing = entry.as_array_mut()?;
        for new in ours.get(list).and_then(Value::as_array).into_iter().flatten() {
            existing.retain(|old| old.get("name") != new.get("name"));
            existing.push(new.clone());
        }
    }
    merged.insert(
        "current-context".into(),
        ours.get("current-context").cloned().unwrap_or_default(),
    );
    Some(Value::Object(merged))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_keeps_what_is_not_ours() {
        let ours = json!({
            "clusters": [{"name": "demo", "cluster": {"server": "new"}}],
            "users": [{"name": "demo"}], "contexts": [{"name": "demo"}], "current-context": "demo",
        });
        let theirs = json!({
            "apiVersion": "v1", "kind": "Config", "preferences": {"colors": true}, "users": null,
            "clusters": [{"name": "prod"}, {"name": "demo", "cluster": {"server": "old"}}], "current-context": "prod",
        });
        let merged = merge(theirs, &ours).unwrap();
        assert_eq!(
            merged["clusters"],
            json!([{"name": "prod"}, {"name": "demo", "cluster": {"server": "new"}}])
        );
        assert_eq!(merged["preferences"], json!({"colors": true}));
        assert_eq!(merged["current-context"], "demo");
        assert_eq!(merge(merged.clone(), &ours).unwrap(), merged);
        assert!(merge(json!("text"), &ours).is_none());
    }
}
