//! What a stack of layers shows at a path, by the names in the layers' own directories: nothing is mounted, and no tree is put
//! together.
//!
//! The rules are those of an overlay with the fix-up layer that the stack would get: of several layers that have a directory
//! the uppermost that set it says how it looks, and only if none did the uppermost.
//!
//! Layers are opened when they are asked, by paths below their roots that were seen to be directories: layers do not change.

use std::cell::OnceCell;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use plies_archive::tar::EntryPath;
use plies_archive::{DirIndex, Implied, Lower};
use rustix::fs::{FileType, Stat};

use crate::error::At as _;
use crate::layers::{self, LayerError};
use crate::tree::{self, Metadata};
use crate::{LayerId, Store};

/// Directories of one path kept open, a layer each: a stack may have more layers than a process descriptors.
const OPEN_DIRS_MAX: usize = 64;

/// Paths that [`Indexes`] keep, with one more for each layer: some 100 bytes each, so 100 MB at most.
const INDEXED_MAX: usize = 1_000_000;

/// A layer of some stacks, by its place in [`Stack`].
pub(crate) type Place = usize;

/// A file of a layer.
pub(crate) type Inode = (Place, u64);

/// The indexes of layers that were asked for, for work on many stacks that share layers.
#[derive(Debug, Default)]
pub struct Indexes {
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    indexes: HashMap<LayerId, Arc<DirIndex>>,
    paths_count: usize,
}

impl Indexes {
    /// The index of a layer, which does not change.
    pub(crate) fn of(&self, store: &Store, id: LayerId) -> Result<Arc<DirIndex>, LayerError> {
        let lock = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = lock().indexes.get(&id) {
            return Ok(Arc::clone(index));
        }
        let index = Arc::new(layers::read_index(store, id)?);
        let mut known = lock();
        let paths_count = index.implied().len() + 1;
        if known.paths_count + paths_count > INDEXED_MAX {
            *known = Known::default();
        }
        known.paths_count += paths_count;
        known.indexes.insert(id, Arc::clone(&index));
        Ok(index)
    }
}

#[derive(Debug)]
struct Layer {
    id: LayerId,
    /// Read when a directory's metadata depends on it.
    index: OnceCell<Arc<DirIndex>>,
}

/// What of a stack makes up a directory.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    /// Layers of which the contents show, uppermost first.
    pub(crate) visible: Vec<Place>,
    /// Layers that may say how the directory looks, uppermost first. One that only empties it leaves that to those
    /// below.
    pub(crate) describing: Vec<Place>,
    /// Below those, the contents of others show.
    pub(crate) contents_open: bool,
    /// Below those, others may say how it looks.
    pub(crate) description_open: bool,
}

impl Seen {
    /// A directory of layers, uppermost first.
    pub(crate) fn of(layers: Vec<Place>, is_open: bool) -> Self {
        Self { describing: layers.clone(), visible: layers, contents_open: is_open, description_open: is_open }
    }
}

/// Something other than a directory.
#[derive(Debug)]
pub(crate) struct FileAt {
    pub(crate) layer: Place,
    pub(crate) stat: Stat,
}

impl FileAt {
    pub(crate) fn inode(&self) -> Inode {
        (self.layer, self.stat.st_ino)
    }

    pub(crate) fn is_socket(&self) -> bool {
        tree::file_type(&self.stat) == FileType::Socket
    }
}

/// What a stack shows at a name.
#[derive(Debug)]
pub(crate) enum Shown {
    Nothing,
    File(FileAt),
    Dir(Seen),
}

/// The directories of one path, open.
#[derive(Debug, Default)]
struct OpenDirs {
    path: EntryPath,
    dirs: HashMap<Place, Rc<OwnedFd>>,
}

/// Layers of one or several stacks.
#[derive(Debug)]
pub(crate) struct Stack<'s> {
    store: &'s Store,
    indexes: Option<&'s Indexes>,
    layers: Vec<Layer>,
    open: OpenDirs,
}

impl<'s> Stack<'s> {
    pub(crate) fn new(store: &'s Store) -> Self {
        Self { store, indexes: None, layers: Vec::new(), open: OpenDirs::default() }
    }

    pub(crate) fn push(&mut self, id: LayerId) -> Place {
        self.layers.push(Layer { id, index: OnceCell::new() });
        self.layers.len() - 1
    }

    /// What `layers` show at a name of the directory `dir`, which all of them have; `None` if none of them says
    /// anything. `open`: others lie below them.
    pub(crate) fn resolve(
        &mut self,
        dir: &EntryPath,
        name: &CStr,
        path: &EntryPath,
        layers: &[Place],
        open: bool,
    ) -> Result<Option<Shown>, LayerError> {
        let mut seen = Seen::default();
        let mut hidden = false;
        for layer in layers.iter().copied() {
            let outer = self.dir(layer, dir)?;
            let Some(stat) = tree::stat(&*outer, name).at("stat", path.to_string())? else { continue };
            if tree::file_type(&stat) != FileType::Directory {
                return Ok(Some(match seen.describing.is_empty() {
                    // A directory over something else.
                    false => Shown::Dir(seen),
                    true if tree::is_whiteout(&stat) => Shown::Nothing,
                    true => Shown::File(FileAt { layer, stat }),
                }));
            }
            seen.describing.push(layer);
            if !hidden {
                seen.visible.push(layer);
            }
            let inner = tree::open_child(&*outer, name).at("open", path.to_string())?;
            hidden |= tree::is_opaque(inner).at("read attributes", path.to_string())?;
            if hidden && !self.index(layer)?.is_implied(path) {
                return Ok(Some(Shown::Dir(seen)));
            }
        }
        if seen.describing.is_empty() {
            return Ok(None);
        }
        (seen.contents_open, seen.description_open) = (open && !hidden, open);
        Ok(Some(Shown::Dir(seen)))
    }

    /// The uppermost of the layers that set how a directory of theirs looks.
    pub(crate) fn explicit(&self, path: &EntryPath, describing: &[Place]) -> Result<Option<Place>, LayerError> {
        for layer in describing {
            if !self.index(*layer)?.is_implied(path) {
                return Ok(Some(*layer));
            }
        }
        Ok(None)
    }

    pub(crate) fn metadata(&mut self, layer: Place, path: &EntryPath) -> Result<Metadata, LayerError> {
        let dir = self.dir(layer, path)?;
        Ok(Metadata::of(&*dir).at("stat", path.to_string())?)
    }

    pub(crate) fn index(&self, layer: Place) -> Result<&DirIndex, LayerError> {
        let Layer { id, index } = &self.layers[layer];
        if index.get().is_none() {
            let read = match self.indexes {
                Some(indexes) => indexes.of(self.store, *id)?,
                None => Arc::new(layers::read_index(self.store, *id)?),
            };
            // Nobody else sets it meanwhile.
            let _ = index.set(read);
        }
        Ok(index.get().expect("because it was just set"))
    }

    /// A directory of a layer, which has it.
    pub(crate) fn dir(&mut self, layer: Place, path: &EntryPath) -> Result<Rc<OwnedFd>, LayerError> {
        if self.open.path != *path || self.open.dirs.len() == OPEN_DIRS_MAX {
            self.open = OpenDirs { path: path.clone(), dirs: HashMap::new() };
        }
        if let Some(dir) = self.open.dirs.get(&layer) {
            return Ok(Rc::clone(dir));
        }
        let root = layers::open_root(self.store, self.layers[layer].id)?;
        let dir = if path.is_root() { root } else { tree::open_dir(root, path).at("open", path.to_string())? };
        let dir = Rc::new(dir);
        self.open.dirs.insert(layer, Rc::clone(&dir));
        Ok(dir)
    }
}

/// One stack, for a walk through an upper directory over it.
#[derive(Debug)]
pub(crate) struct Merged<'s> {
    stack: Stack<'s>,
    /// From the root to the innermost directory that the stack has.
    steps: Vec<Step>,
    /// Steps taken from there that it has no directory for.
    missing: usize,
}

#[derive(Debug)]
struct Step {
    path: EntryPath,
    seen: Seen,
    /// What was given away last.
    open: Option<Rc<OwnedFd>>,
}

impl<'s> Merged<'s> {
    /// Of layers, bottom first, at least one.
    pub(crate) fn new(store: &'s Store, indexes: &'s Indexes, layers: &[LayerId]) -> Self {
        let mut stack = Stack { indexes: Some(indexes), ..Stack::new(store) };
        let places = layers.iter().rev().map(|id| stack.push(*id)).collect();
        let root = Step { path: EntryPath::root(), seen: Seen::of(places, false), open: None };
        Self { stack, steps: vec![root], missing: 0 }
    }

    /// Whether a layer has directories that are only on the way to something: what lies below may be no directory there.
    pub(crate) fn may_need_base(&self) -> Result<bool, LayerError> {
        for place in 0..self.stack.layers.len() {
            let index = self.stack.index(place)?;
            if index.implied().any(|path| index.why_implied(path) == Some(Implied::OnTheWay)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// From the root again.
    pub(crate) fn restart(&mut self) {
        self.missing = 0;
        self.steps.truncate(1);
    }

    /// Whether the stack has the directory at `path`, and `dir` looks like that.
    pub(crate) fn has_same(&mut self, path: &EntryPath, dir: BorrowedFd<'_>) -> io::Result<bool> {
        debug_assert_eq!(self.missing, 0, "a place that another step was left for");
        while !path.is_within(&self.steps[self.steps.len() - 1].path) {
            self.leave()?;
        }
        let depth = self.steps.len() - 1;
        for (at, name) in path.components().skip(depth).enumerate() {
            if !self.enter(name)? {
                self.leave()?;
                return Ok(false);
            }
            debug_assert_eq!(self.steps.len(), depth + at + 2, "a step for each component");
        }
        match self.look()? {
            Some(below) => plies_archive::same_directory(dir, below),
            None => Ok(false),
        }
    }

    fn shown(&mut self, name: &[u8]) -> Result<(EntryPath, Shown), LayerError> {
        let step = &self.steps[self.steps.len() - 1];
        let path = step.path.join(name);
        let shown = self.stack.resolve(&step.path, &c_name(name), &path, &step.seen.visible, false)?;
        Ok((path, shown.unwrap_or(Shown::Nothing)))
    }

    /// Keeps a directory open until another one is asked for.
    fn give(&mut self, dir: Rc<OwnedFd>) -> BorrowedFd<'_> {
        let top = self.steps.len() - 1;
        let open: &OwnedFd = self.steps[top].open.insert(dir);
        open.as_fd()
    }
}

impl Lower for Merged<'_> {
    fn enter(&mut self, name: &[u8]) -> io::Result<bool> {
        if self.missing == 0
            && let (path, Shown::Dir(seen)) = self.shown(name).map_err(io::Error::other)?
        {
            self.steps.push(Step { path, seen, open: None });
            return Ok(true);
        }
        self.missing += 1;
        Ok(false)
    }

    fn leave(&mut self) -> io::Result<()> {
        match self.missing.checked_sub(1) {
            Some(less) => self.missing = less,
            None => drop(self.steps.pop()),
        }
        Ok(())
    }

    fn look(&mut self) -> io::Result<Option<BorrowedFd<'_>>> {
        if self.missing > 0 {
            return Ok(None);
        }
        let Step { path, seen, .. } = &self.steps[self.steps.len() - 1];
        let explicit = self.stack.explicit(path, &seen.describing).map_err(io::Error::other)?;
        let dir = self.stack.dir(explicit.unwrap_or_else(|| seen.describing[0]), path).map_err(io::Error::other)?;
        Ok(Some(self.give(dir)))
    }

    fn find(&mut self, name: &[u8]) -> io::Result<Option<BorrowedFd<'_>>> {
        if self.missing > 0 {
            return Ok(None);
        }
        let layer = match self.shown(name).map_err(io::Error::other)?.1 {
            Shown::Nothing => return Ok(None),
            Shown::File(file) => file.layer,
            Shown::Dir(seen) => seen.describing[0],
        };
        let path = &self.steps[self.steps.len() - 1].path;
        let dir = self.stack.dir(layer, path).map_err(io::Error::other)?;
        Ok(Some(self.give(dir)))
    }

    fn names(&mut self) -> io::Result<Vec<Vec<u8>>> {
        let mut found: BTreeMap<CString, bool> = BTreeMap::new();
        if self.missing == 0 {
            let Step { path, seen, .. } = &self.steps[self.steps.len() - 1];
            for layer in &seen.visible {
                let dir = self.stack.dir(*layer, path).map_err(io::Error::other)?;
                for name in tree::list(&*dir)? {
                    if let Entry::Vacant(first) = found.entry(name) {
                        let stat = tree::stat(&*dir, first.key())?;
                        first.insert(stat.is_some_and(|stat| !tree::is_whiteout(&stat)));
                    }
                }
            }
        }
        Ok(found.into_iter().filter(|(_, is_shown)| *is_shown).map(|(name, _)| name.into_bytes()).collect())
    }
}

pub(crate) fn c_name(name: &[u8]) -> CString {
    CString::new(name).expect("because names have no NUL")
}
