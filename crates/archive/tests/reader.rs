//! The reader: truncation, limits, chunking, real tools' archives.
#![allow(clippy::unwrap_used)] // the exemption for tests does not see their helpers

mod common;

use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::Command;

use common::{Block, Raw, have, paths, read, refused, run, seeds};
use plies_archive::Limits;
use plies_archive::tar::{EntryKind, Reader, TarError};
use plies_oci::ErrorKind;
use proptest::prelude::*;

fn three_entries() -> Vec<u8> {
    Raw::new()
        .block(Block::new("dir/", b'5', 0))
        .pax(&[("path", b"dir/a long name"), ("SCHILY.xattr.user.a", b"1")])
        .file("short", "some content")
        .block(Block::new("link", b'2', 0).link("dir"))
        .end()
}

#[test]
fn t13_a_cut_anywhere_is_an_error() {
    let whole = three_entries();
    assert_eq!(paths(&whole), ["dir", "dir/a long name", "link"]);
    for len in 0..whole.len() {
        let error = refused(&whole[..len]);
        assert!(matches!(error, TarError::Truncated { offset, .. } if offset == len as u64), "{len}: {error}");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
    for (name, whole) in seeds() {
        for len in (0..whole.len()).step_by(61) {
            let error = refused(&whole[..len]);
            assert!(matches!(error, TarError::Truncated { .. }), "{name} cut to {len}: {error}");
        }
    }
}

/// Gives pieces of odd lengths, and is interrupted all the time.
struct Dribble<'a>(&'a [u8], usize);

impl Read for Dribble<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.1 += 1;
        if self.1.is_multiple_of(2) {
            return Err(io::Error::from(io::ErrorKind::Interrupted));
        }
        let n = buf.len().min(self.1 * 7 % 701 + 1);
        self.0.read(&mut buf[..n])
    }
}

#[test]
fn how_the_input_arrives_makes_no_difference() {
    let big: Vec<u8> = (0..700_000_u32).map(|i| (i / 3) as u8).collect();
    let mut raw = Raw::new().file("big", &big);
    for i in 0..200 {
        raw = raw.file(format!("small{i}"), &big[..i * 37]);
    }
    let bytes = raw.end();
    let expected = read(&bytes, &Limits::default()).unwrap();
    assert_eq!(expected.len(), 201);

    let mut reader = Reader::new(Dribble(&bytes, 0), &Limits::default());
    for (entry, data) in &expected {
        assert_eq!(reader.next_entry().unwrap().as_ref(), Some(entry));
        assert_eq!(reader.remaining_bytes(), data.len() as u64);
        let mut got = Vec::new();
        reader.entry_data().read_to_end(&mut got).unwrap();
        assert!(got == *data, "{}", entry.path);
    }
    assert!(reader.next_entry().unwrap().is_none());
    assert!(reader.next_entry().unwrap().is_none());
    let finished = reader.finish().unwrap();
    assert_eq!((finished.size_bytes, finished.entries_count), (bytes.len() as u64, 201));

    // Unread data is skipped, wherever reading stopped; finish() goes through what is left.
    let mut reader = Reader::new(Dribble(&bytes, 0), &Limits::default());
    for (i, (entry, _)) in expected.iter().take(150).enumerate() {
        assert_eq!(reader.next_entry().unwrap().as_ref(), Some(entry));
        let n = reader.data().unwrap().len();
        reader.consume(n.min(i));
    }
    let finished = reader.finish().unwrap();
    assert_eq!((finished.size_bytes, finished.entries_count), (bytes.len() as u64, 201));
}

#[test]
fn t12_bytes_behind_the_end_are_counted() {
    let mut bytes = three_entries();
    bytes.extend(vec![0xab; 600_001]);
    let mut reader = Reader::new(bytes.as_slice(), &Limits::default());
    while reader.next_entry().unwrap().is_some() {}
    assert_eq!(reader.finish().unwrap().size_bytes, bytes.len() as u64);
}

#[test]
fn errors_stay() {
    let bytes = Raw::new().file("a", "1").bytes([1; 512]).file("b", "2").end();
    let mut reader = Reader::new(bytes.as_slice(), &Limits::default());
    assert!(reader.next_entry().unwrap().is_some());
    assert!(matches!(reader.next_entry(), Err(TarError::Malformed { offset: 1024, .. })));
    assert!(reader.next_entry().is_err());
    assert!(reader.data().unwrap().is_empty());
    assert!(reader.finish().is_err());
}

#[test]
fn an_error_of_the_input_is_its_source() {
    let bytes = three_entries();
    let broken = bytes[..600].chain(BrokenPipe);
    let mut reader = Reader::new(broken, &Limits::default());
    let error = loop {
        match reader.next_entry() {
            Ok(entry) => assert!(entry.is_some()),
            Err(error) => break error,
        }
    };
    assert!(matches!(&error, TarError::Read { source } if source.kind() == io::ErrorKind::BrokenPipe));
    assert_eq!(error.kind(), ErrorKind::Unavailable);
}

struct BrokenPipe;

impl Read for BrokenPipe {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::Error::from(io::ErrorKind::BrokenPipe))
    }
}

#[test]
fn every_limit_is_named_and_inclusive() {
    let many_xattrs: Vec<(String, Vec<u8>)> =
        (0..4).map(|i| (format!("SCHILY.xattr.user.{i}"), vec![b'v'; 9])).collect();
    let many_xattrs: Vec<_> = many_xattrs.iter().map(|(key, value)| (key.as_str(), value.as_slice())).collect();
    let with_xattrs = Raw::new().pax(&many_xattrs).file("f", "").end();
    let old_gnu = seeds().into_iter().find(|(name, _)| *name == "sparse 1.0").unwrap().1;
    let base = Limits::default;
    let cases: Vec<(&str, Vec<u8>, Limits, Limits)> = vec![
        (
            "header_bytes",
            Raw::new().extension(b'L', [&[b'n'; 500][..], b"\0"].concat()).file("f", "").end(),
            Limits { header_bytes: 512 + 501, path_bytes: 500, component_bytes: 500, ..base() },
            Limits { header_bytes: 512 + 500, component_bytes: 500, ..base() },
        ),
        (
            "header_bytes",
            Raw::new().extension(b'x', "").extension(b'x', "").file("f", "").end(),
            Limits { header_bytes: 1024, ..base() },
            Limits { header_bytes: 1023, ..base() },
        ),
        (
            "path_bytes",
            Raw::new().file("dir/file", "").end(),
            Limits { path_bytes: 8, ..base() },
            Limits { path_bytes: 7, ..base() },
        ),
        (
            "path_bytes",
            Raw::new().block(Block::new("l", b'1', 0).link("dir/file")).end(),
            Limits { path_bytes: 8, ..base() },
            Limits { path_bytes: 7, ..base() },
        ),
        (
            "component_bytes",
            Raw::new().file("d/file", "").end(),
            Limits { component_bytes: 4, ..base() },
            Limits { component_bytes: 3, ..base() },
        ),
        (
            "path_depth",
            Raw::new().file("a/b/c", "").end(),
            Limits { path_depth: 3, ..base() },
            Limits { path_depth: 2, ..base() },
        ),
        (
            "symlink_bytes",
            Raw::new().block(Block::new("l", b'2', 0).link("target")).end(),
            Limits { symlink_bytes: 6, ..base() },
            Limits { symlink_bytes: 5, ..base() },
        ),
        ("entries", three_entries(), Limits { entries: 3, ..base() }, Limits { entries: 2, ..base() }),
        (
            "unpacked_bytes",
            three_entries(),
            Limits { unpacked_bytes: three_entries().len() as u64, ..base() },
            Limits { unpacked_bytes: three_entries().len() as u64 - 1, ..base() },
        ),
        (
            "file_bytes",
            Raw::new().file("f", "12345").end(),
            Limits { file_bytes: 5, ..base() },
            Limits { file_bytes: 4, ..base() },
        ),
        ("file_bytes", old_gnu.clone(), Limits { file_bytes: 8192, ..base() }, Limits { file_bytes: 8191, ..base() }),
        ("xattr_bytes", with_xattrs.clone(), Limits { xattr_bytes: 9, ..base() }, Limits { xattr_bytes: 8, ..base() }),
        ("xattrs_count", with_xattrs, Limits { xattrs_count: 4, ..base() }, Limits { xattrs_count: 3, ..base() }),
        (
            "sparse_map_bytes",
            old_gnu,
            Limits { sparse_map_bytes: 512, ..base() },
            Limits { sparse_map_bytes: 511, ..base() },
        ),
    ];
    for (name, bytes, passes, fails) in cases {
        read(&bytes, &passes).unwrap_or_else(|error| panic!("{name}: {error}"));
        let error = read(&bytes, &fails).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Limit);
        let TarError::Limit(limit) = &error else { panic!("{name}: {error}") };
        assert_eq!(limit.limit, name);
        // As the config file names it.
        let key = format!("limits.{} = ", name.replace('_', "-"));
        assert!(error.to_string().contains(&key), "{error}");
    }
}

#[test]
fn p12_b05_b06_b07_bombs_are_refused_by_what_they_claim() {
    let limit = |bytes: Vec<u8>| match refused(&bytes) {
        TarError::Limit(limit) => limit.limit,
        error => panic!("{error}"),
    };
    let huge = |type_flag| Raw::new().block(Block::new("h", type_flag, 0o7_777_777_777)).0;
    assert_eq!(limit(huge(b'x')), "header_bytes");
    assert_eq!(limit(huge(b'L')), "header_bytes");
    assert_eq!(limit(huge(b'g')), "header_bytes");
    assert_eq!(limit(Raw::new().extension(b'L', vec![b'n'; 500_000]).file("f", "").end()), "path_bytes");
    assert_eq!(limit(Raw::new().extension(b'L', b"d/".repeat(2000)).file("f", "").end()), "path_depth");
    assert_eq!(limit(Raw::new().extension(b'L', vec![b'n'; 256]).file("f", "").end()), "component_bytes");
    let endless = (0..3000).fold(Raw::new(), |raw, _| raw.extension(b'g', ""));
    assert_eq!(limit(endless.file("f", "").end()), "header_bytes");
    let sparse = |records: &[(&str, &[u8])], data: &[u8]| Raw::new().pax(records).file("s", data).end();
    let tebibyte = (1_u64 << 40).to_string();
    let records: [(&str, &[u8]); 3] =
        [("GNU.sparse.map", b"0,1"), ("GNU.sparse.numblocks", b"1"), ("GNU.sparse.size", tebibyte.as_bytes())];
    assert_eq!(limit(sparse(&records, b"x")), "file_bytes");
    let records: [(&str, &[u8]); 2] = [("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0")];
    let map = [&b"1000000000\n"[..], &b"0\n".repeat(1 << 20)].concat();
    assert_eq!(limit(sparse(&records, &map)), "sparse_map_bytes");
    let mut old_gnu = Raw::new().block(Block::new("s", b'S', 0).gnu().put(482, "\x01").put(483, "00000000000\0"));
    for _ in 0..3000 {
        let mut block = [0; 512];
        block[504] = 1;
        old_gnu = old_gnu.bytes(block);
    }
    assert_eq!(limit(old_gnu.end()), "sparse_map_bytes");
}

#[test]
fn t15_all_sparse_formats_give_the_same_runs() {
    for (name, bytes) in seeds().iter().filter(|(name, _)| name.starts_with("sparse")) {
        let entries = read(bytes, &Limits::default()).unwrap();
        let (entry, data) = &entries[0];
        assert_eq!(entry.path.as_bytes(), b"sparse", "{name}");
        let EntryKind::File { size_bytes, sparse: Some(runs) } = &entry.kind else { panic!("{name}: {entry:?}") };
        assert_eq!(runs.len(), 2, "{name}");
        assert_eq!(*size_bytes, data.len() as u64, "{name}");
        assert_eq!(entries[1].0.path.as_bytes(), b"after", "{name}");
    }
    let old_gnu = seeds().into_iter().find(|(name, _)| *name == "sparse old gnu").unwrap().1;
    // 21 runs more in each of two extension blocks.
    let mut header = Block::new("s", b'S', 42 * 512).gnu().put(482, "\x01").put(483, "00000200000\0");
    header = header.put(386, "00000000000\0").put(398, "00000000000\0");
    let mut raw = Raw::new().block(header);
    for block_at in 0..2 {
        let mut block = Block([0; 512]);
        for i in 0..21 {
            let offset = format!("{:011o}\0", 1024 * (21 * block_at + i));
            block = block.put(i * 24, offset).put(i * 24 + 12, "00000001000\0");
        }
        raw = raw.bytes(block.put(504, [1 - block_at as u8]).0);
    }
    let entries = read(&raw.data([9; 42 * 512]).file("after", "").end(), &Limits::default()).unwrap();
    let EntryKind::File { sparse: Some(runs), .. } = &entries[0].0.kind else { panic!() };
    assert_eq!((runs.len(), entries.len()), (42, 2));
    assert!(paths(&old_gnu).contains(&"after".to_owned()));
}

/// A tree with one of everything that tools store in their own ways.
fn make_tree(dir: &Path) {
    let file = |name: &[u8], data: &[u8]| {
        let path = dir.join(std::ffi::OsStr::from_bytes(name));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, data).unwrap();
    };
    file(b"plain", b"content");
    file(b"empty", b"");
    file(b"caf\xc3\xa9/na\xefve \xff\n", b"not utf-8");
    file(&[&b"long/"[..], &[b'n'; 200]].concat(), b"a long name");
    file(&[&b"p".repeat(90)[..], b"/", &b"q".repeat(90)].concat(), b"a long prefix");
    file(b"big", &b"0123456789".repeat(60_000));
    std::fs::hard_link(dir.join("plain"), dir.join("hard")).unwrap();
    std::os::unix::fs::symlink("plain", dir.join("soft")).unwrap();
    std::os::unix::fs::symlink("t".repeat(150), dir.join("long-soft")).unwrap();
}

#[test]
fn gnu_tar_in_every_format_gives_the_same_tree() {
    if !have("tar") {
        return;
    }
    let tree = tempfile::tempdir().unwrap();
    make_tree(tree.path());
    for format in ["v7", "oldgnu", "gnu", "ustar", "pax"] {
        let mut tar = Command::new("tar");
        tar.arg("--create").arg(format!("--format={format}")).arg("--sort=name").arg("-C").arg(tree.path());
        if matches!(format, "v7" | "ustar") {
            // These have no place for long names.
            tar.args(["--exclude=./long", "--exclude=./long-soft", "--exclude=./pppp*"]);
        }
        let bytes = run(tar.arg("."));
        let entries = read(&bytes, &Limits::default()).unwrap_or_else(|error| panic!("{format}: {error}"));
        let mut found = 0;
        for (entry, data) in entries {
            let path = tree.path().join(std::ffi::OsStr::from_bytes(entry.path.as_bytes()));
            match entry.kind {
                EntryKind::File { .. } => assert!(std::fs::read(path).unwrap() == data, "{format}: {}", entry.path),
                EntryKind::Symlink { target } => {
                    assert_eq!(std::fs::read_link(path).unwrap().as_os_str().as_bytes(), target, "{format}");
                }
                EntryKind::HardLink { target } => {
                    assert!([&b"plain"[..], b"hard"].contains(&target.as_bytes()), "{format}: {target}");
                }
                EntryKind::Directory => assert!(path.is_dir(), "{format}: {}", entry.path),
                kind => panic!("{format}: {kind:?}"),
            }
            found += 1;
        }
        assert!(found >= if matches!(format, "v7" | "ustar") { 8 } else { 12 }, "{format}: {found}");
    }
}

#[test]
fn t15_gnu_tar_sparse_files_come_back() {
    if !have("tar") {
        return;
    }
    let tree = tempfile::tempdir().unwrap();
    let path = tree.path().join("sparse");
    let file = std::fs::File::create(&path).unwrap();
    for i in 0..60_u64 {
        std::os::unix::fs::FileExt::write_all_at(&file, &[i as u8 + 1; 4096], i * 65_536).unwrap();
    }
    file.set_len(60 * 65_536 + 777).unwrap();
    let expected = std::fs::read(&path).unwrap();
    for format in [
        &["--format=gnu"][..],
        &["--format=oldgnu"],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ] {
        let mut tar = Command::new("tar");
        let bytes = run(tar.args(["--create", "--sparse"]).args(format).arg("-C").arg(tree.path()).arg("sparse"));
        let entries = read(&bytes, &Limits::default()).unwrap_or_else(|error| panic!("{format:?}: {error}"));
        let (entry, data) = &entries[0];
        assert_eq!(entry.path.as_bytes(), b"sparse", "{format:?}");
        assert!(matches!(entry.kind, EntryKind::File { sparse: Some(_), .. }), "{format:?} made no sparse file");
        assert!(*data == expected, "{format:?}");
    }
}

#[test]
fn python_tarfile_reads_the_same() {
    if !have("python3") {
        return;
    }
    const SCRIPT: &str = "
import io, sys, tarfile
for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
    with tarfile.open('out%d' % format, 'w', format=format) as tar:
        for name, data in (('a', b'1'), ('d/' + 'b' * 98, b'22'), ('caf\\u00e9', b'')):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uid = len(data), 1234567890.5 if format == tarfile.PAX_FORMAT else 5, 2097151
            tar.addfile(info, io.BytesIO(data))
";
    let dir = tempfile::tempdir().unwrap();
    run(Command::new("python3").args(["-c", SCRIPT]).current_dir(dir.path()));
    for format in 0..3 {
        let bytes = std::fs::read(dir.path().join(format!("out{format}"))).unwrap();
        assert_eq!(paths(&bytes), ["a", &format!("d/{}", "b".repeat(98)), "café"]);
        for (entry, _) in read(&bytes, &Limits::default()).unwrap() {
            assert_eq!(entry.uid, 2_097_151);
            assert_eq!(entry.mtime.nanos, if format == 2 { 500_000_000 } else { 0 });
        }
    }
}

#[test]
fn errors_print_hostile_names_escaped() {
    let error = refused(&Raw::new().file("../\x1b[2J\n", "").end()).to_string();
    assert!(error.chars().all(|c| !c.is_control()), "{error:?}");
}

proptest! {
    #[test]
    fn noise_never_panics(mut blocks in proptest::collection::vec(proptest::array::uniform32(any::<u8>()), 16..64)) {
        // Noise in fields where numbers and names are, under good checksums.
        let mut raw = Raw::new();
        for noise in blocks.drain(..) {
            let mut block = Block::file("n", usize::from(noise[0]));
            block = block.put(usize::from(noise[1]), &noise[2..10]).put(usize::from(noise[10]) + 200, &noise[11..]);
            block.0[156] = b"0157xgLKS\0"[usize::from(noise[31]) % 10];
            raw = raw.block(block);
        }
        let _either_way = read(&raw.end(), &Limits { file_bytes: 1 << 20, ..Limits::default() });
    }
}
