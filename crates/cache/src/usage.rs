//! Disk usage: what each record costs, and who else needs those bytes.
//!
//! What a record costs is what it keeps from being collected: its layer or upper, its blob and the variants of that, and
//! what only its whole tree needs (fix-up layers). All of that are rows, which are scanned once, in order; nothing here
//! walks a tree, but to measure uppers that nobody writes to. Layers are kept by diff ID, so two records may have the
//! same one: such bytes are shared, and counted once in any sum.
//!
//! A record that was committed and not finalized and the mutable one whose files it shares are one row: the immutable
//! one while somebody holds it, the mutable one otherwise.
//!
//! Memory: some 150 bytes a record while it runs. A record that is damaged is a row with an error, and hides no other.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::ControlFlow;
use std::time::Duration;

use plies_oci::{BlobDigest, DiffId};
use plies_store::{
    ActiveId, CatalogueError, LayerId, Resource, Rows, SizeRow, SnapshotError, SnapshotId, Stamp, scan_edges,
    scan_holds, scan_sizes,
};

use crate::filter::{FilterRow, Filters};
use crate::manager::{Controller, Inner};
use crate::prune::SharedChecker;
use crate::record::{ACTIVES, CHILDREN, IdRow, Parents, RECORDS, RecordRow, RecordType, State, USES, UseRow};
use crate::{CacheError, RecordId};

/// Steps along parents to find out which layers a record shows. Only parents that go round in a circle need more.
const CHAIN_STEPS_MAX: usize = 100_000;

/// Stands for no place in a list.
const NOWHERE: u32 = u32::MAX;

/// What to tell of the records.
#[derive(Debug, Clone)]
pub struct UsageOptions {
    /// Only records that match one of these ([`Filters`]).
    pub filters: Vec<String>,
    /// Whether to walk uppers that nobody writes to (of cache mounts, and of what was committed and not finalized), if
    /// they were written to since the last time. Otherwise their size is what it was then.
    pub measure: bool,
}

impl Default for UsageOptions {
    fn default() -> Self {
        Self { filters: Vec::new(), measure: true }
    }
}

/// One record and what it costs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordUsage {
    /// Which.
    pub id: RecordId,
    /// Whether it can still be written to.
    pub mutable: bool,
    /// Whether somebody holds it, or a record that stands on it. What only idle records stand on is not in use.
    pub in_use: bool,
    /// All that it keeps, without its parents; 0 while somebody writes to it.
    pub size_bytes: u64,
    /// What no other record keeps as well.
    pub unique_bytes: u64,
    /// What no row that was told before it was charged with: over all rows these add up to what is there.
    pub charged_bytes: u64,
    /// What it stands on, in order.
    pub parents: Vec<RecordId>,
    /// When it was made; `None` if its row does not say.
    pub created_at: Option<Stamp>,
    /// What it is, for people.
    pub description: String,
    /// The last time a ref was released; `None` if never.
    pub last_used_at: Option<Stamp>,
    /// How many times.
    pub usage_count: u64,
    /// What kind of thing it is.
    pub record_type: RecordType,
    /// Whether an image store keeps its layers as well, by the manager's checker.
    pub shared: bool,
    /// Never pruned.
    pub pinned: bool,
    /// How long it took to make; `None` if nobody saw it.
    pub took: Option<Duration>,
    /// In which way it is damaged.
    pub error: Option<String>,
}

impl FilterRow for RecordUsage {
    fn field(&self, name: &str) -> Option<Cow<'_, str>> {
        let flag = |set: bool| set.then_some(Cow::Borrowed(""));
        match name {
            "id" => Some(self.id.to_string().into()),
            "parents" => {
                let parents: Vec<String> = self.parents.iter().map(RecordId::to_string).collect();
                Some(parents.join(";").into())
            }
            "description" => Some(self.description.as_str().into()),
            "type" => Some(self.record_type.name().into()),
            "inuse" => flag(self.in_use),
            "mutable" => flag(self.mutable),
            "immutable" => flag(!self.mutable),
            "shared" => flag(self.shared),
            "private" => flag(!self.shared),
            "pinned" => flag(self.pinned),
            _ => None,
        }
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn last_touched(&self) -> Option<Stamp> {
        self.last_used_at.or(self.created_at)
    }
}

/// What the records that were told cost together.
#[derive(Debug, Default)]
pub struct UsageTotals {
    /// How many there are.
    pub records_count: u64,
    /// Their bytes, each counted once.
    pub total_bytes: u64,
    /// Of these, what no second record keeps.
    pub unique_bytes: u64,
    /// Of these, what a record keeps that is in use: pruning cannot free it.
    pub in_use_bytes: u64,
    /// Rows whose very key cannot be read: nobody knows which records they were.
    pub unreadable: Vec<CatalogueError>,
}

/// Disk usage of the build cache.
#[derive(Debug, Default)]
pub struct Usage {
    /// Every record, by ID.
    pub records: Vec<RecordUsage>,
    /// All of them together.
    pub totals: UsageTotals,
}

impl Controller {
    /// Disk usage of every record that matches, as of one moment.
    ///
    /// # Errors
    /// [`CacheError::Filter`]; [`CacheError::Checker`]; [`CacheError::Catalogue`] if the database fails.
    pub fn disk_usage(&self, options: &UsageOptions) -> Result<Usage, CacheError> {
        let mut records = Vec::new();
        let totals = self.scan_usage(options, &mut |record| records.push(record))?;
        Ok(Usage { records, totals })
    }

    /// As [`Controller::disk_usage`], without keeping the rows: `visit` gets them one by one, by ID. It may use the
    /// cache; pages of the catalogue that are replaced meanwhile are only freed afterwards.
    ///
    /// # Errors
    /// As [`Controller::disk_usage`].
    pub fn scan_usage(
        &self,
        options: &UsageOptions,
        visit: &mut dyn FnMut(RecordUsage),
    ) -> Result<UsageTotals, CacheError> {
        let filters = Filters::parse("diskusage", &options.filters)?;
        let inner = &*self.inner;
        if options.measure {
            inner.measure_uppers()?;
        }
        let now = inner.store.now();
        let checker = inner.checker.as_deref();
        inner.store.read(|rows| {
            let mut survey = Survey::take(inner, rows, checker.is_some())?;
            if let Some(checker) = checker {
                survey.mark_shared(checker)?;
            }
            let mut totals = UsageTotals { unreadable: std::mem::take(&mut survey.unreadable), ..Default::default() };
            let mut charged = vec![false; survey.sizes.len()];
            survey.scan(rows, |at, row| {
                let mut record = survey.usage(at, row);
                if !filters.matches(&record, now) {
                    return;
                }
                for kept in survey.kept_by(at) {
                    if !std::mem::replace(&mut charged[*kept as usize], true) {
                        let bytes = survey.sizes.bytes(*kept);
                        record.charged_bytes += bytes;
                        totals.in_use_bytes += if survey.sizes.in_use[*kept as usize] { bytes } else { 0 };
                    }
                }
                totals.records_count += 1;
                totals.total_bytes += record.charged_bytes;
                totals.unique_bytes += record.unique_bytes;
                visit(record);
            })?;
            Ok(totals)
        })
    }
}

impl Inner {
    /// Measures the uppers of records that nobody writes to. One that cannot be measured now (it is gone, or just
    /// becomes a layer) keeps the size that it had.
    pub(crate) fn measure_uppers(&self) -> Result<(), CacheError> {
        let mut uppers = Vec::new();
        let listed = self.store.snapshots().scan_actives(|info| {
            uppers.push(info);
            ControlFlow::Continue(())
        });
        unless_database_failed(listed)?;
        for upper in uppers.iter().filter(|upper| upper.changed && upper.sealed.is_none()) {
            let Some(IdRow(id)) = self.read(|rows| rows.get(&ACTIVES, &upper.id))? else { continue };
            if self.live.holders(id) == 0 {
                unless_database_failed(self.store.snapshots().measure(upper.id).map(drop))?;
            }
        }
        Ok(())
    }
}

fn unless_database_failed(result: Result<(), SnapshotError>) -> Result<(), CacheError> {
    match result {
        Err(error @ SnapshotError::Catalogue(CatalogueError::Database { .. })) => Err(error.into()),
        _ => Ok(()),
    }
}

/// What each blob, layer and upper of the store costs. They are called by their places in here.
#[derive(Debug, Default)]
pub(crate) struct Sizes {
    blobs: Vec<(BlobDigest, u64)>,
    layers: Vec<(LayerId, u64)>,
    uppers: Vec<(ActiveId, u64)>,
    /// Of the layers; empty unless asked for.
    diff_ids: Vec<Option<DiffId>>,
    /// Whether a record keeps it that is in use.
    in_use: Vec<bool>,
}

impl Sizes {
    fn read(rows: &impl Rows, with_diff_ids: bool) -> Result<Self, CatalogueError> {
        let mut sizes = Self::default();
        scan_sizes(rows, |SizeRow { resource, size_bytes, diff_id }| match resource {
            Resource::Blob(digest) => sizes.blobs.push((digest, size_bytes)),
            Resource::Layer(id) => {
                sizes.layers.push((id, size_bytes));
                if with_diff_ids {
                    sizes.diff_ids.push(diff_id);
                }
            }
            Resource::Active(id) => sizes.uppers.push((id, size_bytes)),
            Resource::Snapshot(_) => {}
        })?;
        sizes.in_use = vec![false; sizes.len()];
        Ok(sizes)
    }

    pub(crate) fn len(&self) -> usize {
        self.blobs.len() + self.layers.len() + self.uppers.len()
    }

    fn place(&self, resource: Resource) -> Option<u32> {
        let place = match resource {
            Resource::Blob(digest) => self.blobs.binary_search_by_key(&digest, |(id, _)| *id).ok()?,
            Resource::Layer(layer) => {
                self.blobs.len() + self.layers.binary_search_by_key(&layer, |(id, _)| *id).ok()?
            }
            Resource::Active(active) => {
                let at = self.uppers.binary_search_by_key(&active, |(id, _)| *id).ok()?;
                self.blobs.len() + self.layers.len() + at
            }
            Resource::Snapshot(_) => return None,
        };
        Some(short(place))
    }

    fn diff_id(&self, layer: LayerId) -> Option<DiffId> {
        let at = self.layers.binary_search_by_key(&layer, |(id, _)| *id).ok()?;
        *self.diff_ids.get(at)?
    }

    pub(crate) fn bytes(&self, place: u32) -> u64 {
        let place = place as usize;
        let uppers = self.blobs.len() + self.layers.len();
        match place {
            at if at < self.blobs.len() => self.blobs[at].1,
            at if at < uppers => self.layers[at - self.blobs.len()].1,
            at => self.uppers[at - uppers].1,
        }
    }

    /// Whether a record keeps it that is in use.
    pub(crate) fn is_in_use(&self, place: u32) -> bool {
        self.in_use[place as usize]
    }

    fn ignore_upper(&mut self, active: ActiveId) {
        if let Ok(at) = self.uppers.binary_search_by_key(&active, |(id, _)| *id) {
            self.uppers[at].1 = 0;
        }
    }
}

/// Places fit in 32 bits: a catalogue of four thousand million rows has other troubles.
fn short(place: usize) -> u32 {
    u32::try_from(place).unwrap_or(NOWHERE)
}

/// A record, as far as many of them are kept in memory at once.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) id: RecordId,
    pub(crate) created_at: Option<Stamp>,
    pub(crate) uses: UseRow,
    pub(crate) took: Option<Duration>,
    pub(crate) record_type: RecordType,
    pub(crate) mutable: bool,
    pub(crate) pinned: bool,
    pub(crate) held: bool,
    pub(crate) in_use: bool,
    pub(crate) shared: bool,
    /// The other one of a pair that shares its files.
    pub(crate) partner: Option<u32>,
    /// Of a pair, the other one is shown.
    pub(crate) hidden: bool,
    shows: Shows,
    fault: Option<Box<str>>,
}

/// How the layers of a record follow from those of its parents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shows {
    /// All of its parents', then its own.
    Added,
    /// Its own, or if it has none, those of the last parent.
    Difference,
}

/// The layer that a record adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Own {
    Nothing,
    Known(DiffId),
    Unknown,
}

/// All records at one moment: who stands on whom, who holds what, and what it costs. Records are called by their places
/// in the order of their IDs; of a pair, only the one that is shown counts.
#[derive(Debug)]
pub(crate) struct Survey {
    pub(crate) nodes: Vec<Node>,
    parents: Lists,
    kept: Lists,
    pub(crate) sizes: Sizes,
    /// How many records keep each of [`Sizes`].
    pub(crate) keepers: Vec<u32>,
    /// How many records stand on each.
    pub(crate) children: Vec<u32>,
    own: Vec<Own>,
    unreadable: Vec<CatalogueError>,
}

/// Many short lists in one.
#[derive(Debug, Default)]
struct Lists {
    starts: Vec<u32>,
    items: Vec<u32>,
}

impl Lists {
    /// From pairs of a list's number and an item of it; the same pair twice is once in the list.
    fn new(count: usize, mut pairs: Vec<(u32, u32)>, keep_order: bool) -> Self {
        if keep_order {
            pairs.sort_by_key(|(list, _)| *list);
        } else {
            pairs.sort_unstable();
        }
        pairs.dedup();
        let mut starts = Vec::with_capacity(count + 1);
        for list in 0..=short(count) {
            starts.push(short(pairs.partition_point(|(of, _)| *of < list)));
        }
        Self { starts, items: pairs.into_iter().map(|(_, item)| item).collect() }
    }

    fn get(&self, list: u32) -> &[u32] {
        let list = list as usize;
        &self.items[self.starts[list] as usize..self.starts[list + 1] as usize]
    }
}

/// What is collected of the records before it is known which of them there are.
#[derive(Default)]
struct Gathered {
    parents: Vec<(u32, RecordId)>,
    /// Mutable records, and what they were committed as.
    mutables: Vec<(u32, ActiveId, Option<RecordId>)>,
    /// Records that share a mutable one's files.
    sharers: Vec<(u32, RecordId)>,
    stacks: Vec<(SnapshotId, u32)>,
    damaged: Vec<u32>,
    own: Vec<Own>,
    own_layers: Vec<(u32, LayerId)>,
}

impl Survey {
    /// Looks at every record.
    pub(crate) fn take(inner: &Inner, rows: &impl Rows, with_layers: bool) -> Result<Self, CatalogueError> {
        let (mut nodes, mut unreadable, mut gathered) = (Vec::new(), Vec::new(), Gathered::default());
        rows.scan_each(&RECORDS, |id, row| {
            match (id, row) {
                (None, row) => unreadable.extend(row.err()),
                (Some(id), row) => {
                    let at = short(nodes.len());
                    nodes.push(gathered.take_in(at, id, row, with_layers));
                }
            }
            ControlFlow::Continue(())
        })?;
        let find = |nodes: &[Node], id: RecordId| nodes.binary_search_by_key(&id, |node| node.id).ok().map(short);

        let mut next = 0;
        rows.scan_each(&USES, |id, row| {
            if let (Some(id), Ok(row)) = (id, row) {
                next += nodes[next..].iter().take_while(|node| node.id < id).count();
                if let Some(node) = nodes.get_mut(next).filter(|node| node.id == id) {
                    node.uses = row;
                }
            }
            ControlFlow::Continue(())
        })?;
        for node in &mut nodes {
            node.uses = inner.uses.with(node.id, node.uses);
            node.held = inner.live.holders(node.id) > 0;
        }

        let mut sizes = Sizes::read(rows, with_layers)?;
        for (at, active, _) in &gathered.mutables {
            if nodes[*at as usize].held {
                sizes.ignore_upper(*active);
            }
        }
        for (at, layer) in std::mem::take(&mut gathered.own_layers) {
            gathered.own[at as usize] = sizes.diff_id(layer).map_or(Own::Unknown, Own::Known);
        }
        gathered.pair_up(&mut nodes);

        // What a damaged row does not say, its parents' links do.
        if !gathered.damaged.is_empty() {
            let damaged: HashSet<RecordId> = gathered.damaged.iter().map(|at| nodes[*at as usize].id).collect();
            rows.scan_each(&CHILDREN, |key, _| {
                if let Some((parent, child)) = key
                    && damaged.contains(&child)
                    && let Some(child) = find(&nodes, child)
                    && find(&nodes, parent).is_some()
                {
                    gathered.parents.push((child, parent));
                }
                ControlFlow::Continue(())
            })?;
        }
        let mut edges = Vec::with_capacity(gathered.parents.len());
        for (child, parent) in std::mem::take(&mut gathered.parents) {
            match find(&nodes, parent) {
                Some(parent) => edges.push((shown(&nodes, child), shown(&nodes, parent))),
                None => nodes[child as usize].note(|| format!("record {parent}, which it stands on, is gone")),
            }
        }
        edges.retain(|(child, parent)| child != parent);
        let parents = Lists::new(nodes.len(), edges, true);
        let mut children = vec![0; nodes.len()];
        for at in 0..short(nodes.len()) {
            // A parent that is named twice has one child in this.
            let named: HashSet<u32> = match parents.get(at) {
                [] => continue,
                [one] => {
                    children[*one as usize] += 1;
                    continue;
                }
                more => more.iter().copied().collect(),
            };
            named.into_iter().for_each(|parent| children[parent as usize] += 1);
        }

        let kept = what_is_kept(rows, &mut nodes, &sizes, &gathered.stacks)?;
        let mut keepers = vec![0; sizes.len()];
        kept.items.iter().for_each(|place| keepers[*place as usize] += 1);
        let own = if with_layers { gathered.own } else { Vec::new() };
        let mut survey = Self { nodes, parents, kept, sizes, keepers, children, own, unreadable };
        survey.mark_stale(inner);
        survey.mark_in_use();
        Ok(survey)
    }

    /// Uppers of processes that are gone: nobody trusts their files.
    fn mark_stale(&mut self, inner: &Inner) {
        let stale = inner.store.snapshots().stale_actives().unwrap_or_default();
        let places: HashSet<u32> = stale.into_iter().filter_map(|active| self.sizes.place(active.into())).collect();
        if places.is_empty() {
            return;
        }
        for at in 0..short(self.nodes.len()) {
            if self.kept.get(at).iter().any(|place| places.contains(place)) {
                self.nodes[at as usize]
                    .note(|| "the process that wrote to it is gone, and its files with it".to_owned());
            }
        }
    }

    fn mark_in_use(&mut self) {
        let mut pending: Vec<u32> = Vec::new();
        for at in 0..self.nodes.len() {
            if self.nodes[at].held {
                pending.push(shown(&self.nodes, short(at)));
            }
        }
        while let Some(at) = pending.pop() {
            if !std::mem::replace(&mut self.nodes[at as usize].in_use, true) {
                pending.extend(self.parents.get(at));
                for place in self.kept.get(at) {
                    self.sizes.in_use[*place as usize] = true;
                }
            }
        }
    }

    /// The records that one stands on.
    pub(crate) fn parents_of(&self, at: u32) -> &[u32] {
        self.parents.get(at)
    }

    /// What one keeps, as places in [`Sizes`].
    pub(crate) fn kept_by(&self, at: u32) -> &[u32] {
        self.kept.get(at)
    }

    /// Asks for every record whether somebody else keeps its layers, and marks it and all that it stands on.
    pub(crate) fn mark_shared(&mut self, checker: &dyn SharedChecker) -> Result<(), CacheError> {
        // Those that nothing stands on first: whoever has all of their layers has those below as well.
        let mut order: Vec<u32> = (0..short(self.nodes.len())).collect();
        order.sort_by_key(|at| self.children[*at as usize] > 0);
        for at in order {
            let node = &self.nodes[at as usize];
            if node.shared || node.hidden {
                continue;
            }
            let Some(layers) = self.layers_of(at).filter(|layers| !layers.is_empty()) else { continue };
            if !checker.exists(node.id, &layers).map_err(CacheError::Checker)? {
                continue;
            }
            let mut pending = vec![at];
            while let Some(at) = pending.pop() {
                if !std::mem::replace(&mut self.nodes[at as usize].shared, true) {
                    pending.extend(self.parents.get(at));
                }
            }
        }
        Ok(())
    }

    /// The diff IDs of all layers that a record shows, bottom first; `None` if one of them is not known yet.
    fn layers_of(&self, at: u32) -> Option<Vec<DiffId>> {
        enum Step {
            Whole(u32),
            Own(DiffId),
        }
        let (mut layers, mut pending, mut steps) = (Vec::new(), vec![Step::Whole(at)], 0);
        while let Some(step) = pending.pop() {
            steps += 1;
            if steps > CHAIN_STEPS_MAX {
                return None;
            }
            let at = match step {
                Step::Own(diff_id) => {
                    layers.push(diff_id);
                    continue;
                }
                Step::Whole(at) => at,
            };
            let (node, parents) = (&self.nodes[at as usize], self.parents.get(at));
            match (node.shows, self.own[at as usize]) {
                (_, Own::Unknown) => return None,
                (Shows::Difference, Own::Known(diff_id)) => layers.push(diff_id),
                (Shows::Difference, Own::Nothing) => pending.extend(parents.last().map(|upper| Step::Whole(*upper))),
                (Shows::Added, own) => {
                    if let Own::Known(diff_id) = own {
                        pending.push(Step::Own(diff_id));
                    }
                    pending.extend(parents.iter().rev().map(|parent| Step::Whole(*parent)));
                }
            }
        }
        Some(layers)
    }

    /// Calls `visit` for every record that is shown and still there, with its row.
    pub(crate) fn scan(
        &self,
        rows: &impl Rows,
        mut visit: impl FnMut(u32, Option<&RecordRow>),
    ) -> Result<(), CatalogueError> {
        let mut next = 0;
        rows.scan_each(&RECORDS, |id, row| {
            if let Some(id) = id {
                next += self.nodes[next..].iter().take_while(|node| node.id < id).count();
                if self.nodes.get(next).is_some_and(|node| node.id == id && !node.hidden) {
                    visit(short(next), row.as_ref().ok());
                }
            }
            ControlFlow::Continue(())
        })
    }

    /// What a record costs; charged with nothing.
    pub(crate) fn usage(&self, at: u32, row: Option<&RecordRow>) -> RecordUsage {
        let node = &self.nodes[at as usize];
        let (mut size_bytes, mut unique_bytes) = (0, 0);
        for place in self.kept.get(at) {
            let bytes = self.sizes.bytes(*place);
            size_bytes += bytes;
            unique_bytes += if self.keepers[*place as usize] == 1 { bytes } else { 0 };
        }
        RecordUsage {
            id: node.id,
            mutable: node.mutable,
            in_use: node.in_use,
            size_bytes,
            unique_bytes,
            charged_bytes: 0,
            parents: row.map(|row| row.parents.ids()).unwrap_or_default(),
            created_at: node.created_at,
            description: row.map(|row| row.description.clone()).unwrap_or_default(),
            last_used_at: node.uses.last_used_at,
            usage_count: node.uses.count,
            record_type: node.record_type,
            shared: node.shared,
            pinned: node.pinned,
            took: node.took,
            error: node.fault.as_deref().map(str::to_owned),
        }
    }
}

impl Node {
    /// Notes what is wrong with it; the first thing counts.
    fn note(&mut self, what: impl FnOnce() -> String) {
        self.fault.get_or_insert_with(|| what().into());
    }
}

/// Of a pair, the one that is shown.
fn shown(nodes: &[Node], at: u32) -> u32 {
    let node = &nodes[at as usize];
    node.partner.filter(|_| node.hidden).unwrap_or(at)
}

impl Gathered {
    fn take_in(&mut self, at: u32, id: RecordId, row: Result<RecordRow, CatalogueError>, with_layers: bool) -> Node {
        let mut node = Node {
            id,
            created_at: None,
            uses: UseRow::default(),
            took: None,
            record_type: RecordType::Regular,
            mutable: false,
            pinned: false,
            held: false,
            in_use: false,
            shared: false,
            partner: None,
            hidden: false,
            shows: Shows::Added,
            fault: None,
        };
        let row = match row {
            Ok(row) => row,
            Err(error) => {
                self.damaged.push(at);
                if with_layers {
                    self.own.push(Own::Unknown);
                }
                node.note(|| error.to_string());
                return node;
            }
        };
        node.created_at = Some(row.created_at);
        node.record_type = row.record_type;
        node.took = row.took;
        node.mutable = row.is_mutable();
        node.pinned = row.pinned;
        match row.state {
            State::Mutable { active, committed_as } => self.mutables.push((at, active, committed_as)),
            State::Shared { mutable, .. } => self.sharers.push((at, mutable)),
            State::Stack(snapshot) => self.stacks.push((snapshot, at)),
            State::Sealed { .. } | State::Lazy | State::Composed => {}
        }
        match &row.parents {
            Parents::None => {}
            Parents::Layer(parent) => self.parents.push((at, *parent)),
            Parents::Merge(parents) => self.parents.extend(parents.iter().map(|parent| (at, *parent))),
            Parents::Diff { lower, upper } => {
                node.shows = Shows::Difference;
                self.parents.push((at, *lower));
                self.parents.extend(upper.map(|upper| (at, upper)));
            }
        }
        if with_layers {
            let own = match (&row.blob, &row.state) {
                (Some(blob), _) => Own::Known(blob.diff_id),
                (None, State::Sealed { layer: Some(layer) }) => {
                    self.own_layers.push((at, *layer));
                    Own::Unknown
                }
                (None, State::Sealed { layer: None }) => Own::Nothing,
                (None, State::Composed) if !matches!(row.parents, Parents::Diff { upper: None, .. }) => Own::Nothing,
                (None, _) => Own::Unknown,
            };
            self.own.push(own);
        }
        node
    }

    /// Finds the two of each pair, and says of those that lost the other one what is wrong.
    fn pair_up(&self, nodes: &mut [Node]) {
        for (sharer, mutable) in &self.sharers {
            let (at, id) = (*sharer as usize, nodes[*sharer as usize].id);
            let partner = self
                .mutables
                .binary_search_by_key(mutable, |(at, ..)| nodes[*at as usize].id)
                .ok()
                .map(|found| self.mutables[found])
                .filter(|(_, _, committed_as)| *committed_as == Some(id));
            let Some((partner, ..)) = partner else {
                nodes[at].note(|| format!("record {mutable}, whose files it shares, is gone"));
                continue;
            };
            nodes[at].partner = Some(partner);
            nodes[partner as usize].partner = Some(*sharer);
            let (hidden, shown) = if nodes[at].held { (partner as usize, at) } else { (at, partner as usize) };
            nodes[hidden].hidden = true;
            nodes[shown].pinned |= nodes[hidden].pinned;
        }
    }
}

/// What each record keeps from being collected.
///
/// A whole tree that was put together needs the layers of its record's parents too, which are theirs. What nobody keeps
/// as his own (a fix-up layer, the bottom of a deep stack) belongs to those whose tree needs it.
fn what_is_kept(
    rows: &impl Rows,
    nodes: &mut [Node],
    sizes: &Sizes,
    stacks: &[(SnapshotId, u32)],
) -> Result<Lists, CatalogueError> {
    let mut kept: Vec<(u32, u32)> = Vec::new();
    let mut trees: Vec<(SnapshotId, u32)> = Vec::new();
    let mut next = 0;
    scan_holds(rows, |owner, held| {
        let id = owner.as_str().strip_prefix("record:").and_then(RecordId::parse);
        let Some(id) = id else { return ControlFlow::Continue(()) };
        // Owners are in the order of their records.
        next += nodes[next..].iter().take_while(|node| node.id < id).count();
        let Some(node) = nodes.get_mut(next).filter(|node| node.id == id) else { return ControlFlow::Continue(()) };
        match (held, sizes.place(held)) {
            (Resource::Snapshot(snapshot), _) => trees.push((snapshot, short(next))),
            (_, Some(place)) => kept.push((shown(nodes, short(next)), place)),
            (_, None) => node.note(|| format!("{held}, which it needs, is gone")),
        }
        ControlFlow::Continue(())
    })?;
    if !trees.is_empty() {
        trees.sort_unstable();
        let mut is_own = vec![false; sizes.len()];
        kept.iter().for_each(|(_, place)| is_own[*place as usize] = true);
        // Layers that a tree needs, by tree.
        let mut needed: Vec<(u32, u32)> = Vec::new();
        scan_edges(rows, |from, to| {
            let (Resource::Snapshot(snapshot), Some(place)) = (from, sizes.place(to)) else {
                return ControlFlow::Continue(());
            };
            let first = trees.partition_point(|(tree, _)| *tree < snapshot);
            let keepers = trees[first..].iter().take_while(|(tree, _)| *tree == snapshot);
            for (_, at) in keepers {
                if is_own_stack(stacks, snapshot, *at) {
                    kept.push((*at, place));
                } else {
                    needed.push((*at, place));
                }
            }
            ControlFlow::Continue(())
        })?;
        kept.extend(needed.into_iter().filter(|(_, place)| !is_own[*place as usize]));
    }
    Ok(Lists::new(nodes.len(), kept, false))
}

/// Whether this snapshot is all that a record of an older Plies has; `stacks` are few, and in the order of the records.
fn is_own_stack(stacks: &[(SnapshotId, u32)], snapshot: SnapshotId, at: u32) -> bool {
    stacks.binary_search_by_key(&at, |(_, at)| *at).is_ok_and(|found| stacks[found].0 == snapshot)
}
