//! Trees out of records: extract, merge, diff.
//!
//! A record's tree is the stack of the layers that a walk of its parents finds. A merge is that walk and nothing else; a
//! diff is the part of a walk that the lower record does not have, or, of trees that have nothing to do with each other,
//! a layer of its own that is computed when somebody looks.

use std::io;
use std::panic::Location;
use std::sync::Arc;

use plies_oci::{ChainId, Compression, MediaClass, MediaType, classify};
use plies_store::progress::Silent;
use plies_store::{
    Cancel, Canceled, CatalogueError, LayerId, LayerSource, LeaseOptions, Origin, Rows as _, SnapshotError, SnapshotId,
    Transfer, Tx, parallel,
};

use crate::lazy::Providers;
use crate::manager::{Accessor, Inner, RecordOptions};
use crate::record::{self, COMPOSITIONS, IdRow, Parents, RecordRow, State};
use crate::{CacheError, Holder, ImmutableRef, RecordId};

/// Blobs that are fetched at once: enough to keep a network busy, few enough not to be refused.
const FETCHES_MAX: usize = 4;

impl Accessor {
    /// A record that shows the trees of all `inputs`, later ones over earlier ones. Copies and links nothing: it is the
    /// list of their layers. `None` stands for the empty tree, as a result as well. A merge among the inputs counts as
    /// its own inputs; of a record that is named twice, the uppermost counts; of one record alone, that very record is
    /// the merge. The same merge is found again.
    ///
    /// # Errors
    /// Those of finalizing the inputs.
    #[track_caller]
    pub fn merge(
        &self,
        inputs: &[Option<&ImmutableRef>],
        options: &RecordOptions,
    ) -> Result<Option<ImmutableRef>, CacheError> {
        let holder = Holder::of(options, Location::caller());
        let inputs: Vec<&ImmutableRef> = inputs.iter().flatten().copied().collect();
        let mut providers = Providers::none();
        let mut parents: Vec<RecordId> = Vec::new();
        for input in &inputs {
            providers = providers.and(input.providers());
            match self.inner.must_have(input.id())?.parents {
                Parents::Merge(flat) => parents.extend(flat),
                _ => parents.push(input.id()),
            }
        }
        let parents = uppermost(parents);
        match parents.as_slice() {
            [] => Ok(None),
            [one] => {
                let options =
                    RecordOptions { holder: options.holder.clone(), keep_last_used: true, ..Default::default() };
                let options = RecordOptions { providers: providers.clone(), ..options };
                Ok(Some(self.inner.get(*one, &options, holder)?.with_providers(providers)))
            }
            _ => self.inner.compose(Parents::Merge(parents), options, &providers, holder).map(Some),
        }
    }

    /// A record that leads from `lower` to `upper`: laid over `lower`, it shows `upper`. Where `upper` stands on
    /// `lower` it is the layers in between, which are there already. Without `upper`, it takes everything away.
    ///
    /// # Errors
    /// [`CacheError::NoLower`]; those of finalizing.
    #[track_caller]
    pub fn diff(
        &self,
        lower: Option<&ImmutableRef>,
        upper: Option<&ImmutableRef>,
        options: &RecordOptions,
    ) -> Result<ImmutableRef, CacheError> {
        let holder = Holder::of(options, Location::caller());
        let lower = lower.ok_or(CacheError::NoLower)?;
        let mut providers = lower.providers().clone();
        if let Some(upper) = upper {
            providers = providers.and(upper.providers());
            let (below, all) = (self.inner.walk(lower.id())?, self.inner.walk(upper.id())?);
            let ids = |walk: &[(RecordId, RecordRow)]| walk.iter().map(|(id, _)| *id).collect::<Vec<_>>();
            let stands_on = ids(&all).starts_with(&ids(&below)) && all.len() > below.len();
            // One layer right on the other is a diff that needs no computing either, see `record::walk`.
            let right_on =
                |(id, row): &(RecordId, RecordRow)| *id == upper.id() && record::is_single_layer(row, lower.id());
            if stands_on && !all.last().is_some_and(right_on) {
                return self.layers_between(&all[below.len()..], upper, &holder);
            }
        }
        let parents = Parents::Diff { lower: lower.id(), upper: upper.map(ImmutableRef::id) };
        self.inner.compose(parents, options, &providers, holder)
    }

    /// The merge of one diff for each of these layers; of one alone, that.
    fn layers_between(
        &self,
        layers: &[(RecordId, RecordRow)],
        upper: &ImmutableRef,
        holder: &Holder,
    ) -> Result<ImmutableRef, CacheError> {
        let providers = upper.providers();
        let mut singles = Vec::new();
        for (id, row) in layers {
            let single = match row.parents {
                Parents::Layer(below) => {
                    let description =
                        Some(format!("diff {below:?} -> {id:?}", below = below.to_string(), id = id.to_string()));
                    let options = RecordOptions { description, keep_last_used: true, ..Default::default() };
                    let parents = Parents::Diff { lower: below, upper: Some(*id) };
                    self.inner.compose(parents, &options, providers, holder.clone())?
                }
                _ => {
                    let options =
                        RecordOptions { keep_last_used: true, providers: providers.clone(), ..Default::default() };
                    self.inner.get(*id, &options, holder.clone())?
                }
            };
            singles.push(single);
        }
        let parents = uppermost(singles.iter().map(ImmutableRef::id).collect());
        match (parents.as_slice(), singles.pop()) {
            ([_], Some(single)) => Ok(single),
            _ => self.inner.compose(Parents::Merge(parents), &RecordOptions::default(), providers, holder.clone()),
        }
    }
}

impl Inner {
    /// The walk of a record; see [`record::walk`].
    pub(crate) fn walk(&self, id: RecordId) -> Result<Vec<(RecordId, RecordRow)>, CacheError> {
        match self.read_of(id, |rows| record::walk(rows, id))? {
            Ok(walk) => Ok(walk),
            Err(missing) if missing == id => Err(CacheError::no_record(id)),
            Err(missing) => Err(CacheError::gone_below(id, missing)),
        }
    }

    /// Finds or makes the merge or diff of `parents`, which the caller holds.
    fn compose(
        self: &Arc<Self>,
        parents: Parents,
        options: &RecordOptions,
        providers: &Providers,
        holder: Holder,
    ) -> Result<ImmutableRef, CacheError> {
        for parent in parents.ids() {
            self.finalize(parent)?;
        }
        let composition = parents.composition().expect("because only merges and diffs are composed");
        let fresh = Self::fresh_id()?;
        let fresh_ticket = self.live.hold_again(fresh, &holder);
        let mut won = None;
        let written = self.store.write(|tx: &mut Tx<'_>| {
            if let Some((id, ticket)) = won.take() {
                self.live.let_go(id, ticket, false);
            }
            if let Some(IdRow(id)) = tx.get(&COMPOSITIONS, &composition)?
                && tx.contains(&record::RECORDS, &id)?
                && let Ok((ticket, _)) = self.live.hold(id, &holder)
            {
                won = Some((id, ticket));
                record::change(tx, id, |row| row.add_image_refs(&options.image_refs))?;
                return Ok(());
            }
            let mut row = RecordRow::new(State::Composed, parents.clone(), tx.now());
            options.apply(&mut row);
            record::replace(tx, fresh, None, Some(&row))
        });
        let (id, ticket) = self.settle(written, won, (fresh, fresh_ticket))?;
        let mut made =
            ImmutableRef::new(self, id, ticket, options, holder).with_providers(providers.and(&options.providers));
        made.is_loaded();
        Ok(made)
    }

    /// The snapshot of a record's whole tree; makes what is missing of it.
    pub(crate) fn extract(
        self: &Arc<Self>,
        id: RecordId,
        providers: &Providers,
        cancel: &Cancel,
    ) -> Result<Option<SnapshotId>, CacheError> {
        if let Some(snapshot) = self.must_have(id)?.snapshot {
            return Ok(Some(snapshot));
        }
        self.finalize(id)?;
        self.fetch(&self.walk(id)?, providers, cancel)?;
        let _one = self.composing.take([id], cancel)?;
        let lease = self.store.lease(LeaseOptions::process("extract"))?;
        let transfer = Transfer { lease: &lease, limits: &self.limits, progress: &Silent, cancel };
        let walk = self.walk(id)?;
        // The layers, and which record of the walk each came from.
        let mut layers: Vec<LayerId> = Vec::new();
        let mut from: Vec<usize> = Vec::new();
        for (place, (at, row)) in walk.iter().enumerate() {
            match &row.state {
                State::Sealed { layer } => layers.extend(layer),
                State::Stack(snapshot) => layers.extend(self.store.snapshots().info(*snapshot)?.layers),
                State::Lazy => layers.push(self.unpack_over(*at, row, &layers, providers, &transfer)?),
                State::Composed => {
                    // Several merges may show the same diff: it is computed for all of them.
                    let _one = (*at != id).then(|| self.composing.take([*at], cancel)).transpose()?;
                    match &self.must_have(*at)?.state {
                        State::Sealed { layer } => layers.extend(layer),
                        _ => layers.extend(self.compute(*at, row, providers, &transfer)?),
                    }
                }
                State::Mutable { .. } | State::Shared { .. } => {
                    let what = format!("record {at}, which it stands on, is not finalized");
                    return Err(CacheError::Damaged { id, what });
                }
            }
            from.resize(layers.len(), place);
        }
        let snapshot = loop {
            if layers.is_empty() {
                break None;
            }
            match self.store.snapshots().ensure(&layers, &lease) {
                Ok(snapshot) => break Some(snapshot),
                // It was unpacked by itself and turns out to need what lies below: again, over that.
                Err(SnapshotError::NeedsBase { layer, path }) => {
                    let at = layers.iter().position(|have| *have == layer);
                    let again = match at.map(|at| (at, &walk[from[at]])) {
                        Some((at, (of, row))) if self.stands_alone(*of, &walk[..=from[at]])? => Some((at, of, row)),
                        _ => None,
                    };
                    let Some((at, of, row)) = again else {
                        return Err(SnapshotError::NeedsBase { layer, path }.into());
                    };
                    let new = self.unpack_over(*of, row, &layers[..at], providers, &transfer)?;
                    if new == layer {
                        return Err(SnapshotError::NeedsBase { layer, path }.into());
                    }
                    layers[at] = new;
                }
                Err(other) => return Err(other.into()),
            }
        };
        if snapshot.is_some() {
            // It can be made again: no need to wait for a sync.
            self.store.write_lazily(|tx| record::change(tx, id, |row| row.snapshot = snapshot))?;
        }
        lease.release()?;
        Ok(snapshot)
    }

    /// Whether `walk` is all that a record with a blob of its own shows: then its chain says what lies below it.
    fn stands_alone(&self, id: RecordId, walk: &[(RecordId, RecordRow)]) -> Result<bool, CacheError> {
        let has_blob = walk.last().is_some_and(|(_, row)| row.chain_id.is_some() && row.blob.is_some());
        let ids = |walk: &[(RecordId, RecordRow)]| walk.iter().map(|(id, _)| *id).collect::<Vec<_>>();
        Ok(has_blob && ids(&self.walk(id)?) == ids(walk))
    }

    /// Fetches and unpacks the lazy layers of a walk, several at once, each by itself: what needs the layers below it is
    /// left to [`Inner::unpack_over`].
    fn fetch(
        self: &Arc<Self>,
        walk: &[(RecordId, RecordRow)],
        providers: &Providers,
        cancel: &Cancel,
    ) -> Result<(), CacheError> {
        let lazy: Vec<&(RecordId, RecordRow)> = walk.iter().filter(|(_, row)| row.state == State::Lazy).collect();
        let fetch = |lazy: &&(RecordId, RecordRow)| self.fetch_one(lazy.0, &lazy.1, providers, cancel);
        parallel(&lazy, FETCHES_MAX, |_| 1, fetch).map(drop)
    }

    fn fetch_one(
        self: &Arc<Self>,
        id: RecordId,
        row: &RecordRow,
        providers: &Providers,
        cancel: &Cancel,
    ) -> Result<(), CacheError> {
        let Some(digest) = row.blob.as_ref().and_then(|blob| blob.digest) else {
            return Err(CacheError::Damaged { id, what: "it has neither a layer nor a blob".to_owned() });
        };
        let (inner, of, row, providers) = (Arc::clone(self), id, row.clone(), providers.clone());
        self.flights.join(digest, cancel, move |cancel| inner.unpack_alone(of, &row, &providers, cancel))
    }

    fn unpack_alone(
        &self,
        id: RecordId,
        row: &RecordRow,
        providers: &Providers,
        cancel: &Cancel,
    ) -> Result<(), CacheError> {
        let lease = self.store.lease(LeaseOptions::process("unlazy"))?;
        let source = self.source(id, row, providers)?;
        // The same layer may have come meanwhile, by another blob or for another record: nothing to fetch then.
        let layers = self.store.layers();
        if let Some(layer) = layers.hold_verified_by_diff_id(source.diff_id, &lease)?
            && layers.root(layer).is_ok()
        {
            self.store.write(|tx| {
                record::change(tx, id, |row| {
                    if row.state == State::Lazy {
                        row.state = State::Sealed { layer: Some(layer) };
                    }
                })?;
                // It may have come with the layer.
                hold_blob(tx, id)
            })?;
            return Ok(lease.release()?);
        }
        let transfer = Transfer { lease: &lease, limits: &self.limits, progress: &Silent, cancel };
        let (_, layers) = transfer.take_apart(&[source])?;
        self.store.write(|tx| {
            record::change(tx, id, |row| {
                if let (State::Lazy, Some(Some(layer))) = (&row.state, layers.first()) {
                    row.state = State::Sealed { layer: Some(*layer) };
                }
            })?;
            // The blob is here now, and the record keeps it.
            hold_blob(tx, id)
        })?;
        Ok(lease.release()?)
    }

    /// Unpacks a layer over those below it, from its blob, which is here by now (unless it came for another record, and
    /// went with that). Also finds the layer that somebody else unpacked from the same blob meanwhile.
    fn unpack_over(
        &self,
        id: RecordId,
        row: &RecordRow,
        below: &[LayerId],
        providers: &Providers,
        transfer: &Transfer<'_>,
    ) -> Result<LayerId, CacheError> {
        let source = self.source(id, row, providers)?;
        let taken = transfer.take_layers(&[source], below)?;
        let layer = *taken.layers.first().expect("because one source makes one layer");
        self.store.write(|tx| {
            record::change(tx, id, |row| row.state = State::Sealed { layer: Some(layer) })?;
            hold_blob(tx, id)
        })?;
        Ok(layer)
    }

    /// A record's blob, as somebody offers it.
    pub(crate) fn source(
        &self,
        id: RecordId,
        row: &RecordRow,
        providers: &Providers,
    ) -> Result<LayerSource<'static>, CacheError> {
        let damaged = |what: &str| CacheError::Damaged { id, what: what.to_owned() };
        let blob = row.blob.clone().ok_or_else(|| damaged("it has neither a layer nor a blob"))?;
        let digest = blob.digest.ok_or_else(|| damaged("it has neither a layer nor a blob"))?;
        let media_type = MediaType::from(blob.media_type.as_str());
        let Some(MediaClass::Layer(compression)) = classify(&media_type) else {
            return Err(damaged("its blob is no layer"));
        };
        let chain_id = row.chain_id.unwrap_or_else(|| ChainId::extend(None, blob.diff_id));
        let provider = providers.get(digest).cloned();
        let (diff_id, size_bytes) = (blob.diff_id, blob.size_bytes);
        let open = Box::new(move |_| match &provider {
            Some(provider) => provider.open(&blob),
            None => Err(io::Error::new(io::ErrorKind::NotFound, "nobody was named who could fetch it")),
        });
        let (digest, origin) = (Some(digest), Origin::Near);
        Ok(LayerSource { digest, size_bytes, compression, diff_id, chain_id, origin, open })
    }

    /// Computes a diff of two trees that do not stand on each other.
    fn compute(
        self: &Arc<Self>,
        id: RecordId,
        row: &RecordRow,
        providers: &Providers,
        transfer: &Transfer<'_>,
    ) -> Result<Option<LayerId>, CacheError> {
        let Parents::Diff { lower, upper } = row.parents else {
            return Err(CacheError::Damaged { id, what: "it has no files and is no merge".to_owned() });
        };
        let stack = |id| match self.extract(id, providers, transfer.cancel)? {
            Some(snapshot) => Ok::<_, CacheError>(self.store.snapshots().info(snapshot)?.layers),
            None => Ok(Vec::new()),
        };
        let lower = stack(lower)?;
        let upper = upper.map_or(Ok(Vec::new()), stack)?;
        if transfer.cancel.is_canceled() {
            return Err(Canceled.into());
        }
        // Nothing leads from a tree to itself.
        let layer = if lower == upper { None } else { transfer.difference(&lower, &upper)? };
        self.store.write(|tx| record::change(tx, id, |row| row.state = State::Sealed { layer }))?;
        Ok(layer)
    }
}

/// Of what is named twice, the uppermost: below that it shows nothing that it does not show there.
fn uppermost(mut records: Vec<RecordId>) -> Vec<RecordId> {
    let mut seen = std::collections::HashSet::new();
    records.reverse();
    records.retain(|record| seen.insert(*record));
    records.reverse();
    records
}

/// Has a record hold its blob, if that is here.
pub(crate) fn hold_blob(tx: &mut Tx<'_>, id: RecordId) -> Result<(), CatalogueError> {
    let digest = record::get(tx, id)?.and_then(|row| row.blob).and_then(|blob| blob.digest);
    match digest.map(|digest| tx.hold(&record::owner(id), digest)) {
        None | Some(Ok(()) | Err(CatalogueError::NoSuchResource { .. })) => Ok(()),
        Some(Err(error)) => Err(error),
    }
}

/// The media type of a layer's blob.
pub(crate) fn media_type(compression: Compression) -> MediaType {
    match compression {
        Compression::None => MediaType::ImageLayer,
        Compression::Gzip => MediaType::ImageLayerGzip,
        Compression::Zstd => MediaType::ImageLayerZstd,
    }
}
