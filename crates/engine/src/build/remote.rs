//! What `ADD` takes from elsewhere: downloads and git repositories.
//!
//! Neither is done here. Downloads are made by the client that also speaks to registries; a repository is `git`'s
//! business, which is run as a program.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use plies_oci::ErrorKind;
use plies_registry::RegistryError;

use crate::exec::Cancel;

/// The largest download, in bytes: 64 GiB, larger than any archive that a layer could hold.
pub(super) const DOWNLOAD_BYTES_MAX: u64 = 64 << 30;

/// What a download is called whose URL names no file, as `BuildKit` has it.
const UNNAMED: &str = "__unnamed__";

/// How often it is looked whether `git` is done.
const GIT_POLL: Duration = Duration::from_millis(20);

/// How much of what `git` says an error repeats, in characters.
const GIT_SAYS_CHARS_MAX: usize = 2000;

/// Why something from elsewhere can't be added.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// Nothing came.
    #[error(transparent)]
    Refused(#[from] RegistryError),
    /// Not all of it came.
    #[error("download {url}")]
    Download {
        /// What was asked for.
        url: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is too long.
    #[error("download {url}: more than {DOWNLOAD_BYTES_MAX} bytes (DOWNLOAD_BYTES_MAX)")]
    TooLong {
        /// What was asked for.
        url: String,
    },
    /// It is not what the file expects.
    #[error("{what}: --checksum expects {expected}, and it is {actual}")]
    Checksum {
        /// What was asked for.
        what: String,
        /// What the Dockerfile says.
        expected: String,
        /// What came.
        actual: String,
    },
    /// `git` is not there.
    #[error("run git for {remote} (is it installed?)")]
    NoGit {
        /// The repository.
        remote: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// `git` failed.
    #[error("git {command} {remote}: {says}")]
    Git {
        /// What it was asked for.
        command: &'static str,
        /// The repository.
        remote: String,
        /// What it said.
        says: String,
    },
    /// The repository has no such ref.
    #[error("{remote} has no branch, tag or other ref {name:?} (a commit needs all its 40 digits)")]
    NoRef {
        /// The repository.
        remote: String,
        /// The ref.
        name: String,
    },
    /// A file of ours.
    #[error("{op} {}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl RemoteError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NoGit { .. } => ErrorKind::FailedPrecondition,
            Self::Refused(source) => source.kind(),
            Self::Download { .. } | Self::Git { .. } | Self::Io { .. } => ErrorKind::Unavailable,
            Self::TooLong { .. } => ErrorKind::Limit,
            Self::Checksum { .. } => ErrorKind::DataLoss,
            Self::NoRef { .. } => ErrorKind::NotFound,
        }
    }
}

/// A file to download.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Download {
    pub(crate) url: String,
    /// What it is called in a directory.
    pub(crate) name: String,
    /// `sha256:…`, which it must have.
    pub(crate) checksum: Option<String>,
}

/// A repository to check out.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct GitSource {
    pub(crate) remote: String,
    /// A branch, a tag or a commit; `HEAD` if none is named.
    pub(crate) reference: Option<String>,
    /// Only what is in this directory.
    pub(crate) subdir: String,
    pub(crate) keep_git_dir: bool,
    pub(crate) submodules: bool,
    /// What the commit's digits begin with.
    pub(crate) checksum: Option<String>,
}

/// A source of `ADD` that is not in the context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Remote {
    Download(Download),
    Git(GitSource),
}

impl Remote {
    /// Tells whether a source is from elsewhere: `http(s)://…`; `….git` by HTTP, `git://`, `ssh://` and `user@host:path`
    /// are repositories, with `#ref:directory` or `?ref=…&subdir=…` behind.
    ///
    /// # Errors
    /// A sentence, for a repository whose `?…` says something unknown.
    pub(crate) fn parse(source: &str) -> Result<Option<Self>, String> {
        let scheme = source.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
        let (before_fragment, fragment) = source.split_once('#').map_or((source, None), |(a, b)| (a, Some(b)));
        let (remote, query) = before_fragment.split_once('?').map_or((before_fragment, None), |(a, b)| (a, Some(b)));
        let is_git = match scheme.as_deref() {
            Some("http" | "https") => remote.trim_end_matches('/').ends_with(".git"),
            Some("git" | "ssh") => true,
            Some(_) => false,
            None => is_scp_like(remote),
        };
        if is_git {
            return GitSource::parse(remote, query, fragment).map(|git| Some(Self::Git(git)));
        }
        if !matches!(scheme.as_deref(), Some("http" | "https")) {
            return Ok(None);
        }
        let path = remote.split_once("://").and_then(|(_, rest)| rest.split_once('/')).map_or("", |(_, path)| path);
        let name = percent_decoded(path.trim_end_matches('/').rsplit('/').next().unwrap_or_default());
        let is_name = !matches!(name.as_str(), "" | "." | "..") && !name.contains(['/', '\0']);
        let name = if is_name { name } else { UNNAMED.to_owned() };
        Ok(Some(Self::Download(Download { url: source.to_owned(), name, checksum: None })))
    }
}

/// `git@host:path`, as scp has it.
fn is_scp_like(text: &str) -> bool {
    let Some((user, (host, path))) = text.split_once('@').and_then(|(user, rest)| Some((user, rest.split_once(':')?)))
    else {
        return false;
    };
    let plain = |part: &str, more: &[char]| {
        !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(&c))
    };
    plain(user, &['-', '_']) && plain(host, &['-', '.']) && !path.is_empty()
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let decoded = match rest {
            [b'%', a, b, ..] => std::str::from_utf8(&[*a, *b]).ok().and_then(|hex| u8::from_str_radix(hex, 16).ok()),
            _ => None,
        };
        bytes.push(decoded.unwrap_or(*first));
        rest = if decoded.is_some() { &rest[3..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

impl GitSource {
    fn parse(remote: &str, query: Option<&str>, fragment: Option<&str>) -> Result<Self, String> {
        let mut git = Self { remote: remote.to_owned(), submodules: true, ..Self::default() };
        if let Some(fragment) = fragment {
            let (reference, subdir) = fragment.split_once(':').unwrap_or((fragment, ""));
            git.reference = Some(reference.to_owned()).filter(|reference| !reference.is_empty());
            git.subdir = subdir.to_owned();
        }
        for (key, value) in
            query.into_iter().flat_map(|query| query.split('&')).filter(|pair| !pair.is_empty()).map(|pair| {
                pair.split_once('=').map_or((pair, None), |(key, value)| (key, Some(percent_decoded(value))))
            })
        {
            let flag = |value: Option<String>| match value.as_deref() {
                None | Some("" | "1" | "true") => Ok(true),
                Some("0" | "false") => Ok(false),
                Some(other) => Err(format!("{key}={other:?} in the URL: true or false is expected")),
            };
            match (key, value) {
                ("ref", Some(value)) => git.reference = Some(value),
                ("tag", Some(value)) => git.reference = Some(format!("refs/tags/{value}")),
                ("branch", Some(value)) => git.reference = Some(format!("refs/heads/{value}")),
                ("subdir", Some(value)) => git.subdir = value,
                ("checksum" | "commit", Some(value)) => git.checksum = Some(value),
                ("keep-git-dir", value) => git.keep_git_dir = flag(value)?,
                ("submodules", value) => git.submodules = flag(value)?,
                _ => {
                    return Err(format!(
                        "{key} in the URL of a repository means nothing (there are ref, tag, branch, subdir, checksum, \
                         keep-git-dir and submodules)"
                    ));
                }
            }
        }
        // What begins with a dash would be an option of git.
        let dashed =
            [Some(&git.remote), git.reference.as_ref()].into_iter().flatten().find(|text| text.starts_with('-'));
        match dashed {
            Some(text) => Err(format!("{text:?} begins with a dash")),
            None => Ok(git),
        }
    }

    /// The commit that the source stands for now.
    ///
    /// # Errors
    /// [`RemoteError::NoGit`], [`RemoteError::Git`], [`RemoteError::NoRef`], [`RemoteError::Checksum`].
    pub(crate) fn resolve(&self, run_dir: &Path, cancel: &Cancel) -> Result<String, RemoteError> {
        let name = self.reference.as_deref().unwrap_or("HEAD");
        let commit = if is_commit(name) {
            name.to_ascii_lowercase()
        } else {
            let work = Scratch::new(run_dir)?;
            let peeled = format!("{name}^{{}}");
            let listed = self.git("ls-remote", &work, &["ls-remote", "--", &self.remote, name, &peeled], cancel)?;
            let lines: Vec<(&str, &str)> = listed.lines().filter_map(|line| line.split_once('\t')).collect();
            // A tag of its own stands for the commit that it points at; a tag goes before a branch.
            let wanted = [
                format!("refs/tags/{name}^{{}}"),
                format!("refs/tags/{name}"),
                format!("refs/heads/{name}"),
                peeled.clone(),
                name.to_owned(),
            ];
            let found = wanted.iter().find_map(|wanted| lines.iter().find(|(_, listed)| listed == wanted));
            let none = || RemoteError::NoRef { remote: self.remote.clone(), name: name.to_owned() };
            found.ok_or_else(none)?.0.to_owned()
        };
        match &self.checksum {
            Some(expected) if !commit.starts_with(&expected.to_ascii_lowercase()) => {
                Err(RemoteError::Checksum { what: self.remote.clone(), expected: expected.clone(), actual: commit })
            }
            _ => Ok(commit),
        }
    }

    /// Checks a commit out into a directory of its own below `run_dir`.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub(crate) fn check_out(&self, commit: &str, run_dir: &Path, cancel: &Cancel) -> Result<Scratch, RemoteError> {
        let work = Scratch::new(run_dir)?;
        self.git("init", &work, &["init", "--quiet", "."], cancel)?;
        let shallow = ["fetch", "--quiet", "--depth=1", "--no-tags", "--", &self.remote, commit];
        if self.git("fetch", &work, &shallow, cancel).is_err() {
            // Not every server gives a commit by its digits: then all that it has.
            let name = self.reference.as_deref().filter(|name| !is_commit(name));
            let refs = name.map_or("+refs/*:refs/remotes/origin/*".to_owned(), str::to_owned);
            self.git("fetch", &work, &["fetch", "--quiet", "--no-tags", "--", &self.remote, &refs], cancel)?;
        }
        self.git("checkout", &work, &["-c", "advice.detachedHead=false", "checkout", "--quiet", commit], cancel)?;
        if self.submodules && work.path.join(".gitmodules").exists() {
            let update = ["submodule", "update", "--quiet", "--init", "--recursive", "--depth=1"];
            self.git("submodule update of", &work, &update, cancel)?;
        }
        if self.keep_git_dir {
            // What a fetch leaves says when it was done, not what is there.
            drop(std::fs::remove_file(work.path.join(".git/FETCH_HEAD")));
        } else {
            let git = work.path.join(".git");
            std::fs::remove_dir_all(&git).map_err(|source| RemoteError::Io { op: "remove", path: git, source })?;
        }
        Ok(work)
    }

    /// Runs `git` and gives what it printed.
    fn git(
        &self,
        command: &'static str,
        work: &Scratch,
        args: &[&str],
        cancel: &Cancel,
    ) -> Result<String, RemoteError> {
        let io = |op, path: &Path| {
            let path = path.to_owned();
            move |source| RemoteError::Io { op, path, source }
        };
        let (out, err) = (work.beside("out"), work.beside("err"));
        let create = |path: &Path| std::fs::File::create(path).map_err(io("create", path));
        let mut git = Command::new("git");
        // What a repository names as its submodules is nobody's order: no file of this machine, and no command. Git's own
        // default, since 2.38.
        git.args(["-c", "protocol.file.allow=user", "-c", "protocol.ext.allow=never"])
            .args(args)
            .current_dir(&work.path);
        // Nobody is there to be asked, and another repository around the caller is none of this one's business.
        git.env("GIT_TERMINAL_PROMPT", "0").env_remove("GIT_DIR").env_remove("GIT_WORK_TREE").env("LC_ALL", "C");
        git.stdin(Stdio::null()).stdout(create(&out)?).stderr(create(&err)?);
        let spawned = git.spawn();
        let mut child = spawned.map_err(|source| RemoteError::NoGit { remote: self.remote.clone(), source })?;
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if cancel.is_canceled() => {
                    drop(child.kill());
                    drop(child.wait());
                    let source = cancel.check().err().unwrap_or_else(|| io::ErrorKind::Interrupted.into());
                    return Err(RemoteError::Io { op: "wait for", path: "git".into(), source });
                }
                Ok(None) => std::thread::sleep(GIT_POLL),
                Err(source) => return Err(RemoteError::Io { op: "wait for", path: "git".into(), source }),
            }
        };
        let read = |path: &Path| std::fs::read(path).map_err(io("read", path));
        if status.success() {
            return Ok(String::from_utf8_lossy(&read(&out)?).into_owned());
        }
        let says = String::from_utf8_lossy(&read(&err)?).trim().replace('\n', "; ");
        let says: String = says.chars().filter(|c| !c.is_control()).take(GIT_SAYS_CHARS_MAX).collect();
        Err(RemoteError::Git { command, remote: self.remote.clone(), says })
    }
}

fn is_commit(name: &str) -> bool {
    name.len() == 40 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// A directory for `git` to work in, gone when dropped.
#[derive(Debug)]
pub(crate) struct Scratch {
    parent: PathBuf,
    pub(crate) path: PathBuf,
}

impl Scratch {
    fn new(run_dir: &Path) -> Result<Self, RemoteError> {
        /// Distinguishes the directories of one process.
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let parent = run_dir.join(format!("git-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let path = parent.join("work");
        std::fs::create_dir_all(&path).map_err(|source| RemoteError::Io {
            op: "create directory",
            path: path.clone(),
            source,
        })?;
        Ok(Self { parent, path })
    }

    fn beside(&self, name: &str) -> PathBuf {
        self.parent.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left is removed with the run directory at the next start.
        drop(std::fs::remove_dir_all(&self.parent));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn git(source: &str) -> GitSource {
        match Remote::parse(source) {
            Ok(Some(Remote::Git(git))) => git,
            other => panic!("{source}: {other:?}"),
        }
    }

    #[test]
    fn sources_from_elsewhere() {
        let name = |source: &str| match Remote::parse(source) {
            Ok(Some(Remote::Download(download))) => download.name,
            other => panic!("{source}: {other:?}"),
        };
        assert_eq!(name("https://x.org/a/b.tar.gz?c=d/e#f"), "b.tar.gz");
        assert_eq!(name("HTTP://x.org/with%20blank"), "with blank");
        for unnamed in
            ["https://x.org", "https://x.org/", "https://x.org/..", "https://x.org/a%2fb", "https://x.org/%00"]
        {
            assert_eq!(name(unnamed), "__unnamed__", "{unnamed}");
        }
        for local in ["a", "a@b", "./git@x:y/z", "a:b", "ftp://x/y", "github.com/a/b.git", "user@host", "/git@h:p"] {
            assert_eq!(Remote::parse(local), Ok(None), "{local}");
        }
    }

    #[test]
    fn repositories() {
        let plain = git("https://x.org/a.git");
        assert_eq!((plain.remote.as_str(), &plain.reference, plain.submodules), ("https://x.org/a.git", &None, true));
        let fragment = git("git@x.org:a/b.git#v1.0:sub/dir");
        assert_eq!((fragment.reference.as_deref(), fragment.subdir.as_str()), (Some("v1.0"), "sub/dir"));
        assert_eq!(git("ssh://git@x.org:22/a#:d").reference, None);
        let query = git("git://x/a?branch=main&subdir=d&checksum=abc&keep-git-dir&submodules=false");
        assert_eq!(query.reference.as_deref(), Some("refs/heads/main"));
        assert_eq!((query.keep_git_dir, query.submodules, query.checksum.as_deref()), (true, false, Some("abc")));
        for bad in ["git://x/a?what=1", "git://x/a?submodules=maybe", "git://x/a#--upload-pack=x", "git://x/a?ref"] {
            assert!(Remote::parse(bad).is_err(), "{bad}");
        }
    }
}
