//! Id maps: a mount that shows other owners than there are on disk.
//!
//! The kernel maps the ids of a *mount* as a user namespace would (`mount_setattr(2)`), and overlayfs keeps to what its
//! layers' mounts say. So layers and upper stay as they are on disk, and what is written through the mapped mount lands
//! there unmapped.

use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use plies_oci::ErrorKind;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::thread::{Gid, Uid};
use serde::{Deserialize, Serialize};

use crate::sys;

/// Ranges of a map that the kernel takes (`UID_GID_MAP_MAX_EXTENTS`, include/linux/user_namespace.h).
const RANGES_MAX: usize = 340;

/// Why maps are none.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdMapError {
    /// Not of the form.
    #[error("id range {text:?} is not INSIDE:OUTSIDE:COUNT, three numbers of which the last is not 0")]
    Range {
        /// As given.
        text: String,
    },
    /// Longer than there are ids.
    #[error("id range {range} passes the last id")]
    Overflow {
        /// Which.
        range: IdRange,
    },
    /// Two ranges map the same.
    #[error("id ranges {a} and {b} overlap")]
    Overlap {
        /// One.
        a: IdRange,
        /// The other.
        b: IdRange,
    },
    /// Root is nobody.
    #[error("the {what} map does not say who 0 is")]
    NoRoot {
        /// `uid` or `gid`.
        what: &'static str,
    },
    /// Too many ranges.
    #[error("the {what} map has {count} ranges, the kernel takes {RANGES_MAX}")]
    TooMany {
        /// `uid` or `gid`.
        what: &'static str,
        /// How many.
        count: usize,
    },
}

impl IdMapError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::TooMany { .. } => ErrorKind::Limit,
            _ => ErrorKind::InvalidInput,
        }
    }
}

/// Ids in a row: those from `inside` on, which are on disk, show as those from `outside` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRange {
    /// The first on disk.
    pub inside: u32,
    /// The first that shows.
    pub outside: u32,
    /// How many.
    pub count: u32,
}

impl IdRange {
    fn ends(&self) -> Option<(u32, u32)> {
        // The last id of all means none.
        let end = |first: u32| first.checked_add(self.count).filter(|end| self.count > 0 && *end < u32::MAX);
        Some((end(self.inside)?, end(self.outside)?))
    }

    fn overlaps(&self, other: &Self) -> bool {
        let (a, b) = (u64::from(self.count), u64::from(other.count));
        let meet = |x: u32, y: u32| u64::from(x) < u64::from(y) + b && u64::from(y) < u64::from(x) + a;
        meet(self.inside, other.inside) || meet(self.outside, other.outside)
    }
}

impl fmt::Display for IdRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.inside, self.outside, self.count)
    }
}

impl FromStr for IdRange {
    type Err = IdMapError;

    fn from_str(text: &str) -> Result<Self, IdMapError> {
        let numbers: Result<Vec<u32>, _> = text.split(':').map(str::parse).collect();
        match numbers.as_deref() {
            Ok([inside, outside, count @ 1..=u32::MAX]) => {
                Ok(Self { inside: *inside, outside: *outside, count: *count })
            }
            _ => Err(IdMapError::Range { text: text.to_owned() }),
        }
    }
}

/// The owners that a mount shows, users and groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMaps {
    uids: Vec<IdRange>,
    gids: Vec<IdRange>,
}

impl IdMaps {
    /// Checks them as the kernel would.
    ///
    /// # Errors
    /// [`IdMapError`].
    pub fn new(uids: Vec<IdRange>, gids: Vec<IdRange>) -> Result<Self, IdMapError> {
        for (what, ranges) in [("uid", &uids), ("gid", &gids)] {
            if ranges.len() > RANGES_MAX {
                return Err(IdMapError::TooMany { what, count: ranges.len() });
            }
            for (at, range) in ranges.iter().enumerate() {
                range.ends().ok_or(IdMapError::Overflow { range: *range })?;
                if let Some(other) = ranges[..at].iter().find(|other| other.overlaps(range)) {
                    return Err(IdMapError::Overlap { a: *other, b: *range });
                }
            }
            root_of(ranges).ok_or(IdMapError::NoRoot { what })?;
        }
        Ok(Self { uids, gids })
    }

    /// That of users.
    pub fn uids(&self) -> &[IdRange] {
        &self.uids
    }

    /// That of groups.
    pub fn gids(&self) -> &[IdRange] {
        &self.gids
    }

    /// A user namespace with these maps.
    fn namespace(&self) -> io::Result<OwnedFd> {
        let lines = |ranges: &[IdRange]| -> String {
            ranges.iter().map(|range| format!("{} {} {}\n", range.inside, range.outside, range.count)).collect()
        };
        sys::with_user_namespace(|child| {
            let process = PathBuf::from(format!("/proc/{}", child.as_raw_nonzero()));
            std::fs::write(process.join("uid_map"), lines(&self.uids))?;
            std::fs::write(process.join("gid_map"), lines(&self.gids))?;
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            Ok(rustix::fs::open(process.join("ns/user"), flags, Mode::empty())?)
        })
    }

    /// Has the calling thread act as the root of these maps, with the rights that it had: overlayfs makes files in the
    /// name of whoever mounted it, and on a mapped mount nobody else is anybody.
    pub(crate) fn become_root(&self) -> io::Result<()> {
        let known = "because maps without root are none";
        let (uid, gid) = (root_of(&self.uids).expect(known), root_of(&self.gids).expect(known));
        rustix::thread::set_thread_res_gid(None, Gid::from_raw(gid), None)?;
        rustix::thread::set_thread_res_uid(None, Uid::from_raw(uid), None)?;
        let mut rights = rustix::thread::capabilities(None)?;
        rights.effective = rights.permitted;
        Ok(rustix::thread::set_capabilities(None, rights)?)
    }
}

fn root_of(ranges: &[IdRange]) -> Option<u32> {
    ranges.iter().find(|range| range.inside == 0).map(|range| range.outside)
}

/// Directories that show mapped owners. Nobody sees them but who opens them here.
#[derive(Debug)]
pub(crate) struct MappedDirs {
    namespace: OwnedFd,
    dirs: Vec<(PathBuf, OwnedFd)>,
}

impl MappedDirs {
    pub(crate) fn new<'a>(maps: &IdMaps, dirs: impl Iterator<Item = &'a Path>) -> io::Result<Self> {
        let namespace = maps.namespace()?;
        let map = |dir: &Path| {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let clone = open_tree(rustix::fs::CWD, dir, flags)?;
            sys::map_ids(clone.as_fd(), namespace.as_fd())?;
            Ok((dir.to_owned(), clone))
        };
        let dirs = dirs.map(map).collect::<io::Result<_>>()?;
        Ok(Self { namespace, dirs })
    }

    /// Has a mount that is attached nowhere show mapped owners too.
    pub(crate) fn map(&self, mount: BorrowedFd<'_>) -> io::Result<()> {
        sys::map_ids(mount, self.namespace.as_fd())
    }

    /// Opens a directory beneath one of them; `None` if it lies elsewhere.
    pub(crate) fn open(&self, path: &Path) -> Option<io::Result<OwnedFd>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        self.dirs.iter().find_map(|(dir, mount)| {
            let inside = path.strip_prefix(dir).ok()?;
            Some(rustix::fs::openat(mount, inside, flags, Mode::empty()).map_err(Into::into))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_and_written() {
        assert_eq!("0:100000:65536".parse::<IdRange>().unwrap().to_string(), "0:100000:65536");
        for bad in ["", "0:1", "0:1:0", "0:1:2:3", "-1:0:1", "0:4294967296:1", "a:b:c"] {
            assert!(bad.parse::<IdRange>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn maps_are_unambiguous_and_know_root() {
        let maps = |ranges: &[&str]| {
            let ranges: Vec<IdRange> = ranges.iter().map(|range| range.parse().unwrap()).collect();
            IdMaps::new(ranges, vec!["0:0:1".parse().unwrap()])
        };
        maps(&["0:100000:1000", "1000:1000:1", "1001:101001:10"]).unwrap();
        assert!(matches!(maps(&["0:10:10", "9:30:1"]), Err(IdMapError::Overlap { .. })));
        assert!(matches!(maps(&["0:10:10", "10:19:1"]), Err(IdMapError::Overlap { .. })));
        assert!(matches!(maps(&["0:4294967290:5"]), Err(IdMapError::Overflow { .. })));
        assert!(matches!(maps(&["1:10:10"]), Err(IdMapError::NoRoot { what: "uid" })));
        assert!(matches!(maps(&[]), Err(IdMapError::NoRoot { .. })));
        let many: Vec<String> = (0..341).map(|n| format!("{n}:{n}:1")).collect();
        assert!(matches!(maps(&many.iter().map(String::as_str).collect::<Vec<_>>()), Err(IdMapError::TooMany { .. })));
    }
}
