//! Whether a tree is the layer that a tar would unpack to.
//!
//! A layer is known by its diff ID, whoever brings it, so a tree may only carry one if it says what the tar says: the same
//! names with the same kinds, modes, owners, lengths and extended attributes, the same names for one file, and directories set
//! by the same layer.
//! Bytes are not compared: whoever keeps the tree would have had to change a file that nobody writes to. Whether a file has the
//! time that the tar says is told, so that somebody may look closer.

use std::collections::HashMap;
use std::io::{self, Read};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use plies_archive::tar::{Device, Entry, EntryKind, EntryPath, Reader};
use plies_archive::tree::{Descent, Names};
use plies_archive::whiteout::{Mark, Meaning, meaning};
use plies_archive::xattr::{is_content, is_wanted, names};
use plies_archive::{DirIndex, Implied};
use plies_store::ForeignName;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};

/// Names and values of extended attributes.
type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// What is listed under one name.
#[derive(Debug, PartialEq, Eq)]
enum Listed {
    Whiteout,
    Entry { kind: EntryKind, mode: u32, owner: (u32, u32), mtime_seconds: i64, xattrs: Xattrs },
}

/// What a tar has, by its names.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    /// How the root looks, if it says so.
    root: Option<Entry>,
    names: HashMap<EntryPath, Listed>,
}

/// A tree that is held against a listing, name by name, by several threads and in any order.
#[derive(Debug)]
pub(crate) struct Comparison<'l> {
    listing: &'l Listing,
    /// Names of the tree that are listed. One that is not, and is no directory on the way, is the end of it.
    found: AtomicUsize,
    other_times: AtomicBool,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// Directories that are not listed.
    implied: Vec<EntryPath>,
    /// Files that have more names, by inode, with the name that stands for each, and the other names that the tar has.
    files: HashMap<u64, EntryPath>,
    links: Vec<(u64, EntryPath)>,
}

/// A tree that is what a listing says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Agreed {
    /// Which of its directories are implied.
    pub(crate) index: DirIndex,
    /// All files have the times that the tar says: nobody has written to them since.
    pub(crate) same_times: bool,
}

impl Listing {
    /// Reads a tar's headers, from somebody who may do something else with the tar, too; `None` if it is none that a tree can be
    /// held against: it hides all that lies below a directory, or has a name twice.
    pub(crate) fn read_from<R: Read>(reader: &mut Reader<R>) -> Option<Self> {
        let mut listing = Self::default();
        while let Some(entry) = reader.next_entry().ok()? {
            let (path, listed) = match meaning(&entry.path).ok()? {
                Meaning::Ignored => continue,
                Meaning::Mark(Mark::Opaque) => return None,
                Meaning::Mark(Mark::Whiteout(name)) => {
                    let (dir, _) = entry.path.split()?;
                    (dir.join(name), Listed::Whiteout)
                }
                Meaning::Plain if entry.path.is_root() => match listing.root.replace(entry) {
                    Some(_) => return None,
                    None => continue,
                },
                Meaning::Plain => {
                    let (mode, owner, mtime_seconds) = (entry.mode, (entry.uid, entry.gid), entry.mtime.seconds);
                    let kind = match entry.kind {
                        EntryKind::File { size_bytes, .. } => EntryKind::File { size_bytes, sparse: None },
                        other => other,
                    };
                    let mut xattrs = entry.xattrs;
                    xattrs.retain(|(name, value)| is_wanted(name, value));
                    (entry.path, Listed::Entry { kind, mode, owner, mtime_seconds, xattrs })
                }
            };
            if listing.names.insert(path, listed).is_some() {
                return None;
            }
        }
        Some(listing)
    }

    /// How the root looks, if the tar says so.
    pub(crate) fn root(&self) -> Option<&Entry> {
        self.root.as_ref()
    }

    /// Begins to hold a tree against it.
    pub(crate) fn compare(&self) -> Comparison<'_> {
        Comparison {
            listing: self,
            found: AtomicUsize::new(0),
            other_times: AtomicBool::new(false),
            seen: Mutex::default(),
        }
    }

    /// Whether the canonical layer `tree`, with the implied directories `index`, is what this would unpack to, its root included.
    pub(crate) fn judge(&self, tree: BorrowedFd<'_>, index: &DirIndex) -> Option<DirIndex> {
        let looks = |stat: &Stat| (mode(stat), (stat.st_uid, stat.st_gid));
        let is_root =
            |stat: &Stat| self.root.as_ref().is_none_or(|root| looks(stat) == (root.mode, (root.uid, root.gid)));
        rustix::fs::fstat(tree).is_ok_and(|stat| is_root(&stat)).then_some(())?;
        Some(self.judge_below(tree).ok()??.but(index))
    }

    /// As [`Self::judge`], of all but the root, of a tree that was unpacked.
    pub(crate) fn judge_below(&self, tree: BorrowedFd<'_>) -> io::Result<Option<Agreed>> {
        let comparison = self.compare();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut descent = Descent::from(rustix::fs::openat(tree, ".", flags, Mode::empty())?);
        let mut pending = vec![(EntryPath::root(), Names::sorted(descent.here())?)];
        while let Some((dir, names)) = pending.last_mut() {
            let Some((name, _)) = names.advance() else {
                pending.pop();
                if !pending.is_empty() {
                    descent.leave()?;
                }
                continue;
            };
            let path = dir.join(name);
            let stat = rustix::fs::statat(descent.here(), name, AtFlags::SYMLINK_NOFOLLOW)?;
            let dir = descent.here();
            let xattrs = ForeignName::list_xattrs(dir, name)?;
            if !comparison.agrees(&ForeignName { path: &path, stat: &stat, dir, name, xattrs: &xattrs })? {
                return Ok(None);
            }
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                let flags = flags | OFlags::NOFOLLOW;
                let inner = rustix::fs::openat(descent.here(), name, flags, Mode::empty())?;
                let names_in = Names::sorted(inner.as_fd())?;
                descent.push(inner, name);
                pending.push((path, names_in));
            }
        }
        Ok(comparison.finish())
    }
}

impl Comparison<'_> {
    /// Whether a name that is not the root's is what is listed.
    pub(crate) fn agrees(&self, at: &ForeignName<'_>) -> io::Result<bool> {
        let ForeignName { path, stat, .. } = *at;
        let (is, owner) = (FileType::from_raw_mode(stat.st_mode), (stat.st_uid, stat.st_gid));
        let seen = || self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(listed) = self.listing.names.get(path) else {
            // On the way to something, and made up.
            let made_up =
                is == FileType::Directory && (mode(stat), owner) == (0o755, (0, 0)) && has_xattrs(at, &[], false)?;
            if made_up {
                seen().implied.push(path.clone());
            }
            return Ok(made_up);
        };
        self.found.fetch_add(1, Ordering::Relaxed);
        let is_whiteout = is == FileType::CharacterDevice && stat.st_rdev == 0;
        let Listed::Entry { kind, mode: m, owner: o, mtime_seconds, xattrs } = listed else { return Ok(is_whiteout) };
        let is_link = is == FileType::Symlink;
        let is_device = |device: &Device| {
            (device.major, device.minor) == (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev))
        };
        let is_kind = match kind {
            EntryKind::Directory => is == FileType::Directory,
            EntryKind::File { size_bytes, .. } => {
                // Somebody wrote to it, or would have us believe so.
                if stat.st_mtime != *mtime_seconds {
                    self.other_times.store(true, Ordering::Relaxed);
                }
                is == FileType::RegularFile && u64::try_from(stat.st_size) == Ok(*size_bytes)
            }
            EntryKind::HardLink { target } => {
                seen().links.push((stat.st_ino, target.clone()));
                return Ok(is != FileType::Directory);
            }
            EntryKind::Symlink { target } => is_link && at.link_target()? == *target,
            EntryKind::CharDevice(listed) => is == FileType::CharacterDevice && !is_whiteout && is_device(listed),
            EntryKind::BlockDevice(listed) => is == FileType::BlockDevice && is_device(listed),
            EntryKind::Fifo => is == FileType::Fifo,
        };
        // Two names of one file that the tar has as two files are two files.
        let is_alone = || {
            is == FileType::Directory || stat.st_nlink == 1 || seen().files.insert(stat.st_ino, path.clone()).is_none()
        };
        // Neither we nor others insist on attributes of what takes none of `user.`.
        let may_lack = !matches!(kind, EntryKind::File { .. } | EntryKind::Directory);
        let looks = is_kind && *o == owner && (*m == mode(stat) || is_link);
        Ok(looks && has_xattrs(at, xattrs, may_lack)? && is_alone())
    }

    /// When all names of the tree agree: whether all that is listed is there.
    pub(crate) fn finish(self) -> Option<Agreed> {
        let Self { listing, found, other_times, seen } = self;
        let Seen { implied, files, links } = seen.into_inner().unwrap_or_else(PoisonError::into_inner);
        let all_linked = links.iter().all(|(inode, target)| files.get(inode) == Some(target));
        let root = listing.root.is_none().then(EntryPath::root);
        let index = implied.into_iter().chain(root).map(|path| (path, Implied::OnTheWay)).collect();
        let same_times = !other_times.into_inner();
        (all_linked && found.into_inner() == listing.names.len()).then_some(Agreed { index, same_times })
    }
}

impl Agreed {
    /// Its implied directories; why, if somebody knows better.
    fn but(self, known: &DirIndex) -> DirIndex {
        let why = |path: &EntryPath| known.why_implied(path).unwrap_or(Implied::OnTheWay);
        self.index.implied().map(|path| (path.clone(), why(path))).collect()
    }
}

/// Whether what belongs to the content among the attributes of a name is what is listed, or, if it may lack some, a part of it.
fn has_xattrs(at: &ForeignName<'_>, listed: &[(Vec<u8>, Vec<u8>)], may_lack: bool) -> io::Result<bool> {
    let mut found = 0;
    for name in names(at.xattrs).filter(|name| is_content(name)) {
        let Some((_, value)) = listed.iter().find(|(listed, _)| listed == name) else { return Ok(false) };
        if at.xattr(name)? != *value {
            return Ok(false);
        }
        found += 1;
    }
    Ok(may_lack || found == listed.len())
}

fn mode(stat: &Stat) -> u32 {
    stat.st_mode & 0o7777
}

#[cfg(test)]
mod tests {
    use std::fs;
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

    #[test]
    fn a_file_with_another_time_is_told() {
        if !plies_testkit::tools::privileged() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let tar = archive(&[Member::file("f", "12345").mtime(1_600_000_000, 5)]);
        let listing = Listing::read_from(&mut Reader::new(&tar[..], &Limits::default())).unwrap();
        for (seconds, same_times) in [(1_600_000_000, true), (1_600_000_001, false)] {
            fs::write(dir.path().join("f"), "54321").unwrap();
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
            fs::File::options().write(true).open(dir.path().join("f")).unwrap().set_modified(time).unwrap();
            let agreed = listing.judge_below(fs::File::open(dir.path()).unwrap().as_fd()).unwrap().unwrap();
            assert_eq!(agreed.same_times, same_times);
        }
    }

    #[test]
    fn attributes_are_those_that_are_listed() {
        if !plies_testkit::tools::privileged() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let judge = |member: Member| {
            let tar = archive(&[member]);
            let listing = Listing::read_from(&mut Reader::new(&tar[..], &Limits::default())).unwrap();
            listing.judge_below(fs::File::open(dir.path()).unwrap().as_fd()).unwrap().is_some()
        };
        let plain = || Member::file("f", "");
        assert!(judge(plain()));
        assert!(!judge(plain().xattr("trusted.note", "x")), "one is missing");
        // No content of a layer, on either side.
        assert!(judge(plain().xattr("security.selinux", "x")));
        let set = |name: &str, value: &[u8]| {
            rustix::fs::setxattr(&path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
        };
        set("trusted.overlay.origin", b"");
        assert!(judge(plain()));
        set("trusted.note", b"x");
        assert!(!judge(plain()), "one too many");
        assert!(judge(plain().xattr("trusted.note", "x")));
        assert!(!judge(plain().xattr("trusted.note", "y")), "another value");
        assert!(!judge(plain().xattr("trusted.note", "x").xattr("trusted.more", "x")));
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
