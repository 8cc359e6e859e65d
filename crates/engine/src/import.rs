//! `ply import`: what another program keeps, taken over into this store.

use std::path::Path;

use plies_import::docker::{self, Containers};
use plies_import::{Import, ImportError, ImportOptions, ImportReport, buildkit};

use crate::Engine;
use crate::exec::Cancel;
use crate::progress::Progress;

impl Engine {
    /// Takes over the build cache of a BuildKit daemon, or of one of its workers, whose state directory is `path`.
    ///
    /// # Errors
    /// [`ImportError`]. What of the source cannot be read is in the report instead.
    pub fn import_buildkit(
        &self,
        path: &Path,
        options: ImportOptions,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<ImportReport, ImportError> {
        let cache = self.cache();
        let import = Import {
            store: self.store(),
            cache: &cache,
            limits: self.limits(),
            documents: self.document_limits(),
            options,
            progress,
            cancel,
        };
        self.keep_policy_after(buildkit::import(&import, path), cancel)
    }

    /// Takes over the layers, images and names of a Docker daemon whose data root is `path`, and its containers' writable
    /// layers if that is asked for.
    ///
    /// # Errors
    /// [`ImportError`]. What of the source cannot be read is in the report instead.
    pub fn import_docker(
        &self,
        path: &Path,
        containers: Containers,
        options: ImportOptions,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<ImportReport, ImportError> {
        let cache = self.cache();
        let import = Import {
            store: self.store(),
            cache: &cache,
            limits: self.limits(),
            documents: self.document_limits(),
            options,
            progress,
            cancel,
        };
        self.keep_policy_after(docker::import(&import, path, containers), cancel)
    }
}
