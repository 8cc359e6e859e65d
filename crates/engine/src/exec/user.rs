//! Users by name, looked up inside a tree.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;

use plies_cache::contenthash::inroot;
use plies_oci::ErrorKind;

use crate::context::Tree;

/// The largest `/etc/passwd` or `/etc/group` that is read, in bytes: `BuildKit`'s limit.
const FILE_BYTES_MAX: u64 = 10 << 20;

/// How many supplementary groups a process can have (`NGROUPS_MAX`).
const GROUPS_MAX: usize = 65_536;

/// Whose rights a process has, in numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

impl User {
    /// Root without supplementary groups.
    pub fn root() -> Self {
        Self { uid: 0, gid: 0, groups: vec![0] }
    }
}

/// Why a user can't be found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UserError {
    /// The text is no user.
    #[error("invalid user {spec:?}: expected name[:group] or uid[:gid]")]
    Invalid {
        /// As asked for.
        spec: String,
    },
    /// The number is out of range.
    #[error("user or group {id:?} is not a number from 0 to 2147483647")]
    OutOfRange {
        /// As asked for.
        id: String,
    },
    /// The tree knows no such user.
    #[error("no user {name:?} in /etc/passwd of the image")]
    NoUser {
        /// The name.
        name: String,
    },
    /// The tree knows no such group.
    #[error("no group {name:?} in /etc/group of the image")]
    NoGroup {
        /// The name.
        name: String,
    },
    /// The file is there and can't be used: not a regular file, or too large.
    #[error("reading {path} of the image")]
    Read {
        /// Which file.
        path: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl UserError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Invalid { .. } | Self::OutOfRange { .. } => ErrorKind::InvalidInput,
            Self::NoUser { .. } | Self::NoGroup { .. } => ErrorKind::NotFound,
            Self::Read { .. } => ErrorKind::InvalidInput,
        }
    }
}

/// Looks up `spec` (`name[:group]` or `uid[:gid]`; empty is root) in the tree's own `/etc/passwd` and `/etc/group`.
///
/// As docker does: a name wins over a number of the same spelling; a number needs no entry; a user without an entry and
/// without a group has group 0; supplementary groups come from `/etc/group`, and none do when a group is given. Links
/// are followed inside the tree; nothing of the host is read and no library of the tree is loaded.
///
/// # Errors
/// [`UserError`]
pub fn resolve_user(rootfs: BorrowedFd<'_>, spec: &str) -> Result<User, UserError> {
    let (user, group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (spec, None),
    };
    if user.contains(char::is_whitespace) || group.is_some_and(|g| g.contains([':', ' ', '\t', '\n'])) {
        return Err(UserError::Invalid { spec: spec.to_owned() });
    }
    let user = if user.is_empty() { "0" } else { user };
    let passwd = read(rootfs, "/etc/passwd")?;
    let groups = read(rootfs, "/etc/group")?;

    let entry = find(&passwd, user, 3).or_else(|| {
        let uid = number(user)?;
        lines(&passwd).find(|fields| fields.get(2).and_then(|id| number(id)) == Some(uid))
    });
    let (name, uid, entry_gid) = match &entry {
        Some(fields) => {
            let id = |at: usize| fields.get(at).copied().unwrap_or("");
            let parse = |text: &str| number(text).ok_or_else(|| UserError::OutOfRange { id: text.to_owned() });
            (Some(fields[0]), parse(id(2))?, parse(id(3))?)
        }
        None if looks_numeric(user) => {
            (None, number(user).ok_or_else(|| UserError::OutOfRange { id: user.to_owned() })?, 0)
        }
        None => return Err(UserError::NoUser { name: user.to_owned() }),
    };

    if let Some(group) = group {
        let gid = match find(&groups, group, 3) {
            Some(fields) => fields.get(2).and_then(|id| number(id)),
            None if looks_numeric(group) => number(group),
            None => return Err(UserError::NoGroup { name: group.to_owned() }),
        };
        let gid = gid.ok_or_else(|| UserError::OutOfRange { id: group.to_owned() })?;
        return Ok(User { uid, gid, groups: vec![gid] });
    }
    // The primary group is among them: a step must not gain a right by a group that it is expressly denied
    // (CVE-2022-36109).
    let mut supplementary: Vec<u32> = vec![entry_gid];
    if let Some(name) = name {
        for fields in lines(&groups) {
            let is_member = fields.get(3).is_some_and(|members| members.split(',').any(|member| member.trim() == name));
            if is_member && let Some(gid) = fields.get(2).and_then(|id| number(id)) {
                supplementary.push(gid);
            }
        }
    }
    supplementary.sort_unstable();
    supplementary.dedup();
    supplementary.truncate(GROUPS_MAX);
    Ok(User { uid, gid: entry_gid, groups: supplementary })
}

/// The home directory of a user in a tree; `/` if that isn't known.
pub(super) fn home(rootfs: &Path, uid: u32) -> String {
    let passwd =
        Tree::open_dir(rootfs).ok().and_then(|root| read(root.as_fd(), "/etc/passwd").ok()).unwrap_or_default();
    let entry = lines(&passwd).find(|fields| fields.get(2).and_then(|id| number(id)) == Some(uid));
    let home = entry.and_then(|fields| fields.get(5).copied()).filter(|home| home.starts_with('/'));
    home.unwrap_or("/").to_owned()
}

/// The file's text; empty when it is not there.
fn read(rootfs: BorrowedFd<'_>, path: &'static str) -> Result<String, UserError> {
    match inroot::read_file(rootfs, path.as_bytes(), FILE_BYTES_MAX) {
        // Names are compared as text; a comment in another encoding harms nobody.
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(String::new())
        }
        Err(source) => Err(UserError::Read { path, source }),
    }
}

/// The home directory of a user inside the tree; `/` for one who has none. Docker and OCI runtimes set `HOME` to it
/// where an image does not.
///
/// # Errors
/// As [`resolve_user`].
pub fn home_of(rootfs: BorrowedFd<'_>, uid: u32) -> Result<String, UserError> {
    let passwd = read(rootfs, "/etc/passwd")?;
    let entry = lines(&passwd).find(|fields| fields.get(2).and_then(|id| number(id)) == Some(uid));
    let home = entry.and_then(|fields| fields.get(5).copied().filter(|home| home.starts_with('/')).map(str::to_owned));
    Ok(home.unwrap_or_else(|| "/".into()))
}

fn lines(text: &str) -> impl Iterator<Item = Vec<&str>> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| line.split(':').collect())
}

/// The entry of that name, if it has enough fields to mean anything.
fn find<'a>(text: &'a str, name: &str, fields_min: usize) -> Option<Vec<&'a str>> {
    lines(text).find(|fields| fields[0] == name && fields.len() >= fields_min)
}

/// An id: 0 to 2^31 - 1, as docker limits it. Signs and other bases are no ids.
fn number(text: &str) -> Option<u32> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|id| *id <= 0x7fff_ffff)
}

/// Meant as a number, be it a bad one.
fn looks_numeric(text: &str) -> bool {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    digits.bytes().next().is_some_and(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(passwd: &str, group: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(dir.path().join("etc/passwd"), passwd).unwrap();
        std::fs::write(dir.path().join("etc/group"), group).unwrap();
        dir
    }

    fn resolve(dir: &tempfile::TempDir, spec: &str) -> Result<User, UserError> {
        resolve_user(Tree::open_dir(dir.path()).unwrap().as_fd(), spec)
    }

    fn user(uid: u32, gid: u32, groups: &[u32]) -> User {
        User { uid, gid, groups: groups.to_vec() }
    }

    #[test]
    fn users_and_groups_are_found_as_docker_finds_them() {
        let dir = tree(
            "# c\nroot:x:0:0::/root:/bin/sh\n\napp:x:1000:1001::/:/bin/sh\n77:x:5:6::/:\n",
            "root:x:0:\naudio:x:29:app,other\nvideo:x:44:app\nstaff:x:50:\n",
        );
        for (spec, expected) in [
            ("", user(0, 0, &[0])),
            ("root", user(0, 0, &[0])),
            ("app", user(1000, 1001, &[29, 44, 1001])),
            ("1000", user(1000, 1001, &[29, 44, 1001])),
            ("app:staff", user(1000, 50, &[50])),
            ("app:77", user(1000, 77, &[77])),
            ("4242", user(4242, 0, &[0])),
            ("4242:4243", user(4242, 4243, &[4243])),
            ("77", user(5, 6, &[6])),
            (":staff", user(0, 50, &[50])),
            ("2147483647", user(0x7fff_ffff, 0, &[0])),
        ] {
            assert_eq!(resolve(&dir, spec).unwrap(), expected, "{spec:?}");
        }
    }

    #[test]
    fn j12_ids_out_of_range_and_unknown_names_are_refused() {
        let dir = tree("huge:x:4294967296:0::/:\n", "");
        for spec in
            ["4294967296", "-1", "0x0", "2147483648", "nobody", "0:nogroup", "0:-1", "huge", "a b", "0:1:2", "+5"]
        {
            assert!(resolve(&dir, spec).is_err(), "{spec:?}");
        }
    }

    #[test]
    fn p20_passwd_is_never_read_outside_the_tree() {
        let dir = tree("", "");
        std::fs::remove_file(dir.path().join("etc/passwd")).unwrap();
        // The host has root in its file; the tree's link leads to the tree's own, which isn't there.
        std::os::unix::fs::symlink("../../../../etc/passwd", dir.path().join("etc/passwd")).unwrap();
        assert!(matches!(resolve(&dir, "root"), Err(UserError::NoUser { .. } | UserError::Read { .. })));
        std::fs::remove_dir_all(dir.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/etc", dir.path().join("etc")).unwrap();
        assert!(resolve(&dir, "root").is_err());
        assert_eq!(resolve(&dir, "0").unwrap_or_else(|_| user(0, 0, &[0])), user(0, 0, &[0]));
    }

    #[test]
    fn b11_pipes_and_huge_files_are_refused() {
        let dir = tree("", "");
        let passwd = dir.path().join("etc/passwd");
        std::fs::File::create(&passwd).unwrap().set_len(FILE_BYTES_MAX + 1).unwrap();
        assert!(matches!(resolve(&dir, "0"), Err(UserError::Read { .. })));
        std::fs::remove_file(&passwd).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o644);
        rustix::fs::mknodat(rustix::fs::CWD, &passwd, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert!(matches!(resolve(&dir, "0"), Err(UserError::Read { .. })));
    }
}
