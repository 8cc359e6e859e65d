//! Whether a tree is the layer that a tar would unpack to.
//!
//! A layer is known by its diff ID, whoever brings it, so a tree may only carry one if it says what the tar says: the same
//! names with the same kinds, modes, owners and lengths, the same names for one file, and directories set by the same layer.
//! Bytes are not compared: whoever keeps the tree would have had to change a file that nobody writes to.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::PathBuf;

use plies_archive::tar::{EntryKind, EntryPath, Reader};
use plies_archive::whiteout::{Mark, Meaning, meaning};
use plies_archive::{DirIndex, Implied};

/// What is listed under one name.
#[derive(Debug, PartialEq, Eq)]
enum Listed {
    Whiteout,
    Entry { kind: EntryKind, mode: u32, owner: (u32, u32) },
}

/// What a tar has, by its names.
#[derive(Debug)]
pub(crate) struct Listing(BTreeMap<EntryPath, Listed>);

impl Listing {
    /// Reads a tar's headers, from somebody who may do something else with the tar, too; `None` if it is none that a tree can be
    /// held against: it hides all that lies below a directory, or has a name twice.
    pub(crate) fn read_from<R: Read>(reader: &mut Reader<R>) -> Option<Self> {
        let mut listed = BTreeMap::new();
        while let Some(entry) = reader.next_entry().ok()? {
            let (path, entry) = match meaning(&entry.path).ok()? {
                Meaning::Ignored => continue,
                Meaning::Mark(Mark::Opaque) => return None,
                Meaning::Mark(Mark::Whiteout(name)) => {
                    let (dir, _) = entry.path.split()?;
                    (dir.join(name), Listed::Whiteout)
                }
                Meaning::Plain => {
                    let (mode, owner) = (entry.mode, (entry.uid, entry.gid));
                    let kind = match entry.kind {
                        EntryKind::File { size_bytes, .. } => EntryKind::File { size_bytes, sparse: None },
                        other => other,
                    };
                    (entry.path.clone(), Listed::Entry { kind, mode, owner })
                }
            };
            if listed.insert(path, entry).is_some() {
                return None;
            }
        }
        Some(Self(listed))
    }

    /// Whether the canonical layer `tree` is what this would unpack to, and which of its directories are implied then.
    pub(crate) fn judge(mut self, tree: BorrowedFd<'_>, index: &DirIndex) -> Option<DirIndex> {
        self.compare(tree, index).ok().flatten()
    }

    fn compare(&mut self, tree: BorrowedFd<'_>, index: &DirIndex) -> io::Result<Option<DirIndex>> {
        let root = PathBuf::from(format!("/proc/self/fd/{}", tree.as_raw_fd()));
        let mut implied: Vec<(EntryPath, Implied)> = Vec::new();
        // Files by inode, with the name that stands for each, and the other names that the tar has.
        let mut files: HashMap<u64, EntryPath> = HashMap::new();
        let mut links: Vec<(u64, EntryPath)> = Vec::new();
        let mut pending = vec![(EntryPath::root(), root)];
        while let Some((name, path)) = pending.pop() {
            // The root is behind a link of the kernel's own.
            let meta = if name.is_root() { fs::metadata(&path)? } else { fs::symlink_metadata(&path)? };
            let (mode, owner) = (meta.mode() & 0o7777, (meta.uid(), meta.gid()));
            let listed = self.0.remove(&name);
            if meta.is_dir() {
                match listed {
                    Some(Listed::Entry { kind: EntryKind::Directory, mode: m, owner: o })
                        if (m, o) == (mode, owner) => {}
                    None if name.is_root() || (mode, owner) == (0o755, (0, 0)) => {
                        implied.push((name.clone(), index.why_implied(&name).unwrap_or(Implied::OnTheWay)));
                    }
                    _ => return Ok(None),
                }
                for entry in fs::read_dir(&path)? {
                    let entry = entry?;
                    pending.push((name.join(entry.file_name().as_bytes()), entry.path()));
                }
                continue;
            }
            let kind = meta.file_type();
            let is_whiteout = kind.is_char_device() && meta.rdev() == 0;
            let is_same = match listed {
                Some(Listed::Whiteout) => is_whiteout,
                Some(Listed::Entry { kind: EntryKind::HardLink { target }, .. }) => {
                    links.push((meta.ino(), target));
                    true
                }
                Some(Listed::Entry { kind: listed, mode: m, owner: o }) => {
                    let is_link = kind.is_symlink();
                    let device = |device: plies_archive::tar::Device| {
                        (device.major, device.minor) == (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()))
                    };
                    let is_kind = match listed {
                        EntryKind::File { size_bytes, .. } => kind.is_file() && size_bytes == meta.len(),
                        EntryKind::Symlink { target } => {
                            is_link && fs::read_link(&path)?.as_os_str().as_bytes() == target
                        }
                        EntryKind::CharDevice(listed) => kind.is_char_device() && !is_whiteout && device(listed),
                        EntryKind::BlockDevice(listed) => kind.is_block_device() && device(listed),
                        EntryKind::Fifo => kind.is_fifo(),
                        EntryKind::Directory | EntryKind::HardLink { .. } => false,
                    };
                    // Two names of one file that the tar has as two files are two files.
                    is_kind && o == owner && (m == mode || is_link) && files.insert(meta.ino(), name).is_none()
                }
                None => false,
            };
            if !is_same {
                return Ok(None);
            }
        }
        let all_linked = links.iter().all(|(inode, target)| files.get(inode) == Some(target));
        Ok((all_linked && self.0.is_empty()).then(|| implied.into_iter().collect()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use plies_archive::Limits;
    use plies_testkit::tar::{Member, archive};

    use super::*;

    /// What a tar of these members says of a tree that has a directory with a file, its other name and a link.
    fn judged(members: &[Member]) -> Option<DirIndex> {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("d")).unwrap();
        fs::write(at("d/f"), "12345").unwrap();
        fs::hard_link(at("d/f"), at("d/g")).unwrap();
        symlink("f", at("d/l")).unwrap();
        for (name, mode) in [("d", 0o755), ("d/f", 0o644)] {
            fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        let tar = archive(members);
        let listing = Listing::read_from(&mut Reader::new(&tar[..], &Limits::default()))?;
        listing.judge(fs::File::open(dir.path()).unwrap().as_fd(), &DirIndex::default())
    }

    fn members() -> Vec<Member> {
        vec![
            Member::dir("d"),
            Member::file("d/f", "12345"),
            Member::hard_link("d/g", "d/f"),
            Member::symlink("d/l", "f"),
        ]
    }

    #[test]
    fn a_tree_is_a_tar_if_all_that_counts_is_the_same() {
        if !plies_testkit::tools::privileged() {
            return;
        }
        let index = judged(&members()).unwrap();
        assert!(index.is_implied(&EntryPath::root()) && !index.is_implied(&EntryPath::clean(b"d").unwrap()));
        let index = judged(&members()[1..]).unwrap();
        assert!(
            index.is_implied(&EntryPath::clean(b"d").unwrap()),
            "a tar that does not list it says nothing about it"
        );

        let other = |at: usize, member: Member| {
            let mut members = members();
            members[at] = member;
            judged(&members)
        };
        assert!(other(0, Member::dir("d").mode(0o700)).is_none());
        assert!(other(1, Member::file("d/f", "1234")).is_none(), "another length");
        assert!(other(1, Member::file("d/f", "12345").mode(0o600)).is_none());
        assert!(other(1, Member::file("d/f", "12345").owner(1, 0)).is_none());
        assert!(other(2, Member::file("d/g", "12345")).is_none(), "two files, not two names");
        assert!(other(3, Member::symlink("d/l", "g")).is_none());
        assert!(other(3, Member::whiteout("d/l")).is_none());
        assert!(judged(&members()[..3]).is_none(), "a name too many");
        assert!(judged(&[members(), vec![Member::file("x", "")]].concat()).is_none(), "one too few");
        assert!(judged(&[members(), vec![Member::opaque("d")]].concat()).is_none());
    }
}
