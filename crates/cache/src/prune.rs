//! Prune: what goes, in which order, and why.
//!
//! Several sets of options are applied one after the other. Of each, a record goes if nothing keeps it: a ref, a record
//! that stands on it and stays, a pin, its type, a filter, a recent use. With a cap, records go until they cost less
//! than the cap; the order is a score.
//!
//! **Score**: three ranks, each as a part of the highest, added up; the lowest goes first. They are those of the last use
//! (never comes first), of the number of uses, and of the price: how long it takes to make again what goes, by byte.
//! Equal values share a rank, and prices are taken by powers of two; ranks begin at 1. They are taken over all that may go,
//! also what becomes free to go only when its children have gone, and are not taken anew in between. Ties: the older use,
//! then the older record, then the ID.
//!
//! **Price**: what a record stands on goes when the last that stands on it has gone. So bytes and time of a parent that
//! would then go are divided among its children, down to those that nothing stands on: however young one is, it is
//! charged with the old things that it keeps. Bytes that several records keep are divided among them. What frees
//! nothing has the highest price.
//!
//! **Cost**: records are looked at once and sorted once; a parent joins the others when its last child goes. So n records
//! take O(n log n), and one short transaction for each [`BATCH`] of them.
//!
//! **Crashes**: rows go in transactions, each of which leaves all of a record or nothing. Bytes go only after that, by
//! the store's collection, which finishes at the next open what a crash cut short. So there is no mark for "about to be
//! removed" on disk. In memory a record is condemned before its row goes: from then on, to everybody else it is not
//! there.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::time::Duration;

use plies_store::{Cancel, Canceled, CatalogueError, GcMode, GcReport, Rows as _, Stamp, Tx};

use crate::filter::Filters;
use crate::manager::{Controller, Inner, partner_of};
use crate::record::{self, RECORDS, RecordRow, RecordType, USES, UseRow};
use crate::usage::{RecordUsage, Survey};
use crate::{CacheError, RecordId};

/// Records that go in one transaction. More would share a sync, but hold the gate of the store, which all writers pass,
/// for longer than the 5 ms that they should have to wait.
const BATCH: usize = 32;

/// Records that are chosen before any of them goes. So many are spread over the catalogue thinly enough for neighbours
/// to be among them, and few enough for a prune that is cut short to have removed what scores low.
const WINDOW: usize = 8192;

/// Up to so many records go one by one in the order of their score. Of more, those go together whose rows lie together:
/// every page of the catalogue that a transaction touches is written anew, and 128 records that lie anywhere in
/// 100,000 touch seven pages each.
const ONE_BY_ONE: usize = 512;

/// Records that are gone before the caller is told of them: they share a sync. At 100 µs each that is every 13 ms.
const TOLD_AT_ONCE: usize = 4 * BATCH;

/// Says which records an image store keeps as well: those are shared, and removing them frees nothing.
pub trait SharedChecker: Send + Sync {
    /// Whether a record with these layers (diff IDs, bottom first) is somebody else's too. Not asked about records
    /// whose layers are not all known.
    ///
    /// # Errors
    /// The checker's own.
    fn exists(
        &self,
        id: crate::RecordId,
        layers: &[plies_oci::DiffId],
    ) -> Result<bool, Box<dyn std::error::Error + Send + Sync>>;
}

/// How long it takes to get a byte again that nobody saw being made: from a registry, over a line of 100 Mbit/s and
/// unpacked to four times its size, 50 MB/s.
const NANOS_PER_BYTE: f64 = 20.0;

/// One rule of what goes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PruneOptions {
    /// Also internal records, frontends, and what an image store has as well.
    pub all: bool,
    /// Only records that match one of these ([`Filters`]).
    pub filters: Vec<String>,
    /// Only records that were not used for so long; zero: all. One that was never used may go.
    pub keep_duration: Duration,
    /// Stop before less than this is left, whatever the other two say; 0: no such limit. (`keep_storage`, by its old
    /// name.)
    pub reserved_space_bytes: u64,
    /// Remove only what is over this; 0: no such limit.
    pub max_used_space_bytes: u64,
    /// Remove only as much as is needed to have so much free on the file system; 0: no such limit.
    pub min_free_space_bytes: u64,
}

impl PruneOptions {
    /// BuildKit's default policy for a file system of this size, as it is meant: what is made again easily goes when it
    /// is over 512 MB and was not used for two days; what was not used for 60 days; then whatever keeps the cache over
    /// its caps; then the same for what the other rules spare. The caps: a tenth of the disk or 10 GB is the cache's
    /// own, a fifth of the disk stays free, and it takes no more than four fifths or 100 GB.
    pub fn default_policy(disk_bytes: u64) -> Vec<Self> {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        const GB: u64 = 1_000_000_000;
        let part = |percent: u64| disk_bytes / 100 * percent;
        let capped = Self {
            reserved_space_bytes: part(10).min(10 * GB),
            max_used_space_bytes: part(80).min(100 * GB),
            min_free_space_bytes: part(20),
            ..Self::default()
        };
        // BuildKit writes the three types into one string, which asks for a record of three types at once.
        let easy = ["type==source.local", "type==exec.cachemount", "type==source.git.checkout"];
        vec![
            Self {
                filters: easy.map(str::to_owned).to_vec(),
                keep_duration: 2 * DAY,
                max_used_space_bytes: 512_000_000,
                ..Self::default()
            },
            Self { keep_duration: 60 * DAY, ..capped.clone() },
            capped.clone(),
            Self { all: true, ..capped },
        ]
    }

    /// Whether its filters can be read: nothing is touched by rules that cannot.
    ///
    /// # Errors
    /// [`CacheError::Filter`].
    pub fn check(&self) -> Result<(), CacheError> {
        Filters::parse("prune", &self.filters).map(drop)
    }

    /// Whether the rule is about space, and not only about what is old.
    pub fn has_cap(&self) -> bool {
        self.reserved_space_bytes != 0 || self.max_used_space_bytes != 0 || self.min_free_space_bytes != 0
    }
}

/// How far a prune may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cap {
    /// All that matches goes.
    Off,
    /// There is space enough: nothing goes.
    Everything,
    /// Records go until they cost less than this.
    Bytes(u64),
}

/// BuildKit's arithmetic: as much as may be used, less what is missing to the free space that is asked for, but never
/// less than what is reserved. If that comes out as 0, the cap is off.
pub fn effective_keep(options: &PruneOptions, used_bytes: u64, free_bytes: u64) -> Cap {
    if !options.has_cap() {
        return Cap::Off;
    }
    let max = options.max_used_space_bytes;
    let missing = options.min_free_space_bytes.saturating_sub(free_bytes);
    let keep = match (max, missing) {
        // The free space alone was asked for, and it is there.
        (0, 0) if options.min_free_space_bytes != 0 => return Cap::Everything,
        (max, 0) => max,
        (0, missing) => used_bytes.saturating_sub(missing),
        (max, missing) => max.min(used_bytes.saturating_sub(missing)),
    };
    match keep.max(options.reserved_space_bytes) {
        0 => Cap::Off,
        bytes => Cap::Bytes(bytes),
    }
}

/// Why a record stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Somebody has a ref to it.
    Held,
    /// A record that stands on it stays.
    HasChildren,
    /// It is pinned.
    Pinned,
    /// It is internal or a frontend, and not all were asked for.
    Internal,
    /// An image store has it as well, and not all were asked for.
    Shared,
    /// No filter matches.
    NotMatched,
    /// It was used recently enough.
    UsedRecently,
    /// The cap is kept without it.
    UnderCap,
    /// It was used while this ran.
    UsedMeanwhile,
    /// It could not be removed.
    Failed,
}

/// What becomes of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fate {
    /// It goes.
    Goes {
        /// By which of the sets of options.
        rule: usize,
    },
    /// It stays, for what the last of them says.
    Stays(Reason),
}

/// A record that went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrunedRecord {
    /// What it was and what it cost.
    pub usage: RecordUsage,
    /// By which of the sets of options it went.
    pub rule: usize,
    /// What no record keeps any more, now that it is gone.
    pub freed_bytes: u64,
}

/// A record, and what would become of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Judged {
    /// What it is and what it costs.
    pub usage: RecordUsage,
    /// What becomes of it.
    pub fate: Fate,
    /// What no record would keep any more; 0 if it stays.
    pub freed_bytes: u64,
    /// By which it waits for its turn, the lowest first; `None` if the last rule spares it for another reason than the
    /// cap.
    pub score: Option<f64>,
}

/// What a prune did, or would do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PruneReport {
    /// Records that went.
    pub removed_count: u64,
    /// Records that stayed.
    pub kept_count: u64,
    /// What no record keeps any more. The collection says what that freed: an image may need some of it.
    pub freed_bytes: u64,
    /// What all records cost before, each byte counted once.
    pub before_bytes: u64,
    /// What caps are about, as it is now: each byte once that a record keeps which no image store has.
    pub used_bytes: u64,
    /// Of that, what belongs to records that somebody uses, or that such a record stands on.
    pub in_use_bytes: u64,
    /// What was collected afterwards; `None` of a dry run.
    pub collected: Option<GcReport>,
}

impl Controller {
    /// Removes records by several rules, one after the other, and then the bytes that nothing needs any more. Only one
    /// prune runs at a time. `on_removed` is told of each record once it is gone for good; it must not prune.
    ///
    /// # Errors
    /// [`CacheError::Filter`] before anything is touched; [`CacheError::Checker`]; [`CacheError::Canceled`], between two
    /// batches; [`CacheError::Catalogue`]: a record that cannot be removed stays, and the others of its rule go.
    /// [`CacheError::Collect`]: the records are gone. What was done until an error stays done.
    pub fn prune(
        &self,
        rules: &[PruneOptions],
        on_removed: &mut dyn FnMut(&PrunedRecord),
        cancel: &Cancel,
    ) -> Result<PruneReport, CacheError> {
        let inner = &*self.inner;
        let mut report = inner.one_prune(|| {
            let mut run = Run::begin(inner, rules, cancel)?;
            let mut gone = Vec::with_capacity(TOLD_AT_ONCE);
            let mut tell = |gone: &mut Vec<PrunedRecord>| {
                inner.store.sync()?;
                gone.drain(..).for_each(|record| on_removed(&record));
                Ok::<_, CacheError>(())
            };
            let applied = (0..rules.len()).try_for_each(|rule| {
                run.apply(rule, &mut |batch| {
                    run_batch(inner, batch, &mut gone)?;
                    if gone.len() < TOLD_AT_ONCE { Ok(()) } else { tell(&mut gone) }
                })
            });
            tell(&mut gone)?;
            applied.map(|()| run.report())
        })?;
        report.collected = Some(inner.store.gc(GcMode::Run)?);
        Ok(report)
    }

    /// What [`Controller::prune`] would do now: every record with its fate, those that go first, in their order.
    /// Touches nothing.
    ///
    /// # Errors
    /// As [`Controller::prune`].
    pub fn prune_dry_run(
        &self,
        rules: &[PruneOptions],
        on_judged: &mut dyn FnMut(&Judged),
        cancel: &Cancel,
    ) -> Result<PruneReport, CacheError> {
        let inner = &*self.inner;
        inner.one_prune(|| {
            let mut run = Run::begin(inner, rules, cancel)?;
            for rule in 0..rules.len() {
                run.apply(rule, &mut |batch| {
                    inner.read(|rows| {
                        for chosen in &mut *batch.chosen {
                            let row = record::get(rows, batch.survey.nodes[chosen.at as usize].id).ok().flatten();
                            let usage = batch.survey.usage(chosen.at, row.as_ref());
                            let fate = Fate::Goes { rule };
                            let (freed_bytes, score) = (chosen.freed_bytes, Some(chosen.score));
                            on_judged(&Judged { usage, fate, freed_bytes, score });
                            chosen.outcome = Outcome::Gone;
                        }
                        Ok(())
                    })
                })?;
            }
            inner.read(|rows| {
                run.survey.scan(rows, |at, row| {
                    if let Some(reason) = run.reason(at) {
                        let usage = run.survey.usage(at, row);
                        let score = run.scores.get(at as usize).filter(|_| reason == Reason::UnderCap);
                        let score = score.map(|bits| f64::from_bits(*bits));
                        on_judged(&Judged { usage, fate: Fate::Stays(reason), freed_bytes: 0, score });
                    }
                })
            })?;
            Ok(run.report())
        })
    }
}

/// What the rules say of a record by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    MayGo,
    Gone,
    Stays(Reason),
}

/// A record that was chosen to go.
struct Chosen {
    at: u32,
    freed_bytes: u64,
    score: f64,
    outcome: Outcome,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Pending,
    Gone,
    Stays(Reason),
}

/// Records that go together.
struct Batch<'a> {
    survey: &'a Survey,
    rule: usize,
    chosen: &'a mut [Chosen],
    /// The first error of a record that stays for it.
    failed: Option<CacheError>,
}

/// The order in which records go: the lowest first.
type Place = Reverse<(u64, Option<Stamp>, Option<Stamp>, u32)>;

struct Run<'a> {
    rules: &'a [PruneOptions],
    cancel: &'a Cancel,
    survey: Survey,
    now: Stamp,
    /// By rule, then by record: whether a filter matches. Empty for rules without filters.
    matched: Vec<Vec<bool>>,
    verdicts: Vec<Verdict>,
    /// By the latest rule, as bits that sort as they do. Empty until one needed them.
    scores: Vec<u64>,
    /// How many records stand on each, of those that are still there.
    children: Vec<u32>,
    /// How many records keep each thing, of those that are still there; and how many of them no image store has.
    keepers: Vec<u32>,
    own_keepers: Vec<u32>,
    before_bytes: u64,
    /// What the cap is about: each byte once that a record keeps which no image store has.
    used_bytes: u64,
    freed_bytes: u64,
    free_bytes: u64,
    removed_count: u64,
}

impl<'a> Run<'a> {
    fn begin(inner: &Inner, rules: &'a [PruneOptions], cancel: &'a Cancel) -> Result<Self, CacheError> {
        let filters = rules.iter().map(|rule| Filters::parse("prune", &rule.filters)).collect::<Result<Vec<_>, _>>()?;
        if cancel.is_canceled() {
            return Err(Canceled.into());
        }
        let has_cap = rules.iter().any(PruneOptions::has_cap);
        if has_cap || filters.iter().any(|filters| !filters.is_empty()) {
            inner.measure_uppers()?;
        }
        let free_bytes = match rules.iter().any(|rule| rule.min_free_space_bytes != 0) {
            true => free_space(inner)?,
            false => 0,
        };
        let asks = has_cap || rules.iter().zip(&filters).any(|(rule, filters)| !rule.all || !filters.is_empty());
        let checker = inner.checker.as_deref().filter(|_| asks);
        let now = inner.store.now();
        let (survey, matched) = inner.store.read(|rows| {
            let mut survey = Survey::take(inner, rows, checker.is_some())?;
            if let Some(checker) = checker {
                survey.mark_shared(checker)?;
            }
            let mut matched: Vec<Vec<bool>> = filters
                .iter()
                .map(|filters| if filters.is_empty() { Vec::new() } else { vec![false; survey.nodes.len()] })
                .collect();
            if matched.iter().any(|matched| !matched.is_empty()) {
                survey.scan(rows, |at, row| {
                    let usage = survey.usage(at, row);
                    for (filters, matched) in filters.iter().zip(&mut matched) {
                        if let Some(matched) = matched.get_mut(at as usize) {
                            *matched = filters.matches(&usage, now);
                        }
                    }
                })?;
            }
            Ok::<_, CacheError>((survey, matched))
        })?;
        let mut run = Self {
            rules,
            cancel,
            now,
            matched,
            verdicts: vec![Verdict::MayGo; survey.nodes.len()],
            scores: Vec::new(),
            children: survey.children.clone(),
            keepers: survey.keepers.clone(),
            own_keepers: vec![0; survey.sizes.len()],
            before_bytes: 0,
            used_bytes: 0,
            freed_bytes: 0,
            free_bytes,
            removed_count: 0,
            survey,
        };
        for at in run.places() {
            if !run.survey.nodes[at as usize].shared {
                run.survey.kept_by(at).iter().for_each(|place| run.own_keepers[*place as usize] += 1);
            }
        }
        let bytes_of = |keepers: &[u32]| -> u64 {
            let kept = keepers.iter().enumerate().filter(|(_, count)| **count > 0);
            kept.map(|(place, _)| run.survey.sizes.bytes(u32::try_from(place).unwrap_or(u32::MAX))).sum()
        };
        (run.before_bytes, run.used_bytes) = (bytes_of(&run.keepers), bytes_of(&run.own_keepers));
        Ok(run)
    }

    fn places(&self) -> impl Iterator<Item = u32> + use<> {
        0..u32::try_from(self.survey.nodes.len()).unwrap_or(u32::MAX)
    }

    /// What the rule says of a record by itself.
    fn judge(&self, rule: usize, at: u32) -> Verdict {
        let (options, node) = (&self.rules[rule], &self.survey.nodes[at as usize]);
        let recent = || {
            let age = node.uses.last_used_at.map(|used| self.now.since(used));
            !options.keep_duration.is_zero() && age.is_some_and(|age| age < options.keep_duration)
        };
        let reason = if node.held {
            Reason::Held
        } else if node.pinned {
            Reason::Pinned
        } else if !options.all && matches!(node.record_type, RecordType::Internal | RecordType::Frontend) {
            Reason::Internal
        } else if !options.all && node.shared {
            Reason::Shared
        } else if self.matched[rule].get(at as usize) == Some(&false) {
            Reason::NotMatched
        } else if recent() {
            Reason::UsedRecently
        } else {
            return Verdict::MayGo;
        };
        Verdict::Stays(reason)
    }

    /// Applies one rule; `remove` does away with what was chosen, a batch at a time, and says what became of it.
    fn apply(
        &mut self,
        rule: usize,
        remove: &mut dyn FnMut(&mut Batch<'_>) -> Result<(), CacheError>,
    ) -> Result<(), CacheError> {
        for at in self.places() {
            let stuck = Verdict::Stays(Reason::UsedMeanwhile);
            let place = at as usize;
            if self.verdicts[place] != Verdict::Gone && self.verdicts[place] != stuck {
                self.verdicts[place] = match self.survey.nodes[place].hidden {
                    true => Verdict::Gone,
                    false => self.judge(rule, at),
                };
            }
        }
        self.scores.clear();
        // What went by an earlier rule is not free yet, but will be.
        let cap = effective_keep(&self.rules[rule], self.used_bytes, self.free_bytes.saturating_add(self.freed_bytes));
        if cap == Cap::Everything {
            return Ok(());
        }
        self.scores = self.scored();
        let place = |run: &Self, at: u32| -> Place {
            let node = &run.survey.nodes[at as usize];
            Reverse((run.scores[at as usize], node.uses.last_used_at, node.created_at, at))
        };
        let is_free =
            |run: &Self, at: u32| run.verdicts[at as usize] == Verdict::MayGo && run.children[at as usize] == 0;
        let mut heap: BinaryHeap<Place> =
            self.places().filter(|at| is_free(self, *at)).map(|at| place(self, at)).collect();
        let mut failed = None;
        loop {
            let mut chosen: Vec<Chosen> = Vec::with_capacity(BATCH);
            while chosen.len() < WINDOW {
                if matches!(cap, Cap::Bytes(keep) if self.used_bytes < keep) {
                    break;
                }
                let Some(Reverse((score, .., at))) = heap.pop() else { break };
                // One that was put here in vain, since a child stayed after all.
                if !is_free(self, at) {
                    continue;
                }
                let (freed_bytes, score) = (self.take_away(at), f64::from_bits(score));
                chosen.push(Chosen { at, freed_bytes, score, outcome: Outcome::Pending });
                for parent in self.distinct_parents(at) {
                    if is_free(self, parent) {
                        heap.push(place(self, parent));
                    }
                }
            }
            if chosen.is_empty() {
                break;
            }
            if chosen.len() > ONE_BY_ONE {
                self.bring_neighbours_together(&mut chosen);
            }
            let result = chosen.chunks_mut(BATCH).try_for_each(|chosen| {
                if self.cancel.is_canceled() {
                    return Err(Canceled.into());
                }
                let mut batch = Batch { survey: &self.survey, rule, chosen, failed: None };
                let result = remove(&mut batch);
                failed = failed.take().or(batch.failed);
                result
            });
            // What stays is put back, the last first: its parents were chosen after it.
            for one in chosen.iter().rev() {
                match one.outcome {
                    Outcome::Gone => {}
                    Outcome::Stays(reason) => self.put_back(one.at, reason),
                    Outcome::Pending => self.put_back(one.at, Reason::Failed),
                }
            }
            result?;
        }
        failed.map_or(Ok(()), Err)
    }

    /// Sorts by ID, but what stands on another goes before it.
    fn bring_neighbours_together(&self, chosen: &mut [Chosen]) {
        // How many of the chosen stand on a record, one on the other.
        let mut heights: HashMap<u32, u32> = HashMap::with_capacity(chosen.len());
        for one in &*chosen {
            let height = *heights.entry(one.at).or_default();
            for parent in self.distinct_parents(one.at) {
                let above = heights.entry(parent).or_default();
                *above = height.saturating_add(1).max(*above);
            }
        }
        chosen.sort_by_key(|one| (heights.get(&one.at).copied(), one.at));
    }

    fn distinct_parents(&self, at: u32) -> Vec<u32> {
        match self.survey.parents_of(at) {
            parents @ ([] | [_]) => parents.to_vec(),
            parents => {
                let mut seen = HashSet::new();
                parents.iter().copied().filter(|parent| seen.insert(*parent)).collect()
            }
        }
    }

    /// Counts a record as gone; the bytes that nobody keeps any more.
    fn take_away(&mut self, at: u32) -> u64 {
        self.verdicts[at as usize] = Verdict::Gone;
        for parent in self.distinct_parents(at) {
            self.children[parent as usize] -= 1;
        }
        let (mut freed, shared) = (0, self.survey.nodes[at as usize].shared);
        for place in self.survey.kept_by(at) {
            let bytes = self.survey.sizes.bytes(*place);
            let place = *place as usize;
            self.keepers[place] -= 1;
            freed += if self.keepers[place] == 0 { bytes } else { 0 };
            if !shared {
                self.own_keepers[place] -= 1;
                self.used_bytes -= if self.own_keepers[place] == 0 { bytes } else { 0 };
            }
        }
        self.freed_bytes += freed;
        self.removed_count += 1;
        freed
    }

    fn put_back(&mut self, at: u32, reason: Reason) {
        self.verdicts[at as usize] = Verdict::Stays(reason);
        for parent in self.distinct_parents(at) {
            self.children[parent as usize] += 1;
        }
        let shared = self.survey.nodes[at as usize].shared;
        for place in self.survey.kept_by(at) {
            let bytes = self.survey.sizes.bytes(*place);
            let place = *place as usize;
            self.freed_bytes -= if self.keepers[place] == 0 { bytes } else { 0 };
            self.keepers[place] += 1;
            if !shared {
                self.used_bytes += if self.own_keepers[place] == 0 { bytes } else { 0 };
                self.own_keepers[place] += 1;
            }
        }
        self.removed_count -= 1;
    }

    /// The score of each record that may go, as bits that sort as it does.
    fn scored(&self) -> Vec<u64> {
        let eligible: Vec<u32> = self.places().filter(|at| self.verdicts[*at as usize] == Verdict::MayGo).collect();
        let nodes = &self.survey.nodes;
        let charges = self.charges();
        let candidates: Vec<Candidate> = eligible
            .iter()
            .map(|at| Candidate { uses: nodes[*at as usize].uses, charge: charges[*at as usize] })
            .collect();
        let mut bits = vec![0; nodes.len()];
        for (at, score) in eligible.into_iter().zip(scores(&candidates)) {
            bits[at as usize] = score.to_bits();
        }
        bits
    }

    /// What each record is charged with, of what may go.
    fn charges(&self) -> Vec<Charge> {
        let count = self.survey.nodes.len();
        let mut stays = vec![false; count];
        let mut pending: Vec<u32> =
            self.places().filter(|at| matches!(self.verdicts[*at as usize], Verdict::Stays(_))).collect();
        while let Some(at) = pending.pop() {
            if !std::mem::replace(&mut stays[at as usize], true) {
                pending.extend(self.survey.parents_of(at));
            }
        }
        let mut charges = vec![Charge::default(); count];
        let (mut seen, mut path) = (vec![false; count], Vec::new());
        for at in self.places() {
            path.push(at);
            // Each is met twice: on the way up, and when its parents are done.
            while let Some(at) = path.last().copied() {
                let place = at as usize;
                if !std::mem::replace(&mut seen[place], true) {
                    path.extend(self.survey.parents_of(at).iter().filter(|parent| !seen[**parent as usize]));
                    continue;
                }
                path.pop();
                if !stays[place] && self.verdicts[place] == Verdict::MayGo {
                    charges[place] = self.charge_of(at, &charges);
                }
            }
        }
        charges
    }

    /// What a record is charged with, once that is known of its parents.
    fn charge_of(&self, at: u32, charges: &[Charge]) -> Charge {
        let part =
            |place: &u32| self.survey.sizes.bytes(*place) as f64 / f64::from(self.keepers[*place as usize].max(1));
        let bytes: f64 = self.survey.kept_by(at).iter().map(part).sum();
        let nanos = match self.survey.nodes[at as usize].took {
            Some(took) => took.as_nanos() as f64,
            None => bytes * NANOS_PER_BYTE,
        };
        self.distinct_parents(at).into_iter().fold(Charge { bytes, nanos }, |charge, parent| {
            let (of, children) = (charges[parent as usize], f64::from(self.children[parent as usize].max(1)));
            Charge { bytes: charge.bytes + of.bytes / children, nanos: charge.nanos + of.nanos / children }
        })
    }

    /// Why a record stays; `None` if it does not.
    fn reason(&self, at: u32) -> Option<Reason> {
        match self.verdicts[at as usize] {
            Verdict::Gone => None,
            Verdict::Stays(reason) => Some(reason),
            Verdict::MayGo if self.children[at as usize] > 0 => Some(Reason::HasChildren),
            Verdict::MayGo => Some(Reason::UnderCap),
        }
    }

    fn report(&self) -> PruneReport {
        let shown = self.survey.nodes.iter().filter(|node| !node.hidden).count() as u64;
        let sizes = &self.survey.sizes;
        let in_use_bytes = |(place, keepers): (u32, &u32)| match *keepers > 0 && sizes.is_in_use(place) {
            true => sizes.bytes(place),
            false => 0,
        };
        PruneReport {
            removed_count: self.removed_count,
            kept_count: shown - self.removed_count,
            freed_bytes: self.freed_bytes,
            before_bytes: self.before_bytes,
            used_bytes: self.used_bytes,
            in_use_bytes: (0..).zip(&self.own_keepers).map(in_use_bytes).sum(),
            collected: None,
        }
    }
}

/// What goes with a record, its part of what it stands on included.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Charge {
    bytes: f64,
    /// How long it takes to make again, in nanoseconds.
    nanos: f64,
}

impl Charge {
    /// Nanoseconds a byte, as a power of two.
    fn price(self) -> i32 {
        match self.nanos / self.bytes {
            free if free <= 0.0 => i32::MIN,
            // `as` keeps within the bounds of the type. Nothing that is freed is infinite, or not even a number.
            price if self.bytes > 0.0 => price.log2().floor() as i32,
            _ => i32::MAX,
        }
    }
}

/// What decides when a record goes.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    uses: UseRow,
    charge: Charge,
}

/// The score of each of these, which may go: see the module. All are positive.
fn scores(candidates: &[Candidate]) -> Vec<f64> {
    let by_use = ranks(candidates.iter().map(|candidate| candidate.uses.last_used_at));
    let by_count = ranks(candidates.iter().map(|candidate| candidate.uses.count));
    let by_price = ranks(candidates.iter().map(|candidate| candidate.charge.price()));
    by_use.into_iter().zip(by_count).zip(by_price).map(|((use_, count), price)| use_ + count + price).collect()
}

/// The rank of each value as a part of the highest: equal ones share a rank, the lowest has the first, which is 1.
fn ranks<T: Ord + Copy>(values: impl Iterator<Item = T>) -> Vec<f64> {
    let values: Vec<T> = values.collect();
    let mut distinct = values.clone();
    distinct.sort_unstable();
    distinct.dedup();
    let highest = distinct.len() as f64;
    let rank = |value: &T| distinct.partition_point(|other| other <= value) as f64;
    values.iter().map(|value| rank(value) / highest).collect()
}

/// What is free for this process on the store's file system.
fn free_space(inner: &Inner) -> Result<u64, CacheError> {
    let path = inner.store.root();
    let stat = rustix::fs::statvfs(path)
        .map_err(|error| CacheError::FreeSpace { path: path.to_owned(), source: error.into() })?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Records that nobody else can get from here on.
struct Condemned<'a> {
    inner: &'a Inner,
    ids: Vec<RecordId>,
}

impl Drop for Condemned<'_> {
    fn drop(&mut self) {
        self.ids.iter().for_each(|id| self.inner.live.absolve(*id));
    }
}

/// What became of a record in a transaction.
enum Did {
    Removed(Box<RecordUsage>),
    /// Somebody else had removed it.
    WasGone,
    Left(Reason),
}

fn run_batch(inner: &Inner, batch: &mut Batch<'_>, gone: &mut Vec<PrunedRecord>) -> Result<(), CacheError> {
    let mut condemned = Condemned { inner, ids: Vec::with_capacity(batch.chosen.len()) };
    let survey = batch.survey;
    let ids = |at: u32| {
        let node = &survey.nodes[at as usize];
        (node.id, node.partner.map(|partner| survey.nodes[partner as usize].id))
    };
    for chosen in &mut *batch.chosen {
        let (id, partner) = ids(chosen.at);
        for id in [Some(id), partner].into_iter().flatten() {
            match inner.live.condemn(id) {
                Ok(()) => condemned.ids.push(id),
                Err(_) => chosen.outcome = Outcome::Stays(Reason::UsedMeanwhile),
            }
        }
    }
    let pending: Vec<usize> =
        (0..batch.chosen.len()).filter(|at| batch.chosen[*at].outcome == Outcome::Pending).collect();
    let at = |index: &usize| batch.chosen[*index].at;
    // Durable before anybody is told, and before the bytes go.
    let all =
        inner.store.write_lazily(|tx| pending.iter().map(|index| remove_one(inner, tx, survey, at(index))).collect());
    let did: Vec<Result<Did, CacheError>> = match all {
        Ok(did) => Vec::into_iter(did).map(Ok).collect(),
        Err(error @ CatalogueError::Database { .. }) => return Err(error.into()),
        // One of them cannot be removed. By themselves, the others can.
        Err(_) => pending
            .iter()
            .map(|index| Ok(inner.store.write_lazily(|tx| remove_one(inner, tx, survey, at(index)))?))
            .collect(),
    };
    drop(condemned);
    for (index, did) in pending.into_iter().zip(did) {
        let chosen = &mut batch.chosen[index];
        chosen.outcome = match did {
            Ok(Did::Removed(usage)) => {
                let (rule, freed_bytes) = (batch.rule, chosen.freed_bytes);
                gone.push(PrunedRecord { usage: *usage, rule, freed_bytes });
                Outcome::Gone
            }
            Ok(Did::WasGone) => Outcome::Gone,
            Ok(Did::Left(reason)) => Outcome::Stays(reason),
            Err(error) => {
                batch.failed.get_or_insert(error);
                Outcome::Stays(Reason::Failed)
            }
        };
    }
    Ok(())
}

/// Removes a record, and the one that shares its files, unless something was done with it since it was looked at.
fn remove_one(inner: &Inner, tx: &mut Tx<'_>, survey: &Survey, at: u32) -> Result<Did, CatalogueError> {
    let node = &survey.nodes[at as usize];
    let partner = node.partner.map(|partner| survey.nodes[partner as usize].id);
    let row: Option<RecordRow> = match record::get(tx, node.id) {
        Ok(None) => return Ok(Did::WasGone),
        Ok(row) => row,
        Err(error @ CatalogueError::Database { .. }) => return Err(error),
        Err(_) => None,
    };
    // It was committed since: the other half, which is there, is not condemned.
    let other = row.as_ref().and_then(|row| partner_of(&row.state)).filter(|other| Some(*other) != partner);
    if let Some(other) = other
        && tx.contains(&RECORDS, &other)?
    {
        return Ok(Did::Left(Reason::UsedMeanwhile));
    }
    let partner_row = partner.and_then(|partner| record::get(tx, partner).ok().flatten());
    if [&row, &partner_row].into_iter().flatten().any(|row| row.pinned) {
        return Ok(Did::Left(Reason::Pinned));
    }
    let uses = inner.uses.with(node.id, tx.get(&USES, &node.id).unwrap_or_default().unwrap_or_default());
    if uses.count > node.uses.count {
        return Ok(Did::Left(Reason::UsedMeanwhile));
    }
    for id in [Some(node.id), partner].into_iter().flatten() {
        let children = record::children(tx, id)?;
        if children.iter().any(|child| Some(*child) != partner && *child != node.id) {
            return Ok(Did::Left(Reason::HasChildren));
        }
    }
    let usage = survey.usage(at, row.as_ref());
    if let Some(partner) = partner {
        record::remove(tx, partner)?;
    }
    match record::remove(tx, node.id)? {
        true => Ok(Did::Removed(Box::new(usage))),
        false => Ok(Did::WasGone),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1_000_000_000;

    #[test]
    fn a56_effective_keep_is_buildkits_arithmetic() {
        let options = |reserved, max, min_free| PruneOptions {
            reserved_space_bytes: reserved,
            max_used_space_bytes: max,
            min_free_space_bytes: min_free,
            ..PruneOptions::default()
        };
        // reserved, max, min free; used, free; what is kept
        for ((reserved, max, min_free), (used, free), expected) in [
            ((0, 0, 0), (50, 0), Cap::Off),
            ((10, 0, 0), (50, 0), Cap::Bytes(10)),
            ((0, 20, 0), (50, 0), Cap::Bytes(20)),
            ((30, 20, 0), (50, 0), Cap::Bytes(30)),
            // Enough is free: what may be used decides, and without that, nothing goes.
            ((10, 20, 5), (50, 5), Cap::Bytes(20)),
            ((0, 0, 5), (50, 5), Cap::Everything),
            ((10, 0, 5), (50, 6), Cap::Everything),
            // 4 are missing.
            ((0, 0, 5), (50, 1), Cap::Bytes(46)),
            ((0, 20, 5), (50, 1), Cap::Bytes(20)),
            ((0, 49, 5), (50, 1), Cap::Bytes(46)),
            ((48, 49, 5), (50, 1), Cap::Bytes(48)),
            // More is missing than there is: nothing is kept but what is reserved, and 0 is no cap.
            ((7, 20, 100), (50, 1), Cap::Bytes(7)),
            ((0, 20, 100), (50, 1), Cap::Off),
            ((0, 0, 51), (50, 1), Cap::Off),
            ((0, 0, u64::MAX), (u64::MAX, 0), Cap::Off),
            ((u64::MAX, 1, 1), (0, 0), Cap::Bytes(u64::MAX)),
        ] {
            let given = options(reserved, max, min_free);
            assert_eq!(effective_keep(&given, used, free), expected, "{given:?} with {used} used and {free} free");
        }
    }

    #[test]
    fn a53_the_default_policy_is_buildkits_four_rules() {
        let [easy, old, capped, all] = <[_; 4]>::try_from(PruneOptions::default_policy(40 * GB)).unwrap();
        assert_eq!(easy.keep_duration, Duration::from_secs(48 * 3600));
        assert_eq!((easy.max_used_space_bytes, easy.filters.len(), easy.all), (512_000_000, 3, false));
        assert_eq!(old, PruneOptions { keep_duration: Duration::from_secs(60 * 24 * 3600), ..capped.clone() });
        assert_eq!(all, PruneOptions { all: true, ..capped.clone() });
        let caps = |of: &PruneOptions| (of.reserved_space_bytes, of.max_used_space_bytes, of.min_free_space_bytes);
        assert_eq!(caps(&capped), (4 * GB, 32 * GB, 8 * GB));
        let huge = PruneOptions::default_policy(4000 * GB).remove(2);
        assert_eq!(caps(&huge), (10 * GB, 100 * GB, 800 * GB));
        // No file system at all: no caps, and no panic.
        assert_eq!(caps(&PruneOptions::default_policy(0)[3]), (0, 0, 0));
    }

    /// What operators read; its examples are computed here.
    const GUIDE: &str = include_str!("../../../docs/space.md");

    #[test]
    fn the_guide_tells_the_cap_as_it_is() {
        for (reserved, max, min_free, used, free) in [
            (0, 20, 0, 50, 9),
            (10, 20, 5, 50, 1),
            (0, 49, 5, 50, 1),
            (48, 49, 5, 50, 1),
            (10, 0, 5, 50, 6),
            (0, 20, 100, 50, 1),
        ] {
            let options = PruneOptions {
                reserved_space_bytes: reserved * GB,
                max_used_space_bytes: max * GB,
                min_free_space_bytes: min_free * GB,
                ..PruneOptions::default()
            };
            let what = match effective_keep(&options, used * GB, free * GB) {
                Cap::Off => "all that may go goes".to_owned(),
                Cap::Everything => "nothing goes".to_owned(),
                Cap::Bytes(bytes) => format!("records go until less than {} are used", bytes / GB),
            };
            let line = format!("\n| {reserved} | {max} | {min_free} | {used} | {free} | {what} |\n");
            assert!(GUIDE.contains(&line), "{line}");
        }
    }

    fn candidate(last_used_at: Option<Stamp>, count: u64, megabytes: u64, took_seconds: u64) -> Candidate {
        let charge = Charge { bytes: megabytes as f64 * 1e6, nanos: took_seconds as f64 * 1e9 };
        Candidate { uses: UseRow { last_used_at, count }, charge }
    }

    #[test]
    fn the_guide_tells_the_score_as_it_is() {
        const HOUR: u64 = 3_600_000_000;
        let now = 1000 * HOUR;
        let at = |ago: u64| Some(Stamp::from_micros(now - ago));
        let records = [
            ("a", "never", None, 0, 10, 1),
            ("b", "10 days ago", at(240 * HOUR), 1, 10, 120),
            ("c", "2 days ago", at(48 * HOUR), 7, 2000, 10),
            ("d", "1 hour ago", at(HOUR), 1, 10, 1),
        ];
        let scores = scores(&records.map(|(_, _, used, count, size, took)| candidate(used, count, size, took)));
        for ((name, last_used, _, count, size, took), score) in records.iter().zip(&scores) {
            let line = format!("\n| {name} | {last_used} | {count} | {size} MB | {took} s | {score:.2} |\n");
            assert!(GUIDE.contains(&line), "{line}");
        }
        let mut order = [0, 1, 2, 3];
        order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
        let order = order.map(|at| records[at].0);
        assert_eq!(order, ["a", "c", "b", "d"]);
        assert!(GUIDE.contains("So a goes first, then c, b and d"));
    }

    #[test]
    fn each_part_of_the_score_decides_where_the_others_are_equal() {
        let at = |micros| Some(Stamp::from_micros(micros));
        for (first, second) in [
            // Used longer ago, or never; less often.
            (candidate(at(1), 1, 10, 1), candidate(at(2), 1, 10, 1)),
            (candidate(None, 1, 10, 1), candidate(at(1), 1, 10, 1)),
            (candidate(at(1), 1, 10, 1), candidate(at(1), 2, 10, 1)),
            // Larger; made faster; made in no time; and what frees nothing stays longest.
            (candidate(at(1), 1, 20, 1), candidate(at(1), 1, 10, 1)),
            (candidate(at(1), 1, 10, 1), candidate(at(1), 1, 10, 2)),
            (candidate(at(1), 1, 10, 0), candidate(at(1), 1, 10, 1)),
            (candidate(at(1), 1, 1, 1_000_000), candidate(at(1), 1, 0, 0)),
            (candidate(at(1), 1, 1, 1_000_000), candidate(at(1), 1, 0, 1)),
        ] {
            let scores = scores(&[first, second]);
            assert!(scores[0] < scores[1], "{first:?}, {second:?}: {scores:?}");
        }
        // 100 and 120 ns a byte are the same, and so is nothing and nothing.
        for (first, second) in [
            (candidate(at(1), 1, 10, 1), candidate(at(1), 1, 100, 12)),
            (candidate(at(1), 1, 0, 0), candidate(at(1), 1, 0, 9)),
        ] {
            let scores = scores(&[first, second]);
            assert!(scores[0] == scores[1], "{first:?}, {second:?}: {scores:?}");
        }
    }

    #[test]
    fn a69_ranks_begin_at_one_and_equal_values_share_one() {
        // Never used comes first.
        assert_eq!(ranks([Some(5), None, Some(9), Some(5)].into_iter()), [2.0 / 3.0, 1.0 / 3.0, 1.0, 2.0 / 3.0]);
        // With ranks from 0 this would be 0 / 0.
        assert_eq!(ranks([7, 7].into_iter()), [1.0, 1.0]);
        assert!(ranks::<u64>([].into_iter()).is_empty());
    }
}
