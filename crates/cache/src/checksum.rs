//! Content digests of records, kept with them: what was hashed once is not read again.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;

use plies_store::{Attach, Cancel};

use crate::contenthash::{self, ChecksumOptions, ContentDigest, HashCache};
use crate::{CacheError, ImmutableRef};

/// Where a record keeps its digests.
const KEY: &str = "contenthash.v1";

impl ImmutableRef {
    /// Digest of what is at `path` in the record's tree: of content, modes, owners and attributes, not of times nor of how
    /// it came there. Extracts the tree if it must look; a path that was asked for before needs neither a mount nor a
    /// byte of it.
    ///
    /// # Errors
    /// [`CacheError::Checksum`]; those of [`ImmutableRef::extract`].
    pub fn checksum(
        &self,
        path: &[u8],
        options: &ChecksumOptions,
        cancel: &Cancel,
    ) -> Result<ContentDigest, CacheError> {
        let inner = self.inner();
        let accessor = crate::Accessor { inner: inner.clone() };
        // Digests are no truth of their own: what does not read back is computed again.
        let kept = accessor.external(self.id(), KEY)?.and_then(|bytes| HashCache::from_bytes(&bytes).ok());
        let mut digests = kept.unwrap_or_default();
        let plain = !options.wildcard && options.include.is_empty() && options.exclude.is_empty();
        if plain && let Some(digest) = digests.get(path, options.follow_links) {
            return Ok(digest);
        }
        let mounted = self.mount(Attach::Detached, cancel)?;
        let go_on = || cancel.check();
        let digest = match &mounted {
            Some(mounted) => contenthash::checksum_while(mounted.root(), path, options, &mut digests, &go_on),
            None => {
                let empty = empty_dir(inner.store.run_dir()).map_err(CacheError::EmptyTree)?;
                contenthash::checksum_while(empty.as_fd(), path, options, &mut digests, &go_on)
            }
        };
        if let Some(mounted) = mounted {
            mounted.unmount()?;
        }
        let digest = digest.map_err(|error| match cancel.is_canceled() {
            true => plies_store::Canceled.into(),
            false => CacheError::Checksum(error),
        })?;
        if digests.is_modified() {
            accessor.set_external_lazily(self.id(), KEY, &digests.to_bytes())?;
        }
        Ok(digest)
    }
}

/// A directory with nothing in it, to stand for the empty tree.
fn empty_dir(run: &std::path::Path) -> io::Result<fs::File> {
    let path = run.join("empty");
    match fs::create_dir(&path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    fs::File::open(path)
}
