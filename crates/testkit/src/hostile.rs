//! Archives that try what no archive may, with what must become of them.
//!
//! [`corpus`] writes them: every hazard of an archive in its variants, in every type of entry and every encoding of
//! names, aimed at a [`Victim`]: a directory outside the tree that is unpacked to, of which nothing may change and
//! nothing may come in. The letters of an id are those of the table in `docs/security/coverage.md`.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use crate::tar::{Encoding, Member, archive, fix_checksum};
use crate::tree::Tree;

/// What must become of an archive. Whatever that is, nothing outside the tree is read or changed, nothing panics and
/// nothing hangs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// It is refused, and nothing of it stays.
    Refused,
    /// It is taken, as the peers take it.
    Taken,
    /// Either: the file system or the layers below decide.
    Either,
}

/// An archive with its verdict.
#[derive(Debug, Clone)]
pub struct Case {
    /// The hazard's number, then what makes this one different from the others of that number. No two are equal.
    pub id: String,
    /// A tar, or a tar packed in some way.
    pub bytes: Vec<u8>,
    /// What must become of it.
    pub expect: Expect,
    /// Names that the tree must have when it was taken, with their types as [`Tree`] gives them.
    pub shows: Vec<(String, &'static str)>,
    /// It takes something away, or describes what only a layer can: not for `ADD`, and not for somebody without the
    /// privilege to mark directories.
    pub only_layers: bool,
}

/// A directory that no archive has any business with.
#[derive(Debug)]
pub struct Victim {
    path: PathBuf,
    secret: String,
    before: (Tree, Stamps),
}

/// Inode, time of the last change and link count of every name.
type Stamps = BTreeMap<PathBuf, (u64, (i64, i64), u64)>;

impl Victim {
    /// Makes one at `path`, owned by `owner`, and remembers what it is like.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn new(path: &Path, owner: u32) -> Self {
        let secret = crate::random_hex();
        let make = || -> std::io::Result<()> {
            fs::DirBuilder::new().mode(0o755).create(path)?;
            fs::DirBuilder::new().mode(0o750).create(path.join("dir"))?;
            fs::write(path.join("canary"), &secret)?;
            fs::set_permissions(path.join("canary"), fs::Permissions::from_mode(0o640))?;
            fs::write(path.join("dir/inner"), &secret)?;
            symlink("canary", path.join("link"))?;
            let flags = rustix::fs::XattrFlags::empty();
            for name in ["canary", "dir"] {
                // Not every file system has room for them.
                let _ = rustix::fs::setxattr(path.join(name), "user.canary", b"1", flags);
            }
            for name in ["", "dir", "dir/inner", "canary", "link"] {
                std::os::unix::fs::lchown(path.join(name), Some(owner), Some(owner))?;
            }
            Ok(())
        };
        make().unwrap_or_else(|error| panic!("make {}: {error}", path.display()));
        let before = (Tree::of(path), stamps(path));
        Self { path: path.to_owned(), secret, before }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fails if anything about it has changed since it was made: content, mode, owner, times, attributes, the number of
    /// links, or anything that the kernel notes by a time of change.
    #[track_caller]
    pub fn assert_untouched(&self, what: &str) {
        self.before.0.assert_same(&Tree::of(&self.path), &format!("{what}: the victim"));
        assert_eq!(self.before.1, stamps(&self.path), "{what}: the victim was touched");
    }

    /// Fails if a file below `root` holds what only the victim's files do.
    #[track_caller]
    pub fn assert_not_in(&self, root: &Path, what: &str) {
        let mut waiting = vec![root.to_owned()];
        while let Some(path) = waiting.pop() {
            let Ok(meta) = fs::symlink_metadata(&path) else { continue };
            if meta.is_dir() {
                waiting.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()));
            } else if meta.is_file() && meta.len() < 1 << 20 {
                let bytes = fs::read(&path).unwrap_or_default();
                let found = bytes.windows(self.secret.len()).any(|window| window == self.secret.as_bytes());
                assert!(!found, "{what}: {} has the victim's content", path.display());
            }
        }
    }
}

fn stamps(root: &Path) -> Stamps {
    let mut found = BTreeMap::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(path) = waiting.pop() {
        let meta = fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("lstat {}: {error}", path.display()));
        if meta.is_dir() {
            waiting.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()));
        }
        found.insert(path, (meta.ino(), (meta.ctime(), meta.ctime_nsec()), meta.nlink()));
    }
    found
}

/// Makes a member of this name.
type MakeMember = fn(&[u8]) -> Member;

/// The types of entries, each under this name; a hard link leads to `hard-link-target`, see [`with_target`].
const TYPES: [(&str, MakeMember); 7] = [
    ("file", |path| Member::file(path, "pwn")),
    ("dir", |path| Member::dir(path).mode(0o777)),
    ("symlink", |path| Member::symlink(path, "pwn")),
    ("hard-link", |path| Member::hard_link(path, "hard-link-target")),
    ("char", |path| Member::char_device(path, 1, 3)),
    ("block", |path| Member::block_device(path, 8, 0)),
    ("fifo", |path| Member::fifo(path).mode(0o4777)),
];

/// What [`Tree`] calls each of [`TYPES`].
fn kind_of(name: &str) -> &'static str {
    match name {
        "dir" => "dir",
        "symlink" => "symlink",
        "char" => "char",
        "block" => "block",
        "fifo" => "fifo",
        _ => "file",
    }
}

/// Members with the file in front that hard links of [`TYPES`] lead to.
fn with_target(members: &[Member]) -> Vec<u8> {
    archive([&Member::file("hard-link-target", "target")].into_iter().chain(members))
}

/// Cases in the making.
struct Corpus {
    cases: Vec<Case>,
    /// The victim, absolute.
    victim: Vec<u8>,
    /// The victim from any directory that is not too deep: up to the root of everything, then down.
    upwards: Vec<u8>,
}

impl Corpus {
    fn add(&mut self, id: impl Into<String>, bytes: Vec<u8>, expect: Expect) -> &mut Case {
        let id = id.into();
        let only_layers =
            bytes.windows(5).any(|window| window == b"/.wh." || window == b"\0.wh.") || id.starts_with('W');
        self.cases.push(Case { id, bytes, expect, shows: Vec::new(), only_layers });
        self.cases.last_mut().expect("because it was just added")
    }

    fn refused(&mut self, id: impl Into<String>, bytes: Vec<u8>) {
        self.add(id, bytes, Expect::Refused);
    }

    fn taken(&mut self, id: impl Into<String>, bytes: Vec<u8>, shows: &[(&str, &'static str)]) {
        self.add(id, bytes, Expect::Taken).shows = shows.iter().map(|(name, kind)| ((*name).into(), *kind)).collect();
    }

    fn either(&mut self, id: impl Into<String>, bytes: Vec<u8>) {
        self.add(id, bytes, Expect::Either);
    }

    /// Something in the victim, by an absolute path, by one to the victim's neighbour, and by one from anywhere.
    fn ways(&self, below: &str) -> [(&'static str, Vec<u8>); 3] {
        let at = |way: &[u8]| [way, below.as_bytes()].concat();
        [("absolute", at(&self.victim)), ("beside", at(b"../victim")), ("upwards", at(&self.upwards))]
    }

    /// P01, P02, P10, P13: a path that leads through links.
    fn through_links(&mut self) {
        for (way, target) in self.ways("") {
            for encoding in Encoding::ALL {
                for (name, member) in TYPES {
                    let number = if way == "absolute" { "P01" } else { "P02" };
                    let link = Member::symlink("x", &target).encoding(encoding);
                    let members = [link, member(b"x/pwn").encoding(encoding)];
                    let shown = inside(&target, "pwn");
                    self.taken(
                        format!("{number}/{way}/{name}/{encoding:?}"),
                        with_target(&members),
                        &[("x", "symlink"), (&shown, kind_of(name))],
                    );
                }
            }
        }
        for (name, member) in TYPES {
            let members =
                [Member::symlink("a", "x/escape"), Member::symlink("x/escape", "../.."), member(b"a/absolute")];
            self.taken(format!("P10/{name}"), with_target(&members), &[("absolute", kind_of(name))]);
            let members = [
                Member::symlink("one", &self.victim),
                Member::symlink("two", "one"),
                Member::symlink("d/three", "../two/."),
                member(b"d/three/pwn"),
            ];
            let shown = inside(&self.victim.clone(), "pwn");
            self.taken(format!("P10/chain/{name}"), with_target(&members), &[(&shown, kind_of(name))]);
        }
        // CVE-2025-4517, -4330, -4138: what it resolves to is longer than PATH_MAX, then goes up.
        for steps in [15, 17] {
            let (mut members, mut at) = (Vec::new(), String::new());
            for letter in (b'a'..).take(steps) {
                let long = char::from(letter).to_string().repeat(247);
                members.push(Member::dir(format!("{at}{long}")));
                members.push(Member::symlink(format!("{at}{}", char::from(letter)), &long));
                at = format!("{at}{}/", char::from(letter));
            }
            let long_link = format!("{at}{}", "l".repeat(254));
            members.push(Member::symlink(&long_link, "../".repeat(steps)));
            members.push(Member::symlink("escape", format!("{long_link}/../../../victim")));
            members.push(Member::file("escape/pwn", "pwn"));
            // Where the kernel will not resolve it, that is an error.
            self.either(format!("P13/{steps}"), archive(&members));
        }
    }

    /// P03, P04, P07, P12: names that lead elsewhere, or are none.
    fn names(&mut self) {
        for encoding in Encoding::ALL {
            for (name, member) in TYPES {
                let id = |what: &str| format!("{what}/{name}/{encoding:?}");
                for (what, path) in [("beside", "../victim/pwn"), ("after-down", "a/../../victim/pwn")] {
                    let members = [member(path.as_bytes()).encoding(encoding)];
                    self.refused(id(&format!("P03/{what}")), with_target(&members));
                }
                let members = [member(b"/etc/x").encoding(encoding)];
                self.taken(id("P04"), with_target(&members), &[("etc/x", kind_of(name))]);
            }
            for (what, path, shown) in [
                ("dots", "./././x", "x"),
                ("slashes", "w//v", "w/v"),
                ("down-and-up", "y/../z", "z"),
                ("all", ".//y/./..//a/b/../c", "a/c"),
            ] {
                let members = [Member::file(path, "1").encoding(encoding)];
                self.taken(format!("P04b/{what}/{encoding:?}"), archive(&members), &[(shown, "file")]);
            }
        }
        for (name, member) in TYPES {
            let path = [&self.victim[..], b"/pwn"].concat();
            let shown = inside(&self.victim.clone(), "pwn");
            self.taken(format!("P04/victim/{name}"), with_target(&[member(&path)]), &[(&shown, kind_of(name))]);
            let path = [&self.upwards[..], b"/pwn"].concat();
            self.refused(format!("P03/upwards/{name}"), with_target(&[member(&path)]));
        }
        let sparse = Member::file("GNUSparseFile.0/x", "0\n".to_owned() + &"\0".repeat(510))
            .pax("GNU.sparse.major", "1")
            .pax("GNU.sparse.minor", "0")
            .pax("GNU.sparse.name", "../victim/pwn")
            .pax("GNU.sparse.realsize", "0");
        self.refused("P03/sparse-name", archive(&[sparse]));

        for (name, member) in TYPES.iter().filter(|(name, _)| *name != "dir") {
            for (what, path) in [("dot", "."), ("slash-dot", "/."), ("dot-slash", "./"), ("slash", "/"), ("up", "a/..")]
            {
                for encoding in [Encoding::Ustar, Encoding::Gnu, Encoding::Pax] {
                    let members = [member(path.as_bytes()).encoding(encoding)];
                    self.refused(format!("P07/{what}/{name}/{encoding:?}"), with_target(&members));
                }
            }
            self.refused(format!("P07/empty/{name}"), with_target(&[member(b"")]));
        }
        for path in [".", "./", "/", "/."] {
            let root = Member::dir(path).mode(0).owner(1234, 1234).xattr("user.root", "1");
            let id = format!("P08/{}", path.replace('/', "s").replace('.', "d"));
            self.taken(id, archive(&[root, Member::file("f", "")]), &[("f", "file")]);
        }

        let long = "n".repeat(256);
        let deep = "d/".repeat(3_000);
        let wide = format!("{}/", "w".repeat(254)).repeat(17);
        for (name, member) in TYPES {
            for encoding in [Encoding::Gnu, Encoding::Pax] {
                for (what, path) in [("component", &long), ("deep", &deep), ("path", &wide)] {
                    let path = format!("{path}f");
                    let members = [member(path.as_bytes()).encoding(encoding)];
                    self.refused(format!("P12/{what}/{name}/{encoding:?}"), with_target(&members));
                }
            }
        }
        let mebibyte = "x".repeat(1 << 20);
        for encoding in [Encoding::Gnu, Encoding::Pax] {
            let name = Member::file(&mebibyte, "").encoding(encoding);
            self.refused(format!("P12/mebibyte-name/{encoding:?}"), archive(&[name]));
            let link = Member::symlink("l", &mebibyte).encoding(encoding);
            self.refused(format!("P12/mebibyte-link/{encoding:?}"), archive(&[link]));
        }
        // A directory at a time, by names that are short because they lead through links.
        let mut members = vec![Member::dir("d")];
        for depth in 0..1_100 {
            members.push(Member::symlink(
                format!("s{}", depth + 1),
                if depth == 0 { "d".into() } else { format!("s{depth}/d") },
            ));
            members.push(Member::dir(format!("s{}/d", depth + 1)));
        }
        self.refused("P12/deep-by-links", archive(&members));
    }

    /// P05, P06 and writing over a link in any other way: the link goes, what it led to stays.
    fn over_links(&mut self) {
        for (way, target) in self.ways("/dir") {
            for (what, path) in [
                ("P05/plain", "x"),
                ("P06/slash", "x/"),
                ("P06/dot", "x/."),
                ("P06/dots", "./x//."),
                ("P06/slashes", "x//"),
            ] {
                for encoding in Encoding::ALL {
                    let dir = Member::dir(path).mode(0o777).owner(4321, 4321).xattr("user.p05", "1").encoding(encoding);
                    let members = [Member::symlink("x", &target), dir, Member::file("x/pwn", "pwn")];
                    let shows = [("x", "dir"), ("x/pwn", "file")];
                    self.taken(format!("{what}/{way}/{encoding:?}"), archive(&members), &shows);
                }
            }
        }
        for (way, target) in self.ways("/canary") {
            for (name, member) in TYPES {
                let members = [Member::symlink("x", &target), member(b"x").mode(0o4755).owner(4321, 4321)];
                self.taken(format!("P05/{name}-over/{way}"), with_target(&members), &[("x", kind_of(name))]);
            }
        }
        // CVE-2025-47290: a path leads where it leads now.
        let members = [
            Member::dir("foo"),
            Member::file("foo/a", ""),
            Member::symlink("foo", "/"),
            Member::file("foo/b", ""),
            Member::dir("foo"),
            Member::file("foo/c", ""),
        ];
        self.taken("P09", archive(&members), &[("b", "file"), ("foo", "dir"), ("foo/c", "file")]);
        for (way, target) in self.ways("") {
            let members = [
                Member::dir("foo"),
                Member::file("foo/a", ""),
                Member::symlink("foo", &target),
                Member::file("foo/pwn", "pwn"),
                Member::file("foo/canary", "pwn"),
                Member::dir("foo"),
                Member::file("foo/canary", "pwn"),
            ];
            self.taken(format!("P09/{way}"), archive(&members), &[("foo/canary", "file")]);
        }
    }

    /// P11, P14: links that lead nowhere.
    fn dead_links(&mut self) {
        for (name, member) in TYPES {
            let members = [Member::symlink("a", "b"), Member::symlink("b", "a"), member(b"a/f")];
            self.refused(format!("P11/loop/{name}"), with_target(&members));
            let members = [Member::symlink("a", "a"), member(b"a/f")];
            self.refused(format!("P11/self/{name}"), with_target(&members));
        }
        for (links, expect) in [(40, Expect::Taken), (41, Expect::Refused)] {
            let mut members = vec![Member::dir("l0")];
            members.extend((1..=links).map(|n| Member::symlink(format!("l{n}"), format!("l{}", n - 1))));
            members.push(Member::file(format!("l{links}/f"), ""));
            self.add(format!("P11b/{links}"), archive(&members), expect);
        }
        for encoding in [Encoding::Gnu, Encoding::Pax] {
            let long = Member::symlink("l", "t".repeat(5_000)).encoding(encoding);
            self.refused(format!("P14/long/{encoding:?}"), archive(&[long]));
        }
        self.refused("P14/empty", archive(&[Member::symlink("l", "")]));
        self.refused("P14/nul", archive(&[Member::symlink("l", "x").pax("linkpath", b"a\0b")]));
        self.refused("P14/hard-nul", archive(&[Member::hard_link("l", "x").pax("linkpath", b"a\0b")]));
    }

    /// P16: what real images hold, and must be taken.
    fn twins(&mut self) {
        let run = [
            Member::dir("run"),
            Member::dir("var"),
            Member::symlink("var/run", "/run"),
            Member::dir("var/run/act"),
            Member::file("var/run/act/HEAD", "head"),
            Member::hard_link("var/run/act/COPY", "var/run/act/HEAD"),
        ];
        for encoding in Encoding::ALL {
            let members: Vec<_> = run.iter().map(|member| member.clone().encoding(encoding)).collect();
            let shows = [("run/act/HEAD", "file"), ("run/act/COPY", "file"), ("var/run", "symlink")];
            self.taken(format!("P16/var-run/{encoding:?}"), archive(&members), &shows);
            let members = [Member::dir("etc/dnf").encoding(encoding), Member::file("etc/dnf/c", "").encoding(encoding)];
            self.taken(format!("P16/no-parent/{encoding:?}"), archive(&members), &[("etc/dnf/c", "file")]);
            let link = Member::hard_link("b", "/etc/a").encoding(encoding);
            let members = [Member::file("etc/a", ""), link];
            self.taken(format!("P16/absolute-hard-link/{encoding:?}"), archive(&members), &[("b", "file")]);
        }
        let members = [
            Member::dir("usr/bin"),
            Member::symlink("bin", "usr/bin"),
            Member::file("bin/sh", "sh"),
            Member::symlink("lib64", "/usr/lib64"),
            Member::file("lib64/ld.so", "ld"),
            Member::hard_link("lib64/ld-2.so", "/lib64/ld.so"),
        ];
        self.taken("P16/usr-merge", archive(&members), &[("usr/bin/sh", "file"), ("usr/lib64/ld-2.so", "file")]);
        let members = [Member::symlink("absolute", "/no/such"), Member::symlink("up", "../../../../../etc/passwd")];
        self.taken("P16/links-outside", archive(&members), &[("absolute", "symlink"), ("up", "symlink")]);
        for path in [&b"\xff\xfe"[..], b"a\nb", b"a\rb", b"\x1b[2J", "\u{202e}txt".as_bytes(), "\u{2028}".as_bytes()] {
            for (name, member) in [TYPES[0], TYPES[1], TYPES[2]] {
                let id = format!("P17/{}/{name}", path.escape_ascii());
                self.add(id, with_target(&[member(path)]), Expect::Taken);
            }
        }
        for (what, first, second) in
            [("case", "Foo", "foo"), ("eszett", "\u{df}", "ss"), ("normal-form", "\u{e9}", "e\u{301}")]
        {
            let members = [Member::symlink(first, &self.victim), Member::file(format!("{second}/pwn"), "pwn")];
            self.add(format!("P18/{what}"), archive(&members), Expect::Taken);
        }
    }

    /// W: whiteouts and opaque directories.
    fn marks(&mut self) {
        for encoding in Encoding::ALL {
            for (number, name) in [("W01", ".wh..."), ("W02", "e/.wh..."), ("W03", "e/.wh.."), ("W04", "e/.wh.")] {
                self.refused(format!("{number}/{encoding:?}"), archive(&[Member::file(name, "").encoding(encoding)]));
            }
            let device = Member::char_device("w", 0, 0).encoding(encoding);
            self.refused(format!("W10/{encoding:?}"), archive(&[device]));
            let members =
                [Member::file(".wh.x", "").encoding(encoding), Member::hard_link("h", ".wh.x").encoding(encoding)];
            self.refused(format!("W11/link-to/{encoding:?}"), archive(&members));
        }
        self.refused("W10/in-directory", archive(&[Member::dir("d"), Member::char_device("d/w", 0, 0)]));
        for (way, target) in self.ways("") {
            for (number, mark) in [("W05", "x/.wh.canary"), ("W05/dir", "x/.wh.dir"), ("W06", "x/.wh..wh..opq")] {
                let members = [Member::symlink("x", &target), Member::file(mark, "")];
                self.taken(format!("{number}/{way}"), archive(&members), &[]);
            }
            let members = [Member::symlink("x", [&target[..], b"/canary"].concat()), Member::file(".wh.x", "")];
            // In one layer a mark hides nothing of it: the link stays.
            self.taken(format!("W07/{way}"), archive(&members), &[]);
        }
        let name = || Member::file("d/f", "new");
        self.taken("W08/before", archive(&[Member::whiteout("d/f"), name()]), &[("d/f", "file")]);
        self.taken("W08/after", archive(&[name(), Member::whiteout("d/f")]), &[("d/f", "file")]);
        self.taken("W09/before", archive(&[Member::opaque("d"), name()]), &[("d/f", "file")]);
        self.taken("W09/after", archive(&[name(), Member::opaque("d")]), &[("d/f", "file")]);
        for (what, mark) in [
            ("data", Member::file(".wh.x", "data")),
            ("dir", Member::dir(".wh.x")),
            ("symlink", Member::symlink(".wh.x", &self.victim)),
            ("fifo", Member::fifo(".wh.x")),
            ("char", Member::char_device(".wh.x", 1, 3)),
            ("below", Member::file(".wh.d/x", "")),
            ("opaque-data", Member::file("d/.wh..wh..opq", "data")),
            ("opaque-symlink", Member::symlink("d/.wh..wh..opq", &self.victim)),
            ("opaque-below", Member::file("d/.wh..wh..opq/x", "")),
        ] {
            self.refused(format!("W11/{what}"), archive(&[Member::dir("d"), mark]));
        }
        self.refused("W11/hard-link", with_target(&[Member::hard_link(".wh.x", "hard-link-target")]));
        for name in [".wh..wh.plnk/1.2", ".wh..wh.aufs", ".wh..wh.orph/x/y", "d/.wh..wh.tmp"] {
            let members = [Member::file(name, "aufs"), Member::file("f", "")];
            self.taken(format!("W12/{name}"), archive(&members), &[("f", "file")]);
            let members = [Member::file(name, "aufs"), Member::hard_link("h", name)];
            self.refused(format!("W12/link/{name}"), archive(&members));
        }
        let many: Vec<_> = (0..20_000).map(|n| Member::whiteout(format!("gone-{n}"))).collect();
        self.taken("W13/many", archive(&many), &[]);
    }

    /// L: hard links.
    fn hard_links(&mut self) {
        for encoding in Encoding::ALL {
            for (way, target) in self.ways("/canary") {
                let number = if way == "absolute" { "L02" } else { "L01" };
                let members = [
                    Member::hard_link("h", &target).mode(0o777).encoding(encoding),
                    Member::file("h", "pwn").encoding(encoding),
                ];
                self.refused(format!("{number}/{way}/{encoding:?}"), archive(&members));
            }
            for (way, target) in self.ways("") {
                let members = [Member::symlink("x", &target), Member::hard_link("h", "x/canary").encoding(encoding)];
                self.refused(format!("L01/through-link/{way}/{encoding:?}"), archive(&members));
                // Into the victim: the link's own directory leads there.
                let members = [
                    Member::file("f", "pwn"),
                    Member::symlink("x", &target),
                    Member::hard_link("x/canary", "f").mode(0o4777).owner(4321, 4321).encoding(encoding),
                ];
                let shown = inside(&target, "canary");
                self.taken(format!("L01/into/{way}/{encoding:?}"), archive(&members), &[(&shown, "file")]);
            }
        }
        for (way, target) in self.ways("/canary") {
            // CVE-2021-32760: another name of the link, never of what it leads to.
            let members = [
                Member::symlink("s", &target),
                Member::hard_link("h", "s").mode(0o6777).owner(4321, 4321).mtime(1, 0).xattr("user.l03", "1"),
            ];
            self.taken(format!("L03/{way}"), archive(&members), &[("h", "symlink")]);
            let members = [Member::symlink("s", &target), Member::hard_link("h", "s"), Member::file("h", "pwn")];
            self.taken(format!("L03/rewritten/{way}"), archive(&members), &[("h", "file"), ("s", "symlink")]);
        }
        let a = || Member::file("a", "a");
        for (what, members) in [
            ("dir", [Member::dir("d"), Member::hard_link("h", "d")]),
            ("root", [a(), Member::hard_link("h", ".")]),
            ("itself", [a(), Member::hard_link("h", "h")]),
            ("itself-after", [a(), Member::hard_link("a", "a")]),
            ("below-file", [a(), Member::hard_link("h", "a/b")]),
        ] {
            self.refused(format!("L04/{what}"), archive(&members));
        }
        // What is not there may be in a lower layer; there is none.
        self.refused("L04/later", archive(&[Member::hard_link("h", "a"), a()]));
        self.refused("L04/missing", archive(&[Member::hard_link("h", "missing")]));
        let members = [a(), Member::hard_link("h", "a").mode(0o600).owner(5, 6).mtime(7, 8).xattr("user.x", "1")];
        self.taken("L05", archive(&members), &[("h", "file")]);
        let members = [a(), Member::hard_link("h", "a").size_field(600), Member::file("after", "")];
        self.taken("L07", archive(&members), &[("h", "file"), ("after", "file")]);
    }

    /// M: metadata, attributes, devices.
    fn metadata(&mut self) {
        for (name, member) in [TYPES[0], TYPES[1], TYPES[2], TYPES[6]] {
            for (number, attribute, value) in [
                ("M01", "trusted.overlay.opaque", &b"y"[..]),
                ("M01", "trusted.overlay.redirect", b"/victim"),
                ("M01", "trusted.overlay.metacopy", b""),
                ("M01", "trusted.overlay.origin", b"x"),
                ("M02", "user.overlay.opaque", b"y"),
                ("M02", "user.overlay.whiteout", b"y"),
                ("M02", "user.overlay.redirect", b"/victim"),
                ("M03", "security.selinux", b"x"),
                ("M03", "security.ima", b"x"),
                ("M03", "security.evm", b"x"),
                ("M03", "security.capability", b"not a capability"),
            ] {
                let members = [member(b"m").xattr(attribute, value)];
                self.taken(format!("{number}/{attribute}/{name}"), archive(&members), &[("m", kind_of(name))]);
            }
            let big = member(b"m").xattr("user.big", vec![b'x'; (64 << 10) + 1]);
            self.refused(format!("M04/value/{name}"), archive(&[big]));
            let many = (0..1_001).fold(member(b"m"), |member, n| member.xattr(&format!("user.n{n}"), "1"));
            self.refused(format!("M04/many/{name}"), archive(&[many]));
            self.refused(format!("M04/name/{name}"), archive(&[member(b"m").xattr(&"n".repeat(256), "1")]));
            self.refused(format!("M04/no-name/{name}"), archive(&[member(b"m").xattr("", "1")]));
        }
        for (name, member) in TYPES {
            for (what, uid) in [("2^31", 1_u64 << 31), ("2^32", 1 << 32), ("2^32-1", (1 << 32) - 1)] {
                self.refused(format!("M06/uid-{what}/{name}"), with_target(&[member(b"m").owner(uid, 0)]));
                self.refused(format!("M06/gid-{what}/{name}"), with_target(&[member(b"m").owner(0, uid)]));
            }
            self.refused(format!("M06/uid--1/{name}"), with_target(&[member(b"m").pax("uid", "-1")]));
            self.refused(
                format!("M09/1e20/{name}"),
                with_target(&[member(b"m").pax("mtime", "100000000000000000000")]),
            );
            self.refused(format!("M09/nan/{name}"), with_target(&[member(b"m").pax("mtime", "NaN")]));
            self.taken(format!("M09/long-ago/{name}"), with_target(&[member(b"m").mtime(-100_000_000_000, 0)]), &[]);
            let digits = format!("1.{}", "3".repeat(5_000));
            self.taken(format!("M09/digits/{name}"), with_target(&[member(b"m").pax("mtime", digits)]), &[]);
            let below = with_target(&[Member::file("m", "").mode(0o6755), member(b"m/below")]);
            self.taken(format!("M08/{name}"), below, &[("m", "dir"), ("m/below", kind_of(name))]);
        }
        for (what, device) in [("major", (1 << 12, 0)), ("minor", (8, 1 << 20))] {
            self.refused(format!("M05/char-{what}"), archive(&[Member::char_device("m", device.0, device.1)]));
            self.refused(format!("M05/block-{what}"), archive(&[Member::block_device("m", device.0, device.1)]));
        }
        for flag in b"MVDNAIX\x80s" {
            let member = Member::file("m", "").type_flag(*flag);
            self.refused(format!("M11/{}", flag.escape_ascii()), archive(&[member]));
        }
        for (first, one) in TYPES {
            for (second, other) in TYPES.iter().filter(|(second, _)| *second != first) {
                let number = if first == "fifo" { "M10" } else { "T16" };
                let members = [one(b"same"), other(b"same")];
                let id = format!("{number}/{first}-then-{second}");
                self.taken(id, with_target(&members), &[("same", kind_of(second))]);
            }
        }
    }

    /// T: what is no archive, or not the same to everybody.
    fn grammar(&mut self) {
        let whole = archive(&[
            Member::file("a", "1"),
            Member::dir("d"),
            Member::file("d/long", "2".repeat(700)).pax("comment", "x").mtime(1, 5),
        ]);
        let end = whole.len() - 1024;
        for cut in (1..end).step_by(97).chain([512, 1024, end - 1, end, end + 512]) {
            self.refused(format!("T13/cut-{cut}"), whole[..cut].to_vec());
        }
        let after = || Member::file("after", "");
        let extension = |kind: u8, payload: &[u8]| Member::file("././@Extension", payload).type_flag(kind);
        for (what, payload) in [
            ("too-long", &b"999 path=x\n"[..]),
            ("zero", b"0 path=x\n"),
            ("too-short", b"5 path=x\n"),
            ("no-number", b"abc path=x\n"),
            ("no-newline", b"9 path=x "),
            ("no-equals", b"8 pathx\n"),
            ("negative", b"-9 path=x\n"),
            ("nothing", b"\n"),
        ] {
            self.refused(format!("T07/{what}"), archive(&[extension(b'x', payload), after()]));
            self.refused(format!("T07/global-{what}"), archive(&[extension(b'g', payload), after()]));
        }
        for key in ["path", "linkpath", "uname", "gname"] {
            self.refused(format!("T08/{key}"), archive(&[Member::file("m", "").pax(key, b"a\0b")]));
        }
        for key in ["path", "linkpath", "size", "uid"] {
            let twice = Member::file("m", "").pax(key, "1").pax(key, "1");
            self.refused(format!("T06/{key}"), archive(&[twice]));
        }
        let size = |pax: &str, field| Member::file("m", "").pax("size", pax).size_field(field);
        self.refused("T01/more-than-there-is", archive(&[size("5000", 0)]));
        self.taken("T02", archive(&[size("0", 512), after()]), &[("after", "file")]);
        for bad in ["-1", "9223372036854775808", "1e3", "0x10", " 1"] {
            self.refused(format!("T10/pax-size-{}", bad.trim()), archive(&[size(bad, 0)]));
        }
        for (name, member) in TYPES.iter().filter(|(name, _)| *name != "file") {
            let members = [member(b"m").size_field(600), after()];
            self.taken(format!("T03/{name}"), with_target(&members), &[("after", "file")]);
        }
        self.taken("T09/path", archive(&[extension(b'g', b"15 path=victim\n"), after()]), &[("after", "file")]);
        for kind in [b'x', b'L', b'K'] {
            let dangling = archive(&[after(), extension(kind, if kind == b'x' { b"9 path=x\n" } else { b"x\0" })]);
            self.refused(format!("T13/dangling-{}", char::from(kind)), dangling);
        }
        for at in [0, 100, 124, 148, 156, 257] {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x11;
            self.refused(format!("T11/flip-{at}"), bytes);
        }
        for (what, at, field) in [
            ("negative-size", 124, &[0xff; 12][..]),
            ("huge-size", 124, b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff"),
            ("overflowing-size", 124, b"\x80\0\0\0\x80\0\0\0\0\0\0\0"),
            ("junk-size", 124, b"5 junk      "),
            ("negative-mode", 100, &[0xff; 8]),
            ("negative-uid", 108, &[0xff; 8]),
            ("huge-gid", 116, b"\x80\0\0\x01\0\0\0\0"),
        ] {
            let mut bytes = whole.clone();
            bytes[at..at + field.len()].copy_from_slice(field);
            fix_checksum(&mut bytes[..512]);
            self.refused(format!("T10/{what}"), bytes);
        }
        let mut lone = Member::file("a", "1").bytes();
        lone.extend([0; 512]);
        lone.extend(archive(&[after()]));
        self.refused("T12/lone-zero-block", lone);
        self.taken("T12/two-archives", [whole.clone(), archive(&[Member::file("two", "")])].concat(), &[("a", "file")]);
        self.taken("T12/garbage-behind", [&whole[..], b"garbage"].concat(), &[("a", "file")]);
        self.refused("T12/nothing", Vec::new());
        self.refused("T12/zero-bytes", vec![0; 512]);
        let many: Vec<_> = (0..5_000).map(|n| Member::file("same", n.to_string())).collect();
        self.taken("T17", archive(&many), &[("same", "file")]);
    }

    /// T15, B: maps, bombs.
    fn bombs(&mut self) {
        let sparse = |real: &str, map: &str, stored: usize| {
            let mut data = map.as_bytes().to_vec();
            data.resize(data.len().next_multiple_of(512) + stored, 0);
            Member::file("GNUSparseFile.0/x", data)
                .pax("GNU.sparse.major", "1")
                .pax("GNU.sparse.minor", "0")
                .pax("GNU.sparse.name", "sparse")
                .pax("GNU.sparse.realsize", real)
        };
        self.taken("T15/sound", archive(&[sparse("8192", "1\n4096\n512\n", 512)]), &[("sparse", "file")]);
        for (what, real, map, stored) in [
            ("backwards", "8192", "2\n4096\n512\n0\n512\n", 1024),
            ("overlap", "8192", "2\n0\n512\n256\n512\n", 1024),
            ("negative", "8192", "1\n-1\n512\n", 512),
            ("past-end", "512", "1\n512\n512\n", 512),
            ("overflow", "8192", "1\n9223372036854775807\n9223372036854775807\n", 512),
            ("too-little-data", "8192", "1\n0\n4096\n", 512),
            ("too-much-data", "8192", "1\n0\n512\n", 4096),
            ("count-too-large", "8192", "1000000000\n0\n512\n", 512),
            ("no-number", "8192", "x\n", 0),
        ] {
            self.refused(format!("T15/{what}"), archive(&[sparse(real, map, stored)]));
        }
        // 1 TiB of holes in three blocks.
        self.refused("B05/tebibyte", archive(&[sparse("1099511627776", "0\n", 0)]));
        self.refused("B05/huge", archive(&[sparse("9223372036854775807", "0\n", 0)]));
        let mut map = "1000000\n".to_owned();
        (0..100_000).for_each(|n| map.push_str(&format!("{}\n0\n", n * 512)));
        self.refused("B06/map-in-data", archive(&[sparse("1099511627776", &map, 0)]));
        let pairs: Vec<_> = (0..200_000).map(|n: u64| format!("{},0", n * 512)).collect();
        let in_records = Member::file("m", "")
            .pax("GNU.sparse.size", "1024")
            .pax("GNU.sparse.numblocks", "200000")
            .pax("GNU.sparse.map", pairs.join(","));
        self.refused("B06/map-in-records", archive(&[in_records]));
        let comment = Member::file("m", "").pax("comment", vec![b'x'; 2 << 20]);
        self.refused("B07/pax", archive(&[comment]));
        let many: Vec<_> = (0..2_000).map(|_| Member::file("g", vec![b'x'; 1_000]).type_flag(b'L')).collect();
        self.refused("B07/many-long-names", archive(&many));
        self.refused("B07/global", archive(&[Member::file("g", vec![b'x'; 2 << 20]).type_flag(b'g')]));

        // A file of 200 MiB of zeros: far over 200 to 1.
        let header = Member::file("zeros", "").size_field(200 << 20).bytes();
        let zeros = vec![0; 200 << 20];
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&header).and_then(|()| gzip.write_all(&zeros)).expect("because memory takes it");
        self.refused("B01/gzip", gzip.finish().expect("because memory takes it"));
        let mut zstd = crate::image::zstd_writer();
        zstd.write_all(&header).and_then(|()| zstd.write_all(&zeros)).expect("because memory takes it");
        self.refused("B01/zstd", zstd.finish().expect("because memory takes it"));
        // RFC 8878, 3.1.1: a frame whose window is 2 GiB (exponent 21, mantissa 0) and whose one block is empty.
        self.refused("B04/window", [&[0x28, 0xb5, 0x2f, 0xfd, 0, 21 << 3][..], &[1, 0, 0]].concat());
        let empty_member = |_| crate::image::Packing::Gzip.pack(b"");
        self.refused("B03/empty-members", (0..5_000).flat_map(empty_member).collect());
    }
}

/// Where a link that says `target`, at the top of a tree, leads inside of it.
fn inside(target: &[u8], name: &str) -> String {
    let text = String::from_utf8_lossy(target);
    let parts: Vec<_> = text.split('/').filter(|part| !matches!(*part, "" | "..")).collect();
    format!("{}/{name}", parts.join("/"))
}

/// Every archive, aimed at `victim`, the neighbour of the tree that is unpacked to. The same path gives the same bytes.
///
/// # Panics
/// When the path is not absolute.
pub fn corpus(victim: &Path) -> Vec<Case> {
    assert!(victim.is_absolute(), "links lead to it from anywhere");
    let absolute = victim.as_os_str().as_bytes().to_vec();
    let upwards = [b"../".repeat(24), absolute[1..].to_vec()].concat();
    let mut corpus = Corpus { cases: Vec::new(), victim: absolute, upwards };
    corpus.through_links();
    corpus.names();
    corpus.over_links();
    corpus.dead_links();
    corpus.twins();
    corpus.marks();
    corpus.hard_links();
    corpus.metadata();
    corpus.grammar();
    corpus.bombs();
    corpus.cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn every_archive_has_an_id_of_its_own_and_there_are_enough() {
        let cases = corpus(Path::new("/somewhere/victim"));
        let ids: std::collections::BTreeSet<_> = cases.iter().map(|case| &case.id).collect();
        assert_eq!(ids.len(), cases.len());
        assert!(cases.len() >= 900, "{}", cases.len());
        for letter in ["P", "W", "L", "M", "T", "B"] {
            assert!(ids.iter().any(|id| id.starts_with(letter)), "{letter}");
        }
    }

    /// All sources below a directory, one after the other.
    fn sources(dir: &Path, into: &mut String) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, into);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                into.push_str(&fs::read_to_string(&path).unwrap());
            }
        }
    }

    #[test]
    fn coverage_names_tests_that_exist() {
        let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let page = fs::read_to_string(crates.parent().unwrap().join("docs/security/coverage.md")).unwrap();
        let mut all = String::new();
        sources(crates, &mut all);
        let words: std::collections::BTreeSet<&str> =
            all.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).collect();
        let is_name =
            |name: &&str| name.matches('_').count() > 2 && name.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_');
        let named: Vec<_> = page.split('`').skip(1).step_by(2).filter(is_name).collect();
        assert!(named.len() > 150, "only {} tests are named", named.len());
        let missing: Vec<_> = named.into_iter().filter(|name| !words.contains(name)).collect();
        assert!(missing.is_empty(), "coverage.md names tests that do not exist: {missing:#?}");
        for case in corpus(Path::new("/victim")) {
            let number = &case.id[..3];
            assert!(
                page.contains(&format!("| {number}"))
                    || number.starts_with('W')
                    || number.starts_with('L')
                    || number.starts_with('M'),
                "{number} is not on the page"
            );
        }
    }

    #[test]
    fn whatever_is_done_to_a_victim_is_noticed() {
        type Deed = fn(&Path);
        let deeds: [(&str, Deed); 6] = [
            ("content", |victim| fs::write(victim.join("canary"), "x").unwrap()),
            ("mode", |victim| fs::set_permissions(victim.join("dir"), fs::Permissions::from_mode(0o777)).unwrap()),
            ("links", |victim| fs::hard_link(victim.join("canary"), victim.parent().unwrap().join("h")).unwrap()),
            ("new", |victim| fs::write(victim.join("dir/new"), "x").unwrap()),
            ("gone", |victim| fs::remove_file(victim.join("link")).unwrap()),
            ("as it was", |victim| {
                let mode = fs::Permissions::from_mode(0o640);
                fs::set_permissions(victim.join("canary"), mode).unwrap();
            }),
        ];
        for (what, deed) in deeds {
            let scratch = Scratch::new();
            let victim = Victim::new(&scratch.join("victim"), rustix::process::geteuid().as_raw());
            victim.assert_untouched(what);
            deed(victim.path());
            let noticed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| victim.assert_untouched(what)));
            assert!(noticed.is_err(), "{what}");
            let copied = std::panic::catch_unwind(|| victim.assert_not_in(scratch.path(), what));
            assert!(copied.is_err(), "{what}: the victim itself holds it");
        }
    }
}
