//! The files of an image's tree, taken out of the store: `-o type=local` and `-o type=tar`.

use std::io::{self, BufWriter, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use plies_archive::{DiffError, diff_trees, tar};
use plies_image::ImageError;
use plies_oci::ErrorKind;
use plies_store::{Attach, CatalogueError, Mounted, SnapshotError, canceled_inside};

use crate::context::{self, CopyError, CopyOptions, Destination, SelectError, Selection, Tree};
use crate::exec::Cancel;
use crate::progress::Watched;
use crate::{Canceled, Engine};

/// Where a tree's files go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TreeOutput {
    /// Into a directory, over what is there.
    Directory(PathBuf),
    /// Into a tar, which appears when it is whole.
    Tar(PathBuf),
    /// As a tar, to standard output.
    Stdout,
}

/// Why a tree could not be exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its tree.
    #[error("mount the tree")]
    Snapshot(#[from] SnapshotError),
    /// Choosing its files.
    #[error(transparent)]
    Select(#[from] SelectError),
    /// Copying its files.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// Writing the tar.
    #[error("write {}", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why it can't be written.
        #[source]
        source: io::Error,
    },
    /// Reading the tree for the tar.
    #[error("write the tree to {}", path.display())]
    Tar {
        /// To where.
        path: PathBuf,
        /// Why.
        #[source]
        source: DiffError,
    },
    /// The catalogue failed.
    #[error("read or change the catalogue")]
    Catalogue(#[from] CatalogueError),
    /// The caller asked to stop.
    #[error(transparent)]
    Canceled(#[from] Canceled),
}

impl ExportError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Image(source) => source.kind(),
            Self::Snapshot(source) => source.kind(),
            Self::Select(source) => source.kind(),
            Self::Copy(source) => source.kind(),
            Self::Write { .. } | Self::Tar { .. } => ErrorKind::Unavailable,
            Self::Catalogue(source) => source.kind(),
            Self::Canceled(source) => source.kind(),
        }
    }
}

impl Engine {
    /// Writes the files of an image's tree, with all their metadata.
    ///
    /// # Errors
    /// [`ExportError`]. A directory then holds a part of the files; of a tar there is nothing.
    pub fn export_tree(&self, image: &str, output: &TreeOutput, cancel: &Cancel) -> Result<(), ExportError> {
        self.with_lease("export a tree", |lease| {
            let mut mounted = None;
            if let Some(snapshot) = self.find_image(image)?.row.snapshot
                && lease.hold_if_present(snapshot)?
            {
                mounted = Some(self.store().snapshots().view(snapshot, Attach::Detached)?);
            }
            let written = match output {
                TreeOutput::Directory(path) => copy_tree(mounted.as_ref(), path, cancel),
                TreeOutput::Stdout => write_tar(mounted.as_ref(), io::stdout(), Path::new("standard output"), cancel),
                TreeOutput::Tar(path) => write_file(mounted.as_ref(), path, cancel),
            };
            mounted.map_or(Ok(()), Mounted::unmount)?;
            written.map_err(|error| if canceled_inside(&error) { Canceled.into() } else { error })
        })
    }
}

fn copy_tree(mounted: Option<&Mounted>, path: &Path, cancel: &Cancel) -> Result<(), ExportError> {
    let io = |source| ExportError::Write { path: path.to_owned(), source };
    std::fs::create_dir_all(path).map_err(io)?;
    let dest = Tree::open_dir(path).map_err(io)?;
    let Some(mounted) = mounted else { return Ok(()) };
    let root = rustix::io::fcntl_dupfd_cloexec(mounted.root(), 0).map_err(|errno| io(errno.into()))?;
    let tree = Tree::stage(root).cancelable(cancel);
    let mut selection = Selection::new(None);
    selection.add(&tree, b"/")?;
    let options = CopyOptions { dest: Destination::new(b"/", b"/"), owner: None, chmod: None };
    context::copy(&tree, &selection, dest.as_fd(), &options)?;
    Ok(())
}

fn write_file(mounted: Option<&Mounted>, path: &Path, cancel: &Cancel) -> Result<(), ExportError> {
    let io = |source| ExportError::Write { path: path.to_owned(), source };
    let partial = PathBuf::from(format!("{}.partial", path.display()));
    let written = std::fs::File::create(&partial).map_err(io).and_then(|file| {
        write_tar(mounted, &file, path, cancel)?;
        file.sync_all().map_err(io)?;
        std::fs::rename(&partial, path).map_err(io)
    });
    if written.is_err() {
        drop(std::fs::remove_file(&partial));
    }
    written
}

fn write_tar<W: io::Write>(mounted: Option<&Mounted>, out: W, path: &Path, cancel: &Cancel) -> Result<(), ExportError> {
    let io = |source: io::Error| ExportError::Write { path: path.to_owned(), source };
    let mut writer = tar::Writer::new(Watched { inner: BufWriter::new(out), task: None, cancel });
    if let Some(mounted) = mounted {
        let written = diff_trees(None, mounted.root().as_fd(), &mut writer);
        written.map_err(|source| ExportError::Tar { path: path.to_owned(), source })?;
    }
    let finished = writer.finish().map_err(|source| ExportError::Tar { path: path.to_owned(), source: source.into() });
    finished?.flush().map_err(io)
}
