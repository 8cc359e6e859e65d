//! A containerd with state of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::{eventually, tools};

/// A daemon without plugins that need a network.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    dir: PathBuf,
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
        let log = fs::File::create(dir.join("log")).expect("because the scratch is ours");
        let mut command = Command::new(tools::find("containerd").expect("because it was just found"));
        command.arg("-c").arg(dir.join("config.toml")).stdin(Stdio::null()).stderr(log).stdout(Stdio::null());
        let child = command.spawn().unwrap_or_else(|error| panic!("start containerd: {error}"));
        let mut daemon = Self { child, dir: dir.to_owned() };
        let answers = eventually(|| {
            !matches!(daemon.child.try_wait(), Ok(Some(_)))
                && daemon.command(&["version"]).output().is_ok_and(|output| output.status.success())
        });
        if !answers {
            let log = fs::read_to_string(dir.join("log")).unwrap_or_default();
            eprintln!("SKIPPED {}: containerd does not start here: {log}", std::panic::Location::caller());
            return None;
        }
        Some(daemon)
    }

    /// A command of its client.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(self.dir.join("sock")).args(args);
        command.current_dir(&self.dir).stdin(Stdio::null());
        command
    }

    /// Runs a command of its client, which must succeed; what it printed.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> String {
        tools::run(&mut self.command(args)).trim().to_owned()
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

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.child.wait();
    }
}
