//! What the tests of the file system half share: archives, trees as text, overlay mounts.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode};
use rustix::mount;

use crate::apply::{Applied, ApplyError, ApplyStyle, apply};
use crate::limits::Limits;
use crate::sys::{self, Subject};
use crate::tar::{Device, Entry, EntryKind, EntryPath, Reader, Timestamp, Writer};
use crate::tree::{self, Kind, WalkError};
use crate::xattr;

/// Owners, devices and `trusted.` attributes need root. Says so and returns true without it.
pub(crate) fn skip_unprivileged() -> bool {
    let skip = !rustix::process::geteuid().is_root();
    if skip {
        eprintln!("skipped: needs root");
    }
    skip
}

pub(crate) fn path(raw: &str) -> EntryPath {
    EntryPath::clean(raw.as_bytes()).unwrap()
}

/// A time that no test gets by accident.
pub(crate) const THEN: Timestamp = Timestamp { seconds: 1_000_000_000, nanos: 123_456_789 };

/// An entry with its content.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    pub(crate) entry: Entry,
    pub(crate) data: Vec<u8>,
}

impl Item {
    fn new(raw: &str, kind: EntryKind, mode: u32) -> Self {
        let entry = Entry { path: path(raw), kind, mode, uid: 0, gid: 0, mtime: THEN, xattrs: Vec::new() };
        Self { entry, data: Vec::new() }
    }

    pub(crate) fn mode(mut self, mode: u32) -> Self {
        self.entry.mode = mode;
        self
    }

    pub(crate) fn owner(mut self, uid: u32, gid: u32) -> Self {
        (self.entry.uid, self.entry.gid) = (uid, gid);
        self
    }

    pub(crate) fn mtime(mut self, seconds: i64) -> Self {
        self.entry.mtime = Timestamp { seconds, nanos: 0 };
        self
    }

    pub(crate) fn xattr(mut self, name: &str, value: &[u8]) -> Self {
        self.entry.xattrs.push((name.as_bytes().to_vec(), value.to_vec()));
        self.entry.xattrs.sort();
        self
    }
}

pub(crate) fn file(raw: &str, data: &str) -> Item {
    let kind = EntryKind::File { size_bytes: data.len() as u64, sparse: None };
    Item { data: data.into(), ..Item::new(raw, kind, 0o644) }
}

pub(crate) fn dir(raw: &str) -> Item {
    Item::new(raw, EntryKind::Directory, 0o755)
}

pub(crate) fn symlink(raw: &str, target: &str) -> Item {
    Item::new(raw, EntryKind::Symlink { target: target.into() }, 0o777)
}

pub(crate) fn hard_link(raw: &str, target: &str) -> Item {
    Item::new(raw, EntryKind::HardLink { target: path(target) }, 0o644)
}

pub(crate) fn fifo(raw: &str) -> Item {
    Item::new(raw, EntryKind::Fifo, 0o644)
}

pub(crate) fn char_device(raw: &str, major: u32, minor: u32) -> Item {
    Item::new(raw, EntryKind::CharDevice(Device { major, minor }), 0o644)
}

/// `items` as an archive.
pub(crate) fn archive(items: &[Item]) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new());
    for item in items {
        writer.append(&item.entry, &mut item.data.as_slice()).unwrap();
    }
    writer.finish().unwrap()
}

pub(crate) fn open(path: &Path) -> OwnedFd {
    fs::File::open(path).unwrap().into()
}

pub(crate) fn apply_archive(root: &Path, style: ApplyStyle, bytes: &[u8]) -> Result<Applied, ApplyError> {
    let limits = Limits::default();
    apply(&mut Reader::new(bytes, &limits), open(root).as_fd(), style, &limits)
}

/// A place for trees, next to files that nothing in a tree may reach.
pub(crate) struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// With an empty tree called `root`.
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("victim")).unwrap();
        fs::write(dir.path().join("victim/canary"), "alive").unwrap();
        let place = Self { dir };
        place.tree("root");
        place
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// Another empty tree.
    pub(crate) fn tree(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    }

    /// The absolute path of the directory outside.
    pub(crate) fn victim(&self) -> String {
        self.dir.path().join("victim").to_str().unwrap().to_owned()
    }

    pub(crate) fn apply(&self, style: ApplyStyle, items: &[Item]) -> Result<Applied, ApplyError> {
        let before = self.canary();
        let result = apply_archive(&self.root(), style, &archive(items));
        assert_eq!(before, self.canary(), "something outside the root changed");
        result
    }

    /// Everything about what is outside that could change.
    fn canary(&self) -> Vec<String> {
        let mut seen = Vec::new();
        for path in ["", "victim", "victim/canary"] {
            let path = self.dir.path().join(path);
            let meta = fs::symlink_metadata(&path).unwrap();
            let xattrs = Subject::Fd(open(&path).as_fd()).list().unwrap();
            let names = meta.is_dir().then(|| {
                let mut names: Vec<_> = fs::read_dir(&path).unwrap().map(|name| name.unwrap().file_name()).collect();
                names.sort();
                names
            });
            seen.push(format!(
                "{:o} {}:{} links {} mtime {}.{} {names:?} {xattrs:?}",
                meta.mode(),
                meta.uid(),
                meta.gid(),
                meta.nlink(),
                meta.mtime(),
                meta.mtime_nsec()
            ));
        }
        seen.push(fs::read_to_string(self.dir.path().join("victim/canary")).unwrap());
        seen
    }
}

/// A tree in a few words for each path: `d/`, `f=content`, `l->target`, `w!` for a whiteout,
/// `d/ opaque`, `h==f` for a second name.
pub(crate) fn shape(root: &Path) -> Vec<String> {
    let mut first = HashMap::new();
    let mut lines = Vec::new();
    tree::walk(open(root).as_fd(), |found| {
        let name = found.path.as_bytes().escape_ascii().to_string();
        if found.kind != Kind::Directory && found.links_count > 1 {
            if let Some(other) = first.get(&found.inode) {
                lines.push(format!("{name}=={other}"));
                return Ok(());
            }
            first.insert(found.inode, name.clone());
        }
        let line = match found.kind {
            Kind::Directory if found.is_opaque().unwrap() => format!("{name}/ opaque"),
            Kind::Directory if found.path.is_root() => return Ok(()),
            Kind::Directory => format!("{name}/"),
            Kind::File => {
                let mut text = String::new();
                found.open().unwrap().read_to_string(&mut text).unwrap();
                format!("{name}={text}")
            }
            Kind::Symlink => format!("{name}->{}", found.link_target().unwrap().escape_ascii()),
            _ if found.is_whiteout() => format!("{name}!"),
            kind => format!("{name} {kind:?}"),
        };
        lines.push(line);
        Ok::<_, WalkError>(())
    })
    .unwrap();
    lines
}

/// All there is to know about a tree, by path.
pub(crate) fn snapshot(root: impl AsFd) -> BTreeMap<String, String> {
    let mut first = HashMap::new();
    let mut seen = BTreeMap::new();
    tree::walk(root.as_fd(), |found| {
        let name = found.path.as_bytes().escape_ascii().to_string();
        let content = match found.kind {
            Kind::File => {
                let mut bytes = Vec::new();
                found.open().unwrap().read_to_end(&mut bytes).unwrap();
                bytes.escape_ascii().to_string()
            }
            Kind::Symlink => found.link_target().unwrap().escape_ascii().to_string(),
            _ => String::new(),
        };
        let other = (found.kind != Kind::Directory && found.links_count > 1)
            .then(|| first.entry(found.inode).or_insert_with(|| name.clone()).clone())
            .filter(|other| *other != name);
        let xattrs: Vec<_> = found
            .xattrs()
            .unwrap()
            .into_iter()
            .map(|(name, value)| format!("{}={}", name.escape_ascii(), value.escape_ascii()))
            .collect();
        let line = format!(
            "{:?} {:o} {}:{} {}.{:09} {content:?} {xattrs:?} same as {other:?}",
            found.kind, found.mode, found.uid, found.gid, found.mtime.seconds, found.mtime.nanos
        );
        seen.insert(name, line);
        Ok::<_, WalkError>(())
    })
    .unwrap();
    seen
}

/// One path's line of [`snapshot`].
pub(crate) fn line(root: &Path, path: &str) -> String {
    snapshot(open(root)).remove(path).unwrap()
}

/// An overlay of `lowers` (uppermost first), read-only, not attached anywhere: it goes when the
/// descriptor does.
pub(crate) fn overlay(lowers: &[&Path]) -> OwnedFd {
    let list = lowers.iter().map(|path| path.to_str().unwrap()).collect::<Vec<_>>().join(":");
    mount_overlay(&[("lowerdir", &list)])
}

/// A writable overlay.
pub(crate) fn overlay_on(upper: &Path, work: &Path, lower: &Path) -> OwnedFd {
    mount_overlay(&[
        ("lowerdir", lower.to_str().unwrap()),
        ("upperdir", upper.to_str().unwrap()),
        ("workdir", work.to_str().unwrap()),
    ])
}

fn mount_overlay(options: &[(&str, &str)]) -> OwnedFd {
    let context = mount::fsopen("overlay", mount::FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    for (key, value) in options {
        mount::fsconfig_set_string(context.as_fd(), *key, *value).unwrap();
    }
    mount::fsconfig_create(context.as_fd()).unwrap();
    let attributes = mount::MountAttrFlags::empty();
    let mounted = mount::fsmount(context.as_fd(), mount::FsMountFlags::FSMOUNT_CLOEXEC, attributes).unwrap();
    rustix::fs::openat(mounted, ".", sys::DIRECTORY, Mode::empty()).unwrap()
}

/// What a store's fix-up layer does: gives implied directories what lies below them.
pub(crate) fn fix_up(layer: &Path, implied: impl Iterator<Item = EntryPath>, base: &Path) {
    for path in implied {
        let Ok(name) = str::from_utf8(path.as_bytes()) else { panic!("test names are text") };
        let (to, from) = (layer.join(name), base.join(name));
        let Ok(meta) = fs::symlink_metadata(&from) else { continue };
        if !meta.is_dir() {
            continue;
        }
        let (to, from) = (open(&to), open(&from));
        let stat = rustix::fs::fstat(&from).unwrap();
        let (uid, gid) = (rustix::fs::Uid::from_raw(stat.st_uid), rustix::fs::Gid::from_raw(stat.st_gid));
        rustix::fs::fchown(&to, Some(uid), Some(gid)).unwrap();
        rustix::fs::fchmod(&to, sys::mode(stat.st_mode)).unwrap();
        xattr::write(Subject::Fd(to.as_fd()), &xattr::read(Subject::Fd(from.as_fd())).unwrap(), false).unwrap();
        rustix::fs::futimens(&to, &sys::times(sys::mtime(&stat))).unwrap();
    }
}

/// A copy of a tree, links and metadata and all.
pub(crate) fn copy(from: &Path, to: &Path) {
    let mut writer = Writer::new(Vec::new());
    crate::diff::diff_trees(None, open(from).as_fd(), &mut writer).unwrap();
    apply_archive(to, ApplyStyle::Merged, &writer.finish().unwrap()).unwrap();
}

pub(crate) fn make_whiteout(dir: &Path, name: &str) {
    rustix::fs::mknodat(open(dir), name, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
}

pub(crate) fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
}
