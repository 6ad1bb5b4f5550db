//! Writing an OCI image layout (OCI image specification 1.1, `image-layout.md`).

use std::fs::{self, File};
use std::io::{self, BufWriter, Read as _, Write};
use std::sync::atomic::{AtomicUsize, Ordering};

use camino::{Utf8Path, Utf8PathBuf};
use kprov_types::Digest;
use kprov_types::release::Arch;
use oci_spec::image::{
    ConfigBuilder, Descriptor, DescriptorBuilder, ImageConfigurationBuilder, ImageIndexBuilder, ImageManifestBuilder,
    MediaType, OciLayoutBuilder, Os, PlatformBuilder, RootFsBuilder,
};
use serde::Serialize;

use crate::digest::{self, HashingWriter};
use crate::output::OutputError;
use crate::rootfs::Rootfs;

/// Where blobs are in a payload.
pub(crate) const BLOBS: &str = "blobs/sha256";

/// How much of a file is copied at once.
const COPY: usize = 256 * 1024;

/// `created` of every image: a time that is the same on every run.
const CREATED: &str = "1970-01-01T00:00:00Z";

/// `PATH` of every image.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A layout being written, by several threads if they like.
pub(crate) struct LayoutWriter {
    root: Utf8PathBuf,
    arch: Arch,
    /// Payloads whose blobs may be linked instead of written again.
    reuse: Vec<Utf8PathBuf>,
    /// How many blobs were begun.
    begun: AtomicUsize,
}

/// Writes a blob's bytes; the path is for messages.
type Writes<'a> = dyn Fn(&mut dyn Write, &Utf8Path) -> Result<(), OutputError> + 'a;

/// An image that was written.
pub(crate) struct Image {
    /// The digest of its manifest.
    pub(crate) digest: Digest,
    /// What the layout's index says of it.
    entry: Descriptor,
}

/// A blob that was written.
#[derive(Clone, Debug)]
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

impl LayoutWriter {
    /// Begins a layout in an empty directory.
    pub(crate) fn new(root: &Utf8Path, arch: Arch, reuse: &[Utf8PathBuf]) -> Result<Self, OutputError> {
        let blobs = root.join(BLOBS);
        fs::create_dir_all(&blobs).map_err(|source| OutputError::Write { path: blobs, source })?;
        Ok(Self {
            root: root.to_owned(),
            arch,
            reuse: reuse.to_owned(),
            begun: AtomicUsize::new(0),
        })
    }

    /// Adds what `write` writes as a blob. It may be called twice, and must write the same.
    fn blob(&self, write: &Writes<'_>) -> Result<Blob, OutputError> {
        let number = self.begun.fetch_add(1, Ordering::Relaxed);
        let new = self.root.join(BLOBS).join(format!("new-{number}"));
        let failed = |source| OutputError::Write {
            path: new.clone(),
            source,
        };
        if !self.reuse.is_empty() {
            let mut writer = HashingWriter::new(io::sink());
            write(&mut writer, &new)?;
            let (_, hasher) = writer.finish();
            let size = hasher.size();
            let digest = hasher.digest();
            if self.link(&digest, size) {
                return Ok(Blob { digest, size });
            }
        }
        let file = File::create(&new).map_err(failed)?;
        let mut writer = HashingWriter::new(BufWriter::with_capacity(256 * 1024, file));
        write(&mut writer, &new)?;
        writer.flush().map_err(failed)?;
        let (_, hasher) = writer.finish();
        let size = hasher.size();
        let digest = hasher.digest();
        let path = self.root.join(BLOBS).join(digest.hex());
        fs::rename(&new, &path).map_err(|source| OutputError::Write { path, source })?;
        Ok(Blob { digest, size })
    }

    /// Links a blob of another payload, if one has it on this file system, and unaltered.
    fn link(&self, digest: &Digest, size: u64) -> bool {
        let unaltered = |path: &Utf8Path| -> io::Result<bool> {
            let file = File::open(path)?;
            Ok(file.metadata()?.len() == size && digest::of_reader(file, |_| Ok(()))?.digest() == *digest)
        };
        let here = self.root.join(BLOBS).join(digest.hex());
        let mut others = self.reuse.iter().map(|other| other.join(BLOBS).join(digest.hex()));
        others.any(|other| {
            unaltered(&other).unwrap_or(false)
                && match fs::hard_link(&other, &here) {
                    // Two threads had the same blob.
                    Err(error) => error.kind() == io::ErrorKind::AlreadyExists,
                    Ok(()) => true,
                }
        })
    }

    /// Adds a file as a blob.
    pub(crate) fn file(&self, from: &Utf8Path) -> Result<Blob, OutputError> {
        let unreadable = |source| OutputError::Read {
            path: from.to_owned(),
            source,
        };
        self.blob(&|writer, new| {
            let mut source = File::open(from).map_err(unreadable)?;
            let mut buffer = vec![0; COPY];
            // Which of the two failed is told by doing them one by one.
            loop {
                match source.read(&mut buffer) {
                    Ok(0) => return Ok(()),
                    Ok(n) => writer.write_all(&buffer[..n]).map_err(|source| OutputError::Write {
                        path: new.to_owned(),
                        source,
                    })?,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(unreadable(error)),
                }
            }
        })
    }

    /// Adds a JSON document as a blob.
    fn json(&self, document: &impl Serialize) -> Result<Blob, OutputError> {
        let bytes = encode(document)?;
        self.blob(&|writer, new| {
            writer.write_all(&bytes).map_err(|source| OutputError::Write {
                path: new.to_owned(),
                source,
            })
        })
    }

    /// Adds an image with one uncompressed layer.
    pub(crate) fn image(&self, reference: &str, rootfs: &Rootfs, entrypoint: &str) -> Result<Image, OutputError> {
        let layer = self.blob(&|writer, new| {
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
        let digest = manifest.digest;
        Ok(Image { digest, entry })
    }

    /// Writes `index.json`, with these images, and `oci-layout`.
    pub(crate) fn finish(self, images: Vec<Image>) -> Result<(), OutputError> {
        let index = ImageIndexBuilder::default()
            .schema_version(2_u32)
            .media_type(MediaType::ImageIndex)
            .manifests(images.into_iter().map(|i| i.entry).collect::<Vec<_>>())
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
