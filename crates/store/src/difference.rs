//! The layer that makes one tree of another, for trees that are stacks of layers.
//!
//! ```text
//! lower   [ common … ][ own … ]      compared: what the layers on top of the common ones touch
//! upper   [ common … ][ own … ]      made:     one layer with what the upper shows at those paths
//! ```
//!
//! Nothing is mounted, and no tree is put together. What both stacks have at the bottom shows the same through both
//! wherever no layer above it says anything, so the walk goes by the names in the other layers' directories alone. The
//! common layers are asked for a path only when one of the others touches it and leaves something open: what was
//! there before a file that only the upper stack has, what comes back where only the lower stack removes. A directory
//! of theirs is listed only where one of the stacks hides it and the other does not.
//!
//! The layer is canonical: whiteouts and no opaque marks, directories on the way to a change are implied. Its files
//! are copies (reflinks where the file system can), so it needs no other layer; names of one file stay names of one
//! file among those that changed. That an unchanged name led to the same file as a changed one is lost.
//!
//! Memory: the names in the directories from the root to where the walk stands, and a path for each name of a file that
//! has several.

use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use plies_archive::hash::HashingWriter;
use plies_archive::tar::{self, EntryPath};
use plies_archive::whiteout::{self, Mark, Meaning};
use plies_archive::{DiffError, DirIndex, Implied, layer_to_tar, same_file};
use plies_oci::{DiffId, ErrorKind};
use rustix::fs::{FileType, Mode};

use crate::cancel::canceled_inside;
use crate::catalogue::schema::LAYERS;
use crate::catalogue::{CatalogueError, Rows as _};
use crate::error::{At as _, FileError};
use crate::layers::{LayerError, Stage};
use crate::progress::{Outcome, Task, Watched};
use crate::snapshots::without_repetitions;
use crate::stack::{FileAt, Inode, Place, Seen, Shown, Stack, c_name};
use crate::transfer::Transfer;
use crate::tree::{self, Metadata};
use crate::{Canceled, LayerContents, LayerId, Store};

/// Why the difference of two stacks could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DifferenceError {
    /// A layer of the stacks is not in the store.
    #[error("layer {layer} is not in the store")]
    NotFound {
        /// Which.
        layer: LayerId,
    },
    /// Something that no layer has a place for.
    #[error("{path}: {why}")]
    Unrepresentable {
        /// Where.
        path: EntryPath,
        /// What does not fit.
        why: &'static str,
    },
    /// The tar of the new layer could not be written.
    #[error("write the new layer as a tar")]
    Tar(#[from] DiffError),
    /// A layer could not be read, or the new one not be kept.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// Files of a layer could not be read, or those of the new one not be made.
    #[error(transparent)]
    File(#[from] FileError),
    /// Rows.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    /// The caller asked to stop.
    #[error(transparent)]
    Canceled(#[from] Canceled),
}

impl DifferenceError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Unrepresentable { .. } => ErrorKind::InvalidInput,
            Self::Tar(error) => error.kind(),
            Self::Layer(error) => error.kind(),
            Self::File(error) => error.kind(),
            Self::Catalogue(error) => error.kind(),
            Self::Canceled(error) => error.kind(),
        }
    }
}

impl Transfer<'_> {
    /// The layer that, laid over the stack `lower`, shows what the stack `upper` shows; `None` if both show the same.
    /// Both come bottom first, and either may be empty. The layer is held by the lease, durable, and has its diff ID;
    /// one that is in the store with the same diff ID is taken instead. The caller must hold the layers meanwhile.
    ///
    /// What one of two stacks has on top of the other is a difference of them too, which costs nothing: this is for
    /// the rest. Sockets are left out. An empty stack has no root directory: nothing is said of it.
    ///
    /// Costs a look at every path that the layers touch which the stacks do not have in common at the bottom; reads
    /// files that look the same in every other respect, unless they are one file of one layer. The common layers must
    /// be whole at those paths only.
    ///
    /// # Errors
    /// [`DifferenceError::NotFound`]; [`DifferenceError::Unrepresentable`] for names that begin with `.wh.`;
    /// [`LayerError::Damaged`] inside [`DifferenceError::Layer`]. Nothing is left then.
    pub fn difference(&self, lower: &[LayerId], upper: &[LayerId]) -> Result<Option<LayerId>, DifferenceError> {
        let store = self.lease.store();
        let (lower, upper) = (without_repetitions(lower), without_repetitions(upper));
        store.read(|tx| {
            lower.iter().chain(&upper).try_for_each(|layer| match tx.contains(&LAYERS, layer)? {
                true => Ok(()),
                false => Err(DifferenceError::NotFound { layer: *layer }),
            })
        })?;
        if lower == upper {
            return Ok(None);
        }
        let task = Task::start(self.progress, "compare layers", None);
        let mut walk = Walk::new(store, &lower, &upper);
        let relinked = self.relinked(&mut walk)?;
        walk.restart();
        let stage = Stage::new(store)?;
        let mut draft = Draft {
            root: stage.root(),
            levels: Vec::new(),
            target: None,
            linked: HashMap::new(),
            made: Made::default(),
        };
        while let Some(step) = walk.next()? {
            self.go_on()?;
            match step {
                Step::Enter => draft.enter(&mut walk)?,
                Step::Leave => draft.leave()?,
                Step::Name(named) if !relinked.contains(&named.path) && walk.is_same(&named)? => {}
                Step::Name(named) => draft.put(&mut walk, &named)?,
            }
        }
        let Made { changes: 1.., index } = draft.made else {
            task.end(Outcome::Done);
            return Ok(None);
        };
        let diff_id = self.hash(stage.root(), &index, &task)?;
        let layer = match store.layers().hold_verified_by_diff_id(diff_id, self.lease)? {
            Some(layer) => {
                // A row whose files are gone is no layer to go on with.
                store.layers().root(layer)?;
                layer
            }
            None => {
                let usage = tree::measure(stage.root()).at("measure", stage.tree())?;
                let contents = LayerContents { diff_id: Some(diff_id), usage, index, ..LayerContents::default() };
                let made = store.layers().publish(self.lease, vec![stage.finish(contents)])?;
                *made.first().expect("because one stage makes one layer")
            }
        };
        task.end(Outcome::Done);
        Ok(Some(layer))
    }

    fn go_on(&self) -> Result<(), Canceled> {
        if self.cancel.is_canceled() { Err(Canceled) } else { Ok(()) }
    }

    fn hash(&self, root: BorrowedFd<'_>, index: &DirIndex, task: &Task<'_>) -> Result<DiffId, DifferenceError> {
        let sink = Watched { inner: io::sink(), task: Some(task), cancel: self.cancel };
        let mut hashed = HashingWriter::new(sink);
        let mut tar = tar::Writer::new(&mut hashed);
        let written = layer_to_tar(root, index, &mut tar).and_then(|_| Ok(tar.finish().map(drop)?));
        written.map_err(|error| if canceled_inside(&error) { Canceled.into() } else { DifferenceError::Tar(error) })?;
        Ok(DiffId::from_bytes(hashed.finish().1.sha256))
    }

    /// Paths of the upper tree that share their file with other paths than in the lower one. All names of such a
    /// file are made again. Names that no layer on top of the common ones touches are not known here.
    fn relinked(&self, walk: &mut Walk<'_>) -> Result<HashSet<EntryPath>, DifferenceError> {
        // By file of the upper tree: its names there, and the file at the first of them in the lower tree.
        let mut shared: HashMap<Inode, (Vec<EntryPath>, Option<Inode>)> = HashMap::new();
        // By file of the lower tree that has several names: those that are names of files in the upper tree too.
        let mut kept: HashMap<Inode, Vec<EntryPath>> = HashMap::new();
        while let Some(step) = walk.next()? {
            self.go_on()?;
            let Step::Name(named) = step else { continue };
            let Named { path, lower, upper: Shown::File(upper), .. } = *named else { continue };
            let below = match &lower {
                Shown::File(lower) if lower.stat.st_nlink > 1 => Some(lower.inode()),
                _ => None,
            };
            if let Some(inode) = below {
                kept.entry(inode).or_default().push(path.clone());
            }
            if upper.stat.st_nlink > 1 || below.is_some() {
                shared.entry(upper.inode()).or_insert_with(|| (Vec::new(), below)).0.push(path);
            }
        }
        let is_relinked = |(paths, below): &(Vec<EntryPath>, Option<Inode>)| match below {
            Some(inode) => kept.get(inode) != Some(paths),
            None => paths.len() > 1,
        };
        Ok(shared.into_values().filter(is_relinked).flat_map(|(paths, _)| paths).collect())
    }
}

// ---- what two stacks show ---------------------------------------------------------------------

/// What there is to know of a directory itself.
struct Look {
    metadata: Metadata,
    /// `None` if some layer set it.
    implied: Option<Implied>,
}

#[derive(Debug, Clone, Copy)]
enum Side {
    Lower,
    Upper,
}

/// A directory that the walk is in.
struct Frame {
    path: EntryPath,
    lower: Option<Seen>,
    upper: Option<Seen>,
    /// The lower tree has something else here.
    replaces: bool,
    /// What the common layers have here (`None`: no directory), once somebody asked.
    common: Option<Option<Seen>>,
    /// Names by layer, in byte order, of each name the lower stack's layers first, the uppermost first.
    names: std::iter::Peekable<std::vec::IntoIter<Listed>>,
}

struct Listed {
    name: CString,
    side: Side,
    layer: Place,
}

/// What a walk finds.
enum Step {
    /// A directory that the upper stack shows; its names follow.
    Enter,
    /// The end of the innermost directory.
    Leave,
    /// A name at which the upper stack shows no directory.
    Name(Box<Named>),
}

struct Named {
    name: CString,
    path: EntryPath,
    lower: Shown,
    upper: Shown,
}

/// A walk through two stacks at once, in byte order, along the paths that other than the common layers touch.
struct Walk<'s> {
    stack: Stack<'s>,
    /// Uppermost first, as in the two stacks' own.
    common: Vec<Place>,
    lower: Option<Seen>,
    upper: Option<Seen>,
    frames: Vec<Frame>,
    begun: bool,
}

impl<'s> Walk<'s> {
    fn new(store: &'s Store, lower: &[LayerId], upper: &[LayerId]) -> Self {
        let common = lower.iter().zip(upper).take_while(|(lower, upper)| lower == upper).count();
        let mut stack = Stack::new(store);
        let mut places: HashMap<LayerId, Place> = HashMap::new();
        let mut place = |id: &LayerId| *places.entry(*id).or_insert_with(|| stack.push(*id));
        let mut own = |stack: &[LayerId]| {
            let own = stack[common..].iter().rev().map(&mut place).collect();
            (!stack.is_empty()).then(|| Seen::of(own, common > 0))
        };
        let (lower_root, upper_root) = (own(lower), own(upper));
        let common = lower[..common].iter().rev().map(place).collect();
        Self { stack, common, lower: lower_root, upper: upper_root, frames: Vec::new(), begun: false }
    }

    /// From the root again.
    fn restart(&mut self) {
        debug_assert!(self.frames.is_empty(), "a walk ends before it starts again");
        self.begun = false;
    }

    /// The next step, `None` at the end.
    fn next(&mut self) -> Result<Option<Step>, DifferenceError> {
        if !self.begun {
            self.begun = true;
            self.enter(EntryPath::root(), self.lower.clone(), self.upper.clone(), false)?;
            return Ok(Some(Step::Enter));
        }
        let Some(frame) = self.frames.last_mut() else { return Ok(None) };
        let Some(first) = frame.names.next() else {
            self.frames.pop();
            return Ok(Some(Step::Leave));
        };
        let (mut of_lower, mut of_upper) = (Vec::new(), Vec::new());
        let name = first.name.clone();
        let mut listed = Some(first);
        while let Some(Listed { side, layer, .. }) = listed {
            match side {
                Side::Lower => of_lower.push(layer),
                Side::Upper => of_upper.push(layer),
            }
            listed = frame.names.next_if(|next| next.name == name);
        }
        let path = frame.path.join(name.to_bytes());
        let (lower, upper) = self.shown(&name, &path, &of_lower, &of_upper)?;
        if let Shown::Dir(upper) = upper {
            let (lower, replaces) = match lower {
                Shown::Dir(lower) => (Some(lower), false),
                Shown::File(_) => (None, true),
                Shown::Nothing => (None, false),
            };
            self.enter(path, lower, Some(upper), replaces)?;
            return Ok(Some(Step::Enter));
        }
        Ok(Some(Step::Name(Box::new(Named { name, path, lower, upper }))))
    }

    fn top(&self) -> usize {
        self.frames.len() - 1
    }

    fn enter(
        &mut self,
        path: EntryPath,
        lower: Option<Seen>,
        upper: Option<Seen>,
        replaces: bool,
    ) -> Result<(), DifferenceError> {
        let names = Vec::new().into_iter().peekable();
        self.frames.push(Frame { path: path.clone(), lower, upper, replaces, common: None, names });
        let top = self.top();
        let is_open = |seen: &Option<Seen>| seen.as_ref().is_some_and(|seen| seen.contents_open);
        if is_open(&self.frames[top].lower) != is_open(&self.frames[top].upper) {
            // All that the common layers have here differs.
            let common = self.common_at(top)?;
            let frame = &mut self.frames[top];
            let open = [&mut frame.lower, &mut frame.upper].into_iter().flatten().find(|seen| seen.contents_open);
            let open = open.expect("because one of them is");
            open.contents_open = false;
            open.visible.extend(common.into_iter().flat_map(|common| common.visible));
        }
        let frame = &self.frames[top];
        let of = |seen: &Option<Seen>, side| {
            let visible = seen.as_ref().map_or(Vec::new(), |seen| seen.visible.clone());
            visible.into_iter().map(move |layer| (side, layer))
        };
        let layers: Vec<(Side, Place)> = of(&frame.lower, Side::Lower).chain(of(&frame.upper, Side::Upper)).collect();
        let mut names = Vec::new();
        for (side, layer) in layers {
            let listed = tree::list(&*self.stack.dir(layer, &path)?).at("list", path.to_string())?;
            names.extend(listed.into_iter().map(|name| Listed { name, side, layer }));
        }
        // Stable: the order of layers stays.
        names.sort_by(|a, b| a.name.cmp(&b.name));
        self.frames[top].names = names.into_iter().peekable();
        Ok(())
    }

    /// What the stacks show at a name of the innermost directory; `of_lower` and `of_upper` have it.
    fn shown(
        &mut self,
        name: &CStr,
        path: &EntryPath,
        of_lower: &[Place],
        of_upper: &[Place],
    ) -> Result<(Shown, Shown), DifferenceError> {
        let top = self.top();
        let dir = self.frames[top].path.clone();
        let is_open = |seen: &Option<Seen>| seen.as_ref().is_some_and(|seen| seen.contents_open);
        let open = is_open(&self.frames[top].lower) && is_open(&self.frames[top].upper);
        let lower = self.stack.resolve(&dir, name, path, of_lower, open)?;
        let upper = self.stack.resolve(&dir, name, path, of_upper, open)?;
        if open && (lower.is_none() || upper.is_none()) {
            let found = self.common_child(top, name, path)?;
            return Ok(match (lower, upper) {
                (None, Some(upper)) => (found, upper),
                (Some(lower), None) => (lower, found),
                _ => unreachable!("because a name that was listed is in a layer"),
            });
        }
        Ok((lower.unwrap_or(Shown::Nothing), upper.unwrap_or(Shown::Nothing)))
    }

    /// What the common layers show at a name, for a stack that has nothing of its own there.
    fn common_child(&mut self, frame: usize, name: &CStr, path: &EntryPath) -> Result<Shown, DifferenceError> {
        let dir = self.frames[frame].path.clone();
        let Some(common) = self.common_at(frame)? else { return Ok(Shown::Nothing) };
        Ok(match self.stack.resolve(&dir, name, path, &common.visible, false)? {
            // None of a stack's own layers has it.
            Some(Shown::Dir(_)) => Shown::Dir(Seen { contents_open: true, description_open: true, ..Seen::default() }),
            Some(shown) => shown,
            None => Shown::Nothing,
        })
    }

    /// What the common layers have at the directory of a frame. Looked up once, with those on the way to it.
    fn common_at(&mut self, frame: usize) -> Result<Option<Seen>, DifferenceError> {
        let known = (0..=frame).rev().find(|at| self.frames[*at].common.is_some());
        let mut next = known.map_or(0, |known| known + 1);
        while next <= frame {
            let path = self.frames[next].path.clone();
            let found = match path.split() {
                None => Some(Seen::of(self.common.clone(), false)),
                Some((dir, name)) => match self.frames[next - 1].common.clone().flatten() {
                    None => None,
                    Some(outer) => {
                        let name = c_name(name);
                        match self.stack.resolve(&dir, &name, &path, &outer.visible, false)? {
                            Some(Shown::Dir(seen)) => Some(seen),
                            _ => None,
                        }
                    }
                },
            };
            self.frames[next].common = Some(found);
            next += 1;
        }
        Ok(self.frames[frame].common.clone().flatten())
    }

    /// Whether the innermost directory looks the same in both trees.
    fn is_same_directory(&mut self) -> Result<bool, DifferenceError> {
        let frame = &self.frames[self.top()];
        let (Some(lower), Some(upper)) = (frame.lower.clone(), frame.upper.clone()) else { return Ok(false) };
        let path = frame.path.clone();
        let explicit = (self.stack.explicit(&path, &lower.describing)?, self.stack.explicit(&path, &upper.describing)?);
        match explicit {
            (Some(lower), Some(upper)) if lower == upper => return Ok(true),
            // If the common layers say anything, they say it of both.
            (None, None) if lower.description_open && upper.description_open => {
                if let (Some(lower), Some(upper)) = (lower.describing.first(), upper.describing.first())
                    && self.stack.metadata(*lower, &path)? == self.stack.metadata(*upper, &path)?
                {
                    return Ok(true);
                }
            }
            _ => {}
        }
        let top = self.top();
        Ok(self.look(top, Side::Lower)?.metadata == self.look(top, Side::Upper)?.metadata)
    }

    /// How the directory of a frame looks in a tree that has it: as the uppermost layer says that set it.
    fn look(&mut self, at: usize, side: Side) -> Result<Look, DifferenceError> {
        let frame = &self.frames[at];
        let seen = match side {
            Side::Lower => frame.lower.clone(),
            Side::Upper => frame.upper.clone(),
        };
        let Seen { mut describing, description_open, .. } = seen.expect("because the caller knows that it is there");
        let path = frame.path.clone();
        let mut explicit = self.stack.explicit(&path, &describing)?;
        if explicit.is_none() && description_open {
            let common = self.common_at(at)?.map_or(Vec::new(), |common| common.describing);
            explicit = self.stack.explicit(&path, &common)?;
            describing.extend(common);
        }
        let shows = explicit.unwrap_or_else(|| describing[0]);
        let implied = match explicit {
            Some(_) => None,
            None => self.stack.index(shows)?.why_implied(&path),
        };
        Ok(Look { metadata: self.stack.metadata(shows, &path)?, implied })
    }

    /// Whether a name that is no directory in the upper tree is the same in the lower one.
    fn is_same(&mut self, Named { name, path, lower, upper }: &Named) -> Result<bool, DifferenceError> {
        let (lower, upper) = match (lower, upper) {
            (Shown::Nothing, Shown::Nothing) => return Ok(true),
            (Shown::Nothing, Shown::File(upper)) => return Ok(upper.is_socket()),
            (Shown::File(lower), Shown::File(upper)) => (lower, upper),
            _ => return Ok(false),
        };
        // One path in one layer. Sockets of two trees are as good as one.
        if lower.layer == upper.layer || (lower.is_socket() && upper.is_socket()) {
            return Ok(true);
        }
        let dir = self.frames[self.top()].path.clone();
        let (of_lower, of_upper) = (self.stack.dir(lower.layer, &dir)?, self.stack.dir(upper.layer, &dir)?);
        let name = name.to_bytes();
        Ok(same_file((of_lower.as_fd(), name), (of_upper.as_fd(), name)).at("compare", path.to_string())?)
    }
}

// ---- the new layer ----------------------------------------------------------------------------

/// What came into the new layer.
#[derive(Default)]
struct Made {
    index: DirIndex,
    changes: u64,
}

/// A directory from the root to where the walk is, as the new layer has it.
struct Level {
    path: EntryPath,
    /// `None` until it is needed: it looks the same in both trees.
    look: Option<Look>,
    made: bool,
    /// What was put in it.
    entries: u64,
    whiteouts: bool,
}

/// The new layer, growing in a stage.
struct Draft<'s> {
    root: BorrowedFd<'s>,
    levels: Vec<Level>,
    /// The directory that was written to last.
    target: Option<(EntryPath, OwnedFd)>,
    /// The first name of each file that has several.
    linked: HashMap<Inode, EntryPath>,
    made: Made,
}

impl Draft<'_> {
    /// Follows the walk into a directory, which is made if it is new or changed.
    fn enter(&mut self, walk: &mut Walk<'_>) -> Result<(), DifferenceError> {
        let top = walk.top();
        let Frame { path, lower, upper, replaces, .. } = &walk.frames[top];
        let (path, has_lower, has_upper, replaces) = (path.clone(), lower.is_some(), upper.is_some(), *replaces);
        let is_root = path.is_root();
        let (look, is_change) = if !has_upper {
            // The root of an empty stack.
            (Some(Look { metadata: Metadata::implied(), implied: Some(Implied::OnTheWay) }), false)
        } else if !has_lower {
            let mut look = walk.look(top, Side::Upper)?;
            if replaces {
                // Over something else, nobody but this layer says how it looks.
                look.implied = None;
            }
            let is_change = !is_root || look.implied.is_none();
            (Some(look), is_change)
        } else if walk.is_same_directory()? {
            (None, false)
        } else {
            (Some(Look { implied: None, ..walk.look(top, Side::Upper)? }), true)
        };
        self.levels.push(Level { path, look, made: false, entries: 0, whiteouts: false });
        if is_change {
            self.made.changes += 1;
            self.ensure(walk)?;
        }
        Ok(())
    }

    /// Makes the directories that lead to where the walk is.
    fn ensure(&mut self, walk: &mut Walk<'_>) -> Result<(), DifferenceError> {
        let unmade = self.levels.iter().position(|level| !level.made).unwrap_or(self.levels.len());
        for at in unmade..self.levels.len() {
            let path = self.levels[at].path.clone();
            if let Some((dir, name)) = path.split() {
                check_name(&path, Meaning::Plain, "a name that begins like a whiteout")?;
                let name = c_name(name);
                let target = self.target(&dir)?;
                rustix::fs::mkdirat(target, &name, Mode::RWXU).at("make directory", path.to_string())?;
                self.levels[at - 1].entries += 1;
            }
            if self.levels[at].look.is_none() {
                let look = walk.look(at, Side::Upper)?;
                let on_the_way = look.implied == Some(Implied::OnTheWay);
                let implied = if on_the_way { Implied::OnTheWay } else { Implied::CopiedUp };
                self.levels[at].look = Some(Look { implied: Some(implied), ..look });
            }
            self.levels[at].made = true;
        }
        Ok(())
    }

    /// Finishes the directory that the walk left.
    fn leave(&mut self) -> Result<(), DifferenceError> {
        let level = self.levels.pop().expect("because the walk leaves only what it entered");
        let Level { path, look: Some(look), made: true, entries, whiteouts } = level else { return Ok(()) };
        // A tar could not name an empty directory without describing it.
        let is_named = entries > 0 || path.is_root();
        if let Some(implied) = look.implied.filter(|implied| is_named || *implied == Implied::CopiedUp) {
            self.made.index.insert(path.clone(), implied);
        }
        let target = self.target(&path)?;
        let finished = if whiteouts { tree::mark_whiteouts(target) } else { Ok(()) };
        finished.and_then(|()| look.metadata.apply(target)).at("set metadata of", path.to_string())?;
        Ok(())
    }

    /// Makes a name that is no directory in the upper tree be as it is there.
    fn put(&mut self, walk: &mut Walk<'_>, named: &Named) -> Result<(), DifferenceError> {
        let Named { name, path, lower, upper } = named;
        let is_socket = |shown: &Shown| matches!(shown, Shown::File(file) if file.is_socket());
        match upper {
            _ if is_socket(upper) && (is_socket(lower) || matches!(lower, Shown::Nothing)) => Ok(()),
            Shown::File(file) if !file.is_socket() => self.copy(walk, name, path, file),
            _ => self.hide(walk, name, path),
        }
    }

    fn copy(
        &mut self,
        walk: &mut Walk<'_>,
        name: &CStr,
        path: &EntryPath,
        file: &FileAt,
    ) -> Result<(), DifferenceError> {
        check_name(path, Meaning::Plain, "a name that begins like a whiteout")?;
        self.ensure(walk)?;
        self.added(false);
        let dir = self.levels[self.levels.len() - 1].path.clone();
        let is_shared = file.stat.st_nlink > 1;
        if let Some(first) = self.linked.get(&file.inode()).filter(|_| is_shared) {
            let (first_dir, first_name) = first.split().expect("because a file is not the root");
            let first_dir = tree::open_dir(self.root, &first_dir).at("open", first.to_string())?;
            let first_name = c_name(first_name);
            if tree::link(first_dir, &first_name, self.target(&dir)?, name).at("link", path.to_string())? {
                return Ok(());
            }
        }
        let from = walk.stack.dir(file.layer, &dir)?;
        tree::copy(&from, name, &file.stat, self.target(&dir)?).at("copy", path.to_string())?;
        if is_shared {
            self.linked.insert(file.inode(), path.clone());
        }
        Ok(())
    }

    /// Hides what the lower tree has at a name.
    fn hide(&mut self, walk: &mut Walk<'_>, name: &CStr, path: &EntryPath) -> Result<(), DifferenceError> {
        let mark = Mark::Whiteout(name.to_bytes());
        let (dir, _) = path.split().expect("because the root is always there");
        check_name(&dir.join(&mark.file_name()), Meaning::Mark(mark), "a whiteout of a name that begins like one")?;
        self.ensure(walk)?;
        self.added(true);
        let device = FileType::CharacterDevice;
        rustix::fs::mknodat(self.target(&dir)?, name, device, Mode::empty(), 0).at("hide", path.to_string())?;
        Ok(())
    }

    fn added(&mut self, is_whiteout: bool) {
        self.made.changes += 1;
        let level = self.levels.last_mut().expect("because a name is in a directory");
        level.entries += 1;
        level.whiteouts |= is_whiteout;
    }

    /// A directory of the new layer.
    fn target(&mut self, path: &EntryPath) -> Result<&OwnedFd, DifferenceError> {
        let dir = match self.target.take() {
            Some((open, dir)) if open == *path => dir,
            _ => tree::open_dir(self.root, path).at("open", path.to_string())?,
        };
        Ok(&self.target.insert((path.clone(), dir)).1)
    }
}

fn check_name(path: &EntryPath, meaning: Meaning<'_>, why: &'static str) -> Result<(), DifferenceError> {
    match whiteout::meaning(path) {
        Ok(found) if found == meaning => Ok(()),
        _ => Err(DifferenceError::Unrepresentable { path: path.clone(), why }),
    }
}
