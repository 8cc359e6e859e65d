//! Results and links of steps' keys.
#![allow(missing_docs, clippy::unwrap_used)]

mod blob_rig;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use blob_rig::Rig;
use plies_cache::{Accessor, CacheKey, KeyBuilder, Link, RecordId, RecordOptions, State};
use plies_oci::BlobDigest;
use plies_store::{ActiveOptions, LeaseOptions, Row, Rows as _, SnapshotId, Stamp, Table};
use proptest::prelude::*;
use serde::Serialize;

fn key(name: &str) -> CacheKey {
    KeyBuilder::new("test", 1).bytes(name.as_bytes()).finish()
}

fn link(step: &str) -> Link {
    Link { digest: BlobDigest::of(step.as_bytes()), input: 0, output: 0, selector: String::new() }
}

fn record(cache: &Accessor) -> RecordId {
    let record = cache.create(None, &RecordOptions::default()).unwrap().commit().unwrap();
    record.finalize().unwrap();
    record.id()
}

/// Links from each to the next, by a step of the same name.
fn chain(cache: &Accessor, names: &[&str]) {
    for pair in names.windows(2) {
        cache.add_link(&key(pair[0]), &link("step"), &key(pair[1])).unwrap();
    }
}

fn linked(cache: &Accessor, from: &str, to: &str) -> bool {
    let there = cache.has_link(&key(from), &link("step"), &key(to)).unwrap();
    assert_eq!(there, cache.links(&key(from), &link("step")).unwrap().contains(&key(to)));
    assert_eq!(there, cache.back_links(&key(to)).unwrap().contains(&(key(from), link("step"))));
    there
}

#[test]
fn a_result_appears_and_vanishes_with_its_record() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let (one, other) = (record(&cache), record(&cache));
    cache.add_result(&key("a"), one).unwrap();
    cache.add_result(&key("b"), one).unwrap();
    cache.add_result(&key("b"), other).unwrap();
    assert_eq!(cache.results(&key("a")).unwrap(), [one]);
    let mut keys = vec![key("a"), key("b")];
    keys.sort();
    assert_eq!(cache.keys_of(one).unwrap(), keys);
    assert!(cache.knows_key(&key("a")).unwrap() && !cache.knows_key(&key("c")).unwrap());
    cache.remove(&[one]).unwrap();
    assert!(cache.results(&key("a")).unwrap().is_empty() && cache.keys_of(one).unwrap().is_empty());
    assert_eq!(cache.results(&key("b")).unwrap(), [other]);
    assert!(!cache.knows_key(&key("a")).unwrap());
    drop(cache);
    manager.close().unwrap();
    store.close().unwrap();
    let (_store, manager) = rig.open();
    assert_eq!(manager.accessor().results(&key("b")).unwrap(), [other]);
}

#[test]
fn a_result_of_a_record_that_is_gone_is_refused() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let id = record(&cache);
    cache.remove(&[id]).unwrap();
    assert!(cache.add_result(&key("a"), id).unwrap_err().is_not_found());
    assert!(cache.results(&key("a")).unwrap().is_empty());
}

#[test]
fn the_newest_result_comes_first() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let mut ids: Vec<RecordId> = (0..20).map(|_| record(&cache)).collect();
    for id in &ids {
        rig.advance(Duration::from_millis(1));
        cache.add_result(&key("a"), *id).unwrap();
    }
    ids.reverse();
    assert_eq!(cache.results(&key("a")).unwrap(), ids);
    // Said again, it is new again.
    rig.advance(Duration::from_millis(1));
    cache.add_result(&key("a"), ids[19]).unwrap();
    assert_eq!(cache.results(&key("a")).unwrap()[0], ids[19]);
    cache.remove_result(&key("a"), ids[19]).unwrap();
    assert_eq!(cache.results(&key("a")).unwrap(), ids[..19]);
    assert!(cache.keys_of(ids[19]).unwrap().is_empty());
}

#[test]
fn a_solver_walks_from_a_key_over_links_to_results() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let (old, new, other) = (record(&cache), record(&cache), record(&cache));
    // One step leads to two keys (its content was slow to hash), another to a third.
    cache.add_link(&key("in"), &link("run"), &key("out 1")).unwrap();
    cache.add_link(&key("in"), &link("run"), &key("out 2")).unwrap();
    cache.add_link(&key("in"), &link("copy"), &key("out 3")).unwrap();
    cache.add_result(&key("out 1"), old).unwrap();
    rig.advance(Duration::from_secs(1));
    cache.add_result(&key("out 2"), new).unwrap();
    cache.add_result(&key("out 3"), other).unwrap();
    let found = cache.results_by_link(&key("in"), &link("run")).unwrap();
    assert_eq!(found, [(key("out 2"), new), (key("out 1"), old)]);
    assert_eq!(cache.results_by_link(&key("in"), &link("copy")).unwrap(), [(key("out 3"), other)]);
    assert!(cache.results_by_link(&key("out 1"), &link("run")).unwrap().is_empty());
    // Everything about a link counts.
    let run = link("run");
    for different in [
        Link { input: 1, ..run.clone() },
        Link { output: 1, ..run.clone() },
        Link { selector: "/src".into(), ..run.clone() },
        Link { input: 0, output: 0, selector: " ".into(), ..run.clone() },
    ] {
        assert!(cache.results_by_link(&key("in"), &different).unwrap().is_empty());
        assert!(!cache.has_link(&key("in"), &different, &key("out 1")).unwrap());
        cache.add_link(&key("in"), &different, &key("out 1")).unwrap();
        assert!(cache.back_links(&key("out 1")).unwrap().contains(&(key("in"), different)));
    }
    assert_eq!(cache.back_links(&key("out 1")).unwrap().len(), 5);
}

#[test]
fn dangling_chains_are_swept_back_to_where_something_is_known() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let (early, late) = (record(&cache), record(&cache));
    chain(&cache, &["a", "b", "c", "d", "e"]);
    cache.add_result(&key("b"), early).unwrap();
    cache.add_result(&key("e"), late).unwrap();
    cache.remove(&[late]).unwrap();
    assert!(linked(&cache, "a", "b"), "it leads to a result");
    for (from, to) in [("b", "c"), ("c", "d"), ("d", "e")] {
        assert!(!linked(&cache, from, to), "{from} to {to}");
    }
    cache.remove(&[early]).unwrap();
    assert!(!linked(&cache, "a", "b"));
    assert!(!cache.knows_key(&key("a")).unwrap());
}

#[test]
fn a_result_in_the_middle_of_a_chain_keeps_what_leads_on() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let (middle, end) = (record(&cache), record(&cache));
    chain(&cache, &["a", "b", "c"]);
    cache.add_result(&key("b"), middle).unwrap();
    cache.add_result(&key("c"), end).unwrap();
    cache.remove(&[middle]).unwrap();
    assert!(linked(&cache, "a", "b") && linked(&cache, "b", "c"));
}

#[test]
fn one_side_of_a_diamond_goes_and_the_other_stays() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let (left, bottom) = (record(&cache), record(&cache));
    for pair in [["a", "l"], ["a", "r"], ["l", "z"], ["r", "z"], ["l", "x"]] {
        chain(&cache, &pair);
    }
    cache.add_result(&key("z"), bottom).unwrap();
    cache.add_result(&key("x"), left).unwrap();
    cache.remove(&[left]).unwrap();
    assert!(!linked(&cache, "l", "x"));
    assert!([("a", "l"), ("a", "r"), ("l", "z"), ("r", "z")].iter().all(|(from, to)| linked(&cache, from, to)));
    cache.remove(&[bottom]).unwrap();
    assert!(["a", "l", "r", "z"].iter().all(|name| !cache.knows_key(&key(name)).unwrap()));
}

#[test]
fn cycles_do_not_loop_and_go_too() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let (inside, beside) = (record(&cache), record(&cache));
    chain(&cache, &["in", "a", "b", "c", "a"]);
    chain(&cache, &["self", "self"]);
    chain(&cache, &["c", "beside"]);
    cache.add_result(&key("b"), inside).unwrap();
    cache.add_result(&key("self"), inside).unwrap();
    cache.add_result(&key("beside"), beside).unwrap();
    cache.remove(&[inside]).unwrap();
    assert!(!linked(&cache, "self", "self"));
    assert!(
        [("in", "a"), ("a", "b"), ("b", "c"), ("c", "a"), ("c", "beside")]
            .iter()
            .all(|(from, to)| linked(&cache, from, to))
    );
    cache.remove(&[beside]).unwrap();
    for (from, to) in [("in", "a"), ("a", "b"), ("b", "c"), ("c", "a"), ("c", "beside")] {
        assert!(!linked(&cache, from, to), "{from} to {to}");
    }
}

/// What the store should know, kept in maps.
#[derive(Default, Debug)]
struct Model {
    results: BTreeSet<(u8, usize)>,
    links: BTreeSet<(u8, u8, u8)>,
}

impl Model {
    /// Whether a result can be reached.
    fn lives(&self, key: u8) -> bool {
        let (mut seen, mut pending) = (BTreeSet::from([key]), vec![key]);
        while let Some(key) = pending.pop() {
            if self.results.iter().any(|(of, _)| *of == key) {
                return true;
            }
            let next = self.links.iter().filter(|(from, ..)| *from == key).map(|(.., to)| *to);
            pending.extend(next.filter(|to| seen.insert(*to)).collect::<Vec<_>>());
        }
        false
    }

    /// After `keys` lost a result: what leads to what is dead goes, and what is dead and led there.
    fn sweep(&mut self, keys: Vec<u8>) {
        let mut pending = keys;
        while let Some(key) = pending.pop() {
            if self.lives(key) {
                continue;
            }
            let touching: Vec<_> = self.links.iter().filter(|(f, _, t)| *f == key || *t == key).copied().collect();
            for (from, link, to) in touching {
                self.links.remove(&(from, link, to));
                pending.extend([from, to].into_iter().filter(|other| *other != key));
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Op {
    Result(u8, usize),
    Unresult(u8, usize),
    Link(u8, u8, u8),
    Remove(usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0..8u8, 0..4usize).prop_map(|(key, id)| Op::Result(key, id)),
        1 => (0..8u8, 0..4usize).prop_map(|(key, id)| Op::Unresult(key, id)),
        5 => (0..8u8, 0..2u8, 0..8u8).prop_map(|(from, link, to)| Op::Link(from, link, to)),
        1 => (0..4usize).prop_map(Op::Remove),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn keys_links_and_back_links_are_those_of_the_model(ops in prop::collection::vec(op(), 1..60)) {
        let Some(rig) = Rig::new() else { return Ok(()) };
        let (_store, manager) = rig.open();
        let cache = manager.accessor();
        let name = |key: u8| self::key(&key.to_string());
        let step = |link: u8| self::link(&link.to_string());
        let mut ids = [(); 4].map(|()| record(&cache));
        let mut model = Model::default();
        for op in ops {
            match op {
                Op::Result(key, at) => {
                    cache.add_result(&name(key), ids[at]).unwrap();
                    model.results.insert((key, at));
                }
                Op::Unresult(key, at) => {
                    cache.remove_result(&name(key), ids[at]).unwrap();
                    model.results.remove(&(key, at));
                    model.sweep(vec![key]);
                }
                Op::Link(from, link, to) => {
                    cache.add_link(&name(from), &step(link), &name(to)).unwrap();
                    model.links.insert((from, link, to));
                }
                Op::Remove(at) => {
                    cache.remove(&[ids[at]]).unwrap();
                    ids[at] = record(&cache);
                    let keys = model.results.iter().filter(|(_, of)| *of == at).map(|(key, _)| *key).collect();
                    model.results.retain(|(_, of)| *of != at);
                    model.sweep(keys);
                }
            }
            let mut back: BTreeMap<u8, BTreeSet<(CacheKey, Link)>> = BTreeMap::new();
            for from in 0..8 {
                let results: BTreeSet<RecordId> = cache.results(&name(from)).unwrap().into_iter().collect();
                let expected = model.results.iter().filter(|(key, _)| *key == from).map(|(_, at)| ids[*at]).collect();
                prop_assert_eq!(results, expected);
                for link in 0..2 {
                    let to: BTreeSet<CacheKey> = cache.links(&name(from), &step(link)).unwrap().into_iter().collect();
                    let wanted = |(f, l, _): &&(u8, u8, u8)| (*f, *l) == (from, link);
                    let expected = model.links.iter().filter(wanted).map(|(.., to)| name(*to)).collect();
                    prop_assert_eq!(to, expected);
                }
            }
            for (from, link, to) in &model.links {
                back.entry(*to).or_default().insert((name(*from), step(*link)));
            }
            for to in 0..8 {
                let found: BTreeSet<_> = cache.back_links(&name(to)).unwrap().into_iter().collect();
                prop_assert_eq!(found, back.remove(&to).unwrap_or_default());
            }
        }
    }
}

/// Rows as version 1 wrote them.
#[derive(Serialize, serde::Deserialize)]
struct RecordV1 {
    tree: TreeV1,
    description: String,
    key: Option<CacheKey>,
    created_at: Stamp,
    last_used_at: Stamp,
    usage_count: u64,
}

#[derive(Serialize, serde::Deserialize)]
#[allow(dead_code)]
enum TreeV1 {
    Scratch,
    Immutable([u8; 16]),
    Mutable([u8; 8]),
}

#[derive(Serialize, serde::Deserialize)]
struct KeyV1(RecordId);

impl Row for RecordV1 {
    const VERSION: u8 = 1;
}

impl Row for KeyV1 {
    const VERSION: u8 = 1;
}

const RECORDS_V1: Table<RecordId, RecordV1> = Table::new("cache.records");
const KEYS_V1: Table<CacheKey, KeyV1> = Table::new("cache.keys");

#[test]
fn keys_of_version_1_still_find_their_records() {
    let Some(rig) = Rig::new() else { return };
    let store = rig.store();
    // A tree, as it was kept then.
    let lease = store.lease(LeaseOptions::process("test")).unwrap();
    let active = store.snapshots().prepare(None, &lease, ActiveOptions { volatile: false }).unwrap();
    let mounted = store.snapshots().mount_active(active, plies_store::Attach::InStore).unwrap();
    std::fs::write(mounted.path().unwrap().join("f"), "old").unwrap();
    mounted.unmount().unwrap();
    let layer = store.snapshots().seal(active, &lease).unwrap();
    let snapshot: SnapshotId = store.snapshots().ensure(&[layer], &lease).unwrap();

    let [tree, scratch, gone] = [1, 2, 3].map(|n: u8| RecordId::from_bytes([n; 16]));
    let row = |tree, key: &str| RecordV1 {
        tree,
        description: format!("step {key}"),
        key: Some(self::key(key)),
        created_at: Stamp::from_micros(5),
        last_used_at: Stamp::from_micros(6),
        usage_count: 3,
    };
    store
        .write(|tx| {
            tx.put(&RECORDS_V1, &tree, &row(TreeV1::Immutable(*snapshot.as_bytes()), "tree"))?;
            tx.hold(&plies_store::Owner::new("record", tree), snapshot)?;
            tx.put(&RECORDS_V1, &scratch, &row(TreeV1::Scratch, "scratch"))?;
            tx.put(&KEYS_V1, &key("tree"), &KeyV1(tree))?;
            tx.put(&KEYS_V1, &key("scratch"), &KeyV1(scratch))?;
            // One whose record is gone, and one that nobody can read.
            tx.put(&KEYS_V1, &key("gone"), &KeyV1(gone))?;
            tx.put(&Table::new("cache.keys"), &key("damaged"), &Unreadable)?;
            Ok::<_, plies_store::CatalogueError>(())
        })
        .unwrap();
    lease.release().unwrap();

    for _ in 0..2 {
        // The second time there is nothing to move.
        let manager = rig.manager(&store);
        let cache = manager.accessor();
        assert_eq!(cache.results(&key("tree")).unwrap(), [tree]);
        assert_eq!(cache.results(&key("scratch")).unwrap(), [scratch]);
        assert!(!cache.knows_key(&key("gone")).unwrap() && !cache.knows_key(&key("damaged")).unwrap());
        assert_eq!(cache.keys_of(tree).unwrap(), [key("tree")]);
        assert!(store.read(|rows| rows.all(&KEYS_V1)).unwrap().is_empty());
        let found = cache.get(tree, &RecordOptions::default()).unwrap();
        assert_eq!(found.row().unwrap().state, State::Stack(snapshot));
        assert_eq!(found.row().unwrap().description, "step tree");
        assert_eq!(blob_rig::read_file(&found, "f").as_deref(), Some("old"));
        let empty = cache.get(scratch, &RecordOptions::default()).unwrap();
        assert_eq!(empty.row().unwrap().state, State::Sealed { layer: None });
    }
    let manager = rig.manager(&store);
    manager.accessor().remove(&[tree]).unwrap();
    assert!(manager.accessor().results(&key("tree")).unwrap().is_empty());
}

#[derive(Serialize, serde::Deserialize)]
struct Unreadable;

impl Row for Unreadable {
    const VERSION: u8 = 250;
}
