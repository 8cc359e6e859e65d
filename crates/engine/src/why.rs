//! `ply why`: what keeps something, up to the roots that hold it.
//!
//! Roots are names of images, the build cache (a record stays until it is pruned or removed), writable and registered
//! layers, mounts, and leases. What no root leads to goes with the next collection.

use std::collections::{HashMap, HashSet};

use plies_cache::{CacheError, RecordId, State};
use plies_image::{Image, ImageError, LayerStoreError};
use plies_oci::{BlobDigest, ChainId, ImageId};
use plies_store::{ActiveId, Keeper, LayerId, LeaseInfo, Owner, Resource, SnapshotId, keepers_of};
use serde::Serialize;

use crate::Engine;
use crate::run::RunError;
use crate::space::SpaceError;

/// Things on top of one another that are shown; what keeps the last is left out, with a note. A deeper answer would not
/// be read, and each level costs a frame of the stack.
const DEPTH_MAX: usize = 1000;

/// Something, and what keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WhyNode {
    /// `record`, `layer`, `blob`, `snapshot`, `active`, `image`, `chain`, `writable layer`, `mount`, `lease` or `owner`.
    pub kind: &'static str,
    /// Its ID, digest, name or path.
    pub id: String,
    /// What it is, for people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub label: String,
    /// Whether something keeps it, directly or over others.
    pub kept: bool,
    /// What of itself keeps it, and until when; `None` if that is only others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root: Option<String>,
    /// What else is to be known: that nothing keeps it, or that it was shown before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// What keeps it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub by: Vec<WhyNode>,
}

/// What may be asked about, and what may be an answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Thing {
    Resource(Resource),
    Lease(plies_store::LeaseId),
    Record(RecordId),
    Image(ImageId),
    Chain(ChainId),
    /// The reference of a live process to a chain.
    ChainRef(usize),
    Writable(String),
    Mount(String),
    /// An owner of another kind.
    Owner(String),
}

impl Thing {
    fn of_owner(owner: &Owner) -> Self {
        let (kind, name) = owner.as_str().split_once(':').unwrap_or(("", owner.as_str()));
        let parsed = match kind {
            "image" => name.parse().ok().map(Self::Image),
            "record" => RecordId::parse(name).map(Self::Record),
            "chain" => name.parse().ok().map(Self::Chain),
            "rw" => Some(Self::Writable(name.to_owned())),
            "mount" => Some(Self::Mount(name.to_owned())),
            _ => None,
        };
        parsed.unwrap_or_else(|| Self::Owner(owner.to_string()))
    }
}

/// What is looked up once for a whole answer.
struct Known<'a> {
    engine: &'a Engine,
    keepers: HashMap<Resource, Vec<Keeper>>,
    images: HashMap<ImageId, Image>,
    leases: Vec<LeaseInfo>,
    shown: HashSet<Thing>,
}

impl Engine {
    /// What keeps a record, layer, blob, registered layer or image. `wanted` is an image's name or ID, a record's ID or
    /// its beginning, a layer's ID, a blob's digest, or a chain ID. Costs a look at all holds and edges for each step
    /// from it up to the roots.
    ///
    /// # Errors
    /// [`SpaceError::Target`] if there is no such thing.
    pub fn why(&self, wanted: &str) -> Result<WhyNode, SpaceError> {
        let thing = self.thing(wanted)?;
        let mut keepers = HashMap::new();
        let mut unknown: HashSet<Resource> = match thing {
            Thing::Resource(resource) => HashSet::from([resource]),
            _ => HashSet::new(),
        };
        let images = self.store().read(|rows| {
            while !unknown.is_empty() {
                let found = keepers_of(rows, &unknown)?;
                let above = found.values().flatten().filter_map(|keeper| match keeper {
                    Keeper::Resource(resource) => Some(*resource),
                    _ => None,
                });
                let above: HashSet<Resource> = above.collect();
                keepers.extend(unknown.drain().map(|resource| (resource, Vec::new())));
                keepers.extend(found);
                unknown.extend(above.into_iter().filter(|resource| !keepers.contains_key(resource)));
            }
            plies_image::list(rows)
        })?;
        let images = images.into_iter().map(|image| (image.id, image)).collect();
        let mut known = Known { engine: self, keepers, images, leases: self.store().leases()?, shown: HashSet::new() };
        known.node(thing, 0)
    }

    fn thing(&self, wanted: &str) -> Result<Thing, SpaceError> {
        match self.find_image(wanted) {
            Ok(found) => return Ok(Thing::Image(found.id)),
            Err(ImageError::NotFound { .. }) => {}
            Err(other) => return Err(RunError::from(other).into()),
        }
        let there = |resource: Resource| self.store().read(|rows| plies_store::Rows::has(rows, resource));
        let ids = [
            wanted.parse::<BlobDigest>().ok().map(Resource::from),
            wanted.parse::<LayerId>().ok().map(Resource::from),
            wanted.parse::<ActiveId>().ok().map(Resource::from),
            wanted.parse::<SnapshotId>().ok().map(Resource::from),
        ];
        for resource in ids.into_iter().flatten() {
            if there(resource)? {
                return Ok(Thing::Resource(resource));
            }
        }
        match self.cache().find(wanted) {
            Ok(id) => return Ok(Thing::Record(id)),
            Err(CacheError::NotFound { .. }) => {}
            Err(other) => return Err(other.into()),
        }
        match self.layer_store()?.find(wanted) {
            Ok(chain) => Ok(Thing::Chain(chain)),
            Err(LayerStoreError::DoesNotExist { .. }) => Err(RunError::NotFound { wanted: wanted.to_owned() }.into()),
            Err(other) => Err(other.into()),
        }
    }
}

impl Known<'_> {
    fn node(&mut self, thing: Thing, depth: usize) -> Result<WhyNode, SpaceError> {
        let (mut node, by) = self.look(&thing)?;
        if by.is_empty() {
            node.kept = node.root.is_some();
            if !node.kept {
                node.note.get_or_insert_with(|| "nothing: the next gc takes it".to_owned());
            }
            return Ok(node);
        }
        if depth == DEPTH_MAX || !self.shown.insert(thing) {
            node.kept = true;
            node.note = Some("… as shown before".to_owned());
            return Ok(node);
        }
        for thing in by {
            node.by.push(self.node(thing, depth + 1)?);
        }
        node.kept = node.root.is_some() || node.by.iter().any(|by| by.kept);
        Ok(node)
    }

    /// A thing by itself, and what keeps it.
    fn look(&self, thing: &Thing) -> Result<(WhyNode, Vec<Thing>), SpaceError> {
        let node = |kind, id: String, label: String, root: Option<String>| WhyNode {
            kind,
            id,
            label,
            kept: false,
            root,
            note: None,
            by: Vec::new(),
        };
        Ok(match thing {
            Thing::Resource(resource) => {
                let (kind, id) = match resource {
                    Resource::Blob(digest) => ("blob", digest.to_string()),
                    Resource::Layer(id) => ("layer", id.to_string()),
                    Resource::Snapshot(id) => ("snapshot", id.to_string()),
                    Resource::Active(id) => ("active", id.to_string()),
                };
                let by = self.keepers.get(resource).into_iter().flatten().map(|keeper| match keeper {
                    Keeper::Owner(owner) => Thing::of_owner(owner),
                    Keeper::Lease(lease) => Thing::Lease(*lease),
                    Keeper::Resource(resource) => Thing::Resource(*resource),
                });
                (node(kind, id, String::new(), None), by.collect())
            }
            Thing::Lease(id) => {
                let lease = self.leases.iter().find(|lease| lease.id == *id);
                let now = self.engine.store().now();
                let root = lease.and_then(|lease| match lease.expires {
                    None => Some("until the process that has it ends".to_owned()),
                    Some(expires) if expires > now => Some(format!("until {}", crate::rfc3339(expires))),
                    Some(_) => None,
                });
                let mut node =
                    node("lease", id.to_string(), lease.map_or_else(String::new, |one| one.label.clone()), root);
                node.note = node.root.is_none().then(|| "it has expired: the next gc ends it".to_owned());
                (node, Vec::new())
            }
            Thing::Record(id) => self.look_at_record(*id, node)?,
            Thing::Image(id) => {
                let image = self.images.get(id);
                let names: Vec<_> =
                    image.iter().flat_map(|image| &image.names).map(|name| crate::familiar(name)).collect();
                let root = match names.as_slice() {
                    [] => "an image without a name, until ply rmi".to_owned(),
                    names => format!("named {}, until ply rmi", names.join(", ")),
                };
                (node("image", id.to_string(), String::new(), image.map(|_| root)), Vec::new())
            }
            Thing::Chain(id) => {
                let users = self.engine.layer_store()?.users(*id)?;
                let mut by: Vec<Thing> = users.children.into_iter().map(Thing::Chain).collect();
                let mut root = None;
                for (holder, count) in users.holders {
                    match holder.split_once(':') {
                        Some(("image", id)) => by.extend(id.parse().ok().map(Thing::Image)),
                        Some(("rw", name)) => by.push(Thing::Writable(name.to_owned())),
                        _ => root = Some(format!("registered by {holder} ({count}×), until ply layer release")),
                    }
                }
                by.extend((users.refs_count > 0).then_some(Thing::ChainRef(users.refs_count)));
                (node("chain", id.to_string(), String::new(), root), by)
            }
            Thing::ChainRef(count) => {
                let root = format!("{count} references of a live process");
                (node("lease", String::new(), String::new(), Some(root)), Vec::new())
            }
            Thing::Writable(name) => {
                let root = Some("until ply layer rw rm".to_owned());
                (node("writable layer", name.clone(), String::new(), root), Vec::new())
            }
            Thing::Mount(path) => {
                (node("mount", path.clone(), String::new(), Some("until ply umount".to_owned())), Vec::new())
            }
            Thing::Owner(name) => (node("owner", name.clone(), String::new(), Some("for good".to_owned())), Vec::new()),
        })
    }

    fn look_at_record(
        &self,
        id: RecordId,
        node: impl Fn(&'static str, String, String, Option<String>) -> WhyNode,
    ) -> Result<(WhyNode, Vec<Thing>), SpaceError> {
        let cache = self.engine.cache();
        let row = match cache.row(id) {
            Ok(row) => row,
            Err(CacheError::NotFound { .. }) => {
                let mut gone = node("record", id.to_string(), String::new(), None);
                gone.note = Some("it is gone: the next gc takes what it held".to_owned());
                return Ok((gone, Vec::new()));
            }
            Err(other) => return Err(other.into()),
        };
        let mut by: Vec<Thing> = cache.children(id)?.into_iter().map(Thing::Record).collect();
        let partner = match row.state {
            State::Mutable { committed_as, .. } => committed_as,
            State::Shared { mutable, .. } => Some(mutable),
            _ => None,
        };
        by.extend(partner.map(Thing::Record));
        let held = self.engine.cache.held();
        let holders = held.iter().find(|(held, _)| *held == id).map_or(0, |(_, holders)| holders.len());
        let root = if row.pinned {
            "pinned, until ply ref unpin".to_owned()
        } else if holders > 0 {
            format!("in use by this process ({holders}×)")
        } else {
            "a record of the build cache, until a prune takes it".to_owned()
        };
        Ok((node("record", id.to_string(), row.description, Some(root)), by))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use plies_store::{Expected, LeaseOptions};

    use super::*;
    use crate::EngineOptions;

    #[test]
    fn work_that_is_going_on_keeps_what_it_made_and_nothing_does_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let options = EngineOptions { warn: Arc::new(|error| panic!("{error}")), ..EngineOptions::default() };
        let engine = Engine::open(&dir.path().join("store"), options).unwrap();
        let lease = engine.store().lease(LeaseOptions::process("pull a:1")).unwrap();
        let ingest = engine.store().content().ingest_unnamed().unwrap();
        let blob = ingest.commit(Expected::anything(), &lease).unwrap().to_string();

        let why = engine.why(&blob).unwrap();
        let by: Vec<_> = why.by.iter().map(|by| (by.kind, by.label.as_str(), by.root.as_deref())).collect();
        assert_eq!(by, [("lease", "pull a:1", Some("until the process that has it ends"))]);
        assert!(why.kept && why.note.is_none(), "{why:?}");
        engine.remove_dangling_images().unwrap();
        engine.gc(crate::GcMode::Run).unwrap();
        assert!(engine.why(&blob).unwrap().kept, "a collection takes nothing from running work");
        engine.gc(crate::GcMode::Full).unwrap();
        assert!(engine.why(&blob).unwrap().kept, "and neither does a full one");

        lease.release().unwrap();
        let why = engine.why(&blob).unwrap();
        assert_eq!((why.kept, why.by.len(), why.root.as_deref()), (false, 0, None));
        assert_eq!(why.note.as_deref(), Some("nothing: the next gc takes it"));
        engine.gc(crate::GcMode::Run).unwrap();
        assert!(matches!(engine.why(&blob), Err(SpaceError::Target(RunError::NotFound { .. }))));
    }
}
