//! A directory as a list of everything that a layer can carry, and how two of them differ.
//!
//! Read with plain path names and `lstat`, on purpose unlike the product. Sizes of directories and
//! device numbers of the file system itself are left out: they say nothing about the content.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fmt::Write as _,
    fs, io,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::Path,
};

/// What one name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// `file`, `dir`, `symlink`, `char`, `block`, `fifo` or `socket`.
    pub kind: &'static str,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970 and nanoseconds.
    pub mtime: (i64, u32),
    /// Length of a regular file, else 0.
    pub size_bytes: u64,
    /// SHA-256 of a regular file's content.
    pub sha256: Option<String>,
    /// What a symbolic link says.
    pub target: Option<String>,
    /// Major and minor number of a device.
    pub device: Option<(u32, u32)>,
    /// How many names the file system says that a non-directory has.
    pub links: u64,
    /// The names in this tree that are the same file, sorted; empty for directories.
    pub names: Vec<String>,
    /// Extended attributes.
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

/// All names below a directory, escaped where they are not printable ASCII; the directory itself is
/// the empty name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree(BTreeMap<String, Node>);

impl Tree {
    /// Lists `root`, without crossing into other mounts' content by any special care: a test mounts
    /// what it wants to see.
    pub fn of(root: &Path) -> Self {
        let mut nodes = BTreeMap::new();
        let mut inodes: BTreeMap<(u64, u64), Vec<String>> = BTreeMap::new();
        let mut waiting = vec![(String::new(), root.to_owned())];
        while let Some((name, path)) = waiting.pop() {
            let meta = fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("lstat {}: {error}", path.display()));
            if meta.is_dir() {
                for entry in fs::read_dir(&path).unwrap_or_else(|error| panic!("list {}: {error}", path.display())) {
                    let entry = entry.unwrap_or_else(|error| panic!("list {}: {error}", path.display()));
                    let below = escape(entry.file_name().as_bytes());
                    waiting.push((if name.is_empty() { below } else { format!("{name}/{below}") }, entry.path()));
                }
            } else {
                inodes.entry((meta.dev(), meta.ino())).or_default().push(name.clone());
            }
            nodes.insert(name, (Node::read(&path, &meta), (meta.dev(), meta.ino())));
        }
        for names in inodes.values_mut() {
            names.sort();
        }
        Self(
            nodes
                .into_iter()
                .map(|(name, (node, inode))| {
                    let names = inodes.get(&inode).cloned().unwrap_or_default();
                    (name, Node { names, ..node })
                })
                .collect(),
        )
    }

    /// The node at a name that must be there.
    pub fn get(&self, name: &str) -> &Node {
        self.0.get(name).unwrap_or_else(|| panic!("no {name:?} among {:?}", self.names().collect::<Vec<_>>()))
    }

    /// The node at a name, if it is there.
    pub fn find(&self, name: &str) -> Option<&Node> {
        self.0.get(name)
    }

    /// All names, the root's empty one first.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The tree without the root's own metadata, for roots that no layer has set.
    #[must_use]
    pub fn without_root(mut self) -> Self {
        self.0.remove("");
        self
    }

    /// The tree without these names and everything below them.
    #[must_use]
    pub fn without(mut self, gone: &[&str]) -> Self {
        self.0.retain(|name, _| {
            !gone.iter().any(|gone| name == gone || name.strip_prefix(gone).is_some_and(|rest| rest.starts_with('/')))
        });
        self
    }

    /// The tree with every node changed, for what a tool is known to get wrong.
    #[must_use]
    pub fn map(mut self, mut change: impl FnMut(&str, &mut Node)) -> Self {
        self.0.iter_mut().for_each(|(name, node)| change(name, node));
        self
    }

    /// What differs, a line each; empty when nothing does.
    pub fn diff(&self, other: &Self) -> String {
        let mut text = String::new();
        let names: std::collections::BTreeSet<_> = self.0.keys().chain(other.0.keys()).collect();
        for name in names {
            let line = match (self.0.get(name), other.0.get(name)) {
                (Some(left), None) => format!("/{name}: only on the left ({})", left.kind),
                (None, Some(right)) => format!("/{name}: only on the right ({})", right.kind),
                (Some(left), Some(right)) if left != right => format!("/{name}: {}", left.differences(right)),
                _ => continue,
            };
            text.push_str(&line);
            text.push('\n');
        }
        text
    }

    /// Fails with the differences unless both trees are the same.
    #[track_caller]
    pub fn assert_same(&self, other: &Self, what: &str) {
        let diff = self.diff(other);
        assert!(diff.is_empty(), "{what}: {} differences (left, right):\n{}", diff.lines().count(), head(&diff, 60));
    }
}

impl Node {
    fn read(path: &Path, meta: &fs::Metadata) -> Self {
        let kind = meta.file_type();
        let fail = |what: &str, error: io::Error| -> ! { panic!("{what} {}: {error}", path.display()) };
        let is_device = kind.is_char_device() || kind.is_block_device();
        Self {
            kind: match kind {
                kind if kind.is_file() => "file",
                kind if kind.is_dir() => "dir",
                kind if kind.is_symlink() => "symlink",
                kind if kind.is_char_device() => "char",
                kind if kind.is_block_device() => "block",
                kind if kind.is_fifo() => "fifo",
                _ => "socket",
            },
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: (meta.mtime(), u32::try_from(meta.mtime_nsec()).expect("because the kernel keeps it below 10^9")),
            size_bytes: if kind.is_file() { meta.len() } else { 0 },
            sha256: kind
                .is_file()
                .then(|| crate::sha256_hex(&fs::read(path).unwrap_or_else(|error| fail("read", error)))),
            target: kind.is_symlink().then(|| {
                let target = fs::read_link(path).unwrap_or_else(|error| fail("readlink", error));
                escape(target.as_os_str().as_bytes())
            }),
            device: is_device.then(|| (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()))),
            links: if kind.is_dir() { 0 } else { meta.nlink() },
            names: Vec::new(),
            xattrs: read_xattrs(path),
        }
    }

    fn differences(&self, other: &Self) -> String {
        let mut text = String::new();
        let mut say = |what: &str, left: String, right: String| {
            if left != right {
                let comma = if text.is_empty() { "" } else { ", " };
                write!(text, "{comma}{what} {left} != {right}").expect("because writing to a String cannot fail");
            }
        };
        say("type", self.kind.to_owned(), other.kind.to_owned());
        say("mode", format!("{:04o}", self.mode), format!("{:04o}", other.mode));
        say("owner", format!("{}:{}", self.uid, self.gid), format!("{}:{}", other.uid, other.gid));
        say(
            "mtime",
            format!("{}.{:09}", self.mtime.0, self.mtime.1),
            format!("{}.{:09}", other.mtime.0, other.mtime.1),
        );
        say("size", self.size_bytes.to_string(), other.size_bytes.to_string());
        say("sha256", short(self.sha256.as_deref()), short(other.sha256.as_deref()));
        say("target", format!("{:?}", self.target), format!("{:?}", other.target));
        say("device", format!("{:?}", self.device), format!("{:?}", other.device));
        say("links", self.links.to_string(), other.links.to_string());
        say("names", self.names.join("="), other.names.join("="));
        say("xattrs", show_xattrs(&self.xattrs), show_xattrs(&other.xattrs));
        text
    }
}

fn short(sha256: Option<&str>) -> String {
    sha256.map_or_else(|| "-".to_owned(), |text| text[..12].to_owned())
}

fn show_xattrs(xattrs: &BTreeMap<String, Vec<u8>>) -> String {
    let shown: Vec<_> = xattrs.iter().map(|(name, value)| format!("{name}={}", escape(value))).collect();
    format!("[{}]", shown.join(" "))
}

fn escape(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

/// The first lines of a long text, and how many were left out.
pub fn head(text: &str, lines: usize) -> String {
    let count = text.lines().count();
    let mut cut: String = text.lines().take(lines).flat_map(|line| [line, "\n"]).collect();
    if count > lines {
        write!(cut, "… and {} more lines", count - lines).expect("because writing to a String cannot fail");
    }
    cut
}

fn read_xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    // As large as the kernel lets a value or a list of names be.
    let mut names = vec![0; 65536];
    let length = match rustix::fs::llistxattr(path, &mut names[..]) {
        Ok(length) => length,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(error) => panic!("listxattr {}: {error}", path.display()),
    };
    names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0; 65536];
            let length = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..])
                .unwrap_or_else(|error| panic!("getxattr {} of {}: {error}", escape(name), path.display()));
            value.truncate(length);
            (escape(name), value)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    fn sample(scratch: &Scratch, name: &str) -> std::path::PathBuf {
        let root = scratch.dir(name);
        fs::create_dir(root.join("d")).unwrap();
        fs::write(root.join("d/f"), "one").unwrap();
        fs::hard_link(root.join("d/f"), root.join("g")).unwrap();
        symlink("d/f", root.join("s")).unwrap();
        root
    }

    #[test]
    fn a_tree_is_the_same_as_itself_and_lists_link_groups() {
        let scratch = Scratch::new();
        let tree = Tree::of(&sample(&scratch, "a"));
        tree.assert_same(&tree.clone(), "itself");
        assert_eq!(tree.get("g").names, ["d/f", "g"]);
        assert_eq!(tree.get("s").target.as_deref(), Some("d/f"));
    }

    #[test]
    fn every_kind_of_difference_is_told() {
        let scratch = Scratch::new();
        let root = sample(&scratch, "a");
        let before = Tree::of(&root);
        fs::write(root.join("d/f"), "two").unwrap();
        fs::set_permissions(root.join("d"), fs::Permissions::from_mode(0o700)).unwrap();
        fs::remove_file(root.join("s")).unwrap();
        fs::write(root.join("new"), "").unwrap();
        let diff = before.diff(&Tree::of(&root));
        for claim in ["/d: mode 0755 != 0700", "/d/f: ", "sha256", "/s: only on the left", "/new: only on the right"] {
            assert!(diff.contains(claim), "{claim} is not in:\n{diff}");
        }
    }
}
