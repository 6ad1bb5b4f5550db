//! What has to be given to a [store](crate::store) so that machines can fetch a release from it.

use std::collections::BTreeSet;

use kprov_types::Digest;
use kprov_types::release::{FileSource, Release};

use crate::payload::{PAYLOAD_REGISTRY, Payload, PayloadError};

/// The blobs that a payload carries, each with its size in bytes, in the order in which a store takes them: manifests first, then
/// what those name and host files, the largest first; each once. Reads and checks the manifests; a payload that refers to other
/// places for everything has none.
pub fn blobs_of(payload: &Payload) -> Result<Vec<(Digest, u64)>, PayloadError> {
    let blobs = payload.blobs()?;
    let mut seen = BTreeSet::new();
    Ok(blobs
        .into_iter()
        .filter(|(digest, _)| seen.insert(digest.clone()))
        .collect())
}

/// What a release names of what its payload carries: manifests of images, and host files. A store that wants these takes all
/// of [`blobs_of`].
pub fn named_by(release: &Release) -> BTreeSet<Digest> {
    let images = release
        .images
        .values()
        .filter(|image| image.registry() == PAYLOAD_REGISTRY)
        .map(|image| image.digest.clone());
    let files = release
        .host_files
        .iter()
        .filter(|file| file.source == FileSource::Carried)
        .map(|file| file.digest.clone());
    images.chain(files).collect()
}
