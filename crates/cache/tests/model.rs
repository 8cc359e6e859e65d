//! Random operations against a small model: which records there are, who holds them, and what each tree shows. After every
//! step the records and holders are those of the model, and everything that rows say of each other is counted again.

// The exemption for tests ends at helpers outside of test functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Cache, Rig, Tree, assert_sound, listing, path_of, tree};
use plies_cache::{CacheError, ImmutableRef, MutableRef, Parents, RecordId, RecordOptions};
use plies_store::{Attach, GcMode};
use proptest::prelude::*;

/// Numbers stand for whatever of the kind there is, counted around.
#[derive(Debug, Clone)]
enum Act {
    Create { parent: Option<u8>, retain: bool },
    Write { which: u8, name: u8 },
    Delete { which: u8, name: u8 },
    Commit(u8),
    Seal(u8),
    Finalize(u8),
    Retain(u8),
    Get(u8),
    GetMutable(u8),
    Clone(u8),
    Release(u8),
    Merge([u8; 3]),
    Diff(u8, u8),
    Remove(u8),
    Look(u8),
    Reopen,
    Gc,
}

fn act() -> impl Strategy<Value = Act> {
    let n = any::<u8>;
    prop_oneof![
        4 => (proptest::option::of(n()), any::<bool>()).prop_map(|(parent, retain)| Act::Create { parent, retain }),
        5 => (n(), n()).prop_map(|(which, name)| Act::Write { which, name }),
        2 => (n(), n()).prop_map(|(which, name)| Act::Delete { which, name }),
        5 => n().prop_map(Act::Commit),
        1 => n().prop_map(Act::Seal),
        3 => n().prop_map(Act::Finalize),
        1 => n().prop_map(Act::Retain),
        4 => n().prop_map(Act::Get),
        3 => n().prop_map(Act::GetMutable),
        2 => n().prop_map(Act::Clone),
        5 => n().prop_map(Act::Release),
        4 => [n(), n(), n()].prop_map(Act::Merge),
        3 => (n(), n()).prop_map(|(lower, upper)| Act::Diff(lower, upper)),
        3 => n().prop_map(Act::Remove),
        2 => n().prop_map(Act::Look),
        1 => Just(Act::Reopen),
        1 => Just(Act::Gc),
    ]
}

/// What a record's own files say: a content, or that there is nothing.
type Own = BTreeMap<String, Option<String>>;

#[derive(Debug, Clone, PartialEq)]
enum Kind {
    Mutable { retain: bool, committed_as: Option<RecordId> },
    Shared { mutable: RecordId },
    Own,
}

#[derive(Debug, Clone)]
struct Known {
    kind: Kind,
    parents: Parents,
    own: Own,
}

enum Held {
    Immutable(ImmutableRef),
    Mutable(MutableRef),
}

impl Held {
    fn id(&self) -> RecordId {
        match self {
            Self::Immutable(held) => held.id(),
            Self::Mutable(held) => held.id(),
        }
    }
}

struct World {
    rig: Rig,
    cache: Option<Cache>,
    held: Vec<Held>,
    known: BTreeMap<RecordId, Known>,
    texts: u32,
}

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

fn name_of(n: u8) -> String {
    NAMES[usize::from(n) % NAMES.len()].to_owned()
}

fn by() -> RecordOptions {
    RecordOptions::by("model")
}

fn uppermost(ids: Vec<RecordId>) -> Vec<RecordId> {
    let mut kept: Vec<RecordId> = Vec::new();
    for id in ids.into_iter().rev() {
        if !kept.contains(&id) {
            kept.insert(0, id);
        }
    }
    kept
}

impl World {
    fn cache(&self) -> &Cache {
        self.cache.as_ref().unwrap()
    }

    fn walk(&self, id: RecordId) -> Vec<RecordId> {
        match &self.known[&id].parents {
            Parents::None => vec![id],
            Parents::Layer(parent) => [self.walk(*parent), vec![id]].concat(),
            Parents::Merge(parents) => parents.iter().flat_map(|parent| self.walk(*parent)).collect(),
            Parents::Diff { lower, upper: Some(upper) } if self.known[upper].parents == Parents::Layer(*lower) => {
                vec![*upper]
            }
            Parents::Diff { .. } => vec![id],
        }
    }

    fn shown(&self, walk: &[RecordId]) -> Tree {
        let mut shown = Tree::new();
        for id in walk {
            for (name, content) in &self.known[id].own {
                match content {
                    Some(content) => shown.insert(name.clone(), format!("file {content:?} 644")),
                    None => shown.remove(name),
                };
            }
        }
        shown
    }

    fn below(&self, id: RecordId) -> Tree {
        let walk = self.walk(id);
        self.shown(&walk[..walk.len() - 1])
    }

    fn count(&self, id: RecordId) -> usize {
        self.held.iter().filter(|held| held.id() == id).count()
    }

    fn children(&self, id: RecordId) -> usize {
        self.known.values().filter(|known| known.parents.ids().contains(&id)).count()
    }

    fn finalized(&mut self, id: RecordId) {
        if let Kind::Shared { mutable } = self.known[&id].kind {
            self.known.remove(&mutable);
            self.known.get_mut(&id).unwrap().kind = Kind::Own;
        }
    }

    fn partner(&self, id: RecordId) -> Option<RecordId> {
        match self.known[&id].kind {
            Kind::Mutable { committed_as, .. } => committed_as,
            Kind::Shared { mutable } => Some(mutable),
            Kind::Own => None,
        }
    }

    fn committed(&mut self, mutable: RecordId, id: RecordId) {
        let known = self.known[&mutable].clone();
        self.known.insert(id, Known { kind: Kind::Shared { mutable }, ..known });
        let Kind::Mutable { committed_as, .. } = &mut self.known.get_mut(&mutable).unwrap().kind else { panic!() };
        assert_eq!(committed_as.replace(id), None);
    }

    /// One of those that are held for reading.
    fn immutable(&self, n: u8) -> Option<&ImmutableRef> {
        let all: Vec<&ImmutableRef> = self
            .held
            .iter()
            .filter_map(|held| match held {
                Held::Immutable(held) => Some(held),
                Held::Mutable(_) => None,
            })
            .collect();
        (!all.is_empty()).then(|| all[usize::from(n) % all.len()])
    }

    fn mutable_at(&self, n: u8) -> Option<usize> {
        let all: Vec<usize> = (0..self.held.len()).filter(|at| matches!(self.held[*at], Held::Mutable(_))).collect();
        (!all.is_empty()).then(|| all[usize::from(n) % all.len()])
    }

    fn take_mutable(&mut self, n: u8) -> Option<MutableRef> {
        let at = self.mutable_at(n)?;
        match self.held.remove(at) {
            Held::Mutable(held) => Some(held),
            Held::Immutable(_) => None,
        }
    }

    fn some_id(&self, n: u8) -> Option<RecordId> {
        (!self.known.is_empty()).then(|| *self.known.keys().nth(usize::from(n) % self.known.len()).unwrap())
    }

    fn release(&mut self, at: usize) {
        let held = self.held.remove(at);
        let id = held.id();
        match held {
            Held::Immutable(held) => held.release().unwrap(),
            Held::Mutable(held) => held.release().unwrap(),
        }
        if self.count(id) > 0 {
            return;
        }
        match self.known[&id].kind {
            Kind::Mutable { retain: false, .. } => drop(self.known.remove(&id)),
            Kind::Shared { mutable } => {
                if matches!(self.known[&mutable].kind, Kind::Mutable { retain: false, .. }) {
                    self.known.remove(&mutable);
                    self.known.remove(&id);
                }
            }
            Kind::Mutable { .. } | Kind::Own => {}
        }
    }

    fn change(&mut self, which: u8, name: u8, delete: bool) {
        let Some(at) = self.mutable_at(which) else { return };
        let Held::Mutable(held) = &self.held[at] else { return };
        let (id, name) = (held.id(), name_of(name));
        let below = self.below(id).contains_key(&name);
        let mounted = held.mount(Attach::Detached).unwrap();
        let root = path_of(&mounted.root());
        let seen = self.shown(&self.walk(id));
        assert_eq!(listing(&root), seen);
        let mut own = self.known[&id].own.clone();
        if !delete {
            self.texts += 1;
            let text = format!("text {}", self.texts);
            std::fs::write(root.join(&name), &text).unwrap();
            own.insert(name, Some(text));
        } else if seen.contains_key(&name) {
            std::fs::remove_file(root.join(&name)).unwrap();
            if below {
                own.insert(name, None);
            } else {
                own.remove(&name);
            }
        }
        mounted.unmount().unwrap();
        self.known.get_mut(&id).unwrap().own = own;
    }

    /// Records that an operation made on the way, as their rows describe them.
    fn learn(&mut self) {
        for id in self.cache().ids() {
            if !self.known.contains_key(&id) {
                let row = self.cache().must(id);
                assert!(matches!(row.parents, Parents::Merge(_) | Parents::Diff { .. }), "{row:?}");
                self.known.insert(id, Known { kind: Kind::Own, parents: row.parents, own: Own::new() });
            }
        }
    }

    fn composed(&self, parents: &Parents) -> Option<RecordId> {
        self.known.iter().find(|(_, known)| known.parents == *parents).map(|(id, _)| *id)
    }

    fn run(&mut self, act: &Act) {
        match *act {
            Act::Create { parent, retain } => {
                let parent = parent.and_then(|n| self.immutable(n));
                let parent_id = parent.map(ImmutableRef::id);
                let options = RecordOptions { retain: Some(retain), ..by() };
                let made = self.cache().create(parent, &options).unwrap();
                if let Some(parent) = parent_id {
                    self.finalized(parent);
                }
                let parents = parent_id.map_or(Parents::None, Parents::Layer);
                let kind = Kind::Mutable { retain, committed_as: None };
                self.known.insert(made.id(), Known { kind, parents, own: Own::new() });
                self.held.push(Held::Mutable(made));
            }
            Act::Write { which, name } => self.change(which, name, false),
            Act::Delete { which, name } => self.change(which, name, true),
            Act::Commit(n) => {
                let Some(held) = self.take_mutable(n) else { return };
                let mutable = held.id();
                let made = held.commit().unwrap();
                self.committed(mutable, made.id());
                self.held.push(Held::Immutable(made));
            }
            Act::Seal(n) => {
                let Some(held) = self.take_mutable(n) else { return };
                let mutable = held.id();
                let made = held.seal(&[], None).unwrap();
                let known = self.known.remove(&mutable).unwrap();
                self.known.insert(made.id(), Known { kind: Kind::Own, ..known });
                self.held.push(Held::Immutable(made));
            }
            Act::Finalize(n) | Act::Retain(n) => {
                let Some(held) = self.immutable(n) else { return };
                if matches!(act, Act::Retain(_)) {
                    held.retain().unwrap()
                } else {
                    held.finalize().unwrap()
                };
                let id = held.id();
                self.finalized(id);
            }
            Act::Get(n) => {
                let Some(id) = self.some_id(n) else { return };
                let result = self.cache().get(id, &by());
                let is_mutable = matches!(self.known[&id].kind, Kind::Mutable { .. });
                if is_mutable && self.count(id) > 0 {
                    assert!(result.unwrap_err().is_locked());
                    return;
                }
                let made = result.unwrap();
                match self.known[&id].kind {
                    Kind::Mutable { committed_as: Some(partner), .. } => assert_eq!(made.id(), partner),
                    Kind::Mutable { committed_as: None, .. } => self.committed(id, made.id()),
                    _ => assert_eq!(made.id(), id),
                }
                self.held.push(Held::Immutable(made));
            }
            Act::GetMutable(n) => {
                let Some(id) = self.some_id(n) else { return };
                let result = self.cache().get_mutable(id, &by());
                let Kind::Mutable { retain, committed_as } = self.known[&id].kind else {
                    assert!(matches!(result.unwrap_err(), CacheError::WrongKind { .. }));
                    return;
                };
                if self.count(id) > 0 || committed_as.is_some_and(|partner| self.count(partner) > 0) {
                    assert!(result.unwrap_err().is_locked());
                    return;
                }
                if let Some(partner) = committed_as {
                    self.known.remove(&partner);
                }
                self.known.get_mut(&id).unwrap().kind = Kind::Mutable { retain, committed_as: None };
                self.held.push(Held::Mutable(result.unwrap()));
            }
            Act::Clone(n) => {
                let Some(held) = self.immutable(n) else { return };
                let clone = held.clone();
                self.held.push(Held::Immutable(clone));
            }
            Act::Release(n) => {
                if !self.held.is_empty() {
                    self.release(usize::from(n) % self.held.len());
                }
            }
            Act::Merge(inputs) => {
                let inputs: Vec<&ImmutableRef> = inputs.iter().filter_map(|n| self.immutable(*n)).collect();
                if inputs.is_empty() {
                    return;
                }
                let flat = inputs.iter().flat_map(|input| match &self.known[&input.id()].parents {
                    Parents::Merge(parents) => parents.clone(),
                    _ => vec![input.id()],
                });
                let parents = uppermost(flat.collect());
                let walk: Vec<RecordId> = inputs.iter().flat_map(|input| self.walk(input.id())).collect();
                let expected = self.shown(&walk);
                let made = self.cache().merged(&inputs);
                if let [one] = parents.as_slice() {
                    assert_eq!(made.id(), *one);
                } else {
                    let known = self.composed(&Parents::Merge(parents.clone()));
                    assert!(known.is_none_or(|known| known == made.id()), "it was there before");
                    parents.iter().for_each(|parent| self.finalized(*parent));
                    self.learn();
                }
                assert_eq!(self.shown(&self.walk(made.id())), expected);
                self.held.push(Held::Immutable(made));
            }
            Act::Diff(lower, upper) => {
                let (Some(lower), Some(upper)) = (self.immutable(lower), self.immutable(upper)) else { return };
                let (below, all) = (self.walk(lower.id()), self.walk(upper.id()));
                // Others are computed; see the tests of merges.
                let Some(between) = all.strip_prefix(below.as_slice()) else { return };
                let expected = self.shown_alone(between);
                let made = self.cache().diffed(lower, upper);
                let (lower, upper) = (lower.id(), upper.id());
                self.finalized(lower);
                self.finalized(upper);
                self.learn();
                assert_eq!(self.shown_alone(&self.walk(made.id())), expected);
                self.held.push(Held::Immutable(made));
            }
            Act::Remove(n) => {
                let Some(id) = self.some_id(n) else { return };
                let partner = self.partner(id);
                let busy = self.count(id) > 0 || partner.is_some_and(|partner| self.count(partner) > 0);
                let children = self.children(id) + partner.map_or(0, |partner| self.children(partner));
                match self.cache().remove(&[id]) {
                    Err(CacheError::Locked { .. }) => assert!(busy),
                    Err(CacheError::HasChildren { count, .. }) => assert!(!busy && count == children && count > 0),
                    other => {
                        other.unwrap();
                        assert!(!busy && children == 0);
                        self.known.remove(&id);
                        partner.map(|partner| self.known.remove(&partner));
                    }
                }
            }
            Act::Look(n) => {
                let Some(held) = self.immutable(n) else { return };
                let id = held.id();
                assert_eq!(tree(held), self.shown(&self.walk(id)), "{id}");
                self.finalized(id);
            }
            Act::Reopen => {
                while !self.held.is_empty() {
                    self.release(0);
                }
                self.cache.take().unwrap().close();
                self.cache = Some(self.rig.open());
            }
            Act::Gc => drop(self.cache().store.gc(GcMode::Run).unwrap()),
        }
    }

    /// What layers say, whatever they are laid over.
    fn shown_alone(&self, walk: &[RecordId]) -> Own {
        let mut all = Own::new();
        walk.iter().for_each(|id| all.extend(self.known[id].own.clone()));
        all
    }

    fn check(&self) {
        let cache = self.cache();
        assert_eq!(cache.ids(), self.known.keys().copied().collect::<BTreeSet<_>>());
        let held: BTreeMap<RecordId, usize> =
            cache.manager.held().into_iter().map(|(id, holders)| (id, holders.len())).collect();
        let mut expected = BTreeMap::new();
        self.held.iter().for_each(|held| *expected.entry(held.id()).or_insert(0) += 1);
        assert_eq!(held, expected);
        assert_sound(cache);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, max_shrink_iters: 300, ..ProptestConfig::default() })]
    #[test]
    fn records_holders_and_trees_are_those_of_the_model(acts in proptest::collection::vec(act(), 1..50)) {
        let rig = Rig::new();
        let cache = Some(rig.open());
        let mut world = World { rig, cache, held: Vec::new(), known: BTreeMap::new(), texts: 0 };
        for act in &acts {
            world.run(act);
            world.check();
        }
        // At the end every tree that can be had shows what it should, after everything else was collected.
        world.cache().store.gc(GcMode::Run).unwrap();
        for n in 0..=u8::MAX {
            if usize::from(n) >= world.held.len() {
                break;
            }
            world.run(&Act::Look(n));
        }
        world.run(&Act::Reopen);
        world.check();
        world.rig.assert_no_warnings();
    }
}
