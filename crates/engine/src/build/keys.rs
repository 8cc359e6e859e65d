//! Key files for `RUN --mount=type=ssh`: OpenSSH's `ssh-agent` holds them in memory for as long as a step runs.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal};

/// Bytes of a key file, as in BuildKit (`sshprovider`).
const KEY_BYTES_MAX: u64 = 100 << 10;

/// Why an agent can't have a key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// A program of OpenSSH's did not start.
    #[error("run {program} (of OpenSSH, Debian's openssh-client)")]
    Start {
        /// Which.
        program: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The agent ended at once.
    #[error("ssh-agent does not begin to listen: {said}")]
    Agent {
        /// What it wrote.
        said: String,
    },
    /// A key file can't be read.
    #[error("read the SSH key {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The agent does not take a key.
    #[error("{} is no SSH key that can be used: {said} (one with a passphrase goes into an agent first)", path.display())]
    Refused {
        /// Which.
        path: PathBuf,
        /// What ssh-add wrote.
        said: String,
    },
}

/// An agent of a step's own.
#[derive(Debug)]
pub(super) struct KeyAgent {
    /// `cat`, whose input only we hold: an agent that was started for a command looks after it, and ends with it. So
    /// if this process dies, however that is, so do they.
    keeper: Child,
    agent: Pid,
}

impl KeyAgent {
    /// Starts one that listens at `socket` and has these keys.
    pub(super) fn start(socket: &Path, keys: &[PathBuf]) -> Result<Self, KeyError> {
        let start = |program| move |source| KeyError::Start { program, source };
        let mut command = Command::new("ssh-agent");
        command.arg("-a").arg(socket).args(["sh", "-c", "echo $SSH_AGENT_PID; exec cat > /dev/null"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut keeper = command.spawn().map_err(start("ssh-agent"))?;
        let mut line = String::new();
        let read = keeper.stdout.take().map(|out| BufReader::new(out).read_line(&mut line));
        let agent = line.trim().parse().ok().and_then(Pid::from_raw).filter(|_| matches!(read, Some(Ok(_))));
        let Some(agent) = agent else {
            drop(keeper.kill());
            let output = keeper.wait_with_output().map_err(start("ssh-agent"))?;
            return Err(KeyError::Agent { said: one_line(&output.stderr) });
        };
        let this = Self { keeper, agent };
        for path in keys {
            let read = |source| KeyError::Read { path: path.clone(), source };
            let mut key = Vec::new();
            let file = File::open(path).map_err(read)?;
            file.take(KEY_BYTES_MAX + 1).read_to_end(&mut key).map_err(read)?;
            if key.len() as u64 > KEY_BYTES_MAX {
                return Err(read(io::Error::new(io::ErrorKind::FileTooLarge, "more than KEY_BYTES_MAX, 100 KiB")));
            }
            let mut command = Command::new("ssh-add");
            // From its input: who may read the file is whoever builds's business. Nobody is asked for a passphrase.
            command.args(["-q", "-"]).env("SSH_AUTH_SOCK", socket);
            command.env("SSH_ASKPASS_REQUIRE", "force").env("SSH_ASKPASS", "/bin/false");
            command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
            let mut add = command.spawn().map_err(start("ssh-add"))?;
            // One that ended before it read all of it says why.
            drop(add.stdin.take().map(|mut stdin| stdin.write_all(&key)));
            let output = add.wait_with_output().map_err(start("ssh-add"))?;
            if !output.status.success() {
                return Err(KeyError::Refused { path: path.clone(), said: one_line(&output.stderr) });
            }
        }
        Ok(this)
    }
}

impl Drop for KeyAgent {
    fn drop(&mut self) {
        // Its parent lives and does not reap it, so the number is still its own.
        let _ = rustix::process::kill_process(self.agent, Signal::TERM);
        drop(self.keeper.stdin.take());
        drop(self.keeper.wait());
    }
}

/// What a program says, without what a terminal would obey.
fn one_line(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn key(dir: &Path, name: &str, passphrase: &str) -> PathBuf {
        let path = dir.join(name);
        let mut command = Command::new("ssh-keygen");
        let made = command.args(["-q", "-t", "ed25519", "-C", name, "-N", passphrase, "-f"]).arg(&path).status();
        assert!(made.unwrap().success());
        path
    }

    #[test]
    fn keys_are_there_as_long_as_their_agent() {
        if !plies_testkit::tools::have(&["ssh-agent", "ssh-add", "ssh-keygen"]) {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let keys = ["one", "other"].map(|name| key(dir.path(), name, ""));
        // ssh-add alone would not take a key that others may read.
        std::fs::set_permissions(&keys[1], std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        let agent = KeyAgent::start(&socket, &keys).unwrap();
        let listed = Command::new("ssh-add").arg("-l").env("SSH_AUTH_SOCK", &socket).output().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        assert_eq!(listed.lines().count(), 2, "{listed}");
        assert!(listed.contains(" one (") && listed.contains(" other ("), "{listed}");
        drop(agent);
        assert!(plies_testkit::eventually(|| UnixStream::connect(&socket).is_err()));
    }

    #[test]
    fn what_is_no_key_or_wants_a_passphrase_is_refused() {
        if !plies_testkit::tools::have(&["ssh-agent", "ssh-add", "ssh-keygen"]) {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("text");
        std::fs::write(&text, "no key").unwrap();
        for path in [text, key(dir.path(), "locked", "passphrase")] {
            let socket = path.with_extension("socket");
            let refused = KeyAgent::start(&socket, std::slice::from_ref(&path)).unwrap_err();
            assert!(matches!(&refused, KeyError::Refused { path: which, .. } if *which == path), "{refused}");
            assert!(plies_testkit::eventually(|| UnixStream::connect(&socket).is_err()));
        }
    }
}
