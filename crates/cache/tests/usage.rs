//! Disk usage of the build cache, statement by statement.
#![allow(clippy::unwrap_used)]

mod common_space;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common_space::*;
use plies_cache::{
    CacheError, Parents, RecordId, RecordOptions, RecordType, SharedChecker, State, Usage, UsageOptions,
};
use plies_oci::DiffId;
use plies_store::{ActiveOptions, Attach, LeaseOptions, Owner, Rows as _, Table};

fn usage(rig: &Rig, filters: &[&str]) -> Usage {
    let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
    rig.control.disk_usage(&UsageOptions { filters, ..UsageOptions::default() }).unwrap()
}

fn listed(rig: &Rig, filters: &[&str]) -> Vec<RecordId> {
    let mut ids: Vec<_> = usage(rig, filters).records.iter().map(|record| record.id).collect();
    ids.sort();
    ids
}

fn sorted(ids: &[RecordId]) -> Vec<RecordId> {
    let mut ids = ids.to_vec();
    ids.sort();
    ids
}

fn retained() -> RecordOptions {
    RecordOptions { retain: Some(true), ..RecordOptions::by("test") }
}

/// A mutable record with a file in it, and its ref.
fn mutable(rig: &Rig, options: &RecordOptions) -> plies_cache::MutableRef {
    let made = rig.cache.create(None, options).unwrap();
    let mounted = made.mount(Attach::Detached).unwrap();
    std::fs::write(fd_path(&mounted.root()).join("f"), vec![b'x'; 20_000]).unwrap();
    mounted.unmount().unwrap();
    made
}

#[test]
fn a71_a_bad_filter_is_an_error_and_good_ones_apply_to_finished_rows() {
    let rig = Rig::new();
    let (small, big) = (rig.record(1, 4096, Parents::None), rig.record(2, 20_000_000, Parents::None));
    let bad = UsageOptions { filters: vec!["id=x".into()], ..UsageOptions::default() };
    let error = rig.control.disk_usage(&bad).unwrap_err();
    assert!(error.to_string().starts_with("failed to parse diskusage filters \"id=x\": at character 3"), "{error}");
    // Sizes and the state of use are known by then.
    assert_eq!(listed(&rig, &["size>=10MB"]), [big]);
    let held = rig.cache.get(small, &RecordOptions::by("test")).unwrap();
    assert_eq!(listed(&rig, &["inuse"]), [small]);
    assert_eq!(listed(&rig, &["inuse", "size>=10MB"]), sorted(&[small, big]));
    assert_eq!(listed(&rig, &["inuse,size>=10MB"]), []);
    held.release().unwrap();
}

#[test]
fn a80_every_field_of_a_record_can_be_filtered_by() {
    let rig = Rig::new();
    let base = rig.put(1, |row| row.description = "pulled from example.com".into());
    let other = rig.put(2, |row| {
        row.record_type = RecordType::CacheMount;
        row.pinned = true;
        row.created_at = stamp_before(Duration::from_secs(60));
    });
    let child = rig.put(3, |row| row.parents = Parents::Merge(vec![base, other]));
    let all = [base, other, child];
    rig.used(child, 2 * HOUR, 1);
    let upper = mutable(&rig, &retained());
    let writable = upper.id();
    upper.release().unwrap();
    for (filter, expected) in [
        (format!("id=={base}"), vec![base]),
        (format!("parents=={base};{other}"), vec![child]),
        (format!("parents~={other}"), vec![child]),
        ("description~=example\\.com".into(), vec![base]),
        ("type==exec.cachemount".into(), vec![other]),
        ("type==regular,immutable".into(), vec![base, child]),
        ("mutable".into(), vec![writable]),
        ("immutable".into(), all.to_vec()),
        ("shared".into(), vec![]),
        ("pinned".into(), vec![other]),
        ("inuse".into(), vec![]),
        // Neither used nor made in that time.
        ("until=3h".into(), vec![base]),
        ("until=1h,immutable".into(), vec![base, child]),
        ("labels.x==y".into(), vec![]),
    ] {
        assert_eq!(listed(&rig, &[&filter]), sorted(&expected), "{filter}");
    }
    assert_eq!(listed(&rig, &["private"]).len(), 4);
}

#[test]
fn a72_of_a_committed_pair_one_shows() {
    let rig = Rig::new();
    let made = mutable(&rig, &retained());
    let writable = made.id();
    assert_eq!(listed(&rig, &[]), [writable]);
    let committed = made.commit().unwrap();
    let immutable = committed.id();
    assert_eq!(rig.ids().len(), 2);
    // The immutable one while it is held, with the size of what it shares.
    assert_eq!(listed(&rig, &[]), [immutable]);
    let row = rig.row(immutable);
    assert!(!row.mutable && row.in_use && row.size_bytes >= 20_000, "{row:?}");
    assert_eq!(row.unique_bytes, row.size_bytes, "the two of a pair are one");
    committed.release().unwrap();
    assert_eq!(listed(&rig, &[]), [writable]);
    let after = rig.row(writable);
    assert!(after.mutable && !after.in_use && after.size_bytes == row.size_bytes, "{after:?}");
    assert_eq!(rig.ids().len(), 2);
}

#[test]
fn a73_a_row_says_all_there_is() {
    let rig = Rig::new();
    let base = rig.record(1, 1000, Parents::None);
    let layer = layer(&rig.store, 500, Some(diff_id(2)));
    let id = rig.put(2, |row| {
        row.state = State::Sealed { layer: Some(layer) };
        row.parents = Parents::Layer(base);
        row.description = "RUN make".into();
        row.record_type = RecordType::GitCheckout;
        row.pinned = true;
        row.created_at = stamp_before(5 * HOUR);
    });
    rig.used(id, 2 * HOUR, 7);
    let row = rig.row(id);
    assert_eq!((row.size_bytes, row.unique_bytes, row.charged_bytes), (500, 500, 500));
    assert_eq!((row.parents.as_slice(), row.description.as_str()), ([base].as_slice(), "RUN make"));
    assert_eq!((row.created_at, row.last_used_at), (Some(stamp_before(5 * HOUR)), Some(stamp_before(2 * HOUR))));
    assert_eq!((row.usage_count, row.record_type, row.pinned), (7, RecordType::GitCheckout, true));
    assert_eq!((row.mutable, row.in_use, row.shared, row.error), (false, false, false, None));
    assert_eq!(rig.row(base).record_type, RecordType::Regular);
    // Uses that were not written down yet count.
    rig.cache.get(id, &RecordOptions::by("test")).unwrap().release().unwrap();
    let row = rig.row(id);
    assert_eq!((row.usage_count, row.last_used_at), (8, Some(stamp_before(Duration::ZERO))));
}

#[test]
fn a73_b12_a_mutable_that_is_written_to_costs_nothing_yet() {
    let rig = Rig::new();
    let made = mutable(&rig, &retained());
    let id = made.id();
    // Measured once, and still none of this.
    rig.store.snapshots().scan_actives(|_| std::ops::ControlFlow::Continue(())).unwrap();
    assert_eq!(rig.row(id).size_bytes, 0);
    made.release().unwrap();
    assert!(rig.row(id).size_bytes >= 20_000);
    let again = rig.cache.get_mutable(id, &retained()).unwrap();
    let row = rig.row(id);
    assert!(row.size_bytes == 0 && row.in_use && row.mutable, "{row:?}");
    again.release().unwrap();
}

#[test]
fn a74_what_idle_records_alone_stand_on_is_not_in_use() {
    let rig = Rig::new();
    let a = rig.record(1, 10, Parents::None);
    let b = rig.record(2, 10, Parents::Layer(a));
    let c = rig.record(3, 10, Parents::Layer(b));
    let other = rig.record(4, 10, Parents::Layer(a));
    let merge = rig.put(5, |row| {
        row.state = State::Composed;
        row.parents = Parents::Merge(vec![c, other]);
    });
    assert_eq!(listed(&rig, &["inuse"]), []);
    let held = rig.cache.get(b, &RecordOptions::by("test")).unwrap();
    assert_eq!(listed(&rig, &["inuse"]), sorted(&[a, b]));
    let top = rig.cache.get(merge, &RecordOptions::by("test")).unwrap();
    assert_eq!(listed(&rig, &["inuse"]), sorted(&[a, b, c, other, merge]));
    // A second ref counts no more than the first, and its end no less.
    let twice = held.clone();
    top.release().unwrap();
    held.release().unwrap();
    assert_eq!(listed(&rig, &["inuse"]), sorted(&[a, b]));
    twice.release().unwrap();
    assert_eq!(listed(&rig, &["inuse"]), []);
}

#[test]
fn a74_a_held_pair_keeps_its_parents_in_use_whichever_is_held() {
    let rig = Rig::new();
    let base = rig.record(1, 10, Parents::None);
    let held = rig.cache.get(base, &RecordOptions::by("test")).unwrap();
    let made = rig.cache.create(Some(&held), &retained()).unwrap();
    let writable = made.id();
    held.release().unwrap();
    assert_eq!(listed(&rig, &["inuse"]), sorted(&[base, writable]));
    let committed = made.commit().unwrap();
    assert_eq!(listed(&rig, &["inuse"]), sorted(&[base, committed.id()]));
    committed.release().unwrap();
    assert_eq!(listed(&rig, &["inuse"]), []);
}

#[test]
fn b12_a_parent_that_is_named_twice_is_let_go_once() {
    let rig = Rig::new();
    let a = rig.record(1, 10, Parents::None);
    let diff = rig.put(2, |row| {
        row.state = State::Composed;
        row.parents = Parents::Diff { lower: a, upper: Some(a) };
    });
    assert_eq!(rig.row(diff).parents, [a, a]);
    assert_eq!(listed(&rig, &["inuse"]), []);
    let held = rig.cache.get(a, &RecordOptions::by("test")).unwrap();
    assert_eq!(listed(&rig, &["inuse"]), [a]);
    held.release().unwrap();
    // What was a prefix of an ID is a pattern today.
    let prefix = format!("id~=^{}", &a.to_string()[..6]);
    assert_eq!(listed(&rig, &[&prefix]), [a]);
}

#[test]
fn a75_a_parent_that_is_gone_is_said_and_nothing_else_suffers() {
    let rig = Rig::new();
    let fine = rig.record(1, 10, Parents::None);
    let orphan = rig.record(2, 20, Parents::Layer(id(99)));
    let above = rig.record(3, 30, Parents::Layer(orphan));
    let usage = usage(&rig, &[]);
    assert_eq!(usage.records.len(), 3);
    assert_eq!(usage.totals.total_bytes, 60);
    let error = rig.row(orphan).error.unwrap();
    assert!(error.contains(&id(99).to_string()), "{error}");
    assert_eq!((rig.row(fine).error, rig.row(above).error), (None, None));
}

#[test]
fn a75_damaged_rows_are_listed_and_hide_no_other() {
    let rig = Rig::new();
    let fine = rig.record(1, 10, Parents::None);
    let above = rig.record(2, 20, Parents::Layer(fine));
    let (garbage, too_new, layerless) = (id(3), id(4), rig.record(5, 30, Parents::None));
    rig.store.write(|tx| tx.put(&RECORDS_AS_NUMBERS, &garbage, &u64::MAX)).unwrap();
    rig.store.write(|tx| tx.put(&RECORDS_TOO_NEW, &too_new, &TooNew(1))).unwrap();
    rig.store.write(|tx| tx.put(&RECORDS_BY_TEXT, &"no id".to_owned(), &1)).unwrap();
    let State::Sealed { layer: Some(layer) } =
        rig.store.read(|rows| rows.get(&RECORDS, &layerless)).unwrap().unwrap().state
    else {
        panic!()
    };
    const LAYERS: Table<plies_store::LayerId, u64> = Table::new("layers");
    rig.store.write(|tx| tx.remove(&LAYERS, &layer)).unwrap();
    let usage = usage(&rig, &[]);
    assert_eq!(usage.records.len(), 5);
    assert_eq!(usage.totals.total_bytes, 30);
    assert_eq!(usage.totals.unreadable.len(), 1);
    let row = |id| usage.records.iter().find(|record| record.id == id).unwrap();
    assert!(row(garbage).error.as_ref().unwrap().contains("damaged"), "{:?}", row(garbage));
    assert!(row(too_new).error.as_ref().unwrap().contains("version 200"), "{:?}", row(too_new));
    assert!(row(layerless).error.as_ref().unwrap().contains("layer"), "{:?}", row(layerless));
    assert_eq!((row(garbage).size_bytes, row(too_new).size_bytes, row(layerless).size_bytes), (0, 0, 0));
    assert_eq!((row(fine).size_bytes, row(above).size_bytes, &row(above).error), (10, 20, &None));
}

#[test]
fn a76_sizes_become_known_without_committing_or_holding_anything() {
    let rig = Rig::new();
    let made = mutable(&rig, &retained());
    let id = made.id();
    made.release().unwrap();
    let usage = usage(&rig, &[]);
    assert!(usage.totals.total_bytes >= 20_000, "{usage:?}");
    let row = rig.store.read(|rows| rows.get(&RECORDS, &id)).unwrap().unwrap();
    assert!(matches!(row.state, State::Mutable { committed_as: None, .. }), "{row:?}");
    assert!(rig.manager.held().is_empty());
    assert_eq!(rig.row(id).usage_count, 1, "looking is no use");
}

#[test]
fn a76_an_upper_is_measured_only_when_asked() {
    let rig = Rig::new();
    let made = mutable(&rig, &retained());
    let id = made.id();
    made.release().unwrap();
    let quick = UsageOptions { measure: false, ..UsageOptions::default() };
    assert_eq!(rig.control.disk_usage(&quick).unwrap().totals.total_bytes, 0);
    let measured = rig.row(id).size_bytes;
    assert!(measured >= 20_000);
    assert_eq!(rig.control.disk_usage(&quick).unwrap().totals.total_bytes, measured);
}

#[test]
fn an_upper_is_walked_only_if_it_was_mounted_since_the_last_time() {
    let rig = Rig::new();
    let made = mutable(&rig, &retained());
    let id = made.id();
    made.release().unwrap();
    let measured = rig.row(id).size_bytes;
    let upper = std::fs::read_dir(rig.root().join("active")).unwrap().next().unwrap().unwrap().path().join("fs/g");
    std::fs::write(upper, vec![b'x'; 50_000]).unwrap();
    assert_eq!(rig.row(id).size_bytes, measured, "nobody mounted it");
    let held = rig.cache.get_mutable(id, &retained()).unwrap();
    let mounted = held.mount(Attach::Detached).unwrap();
    let active = rig.store.snapshots();
    let mut actives = Vec::new();
    active
        .scan_actives(|info| {
            actives.push(info.id);
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
    let size = || active.measure(actives[0]).unwrap().size_bytes;
    let first = size();
    assert!(first >= measured + 50_000, "{measured}, then {first}");
    std::fs::write(fd_path(&mounted.root()).join("h"), vec![b'x'; 50_000]).unwrap();
    assert!(size() >= first + 50_000, "it is mounted, and so it is walked again");
    mounted.unmount().unwrap();
    held.release().unwrap();
    let last = rig.row(id).size_bytes;
    assert!(last >= first + 50_000, "{first}, then {last}");
    assert!(!active.active(actives[0]).unwrap().changed);
}

#[test]
fn b13_what_cannot_be_measured_keeps_its_last_size_and_the_others_are_told() {
    let rig = Rig::new();
    let fine = rig.record(1, 10, Parents::None);
    let made = mutable(&rig, &retained());
    let id = made.id();
    made.release().unwrap();
    let measured = rig.row(id).size_bytes;
    for entry in std::fs::read_dir(rig.root().join("active")).unwrap() {
        std::fs::remove_dir_all(entry.unwrap().path()).unwrap();
    }
    let usage = usage(&rig, &[]);
    let size = |id| usage.records.iter().find(|record| record.id == id).unwrap().size_bytes;
    assert_eq!((size(id), size(fine)), (measured, 10));
}

#[test]
fn every_byte_is_counted_once_however_many_records_keep_it() {
    let rig = Rig::new();
    let common = layer(&rig.store, 1000, Some(diff_id(101)));
    let (a, b) = (rig.record(1, 10, Parents::None), rig.record(2, 20, Parents::None));
    // The same layer on two bases, and one blob of two records.
    let digest = blob(&rig.store, "blob");
    let share = |name, parent| {
        rig.put(name, |row| {
            row.state = State::Sealed { layer: Some(common) };
            row.parents = Parents::Layer(parent);
            row.blob = Some(blob_row(digest, diff_id(101)));
        })
    };
    let (on_a, on_b) = (share(3, a), share(4, b));
    let usage = usage(&rig, &[]);
    let row = |id| usage.records.iter().find(|record| record.id == id).unwrap();
    for id in [on_a, on_b] {
        assert_eq!((row(id).size_bytes, row(id).unique_bytes), (1004, 0));
    }
    assert_eq!(row(on_a).charged_bytes + row(on_b).charged_bytes, 1004);
    assert_eq!((usage.totals.total_bytes, usage.totals.unique_bytes), (1034, 30));
    assert_eq!(usage.records.iter().map(|record| record.charged_bytes).sum::<u64>(), 1034);
    // As the store counts it.
    let known: u64 = rig
        .store
        .usage()
        .unwrap()
        .iter()
        .filter(|row| matches!(row.kind, plies_store::UsageKind::Blobs | plies_store::UsageKind::Layers))
        .map(|row| row.size_bytes)
        .sum();
    assert_eq!(known, 1034);
    // In use is what a prune cannot free, though one of its two keepers is idle.
    let held = rig.cache.get(on_a, &RecordOptions::by("test")).unwrap();
    assert_eq!(self::usage(&rig, &[]).totals.in_use_bytes, 1014);
    held.release().unwrap();
    // A filter's sum is that of what it shows.
    let one = self::usage(&rig, &[&format!("id=={on_b}")]).totals;
    assert_eq!((one.records_count, one.total_bytes, one.unique_bytes), (1, 1004, 0));
}

#[test]
fn variants_of_a_blob_and_what_only_a_whole_tree_needs_count_too() {
    let rig = Rig::new();
    let (first, variant) = (blob(&rig.store, "first"), blob(&rig.store, "a variant of it"));
    let own = layer(&rig.store, 100, Some(diff_id(101)));
    let below = rig.record(1, 40, Parents::None);
    let State::Sealed { layer: Some(lowest) } =
        rig.store.read(|rows| rows.get(&RECORDS, &below)).unwrap().unwrap().state
    else {
        panic!()
    };
    let lease = rig.store.lease(LeaseOptions::process("test")).unwrap();
    let snapshot = rig.store.snapshots().ensure(&[lowest, own], &lease).unwrap();
    // As if a fix-up layer had been needed.
    let extra = layer(&rig.store, 7, None);
    rig.store.write(|tx| tx.add_edge(snapshot, extra)).unwrap();
    let above = rig.put(2, |row| {
        row.state = State::Sealed { layer: Some(own) };
        row.parents = Parents::Layer(below);
        row.blob = Some(blob_row(first, diff_id(101)));
        row.snapshot = Some(snapshot);
    });
    rig.store.write(|tx| tx.hold(&Owner::new("record", above), variant)).unwrap();
    assert_eq!(rig.row(above).size_bytes, 100 + 5 + 15 + 7, "the layer below is its parent's");
    assert_eq!(rig.row(below).size_bytes, 40);
    // A record of an older Plies has nothing but a stack.
    let old = rig.put(3, |row| row.state = State::Stack(snapshot));
    rig.store.write(|tx| tx.hold(&Owner::new("record", old), snapshot)).unwrap();
    assert_eq!(rig.row(old).size_bytes, 147);
    assert_eq!(rig.row(old).unique_bytes, 0);
    assert_eq!(usage(&rig, &[]).totals.total_bytes, 167);
    lease.release().unwrap();
}

#[derive(Default)]
struct Images {
    has: Vec<Vec<DiffId>>,
    asked: Mutex<Vec<Vec<DiffId>>>,
}

impl SharedChecker for Images {
    fn exists(&self, _: RecordId, layers: &[DiffId]) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
        self.asked.lock().unwrap().push(layers.to_vec());
        Ok(self.has.iter().any(|image| image == layers))
    }
}

#[test]
fn a70_what_the_checker_knows_is_shared_with_all_below_it() {
    let images = Arc::new(Images { has: vec![vec![diff_id(1), diff_id(2)], vec![diff_id(7)]], ..Images::default() });
    let rig = Rig::with_checker(Some(images.clone()));
    let a = rig.record(1, 10, Parents::None);
    let b = rig.record(2, 10, Parents::Layer(a));
    let c = rig.record(3, 10, Parents::Layer(b));
    let merge = rig.put(4, |row| {
        row.state = State::Composed;
        row.parents = Parents::Merge(vec![a, c]);
    });
    // A diff that was not computed shows its upper's layers; a computed one its own.
    let diff = rig.put(5, |row| {
        row.state = State::Composed;
        row.parents = Parents::Diff { lower: a, upper: Some(b) };
    });
    let computed = rig.put(6, |row| {
        row.state = State::Sealed { layer: Some(layer(&rig.store, 5, Some(diff_id(7)))) };
        row.parents = Parents::Diff { lower: a, upper: Some(c) };
    });
    let unknown = rig.put(8, |row| {
        row.state = State::Sealed { layer: Some(layer(&rig.store, 5, None)) };
        row.parents = Parents::Layer(c);
    });
    assert_eq!(listed(&rig, &["shared"]), sorted(&[a, b, diff, computed, c]));
    assert_eq!(listed(&rig, &["private"]), sorted(&[merge, unknown]));
    let asked = images.asked.lock().unwrap().clone();
    let all = [diff_id(1), diff_id(1), diff_id(2), diff_id(3)];
    assert!(asked.contains(&all.to_vec()), "of a merge, all of its parents': {asked:?}");
    // Layers that are not known yet can be nobody's.
    assert!(asked.iter().all(|layers| !layers.is_empty()));
}

#[test]
fn a70_without_a_checker_nothing_is_shared() {
    let rig = Rig::new();
    rig.record(1, 10, Parents::None);
    assert_eq!(listed(&rig, &["shared"]), []);
}

#[test]
fn a77_a78_options_of_a_record_are_what_du_shows() {
    let rig = Rig::new();
    let options = RecordOptions {
        description: Some("COPY . .".into()),
        record_type: Some(RecordType::LocalSource),
        created_at: Some(stamp_before(9 * HOUR)),
        ..retained()
    };
    let made = rig.cache.create(None, &options).unwrap();
    let row = rig.row(made.id());
    assert_eq!((row.description.as_str(), row.record_type), ("COPY . .", RecordType::LocalSource));
    assert_eq!(row.created_at, Some(stamp_before(9 * HOUR)));
    made.release().unwrap();
    // Options that say nothing change nothing.
    let plain = rig.cache.create(None, &retained()).unwrap();
    let row = rig.row(plain.id());
    assert_eq!((row.record_type, row.created_at), (RecordType::Regular, Some(stamp_before(Duration::ZERO))));
    plain.release().unwrap();
    // A release that is no use leaves the time as it is.
    let base = rig.record(1, 10, Parents::None);
    let quiet = RecordOptions { keep_last_used: true, ..RecordOptions::by("test") };
    rig.cache.get(base, &quiet).unwrap().release().unwrap();
    assert_eq!((rig.row(base).last_used_at, rig.row(base).usage_count), (None, 0));
}

#[test]
fn a79_image_refs_are_added_to_old_records_once_each() {
    let rig = Rig::new();
    let base = rig.record(1, 10, Parents::None);
    for names in [vec!["a"], vec!["a", "b"], vec![]] {
        let options =
            RecordOptions { image_refs: names.into_iter().map(str::to_owned).collect(), ..RecordOptions::by("test") };
        rig.cache.get(base, &options).unwrap().release().unwrap();
    }
    let row = rig.store.read(|rows| rows.get(&RECORDS, &base)).unwrap().unwrap();
    assert_eq!(row.image_refs, ["a", "b"]);
}

#[test]
fn a_dead_process_leaves_no_size_behind_and_its_records_say_so() {
    let rig = Rig::new();
    let lease = rig.store.lease(LeaseOptions::process("test")).unwrap();
    let active = rig.store.snapshots().prepare(None, &lease, ActiveOptions { volatile: true }).unwrap();
    let mutable = rig.put(1, |row| row.state = State::Mutable { active, committed_as: None });
    assert_eq!(rig.row(mutable).error, None);
    // Its directory is no longer known.
    const ACTIVES: Table<plies_store::ActiveId, u64> = Table::new("actives");
    rig.store.write(|tx| tx.remove(&ACTIVES, &active)).unwrap();
    let row = rig.row(mutable);
    assert!(row.size_bytes == 0 && row.error.is_some(), "{row:?}");
    // One that shared the files of a record that is gone.
    let lost = rig.put(2, |row| row.parents = Parents::None);
    rig.change(lost, |row| row.state = State::Shared { mutable: id(77), active });
    assert!(rig.row(lost).error.unwrap().contains(&id(77).to_string()));
    lease.release().unwrap();
}

#[test]
fn a_checker_that_fails_is_an_error() {
    struct Fails;
    impl SharedChecker for Fails {
        fn exists(&self, _: RecordId, _: &[DiffId]) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
            Err("no answer".into())
        }
    }
    let rig = Rig::with_checker(Some(Arc::new(Fails)));
    rig.record(1, 10, Parents::None);
    assert!(matches!(rig.control.disk_usage(&UsageOptions::default()), Err(CacheError::Checker(_))));
}

#[test]
fn what_a_dead_process_had_not_finished_says_so() {
    let rig = Rig::new();
    let lease = rig.store.lease(LeaseOptions::process("test")).unwrap();
    let active = rig.store.snapshots().prepare(None, &lease, ActiveOptions { volatile: true }).unwrap();
    lease.release().unwrap();
    let id = rig.put(1, |row| row.state = State::Mutable { active, committed_as: None });
    assert_eq!(rig.row(id).error, None);
    let (root, clock, _dir) = (rig.root(), rig.clock.clone(), rig.dir);
    drop((rig.cache, rig.control, rig.manager));
    rig.store.close().unwrap();
    // Its row came by without the index that a manager looks into when it opens.
    let store = open_store(&root, &clock);
    let reopened = manager(store, None, Arc::new(|error| panic!("{error}")));
    let row = reopened.controller().disk_usage(&UsageOptions::default()).unwrap().records.remove(0);
    assert_eq!(row.id, id);
    assert!(row.error.unwrap().contains("is gone"));
}
