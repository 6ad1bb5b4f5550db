//! Writing an OCI image layout (OCI image specification 1.1, `image-layout.md`).

use std::fs::{self, File};
use std::io::{BufWriter, Write};

use camino::{Utf8Path, Utf8PathBuf};
use kprov_types::Digest;
use kprov_types::release::Arch;
use oci_spec::image::{
    ConfigBuilder, Descriptor, DescriptorBuilder, ImageConfigurationBuilder, ImageIndexBuilder, ImageManifestBuilder,
    MediaType, OciLayoutBuilder, Os, PlatformBuilder, RootFsBuilder,
};
use serde::Serialize;

use crate::digest::{self, Hasher, HashingWriter};
use crate::output::OutputError;
use crate::rootfs::Rootfs;

/// Where blobs are in a payload.
pub(crate) const BLOBS: &str = "blobs/sha256";

/// `created` of every image: a time that is the same on every run.
const CREATED: &str = "1970-01-01T00:00:00Z";

/// `PATH` of every image.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A layout being written.
pub(crate) struct LayoutWriter {
    root: Utf8PathBuf,
    arch: Arch,
    images: Vec<Descriptor>,
}

/// A blob that was written.
#[derive(Clone, Debug)]
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

impl LayoutWriter {
    /// Begins a layout in an empty directory.
    pub(crate) fn new(root: &Utf8Path, arch: Arch) -> Result<Self, OutputError> {
        let blobs = root.join(BLOBS);
        fs::create_dir_all(&blobs).map_err(|source| OutputError::Write { path: blobs, source })?;
        Ok(Self {
            root: root.to_owned(),
            arch,
            images: Vec::new(),
        })
    }

    /// Adds what `write` writes as a blob.
    fn blob(
        &self,
        write: impl FnOnce(&mut HashingWriter<BufWriter<File>>, &Utf8Path) -> Result<(), OutputError>,
    ) -> Result<Blob, OutputError> {
        let new = self.root.join(BLOBS).join("new");
        let failed = |source| OutputError::Write {
            path: new.clone(),
            source,
        };
        let mut writer = HashingWriter::new(BufWriter::with_capacity(
            256 * 1024,
            File::create(&new).map_err(failed)?,
        ));
        write(&mut writer, &new)?;
        writer.flush().map_err(failed)?;
        let (_, hasher) = writer.finish();
        self.named(&new, hasher)
    }

    fn named(&self, new: &Utf8Path, hasher: Hasher) -> Result<Blob, OutputError> {
        let size = hasher.size();
        let digest = hasher.digest();
        let path = self.root.join(BLOBS).join(digest.hex());
        fs::rename(new, &path).map_err(|source| OutputError::Write { path, source })?;
        Ok(Blob { digest, size })
    }

    /// Adds a file as a blob.
    pub(crate) fn file(&self, from: &Utf8Path) -> Result<Blob, OutputError> {
        let unreadable = |source| OutputError::Read {
            path: from.to_owned(),
            source,
        };
        let mut source = File::open(from).map_err(unreadable)?;
        self.blob(|writer, new| {
            // Which of the two failed is told by reading in pieces.
            let mut failed = None;
            let read = digest::of_reader(&mut source, |piece| {
                writer.write_all(piece).map_err(|source| {
                    failed = Some(OutputError::Write {
                        path: new.to_owned(),
                        source,
                    });
                    std::io::ErrorKind::Other.into()
                })
            });
            match failed {
                Some(error) => Err(error),
                None => read.map(drop).map_err(unreadable),
            }
        })
    }

    /// Adds a JSON document as a blob.
    fn json(&self, document: &impl Serialize) -> Result<Blob, OutputError> {
        let bytes = encode(document)?;
        self.blob(|writer, new| {
            writer.write_all(&bytes).map_err(|source| OutputError::Write {
                path: new.to_owned(),
                source,
            })
        })
    }

    /// Adds an image with one uncompressed layer and returns the digest of its manifest.
    pub(crate) fn image(&mut self, reference: &str, rootfs: &Rootfs, entrypoint: &str) -> Result<Digest, OutputError> {
        let layer = self.blob(|writer, new| {
            rootfs.write(writer).map_err(|source| OutputError::Write {
                path: new.to_owned(),
                source,
            })
        })?;
        let platform = || oci_arch(self.arch);
        let config = ConfigBuilder::default()
            .env([PATH.to_owned()])
            .entrypoint([entrypoint.to_owned()])
            .working_dir("/")
            .build()?;
        // The layer is not compressed, so its digest is its `diff_id` too.
        let root = RootFsBuilder::default()
            .typ("layers")
            .diff_ids([layer.digest.to_string()])
            .build()?;
        let configuration = ImageConfigurationBuilder::default()
            .created(CREATED)
            .architecture(platform())
            .os(Os::Linux)
            .config(config)
            .rootfs(root)
            .build()?;
        let configuration = self.json(&configuration)?;
        let manifest = ImageManifestBuilder::default()
            .schema_version(2_u32)
            .media_type(MediaType::ImageManifest)
            .config(descriptor(MediaType::ImageConfig, &configuration)?)
            .layers([descriptor(MediaType::ImageLayer, &layer)?])
            .build()?;
        let manifest = self.json(&manifest)?;
        let mut entry = descriptor(MediaType::ImageManifest, &manifest)?;
        entry.set_platform(Some(
            PlatformBuilder::default()
                .architecture(platform())
                .os(Os::Linux)
                .build()?,
        ));
        let name = ("org.opencontainers.image.ref.name".to_owned(), reference.to_owned());
        entry.set_annotations(Some([name].into()));
        self.images.push(entry);
        Ok(manifest.digest)
    }

    /// Writes `index.json` and `oci-layout`.
    pub(crate) fn finish(self) -> Result<(), OutputError> {
        let index = ImageIndexBuilder::default()
            .schema_version(2_u32)
            .media_type(MediaType::ImageIndex)
            .manifests(self.images)
            .build()?;
        let layout = OciLayoutBuilder::default().image_layout_version("1.0.0").build()?;
        for (name, bytes) in [("index.json", encode(&index)?), ("oci-layout", encode(&layout)?)] {
            let path = self.root.join(name);
            fs::write(&path, bytes).map_err(|source| OutputError::Write { path, source })?;
        }
        Ok(())
    }
}

fn encode(document: &impl Serialize) -> Result<Vec<u8>, OutputError> {
    serde_json::to_vec(document).map_err(|e| OutputError::Encode(e.into()))
}

fn descriptor(media_type: MediaType, blob: &Blob) -> Result<Descriptor, OutputError> {
    let digest: oci_spec::image::Digest = blob.digest.as_str().parse()?;
    Ok(DescriptorBuilder::default()
        .media_type(media_type)
        .digest(digest)
        .size(blob.size)
        .build()?)
}

fn oci_arch(arch: Arch) -> oci_spec::image::Arch {
    match arch {
        Arch::Amd64 => oci_spec::image::Arch::Amd64,
        Arch::Arm64 => oci_spec::image::Arch::ARM64,
    }
}
