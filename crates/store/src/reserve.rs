//! The reserve: some megabytes that are kept from everybody, so that there is room to make room.
//!
//! To remove something takes rows, and those take pages of the catalogue, which never writes over what it has. On a full
//! file system even a collection would fail. So a file of zeroes lies beside the catalogue, and goes before a store is
//! opened by somebody who wants to make room ([`crate::OpenOptions::use_reserve`]) and finds none. Whoever opens the store
//! later, when there is plenty, makes it again.

use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::FallocateFlags;

use crate::error::{At as _, FileError};
use crate::open::create_private;

/// Its name, in `catalog/`.
pub(crate) const RESERVE: &str = "reserve";

/// Its size. A collection writes up to 3 MiB of pages between two syncs (see `gc`), and redb keeps as many until the next.
pub(crate) const RESERVE_BYTES: u64 = 8 << 20;

/// It is made if the file system has so many times its size free: on a small or nearly full one it would be what is missing.
const PLENTY: u64 = 16;

/// Makes room for a store in `catalog` to be opened and tidied up, if there is none. Needs no lock: whoever has it can
/// do without, and it is made again.
///
/// # Errors
/// [`FileError`].
pub(crate) fn spend(catalog: &Path) -> Result<(), FileError> {
    if free_bytes(catalog)?.is_none_or(|free| free >= RESERVE_BYTES) {
        return Ok(());
    }
    let path = catalog.join(RESERVE);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(FileError::new("remove", path, error)),
        _ => Ok(()),
    }
}

/// Makes the reserve if it is not there and there is plenty. That it cannot be made is no error: all works without it.
///
/// # Errors
/// [`FileError`] if what is left of it cannot be removed.
pub(crate) fn keep(catalog: &Path) -> Result<(), FileError> {
    let path = catalog.join(RESERVE);
    if fs::symlink_metadata(&path).is_ok() || free_bytes(catalog)?.is_none_or(|free| free < PLENTY * RESERVE_BYTES) {
        return Ok(());
    }
    let made = create_private(&path)
        .and_then(|file| Ok(rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, RESERVE_BYTES)?));
    if made.is_err() {
        fs::remove_file(&path).at("remove", path)?;
    }
    Ok(())
}

/// What is free for this process; `None` if there is no such directory yet.
fn free_bytes(dir: &Path) -> Result<Option<u64>, FileError> {
    match rustix::fs::statvfs(dir) {
        Ok(stat) => Ok(Some(stat.f_bavail.saturating_mul(stat.f_frsize))),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(error).at("stat the file system of", dir),
    }
}
