//! Indexes of tars, mounted by the kernel and held against the directories that `apply` makes of the same archives.
#![allow(clippy::unwrap_used)] // the exemption for tests does not see their helpers

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use common::{Block, Raw, seeds};
use plies_archive::erofs::{self, IndexingError, VerifyError};
use plies_archive::tar::Reader;
use plies_archive::{Applied, ApplyError, ApplyStyle, Limits, apply};
use plies_oci::{BlobDigest, DiffId};
use proptest::prelude::*;
use rustix::mount;

/// Whether the tests of this file can do anything here; says so when not.
fn skip() -> bool {
    let root = rustix::process::geteuid().is_root();
    let erofs = mount::fsopen("erofs", mount::FsOpenFlags::FSOPEN_CLOEXEC).is_ok();
    if !root || !erofs {
        eprintln!("SKIPPED: needs root, to mount, and a kernel with EROFS");
    }
    !root || !erofs
}

fn diff_id(tar: &[u8]) -> DiffId {
    DiffId::from_bytes(*BlobDigest::of(tar).as_bytes())
}

fn index_of(tar: &[u8], limits: &Limits) -> Result<(Vec<u8>, Applied), IndexingError> {
    let mut reader = Reader::new(tar, limits);
    let index = erofs::index(&mut reader, limits)?;
    reader.finish().map_err(ApplyError::from)?;
    let mut image = Vec::new();
    index.write(diff_id(tar), tar.len() as u64, &mut image).unwrap();
    Ok((image, index.applied().clone()))
}

fn applied(tar: &[u8], root: &Path, limits: &Limits) -> Result<Applied, ApplyError> {
    let mut reader = Reader::new(tar, limits);
    let applied = apply(&mut reader, File::open(root).unwrap().as_fd(), ApplyStyle::Layer, limits)?;
    reader.finish()?;
    Ok(applied)
}

/// A file that has a path for as long as it is open.
fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn try_mount(image: &File, tar: &File) -> rustix::io::Result<OwnedFd> {
    let context = mount::fsopen("erofs", mount::FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, file) in [("source", image), ("device", tar)] {
        mount::fsconfig_set_string(context.as_fd(), key, format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    }
    mount::fsconfig_create(context.as_fd())?;
    let read_only = mount::MountAttrFlags::MOUNT_ATTR_RDONLY;
    mount::fsmount(context.as_fd(), mount::FsMountFlags::FSMOUNT_CLOEXEC, read_only)
}

/// An attached nowhere mount's path.
fn path_of(mount: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", mount.as_raw_fd())
}

fn xattrs(path: &Path) -> Vec<String> {
    let mut list = vec![0; 64 << 10];
    let n = rustix::fs::llistxattr(path, &mut list).unwrap();
    let mut found = Vec::new();
    for name in list[..n].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 64 << 10];
        let n = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
        found.push(format!("{}={}", name.escape_ascii(), value[..n].escape_ascii()));
    }
    found.sort();
    found
}

/// All that there is to know of a tree, by path; of whiteouts only that they are there, of files the digest.
fn everything(root: &Path) -> BTreeMap<String, String> {
    let mut seen = BTreeMap::new();
    let mut pending = vec![(String::new(), root.join("."))];
    while let Some((name, path)) = pending.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let kind = meta.file_type();
        let mut what = format!("{kind:?} {:o} {}:{}", meta.mode(), meta.uid(), meta.gid());
        if kind.is_char_device() && meta.rdev() == 0 {
            seen.insert(name, "whiteout".into());
            continue;
        }
        what += &format!(" {}.{:09} {:?}", meta.mtime(), meta.mtime_nsec(), xattrs(&path));
        if kind.is_dir() {
            for inner in fs::read_dir(&path).unwrap() {
                let inner = inner.unwrap();
                use std::os::unix::ffi::OsStrExt as _;
                let listed = inner.file_type().unwrap();
                assert_eq!(listed, fs::symlink_metadata(inner.path()).unwrap().file_type(), "{:?}", inner.path());
                let below = format!("{name}/{}", inner.file_name().as_bytes().escape_ascii());
                pending.push((below, inner.path()));
            }
        } else {
            if kind.is_file() {
                let bytes = fs::read(&path).unwrap();
                assert_eq!(bytes.len() as u64, meta.len());
                what += &format!(" {} bytes {}", bytes.len(), BlobDigest::of(&bytes));
            } else if kind.is_symlink() {
                what += &format!(" to {:?}", fs::read_link(&path).unwrap());
            } else {
                what += &format!(" {}", meta.rdev());
            }
            what += &format!(" {} links", meta.nlink());
        }
        seen.insert(name, what);
    }
    seen
}

/// Which names of a tree are one file.
fn links(root: &Path) -> Vec<Vec<String>> {
    let mut by_inode: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    let mut pending = vec![root.join(".")];
    while let Some(path) = pending.pop() {
        for inner in fs::read_dir(&path).unwrap() {
            let inner = inner.unwrap();
            let meta = fs::symlink_metadata(inner.path()).unwrap();
            if meta.is_dir() {
                pending.push(inner.path());
            } else if meta.nlink() > 1 {
                let name = inner.path().strip_prefix(root).unwrap().to_string_lossy().into_owned();
                by_inode.entry(meta.ino()).or_default().push(name);
            }
        }
    }
    let mut links: Vec<Vec<String>> = by_inode.into_values().collect();
    links.iter_mut().for_each(|names| names.sort());
    links.sort();
    links
}

/// Holds the mounted index of a tar against the directory made of it. Says whether both refuse it.
#[track_caller]
fn compare(what: &str, tar: &[u8]) -> Result<(), String> {
    let limits = Limits::default();
    let place = tempfile::tempdir().unwrap();
    match (index_of(tar, &limits), applied(tar, place.path(), &limits)) {
        (Ok((image, by_index)), Ok(mut by_apply)) => {
            assert_eq!(image, index_of(tar, &limits).unwrap().0, "{what}: the same bytes again");
            erofs::verify(image.as_slice(), diff_id(tar)).unwrap();
            let (image, tar) = (file_of(&image), file_of(tar));
            let mounted = try_mount(&image, &tar).unwrap_or_else(|error| panic!("{what}: mount: {error}"));
            let mounted = path_of(&mounted);
            let (found, expected) = (everything(Path::new(&mounted)), everything(place.path()));
            let differs = |path: &&String| found.get(*path) != expected.get(*path);
            if let Some(path) = found.keys().chain(expected.keys()).find(differs) {
                panic!("{what}: {path:?}:\n index {:?}\n apply {:?}", found.get(path), expected.get(path));
            }
            assert_eq!(links(Path::new(&mounted)), links(place.path()), "{what}");
            by_apply.usage.size_bytes = 0;
            assert_eq!(by_index, by_apply, "{what}");
            Ok(())
        }
        (Err(IndexingError::Apply(by_index)), Err(by_apply)) => {
            assert_eq!(by_index.to_string(), by_apply.to_string(), "{what}");
            assert_eq!(by_index.kind(), by_apply.kind(), "{what}");
            Err(by_apply.to_string())
        }
        (by_index, by_apply) => panic!("{what}: index {by_index:?}, apply {by_apply:?}"),
    }
}

fn fixtures() -> Vec<(String, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.ends_with(".tar.gz") {
            let mut tar = Vec::new();
            flate2::read::GzDecoder::new(File::open(&path).unwrap()).read_to_end(&mut tar).unwrap();
            found.push((name, tar));
        }
    }
    assert!(found.len() >= 20);
    found
}

#[test]
fn privileged_every_archive_of_other_tools_mounts_as_it_applies() {
    if skip() {
        return;
    }
    for (name, tar) in fixtures() {
        compare(&name, &tar).unwrap();
    }
    for (name, tar) in seeds() {
        compare(name, &tar).unwrap();
    }
}

/// A member of a made-up archive.
#[derive(Debug, Clone)]
struct Member {
    name: Vec<u8>,
    flag: u8,
    link: Vec<u8>,
    data: Vec<u8>,
    device: (u32, u32),
    mode: u32,
    owner: (u32, u32),
    mtime: &'static str,
    xattrs: Vec<(&'static str, Vec<u8>)>,
    /// Length with holes, offsets and lengths; the data is all zeros or all of one byte.
    sparse: Option<(u64, Vec<(u64, u64)>)>,
}

impl Member {
    fn new(name: &str, flag: u8) -> Self {
        Self {
            name: name.into(),
            flag,
            link: Vec::new(),
            data: Vec::new(),
            device: (0, 0),
            mode: 0o644,
            owner: (0, 0),
            mtime: "1000000000.123456789",
            xattrs: Vec::new(),
            sparse: None,
        }
    }

    fn file(name: &str, data: impl AsRef<[u8]>) -> Self {
        Self { data: data.as_ref().to_vec(), ..Self::new(name, b'0') }
    }

    fn dir(name: &str) -> Self {
        Self { mode: 0o755, ..Self::new(name, b'5') }
    }

    fn link(name: &str, target: &str) -> Self {
        Self { link: target.into(), ..Self::new(name, b'1') }
    }

    fn symlink(name: &str, target: &str) -> Self {
        Self { link: target.into(), ..Self::new(name, b'2') }
    }

    fn device(name: &str, flag: u8, major: u32, minor: u32) -> Self {
        Self { device: (major, minor), ..Self::new(name, flag) }
    }

    fn sparse(name: &str, size: u64, runs: &[(u64, u64)]) -> Self {
        let stored: u64 = runs.iter().map(|(_, length)| length).sum();
        let data = (0..stored).map(|n| (n % 251 + 1) as u8).collect::<Vec<_>>();
        Self { sparse: Some((size, runs.to_vec())), ..Self::file(name, data) }
    }

    fn xattr(mut self, name: &'static str, value: impl AsRef<[u8]>) -> Self {
        self.xattrs.retain(|(has, _)| *has != name);
        self.xattrs.push((name, value.as_ref().to_vec()));
        self
    }

    fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    fn owner(self, uid: u32, gid: u32) -> Self {
        Self { owner: (uid, gid), ..self }
    }

    fn append(&self, raw: Raw) -> Raw {
        let mut records: Vec<(String, Vec<u8>)> = vec![
            ("mtime".into(), self.mtime.into()),
            ("uid".into(), self.owner.0.to_string().into()),
            ("gid".into(), self.owner.1.to_string().into()),
        ];
        records.extend(self.xattrs.iter().map(|(name, value)| (format!("SCHILY.xattr.{name}"), value.clone())));
        if self.link.len() > 100 {
            records.push(("linkpath".into(), self.link.clone()));
        }
        let mut data = self.data.clone();
        let mut name = self.name.clone();
        if let Some((size, runs)) = &self.sparse {
            let mut map = format!("{}\n", runs.len());
            runs.iter().for_each(|(offset, length)| map += &format!("{offset}\n{length}\n"));
            let mut front = map.into_bytes();
            front.resize(front.len().next_multiple_of(512), 0);
            data = [front, data].concat();
            records.extend([
                ("GNU.sparse.major".into(), b"1".to_vec()),
                ("GNU.sparse.minor".into(), b"0".to_vec()),
                ("GNU.sparse.name".into(), std::mem::replace(&mut name, b"GNUSparseFile.0/x".to_vec())),
                ("GNU.sparse.realsize".into(), size.to_string().into()),
            ]);
        } else if name.len() > 100 {
            records.push(("path".into(), std::mem::replace(&mut name, b"long".to_vec())));
        }
        let records: Vec<(&str, &[u8])> = records.iter().map(|(key, value)| (key.as_str(), value.as_slice())).collect();
        let short = if self.link.len() > 100 { &b"long"[..] } else { &self.link };
        let header = Block::new(&name, self.flag, data.len())
            .put(100, format!("{:07o}\0", self.mode))
            .put(329, format!("{:07o}\0", self.device.0))
            .put(337, format!("{:07o}\0", self.device.1))
            .link(short);
        let raw = raw.pax(&records).block(header);
        if data.is_empty() { raw } else { raw.data(data) }
    }
}

fn archive(members: &[Member]) -> Vec<u8> {
    members.iter().fold(Raw::new(), |raw, member| member.append(raw)).end()
}

const CAPABILITY: &[u8] = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

#[test]
fn privileged_each_kind_of_entry_mounts_as_it_applies() {
    if skip() {
        return;
    }
    let named = acl(&[(1, 7, 7), (2, 6, 1000), (4, 5, 0), (8, 1, 99), (16, 7, 0), (32, 4, 0)]);
    let minimal = acl(&[(1, 6, 0), (4, 4, 0), (32, 4, 0)]);
    let masked = acl(&[(1, 6, 0), (4, 4, 0), (16, 4, 0), (32, 4, 0)]);
    let content: Vec<u8> = (0..70_000_u32).map(|n| (n % 253) as u8).collect();
    let (long, target) = ("n".repeat(255), "t".repeat(4095));
    let cases: Vec<(&str, Vec<Member>)> = vec![
        ("nothing", vec![]),
        ("root", vec![Member::dir("./").mode(0o1751).owner(7, 1_000_000_000).xattr("user.root", "r")]),
        (
            "sizes",
            [0, 1, 511, 512, 513, 4095, 4096, 4097, 65_536, 70_000]
                .map(|n| Member::file(&format!("f{n}"), &content[..n]))
                .to_vec(),
        ),
        (
            "kinds",
            vec![
                Member::symlink("l", "anywhere"),
                Member::symlink("long link", &target),
                Member::symlink("rather long link", &"r".repeat(484)),
                Member::symlink("just short link", &"r".repeat(480)),
                Member::device("c", b'3', 4095, 1_048_575),
                Member::device("b", b'4', 259, 256),
                Member::new("p", b'6'),
                Member::file(&long, "x"),
                Member::file(&format!("d/{long}"), "x"),
            ],
        ),
        (
            "times",
            ["0", "-1", "-1.5", "1", "4000000000.000000001", "-2000000000.999999999"]
                .iter()
                .enumerate()
                .map(|(n, mtime)| Member { mtime, ..Member::file(&format!("f{n}"), "") })
                .collect(),
        ),
        (
            "links",
            vec![
                Member::file("d/a", "1").xattr("security.capability", CAPABILITY).xattr("user.kept", "1"),
                Member::link("b", "d/a").xattr("user.b", "2").mode(0o4755),
                Member::link("e/c", "b").owner(5, 6),
                Member::symlink("s", "d/a"),
                Member::link("t", "s").owner(1, 1),
                Member::new("p", b'6'),
                Member::link("q", "p").mode(0o600),
            ],
        ),
        (
            "attributes",
            vec![
                Member::dir("d").xattr("user.a", "1").xattr("trusted.t", "x").xattr("security.other", "y"),
                Member::file("d/f", "1")
                    .xattr("user.a", "1")
                    .xattr("user.empty", "")
                    .xattr("user.big", &content[..3000]),
                Member::file("d/g", "1").xattr("user.a", "1").xattr("com.apple.x", "left out"),
                Member::file("d/h", "1").xattr("security.selinux", "x").xattr("trusted.overlay.redirect", "/"),
                Member::file("d/i", "1").xattr("security.capability", CAPABILITY),
                Member::file("d/j", "1").xattr("security.capability", "damaged"),
                Member::symlink("d/l", "x").xattr("user.a", "left out").xattr("trusted.t", "x"),
                Member::new("d/p", b'6').xattr("user.a", "left out").xattr("trusted.t", "x"),
                Member::dir("d/e").xattr("user.a", "1"),
                Member::dir("d/e").xattr("user.b", "2"),
            ],
        ),
        (
            "access control lists",
            vec![
                Member::dir("d").mode(0o2750).xattr("system.posix_acl_default", &named),
                Member::file("d/f", "").mode(0o640).xattr("system.posix_acl_access", &named),
                Member::file("d/g", "").mode(0o600).xattr("system.posix_acl_access", &minimal),
                Member::file("d/h", "").mode(0o664).xattr("system.posix_acl_access", &masked),
                Member::file("d/i", "").xattr("system.posix_acl_access", acl(&[])),
                Member::dir("d/e").xattr("system.posix_acl_default", acl(&[])),
                Member::symlink("d/l", "f").xattr("system.posix_acl_access", &named),
                Member::new("d/p", b'6').mode(0o600).xattr("system.posix_acl_access", &named),
                Member::link("d/q", "d/f").mode(0o777),
                Member::link("d/r", "d/h").xattr("system.posix_acl_access", &minimal),
            ],
        ),
        (
            "marks",
            vec![
                Member::file("a/.wh.gone", ""),
                Member::file("a/b/.wh.gone", ""),
                Member::file("a/b/here", ""),
                Member::file("o/.wh..wh..opq", ""),
                Member::file("o/x/y", "1"),
                Member::file(".wh.top", ""),
                Member::dir("d"),
                Member::file(".wh.d", ""),
                Member::file("e/f", ""),
                Member::file(".wh.e", ""),
                Member::file(".wh..wh.plnk/9.9", "passed over"),
                Member::file(&format!(".wh.{long}"), ""),
            ],
        ),
        (
            "replaced",
            vec![
                Member::file("f", "1"),
                Member::file("f", "22"),
                Member::dir("f"),
                Member::file("f/g", "3"),
                Member::symlink("l", "f"),
                Member::file("l/through", "4"),
                Member::dir("l"),
                Member::file("l/inside", "5"),
                Member::file("w/.wh.x", ""),
                Member::file("w/x/y", "6"),
                Member::symlink("deep", "no/where/yet"),
                Member::file("deep/f", "7"),
                Member::dir("f/sub"),
                Member::file("f/sub/z", "8"),
                Member::file("f/sub", "9"),
            ],
        ),
        (
            // What the target was found by goes with the link that takes its name.
            "link over its own way",
            vec![
                Member::file("d/a", "1"),
                Member::symlink("l", "d"),
                Member::link("l", "l/a"),
                Member::file("l/x", "2"),
            ],
        ),
        (
            "sparse",
            vec![
                Member::sparse("hole", 1 << 30, &[]),
                Member::sparse("empty", 0, &[]),
                Member::sparse("aligned", 20_000, &[(0, 4096), (8192, 4096), (19_968, 32)]),
                Member::sparse("end", 10_000, &[(4096, 5904)]),
                Member::sparse("askew", 5000, &[(100, 700), (1500, 1), (4000, 1000)]),
                Member::sparse("far", 1 << 32, &[(0, 512), (1 << 31, 700), ((1 << 32) - 100, 100)]),
                Member::sparse("dense", 3000, &[(0, 1000), (1000, 2000)]),
                Member::sparse("cut", 3000, &[(0, 700), (1024, 512)]),
                Member::file("after", "x"),
            ],
        ),
    ];
    for (what, members) in cases {
        compare(what, &archive(&members)).unwrap();
    }
}

#[test]
fn privileged_what_cannot_be_applied_cannot_be_indexed_either() {
    if skip() {
        return;
    }
    let big = "d/".repeat(1025);
    let cases: Vec<(&str, Vec<Member>)> = vec![
        ("mark with content", vec![Member::file(".wh.x", "1")]),
        ("impossible mark", vec![Member::file(".wh..", "")]),
        ("inside a mark", vec![Member::file(".wh.d/x", "")]),
        ("link to a mark", vec![Member::link("a", ".wh.b")]),
        ("link to a directory", vec![Member::dir("d"), Member::link("a", "d")]),
        ("link to itself", vec![Member::file("a", ""), Member::link("a", "a")]),
        ("link below", vec![Member::link("a", "usr/bin/sh")]),
        ("link to what is hidden", vec![Member::file(".wh.a", ""), Member::link("b", "a")]),
        ("link to what it replaces", vec![Member::file("d/a", ""), Member::link("d", "d/a")]),
        ("whiteout device", vec![Member::device("c", b'3', 0, 0)]),
        ("loop", vec![Member::symlink("a", "b"), Member::symlink("b", "a"), Member::file("a/f", "")]),
        (
            "default list of a file",
            vec![Member::file("f", "").xattr("system.posix_acl_default", acl(&[(1, 7, 0), (4, 7, 0), (32, 7, 0)]))],
        ),
        (
            "list out of order",
            vec![Member::file("f", "").xattr("system.posix_acl_access", acl(&[(4, 7, 0), (1, 7, 0), (32, 7, 0)]))],
        ),
        (
            "list without a mask",
            vec![
                Member::file("f", "")
                    .xattr("system.posix_acl_access", acl(&[(1, 7, 0), (2, 7, 1), (4, 7, 0), (32, 7, 0)])),
            ],
        ),
        ("list of another version", vec![Member::file("f", "").xattr("system.posix_acl_access", "\u{1}\0\0\0")]),
        ("list of no length", vec![Member::file("f", "").xattr("system.posix_acl_access", "\u{2}\0\0\0abc")]),
        ("unknown system attribute", vec![Member::file("f", "").xattr("system.other", "x")]),
        ("prefix alone", vec![Member::file("f", "").xattr("user.", "x")]),
        ("marks that are decided below", vec![Member::file("d/e/.wh.x", ""), Member::dir("d")]),
        ("marks that are hidden", vec![Member::file("d/e/.wh.x", ""), Member::file(".wh.d", "")]),
        ("opaque over marks", vec![Member::file("d/e/.wh.x", ""), Member::file("d/.wh..wh..opq", "")]),
        ("depth", vec![Member::file(&big, "")]),
        ("depth behind links", {
            let mut members: Vec<Member> =
                vec![Member::dir(&"d/".repeat(1000)), Member::symlink("l", &"d/".repeat(999))];
            members.push(Member::file(&format!("l/{}", "e/".repeat(100)), ""));
            members
        }),
    ];
    for (what, members) in cases {
        let error = compare(what, &archive(&members)).expect_err(what);
        eprintln!("{what}: {error}");
    }
}

#[test]
fn privileged_a_directory_of_many_names_is_found_whole_and_by_name() {
    if skip() {
        return;
    }
    let names: Vec<String> = (0..20_000_u64).map(|n| format!("big/{:x}", n * 2_654_435_761 % 1_000_003)).collect();
    let mut members: Vec<Member> = names.iter().map(|name| Member::file(name, "")).collect();
    members.extend(["!", "-", "+a", "A", "\u{fffd}", "~"].map(|name| Member::file(&format!("big/{name}"), name)));
    compare("many names", &archive(&members)).unwrap();
}

#[test]
fn what_an_index_cannot_hold_is_said_before_anything_is_written() {
    let limits = Limits { xattr_bytes: 1 << 20, ..Limits::default() };
    let many: Vec<(u64, u64)> = (0..3000).map(|n| (n * 20_000_001, 1)).collect();
    for (what, members) in [
        ("more than 65,535 bytes", vec![Member::file("f", "").xattr("user.a", vec![0; 65_536])]),
        (
            "more than 256 KiB",
            vec![
                ["user.a", "user.b", "user.c", "user.d", "user.e"]
                    .iter()
                    .fold(Member::file("f", ""), |member, name| member.xattr(name, vec![0; 60_000])),
            ],
        ),
        ("too many pieces", vec![Member::sparse("f", 60_000_000_000, &many)]),
    ] {
        let error = index_of(&archive(&members), &limits).unwrap_err();
        assert!(matches!(&error, IndexingError::Unfit { why, .. } if why.contains(what)), "{what}: {error:?}");
        assert_eq!(error.kind(), plies_oci::ErrorKind::FailedPrecondition);
    }
}

#[test]
fn no_other_image_is_taken_for_the_index_of_a_tar() {
    let tar = archive(&[Member::dir("d"), Member::file("d/f", "content"), Member::sparse("s", 5000, &[(100, 700)])]);
    let (image, _) = index_of(&tar, &Limits::default()).unwrap();
    erofs::verify(image.as_slice(), diff_id(&tar)).unwrap();
    for at in 0..image.len() {
        let mut mutated = image.clone();
        mutated[at] ^= 1 << (at % 8);
        let error = erofs::verify(mutated.as_slice(), diff_id(&tar)).unwrap_err();
        assert!(matches!(error, VerifyError::Damaged | VerifyError::TooNew { .. }), "byte {at}: {error:?}");
    }
    for length in [0, 1, 511, 512, 1024, image.len() - 512, image.len() - 1] {
        assert!(matches!(erofs::verify(&image[..length], diff_id(&tar)), Err(VerifyError::Damaged)), "{length} bytes");
    }
    assert!(matches!(erofs::verify([&image[..], b"x"].concat().as_slice(), diff_id(&tar)), Err(VerifyError::Damaged)));
    let other = diff_id(b"another tar");
    assert!(matches!(erofs::verify(image.as_slice(), other), Err(VerifyError::OtherTar { wanted }) if wanted == other));
}

#[test]
fn bytes_of_version_1_are_pinned() {
    let tar = archive(&[
        Member::dir("d").xattr("user.a", "shared"),
        Member::file("d/f", "content").xattr("user.a", "shared").xattr("user.b", "own"),
        Member::link("d/g", "d/f").xattr("user.a", "shared").xattr("user.b", "own"),
        Member::symlink("l", "d/f"),
        Member::file("d/.wh.gone", ""),
        Member::sparse("s", 5000, &[(100, 700), (4096, 904)]),
        Member::device("c", b'3', 1, 3),
    ]);
    let (image, _) = index_of(&tar, &Limits::default()).unwrap();
    let digest = "17076477c795e1e21eb5fba36582be9f5a725c10a899c5038f79f279eee08175";
    assert_eq!((image.len(), BlobDigest::of(&image).hex().as_str()), (5632, digest));
}

/// In plain numbers, so that a mistake in the writer's constants shows even where nothing can be mounted.
#[test]
fn fields_stand_where_the_kernel_reads_them() {
    let tar = archive(&[Member::file("f", "content").owner(70_000, 80_000).mode(0o4755)]);
    let (image, _) = index_of(&tar, &Limits::default()).unwrap();
    let number = |at: usize, bytes: usize| {
        image[at..at + bytes].iter().rev().fold(0_u64, |number, byte| (number << 8) | u64::from(*byte))
    };
    assert_eq!(number(1024, 4), 0xE0F5_E1E2);
    assert_eq!(number(1024 + 12, 1), 9, "blocks of 512 bytes");
    assert_eq!(number(1024 + 36, 4) * 512, image.len() as u64);
    assert_eq!(number(1024 + 80, 4), 0xC, "chunks and a table of devices");
    assert_eq!(&image[1024 + 128..1024 + 192], diff_id(&tar).hex().as_bytes());
    assert_eq!(number(1024 + 192, 4) * 512, tar.len() as u64);
    let root = number(1024 + 14, 2) as usize * 32;
    assert_eq!(number(root + 4, 2), 0o040_755);
    // A pax header of 1,024 bytes, and the header.
    let file = root + 32 * (64_usize + 12 * 3 + 4).div_ceil(32);
    assert_eq!((number(file + 4, 2), number(file + 24, 4), number(file + 28, 4)), (0o104_755, 70_000, 80_000));
    assert_eq!((number(file, 2), number(file + 8, 8)), (9, 7));
    assert_eq!((number(file + 64 + 2, 2), number(file + 64 + 4, 4)), (1, 3), "the tar's fourth block");
}

fn member() -> impl Strategy<Value = Member> {
    let component = prop_oneof![
        6 => Just("a"), 6 => Just("b"), 4 => Just("c"), 2 => Just("l"), 1 => Just(".wh.a"), 1 => Just(".wh.b"),
        1 => Just(".wh..wh..opq"), 1 => Just(".."), 1 => Just(".wh..wh.aufs")
    ];
    let path = || proptest::collection::vec(component.clone(), 1..4).prop_map(|parts| parts.join("/"));
    let target = prop_oneof![path(), path().prop_map(|path| format!("/{path}")), Just("../../x".to_owned())];
    let size = prop_oneof![Just(0_usize), Just(1), Just(511), Just(512), Just(513), Just(5000)];
    let runs = (proptest::collection::vec((0_u64..3000, 1_u64..3000), 0..4), 0_u64..3000, any::<bool>()).prop_map(
        |(gaps, rest, aligned)| {
            let mut at = 0;
            let mut runs = Vec::new();
            for (gap, length) in gaps {
                let (gap, length) = if aligned { (gap & !511, length.next_multiple_of(512)) } else { (gap, length) };
                runs.push((at + gap, length));
                at += gap + length;
            }
            (at + rest, runs)
        },
    );
    let what = prop_oneof![
        6 => (path(), size).prop_map(|(path, size)| {
            let size = if path.contains(".wh.") { 0 } else { size };
            Member::file(&path, vec![size as u8; size])
        }),
        2 => (path(), runs).prop_map(|(path, (size, runs))| Member::sparse(&path, size, &runs)),
        5 => path().prop_map(|path| Member::dir(&path)),
        4 => (path(), target).prop_map(|(path, target)| Member::symlink(&path, &target)),
        3 => (path(), path()).prop_map(|(path, target)| Member::link(&path, &target)),
        1 => path().prop_map(|path| Member::device(&path, b'3', 1, 3)),
        1 => path().prop_map(|path| Member::new(&path, b'6')),
    ];
    let mode = prop_oneof![Just(0o644_u32), Just(0o4755), Just(0), Just(0o1777), 0_u32..0o10000];
    let owner = prop_oneof![Just(0_u32), Just(1000), Just(i32::MAX as u32)];
    let mtime = prop_oneof![Just("0"), Just("1234567890.5"), Just("-1.000000001")];
    let xattr = prop_oneof![
        Just(("user.a", b"1".to_vec())),
        Just(("user.b", vec![7; 300])),
        Just(("trusted.t", b"".to_vec())),
        Just(("security.capability", CAPABILITY.to_vec())),
        Just(("com.apple.x", b"x".to_vec())),
        Just(("system.posix_acl_access", acl(&[(1, 7, 0), (2, 6, 5), (4, 5, 0), (16, 7, 0), (32, 4, 0)]))),
    ];
    (what, mode, owner, mtime, proptest::collection::vec(xattr, 0..3)).prop_map(
        |(member, mode, owner, mtime, xattrs)| {
            let member = Member { mtime, ..member.mode(mode).owner(owner, owner / 2) };
            xattrs.into_iter().fold(member, |member, (name, value)| member.xattr(name, value))
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn privileged_random_archives_mount_as_they_apply(members in proptest::collection::vec(member(), 0..14)) {
        if !skip() {
            // Refused by both, for the same reason, is as good.
            let _refused = compare("random", &archive(&members));
        }
    }
}
