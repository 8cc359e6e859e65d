//! A containerd with state of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::buildkit::{bucket, bytes, write};
use crate::image::Image;
use crate::{daemon, tools};

/// A daemon without plugins that need a network.
#[derive(Debug)]
pub struct Daemon {
    dir: PathBuf,
    _daemon: daemon::Daemon,
}

impl Daemon {
    /// Starts one whose root directory is `dir/root`; says aloud if it cannot start here.
    ///
    /// # Panics
    /// When there is no such program, though its file was found.
    #[track_caller]
    pub fn start(dir: &Path) -> Option<Self> {
        if !tools::have(&["containerd", "ctr"]) {
            return None;
        }
        fs::create_dir_all(dir).expect("because the scratch is ours");
        let at = |name: &str| dir.join(name).display().to_string();
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\n  address = {:?}\n[ttrpc]\n  address = {:?}\n",
            at("root"),
            at("state"),
            at("sock"),
            at("ttrpc"),
        );
        fs::write(dir.join("config.toml"), config).expect("because the scratch is ours");
        let configure = |command: &mut Command| {
            command.arg("-c").arg(dir.join("config.toml"));
        };
        let daemon = daemon::Daemon::start("containerd", dir, configure, || client(dir, &["version"]))?;
        Some(Self { dir: dir.to_owned(), _daemon: daemon })
    }

    /// Runs a command of its client, which must succeed; what it printed.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> String {
        tools::run(&mut client(&self.dir, args)).trim().to_owned()
    }

    /// Where its state is, also while it runs.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// Stops it; its root directory.
    pub fn stop(self) -> PathBuf {
        self.root()
    }
}

/// Writes a root directory by hand: one image with its manifest and blobs, none of which was unpacked.
///
/// # Panics
/// When it cannot be written.
pub fn write_root(path: &Path, image: &Image) {
    let (meta, content) =
        (path.join("io.containerd.metadata.v1.bolt"), path.join("io.containerd.content.v1.content/blobs/sha256"));
    fs::create_dir_all(&meta).expect("because the scratch is ours");
    fs::create_dir_all(&content).expect("because the scratch is ours");
    let blobs = image.blobs();
    for (hex, blob) in &blobs {
        fs::write(content.join(hex), blob).expect("because the scratch is ours");
    }
    let manifest = "application/vnd.oci.image.manifest.v1+json";
    let target =
        bucket([("digest", bytes(format!("sha256:{}", image.manifest_digest()))), ("mediatype", bytes(manifest))]);
    let listed = bucket(blobs.keys().map(|hex| (format!("sha256:{hex}"), bucket([("labels", bucket::<&str>([]))]))));
    let namespace = bucket([
        ("images", bucket([(image.tag(), bucket([("target", target)]))])),
        ("content", bucket([("blob", listed)])),
    ]);
    write(&meta.join("meta.db"), vec![("v1", bucket([("default", namespace)]))]);
}

/// A command of its client.
fn client(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new("ctr");
    command.arg("--address").arg(dir.join("sock")).args(args).current_dir(dir).stdin(Stdio::null());
    command
}
