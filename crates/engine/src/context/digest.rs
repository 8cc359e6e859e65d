//! The digest that BuildKit's solver has for the content of a source, for whoever looks something up by it.

use std::fs::File;
use std::io;

use plies_archive::tar::Device;
use plies_archive::tree::Kind;
use plies_cache::contenthash::ContentDigest;
use plies_cache::contenthash::header::{self, Header};
use plies_oci::Sha256Hasher;
use rustix::fs::FileType;

use super::hash::{HashError, failed};
use super::select::{Selection, owner};
use super::walk::{self, Found, Step, Visitor};
use super::{Owners, Tree};
use crate::exec::Cancel;

impl Tree {
    /// The content digest (`plies_cache::contenthash`) of a selection of one source, as of a tree that has what this one
    /// shows. `None` for other selections.
    ///
    /// # Errors
    /// [`HashError::Io`].
    pub(crate) fn content_digest(&self, selection: &Selection) -> Result<Option<ContentDigest>, HashError> {
        let [item] = selection.items() else { return Ok(None) };
        let mut sum = Sum {
            owners: self.owners,
            dirs: Vec::new(),
            result: None,
            buffer: vec![0; header::READ_BYTES],
            cancel: self.cancel.clone(),
        };
        walk::walk(self, selection, item, &mut sum)?;
        Ok(sum.result)
    }
}

struct Sum {
    owners: Owners,
    /// Directories being added up, innermost last.
    dirs: Vec<Sha256Hasher>,
    result: Option<ContentDigest>,
    buffer: Vec<u8>,
    cancel: Cancel,
}

impl Sum {
    fn header(&self, found: &Found<'_>, kind: Kind, link: &[u8]) -> io::Result<Sha256Hasher> {
        let (uid, gid) = owner(self.owners, found.stat.st_uid, found.stat.st_gid);
        let size_bytes = u64::try_from(found.stat.st_size).unwrap_or(0);
        let xattrs = &walk::xattrs(found)?;
        Ok(Header { kind, mode: found.stat.st_mode & 0o7777, uid, gid, size_bytes, link, xattrs }.begin())
    }

    fn add(&mut self, found: &Found<'_>, digest: ContentDigest) {
        match self.dirs.last_mut() {
            Some(dir) => add_line(dir, found.name(), &digest),
            None => self.result = Some(digest),
        }
    }

    fn leaf_digest(&mut self, found: &Found<'_>) -> io::Result<Sha256Hasher> {
        let device = || {
            let number = found.stat.st_rdev;
            Device { major: rustix::fs::major(number), minor: rustix::fs::minor(number) }
        };
        match found.kind() {
            FileType::RegularFile => {
                let mut sum = self.header(found, Kind::File, b"")?;
                let file = File::from(found.open()?);
                header::add_content(&file, &mut sum, &mut self.buffer, &|| self.cancel.check())?;
                Ok(sum)
            }
            FileType::Symlink => self.header(found, Kind::Symlink, &found.link()?),
            FileType::CharacterDevice => self.header(found, Kind::CharDevice(device()), b""),
            FileType::BlockDevice => self.header(found, Kind::BlockDevice(device()), b""),
            _ => self.header(found, Kind::Fifo, b""),
        }
    }
}

/// A name and what it leads to (`contenthash`, "sum").
fn add_line(dir: &mut Sha256Hasher, name: &[u8], digest: &ContentDigest) {
    dir.update(&[0]);
    dir.update(name);
    dir.update(digest.to_string().as_bytes());
}

impl Visitor for Sum {
    type Error = HashError;

    fn enter(&mut self, found: &Found<'_>) -> Result<Step, HashError> {
        let header = self.header(found, Kind::Directory, b"").map_err(failed("read the attributes of", found))?;
        let mut dir = Sha256Hasher::default();
        add_line(&mut dir, b"", &ContentDigest::from_bytes(header.finish()));
        self.dirs.push(dir);
        Ok(Step::Into)
    }

    fn leave(&mut self, found: &Found<'_>) -> Result<(), HashError> {
        let dir = self.dirs.pop().expect("because what is left was entered");
        self.add(found, ContentDigest::from_bytes(dir.finish()));
        Ok(())
    }

    fn leaf(&mut self, found: &Found<'_>) -> Result<(), HashError> {
        let digest = self.leaf_digest(found).map_err(failed("read", found))?;
        self.add(found, ContentDigest::from_bytes(digest.finish()));
        Ok(())
    }
}
