//! `ply migrate --driver`: layers are kept as another driver keeps them.

use std::path::PathBuf;

use plies_oci::ErrorKind;
use plies_store::{Cancel, CatalogueError, LeaseOptions, TransferError};
use serde::Serialize;

use crate::Engine;
use crate::progress::Progress;
use crate::run::RunError;

/// Why layers could not be kept in another form. Those that were changed before stay so.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RepackError {
    /// What is mounted shows files that would go.
    #[error("{} is mounted: unmount it first (ply umount)", dir.display())]
    Mounted {
        /// Where.
        dir: PathBuf,
    },
    /// Finding out what is mounted.
    #[error("look at the mounts")]
    Mounts(#[from] RunError),
    /// A layer.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// Rows.
    #[error("read or change the catalogue")]
    Catalogue(#[from] CatalogueError),
}

impl RepackError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Mounted { .. } => ErrorKind::Busy,
            Self::Mounts(source) => source.kind(),
            Self::Transfer(source) => source.kind(),
            Self::Catalogue(source) => source.kind(),
        }
    }
}

/// What was done to the layers of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Repacked {
    /// Layers that are kept in another form now, or would be.
    pub changed_count: usize,
    /// Layers that could not be changed and stay as they are; none in a dry run, which does not try.
    pub kept_count: usize,
}

impl Engine {
    /// Keeps all layers that came as tars in the form that the engine's driver gives to them.
    ///
    /// # Errors
    /// [`RepackError`].
    pub fn repack(&self, dry_run: bool, progress: &dyn Progress, cancel: &Cancel) -> Result<Repacked, RepackError> {
        let lease = self.store().lease(LeaseOptions::process("repack"))?;
        let transfer = self.transfer(&lease, progress, cancel);
        let layers = transfer.to_repack()?;
        let mut done = Repacked { changed_count: 0, kept_count: 0 };
        if dry_run {
            done.changed_count = layers.len();
        } else if !layers.is_empty() {
            self.forget_dead_mounts()?;
            if let Some(dir) = self.mounted_dirs()?.into_iter().next() {
                return Err(RepackError::Mounted { dir });
            }
            for layer in layers {
                match transfer.repack(layer)? {
                    true => done.changed_count += 1,
                    false => done.kept_count += 1,
                }
            }
        }
        if !dry_run {
            self.store().remember_driver()?;
        }
        lease.release()?;
        Ok(done)
    }
}
