//! Prune, statement by statement; a property over random records and rules; and what a kill leaves.
#![allow(clippy::unwrap_used)]

mod common_space;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common_space::*;
use plies_cache::{
    CacheError, Cap, Fate, Judged, Parents, PruneOptions, PruneReport, PrunedRecord, Reason, RecordId, RecordOptions,
    RecordRow, RecordType, SharedChecker, State, UseRow, effective_keep,
};
use plies_oci::DiffId;
use plies_store::{ActiveOptions, Attach, Cancel, LeaseOptions, Rows as _, Table, held_by};
use proptest::prelude::*;

const MB: u64 = 1_000_000;

fn all() -> PruneOptions {
    PruneOptions { all: true, ..PruneOptions::default() }
}

fn keep(bytes: u64) -> PruneOptions {
    PruneOptions { max_used_space_bytes: bytes, ..PruneOptions::default() }
}

fn filtered(filters: &[&str]) -> PruneOptions {
    PruneOptions { filters: filters.iter().map(|filter| (*filter).to_owned()).collect(), ..PruneOptions::default() }
}

fn try_prune(rig: &Rig, rules: &[PruneOptions]) -> Result<(Vec<PrunedRecord>, PruneReport), CacheError> {
    let mut removed = Vec::new();
    let report = rig.control.prune(rules, &mut |record| removed.push(record.clone()), &Cancel::new())?;
    Ok((removed, report))
}

fn prune(rig: &Rig, rules: &[PruneOptions]) -> Vec<RecordId> {
    let (removed, report) = try_prune(rig, rules).unwrap();
    assert_eq!(report.removed_count, removed.len() as u64);
    removed.iter().map(|record| record.usage.id).collect()
}

fn judge(rig: &Rig, rules: &[PruneOptions]) -> (Vec<Judged>, PruneReport) {
    let mut judged = Vec::new();
    let report = rig.control.prune_dry_run(rules, &mut |record| judged.push(record.clone()), &Cancel::new()).unwrap();
    (judged, report)
}

fn fates(rig: &Rig, rules: &[PruneOptions]) -> BTreeMap<RecordId, Fate> {
    judge(rig, rules).0.into_iter().map(|judged| (judged.usage.id, judged.fate)).collect()
}

fn by() -> RecordOptions {
    RecordOptions::by("test")
}

#[test]
fn a53_rules_apply_one_after_another_and_the_bytes_go_at_the_end() {
    let rig = Rig::new();
    let (a, b) = (rig.record(1, 10, Parents::None), rig.record(2, 20, Parents::None));
    let rules = [filtered(&[&format!("id=={b}")]), filtered(&["immutable"])];
    let usage = rig.store.usage().unwrap();
    let sidecars = usage.iter().find(|row| row.kind == plies_store::UsageKind::Sidecars).unwrap().size_bytes;
    assert!(sidecars > 0);
    let (removed, report) = try_prune(&rig, &rules).unwrap();
    let order: Vec<_> = removed.iter().map(|record| (record.usage.id, record.rule)).collect();
    assert_eq!(order, [(b, 0), (a, 1)]);
    assert_eq!((report.removed_count, report.kept_count, report.freed_bytes, report.before_bytes), (2, 0, 30, 30));
    let collected = report.collected.unwrap();
    assert_eq!((collected.collected.len(), collected.freed_bytes), (2, 30 + sidecars));
    assert_eq!(std::fs::read_dir(rig.root().join("layers")).unwrap().count(), 1, "only the directory of stages");
}

#[test]
fn a53_the_first_error_stops_and_nothing_is_collected() {
    struct FailsLater(AtomicUsize);
    impl SharedChecker for FailsLater {
        fn exists(&self, _: RecordId, _: &[DiffId]) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Err("no answer".into())
        }
    }
    let checker = Arc::new(FailsLater(AtomicUsize::new(0)));
    let rig = Rig::with_checker(Some(checker.clone()));
    rig.record(1, 10, Parents::None);
    layer(&rig.store, 99, None);
    assert!(matches!(try_prune(&rig, &[all(), keep(1)]), Err(CacheError::Checker(_))));
    assert_eq!((rig.ids().len(), checker.0.load(Ordering::SeqCst)), (1, 1));
    assert_eq!(std::fs::read_dir(rig.root().join("layers")).unwrap().count(), 3, "nothing was collected");
    // The lock was given back.
    assert_eq!(prune(&rig, &[all()]).len(), 1);
}

#[test]
fn a54_a_bad_filter_is_found_before_anything_is_touched() {
    let rig = Rig::new();
    rig.record(1, 10, Parents::None);
    let error = try_prune(&rig, &[all(), filtered(&["type==regular", "nonsense=x"])]).unwrap_err();
    assert!(error.to_string().starts_with("failed to parse prune filters \"nonsense=x\": at character 9"), "{error}");
    assert_eq!(rig.ids().len(), 1);
}

#[derive(Default)]
struct Images {
    has: Vec<Vec<DiffId>>,
    asked: AtomicUsize,
}

impl SharedChecker for Images {
    fn exists(&self, _: RecordId, layers: &[DiffId]) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        Ok(self.has.iter().any(|image| image == layers))
    }
}

#[test]
fn a55_the_checker_is_asked_unless_all_go_anyway() {
    let images = Arc::new(Images::default());
    let rig = Rig::with_checker(Some(images.clone()));
    rig.record(1, 10, Parents::None);
    let asked = |rules: &[PruneOptions]| {
        let before = images.asked.load(Ordering::SeqCst);
        fates(&rig, rules);
        images.asked.load(Ordering::SeqCst) - before
    };
    assert_eq!(asked(&[all()]), 0);
    assert_eq!(asked(&[PruneOptions::default()]), 1);
    assert_eq!(asked(&[PruneOptions { filters: vec!["mutable".into()], ..all() }]), 1);
    // Of a cap, only what no image has counts.
    assert_eq!(asked(&[PruneOptions { all: true, ..keep(1) }]), 1);
}

#[test]
fn a56_the_cap_is_about_what_no_image_has() {
    let images = Arc::new(Images { has: vec![vec![diff_id(1), diff_id(2)]], ..Images::default() });
    let rig = Rig::with_checker(Some(images));
    let a = rig.record(1, 10, Parents::None);
    let b = rig.record(2, 20, Parents::Layer(a));
    let (c, d) = (rig.record(3, 30, Parents::None), rig.record(4, 40, Parents::None));
    rig.used(c, 2 * HOUR, 1);
    rig.used(d, HOUR, 1);
    // 70 count, whatever the images have and whatever the filter says.
    assert_eq!(prune(&rig, &[keep(71)]), []);
    let only_d = PruneOptions { filters: vec![format!("id=={d}")], ..keep(70) };
    assert_eq!(fates(&rig, &[only_d])[&d], Fate::Goes { rule: 0 });
    assert_eq!(prune(&rig, &[keep(70)]), [c]);
    assert_eq!(fates(&rig, &[keep(1)])[&b], Fate::Stays(Reason::Shared));
    // What an image has may go if all may, but that brings nothing towards the cap.
    assert_eq!(prune(&rig, &[PruneOptions { all: true, ..keep(40) }]), [b, a, d]);
}

#[test]
fn a57_records_go_until_less_than_the_cap_is_left() {
    for (cap, expected) in [(61, 0), (60, 1), (51, 1), (50, 2), (31, 2), (30, 3), (1, 3)] {
        let rig = Rig::new();
        let ids =
            [rig.record(1, 10, Parents::None), rig.record(2, 20, Parents::None), rig.record(3, 30, Parents::None)];
        for (at, id) in ids.into_iter().enumerate() {
            rig.used(id, (10 - at as u32) * HOUR, 1);
        }
        assert_eq!(prune(&rig, &[keep(cap)]), ids[..expected], "at most {cap}");
    }
}

#[test]
fn a57_a_cap_of_nothing_is_no_cap() {
    let rig = Rig::new();
    rig.record(1, 0, Parents::None);
    rig.record(2, 10, Parents::None);
    assert_eq!(prune(&rig, &[keep(0)]).len(), 2);
}

#[test]
fn a58_what_is_held_and_what_something_stands_on_stays() {
    let rig = Rig::new();
    let a = rig.record(1, 10, Parents::None);
    let b = rig.record(2, 10, Parents::Layer(a));
    let leaf = rig.record(3, 10, Parents::Layer(b));
    let held = rig.cache.get(b, &by()).unwrap();
    let fates = fates(&rig, &[all()]);
    assert_eq!(fates[&a], Fate::Stays(Reason::HasChildren));
    assert_eq!(fates[&b], Fate::Stays(Reason::Held));
    assert_eq!(prune(&rig, &[all()]), [leaf]);
    held.release().unwrap();
    // From the leaf to the root, in one go.
    assert_eq!(prune(&rig, &[all()]), [b, a]);
    assert!(rig.manager.held().is_empty());
}

#[test]
fn a58_a_committed_pair_goes_as_one_and_not_while_either_is_held() {
    let rig = Rig::new();
    let made = rig.cache.create(None, &RecordOptions { retain: Some(true), ..by() }).unwrap();
    let writable = made.id();
    assert_eq!(prune(&rig, &[all()]), []);
    let committed = made.commit().unwrap();
    assert_eq!(prune(&rig, &[all()]), []);
    committed.release().unwrap();
    // A pin of the one is a pin of the other.
    let immutable = rig.ids().into_iter().find(|id| *id != writable).unwrap();
    rig.cache.pin(immutable, true).unwrap();
    assert_eq!(fates(&rig, &[all()])[&writable], Fate::Stays(Reason::Pinned));
    rig.cache.pin(immutable, false).unwrap();
    assert_eq!(prune(&rig, &[all()]), [writable]);
    assert!(rig.ids().is_empty());
    assert_eq!(std::fs::read_dir(rig.root().join("active")).unwrap().count(), 0);
}

#[test]
fn a59_internal_frontend_shared_and_pinned_records_are_spared() {
    let images = Arc::new(Images { has: vec![vec![diff_id(4)]], ..Images::default() });
    let rig = Rig::with_checker(Some(images));
    let typed = |name, kind| rig.put(name, |row| row.record_type = kind);
    let (plain, internal) = (typed(1, RecordType::Regular), typed(2, RecordType::Internal));
    let (frontend, mount) = (typed(3, RecordType::Frontend), typed(5, RecordType::CacheMount));
    let shared = rig.record(4, 10, Parents::None);
    let pinned = rig.put(6, |row| row.pinned = true);
    let gone: BTreeSet<_> = prune(&rig, &[PruneOptions::default()]).into_iter().collect();
    assert_eq!(gone, BTreeSet::from([plain, mount]));
    let fates = fates(&rig, &[PruneOptions::default()]);
    assert_eq!(fates[&internal], Fate::Stays(Reason::Internal));
    assert_eq!(fates[&frontend], Fate::Stays(Reason::Internal));
    assert_eq!(fates[&shared], Fate::Stays(Reason::Shared));
    let gone: BTreeSet<_> = prune(&rig, &[all()]).into_iter().collect();
    assert_eq!(gone, BTreeSet::from([internal, frontend, shared]));
    assert_eq!(rig.ids(), [pinned]);
}

#[test]
fn a60_recent_use_keeps_a_record_and_no_use_does_not() {
    let rig = Rig::new();
    let never = rig.record(1, 10, Parents::None);
    let (old, exact, recent) = (rig.put(2, |_| ()), rig.put(3, |_| ()), rig.put(4, |_| ()));
    rig.used(old, 3 * HOUR, 1);
    rig.used(exact, 2 * HOUR, 1);
    rig.used(recent, 2 * HOUR - Duration::from_secs(1), 1);
    let rule = PruneOptions { keep_duration: 2 * HOUR, ..PruneOptions::default() };
    assert_eq!(fates(&rig, std::slice::from_ref(&rule))[&recent], Fate::Stays(Reason::UsedRecently));
    let gone: BTreeSet<_> = prune(&rig, &[rule]).into_iter().collect();
    assert_eq!(gone, BTreeSet::from([never, old, exact]));
}

#[test]
fn a61_filters_choose_what_goes() {
    let rig = Rig::new();
    let a = rig.put(1, |row| row.description = "RUN make".into());
    let b = rig.put(2, |row| row.record_type = RecordType::LocalSource);
    let big = rig.record(3, 20 * MB, Parents::None);
    let child = rig.put(4, |row| row.parents = Parents::Layer(a));
    for (filter, expected) in [
        (format!("id=={a}"), vec![]),
        ("description~=make".into(), vec![]),
        ("mutable".into(), vec![]),
        ("type==source.local".into(), vec![b]),
        ("private,type==source.local".into(), vec![b]),
        ("shared".into(), vec![]),
        ("size>=10MB".into(), vec![big]),
        ("until=200h".into(), vec![]),
        ("pinned".into(), vec![]),
        (format!("parents=={a}"), vec![child]),
    ] {
        let fates = fates(&rig, &[filtered(&[&filter])]);
        let going: Vec<_> =
            fates.iter().filter(|(_, fate)| matches!(fate, Fate::Goes { .. })).map(|(id, _)| *id).collect();
        assert_eq!(going, expected, "{filter}");
    }
    // A record that matches and has a child that does not is kept by the child.
    assert_eq!(fates(&rig, &[filtered(&["description~=make"])])[&a], Fate::Stays(Reason::HasChildren));
    assert_eq!(fates(&rig, &[filtered(&["mutable"])])[&b], Fate::Stays(Reason::NotMatched));
    assert_eq!(prune(&rig, &[filtered(&["type==source.local", "size>=10MB"])]).len(), 2);
}

#[test]
fn a62_what_is_reported_is_gone_with_all_that_named_it() {
    let rig = Rig::new();
    let a = rig.record(1, 10, Parents::None);
    rig.record(2, 10, Parents::Layer(a));
    let mut told = 0;
    rig.control
        .prune(
            &[all()],
            &mut |record| {
                told += 1;
                // No mark and no half of it: not the row, not its holds, nothing that names it.
                let id = record.usage.id;
                rig.store
                    .read(|rows| {
                        assert!(!rows.contains(&RECORDS, &id)?);
                        assert!(held_by(rows, &owner(id))?.is_empty());
                        assert!(rows.prefixed(&CHILDREN, &a)?.is_empty());
                        Ok::<_, plies_store::CatalogueError>(())
                    })
                    .unwrap();
                assert!(rig.cache.get(id, &by()).unwrap_err().is_not_found());
                // Its bytes are there until all of the rows are gone.
                assert_eq!(std::fs::read_dir(rig.root().join("layers")).unwrap().count(), 3);
            },
            &Cancel::new(),
        )
        .unwrap();
    assert_eq!(told, 2);
}

#[test]
fn a63_a_cap_takes_no_more_than_it_must_from_a_chain_and_a_crowd() {
    let rig = Rig::new();
    // A chain whose root is the oldest: only leaves can go.
    let root = rig.record(1, 100, Parents::None);
    let leaf = rig.record(2, 1, Parents::Layer(root));
    rig.used(root, 90 * HOUR, 1);
    rig.used(leaf, 2 * HOUR, 1);
    let crowd: Vec<_> = (10..14).map(|name| rig.record(name, 10, Parents::None)).collect();
    for (at, id) in crowd.iter().enumerate() {
        rig.used(*id, (20 - at as u32) * HOUR, 1);
    }
    // 141: the crowd goes first, oldest first, then the leaf, and with it the root.
    assert_eq!(prune(&rig, &[keep(130)]), crowd[..2]);
    assert_eq!(prune(&rig, &[keep(101)]), [crowd[2], crowd[3], leaf]);
    assert_eq!(prune(&rig, &[keep(100)]), [root]);
}

#[test]
fn a64_a66_a_record_that_cannot_be_removed_stays_and_the_others_go() {
    // Not a text: the key does not decode.
    const VALUES: Table<(RecordId, u8), u64> = Table::new("cache.values");
    let rig = Rig::new();
    let ids: Vec<_> = (1..6).map(|name| rig.record(name, 10, Parents::None)).collect();
    let child = rig.record(9, 5, Parents::Layer(ids[2]));
    // What is kept with it cannot be read, so it cannot be removed whole.
    rig.store.write(|tx| tx.put(&VALUES, &(child, 7), &u64::MAX)).unwrap();
    for rule in [all(), keep(1)] {
        let error = try_prune(&rig, &[rule]).unwrap_err();
        assert!(matches!(error, CacheError::Catalogue(_)), "{error}");
        assert_eq!(rig.ids().into_iter().collect::<BTreeSet<_>>(), BTreeSet::from([child, ids[2]]));
    }
    // Nothing is locked or condemned, and it can still be had.
    rig.cache.get(child, &by()).unwrap().release().unwrap();
    rig.store.write(|tx| tx.remove(&VALUES, &(child, 7))).unwrap();
    assert_eq!(prune(&rig, &[all()]), [child, ids[2]]);
}

#[test]
fn a65_a_cap_measures_what_nobody_measured_yet() {
    let rig = Rig::new();
    let made = rig.cache.create(None, &RecordOptions { retain: Some(true), ..by() }).unwrap();
    let mounted = made.mount(Attach::Detached).unwrap();
    std::fs::write(fd_path(&mounted.root()).join("f"), vec![b'x'; 100_000]).unwrap();
    mounted.unmount().unwrap();
    let writable = made.id();
    // Nobody can say what it costs while it is written to, and it does not count.
    assert_eq!(judge(&rig, &[keep(1)]).1.before_bytes, 0);
    made.release().unwrap();
    assert_eq!(fates(&rig, &[keep(1_000_000)])[&writable], Fate::Stays(Reason::UnderCap));
    assert_eq!(prune(&rig, &[keep(50_000)]), [writable]);
}

#[test]
fn a67_a_removed_record_is_described_as_it_was() {
    let rig = Rig::new();
    let a = rig.record(1, 10, Parents::None);
    let b = rig.record(2, 20, Parents::None);
    let merge = rig.put(3, |row| {
        row.state = State::Composed;
        row.parents = Parents::Merge(vec![b, a]);
        row.description = "merge".into();
        row.created_at = stamp_before(7 * HOUR);
    });
    rig.used(merge, HOUR, 3);
    let diff = rig.put(4, |row| {
        row.state = State::Composed;
        row.parents = Parents::Diff { lower: a, upper: Some(merge) };
    });
    let before: BTreeMap<_, _> = rig.du().into_iter().map(|record| (record.id, record)).collect();
    let (removed, _) = try_prune(&rig, &[all()]).unwrap();
    for record in &removed {
        let was = plies_cache::RecordUsage { charged_bytes: 0, ..before[&record.usage.id].clone() };
        assert_eq!(record.usage, was);
    }
    let of = |id| removed.iter().find(|record| record.usage.id == id).unwrap();
    assert_eq!((of(diff).usage.parents.as_slice(), of(merge).usage.parents.as_slice()), (&[a, merge][..], &[b, a][..]));
    assert_eq!((of(merge).usage.description.as_str(), of(merge).usage.usage_count), ("merge", 3));
    assert_eq!((of(b).freed_bytes, of(merge).freed_bytes, of(b).usage.in_use), (20, 0, false));
}

#[test]
fn a68_it_is_cancelled_between_batches_and_what_was_done_stays_done() {
    let rig = Rig::new();
    let ids: Vec<_> = (0..200).map(|name| rig.put(name, |_| ())).collect();
    let cancel = Cancel::new();
    let mut told = 0;
    let result = rig.control.prune(
        &[all()],
        &mut |_| {
            told += 1;
            cancel.cancel();
        },
        &cancel,
    );
    assert!(matches!(result, Err(CacheError::Canceled(_))));
    assert!(told > 0 && told < 150, "{told}");
    assert_eq!(rig.ids().len(), 200 - told, "all that went was told");
    // A request that was cancelled before does nothing.
    assert!(matches!(rig.control.prune(&[all()], &mut |_| (), &cancel), Err(CacheError::Canceled(_))));
    assert_eq!(prune(&rig, &[all()]).len(), ids.len() - told);
}

#[test]
fn a68_a_chain_longer_than_a_batch_goes_in_one_prune() {
    let rig = Rig::new();
    let mut below = Parents::None;
    let mut chain = Vec::new();
    for name in 0..250 {
        let id = rig.put(name, |row| row.parents = below);
        chain.push(id);
        below = Parents::Layer(id);
    }
    chain.reverse();
    assert_eq!(prune(&rig, &[all()]), chain);
}

#[test]
fn a69_of_many_neighbours_go_together_and_what_stands_on_another_before_it() {
    const CHAINS: u32 = 600;
    let rig = Rig::new();
    // Chains of three; the IDs are in no order.
    let id_of = |chain: u32, step: u32| {
        let number = chain * 3 + step + 1;
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&number.reverse_bits().to_be_bytes());
        RecordId::from_bytes(bytes)
    };
    let put: Result<(), plies_store::CatalogueError> = rig.store.write(|tx| {
        for (chain, step) in (0..CHAINS).flat_map(|chain| (0..3).map(move |step| (chain, step))) {
            let (id, parent) = (id_of(chain, step), step.checked_sub(1).map(|below| id_of(chain, below)));
            if let Some(parent) = parent {
                tx.put(&CHILDREN, &(parent, id), &())?;
            }
            tx.put(&RECORDS, &id, &RecordRow { parents: parent.map_or(Parents::None, Parents::Layer), ..blank() })?;
            let used = UseRow { last_used_at: Some(stamp_before(HOUR * (chain + 1))), count: 1 };
            tx.put(&USES, &id, &used)?;
        }
        Ok(())
    });
    put.unwrap();
    let held = rig.cache.get(id_of(CHAINS - 1, 1), &RecordOptions::by("test")).unwrap();
    let rules = [PruneOptions { keep_duration: HOUR * 200, ..all() }];
    let (judged, _) = judge(&rig, &rules);
    let promised: Vec<_> =
        judged.iter().filter(|one| matches!(one.fate, Fate::Goes { .. })).map(|one| one.usage.id).collect();
    // One is used between the look and its turn: it stays, with what it stands on.
    let mut late = None;
    let mut gone = Vec::new();
    let on_removed = &mut |record: &PrunedRecord| {
        late.get_or_insert_with(|| rig.cache.get(id_of(300, 0), &RecordOptions::by("test")).unwrap());
        gone.push(record.usage.id);
    };
    rig.control.prune(&rules, on_removed, &Cancel::new()).unwrap();
    let stays = |chain, step| chain < 199 || (chain == CHAINS - 1 && step < 2) || (chain == 300 && step < 1);
    let expected: BTreeSet<_> = (0..CHAINS)
        .flat_map(|chain| (0..3).map(move |step| (chain, step)))
        .filter(|(chain, step)| !stays(*chain, *step))
        .map(|(chain, step)| id_of(chain, step))
        .collect();
    assert_eq!(gone.iter().copied().collect::<BTreeSet<_>>(), expected);
    let above = |id: &RecordId| (0..3).find(|step| (0..CHAINS).any(|chain| id_of(chain, 2 - step) == *id)).unwrap();
    assert!(gone.is_sorted_by_key(|id| (above(id), *id)), "{gone:?}");
    assert_eq!(promised.into_iter().filter(|id| *id != id_of(300, 0)).collect::<Vec<_>>(), gone);
    drop((held, late));
}

#[test]
fn a69_the_oldest_and_least_used_goes_first() {
    let rig = Rig::new();
    // By rank: never (1), 9 h (2), 5 h (3), 1 h (4) of 4; 0 uses (1), 1 (2), 50 (3) of 3.
    let never = rig.record(1, 10, Parents::None);
    let old_and_busy = rig.record(2, 10, Parents::None);
    let middling = rig.record(3, 10, Parents::None);
    let young = rig.record(4, 10, Parents::None);
    rig.used(old_and_busy, 9 * HOUR, 50);
    rig.used(middling, 5 * HOUR, 1);
    rig.used(young, HOUR, 1);
    // 0.58, 1.5, 1.42, 1.67
    assert_eq!(prune(&rig, &[keep(1)]), [never, middling, old_and_busy, young]);
}

#[test]
fn a69_of_equal_scores_the_older_record_goes_first_then_the_lower_id() {
    let rig = Rig::new();
    let newer = rig.put(1, |row| row.created_at = stamp_before(HOUR));
    // With the highest ID.
    let older = rig.put(3, |row| row.created_at = stamp_before(2 * HOUR));
    let mut same = [rig.put(2, |row| row.created_at = stamp_before(HOUR)), newer];
    same.sort();
    assert_eq!(prune(&rig, &[all()]), [older, same[0], same[1]]);
}

/// What operators read; its example is computed here.
const GUIDE: &str = include_str!("../../../docs/space.md");

#[test]
fn a_young_record_is_charged_with_the_old_ones_that_it_keeps() {
    let rig = Rig::new();
    let made = |name, megabytes: u64, seconds, parents, hours: u32| {
        let id = rig.record(name, megabytes * MB, parents);
        rig.change(id, |row| row.took = Some(Duration::from_secs(seconds)));
        rig.used(id, hours * HOUR, 1);
        id
    };
    let base = made(1, 4000, 20, Parents::None, 90);
    let app = made(2, 1, 1, Parents::Layer(base), 1);
    let others = [(3, 30), (4, 20), (5, 10)].map(|(name, hours)| made(name, 10, 60, Parents::None, hours));
    let rule = [keep(25 * MB)];
    let (judged, _) = judge(&rig, &rule);
    let score = |id| judged.iter().find(|judged| judged.usage.id == id).unwrap().score.unwrap();
    for (name, id, stands_on, used, size, took, charged) in [
        ("base", base, "–", "90 hours", "4000 MB", "20 s", "4000 MB, 20 s"),
        ("app", app, "base", "1 hour", "1 MB", "1 s", "4001 MB, 21 s"),
        ("x", others[0], "–", "30 hours", "10 MB", "60 s", "10 MB, 60 s"),
        ("y", others[1], "–", "20 hours", "10 MB", "60 s", "10 MB, 60 s"),
        ("z", others[2], "–", "10 hours", "10 MB", "60 s", "10 MB, 60 s"),
    ] {
        let line =
            format!("\n| {name} | {stands_on} | {used} ago | {size} | {took} | {charged} | {:.2} |\n", score(id));
        assert!(GUIDE.contains(&line), "{line}");
    }
    // By itself, app would be dear, and outlive y.
    assert_eq!(prune(&rig, &rule), [others[0], app, base]);
    assert!(GUIDE.contains("x goes first, then app and with it base"));
}

#[test]
fn what_many_stand_on_is_charged_to_all_of_them_and_to_none_if_one_stays() {
    let rig = Rig::new();
    let base = rig.record(1, 1000 * MB, Parents::None);
    let cheap = |row: &mut plies_cache::RecordRow| row.took = Some(Duration::from_secs(1));
    rig.change(base, cheap);
    let two = [2, 3].map(|name| rig.record(name, MB, Parents::Layer(base)));
    let alone = rig.record(4, 200 * MB, Parents::None);
    for id in [two[0], two[1], alone] {
        rig.change(id, cheap);
    }
    // 501 MB in 1.5 s are 3 ns a byte, 200 MB in 1 s are 5.
    let score = |id| judge(&rig, &[keep(2000 * MB)]).0.into_iter().find(|judged| judged.usage.id == id).unwrap().score;
    assert!(score(two[0]) < score(alone), "{:?}, {:?}", score(two[0]), score(alone));
    assert_eq!(score(two[0]), score(two[1]));
    // Now base stays whatever goes: 1 MB in 1 s are 1000.
    rig.change(two[1], |row| row.pinned = true);
    assert!(score(two[0]) > score(alone), "{:?}, {:?}", score(two[0]), score(alone));
    assert_eq!((score(two[1]), score(base)), (None, None), "it is not their turn that they wait for");
}

#[test]
fn how_long_a_step_took_is_kept_with_its_record() {
    let rig = Rig::new();
    let took = |id| rig.row(id).took;
    let step = rig.cache.create(None, &by()).unwrap();
    rig.clock.fetch_add(5, Ordering::SeqCst);
    let sealed = step.seal(&[], None).unwrap();
    assert_eq!(took(sealed.id()), Some(Duration::from_secs(5)));
    let step = rig.cache.create(Some(&sealed), &by()).unwrap();
    rig.clock.fetch_add(3, Ordering::SeqCst);
    let committed = step.commit().unwrap();
    rig.clock.fetch_add(60, Ordering::SeqCst);
    committed.finalize().unwrap();
    assert_eq!(took(committed.id()), Some(Duration::from_secs(3)), "that it was used later is no part of it");
}

#[test]
fn a_report_tells_what_is_used_and_what_is_in_use() {
    let images = Arc::new(Images { has: vec![vec![diff_id(3)]], ..Images::default() });
    let rig = Rig::with_checker(Some(images));
    let below = rig.record(1, 100, Parents::None);
    let held = rig.record(2, 20, Parents::Layer(below));
    let shared = rig.record(3, 7, Parents::None);
    rig.record(4, 3, Parents::None);
    let refs = [held, shared].map(|id| rig.cache.get(id, &by()).unwrap());
    let report = try_prune(&rig, &[keep(1)]).unwrap().1;
    assert_eq!((report.used_bytes, report.in_use_bytes, report.removed_count), (120, 120, 1));
    drop(refs);
    assert_eq!(judge(&rig, &[keep(121)]).1.in_use_bytes, 0);
}

#[test]
fn an_earlier_rule_counts_towards_the_free_space_that_a_later_one_wants() {
    let rig = Rig::new();
    let ids: Vec<_> = (1..5).map(|name| rig.record(name, 10 * MB, Parents::None)).collect();
    for (at, id) in ids.iter().enumerate() {
        rig.used(*id, (20 - at as u32) * HOUR, 1);
    }
    let stat = rustix::fs::statvfs(rig.root()).unwrap();
    let free = stat.f_bavail * stat.f_frsize;
    // 15 MB are missing, give or take what others do meanwhile: two records of the four, not four.
    let rule = PruneOptions { min_free_space_bytes: free + 15 * MB, ..PruneOptions::default() };
    let going = judge(&rig, &[rule.clone(), rule.clone(), rule]).1.removed_count;
    assert!((1..=3).contains(&going), "{going}");
    // Enough is free.
    let enough = PruneOptions { min_free_space_bytes: 1, ..PruneOptions::default() };
    assert_eq!(prune(&rig, &[enough]), []);
}

#[test]
fn two_records_with_one_layer_free_it_only_together() {
    let rig = Rig::new();
    let common = layer(&rig.store, 100, Some(diff_id(99)));
    let share = |name| rig.put(name, |row| row.state = State::Sealed { layer: Some(common) });
    let (a, b) = (share(1), share(2));
    rig.used(a, 9 * HOUR, 1);
    rig.used(b, HOUR, 1);
    let (judged, report) = judge(&rig, &[keep(100)]);
    assert_eq!((report.before_bytes, report.freed_bytes), (100, 100));
    assert_eq!((judged[0].usage.id, judged[0].freed_bytes, judged[1].freed_bytes), (a, 0, 100));
    // The first alone frees nothing, so it is not enough.
    assert_eq!(prune(&rig, &[keep(100)]), [a, b]);
}

#[test]
fn damaged_rows_and_what_dead_processes_left_are_removed_like_others() {
    let rig = Rig::new();
    let base = rig.record(1, 10, Parents::None);
    let garbage = rig.record(2, 10, Parents::Layer(base));
    rig.store.write(|tx| tx.put(&RECORDS_AS_NUMBERS, &garbage, &u64::MAX)).unwrap();
    // By itself it would go last.
    rig.used(garbage, HOUR, 9);
    rig.store.write(|tx| tx.put(&RECORDS_TOO_NEW, &id(3), &TooNew(1))).unwrap();
    rig.store.write(|tx| tx.put(&RECORDS_BY_TEXT, &"no id".to_owned(), &1)).unwrap();
    let orphan = rig.record(4, 10, Parents::Layer(id(98)));
    let lease = rig.store.lease(LeaseOptions::process("test")).unwrap();
    let active = rig.store.snapshots().prepare(None, &lease, ActiveOptions { volatile: true }).unwrap();
    lease.release().unwrap();
    let leftover = rig.put(5, |row| row.state = State::Mutable { active, committed_as: None });
    let planned = fates(&rig, &[PruneOptions::default()]);
    let gone = prune(&rig, &[PruneOptions::default()]);
    assert_eq!(gone.iter().copied().collect::<BTreeSet<_>>(), BTreeSet::from([base, garbage, id(3), orphan, leftover]));
    assert!(gone.iter().all(|id| planned[id] == Fate::Goes { rule: 0 }));
    let at = |wanted| gone.iter().position(|id| *id == wanted).unwrap();
    assert!(at(garbage) < at(base), "what stands on it goes first, though its row does not say so");
    assert!(rig.ids().is_empty());
    // Nothing is left of what they held.
    assert_eq!(std::fs::read_dir(rig.root().join("layers")).unwrap().count(), 1);
}

#[test]
fn what_is_pinned_or_used_after_it_was_looked_at_stays() {
    let rig = Rig::new();
    // Two batches: what happens while the first is told, the second sees.
    (0..200).for_each(|name| _ = rig.put(name, |_| ()));
    let order: Vec<_> = judge(&rig, &[all()]).0.into_iter().map(|judged| judged.usage.id).collect();
    let (pinned, used, held) = (order[199], order[198], order[197]);
    let mut refs = Vec::new();
    let report = rig
        .control
        .prune(
            &[all()],
            &mut |_| {
                if refs.is_empty() {
                    rig.cache.pin(pinned, true).unwrap();
                    rig.cache.get(used, &by()).unwrap().release().unwrap();
                    refs.push(rig.cache.get(held, &by()).unwrap());
                }
            },
            &Cancel::new(),
        )
        .unwrap();
    assert_eq!((report.removed_count, report.kept_count), (197, 3));
    assert_eq!(rig.ids().into_iter().collect::<BTreeSet<_>>(), BTreeSet::from([pinned, used, held]));
}

#[test]
fn gets_and_prunes_at_once_never_lose_what_is_held() {
    let rig = Rig::new();
    let base = rig.put(250, |row| row.pinned = true);
    for name in 0..120 {
        rig.put(name, |row| row.parents = Parents::Layer(base));
    }
    let stop = AtomicBool::new(false);
    let kept = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for worker in 0..3u8 {
            let (rig, stop, kept) = (&rig, &stop, &kept);
            scope.spawn(move || {
                let mut name = worker;
                while !stop.load(Ordering::SeqCst) {
                    name = (name + 7) % 120;
                    match rig.cache.get(id(name), &by()) {
                        Ok(held) => {
                            assert_eq!(held.row().unwrap().parents, Parents::Layer(base), "its row is there");
                            if name % 5 == 0 {
                                kept.lock().unwrap().push(held);
                            } else {
                                held.release().unwrap();
                            }
                        }
                        Err(error) => assert!(error.is_not_found(), "{error}"),
                    }
                }
            });
        }
        for _ in 0..5 {
            rig.control.prune(&[all()], &mut |_| (), &Cancel::new()).unwrap();
        }
        stop.store(true, Ordering::SeqCst);
    });
    let kept = kept.into_inner().unwrap();
    for held in &kept {
        held.row().unwrap();
    }
    drop(kept);
    assert!(rig.manager.held().is_empty());
    assert!(rig.warnings.lock().unwrap().is_empty());
}

#[derive(Debug, Clone)]
struct Plan {
    bytes: u64,
    layer: u8,
    parents: Vec<usize>,
    kind: usize,
    pinned: bool,
    held: bool,
    used_hours_ago: Option<u32>,
    count: u64,
    took_seconds: Option<u64>,
}

fn plans() -> impl Strategy<Value = Vec<Plan>> {
    let plan =
        (
            0u64..4,
            0u8..12,
            proptest::collection::vec(0usize..40, 0..3),
            0usize..8,
            proptest::bool::weighted(0.07),
            proptest::bool::weighted(0.1),
            proptest::option::of(1u32..6),
            0u64..4,
            proptest::option::of(0u64..9),
        )
            .prop_map(|(bytes, layer, parents, kind, pinned, held, used_hours_ago, count, took_seconds)| {
                Plan { bytes, layer, parents, kind, pinned, held, used_hours_ago, count, took_seconds }
            });
    proptest::collection::vec(plan, 1..40)
}

fn rules() -> impl Strategy<Value = Vec<PruneOptions>> {
    let filters = proptest::sample::select(vec![vec![], vec![], vec!["type==regular"], vec!["until=3h", "size>=200B"]]);
    let rule =
        (any::<bool>(), filters, 0u64..5, 0u64..1500, 0u64..400).prop_map(|(all, filters, hours, max, reserved)| {
            PruneOptions {
                all,
                filters: filters.into_iter().map(str::to_owned).collect(),
                keep_duration: hours as u32 * HOUR,
                max_used_space_bytes: if max % 3 == 0 { 0 } else { max },
                reserved_space_bytes: if reserved % 2 == 0 { 0 } else { reserved },
                min_free_space_bytes: 0,
            }
        });
    proptest::collection::vec(rule, 1..3)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn nothing_goes_that_is_needed_and_a_dry_run_tells_the_truth(plans in plans(), rules in rules()) {
        let rig = Rig::new();
        let mut layers = BTreeMap::new();
        for (at, plan) in plans.iter().enumerate() {
            let mut below: Vec<_> = plan.parents.iter().filter(|_| at > 0).map(|of| id((of % at) as u8)).collect();
            below.dedup();
            let made = *layers.entry((plan.layer, plan.bytes)).or_insert_with(|| {
                (plan.bytes > 0).then(|| layer(&rig.store, plan.bytes * 100, None))
            });
            let id = rig.put(at as u8, |row| {
                row.state = State::Sealed { layer: made };
                row.parents = match below.as_slice() {
                    [] => Parents::None,
                    [one] => Parents::Layer(*one),
                    more => Parents::Merge(more.to_vec()),
                };
                row.pinned = plan.pinned;
                row.took = plan.took_seconds.map(Duration::from_secs);
                row.record_type = RecordType::NAMES[plan.kind % 6].0;
            });
            if let Some(hours) = plan.used_hours_ago {
                rig.used(id, hours * HOUR, plan.count);
            }
        }
        let held: Vec<_> = (0..plans.len())
            .filter(|at| plans[*at].held)
            .map(|at| rig.cache.get(id(at as u8), &RecordOptions { keep_last_used: true, ..by() }).unwrap())
            .collect();
        let rows: BTreeMap<_, _> = rig.du().into_iter().map(|record| (record.id, record)).collect();

        let (judged, promised) = judge(&rig, &rules);
        prop_assert_eq!(rig.ids().len(), plans.len(), "a dry run touches nothing");
        prop_assert_eq!(judged.len(), plans.len());
        let (removed, mut report) = try_prune(&rig, &rules).unwrap();
        report.collected = None;
        prop_assert_eq!(&report, &promised);
        let going: Vec<_> = judged
            .iter()
            .filter_map(|judged| match judged.fate {
                Fate::Goes { rule } => Some((judged.usage.id, rule, judged.freed_bytes)),
                Fate::Stays(_) => None,
            })
            .collect();
        let went: Vec<_> =
            removed.iter().map(|record| (record.usage.id, record.rule, record.freed_bytes)).collect();
        prop_assert_eq!(going, went);
        // Whoever goes right after one that does not stand on it could have gone before.
        for pair in judged.windows(2) {
            let (first, second) = (&pair[0], &pair[1]);
            if first.fate == second.fate
                && matches!(first.fate, Fate::Goes { .. })
                && !first.usage.parents.contains(&second.usage.id)
            {
                prop_assert!(first.score <= second.score, "{:?} before {:?}", first, second);
            }
        }

        let staying: BTreeSet<_> = rig.ids().into_iter().collect();
        let gone: BTreeSet<_> = removed.iter().map(|record| record.usage.id).collect();
        prop_assert!(staying.is_disjoint(&gone));
        prop_assert_eq!(staying.len() + gone.len(), plans.len());
        for id in &staying {
            prop_assert!(rows[id].parents.iter().all(|parent| staying.contains(parent)), "{} lost a parent", id);
        }
        for id in &gone {
            let row = &rows[id];
            prop_assert!(!row.in_use && !row.pinned, "{:?}", row);
        }
        // What is left costs what was said.
        let after = rig.control.disk_usage(&Default::default()).unwrap().totals;
        prop_assert_eq!(after.total_bytes, report.before_bytes - report.freed_bytes);
        // By the last rule, either enough is gone or nothing more may go.
        let last = rules.last().unwrap();
        let fine = match effective_keep(last, report.before_bytes, 0) {
            Cap::Bytes(keep) => after.total_bytes < keep,
            Cap::Off | Cap::Everything => false,
        };
        let free: Vec<_> = judged
            .iter()
            .filter(|judged| judged.fate == Fate::Stays(Reason::UnderCap))
            .map(|judged| judged.usage.id)
            .collect();
        prop_assert!(fine || free.is_empty(), "{:?} could go", free);
        for judged in judged.iter().filter(|judged| judged.fate == Fate::Stays(Reason::HasChildren)) {
            let child = staying.iter().any(|id| rows[id].parents.contains(&judged.usage.id));
            prop_assert!(child, "{} stays for a child that does not", judged.usage.id);
        }
        // A second run finds nothing more.
        prop_assert_eq!(try_prune(&rig, &rules[rules.len() - 1..]).unwrap().1.removed_count, 0);
        drop(held);
    }
}

const ROOT: &str = "PLIES_TEST_PRUNE_ROOT";

/// The child: prunes all there is, and says what went. Does nothing unless the parent started it.
#[test]
fn prune_child() {
    let Ok(root) = std::env::var(ROOT) else { return };
    let store = open_store(root.as_ref(), &Arc::new((NOW + 1).into()));
    let manager = manager(store, None, Arc::new(|_| {}));
    let say = |line: String| {
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "{line}");
        let _ = out.flush();
    };
    say("begin".into());
    let removed = &mut |record: &PrunedRecord| say(format!("gone {}", record.usage.id));
    manager.controller().prune(&[all()], removed, &Cancel::new()).unwrap();
    say("done".into());
}

#[test]
fn a62_a68_killed_anywhere_every_record_is_whole_or_gone() {
    for round in 0..12 {
        let (root, _dir) = {
            let rig = Rig::new();
            let mut below = Parents::None;
            for name in 0..240 {
                // Chains of eight, each with a layer here and there.
                let parents = if name % 8 == 0 { Parents::None } else { below };
                let id = match name % 4 {
                    0 => rig.record(name, 10, parents),
                    _ => rig.put(name, |row| row.parents = parents),
                };
                below = Parents::Layer(id);
            }
            let root = rig.root();
            drop((rig.cache, rig.control, rig.manager));
            rig.store.close().unwrap();
            (root, rig.dir)
        };
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "prune_child", "--nocapture", "--test-threads=1"])
            .env(ROOT, &root)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        assert!(lines.by_ref().any(|line| line.ends_with("begin")));
        let mut gone: Vec<String> = lines.by_ref().take(round * 23).collect();
        child.kill().unwrap();
        gone.extend(lines);
        child.wait().unwrap();

        let store = open_store(&root, &Arc::new((NOW + 2).into()));
        let manager = manager(store.clone(), None, Arc::new(|error| panic!("{error}")));
        let left = manager.controller().disk_usage(&Default::default()).unwrap();
        for record in &left.records {
            assert_eq!(record.error, None, "round {round}: {record:?}");
            let held = manager.accessor().get(record.id, &by()).unwrap();
            let parents = held.row().unwrap().parents.ids();
            store
                .read(|rows| {
                    for parent in &parents {
                        assert!(rows.contains(&RECORDS, parent)?, "round {round}: {record:?}");
                        assert!(rows.contains(&CHILDREN, &(*parent, record.id))?, "round {round}: {record:?}");
                    }
                    for resource in held_by(rows, &owner(record.id))? {
                        assert!(rows.has(resource)?, "round {round}: {record:?}");
                    }
                    Ok::<_, plies_store::CatalogueError>(())
                })
                .unwrap();
        }
        let left: BTreeSet<String> = left.records.iter().map(|record| record.id.to_string()).collect();
        for line in gone.iter().filter_map(|line| line.strip_prefix("gone ")) {
            assert!(!left.contains(line), "round {round}: {line} was said to be gone");
        }
        let found = store.check(&plies_store::CheckOptions::new(plies_store::Depth::Graph)).unwrap().found;
        assert!(found.is_empty(), "round {round}: {found:#?}");
        // And the rest goes as well.
        manager.controller().prune(&[all()], &mut |_| (), &Cancel::new()).unwrap();
        assert_eq!(manager.controller().disk_usage(&Default::default()).unwrap().records.len(), 0);
        assert!(store.gc(plies_store::GcMode::DryRun).unwrap().collected.is_empty());
    }
}
