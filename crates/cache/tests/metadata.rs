//! What is kept with a record: typed fields, values by index, bytes of others, uses.
#![allow(missing_docs, clippy::unwrap_used)]

mod blob_rig;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use blob_rig::{Layer, Rig, Source, built, lazy};
use plies_cache::{Accessor, CacheError, Changes, LAYER_TYPE, RecordId, RecordOptions, RecordType, UseRow, Value};
use plies_store::{Row as _, Rows as _, Stamp, Store, Table};
use proptest::prelude::*;

fn record(cache: &Accessor, options: &RecordOptions) -> RecordId {
    let record = cache.create(None, options).unwrap().commit().unwrap();
    record.finalize().unwrap();
    record.id()
}

fn row(cache: &Accessor, id: RecordId) -> plies_cache::RecordRow {
    cache.get(id, &RecordOptions { keep_last_used: true, ..RecordOptions::default() }).unwrap().row().unwrap()
}

fn uses(store: &Store, id: RecordId) -> Option<UseRow> {
    store.read(|rows| rows.get(&Table::<RecordId, UseRow>::new("cache.uses"), &id)).unwrap()
}

#[test]
fn a77_options_are_what_the_record_is_like() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    for (record_type, name) in RecordType::NAMES {
        let options = RecordOptions {
            description: Some(format!("a {name}")),
            record_type: Some(record_type),
            created_at: Some(Stamp::from_micros(7)),
            retain: Some(true),
            image_refs: vec!["a:1".into()],
            ..RecordOptions::default()
        };
        let open = cache.create(None, &options).unwrap();
        let row = open.row().unwrap();
        assert_eq!((row.description, row.record_type.name()), (format!("a {name}"), name));
        assert_eq!((row.created_at, row.retain), (Stamp::from_micros(7), true));
        assert_eq!(row.image_refs, ["a:1"]);
    }
    let names = ["regular", "internal", "frontend", "source.local", "source.git.checkout", "exec.cachemount"];
    assert_eq!(RecordType::NAMES.map(|(_, name)| name), names);
    let open = cache.create(None, &RecordOptions::default()).unwrap();
    let row = open.row().unwrap();
    assert_eq!((row.description.as_str(), row.record_type, row.retain), ("", RecordType::Regular, false));
}

#[test]
fn a77_a_retained_mutable_record_stays_and_another_goes() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    for retain in [true, false] {
        let options = RecordOptions { retain: Some(retain), ..RecordOptions::default() };
        let open = cache.create(None, &options).unwrap();
        let id = open.id();
        open.release().unwrap();
        assert_eq!(cache.get_mutable(id, &RecordOptions::default()).is_ok(), retain);
    }
    // Policy "default" again: it goes with its next ref.
    let options = RecordOptions { retain: Some(true), ..RecordOptions::default() };
    let id = cache.create(None, &options).unwrap().id();
    cache.update(id, &Changes { retain: Some(false), ..Changes::default() }).unwrap();
    drop(cache.get_mutable(id, &RecordOptions::default()).unwrap());
    assert!(cache.get_mutable(id, &RecordOptions::default()).unwrap_err().is_not_found());
}

#[test]
fn a_lazily_committed_record_follows_its_policy_as_it_is_when_the_last_ref_goes() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    for retain in [true, false] {
        let committed = cache.create(None, &RecordOptions::default()).unwrap().commit().unwrap();
        let id = committed.id();
        cache.update(id, &Changes { retain: Some(true), ..Changes::default() }).unwrap();
        if !retain {
            cache.update(id, &Changes { retain: Some(false), ..Changes::default() }).unwrap();
        }
        drop(committed);
        assert_eq!(cache.get(id, &RecordOptions::default()).is_ok(), retain);
    }
}

#[test]
fn a78_options_are_applied_once_and_creation_time_wins_over_the_clock() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let now = Stamp::from_micros(blob_rig::EPOCH_SECONDS * 1_000_000);
    let id = record(&cache, &RecordOptions { description: Some("first".into()), ..RecordOptions::default() });
    assert_eq!(row(&cache, id).created_at, now);
    rig.advance(Duration::from_secs(60));
    let later = RecordOptions {
        description: Some("second".into()),
        created_at: Some(Stamp::from_micros(7)),
        record_type: Some(RecordType::Internal),
        ..RecordOptions::default()
    };
    let before = row(&cache, id);
    drop(cache.get(id, &later).unwrap());
    assert_eq!(row(&cache, id), before, "an old record stays as it was made");
    // Also one that is found instead of made.
    let layer = Layer::file("f", "text");
    let source = Source::of(&[&layer]);
    let found = lazy(&cache, &layer, None, &source);
    let before = found.row().unwrap();
    let again = RecordOptions { providers: source.providers(&[&layer]), ..later };
    drop(cache.get_by_blob(&layer.descriptor, None, &again).unwrap());
    assert_eq!(found.row().unwrap(), before);
}

#[test]
fn a79_image_refs_are_added_on_every_get_each_once() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let id = record(&cache, &RecordOptions::default());
    let named = |names: &[&str]| RecordOptions {
        image_refs: names.iter().map(|name| (*name).to_owned()).collect(),
        ..RecordOptions::default()
    };
    for names in [&["b:1"][..], &["a:1", "b:1"], &["a:1"], &[]] {
        drop(cache.get(id, &named(names)).unwrap());
    }
    assert_eq!(row(&cache, id).image_refs, ["b:1", "a:1"]);
    // Of a record that somebody holds, which is not read again for a get without names.
    let held = cache.get(id, &RecordOptions::default()).unwrap();
    drop(cache.get(id, &named(&["c:1"])).unwrap());
    assert_eq!(held.row().unwrap().image_refs, ["b:1", "a:1", "c:1"]);
    // Merges are found again, too.
    let [one, two] = ["x", "y"].map(|name| built(&cache, None, name, "text"));
    for name in ["m:1", "m:2", "m:1"] {
        let merge = cache.merge(&[Some(&one), Some(&two)], &named(&[name])).unwrap().unwrap();
        assert!(merge.row().unwrap().image_refs.contains(&name.to_owned()));
    }
    let merge = cache.merge(&[Some(&one), Some(&two)], &RecordOptions::default()).unwrap().unwrap();
    assert_eq!(merge.row().unwrap().image_refs, ["m:1", "m:2"]);
    drop((held, one, two, merge, cache));
    manager.close().unwrap();
    store.close().unwrap();
    let (_store, manager) = rig.open();
    assert_eq!(row(&manager.accessor(), id).image_refs, ["b:1", "a:1", "c:1"]);
}

#[test]
fn image_refs_have_a_limit_and_the_oldest_go() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let id = record(&cache, &RecordOptions::default());
    let names: Vec<String> = (0..100).map(|n| format!("a:{n}")).collect();
    drop(cache.get(id, &RecordOptions { image_refs: names.clone(), ..RecordOptions::default() }).unwrap());
    assert_eq!(row(&cache, id).image_refs, names[36..]);
}

#[test]
fn an_update_changes_all_that_it_names_or_nothing() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let id = record(&cache, &RecordOptions::default());
    let value = |value: &str, index: Option<&str>| Value { value: value.into(), index: index.map(str::to_owned) };
    let changes = Changes {
        description: Some("described".into()),
        record_type: Some(RecordType::LocalSource),
        created_at: Some(Stamp::from_micros(9)),
        values: vec![
            ("k".into(), Some(value("v", Some("i:1")))),
            (LAYER_TYPE.into(), Some(value("windows", None))),
            ("none".into(), None),
        ],
        external: vec![("e".into(), Some(vec![0, 1, 255])), ("none".into(), None)],
        ..Changes::default()
    };
    cache.update(id, &changes).unwrap();
    let row = row(&cache, id);
    assert_eq!((row.description.as_str(), row.record_type), ("described", RecordType::LocalSource));
    assert_eq!(row.created_at, Stamp::from_micros(9));
    let expected = vec![(LAYER_TYPE.to_owned(), value("windows", None)), ("k".to_owned(), value("v", Some("i:1")))];
    assert_eq!(cache.values(id).unwrap(), expected);
    assert_eq!(cache.external(id, "e").unwrap(), Some(vec![0, 1, 255]));
    let open = cache.create(None, &RecordOptions::default()).unwrap();
    let gone = open.id();
    drop(open);
    let refused = cache.update(gone, &changes).unwrap_err();
    assert!(refused.is_not_found());
    assert_eq!(cache.search("i:1").unwrap(), [id]);
    assert!(cache.values(gone).unwrap().is_empty() && cache.external(gone, "e").unwrap().is_none());
    assert!(matches!(cache.set_value(gone, "k", "v", None), Err(CacheError::NotFound { .. })));
    assert!(matches!(cache.set_external(gone, "k", b"v"), Err(CacheError::NotFound { .. })));
}

#[test]
fn a_search_finds_exactly_what_is_under_an_index() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let [a, b] = [(); 2].map(|()| record(&cache, &RecordOptions::default()));
    let sorted = |mut ids: Vec<RecordId>| {
        ids.sort();
        ids
    };
    // Where one index begins another, or has NULs and separators in it, nothing else may turn up.
    let indexes = ["chainid:sha256:12", "chainid:sha256:1", "chainid:", "", "a\0b", "a", "a\0", "a::b"];
    for (at, index) in indexes.iter().enumerate() {
        cache.set_value(if at % 2 == 0 { a } else { b }, &format!("k{at}"), "v", Some(index)).unwrap();
    }
    for (at, index) in indexes.iter().enumerate() {
        assert_eq!(cache.search(index).unwrap(), [if at % 2 == 0 { a } else { b }], "{index:?}");
    }
    assert!(cache.search("chain").unwrap().is_empty());
    // Two values of one record under one index: found once, until the last goes.
    cache.set_value(a, "one", "v", Some("twice")).unwrap();
    cache.set_value(a, "two", "v", Some("twice")).unwrap();
    cache.set_value(b, "one", "v", Some("twice")).unwrap();
    assert_eq!(cache.search("twice").unwrap(), sorted(vec![a, b]));
    assert!(cache.clear_value(a, "one").unwrap());
    assert!(!cache.clear_value(a, "one").unwrap());
    assert_eq!(cache.search("twice").unwrap(), sorted(vec![a, b]));
    cache.set_value(a, "two", "v", Some("elsewhere")).unwrap();
    assert_eq!(cache.search("twice").unwrap(), [b]);
    cache.remove(&[b]).unwrap();
    assert!(cache.search("twice").unwrap().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
    #[test]
    fn values_and_their_index_are_those_of_a_map(
        ops in prop::collection::vec((0..3usize, 0..4u8, prop::option::weighted(0.8, prop::option::of(0..3u8)), any::<bool>()), 1..40),
    ) {
        let Some(rig) = Rig::new() else { return Ok(()) };
        let (_store, manager) = rig.open();
        let cache = manager.accessor();
        let mut ids = [(); 3].map(|()| record(&cache, &RecordOptions::default()));
        let mut model: BTreeMap<(RecordId, u8), Option<u8>> = BTreeMap::new();
        for (at, key, value, remove) in ops {
            let id = ids[at];
            match value {
                // Rarely enough, the whole record goes.
                None if remove && key == 0 => {
                    cache.remove(&[id]).unwrap();
                    model.retain(|(of, _), _| *of != id);
                    ids[at] = record(&cache, &RecordOptions::default());
                }
                None => {
                    let there = cache.clear_value(id, &key.to_string()).unwrap();
                    prop_assert_eq!(there, model.remove(&(id, key)).is_some());
                }
                Some(index) => {
                    let name = index.map(|index| format!("i:{index}"));
                    cache.set_value(id, &key.to_string(), "v", name.as_deref()).unwrap();
                    model.insert((id, key), index);
                }
            }
            for index in 0..3 {
                let expected: BTreeSet<RecordId> =
                    model.iter().filter(|(_, has)| **has == Some(index)).map(|((id, _), _)| *id).collect();
                let found = cache.search(&format!("i:{index}")).unwrap();
                prop_assert_eq!(found, expected.into_iter().collect::<Vec<_>>());
            }
        }
    }
}

#[test]
fn values_and_bytes_go_with_their_record_and_survive_a_restart() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let [stays, goes] = [(); 2].map(|()| record(&cache, &RecordOptions::default()));
    for id in [stays, goes] {
        cache.set_value(id, "k", "v", Some("i")).unwrap();
        cache.set_external(id, "buildkit.contenthash.v0", b"\x00tree").unwrap();
    }
    cache.remove(&[goes]).unwrap();
    drop(cache);
    manager.close().unwrap();
    store.close().unwrap();
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    assert_eq!(cache.search("i").unwrap(), [stays]);
    assert_eq!(cache.external(stays, "buildkit.contenthash.v0").unwrap().as_deref(), Some(&b"\x00tree"[..]));
    assert_eq!(
        (cache.value(goes, "k").unwrap(), cache.external(goes, "buildkit.contenthash.v0").unwrap()),
        (None, None)
    );
}

#[test]
fn a_damaged_value_is_an_error_of_its_own_and_keeps_no_record_from_going() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let [id, other] = [(); 2].map(|()| record(&cache, &RecordOptions::default()));
    for id in [id, other] {
        cache.set_value(id, "k", "v", Some("i")).unwrap();
        cache.set_external(id, "k", b"bytes").unwrap();
    }
    for table in ["cache.values", "cache.external"] {
        // A version that never was.
        store.write(|tx| tx.put(&Table::new(table), &(id, "k".to_owned()), &TooNew).map(drop)).unwrap();
    }
    assert!(cache.value(id, "k").is_err() && cache.external(id, "k").is_err());
    assert_eq!(cache.value(other, "k").unwrap().as_deref(), Some("v"));
    assert_eq!(cache.search("i").unwrap().len(), 2);
    cache.remove(&[id]).unwrap();
    assert_eq!(cache.search("i").unwrap(), [other]);
}

#[derive(serde::Serialize, serde::Deserialize)]
struct TooNew;

impl plies_store::Row for TooNew {
    const VERSION: u8 = 250;
}

#[test]
fn uses_are_counted_late_and_never_lost_by_a_clean_stop() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let id = record(&cache, &RecordOptions::default());
    manager.close().unwrap();
    let before = uses(&store, id).unwrap_or_default();
    let manager = rig.manager(&store);
    let cache_again = manager.accessor();
    for _ in 0..10 {
        rig.advance(Duration::from_secs(1));
        drop(cache_again.get(id, &RecordOptions::default()).unwrap());
    }
    assert_eq!(uses(&store, id).unwrap_or_default(), before, "nothing is written for a use alone");
    // A22: not every get is a use.
    rig.advance(Duration::from_secs(1));
    drop(cache_again.get(id, &RecordOptions { keep_last_used: true, ..RecordOptions::default() }).unwrap());
    manager.close().unwrap();
    let last = Stamp::from_micros((blob_rig::EPOCH_SECONDS + 10) * 1_000_000);
    assert_eq!(uses(&store, id).unwrap(), UseRow { last_used_at: Some(last), count: before.count + 10 });
    drop((cache, cache_again));
    store.close().unwrap();
    assert_eq!(uses(&rig.store(), id).unwrap().count, before.count + 10);
    assert_eq!(UseRow::VERSION, 1);
}

#[test]
fn uses_are_written_in_heaps() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    // More records than are gathered at once.
    let written = |ids: &[RecordId]| ids.iter().filter(|id| uses(&store, **id).is_some()).count();
    let table = Table::<RecordId, plies_cache::RecordRow>::new("cache.records");
    let template = row(&cache, record(&cache, &RecordOptions::default()));
    let ids: Vec<RecordId> = (0..70_000u128).map(|n| RecordId::from_bytes((n << 64).to_be_bytes())).collect();
    store.write(|tx| ids.iter().try_for_each(|id| tx.put(&table, id, &template).map(drop))).unwrap();
    for id in &ids {
        drop(cache.get(*id, &RecordOptions::default()).unwrap());
    }
    assert!((4000..70_000).contains(&written(&ids)), "{} are written", written(&ids));
    manager.close().unwrap();
    assert_eq!(written(&ids), 70_000);
}
