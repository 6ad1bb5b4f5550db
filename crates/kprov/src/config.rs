//! From a cluster file and flags to a checked [`ClusterSpec`].

use std::io::Read as _;

use anyhow::Result;
use camino::{Utf8Path, Utf8PathBuf};
use kprov_types::ClusterName;
use kprov_types::cluster::{ClusterFile, ClusterSpec};

use crate::cli::ClusterArgs;
use crate::failure::{OrHint as _, UserError};

/// The cluster that is meant where neither a name nor a file is given.
const DEFAULT_NAME: &str = "kprov";

/// What is asked for: the cluster, and where its release is.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// The file's content with the flags on top, to be kept with the cluster.
    pub file: ClusterFile,
    /// The same, checked.
    pub spec: ClusterSpec,
    /// The release payload's directory, if one was named.
    pub release: Option<Utf8PathBuf>,
}

/// Reads the cluster file if one is given, puts the flags on top, and checks the whole. `known` is what an earlier `up` of
/// this name kept, and serves as the base where no file is given.
pub(crate) fn load(
    args: &ClusterArgs,
    known: impl FnOnce(&ClusterName) -> Option<(ClusterFile, Option<Utf8PathBuf>)>,
) -> Result<Wanted> {
    let ClusterArgs {
        file: path,
        name,
        provider,
        kubernetes,
        control_plane,
        workers,
        release,
        release_url,
        network,
        region,
        profile,
        inventory,
    } = args;
    let (mut file, mut base_release) = match (path, name) {
        (Some(path), _) => {
            let file = read(path)?;
            let base = path.parent().map_or_else(Utf8PathBuf::new, Utf8Path::to_owned);
            let release = file.spec.kubernetes.release.as_ref().map(|r| base.join(r));
            (file, release)
        }
        (None, name) => {
            let name = name.clone().map_or_else(|| ClusterName::new(DEFAULT_NAME), Ok)?;
            known(&name).unwrap_or_else(|| (ClusterFile::named(name), None))
        }
    };
    if let Some(name) = name {
        file.metadata.name = name.clone();
    }
    let spec = &mut file.spec;
    if let Some(v) = provider {
        spec.provider = *v;
    }
    if let Some(v) = kubernetes {
        spec.kubernetes.version = Some(v.clone());
    }
    if let Some(v) = control_plane {
        spec.control_plane.count = *v;
    }
    if let Some(v) = workers {
        spec.workers.count = *v;
    }
    if let Some(v) = network {
        spec.network.machines = Some(*v);
    }
    if let Some(v) = region {
        spec.aws.region = Some(v.clone());
    }
    if let Some(v) = profile {
        spec.aws.profile = Some(v.clone());
    }
    if !release_url.is_empty() {
        spec.kubernetes.release_urls.clone_from(release_url);
    }
    if let Some(v) = release {
        base_release = Some(v.clone());
    }
    // Kept with the cluster, and so found from anywhere.
    let named = spec.baremetal.inventory.as_deref().map(Utf8Path::new);
    let beside = path.as_deref().and_then(Utf8Path::parent).unwrap_or(Utf8Path::new(""));
    if let Some(inventory) = inventory.clone().or_else(|| named.map(|named| beside.join(named))) {
        let absolute =
            camino::absolute_utf8(&inventory).or_hint(format!("can't find `{inventory}`"), "check the path")?;
        spec.baremetal.inventory = Some(absolute.into_string());
    }
    let checked = file.validate().or_hint(
        path.as_ref().map_or_else(
            || "the cluster asked for can't be made".to_owned(),
            |p| format!("`{p}` can't be used"),
        ),
        "`kprov schema` prints what a cluster file may say",
    )?;
    Ok(Wanted {
        file,
        spec: checked,
        release: base_release,
    })
}

fn read(path: &Utf8Path) -> Result<ClusterFile> {
    let text = if path == "-" {
        let mut text = String::new();
        std::io::stdin()
            .read_to_string(&mut text)
            .or_hint("can't read the cluster file from stdin", "it must be UTF-8 text")?;
        text
    } else {
        std::fs::read_to_string(path).or_hint(format!("can't read the cluster file `{path}`"), "check the path")?
    };
    parse(path.as_str(), &text)
}

/// Parses a cluster file; errors name the file, the line and column, and the field.
pub(crate) fn parse(name: &str, text: &str) -> Result<ClusterFile> {
    serde_saphyr::from_str(text).map_err(|e| {
        let place = e
            .location()
            .map_or_else(String::new, |l| format!(":{}:{}", l.line(), l.column()));
        let text = e.to_string();
        let first = text.lines().next().unwrap_or_default();
        // The place stands before it already.
        let message = first
            .strip_prefix("error: line ")
            .and_then(|r| r.split_once(": "))
            .map_or(first, |(_, m)| m);
        anyhow::anyhow!("{message}").context(
            UserError::new(format!("`{name}{place}` is not a cluster file"))
                .hint("`kprov schema` prints what a cluster file may say"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::render;

    fn workspace(path: &str) -> Utf8PathBuf {
        Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
    }

    #[test]
    fn examples_are_valid() {
        let mut count = 0;
        for entry in workspace("examples").read_dir_utf8().unwrap() {
            let path = entry.unwrap().into_path();
            if path.is_dir() {
                continue;
            }
            read(&path)
                .unwrap()
                .validate()
                .unwrap_or_else(|e| panic!("`{path}`: {e}"));
            count += 1;
        }
        assert!(count >= 2);
    }

    /// `docs/cluster.schema.json` is what `kprov schema` prints. Write it anew with
    /// `cargo run -p kprov -- schema > docs/cluster.schema.json`.
    #[test]
    fn the_published_schema_is_current() {
        let published = std::fs::read_to_string(workspace("docs/cluster.schema.json")).unwrap();
        let schema = schemars::schema_for!(ClusterFile);
        assert_eq!(published, serde_json::to_string_pretty(&schema).unwrap() + "\n");
    }

    #[test]
    fn errors_name_file_line_and_field() {
        let text = "apiVersion: kprov.io/v1alpha1\nkind: Cluster\nmetadata:\n  name: demo\nspec:\n  controlPlan:\n    count: 1\n";
        let shown = render(&parse("c.yaml", text).unwrap_err());
        assert!(shown.contains("`c.yaml:6:"), "{shown}");
        assert!(shown.contains("controlPlan"), "{shown}");

        let shown = render(&parse("c.yaml", "kind: [").unwrap_err());
        assert!(shown.contains("`c.yaml:"), "{shown}");

        let text = text
            .replace("controlPlan:", "controlPlane:")
            .replace("count: 1", "count: many");
        let shown = render(&parse("c.yaml", &text).unwrap_err());
        assert!(shown.contains("`c.yaml:7:"), "{shown}");
    }
}
