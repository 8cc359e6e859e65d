//! Puts layers into OCI layouts and docker archives, and reads blobs back out of them.
//!
//! Documents are written with spaces and in an unusual order on purpose: whoever parses one and
//! writes it again instead of keeping its bytes is found out by its digest.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};

use crate::{
    sha256_hex,
    tar::{self, Member},
    tools,
};

/// How a layer's bytes are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Not at all.
    Plain,
    /// gzip, with a file name and a time in its header, which nobody would write again by chance.
    Gzip,
    /// zstd.
    Zstd,
}

impl Packing {
    /// All of them.
    pub const ALL: [Packing; 3] = [Packing::Plain, Packing::Gzip, Packing::Zstd];

    /// The media type of a layer so packed.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Plain => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }

    /// Packs some bytes.
    pub fn pack(self, bytes: &[u8]) -> Vec<u8> {
        match self {
            Self::Plain => bytes.to_vec(),
            Self::Gzip => {
                let builder = flate2::GzBuilder::new().filename("layer").mtime(77);
                let mut gzip = builder.write(Vec::new(), flate2::Compression::fast());
                gzip.write_all(bytes).and_then(|()| gzip.finish()).expect("because memory takes every write")
            }
            Self::Zstd => zstd::encode_all(bytes, 1).expect("because memory takes every write"),
        }
    }
}

/// What some bytes were before they were packed.
///
/// # Panics
/// When they were not packed so.
pub fn unpack(packing: Packing, bytes: &[u8]) -> Vec<u8> {
    let mut unpacked = Vec::new();
    let read = match packing {
        Packing::Plain => return bytes.to_vec(),
        Packing::Gzip => flate2::read::MultiGzDecoder::new(bytes).read_to_end(&mut unpacked).map(drop),
        Packing::Zstd => zstd::stream::copy_decode(bytes, &mut unpacked),
    };
    read.unwrap_or_else(|error| panic!("unpack: {error}"));
    unpacked
}

/// Packs with zstd what is written to it, for inputs too big to hold.
pub fn zstd_writer() -> zstd::Encoder<'static, Vec<u8>> {
    zstd::Encoder::new(Vec::new(), 1).expect("because memory takes every write")
}

/// An image in the making.
#[derive(Debug, Clone)]
pub struct Image {
    tag: String,
    layers: Vec<LayerBlob>,
    config: Value,
    architecture: String,
    created_by: Option<String>,
    entries: Option<Vec<Value>>,
    manifest_type: &'static str,
}

#[derive(Debug, Clone)]
struct LayerBlob {
    diff_id: String,
    bytes: Vec<u8>,
    media_type: String,
}

impl Image {
    /// An image without layers, to be called `name:tag` or `host/name:tag`.
    pub fn new(tag: &str) -> Self {
        Self {
            tag: tag.to_owned(),
            layers: Vec::new(),
            config: json!({ "Env": ["PATH=/bin:/sbin:/usr/bin:/usr/sbin"], "Cmd": ["/bin/sh"] }),
            architecture: architecture().to_owned(),
            created_by: None,
            entries: None,
            manifest_type: "application/vnd.oci.image.manifest.v1+json",
        }
    }

    /// One more layer on top, of these members.
    #[must_use]
    pub fn layer(self, members: &[Member], packing: Packing) -> Self {
        self.layer_tar(&tar::archive(members), packing)
    }

    /// One more layer on top, of a tar made elsewhere.
    #[must_use]
    pub fn layer_tar(self, tar: &[u8], packing: Packing) -> Self {
        let diff_id = format!("sha256:{}", sha256_hex(tar));
        self.layer_raw(&diff_id, packing.pack(tar), packing.media_type())
    }

    /// One more layer on top, of which nothing need be true.
    #[must_use]
    pub fn layer_raw(mut self, diff_id: &str, bytes: Vec<u8>, media_type: &str) -> Self {
        self.layers.push(LayerBlob { diff_id: diff_id.to_owned(), bytes, media_type: media_type.to_owned() });
        self
    }

    /// A field of the run configuration, such as `Entrypoint`.
    #[must_use]
    pub fn config(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    /// The same for another architecture, in Go's words.
    #[must_use]
    pub fn made_for(self, architecture: &str) -> Self {
        Self { architecture: architecture.to_owned(), ..self }
    }

    /// What its history says of how each layer was made.
    #[must_use]
    pub fn history(self, created_by: &str) -> Self {
        Self { created_by: Some(created_by.to_owned()), ..self }
    }

    /// Its whole history: a text for each entry, and whether that made a layer.
    #[must_use]
    pub fn entries(self, entries: &[(&str, bool)]) -> Self {
        let entry = |(text, layer): &(&str, bool)| match layer {
            true => json!({ "created_by": text }),
            false => json!({ "created_by": text, "empty_layer": true }),
        };
        Self { entries: Some(entries.iter().map(entry).collect()), ..self }
    }

    /// The same image by another name.
    #[must_use]
    pub fn named(self, tag: &str) -> Self {
        Self { tag: tag.to_owned(), ..self }
    }

    /// The name it will have.
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// The image ID: the digest of its config.
    pub fn id(&self) -> String {
        format!("sha256:{}", sha256_hex(&self.config_bytes()))
    }

    /// The digest of the n-th layer's blob, as hexadecimal digits.
    pub fn layer_digest(&self, n: usize) -> String {
        sha256_hex(&self.layers[n].bytes)
    }

    /// The digest of the manifest, as hexadecimal digits.
    pub fn manifest_digest(&self) -> String {
        sha256_hex(&self.manifest_bytes())
    }

    fn config_bytes(&self) -> Vec<u8> {
        let diff_ids: Vec<_> = self.layers.iter().map(|layer| &layer.diff_id).collect();
        let created_by = |n| self.created_by.clone().unwrap_or_else(|| format!("layer {n}"));
        let each_layer = || (0..self.layers.len()).map(|n| json!({ "created_by": created_by(n) })).collect();
        let history: Vec<Value> = self.entries.clone().unwrap_or_else(each_layer);
        pretty(&json!({
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "os": "linux",
            "history": history,
            "created": "2017-07-14T02:40:00Z",
            "config": self.config,
            "architecture": self.architecture,
        }))
    }

    fn manifest_bytes(&self) -> Vec<u8> {
        let layers: Vec<_> = self.layers.iter().map(|layer| descriptor(&layer.media_type, &layer.bytes)).collect();
        pretty(&json!({
            "schemaVersion": 2,
            "mediaType": self.manifest_type,
            "config": descriptor("application/vnd.oci.image.config.v1+json", &self.config_bytes()),
            "layers": layers,
        }))
    }

    /// Every blob of the OCI form: hexadecimal digest and bytes.
    pub fn blobs(&self) -> BTreeMap<String, Vec<u8>> {
        self.layers
            .iter()
            .map(|layer| layer.bytes.clone())
            .chain([self.config_bytes(), self.manifest_bytes()])
            .map(|bytes| (sha256_hex(&bytes), bytes))
            .collect()
    }

    fn index_bytes(&self) -> Vec<u8> {
        let mut manifest = descriptor(self.manifest_type, &self.manifest_bytes());
        let short = self.tag.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        manifest["annotations"] =
            json!({ "org.opencontainers.image.ref.name": short, "io.containerd.image.name": self.tag });
        pretty(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [manifest],
        }))
    }

    /// The files of the OCI layout, in the order an archive holds them.
    pub fn oci_files(&self) -> Vec<(String, Vec<u8>)> {
        let mut files: Vec<_> =
            self.blobs().into_iter().map(|(hex, bytes)| (format!("blobs/sha256/{hex}"), bytes)).collect();
        files.push(("index.json".to_owned(), self.index_bytes()));
        files.push(("oci-layout".to_owned(), br#"{"imageLayoutVersion": "1.0.0"}"#.to_vec()));
        files
    }

    /// The files of a docker archive. Layers are packed as they were added: docker writes them plain,
    /// others do not.
    pub fn docker_files(&self) -> Vec<(String, Vec<u8>)> {
        let config = self.config_bytes();
        let config_name = format!("{}.json", sha256_hex(&config));
        let names: Vec<_> = self.layers.iter().map(|layer| format!("{}/layer.tar", sha256_hex(&layer.bytes))).collect();
        let manifest = json!([{ "Config": config_name, "RepoTags": [self.tag], "Layers": names }]);
        let mut files: BTreeMap<_, _> =
            names.iter().cloned().zip(self.layers.iter().map(|layer| layer.bytes.clone())).collect();
        files.insert(config_name, config);
        files.insert("manifest.json".to_owned(), pretty(&manifest));
        files.into_iter().collect()
    }

    /// Writes an OCI layout directory.
    pub fn write_oci_dir(&self, dir: &Path) -> PathBuf {
        for (name, bytes) in self.oci_files() {
            let path = dir.join(name);
            fs::create_dir_all(path.parent().expect("because it is below dir"))
                .and_then(|()| fs::write(&path, bytes))
                .unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
        }
        dir.to_owned()
    }

    /// Writes an OCI layout as a tar archive.
    pub fn write_oci_tar(&self, path: &Path) -> PathBuf {
        write_archive(path, &self.oci_files())
    }

    /// Writes a docker archive.
    pub fn write_docker_archive(&self, path: &Path) -> PathBuf {
        write_archive(path, &self.docker_files())
    }
}

/// Writes files as a plain tar archive.
pub fn write_archive(path: &Path, files: &[(String, Vec<u8>)]) -> PathBuf {
    let members: Vec<_> = files.iter().map(|(name, bytes)| Member::file(name, bytes)).collect();
    fs::write(path, tar::archive(&members)).unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
    path.to_owned()
}

fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({ "size": bytes.len(), "digest": format!("sha256:{}", sha256_hex(bytes)), "mediaType": media_type })
}

fn pretty(document: &Value) -> Vec<u8> {
    serde_json::to_vec_pretty(document).expect("because a Value can always be written")
}

/// This machine's architecture by the name that images use.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Unpacks a tar archive (packed or not) with GNU tar.
pub fn untar(archive: &Path, into: &Path) -> PathBuf {
    fs::create_dir_all(into).unwrap_or_else(|error| panic!("make {}: {error}", into.display()));
    tools::run(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(into));
    into.to_owned()
}

/// Every blob of an OCI layout directory, each checked against its name.
///
/// # Panics
/// When a blob's bytes are not what its name says.
#[track_caller]
pub fn blobs_of(layout: &Path) -> BTreeMap<String, Vec<u8>> {
    let dir = layout.join("blobs/sha256");
    let list = fs::read_dir(&dir).unwrap_or_else(|error| panic!("list {}: {error}", dir.display()));
    list.map(|entry| {
        let path = entry.expect("because the list was just opened").path();
        let bytes = fs::read(&path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()));
        let name = path.file_name().expect("because it is in a directory").to_string_lossy().into_owned();
        assert_eq!(sha256_hex(&bytes), name, "a blob is not what its name says");
        (name, bytes)
    })
    .collect()
}

/// A root file system that can run shell scripts: a static busybox with its commands, the usual
/// directories and accounts. `None` where busybox-static is not installed.
pub fn busybox_members() -> Option<Vec<Member>> {
    let busybox = [Path::new("/bin/busybox"), Path::new("/usr/bin/busybox")].into_iter().find(|path| path.exists())?;
    let applets = tools::run(Command::new(busybox).arg("--list"));
    let mut members: Vec<_> = ["bin", "dev", "etc", "proc", "root", "sys", "usr", "usr/bin", "var", "run"]
        .map(Member::dir)
        .into_iter()
        .chain([Member::dir("tmp").mode(0o1777)])
        .collect();
    let bytes = fs::read(busybox).unwrap_or_else(|error| panic!("read {}: {error}", busybox.display()));
    members.push(Member::file("bin/busybox", bytes).mode(0o755));
    members.extend(
        applets.lines().filter(|name| *name != "busybox").map(|name| Member::symlink(format!("bin/{name}"), "busybox")),
    );
    members.push(Member::symlink("usr/bin/env", "/bin/busybox"));
    members.push(Member::file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/:/bin/sh\n"));
    members.push(Member::file("etc/group", "root:x:0:\napp:x:1000:\nextra:x:1001:app\n"));
    Some(members)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{scratch::Scratch, tree::Tree};

    fn sample() -> Image {
        Image::new("localhost/sample:1")
            .layer(&[Member::dir("d"), Member::file("d/a", "one"), Member::file("d/b", "two")], Packing::Gzip)
            .layer(&[Member::whiteout("d/a"), Member::file("c", "three")], Packing::Plain)
    }

    #[test]
    fn skopeo_and_umoci_read_the_layout() {
        if !(tools::have(&["skopeo", "umoci"]) && tools::privileged()) {
            return;
        }
        let scratch = Scratch::new();
        let layout = sample().write_oci_dir(&scratch.join("oci"));
        let mut skopeo = tools::containers("skopeo", &scratch.join("state"));
        tools::run(skopeo.arg("inspect").arg(format!("oci:{}:1", layout.display())));
        let tree = Tree::of(&tools::umoci_unpack(&layout, "1", &scratch.join("bundle")));
        assert_eq!(tree.names().collect::<Vec<_>>(), ["", "c", "d", "d/b"]);
    }

    #[test]
    fn skopeo_reads_the_docker_archive_and_copies_the_same_layers() {
        if !tools::have(&["skopeo"]) {
            return;
        }
        let scratch = Scratch::new();
        let archive = sample().write_docker_archive(&scratch.join("image.tar"));
        let mut skopeo = tools::containers("skopeo", &scratch.join("state"));
        let from = format!("docker-archive:{}", archive.display());
        let shown = tools::run(skopeo.args(["inspect", "--config", &from]));
        let shown: Value = serde_json::from_str(&shown).unwrap();
        let expected: Vec<_> = sample().layers.iter().map(|layer| json!(layer.diff_id)).collect();
        assert_eq!(shown["rootfs"]["diff_ids"], Value::Array(expected));
    }

    #[test]
    fn blobs_written_are_the_blobs_read() {
        let scratch = Scratch::new();
        let image = sample();
        assert_eq!(blobs_of(&image.write_oci_dir(&scratch.join("oci"))), image.blobs());
        let tar = image.write_oci_tar(&scratch.join("oci.tar"));
        assert_eq!(blobs_of(&untar(&tar, &scratch.join("out"))), image.blobs());
    }
}
