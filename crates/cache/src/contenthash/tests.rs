use std::cell::RefCell;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use plies_testkit::tools;
use proptest::prelude::*;
use rustix::fs::{CWD, Mode, XattrFlags};

use super::*;

/// Makes a tree. A line is `dir/`, `file=bytes`, `link->target` or `name==other name of a file`; directories on the way
/// are made. Modes are 0644 and 0755, whatever the umask says.
fn make(root: &Path, lines: &[&str]) {
    fs::set_permissions(root, fs::Permissions::from_mode(0o755)).unwrap();
    for line in lines {
        let (path, put): (&str, &dyn Fn(&Path)) = if let Some((path, target)) = line.split_once("->") {
            (path, &move |at| symlink(target, at).unwrap())
        } else if let Some((path, other)) = line.split_once("==") {
            (path, &move |at| fs::hard_link(root.join(other), at).unwrap())
        } else if let Some((path, bytes)) = line.split_once('=') {
            (path, &move |at| {
                fs::write(at, bytes).unwrap();
                fs::set_permissions(at, fs::Permissions::from_mode(0o644)).unwrap();
            })
        } else {
            (line.trim_end_matches('/'), &|at| make_dir(at))
        };
        let at = root.join(path);
        let above: Vec<_> = Path::new(path).parent().unwrap().components().collect();
        for depth in 1..=above.len() {
            make_dir(&root.join(above[..depth].iter().collect::<PathBuf>()));
        }
        put(&at);
    }
}

fn make_dir(at: &Path) {
    if !at.is_dir() {
        fs::create_dir(at).unwrap();
        fs::set_permissions(at, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

fn tree(lines: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), lines);
    dir
}

/// A path and how it is asked for.
#[derive(Debug, Clone)]
struct Ask {
    path: &'static str,
    options: ChecksumOptions,
}

/// Links are followed.
fn at(path: &'static str) -> Ask {
    Ask { path, options: ChecksumOptions { follow_links: true, ..ChecksumOptions::default() } }
}

impl Ask {
    fn itself(mut self) -> Self {
        self.options.follow_links = false;
        self
    }

    fn wild(mut self) -> Self {
        self.options.wildcard = true;
        self
    }

    fn only(mut self, patterns: &[&str]) -> Self {
        self.options.include = patterns.iter().map(|&pattern| pattern.to_owned()).collect();
        self
    }

    fn but(mut self, patterns: &[&str]) -> Self {
        self.options.exclude = patterns.iter().map(|&pattern| pattern.to_owned()).collect();
        self
    }

    fn of(&self, root: &Path) -> Result<ContentDigest, ChecksumError> {
        self.with(root, &mut HashCache::new())
    }

    fn with(&self, root: &Path, cache: &mut HashCache) -> Result<ContentDigest, ChecksumError> {
        let root = File::open(root).unwrap();
        checksum(root.as_fd(), self.path.as_bytes(), &self.options, cache)
    }
}

/// The digests that BuildKit's own tests expect of the same trees; without an owner of 0 they are others.
#[test]
fn privileged_digests_are_buildkits() {
    if !tools::privileged() {
        return;
    }
    const DATA0: &str = "sha256:cd8e75bca50f2d695f220d0cb0997d8ead387e4f926e8669a92d7f104cc9885b";
    const DATA1: &str = "sha256:c2b5e234f5f38fc5864da7def04782f82501a40d46192e4207d5b3f0c3c4732b";
    const DATA2: &str = "sha256:1c67653c3cf95b12a0014e2c4cd1d776b474b3218aee54155d6ae27b9b999c54";
    const D0: &str = "sha256:d47454417d2c554067fbefe5f5719edc49f3cfe969c36b62e34a187a4da0cc9a";
    const TO_TARGET: &str = "sha256:a2ba571981f48ec34eb79c9a3ab091b6491e825c2f7e9914ea86e8e958be7fae";
    const FOO_DIR: &str = "sha256:9b761577efcb1239cf4be971914c5d7404914dd32ff436401af1764dc5446b83";
    const DOUBLE_STAR: &str = "sha256:aa7448215bbf5b837b35ce64467857d8b9747965573d14d4b31b370586370971";

    let basic = &["foo=data0", "bar=data1", "d0/abc=data0", "d0/def->abc", "d0/ghi->nosuchfile"][..];
    let links = &["target=data0", "sym->target", "sym2->target2", "foo/ghi->target", "y1->foo/ghi"][..];
    let wild = &[
        "bar=data1",
        "foo=data0",
        "fox=data2",
        "x/d0/abc=data0",
        "x/d0/def->abc",
        "x/d0/ghi->nosuchfile",
        "y1->foo",
        "y2->fox",
    ][..];
    let deep = &["prefix/a/b/c/foo/bar=abc"][..];
    let update = &["d0/foo/bar=data0", "d0/foo/subdir1/baz=data1", "d0/foo/subdir2/"][..];
    for (lines, ask, expected) in [
        (basic, at("foo"), DATA0),
        (basic, at("bar"), DATA1),
        (basic, at("d0/abc"), DATA0),
        (basic, at("d0/def"), DATA0),
        (basic, at("d0"), D0),
        (basic, at("/"), "sha256:427c9cf9ae98c0f81fb57a3076b965c7c149b6b0a85625ad4e884236649a42c6"),
        (&["abc=data0", "def->abc", "ghi->nosuchfile"], at("/"), D0),
        (
            &["abc=data0", "def->abc"],
            at("/"),
            "sha256:555ffa3028630d97ba37832b749eda85ab676fd64ffb629fbf0f4ec8c1e3bff1",
        ),
        (links, at("sym").itself(), TO_TARGET),
        (links, at("sym").itself().wild(), TO_TARGET),
        (links, at("foo/ghi").itself(), TO_TARGET),
        (links, at("foo"), FOO_DIR),
        (links, at("foo").but(&["*.git"]), FOO_DIR),
        (links, at("fo?").wild(), "sha256:2797e710c6d1a89ff2d91c834b828b1dc500f2982430a58241df8e146f4c4bb4"),
        (wild, at("f*").itself().wild(), "sha256:0b6731924f0a32a812bf8a729202e55e54ded331f9e4ff2397f681e43694e086"),
        (wild, at("x/d?").itself().wild(), "sha256:6b612ad5c13159112ae26357ef7bd34df29916941ba40ec2ce38dfb70c6c60c3"),
        (wild, at("x/d?/def").wild(), DATA0),
        (wild, at("y*").wild(), "sha256:982153600b9653a1decb0f961e09e2bc1be335cfcaac9b39dbd1120b65fdf92c"),
        (deep, at("prefix/a").only(&["**/foo/**", "**/report"]), DOUBLE_STAR),
        (deep, at("prefix/a").only(&["**/foo", "**/report"]).wild(), DOUBLE_STAR),
        (update, at("d0/foo"), "sha256:e76717544f71725bd759a981554ca17c286b3d222598f46a671b983fd2b8172d"),
        (&["d0/foo=data2"], at("d0/foo"), DATA2),
        (
            &["d0/foo/bar=data0", "d0/foo-subdir/", "d0/foo.subdir=data1"],
            at("d0"),
            "sha256:14276c302c940a80f82ca5477bf766c98a24702d6a9948ee71bb277cdad3ae05",
        ),
        (
            &["test/foo=data0"],
            at("test").but(&["*.git"]),
            "sha256:8f36dfd60011a21345427f4d3177b1223e11fbb732c18dd07cd8b2a27a0b53ca",
        ),
    ] {
        let root = tree(lines);
        assert_eq!(ask.of(root.path()).unwrap().to_string(), expected, "{ask:?} in {lines:?}");
    }
}

/// Two trees, what is asked of each, and whether that comes to the same.
#[test]
fn equal_content_and_nothing_else_has_equal_digests() {
    type Lines = &'static [&'static str];
    let lib: Lines = &[
        "lib/sub/foo=data0",
        "lib/sub/link->../../lib2",
        "lib2/sub/foo=data0",
        "link1->/lib",
        "link2->/lib/",
        "link3->/lib/.",
        "link4->/lib/../lib",
        "link5->../lib",
        "link6->../../../../lib",
        "d/deep/up->../../../../../lib/sub",
    ];
    let one: Lines = &["x=data0"];
    let names: Lines = &["a/b=1", "c=1"];
    let table: &[(&str, Lines, Ask, bool, Lines, Ask)] = &[
        // What counts.
        ("the name of a file does not count", &["a=1"], at("a"), true, &["b=1"], at("b")),
        ("nor where it lies", &["a=1"], at("a"), true, &["x/y/b=1"], at("x/y/b")),
        ("its bytes do", &["a=1"], at("a"), false, &["a=2"], at("a")),
        ("and how many they are", &["a="], at("a"), false, &["a=1"], at("a")),
        ("a file is no directory", &["a="], at("a"), false, &["a/"], at("a")),
        ("nor a link", &["a=b"], at("a"), false, &["a->b"], at("a").itself()),
        ("a link is what it says", &["a->b"], at("a").itself(), false, &["a->c"], at("a").itself()),
        ("there or not", &["a->b"], at("a").itself(), true, &["a->b", "b=1"], at("a").itself()),
        ("two names are two equal files", &["d/a=1", "d/b==d/a"], at("d"), true, &["d/a=1", "d/b=1"], at("d")),
        ("a hard link is the file", &["a/foo=1", "ln==a/foo"], at("ln"), true, &["f=1"], at("f")),
        ("and no other", &["a=1", "b==a", "c=1", "d==c"], at("/"), false, &["a=1", "b==a", "c=2", "d==c"], at("/")),
        ("names below a directory count", &["d/a=1"], at("d"), false, &["d/b=1"], at("d")),
        ("an empty directory counts", &["d/a=1", "d/e/"], at("d"), false, &["d/a=1"], at("d")),
        ("a directory's own name does not", &["d/a=1"], at("d"), true, &["e/a=1"], at("e")),
        ("a subtree is what it is alone", &["d/a=1", "d/l->a"], at("d"), true, &["a=1", "l->a"], at("/")),
        ("what lies beside it does not count", &["d/a=1", "e=1"], at("d"), true, &["d/a=1"], at("d")),
        ("levels count", &["d/a/b=1"], at("d"), false, &["d/a=1", "d/b/"], at("d")),
        ("names do not run into names", &["d/ab=1"], at("d"), false, &["d/a/b=1"], at("d")),
        ("order of making does not count", &["d/a=1", "d/b=2"], at("d"), true, &["d/b=2", "d/a=1"], at("d")),
        ("a broken link counts where it lies", &["d/a=1", "d/l->no"], at("d"), false, &["d/a=1"], at("d")),
        ("links in a directory are not followed", &["d/l->../x", "x=1"], at("d"), true, &["d/l->../x"], at("d")),
        (
            "no name hides behind one that sorts between",
            &["d/foo/bar=0", "d/foo-sub/", "d/foo.sub=1"],
            at("d"),
            false,
            &["d/foo/bar=0", "d/foo-sub/"],
            at("d"),
        ),
        // How a path is written.
        ("slashes do not count", names, at("a/b"), true, names, at("//a///b/")),
        ("nor dots", names, at("a"), true, names, at("./a/./.")),
        ("the root has many names", names, at(""), true, names, at("/")),
        ("and dots", names, at("/"), true, names, at(".")),
        ("dots up stop at the root", names, at("a/b"), true, names, at("../../a/b")),
        ("and are resolved in the text", names, at("c"), true, names, at("a/no/../../c")),
        ("before links are", lib, at("lib"), true, lib, at("d/deep/up/../../../lib")),
        // Links on the way.
        ("through an absolute link", lib, at("link1/sub/foo"), true, one, at("x")),
        ("with a slash at its end", lib, at("link2/sub/foo"), true, one, at("x")),
        ("with a dot at its end", lib, at("link3/sub/foo"), true, one, at("x")),
        ("with dots in it", lib, at("link4/sub/foo"), true, one, at("x")),
        ("out of the root and back", lib, at("link5/sub/foo"), true, one, at("x")),
        ("far out of the root and back", lib, at("link6/sub/foo"), true, one, at("x")),
        ("through a link behind a link", lib, at("link1/sub/link/sub/foo"), true, one, at("x")),
        ("up out of the root from below", lib, at("d/deep/up/foo"), true, one, at("x")),
        ("links on the way are always followed", lib, at("link1/sub/foo").itself(), true, one, at("x")),
        ("the last only if asked to", lib, at("link1"), true, lib, at("lib")),
        ("and else stands for itself", lib, at("link1").itself(), false, lib, at("lib")),
        ("slash or not", lib, at("link1/").itself(), true, lib, at("link1").itself()),
        ("a slash follows nothing", lib, at("link1/").itself(), false, lib, at("link1/")),
    ];
    for (claim, left, ask_left, equal, right, ask_right) in table {
        let (a, b) = (tree(left), tree(right));
        let (a, b) = (ask_left.of(a.path()).unwrap(), ask_right.of(b.path()).unwrap());
        assert_eq!(a == b, *equal, "{claim}: {ask_left:?} in {left:?} and {ask_right:?} in {right:?}");
    }
}

/// As BuildKit's tests of links whose targets can't be told from their text.
#[test]
fn links_lead_where_the_kernel_says() {
    let root = tree(&[
        "target/file=data0",
        "link1/sub/",
        "link1/file->../target/file",
        "link1/file_abs->/target/file",
        "link1/dir->../target",
        "link1/dir_abs->/target",
        "link2/link1->../link1",
        "link2/link1_abs->/link1/",
        "link2/sub->/link1/sub/",
        "link2/round->./sub/../dir",
        "link2/round_abs->/link2/sub/../dir",
        "link3/target->../link2/link1/dir",
        "link3/file->../link2/link1/file",
        "link4->/link2",
    ]);
    let file = at("target/file").of(root.path()).unwrap();
    let dir = at("target").of(root.path()).unwrap();
    // A path to the file, and whether its last component is a link.
    for (path, is_link) in [
        ("link1/file", true),
        ("link1/dir/file", false),
        ("link2/link1/file", true),
        ("link2/link1/file_abs", true),
        ("link2/link1/dir/file", false),
        ("link2/link1/dir_abs/file", false),
        ("link2/link1_abs/file", true),
        ("link2/link1_abs/dir_abs/file", false),
        ("link2/round/file", false),
        ("link2/round_abs/file", false),
        ("link3/file", true),
        ("link3/target/file", false),
        ("link4/round/file", false),
    ] {
        assert_eq!(at(path).of(root.path()).unwrap(), file, "{path}");
        assert_eq!(at(path).itself().of(root.path()).unwrap() != file, is_link, "{path} itself");
    }
    for path in ["link1/dir", "link2/round", "link2/round_abs", "link3/target", "link4/link1/dir_abs"] {
        assert_eq!(at(path).of(root.path()).unwrap(), dir, "{path}");
    }
    let first = at("link1/file").itself().of(root.path()).unwrap();
    for path in ["link2/link1/file", "link2/link1_abs/file", "link4/link1/file"] {
        assert_eq!(at(path).itself().of(root.path()).unwrap(), first, "{path}");
    }
    assert_ne!(at("link1/file_abs").itself().of(root.path()).unwrap(), first, "another text");
}

#[test]
fn what_is_not_there_is_said_to_be_not_there() {
    let root = tree(&["a/f=1", "broken->no", "loop->loop", "a/x->y", "a/y->x", "d/broken->../no"]);
    let error = |ask: Ask| ask.of(root.path()).unwrap_err();
    for path in ["no", "a/no", "no/no", "a/f/x", "broken", "broken/x", "d/broken"] {
        for ask in [at(path), at(path).wild(), at(path).but(&["z"])] {
            let found = error(ask.clone());
            assert!(matches!(found, ChecksumError::NotFound { .. }), "{ask:?}: {found}");
            assert_eq!(found.kind(), ErrorKind::NotFound);
        }
    }
    // A broken link itself is there.
    at("broken").itself().of(root.path()).unwrap();
    at("d").of(root.path()).unwrap();
    for path in ["loop", "a/x", "a/x/f", "loop/f"] {
        assert!(matches!(error(at(path)), ChecksumError::TooManyLinks { .. }), "{path}");
    }
    at("a/x").itself().of(root.path()).unwrap();
    for pattern in ["z*", "a/z*", "no/*", "broken/*", "a/f/*", "*/*/*", "lo[a-b]p"] {
        let found = error(at(pattern).wild());
        assert!(matches!(found, ChecksumError::NoMatch { .. }), "{pattern}: {found}");
        assert_eq!(found.to_string(), format!("nothing matches \"{pattern}\""));
    }
    // A match that is a link to nowhere is no match that can be taken.
    assert!(matches!(error(at("brok*").wild()), ChecksumError::NotFound { .. }));
    at("brok*").wild().itself().of(root.path()).unwrap();
    for ask in [at("a[").wild(), at("a").only(&["a["]), at("a").but(&["!"])] {
        let found = error(ask);
        assert!(matches!(found, ChecksumError::Pattern { .. }), "{found}");
        assert_eq!(found.kind(), ErrorKind::InvalidInput);
    }
}

#[test]
fn links_are_followed_as_often_as_buildkit_does() {
    let root = tree(&["file=1"]);
    symlink("file", root.path().join("0")).unwrap();
    for link in 1..=LINKS_MAX {
        symlink((link - 1).to_string(), root.path().join(link.to_string())).unwrap();
    }
    let path = |link: usize| -> Ask { at(link.to_string().leak()) };
    let file = at("file").of(root.path()).unwrap();
    let mut cache = HashCache::new();
    assert_eq!(path(LINKS_MAX - 1).with(root.path(), &mut cache).unwrap(), file);
    assert_eq!(path(LINKS_MAX - 1).with(root.path(), &mut cache).unwrap(), file);
    let error = path(LINKS_MAX).with(root.path(), &mut cache).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Limit);
    assert!(error.to_string().ends_with("leads through more than 255 symbolic links"), "{error}");
}

#[test]
fn wildcards_and_patterns() {
    let before: &[&str] =
        &["foo=data0", "bar=data1", "d0/abc=abc", "d1/def=def", "d1/deep/er/abc=abc", "l->d1", "lf->foo", "we*rd=1"];
    // The same, and more.
    let after: &[&str] = &[
        "foo=data0",
        "bar=data1",
        "baz=data2",
        "d0/abc=abc",
        "d0/xyz=xyz",
        "d1/def=def",
        "d1/deep/er/abc=abc",
        "d2/",
        "l->d1",
        "lf->foo",
        "we*rd=1",
    ];
    let (before, after) = (tree(before), tree(after));
    // What is asked, and whether the additions change it.
    for (ask, changes) in [
        (at("").only(&["foo"]), false),
        (at("").only(&["foo", "bar"]), false),
        (at("").only(&["foo", "ba*"]), true),
        (at("").only(&["d0"]), true),
        (at("").only(&["d0/*"]), true),
        (at("").only(&["d0/a*"]), false),
        (at("").only(&["d1"]), false),
        (at("").only(&["d2"]), true),
        (at("").only(&["d2/foo"]), false),
        (at("").only(&["d0/*", "!d0/xyz"]), false),
        (at("").only(&["*", "!d0", "!baz", "!d2"]), false),
        (at("").only(&["d0/*"]).but(&["d0/xyz"]), false),
        (at("").only(&["**/abc"]), false),
        (at("").only(&["**/*z"]), true),
        (at("").but(&["baz", "d2", "d0/xyz"]), false),
        (at("").but(&["baz", "d2"]), true),
        (at("").but(&["*", "!d1"]), false),
        (at("").but(&["*", "!d0"]), true),
        (at("").but(&["*", "!d0/abc"]), false),
        (at("").but(&["d*", "!d0/abc", "baz"]), false),
        (at("").but(&["**"]), false),
        (at("").but(&["**/[x-z]*", "*2", "ba?"]), false),
        (at("d0").only(&["abc"]), false),
        (at("d0").only(&["*"]), true),
        (at("d0").but(&["xyz"]), false),
        (at("d0/").but(&["x*"]), false),
        (at("l").but(&["def"]), false),
        (at("d?").wild(), true),
        (at("[d]1").wild(), false),
        (at("d?").wild().but(&["xyz"]), true),
        (at("d[01]").wild().but(&["xyz"]), false),
        (at("d[01]").wild().only(&["abc"]), false),
        (at("d*/abc").wild(), false),
        (at("d*/*").wild(), true),
        (at("*").wild().but(&["abc"]), true),
        (at("f*").wild(), false),
        (at("ba*").wild(), true),
        (at("l*").wild(), false),
    ] {
        let (a, b) = (ask.of(before.path()).unwrap(), ask.of(after.path()).unwrap());
        assert_eq!(a != b, changes, "{ask:?}");
        // With wildcards allowed but not used nothing else comes out.
        if !ask.options.wildcard {
            assert_eq!(ask.clone().wild().of(before.path()).unwrap(), a, "{ask:?}");
        }
    }
    // Two ways to ask, and whether they come to the same.
    let nothing = || Some(ContentDigest::of_nothing());
    for (left, right, equal) in [
        (at("").only(&["d0/*"]), Some(at("").only(&["d0/a*"])), true),
        (at("").only(&["d0/abc"]), Some(at("").only(&["d0"])), true),
        (at("").only(&["foo"]), Some(at("").only(&["foo", "bar"])), false),
        (at("").only(&["d2/foo"]), None, true),
        (at("d1").only(&["foo"]), None, true),
        (at("d1").only(&[""]), None, true),
        (at("").but(&["**"]), None, true),
        (at("foo").but(&["*"]), None, true),
        (at("foo").but(&["foo"]), Some(at("foo")), true),
        (at("foo").only(&["foo"]), None, true),
        (at("foo").only(&["*"]), Some(at("foo")), true),
        (at("foo/").but(&["x"]), Some(at("foo")), true),
        (at("d0").but(&["none"]), Some(at("d0")), true),
        (at("d0/").but(&["none"]), Some(at("d0")), false),
        (at("d0/").but(&[" none ", "", "/none/"]), Some(at("d0/").but(&["none"])), true),
        (at("d1").but(&["deep"]), Some(at("d1").but(&["deep/**"])), false),
        (at("d1").but(&["deep"]), Some(at("d1").only(&["def"])), true),
        (at("d1").only(&["def", "deep"]), Some(at("d1").but(&["none"])), true),
        (at("").but(&["*", "!d1/def"]), Some(at("").only(&["d1/def"])), true),
        (at("d1").only(&["deep/er/abc"]), Some(at("d1").only(&["**/abc"])), true),
        // A link that is followed is what it leads to, patterns or not.
        (at("l").but(&["none"]), Some(at("d1").but(&["none"])), true),
        (at("l").but(&["deep"]), Some(at("d1").but(&["deep"])), true),
        (at("l").only(&["def"]), Some(at("d1").only(&["def"])), true),
        (at("lf").only(&["foo"]), None, true),
        (at("lf").but(&["none"]), Some(at("foo")), true),
        (at("l").itself().but(&["none"]), Some(at("l").itself()), true),
        (at("l/deep").only(&["er"]), Some(at("d1/deep").only(&["er"])), true),
        // Wildcards.
        (at("fo[o]").wild(), Some(at("foo")), false),
        (at("*/def").wild(), Some(at("d1/def")), true),
        (at("?oo").wild(), Some(at("fo?").wild()), true),
        (at("lf").wild(), Some(at("foo")), true),
        (at("lf*").wild(), Some(at("lf*").wild().itself()), false),
        (at("l/*").wild(), Some(at("d1/*").wild()), true),
        (at("l/d*").wild().only(&["er"]), Some(at("d1/d*").wild().only(&["er"])), true),
        (at("we\\*rd").wild(), Some(at("we*rd")), true),
        (at("[d]0").wild(), Some(at("d0").wild()), false),
    ] {
        let expected = match &right {
            Some(right) => Some(right.of(before.path()).unwrap()),
            None => nothing(),
        };
        assert_eq!(Some(left.of(before.path()).unwrap()) == expected, equal, "{left:?} and {right:?}");
    }
}

/// `TestChecksumIncludeSymlink` of BuildKit's.
#[test]
fn patterns_and_wildcards_hold_behind_links_in_the_middle() {
    let lines = ["data/d0/d1/d2/foo=abc", "data/symlink-to-d0->d0", "mnt/data->../data"];
    let root = tree(&lines);
    let ask = |path, wild: bool| {
        let ask = at(path).only(&["**/foo"]);
        if wild { ask.wild() } else { ask }.of(root.path()).unwrap()
    };
    for (path, through, wild) in [
        ("data/d0", "mnt/data/d0", false),
        ("data/d0", "mnt/data/d0", true),
        ("data/d*", "mnt/data/d*", true),
        ("data/d0/d1/d2", "mnt/data/d0/d1/d2", false),
        ("data/d0/d1/d2", "mnt/data/d0/d1/d2", true),
        ("data/d0/d1/d*", "mnt/data/d0/d1/d*", true),
        ("data/d0/d*/d2", "mnt/data/d0/d*/d2", true),
        ("data/d0/d*/d2", "mnt/data/symlink-to-d0/d*/d2", true),
    ] {
        assert_ne!(ask(path, wild), ContentDigest::of_nothing(), "{path}");
        assert_eq!(ask(path, wild), ask(through, wild), "{path} and {through}");
    }
    let other = tree(&["data/d0/d1/d2/foo=other", lines[1], lines[2]]);
    let ask = at("mnt/data/symlink-to-d0/d*/d2").only(&["**/foo"]).wild();
    assert_ne!(ask.of(root.path()).unwrap(), ask.of(other.path()).unwrap());
}

#[test]
fn links_in_a_filtered_directory_are_not_followed_with_a_slash_either() {
    let with = tree(&["d/l->../x", "d/broken->no", "d/f=1", "x=1"]);
    let without = tree(&["d/l->../x", "d/broken->no", "d/f=1", "x=2"]);
    for ask in [at("d").but(&["z"]), at("d/").but(&["z"]), at("d/").only(&["*"]), at("d*").wild()] {
        assert_eq!(ask.of(with.path()).unwrap(), ask.of(without.path()).unwrap(), "{ask:?}");
    }
    let link = at("d/l*").wild();
    assert_ne!(link.of(with.path()).unwrap(), link.of(without.path()).unwrap());
}

#[test]
fn every_kind_of_change_but_time_changes_the_digest() {
    let root = tree(&["d/file=bytes", "d/sub/deep=y"]);
    let place = |path: &str| root.path().join(path);
    let all = || [at("d"), at("d").but(&["none"]), at("d*").wild()].map(|ask| ask.of(root.path()).unwrap());
    let mut seen = vec![all()];
    let mut changed = |what: &str| {
        let now = all();
        for (index, digest) in now.iter().enumerate() {
            assert!(seen.iter().all(|before| before[index] != *digest), "{what} went unnoticed by {index}");
        }
        seen.push(now);
    };
    for (path, mode) in [("d/file", 0o755), ("d/file", 0o4755), ("d/sub", 0o711), ("d", 0o1777)] {
        fs::set_permissions(place(path), fs::Permissions::from_mode(mode)).unwrap();
        changed(path);
    }
    if rustix::fs::setxattr(place("d/file"), "user.test", b"1", XattrFlags::empty()).is_ok() {
        changed("an attribute");
        rustix::fs::setxattr(place("d/file"), "user.test", b"2", XattrFlags::empty()).unwrap();
        changed("an attribute's value");
        rustix::fs::setxattr(place("d/sub"), "user.test", b"2", XattrFlags::empty()).unwrap();
        changed("a directory's attribute");
    } else {
        eprintln!("SKIPPED: no user attributes here");
    }
    rustix::fs::mknodat(CWD, place("d/fifo"), FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap();
    changed("a pipe");
    let before = all();
    for path in ["d", "d/file", "d/sub"] {
        File::open(place(path)).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    }
    assert_eq!(all(), before, "times count");
    let _socket = std::os::unix::net::UnixListener::bind(place("d/socket")).unwrap();
    assert_eq!(all(), before, "a socket counts");
    assert!(matches!(at("d/socket").of(root.path()).unwrap_err(), ChecksumError::NotFound { .. }));
}

#[test]
fn privileged_owners_devices_and_attributes_count() {
    if !tools::privileged() {
        return;
    }
    let root = tree(&["d/file=bytes", "d/link->file"]);
    let place = |path: &str| root.path().join(path);
    let digest = || at("d").of(root.path()).unwrap();
    let mut seen = vec![digest()];
    let mut changed = |what: &str| {
        let now = digest();
        assert!(!seen.contains(&now), "{what} went unnoticed");
        seen.push(now);
    };
    for path in ["d", "d/file", "d/link"] {
        std::os::unix::fs::lchown(place(path), Some(12), None).unwrap();
        changed("an owner");
        std::os::unix::fs::lchown(place(path), None, Some(12)).unwrap();
        changed("a group");
        rustix::fs::lsetxattr(place(path), "trusted.note", b"1", XattrFlags::empty()).unwrap();
        changed("an attribute");
    }
    let mut capability = [0; 20];
    capability[3] = 2;
    rustix::fs::setxattr(place("d/file"), "security.capability", &capability, XattrFlags::empty()).unwrap();
    changed("a capability");
    for (kind, device) in [
        (FileType::CharacterDevice, rustix::fs::makedev(1, 3)),
        (FileType::CharacterDevice, rustix::fs::makedev(1, 5)),
        (FileType::BlockDevice, rustix::fs::makedev(1, 5)),
    ] {
        rustix::fs::mknodat(CWD, place("d/device"), kind, Mode::from_raw_mode(0o644), device).unwrap();
        changed("a device");
        fs::remove_file(place("d/device")).unwrap();
    }
    let before = digest();
    for name in ["security.foo", "trusted.overlay.origin"] {
        if let Err(error) = rustix::fs::setxattr(place("d/file"), name, b"", XattrFlags::empty()) {
            eprintln!("SKIPPED {name}: {error}");
        }
    }
    assert_eq!(digest(), before, "attributes of the host and the driver count");
}

#[test]
fn privileged_an_overlay_view_has_the_digests_of_a_plain_copy() {
    if !tools::privileged() {
        return;
    }
    let scratch = plies_testkit::scratch::Scratch::new();
    let [lower, upper, work, view, plain] = ["lower", "upper", "work", "view", "plain"].map(|name| scratch.dir(name));
    make(&lower, &["kept=1", "gone=1", "d/a=1", "d/b=1", "e/x=1", "l->d", "was/dir=1"]);
    let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    let options = std::ffi::CString::new(options).unwrap();
    rustix::mount::mount("overlay", &view, "overlay", rustix::mount::MountFlags::empty(), options.as_c_str()).unwrap();
    fs::remove_file(view.join("gone")).unwrap();
    fs::remove_file(view.join("d/a")).unwrap();
    fs::remove_dir_all(view.join("e")).unwrap();
    fs::remove_dir_all(view.join("was")).unwrap();
    // An opaque directory, a copy-up, and a file in a directory's place.
    make(&view, &["e/y=2", "d/c=3", "was=file"]);
    fs::set_permissions(view.join("kept"), fs::Permissions::from_mode(0o600)).unwrap();
    make(&plain, &["was=file", "kept=1", "l->d", "d/c=3", "d/b=1", "e/y=2"]);
    fs::set_permissions(plain.join("kept"), fs::Permissions::from_mode(0o600)).unwrap();
    for ask in [at(""), at("kept"), at("d"), at("e"), at("l"), at("").but(&["d"]), at("*").wild(), at("*/?").wild()] {
        assert_eq!(ask.of(&view).unwrap(), ask.of(&plain).unwrap(), "{ask:?}");
    }
    assert_ne!(at("").of(&upper).unwrap(), at("").of(&plain).unwrap(), "nothing came from the lower layer");
}

// --- the cache

/// How many files and headers were read.
fn reads(ask: &Ask, root: &Path, cache: &mut HashCache) -> (usize, Option<ContentDigest>) {
    let dir = File::open(root).unwrap();
    let count = RefCell::new(0);
    let go_on = || {
        *count.borrow_mut() += 1;
        Ok(())
    };
    let digest = checksum_while(dir.as_fd(), ask.path.as_bytes(), &ask.options, cache, &go_on).ok();
    (count.into_inner(), digest)
}

#[test]
fn only_what_is_needed_is_read_and_that_only_once() {
    let root = tree(&["aa/bb/cc/dd=data0", "aa/bb/other=x", "aa/ln->/aa", "aa/root->/", "bb->aa/bb", "zz/f=1"]);
    let mut cache = HashCache::new();
    let (read, file) = reads(&at("aa/ln/bb/cc/dd"), root.path(), &mut cache);
    assert!(read > 0);
    // What lies beside the file was not looked at: only the way there is known.
    assert!(cache.records_count() <= 6, "{cache:?}");
    // The other way there is another request, the file the same.
    assert_eq!(reads(&at("aa/bb/cc/dd"), root.path(), &mut cache), (0, file));
    // Without the tree, now that the link is known.
    assert_eq!(cache.get(b"aa/ln/bb/cc/dd", true), file);
    assert_eq!(cache.get(b"bb/cc/dd", true), None, "nobody has been at that link");

    let (read, dir) = reads(&at("bb"), root.path(), &mut cache);
    assert!(read > 0 && dir.is_some());
    for path in ["bb", "aa/bb", "aa/ln/bb", "bb/cc/..", "aa/bb/"] {
        assert_eq!(reads(&at(path), root.path(), &mut cache), (0, dir), "{path}");
        assert_eq!(cache.get(path.as_bytes(), true), dir, "{path}");
    }
    for path in ["bb/cc", "aa/bb/other", "aa/bb/cc/dd", "aa/root/bb/cc"] {
        assert_eq!(reads(&at(path), root.path(), &mut cache).0, 0, "{path}");
    }
    for path in ["no", "bb/no", "aa/root/no"] {
        assert_eq!(reads(&at(path), root.path(), &mut cache), (0, None), "{path}");
    }
    // Directories' headers and files serve lists too.
    let ask = at("aa/b*").wild();
    let (_, listed) = reads(&ask, root.path(), &mut cache);
    assert_eq!(reads(&ask, root.path(), &mut cache), (0, listed));
    // The whole tree reads the rest.
    let (all_read, all) = reads(&at("/"), root.path(), &mut cache);
    assert_eq!(all, Some(at("/").of(root.path()).unwrap()));
    let (fresh_read, _) = reads(&at("/"), root.path(), &mut HashCache::new());
    assert!(all_read < fresh_read, "{all_read} of {fresh_read}");
    assert_eq!(reads(&at("zz/f"), root.path(), &mut cache).0, 0);
}

#[test]
fn a_file_with_several_names_is_read_once() {
    let lines: &[&str] = &["a=data", "b==a", "d/c==a"];
    let root = tree(lines);
    let dir = File::open(root.path()).unwrap();
    let bytes = RefCell::new(0);
    let go_on = || {
        *bytes.borrow_mut() += 1;
        Ok(())
    };
    checksum_while(dir.as_fd(), b"", &ChecksumOptions::default(), &mut HashCache::new(), &go_on).unwrap();
    let plain = tree(&["a=data", "b=data", "d/c=data"]);
    assert!(*bytes.borrow() < reads(&at(""), plain.path(), &mut HashCache::new()).0);
}

#[test]
fn a_stored_cache_gives_the_same_digests() {
    let root = tree(&["foo=data0", "bar=data1", "d0/abc=data0", "d0/def->abc", "d0/ghi->no", "l->/d0"]);
    let mut cache = HashCache::new();
    let asks = [at("foo"), at("d0"), at("l/def"), at("d0/def").itself(), at("/"), at("*").wild().itself()];
    let digests: Vec<_> = asks.iter().map(|ask| ask.with(root.path(), &mut cache).unwrap()).collect();
    let mut read = HashCache::from_bytes(&cache.to_bytes()).unwrap();
    for (ask, digest) in asks.iter().zip(&digests) {
        assert_eq!(reads(ask, root.path(), &mut read), (0, Some(*digest)), "{ask:?}");
    }
    assert!(!read.is_modified(), "nothing new was learned");
}

/// As BuildKit's tests of changes that are told one by one.
#[test]
fn what_changed_is_forgotten_and_nothing_else() {
    type Change<'a> = &'a dyn Fn(&Path);
    let remove = |path: &'static str| move |root: &Path| fs::remove_dir_all(root.join(path)).unwrap();
    let steps: [(&str, Change<'_>, &[&str]); 7] = [
        ("a file is removed", &|root| fs::remove_file(root.join("d0/ghi")).unwrap(), &["d0/ghi"]),
        ("a file is made", &|root| make(root, &["d1/bar=data1"]), &["d1/bar"]),
        ("a file changes", &|root| fs::write(root.join("d0/foo/bar/foo"), "other").unwrap(), &["/d0/foo/bar/foo"]),
        (
            "a directory's mode changes",
            &|root| fs::set_permissions(root.join("d0/foo"), fs::Permissions::from_mode(0o700)).unwrap(),
            &["d0/foo"],
        ),
        (
            "a file takes a directory's place",
            &|root| {
                fs::remove_dir_all(root.join("d0/foo/bar")).unwrap();
                make(root, &["d0/foo/bar=data2"]);
            },
            &["d0/foo/bar"],
        ),
        (
            "a link leads elsewhere",
            &|root| {
                fs::remove_file(root.join("link")).unwrap();
                make(root, &["link->d1"]);
            },
            &["link"],
        ),
        ("a directory goes, and what was in it is told too", &remove("d0"), &["d0", "d0/foo", "d0/none/x"]),
    ];
    let root = tree(&[
        "d0/foo/bar/foo=data0",
        "d0/foo/bar/bar=data1",
        "d0/abc=data0",
        "d0/ghi->no",
        "d1/foo=data0",
        "d2/far/away=1",
        "link->d0",
    ]);
    let asks = ["", "d0", "d0/foo", "d0/foo/bar", "d0/abc", "d1", "d1/foo", "link", "link/foo", "d2"];
    let before = at("d0/foo/bar").of(root.path()).unwrap();
    let mut cache = HashCache::new();
    let texts = |cache: &mut HashCache| asks.map(|path| at(path).with(root.path(), cache).map_err(|e| e.to_string()));
    texts(&mut cache).iter().for_each(|digest| assert!(digest.is_ok()));
    for (what, change, told) in steps {
        change(root.path());
        cache.forget(told);
        let mut stored = HashCache::from_bytes(&cache.to_bytes()).unwrap();
        assert_eq!(reads(&at("d2"), root.path(), &mut cache).0, 0, "{what}: nothing happened there");
        let expected = texts(&mut HashCache::new());
        assert_eq!(texts(&mut cache), expected, "{what}");
        assert_eq!(texts(&mut stored), expected, "{what}");
        if what == "a file is made" {
            assert_eq!(expected[5], Ok(before), "it has now what the other directory had");
        }
    }
    cache.forget([""]);
    assert_eq!(cache.records_count(), 1);
}

#[test]
fn a_full_cache_changes_no_digest() {
    let root = tree(&["a/b/c/d=1", "a/b/e=2", "f/g=3", "h=4", "l->a"]);
    for records_max in 1..12 {
        let mut cache = HashCache::with_records_max(records_max);
        for ask in [at("l/b/c"), at(""), at("a").but(&["x"]), at("*").wild(), at("f"), at("l/b/e")] {
            assert_eq!(ask.with(root.path(), &mut cache).unwrap(), ask.of(root.path()).unwrap(), "{ask:?}");
        }
        assert!(cache.records_count() <= records_max);
    }
}

/// Trees of a few names, so that paths meet; each part of a line is drawn by itself.
fn any_tree() -> impl Strategy<Value = Vec<(String, u8)>> {
    let name = || prop_oneof!["a", "b", "a.b", "a-", "é"];
    let path = prop::collection::vec(name(), 1..4).prop_map(|parts| parts.join("/"));
    prop::collection::vec((path, 0..8_u8), 0..14)
}

fn plant(root: &Path, entries: &[(String, u8)]) {
    make(root, &[]);
    for (path, kind) in entries {
        let at = root.join(path);
        if at.symlink_metadata().is_ok() || fs::create_dir_all(at.parent().unwrap()).is_err() {
            continue;
        }
        // A parent may be a link to somewhere else in the tree, or to nowhere.
        let _ = match kind {
            0 | 1 => fs::write(&at, path),
            2 => fs::write(&at, "same"),
            3 => fs::create_dir(&at),
            4 => symlink("a", &at),
            5 => symlink("../b/a", &at),
            6 => symlink("/a.b", &at),
            _ => symlink("..", &at),
        };
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_warm_cache_tells_what_an_empty_one_does(
        entries in any_tree(),
        asked in prop::collection::vec((0..14_usize, any::<bool>(), 0..6_u8), 1..12),
    ) {
        let root = tempfile::tempdir().unwrap();
        plant(root.path(), &entries);
        let dir = File::open(root.path()).unwrap();
        let mut warm = HashCache::new();
        for (index, follow_links, how) in asked {
            let path = entries.get(index).map_or("", |(path, _)| path.as_str());
            let list = |pattern: &str| vec![pattern.to_owned()];
            let mut options = ChecksumOptions { follow_links, ..ChecksumOptions::default() };
            let mut path = path.to_owned();
            match how {
                0 | 1 => {}
                2 => options.exclude = list("**/a"),
                3 => options.include = list("b"),
                4 => {
                    options.wildcard = true;
                    path.push_str("/*");
                }
                _ => {
                    options.wildcard = true;
                    path = "*/a*".to_owned();
                    options.exclude = list("a-");
                }
            }
            let digest = |cache: &mut HashCache| {
                checksum(dir.as_fd(), path.as_bytes(), &options, cache).map_err(|error| error.to_string())
            };
            let cold = digest(&mut HashCache::new());
            prop_assert_eq!(&digest(&mut warm), &cold, "{} {:?}", path, options);
            let mut stored = HashCache::from_bytes(&warm.to_bytes()).unwrap();
            prop_assert_eq!(&digest(&mut stored), &cold);
            if how < 2 && let Some(known) = warm.get(path.as_bytes(), follow_links) {
                prop_assert_eq!(Ok(known), cold);
            }
        }
    }

    #[test]
    fn no_bytes_make_reading_a_cache_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut sealed = vec![1];
        sealed.extend_from_slice(&bytes);
        let mut sum = Sha256Hasher::default();
        sum.update(&sealed);
        sealed.extend_from_slice(&sum.finish());
        if let Ok(cache) = HashCache::from_bytes(&sealed) {
            prop_assert_eq!(HashCache::from_bytes(&cache.to_bytes()).unwrap().to_bytes(), cache.to_bytes());
        }
        prop_assert!(HashCache::from_bytes(&bytes).is_err());
    }
}

// --- hostile trees

#[test]
fn p12_a_tree_deeper_than_any_path_is_hashed_within_its_limit() {
    const DEPTH: usize = 4_096;
    let root = tree(&[]);
    let dir = |at: BorrowedFd<'_>, name: &str| {
        rustix::fs::mkdirat(at, name, Mode::RWXU).unwrap();
        inroot::open_dir(at, name.as_bytes()).unwrap()
    };
    let top = File::open(root.path()).unwrap();
    let mut at_bottom = dir(top.as_fd(), "d");
    for _ in 1..DEPTH {
        at_bottom = dir(at_bottom.as_fd(), "directory");
    }
    rustix::fs::openat(
        &at_bottom,
        "leaf",
        rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY,
        Mode::from_raw_mode(0o644),
    )
    .unwrap();
    let mut cache = HashCache::new();
    let whole = at("d").with(root.path(), &mut cache).unwrap();
    assert_eq!(HashCache::from_bytes(&cache.to_bytes()).unwrap().get(b"d", false), Some(whole));
    for ask in [at("d").only(&["**/leaf"]), at("d").but(&["none"]), at("*").wild()] {
        ask.of(root.path()).unwrap();
    }
    let mut bottom = at_bottom;
    for _ in DEPTH..walk::DEPTH_MAX + 1 {
        bottom = dir(bottom.as_fd(), "x");
    }
    let error = at("d").of(root.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Limit);
    assert!(matches!(error, ChecksumError::TooDeep { max: walk::DEPTH_MAX, .. }), "{error}");
    // The standard library keeps every level open.
    tools::run(std::process::Command::new("rm").arg("-r").arg(root.path().join("d")));
}

#[test]
fn f07_pipes_are_hashed_without_being_opened() {
    let root = tree(&["d/a=1"]);
    // Nobody writes into it: opening it for reading would wait for ever.
    rustix::fs::mknodat(CWD, root.path().join("d/pipe"), FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap();
    for ask in [at("d/pipe"), at("d"), at("d/p*").wild(), at("d").only(&["pipe"]), at("")] {
        ask.of(root.path()).unwrap();
    }
    assert!(matches!(at("d/pipe/x").of(root.path()).unwrap_err(), ChecksumError::NotFound { .. }));
}

#[test]
fn a_directory_of_many_names_costs_no_more_memory_than_its_records() {
    const COUNT: usize = 100_000;
    let root = tree(&["many/"]);
    let many = File::open(root.path().join("many")).unwrap();
    fs::write(root.path().join("one"), "").unwrap();
    let one = File::open(root.path()).unwrap();
    let mut from = "one".to_owned();
    for index in 0..COUNT {
        let name = format!("name-{index}");
        // Other names of a few files: quicker to make. File systems allow 65,000 names or fewer.
        if index % 30_000 == 0 {
            from = format!("one-{index}");
            fs::write(root.path().join(&from), "").unwrap();
        }
        rustix::fs::linkat(&one, &from, &many, &name, rustix::fs::AtFlags::empty()).unwrap();
    }
    let mut cache = HashCache::new();
    let digest = at("many").with(root.path(), &mut cache).unwrap();
    assert!(cache.records_count() > COUNT);
    let bytes = cache.to_bytes();
    assert!(bytes.len() < COUNT * 64, "{} bytes", bytes.len());
    assert_eq!(HashCache::from_bytes(&bytes).unwrap().get(b"many", false), Some(digest));
    let mut small = HashCache::with_records_max(1_000);
    assert_eq!(at("many").with(root.path(), &mut small).unwrap(), digest);
    assert!(small.records_count() <= 1_000);
}

/// Does something when the `nth` question is asked.
fn meddle(root: &Path, nth: usize, what: impl Fn()) -> Result<ContentDigest, ChecksumError> {
    let dir = File::open(root).unwrap();
    let asked = RefCell::new(0);
    let go_on = || {
        *asked.borrow_mut() += 1;
        if *asked.borrow() == nth {
            what();
        }
        Ok(())
    };
    checksum_while(dir.as_fd(), b"d", &ChecksumOptions::default(), &mut HashCache::new(), &go_on)
}

#[test]
fn what_changes_meanwhile_is_an_error() {
    let fresh = || tree(&["d/a=bytes", "d/b=bytes"]);
    // Questions: the directory's header, then for the first file one before it and one for each read.
    type Tampering<'a> = (&'a str, usize, &'a dyn Fn(&Path));
    let tampering: [Tampering<'_>; 4] = [
        ("grows", 3, &|d| fs::write(d.join("a"), "bytes and more").unwrap()),
        ("shrinks", 3, &|d| fs::write(d.join("a"), "by").unwrap()),
        ("has other bytes", 4, &|d| {
            fs::write(d.join("a"), "other").unwrap();
            File::open(d.join("a")).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        }),
        ("vanishes", 2, &|d| fs::remove_file(d.join("b")).unwrap()),
    ];
    for (what, nth, tamper) in tampering {
        let root = fresh();
        let place = root.path().join("d");
        let error = meddle(root.path(), nth, || tamper(&place)).unwrap_err();
        assert!(matches!(error, ChecksumError::Changed { .. }), "it {what}: {error:?}");
        assert_eq!(error.kind(), ErrorKind::Unavailable);
    }
}

#[test]
fn whoever_asks_may_stop() {
    let root = tree(&["d/a=1"]);
    let dir = File::open(root.path()).unwrap();
    let stop = || Err(io::Error::other("enough"));
    let error = checksum_while(dir.as_fd(), b"d", &ChecksumOptions::default(), &mut HashCache::new(), &stop);
    let error = error.unwrap_err();
    assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "enough");
}

#[test]
fn p20_nothing_outside_the_root_is_read() {
    let outside = tree(&["secret=1", "d/secret=1"]);
    let root = tree(&["in/f=1"]);
    symlink(outside.path(), root.path().join("out")).unwrap();
    symlink(outside.path().join("secret"), root.path().join("in/out")).unwrap();
    symlink("/proc/self/root", root.path().join("magic")).unwrap();
    for path in ["out", "out/secret", "in/out", "magic", "magic/etc"] {
        for ask in [at(path), at(path).but(&["x"])] {
            assert!(matches!(ask.of(root.path()).unwrap_err(), ChecksumError::NotFound { .. }), "{path}");
        }
    }
    assert!(matches!(at("out/*").wild().of(root.path()).unwrap_err(), ChecksumError::NoMatch { .. }));
    // The links themselves count, and what they point to doesn't.
    let before = at("").of(root.path()).unwrap();
    fs::write(outside.path().join("secret"), "2").unwrap();
    assert_eq!(at("").of(root.path()).unwrap(), before);
}
