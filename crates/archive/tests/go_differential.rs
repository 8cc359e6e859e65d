//! What we accept, Go's archive/tar reads as the same entries; what it refuses, we refuse.
#![allow(clippy::unwrap_used)] // the exemption for tests does not see their helpers

mod common;

use std::collections::BTreeMap;
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use common::{Block, Raw, go_oracle, read, record, run, seeds};
use plies_archive::tar::{Entry, EntryKind, EntryPath, TarError};
use plies_archive::{Limits, compress};
use plies_oci::BlobDigest;
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct GoEntry {
    name: String,
    link: Option<String>,
    r#type: String,
    size: i64,
    mode: i64,
    uid: i64,
    gid: i64,
    seconds: i64,
    nanos: u32,
    major: i64,
    minor: i64,
    xattrs: BTreeMap<String, String>,
    sha256: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct GoListing {
    entries: Option<Vec<GoEntry>>,
    error: String,
    large: bool,
}

fn bytes(base64: &str) -> Vec<u8> {
    BASE64.decode(base64).unwrap()
}

/// Files longer than this are read by neither.
fn limits() -> Limits {
    Limits { file_bytes: 16 << 20, ..Limits::default() }
}

fn assert_same(what: &str, ours: &(Entry, Vec<u8>), go: &GoEntry) {
    let (entry, data) = ours;
    assert_eq!(entry.path, EntryPath::clean(&bytes(&go.name)).unwrap(), "{what}: path");
    let link = bytes(go.link.as_deref().unwrap_or(""));
    let (flags, size) = match &entry.kind {
        EntryKind::File { size_bytes, .. } => (&["0", "7", "S"][..], *size_bytes),
        EntryKind::HardLink { target } => {
            assert_eq!(*target, EntryPath::clean(&link).unwrap(), "{what}: hard link");
            (&["1"][..], 0)
        }
        EntryKind::Symlink { target } => {
            assert_eq!(*target, link, "{what}: symbolic link");
            (&["2"][..], 0)
        }
        EntryKind::CharDevice(device) | EntryKind::BlockDevice(device) => {
            assert_eq!((i64::from(device.major), i64::from(device.minor)), (go.major, go.minor), "{what}: device");
            (if matches!(entry.kind, EntryKind::CharDevice(_)) { &["3"][..] } else { &["4"][..] }, 0)
        }
        EntryKind::Directory => (&["5"][..], 0),
        EntryKind::Fifo => (&["6"][..], 0),
    };
    assert!(flags.contains(&go.r#type.as_str()), "{what}: type {:?} is {:?}", go.r#type, entry.kind);
    if let EntryKind::File { .. } = entry.kind {
        assert_eq!(size as i64, go.size, "{what}: size");
    }
    assert_eq!(i64::from(entry.mode), go.mode & 0o7777, "{what}: mode");
    assert_eq!((i64::from(entry.uid), i64::from(entry.gid)), (go.uid, go.gid), "{what}: owner");
    assert_eq!((entry.mtime.seconds, entry.mtime.nanos), (go.seconds, go.nanos), "{what}: mtime");
    let unhex = |name: &str| -> Vec<u8> {
        (0..name.len()).step_by(2).map(|at| u8::from_str_radix(&name[at..at + 2], 16).unwrap()).collect()
    };
    let xattrs: Vec<_> = go.xattrs.iter().map(|(name, value)| (unhex(name), bytes(value))).collect();
    assert_eq!(entry.xattrs, xattrs, "{what}: attributes");
    assert_eq!(BlobDigest::of(data).as_bytes().to_vec(), bytes(&go.sha256), "{what}: data");
}

/// Compares all; returns for each whether we accepted it.
fn compare(archives: &[(String, Vec<u8>)]) -> Option<Vec<bool>> {
    let dir = tempfile::tempdir().unwrap();
    let oracle = go_oracle(dir.path())?;
    let mut command = Command::new(oracle);
    command.arg("list").current_dir(dir.path());
    for (i, (_, bytes)) in archives.iter().enumerate() {
        let name = i.to_string();
        std::fs::write(dir.path().join(&name), bytes).unwrap();
        command.arg(name);
    }
    let output = run(&mut command);
    let listings = output.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let listings: Vec<GoListing> = listings.map(|line| serde_json::from_slice(line).unwrap()).collect();
    assert_eq!(listings.len(), archives.len());
    let accepted = archives.iter().zip(&listings).map(|((what, bytes), go)| match read(bytes, &limits()) {
        Err(TarError::Read { .. } | TarError::Record { .. }) => panic!("{what}: no such thing can fail here"),
        Err(_) => false,
        Ok(ours) => {
            assert!(!go.large && go.error.is_empty(), "{what}: accepted {ours:?}, Go says {:?}", go.error);
            let theirs = go.entries.as_deref().unwrap_or_default();
            assert_eq!(ours.len(), theirs.len(), "{what}: {ours:?}");
            for (ours, theirs) in ours.iter().zip(theirs) {
                assert_same(what, ours, theirs);
            }
            true
        }
    });
    Some(accepted.collect())
}

/// Odd archives by name, and whether we accept them.
fn corpus() -> Vec<(&'static str, bool, Vec<u8>)> {
    let raw = Raw::new;
    let file = Block::file;
    let typed = |flag, size| Block::new("x", flag, size);
    let one = |block: Block, data: &str| raw().block(block).data(data).file("after", "y").end();
    let pax = |records: &[(&str, &[u8])]| raw().pax(records).file("short", "12345").file("after", "y").end();
    let long = |bytes: &[u8]| [bytes, b"\0"].concat();
    let lone_zero_block = raw().file("a", "1").bytes([0; 512]).file("b", "2").end();
    let mut bad_sum = raw().file("a", "1").end();
    bad_sum[0] = b'b';
    let signed_sum = {
        let mut block = file("caf\u{e9}", 0).sum();
        block[148..156].fill(b' ');
        let sum: i32 = block.iter().map(|byte| i32::from(*byte as i8)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        raw().bytes(block).file("after", "y").end()
    };
    vec![
        ("T01 pax size over header 0", true, raw().pax(&[("size", b"5")]).block(file("a", 0)).data("12345").end()),
        ("T02 pax size 0 over header", true, raw().pax(&[("size", b"0")]).block(file("a", 512)).file("b", "1").end()),
        ("T03 size on a directory", true, one(typed(b'5', 600), "")),
        ("T03 size on a symlink", true, one(typed(b'2', 600).link("t"), "")),
        ("L07 size on a hard link", true, one(typed(b'1', 600).link("t"), "")),
        ("T03 size on a fifo", true, one(typed(b'6', 600), "")),
        (
            "T03 pax size on a directory",
            true,
            raw().pax(&[("size", b"600")]).block(typed(b'5', 0)).file("b", "1").end(),
        ),
        (
            "T04 pax size before a long name",
            true,
            raw().pax(&[("size", b"3")]).extension(b'L', long(b"longname")).block(file("s", 0)).data("abc").end(),
        ),
        (
            "T05 long name after x",
            true,
            raw().pax(&[("path", b"from-pax")]).extension(b'L', long(b"from-gnu")).file("s", "1").end(),
        ),
        (
            "T05 long name before x",
            true,
            raw().extension(b'L', long(b"from-gnu")).pax(&[("path", b"from-pax")]).file("s", "1").end(),
        ),
        ("T05 two x", true, raw().pax(&[("path", b"one"), ("uid", b"5")]).pax(&[("gid", b"6")]).file("s", "1").end()),
        ("T05 two L", true, raw().extension(b'L', long(b"one")).extension(b'L', long(b"two")).file("s", "1").end()),
        ("T05 empty L", true, raw().extension(b'L', "\0").file("s", "1").end()),
        ("T05 L without NUL", true, raw().extension(b'L', "abc").file("s", "1").end()),
        ("T05 L with bytes behind the NUL", true, raw().extension(b'L', "abc\0def").file("s", "1").end()),
        ("T06 path twice", false, pax(&[("path", b"a"), ("path", b"b")])),
        ("T06 attribute twice", true, pax(&[("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.user.a", b"2")])),
        ("T07 record too long", false, raw().extension(b'x', "999 path=x\n").file("a", "").end()),
        ("T07 record without newline", false, raw().extension(b'x', "9 path=x ").file("a", "").end()),
        ("T08 NUL in pax path", false, pax(&[("path", b"a\0b")])),
        ("T08 NUL in pax uname", false, pax(&[("uname", b"a\0b")])),
        ("T08 NUL in an attribute", true, pax(&[("SCHILY.xattr.user.a", b"\0\n\xff")])),
        ("pax empty path", true, pax(&[("path", b"")])),
        ("pax empty attribute", true, pax(&[("SCHILY.xattr.user.a", b"")])),
        ("pax libarchive attribute", true, pax(&[("LIBARCHIVE.xattr.user.a", b"MQ==")])),
        ("pax bad uid", false, pax(&[("uid", b"1x")])),
        ("pax bad atime", false, pax(&[("atime", b"x")])),
        ("pax bad size", false, pax(&[("size", b"0x5")])),
        ("pax plus sign", true, pax(&[("uid", b"+5")])),
        ("M06 uid 2^32", false, pax(&[("uid", b"4294967296")])),
        ("M06 uid 2^31", false, pax(&[("uid", b"2147483648")])),
        ("M06 uid -1", false, pax(&[("uid", b"-1")])),
        ("M06 uid 2^31-1", true, pax(&[("uid", b"2147483647")])),
        ("M09 mtime -1e11", true, pax(&[("mtime", b"-100000000000")])),
        ("M09 mtime 1e20", false, pax(&[("mtime", b"100000000000000000000")])),
        ("M09 mtime NaN", false, pax(&[("mtime", b"NaN")])),
        ("M09 mtime with many digits", true, pax(&[("mtime", &[b"1.", &[b'3'; 5000][..]].concat())])),
        ("M09 mtime -0.5", true, pax(&[("mtime", b"-0.5")])),
        (
            "T09 global path and size",
            true,
            raw().extension(b'g', [record("path", b"victim"), record("size", b"1")].concat()).file("a", "12345").end(),
        ),
        ("T09 bad global", false, raw().extension(b'g', "9 path=x ").file("a", "12345").end()),
        ("T09 global at the end", true, raw().file("a", "1").extension(b'g', record("comment", b"x")).end()),
        (
            "global between x and its entry",
            false,
            raw().pax(&[("path", b"lost")]).extension(b'g', record("a", b"b")).file("a", "").end(),
        ),
        ("T10 negative size", false, one(file("a", 0).put(124, [0xff; 12]), "")),
        ("T10 overflowing size", false, one(file("a", 0).put(124, b"\x80\0\0\0\x80\0\0\0\0\0\0\0"), "")),
        ("T10 huge size", false, one(file("a", 0).put(124, b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff"), "")),
        ("T10 base-256 size", true, one(file("a", 0).put(124, b"\x80\0\0\0\0\0\0\0\0\0\0\x05"), "12345")),
        ("T10 octal among spaces", true, one(file("a", 0).put(124, b"          5 "), "12345")),
        ("T10 octal with junk", false, one(file("a", 0).put(124, b"5 junk      "), "12345")),
        ("T10 octal with junk behind NUL", true, one(file("a", 0).put(124, b"5\0junk      "), "12345")),
        ("T10 all NUL numbers", true, one(file("a", 0).put(100, [0; 48]), "")),
        ("T10 negative mtime", true, one(file("a", 0).put(136, [0xff; 12]), "")),
        ("T10 negative mode", false, one(file("a", 0).put(100, [0xff; 8]), "")),
        ("M07 mode with type bits", true, one(file("a", 0).put(100, "0140777\0"), "")),
        ("T11 wrong checksum", false, bad_sum),
        ("T11 signed checksum", true, signed_sum),
        ("T11 v7", true, one(file("a", 1).v7(), "1")),
        ("T11 prefix", true, one(file("name", 1).put(345, "some/prefix"), "1")),
        ("T11 gnu has no prefix", true, one(file("name", 1).gnu().put(345, "00000000000\x0000000000001"), "1")),
        ("T11 gnu with a prefix", true, one(file("name", 1).gnu().put(345, "some/prefix"), "1")),
        ("T11 gnu with a non-ascii prefix", true, one(file("name", 1).gnu().put(345, "s\u{e9}me/prefix"), "1")),
        ("T11 star", true, one(file("name", 1).put(345, "some/prefix").put(508, "tar\0"), "1")),
        ("T11 star with bad atime", false, one(file("name", 1).put(476, "x").put(508, "tar\0"), "1")),
        ("T11 bad device number on a file", false, one(file("name", 1).put(329, "x"), "1")),
        ("T12 lone zero block", false, lone_zero_block),
        ("T12 entries behind the end", true, [raw().file("a", "1").end(), raw().file("b", "2").end()].concat()),
        ("T12 garbage behind the end", true, raw().file("a", "1").bytes([0; 1024]).bytes("garbage").0),
        ("T12 no end marker", false, raw().file("a", "1").0),
        ("T12 half an end marker", false, raw().file("a", "1").bytes([0; 512]).0),
        ("T12 nothing at all", false, Vec::new()),
        ("T12 nothing but the end", true, raw().end()),
        ("T13 x at the end", false, raw().file("a", "1").pax(&[("path", b"x")]).end()),
        ("T13 L at the end", false, raw().file("a", "1").extension(b'L', long(b"x")).end()),
        ("T14 type 7", true, one(typed(b'7', 3), "abc")),
        ("T14 NUL with a slash is a directory", true, one(Block::new("d/", 0, 600), "")),
        ("T14 NUL with a slash by long name", true, raw().extension(b'L', long(b"d/")).block(typed(0, 600)).end()),
        ("T14 type 0 with a slash is a file", true, one(Block::new("d/", b'0', 3), "abc")),
        ("T14 type Z", false, one(typed(b'Z', 3), "abc")),
        ("M11 type M", false, one(typed(b'M', 3), "abc")),
        ("M11 type V", false, one(typed(b'V', 0), "")),
        ("M11 type D", false, one(typed(b'D', 3), "abc")),
        ("M05 device out of range", false, one(typed(b'3', 0).put(329, b"\x80\0\0\x01\0\0\0\x01"), "")),
        ("M05 negative device", false, one(typed(b'4', 0).put(329, [0xff; 8]), "")),
        ("M05 large minor", true, one(typed(b'4', 0).put(329, "0007777\0").put(337, "3777777\0"), "")),
        ("P03 dots in the name", false, raw().file("../victim/pwn", "1").end()),
        ("P03b dots in pax", false, pax(&[("path", b"../victim/pwn")])),
        ("P03c dots in a long name", false, raw().extension(b'L', long(b"a/../../b")).file("s", "1").end()),
        ("P04 absolute", true, raw().file("/etc/x", "1").end()),
        ("P04b odd but inside", true, raw().file("./././x", "1").file("w//v", "2").file("y/../z", "3").end()),
        ("P07 root as a symlink", false, one(Block::new("./", b'2', 0).link("/"), "")),
        ("P07 root as a file", false, one(Block::file(".", 0), "")),
        ("P07 root as an empty name", false, one(Block::new("", b'6', 0), "")),
        ("P08 root as a directory", true, one(Block::new("./", b'5', 0), "")),
        ("P14 empty link", false, one(typed(b'2', 0), "")),
        ("P14 NUL in a link", false, raw().pax(&[("linkpath", b"a\0b")]).block(typed(b'2', 0).link("x")).end()),
        ("hard link out of the root", false, one(typed(b'1', 0).link("../x"), "")),
        ("absolute hard link", true, one(typed(b'1', 0).link("/etc/a"), "")),
        ("P17 odd bytes", true, raw().file(b"\xff\n\r\x1b[31m\xe2\x80\xae", "1").end()),
    ]
}

/// Judges the archives of the corpus whose names begin so, and asks Go.
fn judge(hazard: &str) {
    let mut corpus = corpus();
    corpus.retain(|(name, ..)| name.split(' ').next() == Some(hazard));
    assert!(!corpus.is_empty(), "no archives for {hazard}");
    for (name, accepted, bytes) in &corpus {
        let result = read(bytes, &limits());
        assert_eq!(result.is_ok(), *accepted, "{name}: {result:?}");
    }
    let archives: Vec<_> = corpus.into_iter().map(|(name, _, bytes)| (name.to_owned(), bytes)).collect();
    compare(&archives);
}

/// A test for each hazard, by the word that its archives' names begin with.
macro_rules! hazards {
    ($($test:ident: $hazard:literal,)*) => {
        $(#[test]
        fn $test() {
            judge($hazard);
        })*

        #[test]
        fn every_archive_of_the_corpus_is_judged() {
            for (name, ..) in corpus() {
                let hazard = name.split(' ').next().unwrap();
                assert!([$($hazard),*].contains(&hazard), "{name}");
            }
        }
    };
}

hazards! {
    t01_a_size_in_a_pax_header_wins_over_none: "T01",
    t02_no_size_in_a_pax_header_wins_over_one: "T02",
    t03_what_has_no_content_has_no_size: "T03",
    t04_a_pax_size_is_the_entrys_not_an_extensions: "T04",
    t05_of_several_names_the_one_that_go_takes_counts: "T05",
    t06_what_decides_about_an_entry_is_said_once: "T06",
    t07_records_that_are_none_are_refused: "T07",
    t08_no_name_holds_a_nul: "T08",
    t09_a_global_header_renames_nothing_and_is_no_entry: "T09",
    t10_numbers_that_are_none_or_too_large_are_refused: "T10",
    t11_checksums_and_dialects_are_read_as_go_does: "T11",
    t12_where_an_archive_ends_is_fixed: "T12",
    t13_an_extension_without_its_entry_is_refused: "T13",
    t14_type_flags_mean_what_they_mean_to_go: "T14",
    l07_a_hard_link_has_no_content: "L07",
    m05_device_numbers_are_in_range: "M05",
    m06_owners_are_in_range: "M06",
    m07_a_mode_keeps_its_type_bits_to_itself: "M07",
    m09_times_are_read_as_go_does: "M09",
    m11_types_of_backups_and_volumes_are_refused: "M11",
    p03_names_that_leave_the_root_are_refused: "P03",
    p03b_so_are_those_in_pax_headers: "P03b",
    p03c_and_those_in_long_names: "P03c",
    p04_absolute_names_begin_at_the_root: "P04",
    p04b_odd_names_inside_the_root_are_cleaned: "P04b",
    p07_the_root_is_a_directory: "P07",
    p08_the_root_may_be_listed: "P08",
    p14_links_lead_somewhere: "P14",
    p17_names_are_bytes: "P17",
    odd_pax_records_are_read_as_go_does: "pax",
    odd_global_headers_are_read_as_go_does: "global",
    hard_links_out_of_the_root_are_refused: "hard",
    absolute_hard_links_begin_at_the_root: "absolute",
}

#[test]
fn the_corpus_means_the_same_to_go() {
    let cases = plies_testkit::hostile::corpus(std::path::Path::new("/somewhere/victim"));
    let tars = cases.into_iter().filter(|case| compress::detect(&case.bytes) == plies_oci::Compression::None);
    let archives: Vec<_> = tars.map(|case| (case.id, case.bytes)).collect();
    if let Some(accepted) = compare(&archives) {
        let count = accepted.iter().filter(|accepted| **accepted).count();
        assert!(count > archives.len() / 4, "only {count} of {} said anything", archives.len());
    }
}

#[test]
fn seeds_mean_the_same() {
    let archives: Vec<_> = seeds().into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect();
    if let Some(accepted) = compare(&archives) {
        assert!(accepted.iter().all(|accepted| *accepted), "{accepted:?}");
    }
}

/// Changes a few bytes of an archive, and makes checksums good again so that not all die of that.
fn mutate(seed: &[u8], random: &mut impl FnMut(usize) -> usize) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    const LIKELY: &[u8] = b"\0\0 019-+,.=\n/x\x80\xffgxLKS057";
    for _ in 0..=random(3) {
        let block = random(bytes.len() / 512);
        match random(12) {
            0 => {
                let to = random(bytes.len() / 512);
                bytes.copy_within(block * 512..(block + 1) * 512, to * 512);
            }
            1 => drop(bytes.drain(block * 512..(block + 1) * 512)),
            2 => bytes.truncate(block * 512 + random(512)),
            3 => bytes[block * 512 + 156] = LIKELY[random(LIKELY.len())],
            kind => {
                // Mostly where something is: fields, records, maps.
                let at = if kind < 8 { random(160) } else { random(512) };
                let at = (block * 512 + at).min(bytes.len() - 1);
                bytes[at] = if kind % 2 == 0 { LIKELY[random(LIKELY.len())] } else { random(256) as u8 };
            }
        }
        if bytes.len() < 512 {
            break;
        }
    }
    let mut start = 0;
    while start + 512 <= bytes.len() {
        let block = &mut bytes[start..start + 512];
        if matches!(&block[257..262], b"ustar") {
            let sum: u32 = block[..148].iter().chain(b"        ").chain(&block[156..]).map(|b| u32::from(*b)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        start += 512;
    }
    bytes
}

#[test]
fn mutated_archives_mean_the_same_or_are_refused() {
    let (seed, rounds) = (plies_testkit::seed(), plies_testkit::rounds(400));
    let mut state = seed;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let corpus = plies_testkit::hostile::corpus(std::path::Path::new("/somewhere/victim"));
    let small = corpus.into_iter().filter(|case| (1024..16 << 10).contains(&case.bytes.len()));
    let hostile: Vec<_> = small.filter(|case| compress::detect(&case.bytes) == plies_oci::Compression::None).collect();
    let seeds = seeds();
    let mut archives = Vec::new();
    for round in 0..rounds {
        for (name, bytes) in &seeds {
            archives.push((format!("{name} #{round} of seed {seed}"), mutate(bytes, &mut random)));
        }
        for _ in 0..4 {
            let case = &hostile[random(hostile.len())];
            archives.push((format!("{} #{round} of seed {seed}", case.id), mutate(&case.bytes, &mut random)));
        }
    }
    // A command line has a longest length.
    let (mut count, mut accepted) = (0, 0);
    for some in archives.chunks(5_000) {
        let Some(here) = compare(some) else { return };
        count += here.len();
        accepted += here.iter().filter(|accepted| **accepted).count();
    }
    assert!(accepted > count / 20, "only {accepted} of {count} said anything");
    println!("archives read as Go does, seed {seed}: {count} mutations, {accepted} accepted; 0 failures");
}
