//! Docker's state: a daemon with a data root of its own, and data roots made by hand.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::tar::{DEFAULT_MTIME, Member, archive};
use crate::{base64, daemon, sha256_hex, tools};

/// A daemon without a network, on the overlay2 driver.
#[derive(Debug)]
pub struct Daemon {
    dir: PathBuf,
    _daemon: daemon::Daemon,
}

impl Daemon {
    /// Starts one whose data root is `dir/data`; says aloud if it cannot start here.
    ///
    /// # Panics
    /// When there is no such program, though its file was found.
    #[track_caller]
    pub fn start(dir: &Path) -> Option<Self> {
        if !tools::have(&["dockerd", "docker"]) {
            return None;
        }
        fs::create_dir_all(dir).expect("because the scratch is ours");
        let configure = |command: &mut Command| {
            for (option, name) in [("--data-root", "data"), ("--exec-root", "exec"), ("--pidfile", "pid")] {
                command.arg(option).arg(dir.join(name));
            }
            command.args(["--bridge=none", "--iptables=false", "--storage-driver=overlay2"]);
            command.arg(format!("--host=unix://{}", dir.join("sock").display()));
        };
        let daemon = daemon::Daemon::start("dockerd", dir, configure, || client(dir, &["info"]))?;
        Some(Self { dir: dir.to_owned(), _daemon: daemon })
    }

    /// A command of its client.
    pub fn command(&self, args: &[&str]) -> Command {
        client(&self.dir, args)
    }

    /// Runs a command of its client, which must succeed; what it printed.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> String {
        tools::run(&mut self.command(args)).trim().to_owned()
    }

    /// Stops it; its data root.
    pub fn stop(self) -> PathBuf {
        self.dir.join("data")
    }
}

fn client(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new("docker");
    command.arg("--host").arg(format!("unix://{}", dir.join("sock").display())).args(args);
    command.env("DOCKER_BUILDKIT", "0").env("HOME", dir).current_dir(dir).stdin(Stdio::null());
    command
}

/// A data root that is written by hand.
#[derive(Debug)]
pub struct DataRoot {
    /// Where it is.
    pub path: PathBuf,
}

impl DataRoot {
    /// An empty one.
    pub fn new(path: PathBuf) -> Self {
        let root = Self { path };
        fs::create_dir_all(root.layers()).expect("because the scratch is ours");
        root
    }

    /// The directory with all layers.
    pub fn layers(&self) -> PathBuf {
        self.path.join("image/overlay2/layerdb/sha256")
    }

    /// Writes a file of the image store.
    ///
    /// # Panics
    /// When it cannot.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path.join("image/overlay2").join(name);
        fs::create_dir_all(path.parent().expect("because it has one")).expect("because the scratch is ours");
        fs::write(&path, bytes).expect("because the scratch is ours");
        path
    }

    /// A layer with one file on the chain `parent`: its chain ID and its diff ID, 64 digits each.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn layer(&self, parent: Option<&str>, name: &str, content: &str) -> (String, String) {
        let tar = archive(&[Member::file(name, content)]);
        let (chain, diff, tree) = self.add_layer(parent, &tar, recording(&tar, name, content.as_bytes()));
        Self::put(&tree.join(name), content);
        (chain, diff)
    }

    /// Writes a file with the time that archives of this kit have, so that nothing about it tells of a change.
    ///
    /// # Panics
    /// When it cannot.
    pub fn put(path: &Path, content: &str) {
        let time = UNIX_EPOCH + Duration::from_secs(DEFAULT_MTIME.unsigned_abs());
        let written =
            fs::write(path, content).and_then(|()| File::options().write(true).open(path)?.set_modified(time));
        written.expect("because the scratch is ours");
    }

    /// Where the files of a layer are.
    pub fn tree(&self, chain: &str) -> PathBuf {
        self.path.join("overlay2").join(sha256_hex(chain.as_bytes())).join("diff")
    }

    /// A layer of this tar, all of which stands in its tar-split, so that nothing of it must be in its tree: its chain ID
    /// and its diff ID, 64 digits each.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn layer_of_tar(&self, tar: &[u8]) -> (String, String) {
        let (chain, diff, _) = self.add_layer(None, tar, recording_of_all(tar));
        (chain, diff)
    }

    /// Writes down a layer; its chain ID, its diff ID and the directory for its tree.
    fn add_layer(&self, parent: Option<&str>, tar: &[u8], recording: Vec<u8>) -> (String, String, PathBuf) {
        let diff = sha256_hex(tar);
        let chain = match parent {
            None => diff.clone(),
            Some(parent) => sha256_hex(format!("sha256:{parent} sha256:{diff}").as_bytes()),
        };
        let dir = format!("layerdb/sha256/{chain}");
        // Any 64 digits do.
        let cache_id = sha256_hex(chain.as_bytes());
        self.write(&format!("{dir}/diff"), format!("sha256:{diff}"));
        self.write(&format!("{dir}/cache-id"), &cache_id);
        if let Some(parent) = parent {
            self.write(&format!("{dir}/parent"), format!("sha256:{parent}"));
        }
        self.write(&format!("{dir}/tar-split.json.gz"), recording);
        let tree = self.tree(&chain);
        fs::create_dir_all(&tree).expect("because the scratch is ours");
        (chain, diff, tree)
    }

    /// An image of layers with these diff IDs: its ID, 64 digits.
    pub fn image(&self, diff_ids: &[&str]) -> String {
        let config = config(diff_ids);
        let id = sha256_hex(config.as_bytes());
        self.write(&format!("imagedb/content/sha256/{id}"), config);
        id
    }
}

/// The config of an image of layers with these diff IDs.
fn config(diff_ids: &[&str]) -> String {
    let diff_ids: Vec<Value> = diff_ids.iter().map(|diff| json!(format!("sha256:{diff}"))).collect();
    json!({
        "architecture": crate::image::architecture(), "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    })
    .to_string()
}

/// Writes a storage of podman's at `path`, with one image of one layer of this tar, all of which stands in its tar-split.
///
/// # Panics
/// When it cannot be written.
pub fn graph_root(path: &Path, tar: &[u8]) {
    let (layer, diff) = ("a".repeat(64), sha256_hex(tar));
    let config = config(&[&diff]);
    let image = sha256_hex(config.as_bytes());
    // The library's name for a file whose own is no file name.
    let big_data = format!("={}", base64(format!("sha256:{image}").as_bytes()));
    let layers = json!([{ "id": layer, "diff-digest": format!("sha256:{diff}") }]).to_string();
    let files = [
        ("overlay-layers/layers.json".to_owned(), layers.into_bytes()),
        (format!("overlay-layers/{layer}.tar-split.gz"), recording_of_all(tar)),
        ("overlay-images/images.json".to_owned(), json!([{ "id": image }]).to_string().into_bytes()),
        (format!("overlay-images/{image}/{big_data}"), config.into_bytes()),
    ];
    fs::create_dir_all(path.join("overlay").join(&layer).join("diff")).expect("because the scratch is ours");
    for (name, bytes) in files {
        let file = path.join(name);
        fs::create_dir_all(file.parent().expect("because it has one")).expect("because the scratch is ours");
        fs::write(file, bytes).expect("because the scratch is ours");
    }
}

/// A tar-split that has the whole archive.
fn recording_of_all(tar: &[u8]) -> Vec<u8> {
    packed(&[json!({ "type": 2, "payload": base64(tar), "position": 0 })])
}

/// The tar-split of an archive with one file: its header, its content by checksum, the rest.
fn recording(tar: &[u8], name: &str, content: &[u8]) -> Vec<u8> {
    let lines = [
        json!({ "type": 2, "payload": base64(&tar[..512]), "position": 0 }),
        json!({ "type": 1, "name": name, "size": content.len(), "payload": base64(&crc64(content)), "position": 1 }),
        json!({ "type": 2, "payload": base64(&tar[512 + content.len()..]), "position": 2 }),
    ];
    packed(&lines)
}

/// The lines of a recording as they are stored.
fn packed(lines: &[Value]) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    lines.iter().for_each(|line| writeln!(packed, "{line}").expect("because memory takes it"));
    packed.finish().expect("because memory takes it")
}

/// CRC-64 with the polynomial of ISO 3309 (Go, `hash/crc64`), big end first.
fn crc64(bytes: &[u8]) -> [u8; 8] {
    const POLYNOMIAL: u64 = 0xd800_0000_0000_0000;
    let step = |crc: u64, byte: &u8| {
        (0..8).fold(crc ^ u64::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 })
    };
    (!bytes.iter().fold(!0, step)).to_be_bytes()
}
