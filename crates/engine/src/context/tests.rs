use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, FileType, Mode, XattrFlags};

use super::*;
use crate::dockerfile::Ignore;

fn dir(entries: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, content) in entries {
        put(dir.path(), path, content);
    }
    dir
}

/// A file, or a directory if the path ends with a slash.
fn put(root: &Path, path: &str, content: &str) {
    let full = root.join(path);
    if path.ends_with('/') {
        fs::create_dir_all(full).unwrap();
        return;
    }
    fs::create_dir_all(full.parent().unwrap()).unwrap();
    fs::write(full, content).unwrap();
}

fn context(root: &Path, ignore: &str) -> Tree {
    let ignore = Ignore::parse(".dockerignore", ignore.as_bytes()).unwrap();
    Tree::context(Tree::open_dir(root).unwrap(), Some(ignore))
}

fn stage(root: &Path) -> Tree {
    Tree::stage(Tree::open_dir(root).unwrap())
}

fn select(tree: &Tree, sources: &[&str]) -> Selection {
    let mut selection = Selection::new(None);
    for source in sources {
        selection.add(tree, source.as_bytes()).unwrap();
    }
    selection
}

fn hash(tree: &Tree, sources: &[&str]) -> ContentHash {
    tree.hash(&select(tree, sources)).unwrap()
}

fn copy_to(tree: &Tree, sources: &[&str], root: &Path, dest: &str) -> Result<Copied, CopyError> {
    copy_with(tree, &select(tree, sources), root, dest, None, None)
}

fn copy_with(
    tree: &Tree,
    selection: &Selection,
    root: &Path,
    dest: &str,
    owner: Option<Owner>,
    chmod: Option<&str>,
) -> Result<Copied, CopyError> {
    let options = CopyOptions {
        dest: Destination::new(b"/", dest.as_bytes()),
        owner,
        chmod: chmod.map(|chmod| Chmod::parse(chmod).unwrap()),
    };
    copy(tree, selection, Tree::open_dir(root).unwrap().as_fd(), &options)
}

fn listing(root: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let is_dir = path.symlink_metadata().unwrap().is_dir();
            let slash = if is_dir { "/" } else { "" };
            names.push(format!("{}{slash}", path.strip_prefix(root).unwrap().display()));
            if is_dir {
                todo.push(path);
            }
        }
    }
    names.sort();
    names
}

fn mode(path: &Path) -> u32 {
    path.symlink_metadata().unwrap().mode() & 0o7777
}

fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("SKIPPED: not root");
    }
    is_root
}

// --- selecting

#[test]
fn sources_are_paths_or_patterns_inside_the_tree() {
    let root = dir(&[("a/x.c", ""), ("a/y.c", ""), ("b/x.c", ""), ("b/.h.c", ""), ("top.c", ""), ("we[i]rd", "")]);
    let tree = context(root.path(), "");
    let paths = |source: &str| -> Vec<String> {
        let selection = select(&tree, &[source]);
        selection.items().iter().map(|item| String::from_utf8(item.path().unwrap().to_vec()).unwrap()).collect()
    };
    assert_eq!(paths("a/x.c"), ["a/x.c"]);
    assert_eq!(paths("/a/../../a/./x.c"), ["a/x.c"]);
    assert_eq!(paths("*/x.c"), ["a/x.c", "b/x.c"]);
    assert_eq!(paths("b/*"), ["b/.h.c", "b/x.c"]);
    assert_eq!(paths("*.c"), ["top.c"]);
    assert_eq!(paths("?"), ["a", "b"]);
    assert_eq!(paths("a/[y-z].c"), ["a/y.c"]);
    assert_eq!(paths("we\\[i\\]rd"), ["we[i]rd"]);
    assert_eq!(paths("nothing*"), [""; 0]);
    assert_eq!(paths("top.c/*"), [""; 0]);
    assert_eq!(paths("."), [""]);
    let error = Selection::new(None).add(&tree, b"missing").unwrap_err();
    assert_eq!(error.to_string(), "\"missing\" not found");
    assert!(matches!(Selection::new(None).add(&tree, b"a[").unwrap_err(), SelectError::Pattern { .. }));
}

#[test]
fn ignored_sources_are_not_there_and_that_is_said() {
    let root = dir(&[("a/keep", ""), ("a/drop", ""), ("secret", "")]);
    let tree = context(root.path(), "secret\na\n!a/keep\n");
    let error = Selection::new(None).add(&tree, b"secret").unwrap_err();
    assert_eq!(error.to_string(), "\"secret\" not found (it is excluded by the ignore file)");
    let to = tempfile::tempdir().unwrap();
    copy_to(&tree, &["."], to.path(), "/").unwrap();
    assert_eq!(listing(to.path()), ["a/", "a/keep"]);
    let to = tempfile::tempdir().unwrap();
    copy_to(&tree, &["a"], to.path(), "/d").unwrap();
    assert_eq!(listing(to.path()), ["d/", "d/keep"]);
    // By a wildcard it is no match.
    assert!(select(&tree, &["s*"]).items().is_empty());
}

#[test]
fn excludes_are_relative_to_each_source() {
    let root = dir(&[("a/x.o", ""), ("a/sub/y.o", ""), ("a/sub/y.c", ""), ("z.o", "")]);
    let tree = context(root.path(), "");
    let mut selection = Selection::new(Some(Ignore::from_patterns(["**/*.o"]).unwrap()));
    selection.add(&tree, b"a").unwrap();
    selection.add(&tree, b"z.o").unwrap();
    let to = tempfile::tempdir().unwrap();
    copy_with(&tree, &selection, to.path(), "/", None, None).unwrap();
    assert_eq!(listing(to.path()), ["sub/", "sub/y.c"]);
}

#[test]
fn p20_sources_are_resolved_inside_the_tree() {
    let outside = dir(&[("canary", "outside")]);
    let root = dir(&[("real/file", "inside"), ("canary", "inside")]);
    symlink("/real", root.path().join("abs")).unwrap();
    symlink("../../../..", root.path().join("up")).unwrap();
    symlink(outside.path(), root.path().join("out")).unwrap();
    symlink("/canary", root.path().join("link")).unwrap();
    symlink("a", root.path().join("b")).unwrap();
    symlink("b", root.path().join("a")).unwrap();
    let tree = stage(root.path());
    let to = tempfile::tempdir().unwrap();
    copy_to(&tree, &["abs/file", "link", "up/canary"], to.path(), "/d/").unwrap();
    assert_eq!(listing(to.path()), ["d/", "d/canary", "d/file", "d/link"]);
    assert_eq!(fs::read_to_string(to.path().join("d/canary")).unwrap(), "inside");
    // What the last link points to is copied, not the link.
    assert!(to.path().join("d/link").symlink_metadata().unwrap().is_file());
    for source in ["out/canary", "a", "a/x"] {
        assert!(Selection::new(None).add(&tree, source.as_bytes()).is_err(), "{source}");
    }
    // A pattern doesn't walk through links, and finds them.
    assert!(select(&tree, &["o*/canary"]).items().is_empty());
}

// --- hashing

#[test]
fn c04_every_kind_of_change_but_time_changes_the_hash() {
    let root = dir(&[("d/file", "bytes"), ("d/other", "x"), ("d/sub/deep", "y"), ("d/empty/", "")]);
    symlink("file", root.path().join("d/link")).unwrap();
    let at = |path: &str| -> PathBuf { root.path().join(path) };
    let tree = stage(root.path());
    let first = hash(&tree, &["d"]);
    assert_eq!(first, hash(&tree, &["d"]), "the same twice");
    let mut seen = vec![first];
    let mut changed = |what: &str| {
        let now = hash(&tree, &["d"]);
        assert!(!seen.contains(&now), "{what} went unnoticed");
        seen.push(now);
    };
    fs::write(at("d/file"), "bytez").unwrap();
    changed("a byte");
    fs::set_permissions(at("d/file"), fs::Permissions::from_mode(0o755)).unwrap();
    changed("a file's mode");
    fs::set_permissions(at("d/sub"), fs::Permissions::from_mode(0o711)).unwrap();
    changed("a directory's mode");
    fs::rename(at("d/sub/deep"), at("d/sub/deeper")).unwrap();
    changed("a name");
    fs::remove_dir(at("d/empty")).unwrap();
    changed("an empty directory");
    fs::remove_file(at("d/link")).unwrap();
    symlink("other", at("d/link")).unwrap();
    changed("a link's text");
    fs::remove_file(at("d/link")).unwrap();
    fs::write(at("d/link"), "other").unwrap();
    changed("a file in a link's place");
    fs::remove_file(at("d/link")).unwrap();
    fs::hard_link(at("d/other"), at("d/link")).unwrap();
    changed("a hard link");
    if rustix::fs::setxattr(at("d/file"), "user.test", b"1", XattrFlags::empty()).is_ok() {
        changed("an attribute");
        rustix::fs::setxattr(at("d/file"), "user.test", b"2", XattrFlags::empty()).unwrap();
        changed("an attribute's value");
    } else {
        eprintln!("SKIPPED: no user attributes here");
    }
    if is_root() {
        std::os::unix::fs::chown(at("d/file"), Some(12), None).unwrap();
        changed("an owner");
        std::os::unix::fs::chown(at("d/file"), None, Some(12)).unwrap();
        changed("a group");
        std::os::unix::fs::lchown(at("d/sub"), Some(12), None).unwrap();
        changed("a directory's owner");
        rustix::fs::setxattr(at("d/file"), "trusted.test", b"1", XattrFlags::empty()).unwrap();
    }
    let before = hash(&tree, &["d"]);
    for path in ["d", "d/file", "d/sub"] {
        File::open(at(path)).unwrap().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).unwrap();
    }
    assert_eq!(hash(&tree, &["d"]), before, "times count");
    fs::set_permissions(at("d"), fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(hash(&tree, &["d"]), before, "the source directory itself isn't copied");
    let elsewhere = dir(&[]);
    copy_to(&tree, &["d"], elsewhere.path(), "/d").unwrap();
    assert_eq!(hash(&stage(elsewhere.path()), &["d"]), before, "a copy has the hash of what it is a copy of");
}

#[test]
fn large_files_count_in_their_places_however_long_they_take() {
    // Some are hashed by threads of their own, and end before those that came first.
    let sizes = [3 << 20, 256 << 10, 1, (256 << 10) - 1, 1 << 20, 0, 300 << 10];
    let of = |swapped: Option<usize>, changed: Option<usize>| {
        let tree = dir(&[]);
        for (number, size) in sizes.iter().enumerate() {
            let shown = if swapped == Some(number) { number + 1 } else { number };
            let shown = if number > 0 && swapped == Some(number - 1) { number - 1 } else { shown };
            let mut bytes = vec![b'a' + u8::try_from(shown).unwrap(); *size];
            if changed == Some(number) {
                *bytes.last_mut().unwrap() = b'z';
            }
            fs::write(tree.path().join(format!("f{number}")), bytes).unwrap();
            fs::write(tree.path().join(format!("f{number}-small")), "small").unwrap();
        }
        hash(&context(tree.path(), ""), &["."])
    };
    let plain = of(None, None);
    for _ in 0..5 {
        assert_eq!(of(None, None), plain);
    }
    for number in [0, 1, 3, 4, 6] {
        assert_ne!(of(None, Some(number)), plain, "the last byte of f{number}");
    }
    for number in [0, 3] {
        assert_ne!(of(Some(number), None), plain, "f{number} and the next one changed places");
    }
}

#[test]
fn hash_depends_on_sources_names_and_order_but_not_on_where_the_tree_is() {
    let root = dir(&[("a", "1"), ("b", "1"), ("d/a", "1")]);
    let tree = context(root.path(), "");
    assert_ne!(hash(&tree, &["a"]), hash(&tree, &["b"]));
    assert_ne!(hash(&tree, &["a", "b"]), hash(&tree, &["b", "a"]));
    assert_eq!(hash(&tree, &["a"]), hash(&tree, &["d/a"]), "the file lands under the same name");
    let moved = dir(&[("x/y/a", "1")]);
    assert_eq!(hash(&context(moved.path(), ""), &["x/y/a"]), hash(&tree, &["a"]));
    let inline = |bytes: &[u8]| {
        let mut selection = Selection::new(None);
        selection.add_inline(b"a", bytes.to_vec());
        tree.hash(&selection).unwrap()
    };
    assert_ne!(inline(b"1"), inline(b"2"));
}

#[test]
fn hash_ignores_what_is_ignored_and_who_owns_a_context() {
    let root = dir(&[("a/keep", ""), ("a/log", "1")]);
    let tree = context(root.path(), "**/log");
    let before = hash(&tree, &["a"]);
    put(root.path(), "a/log", "2");
    assert_eq!(hash(&tree, &["a"]), before);
    if is_root() {
        std::os::unix::fs::chown(root.path().join("a/keep"), Some(12), Some(12)).unwrap();
        assert_eq!(hash(&tree, &["a"]), before);
    }
}

#[test]
fn f07_pipes_are_refused_in_contexts_without_opening_them() {
    let root = dir(&[("a/x", "")]);
    rustix::fs::mknodat(CWD, root.path().join("a/pipe"), FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap();
    let tree = context(root.path(), "");
    let error = tree.hash(&select(&tree, &["a"])).unwrap_err();
    assert_eq!(error.to_string(), "\"a/pipe\" is a pipe or a device");
    let error = tree.hash(&select(&tree, &["a/pipe"])).unwrap_err();
    assert_eq!(error.to_string(), "\"a/pipe\" is a pipe or a device");
    let to = tempfile::tempdir().unwrap();
    assert!(matches!(copy_to(&tree, &["a"], to.path(), "/"), Err(CopyError::Special { .. })));
    // A stage may have them.
    let tree = stage(root.path());
    hash(&tree, &["a"]);
    copy_to(&tree, &["a"], to.path(), "/").unwrap();
    assert!(to.path().join("pipe").metadata().unwrap().file_type().is_fifo());
    assert!(tree.read_file(b"a/pipe", 10).is_err());
}

#[test]
fn sockets_are_passed_over() {
    let root = dir(&[("a/x", "")]);
    let _socket = std::os::unix::net::UnixListener::bind(root.path().join("a/socket")).unwrap();
    let to = tempfile::tempdir().unwrap();
    copy_to(&context(root.path(), ""), &["a"], to.path(), "/").unwrap();
    assert_eq!(listing(to.path()), ["x"]);
}

// --- copying

#[test]
fn destinations_as_in_docker() {
    let root = dir(&[("file", "f"), ("other", "o"), ("d/x", "x"), ("d/sub/y", "y")]);
    let tree = context(root.path(), "");
    // What is there before, sources, destination, what is there after.
    type Case = (&'static [&'static str], &'static [&'static str], &'static str, &'static [&'static str]);
    let table: &[Case] = &[
        (&[], &["file"], "/new", &["new"]),
        (&[], &["file"], "/new/", &["new/", "new/file"]),
        (&[], &["file"], "new/deep/name", &["new/", "new/deep/", "new/deep/name"]),
        (&["etc/"], &["file"], "/etc", &["etc/", "etc/file"]),
        (&["etc/"], &["file"], "/etc/.", &["etc/", "etc/file"]),
        (&[], &["file", "other"], "/dir", &["dir/", "dir/file", "dir/other"]),
        (&[], &["d"], "/new", &["new/", "new/sub/", "new/sub/y", "new/x"]),
        (&["new/x", "new/z"], &["d"], "/new", &["new/", "new/sub/", "new/sub/y", "new/x", "new/z"]),
        (&[], &["d"], "/", &["sub/", "sub/y", "x"]),
        (&[], &["d/"], "./", &["sub/", "sub/y", "x"]),
        (&[], &["."], "/w", &["w/", "w/d/", "w/d/sub/", "w/d/sub/y", "w/d/x", "w/file", "w/other"]),
        (&[], &["d", "file"], "/m/", &["m/", "m/file", "m/sub/", "m/sub/y", "m/x"]),
        (&["a/b/"], &["file"], "/a/b/../../../c", &["a/", "a/b/", "c"]),
    ];
    for (before, sources, dest, after) in table {
        let to = dir(&before.iter().map(|path| (*path, "old")).collect::<Vec<_>>());
        copy_to(&tree, sources, to.path(), dest).unwrap();
        assert_eq!(listing(to.path()), *after, "{sources:?} to {dest}");
    }
    let to = dir(&[("x/", ""), ("file", "old"), ("new/sub", "old")]);
    assert!(matches!(copy_to(&tree, &["d"], to.path(), "/"), Err(CopyError::IsADirectory { .. })));
    assert!(matches!(copy_to(&tree, &["d"], to.path(), "/file"), Err(CopyError::NotADirectory { .. })));
    assert!(matches!(copy_to(&tree, &["d"], to.path(), "/new"), Err(CopyError::NotADirectory { .. })));
    assert!(matches!(copy_to(&tree, &["d/x"], to.path(), "/file/y"), Err(CopyError::NotADirectory { .. })));
    assert!(matches!(copy_to(&tree, &["d/x"], to.path(), "/file/"), Err(CopyError::NotADirectory { .. })));
    let copied = copy_to(&tree, &["file"], to.path(), "/file").unwrap();
    assert_eq!(copied, Copied { files: 1, bytes: 1 });
    assert_eq!(fs::read_to_string(to.path().join("file")).unwrap(), "f");
}

#[test]
fn modes_times_attributes_and_links_come_along() {
    let root = dir(&[("d/file", "f"), ("d/sub/", "")]);
    let at = |path: &str| root.path().join(path);
    fs::set_permissions(at("d/file"), fs::Permissions::from_mode(0o4711)).unwrap();
    fs::set_permissions(at("d/sub"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::hard_link(at("d/file"), at("d/sub/again")).unwrap();
    symlink("/no/where", at("d/dangling")).unwrap();
    let past = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    File::open(at("d/file")).unwrap().set_modified(past).unwrap();
    File::open(at("d/sub")).unwrap().set_modified(past).unwrap();
    let with_xattr = rustix::fs::setxattr(at("d/file"), "user.test", b"1", XattrFlags::empty()).is_ok();
    let to = tempfile::tempdir().unwrap();
    copy_to(&context(root.path(), ""), &["d"], to.path(), "/").unwrap();
    let got = |path: &str| to.path().join(path);
    assert_eq!((mode(&got("file")), mode(&got("sub"))), (0o4711, 0o1777));
    assert_eq!(got("file").metadata().unwrap().modified().unwrap(), past);
    assert_eq!(got("sub").metadata().unwrap().modified().unwrap(), past);
    assert_eq!(got("file").metadata().unwrap().ino(), got("sub/again").metadata().unwrap().ino());
    assert_eq!(fs::read_link(got("dangling")).unwrap(), Path::new("/no/where"));
    if with_xattr {
        let mut value = [0; 8];
        assert_eq!(rustix::fs::getxattr(got("file"), "user.test", &mut value[..]).unwrap(), 1);
    }
}

#[test]
fn privileged_owners_as_asked() {
    if !is_root() {
        return;
    }
    let root = dir(&[("d/file", "f"), ("d/sub/x", "")]);
    for path in ["d/file", "d/sub"] {
        std::os::unix::fs::chown(root.path().join(path), Some(77), Some(78)).unwrap();
    }
    symlink("file", root.path().join("d/link")).unwrap();
    let owner = |path: PathBuf| {
        let metadata = path.symlink_metadata().unwrap();
        (metadata.uid(), metadata.gid())
    };
    let to = tempfile::tempdir().unwrap();
    copy_to(&context(root.path(), ""), &["d"], to.path(), "/c").unwrap();
    copy_to(&stage(root.path()), &["d"], to.path(), "/s").unwrap();
    assert_eq!(owner(to.path().join("c/file")), (0, 0));
    assert_eq!(owner(to.path().join("s/file")), (77, 78));
    assert_eq!(owner(to.path().join("s/sub")), (77, 78));
    assert_eq!(owner(to.path().join("s")), (0, 0));
    let tree = stage(root.path());
    let asked = Some(Owner { uid: 5, gid: 6 });
    copy_with(&tree, &select(&tree, &["d"]), to.path(), "/new/deep", asked, Some("u=rwX,go=")).unwrap();
    for path in ["new", "new/deep", "new/deep/file", "new/deep/sub", "new/deep/link"] {
        assert_eq!(owner(to.path().join(path)), (5, 6), "{path}");
    }
    assert_eq!(mode(&to.path().join("new/deep/file")), 0o600);
    assert_eq!(mode(&to.path().join("new/deep/sub")), 0o700);
    assert_eq!(mode(&to.path().join("new/deep")), 0o755);
}

#[test]
fn destination_links_lead_nowhere_outside() {
    let outside = dir(&[("canary", "safe")]);
    let root = dir(&[("file", "f"), ("d/link", "f"), ("d/dir/x", "f")]);
    let tree = context(root.path(), "");
    let to = dir(&[("real/", "")]);
    symlink(outside.path(), to.path().join("out")).unwrap();
    symlink("/real", to.path().join("abs")).unwrap();
    symlink("/later/there", to.path().join("dangling")).unwrap();
    symlink("../../../../../../etc", to.path().join("up")).unwrap();
    // Directories on the way are made inside the root, even behind links.
    copy_to(&tree, &["file"], to.path(), "/out/canary").unwrap();
    copy_to(&tree, &["file"], to.path(), "/abs/").unwrap();
    copy_to(&tree, &["file"], to.path(), "/dangling").unwrap();
    copy_to(&tree, &["file"], to.path(), "/up/plies-canary").unwrap();
    assert_eq!(fs::read_to_string(outside.path().join("canary")).unwrap(), "safe");
    assert!(!Path::new("/etc/plies-canary").exists());
    for path in ["real/file", "later/there", "etc/plies-canary"] {
        assert!(to.path().join(path).symlink_metadata().unwrap().is_file(), "{path}");
    }
    // Below the destination a link is replaced by a file, and never taken for a directory.
    fs::create_dir(to.path().join("below")).unwrap();
    symlink(outside.path().join("canary"), to.path().join("below/link")).unwrap();
    copy_to(&tree, &["d/link"], to.path(), "/below/").unwrap();
    assert_eq!(fs::read_to_string(outside.path().join("canary")).unwrap(), "safe");
    symlink(outside.path(), to.path().join("below/dir")).unwrap();
    assert!(matches!(copy_to(&tree, &["d"], to.path(), "/below"), Err(CopyError::NotADirectory { .. })));
    assert_eq!(listing(outside.path()), ["canary"]);
}

#[test]
fn inline_files_are_copied_like_files() {
    let to = dir(&[("etc/", "")]);
    let tree = context(to.path(), "");
    let mut selection = Selection::new(None);
    selection.add_inline(b"EOF", b"text\n".to_vec());
    copy_with(&tree, &selection, to.path(), "/etc/motd", None, None).unwrap();
    copy_with(&tree, &selection, to.path(), "/etc", None, Some("600")).unwrap();
    assert_eq!(fs::read_to_string(to.path().join("etc/motd")).unwrap(), "text\n");
    assert_eq!((mode(&to.path().join("etc/motd")), mode(&to.path().join("etc/EOF"))), (0o644, 0o600));
}

#[test]
fn large_files_are_copied_whole() {
    let bytes: Vec<u8> = (0..3_000_001u32).map(|i| (i % 251) as u8).collect();
    let root = dir(&[]);
    fs::write(root.path().join("big"), &bytes).unwrap();
    let to = tempfile::tempdir().unwrap();
    let copied = copy_to(&context(root.path(), ""), &["big"], to.path(), "/big").unwrap();
    assert_eq!(copied.bytes, bytes.len() as u64);
    assert!(fs::read(to.path().join("big")).unwrap() == bytes);
}

#[test]
fn f06_read_file_stays_inside_and_within_its_limit() {
    let root = dir(&[("Dockerfile", "FROM x\n"), ("sub/", "")]);
    symlink("/etc/hostname", root.path().join("out")).unwrap();
    symlink("../Dockerfile", root.path().join("sub/in")).unwrap();
    let tree = context(root.path(), "");
    assert_eq!(tree.read_file(b"Dockerfile", 100).unwrap(), b"FROM x\n");
    assert_eq!(tree.read_file(b"/sub/in", 100).unwrap(), b"FROM x\n");
    assert_eq!(tree.read_file(b"Dockerfile", 6).unwrap_err().kind(), std::io::ErrorKind::FileTooLarge);
    assert!(tree.read_file(b"out", 100).is_err());
    assert!(tree.read_file(b"sub", 100).is_err());
}

#[test]
fn ignore_file_beside_the_dockerfile_wins() {
    let root = dir(&[("app.Dockerfile.dockerignore", "a"), (".dockerignore", "b")]);
    let tree = context(root.path(), "");
    let hides =
        |dockerfile: &str, path: &[u8]| Ignore::of_context(&tree, Some((&tree, dockerfile))).unwrap().hides(path);
    assert!(hides("app.Dockerfile", b"a") && !hides("app.Dockerfile", b"b"));
    assert!(hides("Dockerfile", b"b") && !hides("Dockerfile", b"a"));
    fs::remove_file(root.path().join(".dockerignore")).unwrap();
    assert!(Ignore::of_context(&tree, None).unwrap().is_empty());
}

#[test]
fn p12_depth_is_limited() {
    let root = dir(&[]);
    let mut path = root.path().to_owned();
    for _ in 0..250 {
        path.push("d");
    }
    fs::create_dir_all(&path).unwrap();
    let tree = context(root.path(), "");
    assert!(matches!(tree.hash(&select(&tree, &["."])), Err(HashError::Io { .. })));
}
