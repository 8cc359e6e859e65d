//! Files of the test kit's own writer, of Go's library, of a real BuildKit, and broken ones.
#![allow(clippy::unwrap_used)] // the exemption for tests does not see their helpers

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use plies_bolt::{Bolt, BoltError, Bucket, Item};
use plies_oci::ErrorKind;
use plies_testkit::bolt::{self, Node, Tree};
use plies_testkit::{scratch, tools};
use proptest::prelude::*;
use serde_json::Value;

fn walk(bucket: &Bucket<'_>, tree: &mut Tree) -> Result<(), BoltError> {
    let mut last: Option<Vec<u8>> = None;
    bucket.each(|key, item| {
        assert!(last.as_deref().is_none_or(|last| last < key), "keys come in order");
        last = Some(key.to_vec());
        let node = match item {
            Item::Value(value) => Node::Value(value),
            Item::Bucket(inner) => {
                let mut below = Tree::new();
                walk(&inner, &mut below)?;
                Node::Bucket(below)
            }
        };
        tree.insert(key.to_vec(), node);
        Ok(())
    })
}

/// Everything that is in a file.
fn read(path: &Path) -> Result<Tree, BoltError> {
    let bolt = Bolt::open(path)?;
    let mut tree = Tree::new();
    walk(&bolt.root(), &mut tree)?;
    Ok(tree)
}

/// Reads a file that may be anything: no panic, and no more than the file has. Keys may be out of order.
fn survive(path: &Path) -> u64 {
    fn count(bucket: &Bucket<'_>, depth: usize, found: &mut u64) -> Result<(), BoltError> {
        let mut keys = Vec::new();
        bucket.each(|key, item| {
            *found += 1;
            keys.push(key.to_vec());
            match item {
                Item::Bucket(inner) if depth < 64 => count(&inner, depth + 1, found),
                _ => Ok(()),
            }
        })?;
        keys.iter().take(8).try_for_each(|key| bucket.get(key).map(drop))
    }
    let mut found = 0;
    if let Ok(bolt) = Bolt::open(path) {
        drop(count(&bolt.root(), 0, &mut found));
    }
    found
}

fn written(bytes: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    file
}

fn value(bytes: &[u8]) -> Node {
    Node::Value(bytes.to_vec())
}

fn sample() -> Tree {
    let small: Tree = (0..3u8).map(|n| (vec![n], value(&[n; 5]))).collect();
    let large: Tree = (0..500u32).map(|n| (format!("key {n:05}").into_bytes(), value(&[n as u8; 40]))).collect();
    let nested = Tree::from([(b"in".to_vec(), Node::Bucket(large.clone())), (b"small".to_vec(), Node::Bucket(small))]);
    Tree::from([
        (b"buckets".to_vec(), Node::Bucket(nested)),
        (b"empty".to_vec(), Node::Bucket(Tree::new())),
        (b"long".to_vec(), value(&vec![7; 100_000])),
        (b"nothing".to_vec(), value(b"")),
        (b"plain".to_vec(), Node::Bucket(large)),
    ])
}

#[test]
fn all_forms_of_pages_read_back() {
    for page_bytes in [1024, 4096, 16384] {
        for fan in [2, 7, 50] {
            let file = written(&bolt::file(&sample(), page_bytes, fan));
            assert_eq!(read(file.path()).unwrap(), sample(), "pages of {page_bytes}, {fan} elements each");
        }
    }
}

#[test]
fn single_keys_are_found_and_others_are_not() {
    let file = written(&bolt::file(&sample(), 1024, 3));
    let bolt = Bolt::open(file.path()).unwrap();
    let bucket = bolt.root().bucket(&[b"buckets", b"in"]).unwrap().unwrap();
    for n in [0u32, 1, 249, 250, 498, 499] {
        let found = bucket.get(format!("key {n:05}").as_bytes()).unwrap().unwrap();
        assert_eq!(found.value().unwrap(), vec![n as u8; 40]);
    }
    for missing in ["", "key", "key 00001x", "key 99999", "z"] {
        assert!(bucket.get(missing.as_bytes()).unwrap().is_none(), "{missing}");
    }
    assert!(bolt.root().bucket(&[b"long"]).unwrap().is_none(), "a value is no bucket");
    assert!(bolt.root().bucket(&[b"buckets", b"out"]).unwrap().is_none());
}

#[test]
fn of_two_meta_pages_the_newer_whole_one_counts() {
    let bytes = bolt::file(&sample(), 4096, 20);
    // Page 1 has the newer transaction; page 0 knows of nothing, and its root lies nowhere.
    let mut broken = bytes.clone();
    broken[4096 + 40] ^= 1;
    let error = read(written(&broken).path()).unwrap_err();
    assert!(matches!(error, BoltError::Damaged { page: 0, .. }), "{error}");

    // The other way round: the first is torn, and the second is found where it can only be by trying.
    let mut broken = bytes.clone();
    broken[..200].fill(0xff);
    assert_eq!(read(written(&broken).path()).unwrap(), sample());

    let mut broken = bytes;
    broken[20] ^= 1;
    broken[4096 + 20] ^= 1;
    let error = read(written(&broken).path()).unwrap_err();
    assert!(matches!(error, BoltError::NoDatabase { .. }) && error.kind() == ErrorKind::InvalidInput, "{error}");
}

#[test]
fn what_is_no_database_is_named_as_such() {
    for bytes in [&b""[..], b"hello", &[0; 65536]] {
        let file = written(bytes);
        let error = read(file.path()).unwrap_err().to_string();
        assert!(error.contains("is no bbolt database"), "{error}");
        assert!(error.contains(&file.path().display().to_string()), "{error}");
    }
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
    assert!(matches!(Bolt::open(&fifo).unwrap_err(), BoltError::NoDatabase { .. }), "and nobody waits for a writer");
    assert_eq!(Bolt::open(&dir.path().join("none")).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_file_that_its_owner_writes_to_is_left_alone() {
    let file = written(&bolt::file(&sample(), 4096, 20));
    let owner = fs::File::open(file.path()).unwrap();
    rustix::fs::flock(&owner, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    let error = Bolt::open(file.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("in use"), "{error}");
    drop(owner);
    // And who reads keeps the owner out meanwhile, but no other reader.
    let reading = Bolt::open(file.path()).unwrap();
    let owner = fs::File::open(file.path()).unwrap();
    rustix::fs::flock(&owner, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap_err();
    assert_eq!(read(file.path()).unwrap(), sample());
    drop(reading);
    rustix::fs::flock(&owner, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
}

/// Points the first child of the root branch of [`sample`] elsewhere.
#[test]
fn circles_and_pages_in_two_places_are_errors() {
    let tree: Tree = (0..100u32).map(|n| (format!("key {n:05}").into_bytes(), value(&[1; 40]))).collect();
    let bytes = bolt::file(&tree, 1024, 10);
    let root = u64::from_le_bytes(bytes[1024 + 16 + 16..][..8].try_into().unwrap());
    let children = usize::try_from(root).unwrap() * 1024 + 16;
    let point = |bytes: &mut [u8], place: usize, page: u64| {
        bytes[children + place * 16 + 8..][..8].copy_from_slice(&page.to_le_bytes());
    };
    let child = |place: usize| u64::from_le_bytes(bytes[children + place * 16 + 8..][..8].try_into().unwrap());
    for (place, page, what) in
        [(0, root, "below itself"), (1, child(0), "twice"), (2, 1 << 40, "outside"), (3, 1, "outside")]
    {
        let mut broken = bytes.clone();
        point(&mut broken, place, page);
        let error = read(written(&broken).path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DataLoss);
        assert!(error.to_string().contains(what), "{what}: {error}");
    }
    // Each of many buckets would be the same large one: a short file that never ends.
    let inner: Tree = (0..40u8).map(|n| (vec![n], value(&[n; 400]))).collect();
    let outer: Tree = (0..40u8).map(|n| (vec![n], Node::Bucket(inner.clone()))).collect();
    let mut bytes = bolt::file(&outer, 1024, 50);
    let root = u64::from_le_bytes(bytes[1024 + 16 + 16..][..8].try_into().unwrap());
    let leaf = usize::try_from(root).unwrap() * 1024 + 16;
    let bucket_at = |bytes: &[u8], place: usize| {
        let at = leaf + place * 16;
        at + u32::from_le_bytes(bytes[at + 4..][..4].try_into().unwrap()) as usize + 1
    };
    let (first, second) = (bucket_at(&bytes, 0), bucket_at(&bytes, 1));
    let page: [u8; 8] = bytes[first..][..8].try_into().unwrap();
    bytes[second..][..8].copy_from_slice(&page);
    let error = read(written(&bytes).path()).unwrap_err().to_string();
    assert!(error.contains("in two buckets"), "{error}");
}

#[test]
fn a_value_may_be_as_long_as_it_likes_but_not_longer_than_the_file() {
    let tree = Tree::from([(b"k".to_vec(), value(&vec![1; 9_000]))]);
    let bytes = bolt::file(&tree, 4096, 10);
    assert_eq!(read(written(&bytes).path()).unwrap(), tree);
    let error = read(written(&bytes[..bytes.len() - 4096]).path()).unwrap_err().to_string();
    assert!(error.contains("over the end"), "{error}");
    let mut broken = bytes;
    broken[2 * 4096 + 16 + 12..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
    let error = read(written(&broken).path()).unwrap_err().to_string();
    assert!(error.contains("outside of it"), "{error}");
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/fixtures/buildkit")
}

fn unpacked(archive: &str) -> scratch::Scratch {
    let dir = scratch::Scratch::new();
    tools::run(Command::new("tar").arg("-xzf").arg(fixtures().join(archive)).arg("-C").arg(dir.path()));
    dir
}

/// The databases of a real BuildKit, with what Go's library reads of them.
const REAL: [(&str, &str, &str); 8] = [
    ("v1-root.tar.gz", "runc-overlayfs/metadata.db", "v1.metadata.json.gz"),
    ("v1-root.tar.gz", "runc-overlayfs/containerdmeta.db", "v1.containerdmeta.json.gz"),
    ("v1-root.tar.gz", "cache.db", "v1.cache.json.gz"),
    ("mig-root.tar.gz", "runc-overlayfs/metadata_v2.db", "mig.metadata_v2.json.gz"),
    ("mig-root.tar.gz", "runc-overlayfs/containerdmeta.db", "mig.containerdmeta.json.gz"),
    ("v2-root.tar.gz", "runc-overlayfs/metadata_v2.db", "v2.metadata_v2.json.gz"),
    ("v2-root.tar.gz", "runc-overlayfs/containerdmeta.db", "v2.containerdmeta.json.gz"),
    ("v2-root.tar.gz", "cache.db", "v2.cache.json.gz"),
];

fn as_json(tree: &Tree) -> Value {
    let text = |bytes: &[u8]| match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => format!("base64:{}", base64::engine::general_purpose::STANDARD.encode(bytes)),
    };
    let node = |node: &Node| match node {
        Node::Value(bytes) => Value::String(text(bytes)),
        Node::Bucket(tree) => as_json(tree),
    };
    Value::Object(tree.iter().map(|(key, inner)| (text(key), node(inner))).collect())
}

#[test]
fn what_a_real_buildkit_wrote_reads_as_with_gos_library() {
    for (archive, file, expected) in REAL {
        let root = unpacked(archive);
        let packed = fs::read(fixtures().join(expected)).unwrap();
        let expected: Value = serde_json::from_reader(flate2::read::GzDecoder::new(&packed[..])).unwrap();
        assert_eq!(as_json(&read(&root.path().join(file)).unwrap()), expected, "{archive} {file}");
    }
}

#[test]
fn real_files_with_a_few_other_bits_do_no_harm() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(seed >> 33).unwrap() % below
    };
    for (archive, file, _) in REAL {
        let root = unpacked(archive);
        let path = root.path().join(file);
        let bytes = fs::read(&path).unwrap();
        let target = fs::File::options().write(true).open(&path).unwrap();
        for _ in 0..400 {
            let mut broken = bytes.clone();
            for _ in 0..1 + random(6) {
                // Mostly in the pages' own words, where it hurts.
                let at = match random(3) {
                    0 => random(bytes.len()),
                    _ => 8192 + random(bytes.len().saturating_sub(8192) / 4096) * 4096 + random(200),
                };
                broken[at.min(bytes.len() - 1)] ^= 1 << random(8);
            }
            target.write_all_at(&broken, 0).unwrap();
            assert!(survive(&path) < bytes.len() as u64, "no key takes less than a byte");
        }
        for length in (0..bytes.len()).step_by(4096 / 3) {
            target.set_len(length as u64).unwrap();
            survive(&path);
        }
    }
}

fn trees() -> impl Strategy<Value = Tree> {
    let key = prop::collection::vec(any::<u8>(), 1..12);
    let value = prop::collection::vec(any::<u8>(), 0..600).prop_map(Node::Value);
    let node = value.prop_recursive(3, 60, 12, move |inner| {
        prop::collection::btree_map(prop::collection::vec(any::<u8>(), 1..12), inner, 0..12).prop_map(Node::Bucket)
    });
    prop::collection::btree_map(key, node, 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_tree_reads_back(tree in trees(), bits in 10u32..14, fan in 2usize..20) {
        let file = written(&bolt::file(&tree, 1 << bits, fan));
        prop_assert_eq!(read(file.path()).unwrap(), tree);
    }

    #[test]
    fn any_damage_ends_in_an_error_or_in_other_keys(
        tree in trees(),
        fan in 2usize..20,
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = bolt::file(&tree, 1024, fan);
        for (at, bit) in flips {
            let at = 2048 + at.index(bytes.len() - 2048);
            bytes[at] ^= 1 << bit;
        }
        let found = survive(written(&bytes).path());
        prop_assert!(found <= bytes.len() as u64);
        survive(written(&bytes[..cut.index(bytes.len())]).path());
    }

    #[test]
    fn anything_behind_whole_meta_pages_does_no_harm(junk in prop::collection::vec(any::<u8>(), 2048..8192)) {
        let mut bytes = bolt::file(&sample(), 1024, 5);
        bytes.truncate(2048);
        bytes.extend(junk);
        survive(written(&bytes).path());
    }
}

/// Where Debian's golang-github-coreos-bbolt-dev puts the library's source.
const GO_LIBRARY: &str = "/usr/share/gocode/src";

#[test]
fn what_gos_library_wrote_reads_back() {
    if !tools::have(&["go"]) {
        return;
    }
    let library = ["go.etcd.io/bbolt", "github.com/coreos/bbolt"];
    let Some(library) = library.into_iter().find(|path| Path::new(GO_LIBRARY).join(path).is_dir()) else {
        eprintln!("SKIPPED: Debian's golang-github-coreos-bbolt-dev is not installed");
        return;
    };
    let dir = scratch::Scratch::new();
    let program = include_str!("go/writer.go").replace("LIBRARY", library);
    fs::write(dir.path().join("writer.go"), program).unwrap();
    let go = |args: &[&str]| {
        let mut command = Command::new("go");
        command.args(args).current_dir(dir.path());
        command.env("GOPATH", "/usr/share/gocode").env("GO111MODULE", "off").env("GOFLAGS", "");
        command.env("GOCACHE", dir.path().join("cache")).env("HOME", dir.path());
        tools::run(&mut command)
    };
    go(&["build", "-o", "writer", "writer.go"]);
    for (pages, freelist) in [("4096", "sync"), ("4096", "nosync"), ("16384", "sync"), ("65536", "nosync")] {
        let file = dir.path().join(format!("{pages}-{freelist}.db"));
        tools::run(Command::new(dir.path().join("writer")).arg(&file).args([pages, freelist]));
        let tree = read(&file).unwrap();
        let Some(Node::Bucket(many)) = tree.get(&b"many"[..]) else { panic!("no bucket many in {pages} {freelist}") };
        assert_eq!(many.len(), 20_000 - 20_000usize.div_ceil(3), "a third was removed again");
        for (key, node) in many {
            let number: u32 = std::str::from_utf8(&key[4..]).unwrap().parse().unwrap();
            assert_eq!(*node, value(&vec![number as u8; number as usize % 300]), "{number}");
            assert_ne!(number % 3, 0, "it was removed");
        }
        let Some(Node::Bucket(nested)) = tree.get(&b"nested"[..]) else { panic!("no bucket nested") };
        assert_eq!(nested.len(), 101);
        assert_eq!(nested.get(&b"long"[..]), Some(&value(&vec![9; 1 << 20])));
        let Some(Node::Bucket(one)) = nested.get(&b"b042"[..]) else { panic!("no bucket b042") };
        assert_eq!(*one, Tree::from([(b"v".to_vec(), value(b"42"))]));
    }
}
