//! Trees that builds copy from and to: the build context, mounted stages, and the tree being built.
//!
//! ```text
//! mod.rs     Tree: a directory handle; reading one file of it
//! select.rs  COPY's sources: ignore rules, what is chosen
//! walk.rs    one entry of a source after the other
//! hash.rs    the hash of what was chosen      digest.rs  the one that BuildKit has for it
//! copy.rs    putting it somewhere
//! ```
//!
//! Resolution, wildcards, patterns, walking and what of a file is hashed are the build cache's
//! ([`plies_cache::contenthash`]). Every path is resolved beneath a directory handle, one component at a time or by `openat2`, never as a joined string.
//! Trees may change while they are read (a context is a user's directory): what is hashed and what is copied are then
//! both some state of each file, and nothing outside the tree is ever touched.

mod copy;
mod digest;
mod hash;
mod select;
#[cfg(test)]
mod tests;
mod walk;

pub use copy::{Chmod, ChmodError, Copied, CopyError, CopyOptions, Destination, Owner, copy};
pub use hash::{ContentHash, HashError, ListedFile};
pub use select::{SelectError, Selected, Selection};

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use plies_cache::contenthash::inroot;

use crate::exec::Cancel;

/// Who owns what a tree holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owners {
    /// Whoever the files say: for stages.
    AsTheyAre,
    /// Root: for the build context, whose owners are the accident of who checked it out.
    Root,
}

/// A directory handle that sources are taken from: the build context, or the mounted tree of a stage.
#[derive(Debug)]
pub struct Tree {
    dir: OwnedFd,
    owners: Owners,
    ignore: Option<crate::dockerfile::Ignore>,
    cancel: Cancel,
}

impl Tree {
    /// A build context: owners count as root, and what `ignore` hides is not there.
    pub fn context(dir: OwnedFd, ignore: Option<crate::dockerfile::Ignore>) -> Self {
        Self { dir, owners: Owners::Root, ignore, cancel: Cancel::new() }
    }

    /// A mounted stage or image.
    pub fn stage(dir: OwnedFd) -> Self {
        Self { dir, owners: Owners::AsTheyAre, ignore: None, cancel: Cancel::new() }
    }

    /// Lets hashing and copying out of this tree stop when asked to, with [`Canceled`](crate::Canceled) as the cause.
    #[must_use]
    pub fn cancelable(mut self, cancel: &Cancel) -> Self {
        self.cancel = cancel.clone();
        self
    }

    /// Opens a directory of the host for [`Tree::context`] or [`Tree::stage`].
    ///
    /// # Errors
    /// As `open(2)`; `ENOTDIR` for anything but a directory.
    pub fn open_dir(path: &Path) -> io::Result<OwnedFd> {
        use rustix::fs::{Mode, OFlags};
        Ok(rustix::fs::open(path, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// Reads one regular file inside the tree, whatever the ignore rules say: for the Dockerfile and the ignore file.
    ///
    /// # Errors
    /// `NotFound`; `InvalidInput` for anything but a regular file; `FileTooLarge` beyond `limit_bytes`.
    pub fn read_file(&self, path: &[u8], limit_bytes: u64) -> io::Result<Vec<u8>> {
        inroot::read_file(self.dir.as_fd(), path, limit_bytes)
    }

    /// Whose the files are.
    pub fn owners(&self) -> Owners {
        self.owners
    }
}

impl AsFd for Tree {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}
