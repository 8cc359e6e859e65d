//! `ply import`: what another program keeps, taken over into this store.

use std::path::Path;

use plies_import::containerd::ContainerdOptions;
use plies_import::{Containers, Import, ImportError, ImportOptions, ImportReport};
use plies_import::{buildkit, containerd, containers_storage, docker};
use plies_store::NotLinked;

use crate::Engine;
use crate::exec::Cancel;
use crate::progress::Progress;

/// Whose state is taken over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImportSource {
    /// The build cache of a BuildKit daemon, or of one of its workers: its state directory.
    Buildkit,
    /// Docker's layers, images and names: its data root.
    Docker(Containers),
    /// Those of podman, buildah or CRI-O: their graph root.
    ContainersStorage(Containers),
    /// Those of containerd, with manifests and blobs: its root directory.
    Containerd(ContainerdOptions),
}

impl Engine {
    /// Takes over what another program keeps at `path`.
    ///
    /// # Errors
    /// [`ImportError`]. What of the source cannot be read is in the report instead.
    pub fn import(
        &self,
        source: &ImportSource,
        path: &Path,
        options: ImportOptions,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<ImportReport, ImportError> {
        let (cache, not_linked) = (self.cache(), NotLinked::default());
        let import = Import {
            store: self.store(),
            cache: &cache,
            limits: self.limits(),
            documents: self.document_limits(),
            options,
            progress,
            cancel,
            not_linked: &not_linked,
        };
        let imported = match source {
            ImportSource::Buildkit => buildkit::import(&import, path),
            ImportSource::Docker(containers) => docker::import(&import, path, *containers),
            ImportSource::ContainersStorage(containers) => containers_storage::import(&import, path, *containers),
            ImportSource::Containerd(options) => containerd::import(&import, path, options),
        };
        let imported = imported.map(|report| ImportReport { files_not_linked_count: not_linked.count(), ..report });
        self.keep_policy_after(imported, cancel)
    }
}
