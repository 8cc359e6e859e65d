//! `ply layer`: Docker's layer store by hand.
//!
//! What a user registers or commits is held by `user`, once for every time, until he releases it.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};

use plies_archive::{ChangeKind, compress};
use plies_image::{ChainInfo, LayerStore, LayerStoreError, LayerStoreOptions, NewRwLayer, RemovedLayer, RwInfo};
use plies_oci::{ChainId, DiffId, ErrorKind};
use plies_store::{CatalogueError, IdMaps, IdRange};
use rustix::fs::{Mode, OFlags};
use serde::Serialize;

use crate::exec::Cancel;
use crate::progress::Progress;
use crate::{Engine, Input, RunError};
use plies_cache::contenthash::inroot;

/// Who holds what a user asked for.
const USER: &str = "user";

/// Bytes that tell how a stream is packed.
const HEAD_BYTES: u64 = 512;

/// What every container needs and no image has (moby, `daemon/initlayer/setup_unix.go`).
const INIT_DIRS: [&str; 4] = ["/dev/pts", "/dev/shm", "/proc", "/sys"];
const INIT_FILES: [&str; 5] = ["/.dockerenv", "/etc/resolv.conf", "/etc/hosts", "/etc/hostname", "/dev/console"];
const INIT_LINK: (&str, &str) = ("/etc/mtab", "/proc/mounts");

/// Why a request on layers failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayersError {
    /// The layer store said no.
    #[error(transparent)]
    Layers(#[from] LayerStoreError),
    /// Mounting, or a mount in the way.
    #[error(transparent)]
    Mount(Box<RunError>),
    /// It is not mounted by `ply layer rw mount`.
    #[error("writable layer {name:?} is not mounted")]
    NotMounted {
        /// Which.
        name: String,
    },
    /// The tar to register can't be read.
    #[error("read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The catalogue failed.
    #[error("read or change the catalogue")]
    Catalogue(#[from] CatalogueError),
}

impl From<RunError> for LayersError {
    fn from(error: RunError) -> Self {
        Self::Mount(Box::new(error))
    }
}

impl LayersError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Layers(source) => source.kind(),
            Self::Mount(source) => source.kind(),
            Self::NotMounted { .. } => ErrorKind::FailedPrecondition,
            Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorKind::NotFound,
            Self::Read { .. } => ErrorKind::Unavailable,
            Self::Catalogue(source) => source.kind(),
        }
    }
}

/// One line of `ply layer ls`.
#[derive(Debug, Clone, Serialize)]
pub struct LayerSummary {
    /// The chain that it completes.
    pub chain_id: ChainId,
    /// The digest of its tar.
    pub diff_id: DiffId,
    /// The chain below it.
    pub parent: Option<ChainId>,
    /// Layers in the chain.
    pub depth: u32,
    /// Bytes in files of this layer.
    pub diff_bytes: u64,
    /// Bytes in files of the whole chain.
    pub chain_bytes: u64,
    /// Where its files are: a layer of the store.
    pub layer: String,
    /// When it was registered, RFC 3339.
    pub created: String,
}

/// What `ply layer inspect` shows.
#[derive(Debug, Clone, Serialize)]
pub struct LayerDetails {
    /// As in the list.
    #[serde(flatten)]
    pub summary: LayerSummary,
    /// Layers that were registered on top of it.
    pub children: Vec<ChainId>,
    /// Who holds it: `user`, `image:<id>`, `rw:<name>`.
    pub holders: Vec<Holding>,
}

/// Who holds a layer.
#[derive(Debug, Clone, Serialize)]
pub struct Holding {
    /// Who.
    pub holder: String,
    /// How often.
    pub count: u64,
}

/// A layer that went.
#[derive(Debug, Clone, Serialize)]
pub struct RemovedLayerSummary {
    /// The chain that it completed.
    pub chain_id: ChainId,
    /// The digest of its tar.
    pub diff_id: DiffId,
    /// Bytes in files of this layer.
    pub diff_bytes: u64,
    /// Bytes in files of the whole chain.
    pub chain_bytes: u64,
}

/// A writable layer.
#[derive(Debug, Clone, Serialize)]
pub struct RwSummary {
    /// Its name.
    pub name: String,
    /// What it stands on.
    pub parent: Option<ChainId>,
    /// Its upper directory.
    pub mount_id: String,
    /// Its init layer, if it has one.
    pub init_id: Option<String>,
    /// The security label of its mounts.
    pub label: Option<String>,
    /// Whose its files show as while it is mounted, as `INSIDE:OUTSIDE:COUNT`: users.
    pub uid_map: Vec<String>,
    /// The same of groups.
    pub gid_map: Vec<String>,
    /// Where it is mounted by `ply layer rw mount`.
    pub mounted_on: Option<String>,
    /// When it was made, RFC 3339.
    pub created: String,
}

/// One path that was changed.
#[derive(Debug, Clone, Serialize)]
pub struct ChangeSummary {
    /// `A`, `M` or `D`.
    pub kind: char,
    /// Which; bytes that are no UTF-8 are escaped.
    pub path: String,
}

impl From<ChainInfo> for LayerSummary {
    fn from(info: ChainInfo) -> Self {
        let ChainInfo { chain_id, diff_id, parent, layer, depth, diff_bytes, chain_bytes, created } = info;
        let (layer, created) = (layer.to_string(), crate::rfc3339(created));
        Self { chain_id, diff_id, parent, depth, diff_bytes, chain_bytes, layer, created }
    }
}

fn gone(removed: Vec<RemovedLayer>) -> Vec<RemovedLayerSummary> {
    let summary = |layer: RemovedLayer| {
        let RemovedLayer { chain_id, diff_id, chain_bytes, diff_bytes } = layer;
        RemovedLayerSummary { chain_id, diff_id, diff_bytes, chain_bytes }
    };
    removed.into_iter().map(summary).collect()
}

impl Engine {
    /// The layer store; references that dead processes left are dropped.
    pub(crate) fn layer_store(&self) -> Result<LayerStore, LayerStoreError> {
        LayerStore::open(self.store(), LayerStoreOptions::default())
    }

    /// Registers a layer from a tar, plain or packed, on top of `parent`.
    ///
    /// # Errors
    /// [`LayersError`]; then nothing is registered.
    pub fn register_layer(
        &self,
        input: &Input,
        parent: Option<&str>,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<LayerSummary, LayersError> {
        let layers = self.layer_store()?;
        let parent = parent.map(|parent| layers.find(parent)).transpose()?;
        let (path, mut stream): (PathBuf, Box<dyn Read + Send>) = match input {
            Input::Stdin => ("<standard input>".into(), Box::new(io::stdin())),
            Input::Path(path) => {
                let file = File::open(path).map_err(|source| LayersError::Read { path: path.clone(), source })?;
                (path.clone(), Box::new(file))
            }
        };
        let mut head = Vec::new();
        let read = stream.by_ref().take(HEAD_BYTES).read_to_end(&mut head);
        read.map_err(|source| LayersError::Read { path, source })?;
        let compression = compress::detect(&head);
        let registered = self.with_lease("layer register", |lease| {
            let stream = io::Cursor::new(head).chain(stream);
            let transfer = self.transfer(lease, progress, cancel);
            let layer = layers.register(stream, compression, parent, &transfer)?;
            // The reference goes when it is dropped; what is held stays.
            layers.hold(&layer, USER)?;
            Ok(layer.info().clone().into())
        });
        self.keep_policy_after(registered, cancel)
    }

    /// All registered layers, by chain ID.
    ///
    /// # Errors
    /// [`LayersError`].
    pub fn layers(&self) -> Result<Vec<LayerSummary>, LayersError> {
        Ok(self.layer_store()?.list()?.into_iter().map(LayerSummary::from).collect())
    }

    /// Everything about one registered layer.
    ///
    /// # Errors
    /// [`LayersError`].
    pub fn layer(&self, wanted: &str) -> Result<LayerDetails, LayersError> {
        let layers = self.layer_store()?;
        let chain = layers.find(wanted)?;
        let users = layers.users(chain)?;
        let holders = users.holders.into_iter().map(|(holder, count)| Holding { holder, count }).collect();
        Ok(LayerDetails { summary: layers.info(chain)?.into(), children: users.children, holders })
    }

    /// Lets go of a layer that a user registered or committed, once. What nothing else counts on goes: child before
    /// parent.
    ///
    /// # Errors
    /// [`LayersError`].
    pub fn release_layer(&self, wanted: &str) -> Result<Vec<RemovedLayerSummary>, LayersError> {
        let layers = self.layer_store()?;
        Ok(gone(layers.let_go(layers.find(wanted)?, USER)?))
    }

    /// Makes a writable layer. With `ids` its mounts show other owners. With `init`, what every container needs and no image has is made in a layer of its own.
    ///
    /// # Errors
    /// [`LayersError`].
    pub fn create_rw_layer(
        &self,
        name: &str,
        parent: Option<&str>,
        label: Option<&str>,
        ids: Option<IdMaps>,
        init: bool,
    ) -> Result<RwSummary, LayersError> {
        let layers = self.layer_store()?;
        let parent = parent.map(|parent| layers.find(parent)).transpose()?;
        self.with_lease("layer rw create", |lease| {
            let mut initialise = initialise;
            let new = NewRwLayer {
                parent,
                label: label.map(str::to_owned),
                ids,
                init: if init { Some(&mut initialise) } else { None },
                fill: None,
            };
            let made = layers.create_rw(name, new, lease)?;
            Ok(summary_of(made.info().clone(), None))
        })
    }

    /// All writable layers, by name.
    ///
    /// # Errors
    /// [`LayersError`].
    pub fn rw_layers(&self) -> Result<Vec<RwSummary>, LayersError> {
        let listed = self.layer_store()?.list_rw()?;
        let mut all = Vec::new();
        for info in listed {
            let mounted_on = self.mounted_on(info.active)?;
            all.push(summary_of(info, mounted_on));
        }
        Ok(all)
    }

    /// Mounts a writable layer on a directory until [`Engine::umount_rw_layer`].
    ///
    /// # Errors
    /// [`LayersError`].
    pub fn mount_rw_layer(&self, name: &str, dir: &Path) -> Result<(), LayersError> {
        let layers = self.layer_store()?;
        let rw = layers.get_rw(name)?;
        self.mount_writable(rw.info().active, rw.info().mount_options(), dir)?;
        Ok(())
    }

    /// Undoes [`Engine::mount_rw_layer`]; where it was mounted.
    ///
    /// # Errors
    /// [`LayersError`].
    pub fn umount_rw_layer(&self, name: &str) -> Result<PathBuf, LayersError> {
        let layers = self.layer_store()?;
        let rw = layers.get_rw(name)?;
        let dir = self.mounted_on(rw.info().active)?;
        let dir = dir.ok_or_else(|| LayersError::NotMounted { name: name.to_owned() })?;
        self.umount(&dir)?;
        Ok(dir)
    }

    /// What was written to a writable layer, sorted by path.
    ///
    /// # Errors
    /// [`LayersError`].
    pub fn rw_changes(&self, name: &str) -> Result<Vec<ChangeSummary>, LayersError> {
        let layers = self.layer_store()?;
        let changes = layers.changes(&layers.get_rw(name)?)?;
        let summary = |change: plies_archive::Change| ChangeSummary {
            kind: match change.kind {
                ChangeKind::Added => 'A',
                ChangeKind::Modified => 'M',
                ChangeKind::Deleted => 'D',
            },
            path: change.path.to_string(),
        };
        Ok(changes.into_iter().map(summary).collect())
    }

    /// Makes a layer of what was written to a writable layer, which stays as it is.
    ///
    /// # Errors
    /// [`LayersError`], among them that it is mounted.
    pub fn commit_rw_layer(
        &self,
        name: &str,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<LayerSummary, LayersError> {
        let layers = self.layer_store()?;
        let rw = layers.get_rw(name)?;
        self.check_not_mounted(rw.info().active)?;
        let committed = self.with_lease("layer rw commit", |lease| {
            let layer = layers.commit_rw(&rw, &self.transfer(lease, progress, cancel))?;
            // The reference goes when it is dropped; what is held stays.
            layers.hold(&layer, USER)?;
            Ok(layer.info().clone().into())
        });
        self.keep_policy_after(committed, cancel)
    }

    /// Removes a writable layer. What only it counted on goes too: child before parent.
    ///
    /// # Errors
    /// [`LayersError`], among them that it is mounted.
    pub fn remove_rw_layer(&self, name: &str) -> Result<Vec<RemovedLayerSummary>, LayersError> {
        let layers = self.layer_store()?;
        let rw = layers.get_rw(name)?;
        self.check_not_mounted(rw.info().active)?;
        Ok(gone(layers.release_rw(rw)?))
    }
}

fn texts(ranges: Option<&[IdRange]>) -> Vec<String> {
    ranges.unwrap_or_default().iter().map(IdRange::to_string).collect()
}

fn summary_of(info: RwInfo, mounted_on: Option<PathBuf>) -> RwSummary {
    RwSummary {
        mount_id: info.mount_id(),
        init_id: info.init_id(),
        uid_map: texts(info.ids.as_ref().map(IdMaps::uids)),
        gid_map: texts(info.ids.as_ref().map(IdMaps::gids)),
        name: info.name,
        parent: info.parent,
        label: info.label,
        mounted_on: mounted_on.map(|dir| dir.display().to_string()),
        created: crate::rfc3339(info.created),
    }
}

/// Makes what is missing of a container's own files; what is there stays.
fn initialise(root: BorrowedFd<'_>) -> io::Result<()> {
    for dir in INIT_DIRS {
        crate::build::make_directory(root, dir, None).map_err(io::Error::other)?;
    }
    let place = |path: &str| {
        let mut keep_going = |_: BorrowedFd<'_>, _: Option<inroot::MadeDir>| Ok(());
        inroot::resolve(root, path.as_bytes(), inroot::Missing::Make(&mut keep_going))
    };
    for path in INIT_FILES {
        let resolved = place(path)?;
        let Some(name) = &resolved.name else { continue };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o755);
        match rustix::fs::openat(resolved.dir(), name.as_slice(), flags, mode) {
            Ok(file) => rustix::fs::fchmod(file.as_fd(), mode)?,
            Err(rustix::io::Errno::EXIST) => {}
            Err(other) => return Err(other.into()),
        }
    }
    let (path, target) = INIT_LINK;
    let resolved = place(path)?;
    match resolved.name.as_ref().map(|name| rustix::fs::symlinkat(target, resolved.dir(), name.as_slice())) {
        None | Some(Ok(()) | Err(rustix::io::Errno::EXIST)) => Ok(()),
        Some(Err(other)) => Err(other.into()),
    }
}
