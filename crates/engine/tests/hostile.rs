//! Every hostile archive through every door by which an archive comes in: nothing gets out of its tree, nothing of the
//! outside gets in, what is refused leaves nothing behind, what others take is taken, and nothing panics or hangs.
//!
//! Every archive is unpacked in both styles on every file system, as root and as root of a user namespace. The doors that
//! need a store take turns with the archives; `PLIES_CHAOS=1` sends each archive through each.

// Clippy's allowance for tests stops at their helpers, and all of this is a test.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use plies_archive::{ApplyError, ApplyStyle, Limits, UnpackError, compress, unpack};
use plies_engine::build::{BuildOutput, BuildRequest, TreeOutput};
use plies_engine::exec::Cancel;
use plies_engine::progress::Silent;
use plies_engine::{
    ContainerdOptions, Containers, DriverKind, Engine, EngineOptions, FsckDepth, FsckRequest, GcMode, ImportOptions,
    ImportOutcome, ImportSource, Input,
};
use plies_oci::ErrorKind;
use plies_testkit::docker::DataRoot;
use plies_testkit::hostile::{Case, Expect, Victim, corpus};
use plies_testkit::image::{Image, Packing};
use plies_testkit::scratch::{FileSystem, Scratch};
use plies_testkit::{sha256_hex, tools};

/// Nothing that is asked of one door takes this long; who does hangs.
const HANGS_AFTER: Duration = Duration::from_secs(100);

/// Set for the process that a test starts in a user namespace: the directory to work in.
const INNER: &str = "PLIES_HOSTILE_DIR";

/// Where an archive comes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Door {
    /// Unpacked into an empty directory, as a layer.
    Layer,
    /// Unpacked into a tree.
    Merged,
    /// `ply layer register`
    Register,
    /// `ply load`, and then `COPY --from` the image.
    Load,
    /// `ADD`
    Add,
    /// `ply import docker`
    Import,
    /// `ply import containers-storage`
    ImportStorage,
    /// `ply import containerd`, of blobs that were not unpacked there
    ImportBlobs,
}

impl Door {
    const ALL: [Self; 8] = [
        Self::Layer,
        Self::Merged,
        Self::Register,
        Self::Load,
        Self::Add,
        Self::Import,
        Self::ImportStorage,
        Self::ImportBlobs,
    ];

    /// Whether this archive is tried here: all are in the long version, else the doors to a store take turns.
    fn tries(self, index: usize, kind: FileSystem, all: bool) -> bool {
        let place = Self::ALL.iter().position(|door| *door == self).unwrap();
        // Btrfs takes its time to sync.
        let (first, every) = match kind {
            FileSystem::Ext4 => (0, 6),
            FileSystem::Tmpfs => (1, 6),
            FileSystem::Btrfs => (2, 18),
        };
        all || place < 2 || (index + first) % every == place - 2
    }
}

/// What came of an archive.
enum Outcome {
    Taken,
    Refused(String),
    /// Not the archive's fault: this user, or this file system, cannot.
    Unable(String),
}

impl Outcome {
    fn of(error: &(dyn std::error::Error + 'static), kind: ErrorKind) -> Self {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(source) = cause {
            text = format!("{text}: {source}");
            cause = source.source();
        }
        if kind == ErrorKind::Unavailable { Self::Unable(text) } else { Self::Refused(text) }
    }
}

/// Ends the process, naming what it was at, when that takes too long.
#[derive(Clone)]
struct Watchdog(Arc<Mutex<(String, Instant)>>);

impl Watchdog {
    fn new() -> Self {
        let watchdog = Self(Arc::new(Mutex::new((String::new(), Instant::now()))));
        let seen = Arc::downgrade(&watchdog.0);
        std::thread::spawn(move || {
            while let Some(at) = seen.upgrade() {
                let (what, since) = at.lock().unwrap().clone();
                if since.elapsed() > HANGS_AFTER {
                    eprintln!("hangs: {what}");
                    std::process::abort();
                }
                drop(at);
                std::thread::sleep(Duration::from_secs(1));
            }
        });
        watchdog
    }

    fn at(&self, what: &str) {
        *self.0.lock().unwrap() = (what.to_owned(), Instant::now());
    }
}

/// A directory on some file system, with a victim and a store in it.
struct Place {
    dir: PathBuf,
    victim: Victim,
    engine: Engine,
    in_user_namespace: bool,
    failures: Vec<String>,
    taken: usize,
    refused: usize,
    unable: usize,
}

impl Place {
    fn new(dir: &Path, in_user_namespace: bool) -> Self {
        let victim = Victim::new(&dir.join("victim"), 0);
        // Only root of the machine may mark directories for overlayfs.
        let driver = if in_user_namespace { DriverKind::Native } else { DriverKind::Auto };
        let engine = Engine::open(&dir.join("store"), EngineOptions { driver, ..EngineOptions::default() }).unwrap();
        Self {
            dir: dir.to_owned(),
            victim,
            engine,
            in_user_namespace,
            failures: Vec::new(),
            taken: 0,
            refused: 0,
            unable: 0,
        }
    }

    fn out(&self) -> PathBuf {
        self.dir.join("out")
    }

    fn unpack(&self, case: &Case, style: ApplyStyle) -> Outcome {
        fs::create_dir(self.out()).unwrap();
        let root = fs::File::open(self.out()).unwrap();
        let compression = compress::detect(&case.bytes);
        match unpack(&case.bytes[..], compression, std::os::fd::AsFd::as_fd(&root), style, &Limits::default(), None) {
            Ok(_) => {}
            // Whether it is refused is for the layers below to say, and there are none.
            Err(UnpackError::Apply(error @ ApplyError::NeedsBase { .. })) if case.expect != Expect::Taken => {
                return Outcome::Refused(error.to_string());
            }
            Err(UnpackError::Apply(ApplyError::NeedsBase { .. })) => {}
            Err(error) => return Outcome::of(&error, error.kind()),
        }
        for (name, kind) in &case.shows {
            let meta = fs::symlink_metadata(self.out().join(name));
            let found = meta.as_ref().map_or("nothing", |meta| {
                use std::os::unix::fs::FileTypeExt as _;
                match meta.file_type() {
                    kind if kind.is_dir() => "dir",
                    kind if kind.is_symlink() => "symlink",
                    kind if kind.is_fifo() => "fifo",
                    kind if kind.is_char_device() => "char",
                    kind if kind.is_block_device() => "block",
                    _ => "file",
                }
            });
            let no_device = self.in_user_namespace && matches!(*kind, "char" | "block");
            if found != *kind && !no_device {
                return Outcome::Refused(format!("it was taken, but {name} is {found}, not {kind}"));
            }
        }
        Outcome::Taken
    }

    fn register(&self, case: &Case) -> Outcome {
        let file = self.dir.join("layer.tar");
        fs::write(&file, own(case, "register")).unwrap();
        match self.engine.register_layer(&Input::Path(file), None, &Silent, &Cancel::new()) {
            Ok(_) => Outcome::Taken,
            Err(error) => Outcome::of(&error, error.kind()),
        }
    }

    fn load(&self, case: &Case, index: usize) -> Outcome {
        let name = format!("localhost/hostile:{index}");
        let image = image_of(case, "load", &name, index);
        let path = image.write_oci_tar(&self.dir.join("image.tar"));
        if let Err(error) = self.engine.load(&Input::Path(path), None, &Silent, &Cancel::new()) {
            return Outcome::of(&error, error.kind());
        }
        // What leads out of the image is where somebody could take the outside in.
        let outcome = self.build(&format!("FROM scratch\nCOPY --from={name} / /all/\n"), &[]);
        self.victim.assert_not_in(&self.out(), &case.id);
        drop(fs::remove_dir_all(self.out()));
        for source in ["/x", "/x/canary", "/h", "/escape/canary", "/x*/c*"] {
            self.build(&format!("FROM scratch\nCOPY --from={name} {source} /some/\n"), &[]);
            self.victim.assert_not_in(&self.out(), &case.id);
            drop(fs::remove_dir_all(self.out()));
        }
        outcome
    }

    fn build(&self, dockerfile: &str, files: &[(&str, &[u8])]) -> Outcome {
        let context = self.dir.join("context");
        fs::create_dir_all(&context).unwrap();
        fs::write(context.join("Dockerfile"), dockerfile).unwrap();
        files.iter().for_each(|(name, bytes)| fs::write(context.join(name), bytes).unwrap());
        let request = BuildRequest {
            outputs: vec![BuildOutput::Tree(TreeOutput::Directory(self.out()))],
            context,
            ..BuildRequest::default()
        };
        match self.engine.build(&request, &Silent, &Cancel::new()) {
            Ok(_) => Outcome::Taken,
            Err(error) => Outcome::of(&error, error.kind()),
        }
    }

    fn add(&self, case: &Case) -> Outcome {
        match self.build("FROM scratch\nADD c.tar /d/\n", &[("c.tar", &own(case, "add"))]) {
            // What does not begin as an archive is a file like any other.
            Outcome::Taken if fs::symlink_metadata(self.out().join("d/c.tar")).is_ok_and(|meta| meta.is_file()) => {
                match case.expect {
                    Expect::Refused => Outcome::Refused("it is no archive".to_owned()),
                    _ => Outcome::Taken,
                }
            }
            // A layer's marks mean nothing here.
            Outcome::Refused(_) if case.only_layers && case.expect != Expect::Refused => Outcome::Taken,
            outcome => outcome,
        }
    }

    fn import(&self, case: &Case, index: usize, door: Door) -> Outcome {
        let path = self.dir.join("source");
        let source = match door {
            Door::ImportBlobs => {
                let image = image_of(case, "import blobs", &format!("localhost/imported:{index}"), index);
                plies_testkit::containerd::write_root(&path, &image);
                ImportSource::Containerd(ContainerdOptions { namespaces: vec![], containers: Containers::List })
            }
            Door::ImportStorage => {
                plies_testkit::docker::graph_root(&path, &own(case, "import storage"));
                ImportSource::ContainersStorage(Containers::List)
            }
            _ => {
                let data = DataRoot::new(path.clone());
                let (_, diff) = data.layer_of_tar(&own(case, "import"));
                data.image(&[&diff]);
                ImportSource::Docker(Containers::List)
            }
        };
        let options = ImportOptions::default();
        let report = self.engine.import(&source, &path, options, &Silent, &Cancel::new()).unwrap();
        fs::remove_dir_all(&path).unwrap();
        let layer = report.items.iter().find(|item| item.kind == "layer");
        let why = || match layer {
            Some(item) => format!("{:?}", item.why),
            // Its image was not even read so far.
            None => format!("{:?}", report.items),
        };
        match layer.map(|item| item.outcome) {
            Some(ImportOutcome::Taken | ImportOutcome::Here) => Outcome::Taken,
            _ if why().contains("os error") || why().contains("not permitted") => Outcome::Unable(why()),
            _ => Outcome::Refused(why()),
        }
    }

    fn send(&mut self, case: &Case, index: usize, door: Door) {
        let outcome = match door {
            Door::Layer => self.unpack(case, ApplyStyle::Layer),
            Door::Merged => self.unpack(case, ApplyStyle::Merged),
            Door::Register => self.register(case),
            Door::Load => self.load(case, index),
            Door::Add => self.add(case),
            Door::Import | Door::ImportStorage | Door::ImportBlobs => self.import(case, index, door),
        };
        match outcome {
            Outcome::Taken => self.taken += 1,
            Outcome::Refused(_) => self.refused += 1,
            Outcome::Unable(_) => self.unable += 1,
        }
        let wrong = match (case.expect, outcome) {
            (Expect::Refused, Outcome::Taken) => Some("it was taken".to_owned()),
            (Expect::Taken, Outcome::Refused(why)) => Some(why),
            (Expect::Taken, Outcome::Unable(why)) if !self.in_user_namespace => Some(why),
            _ => None,
        };
        self.failures.extend(wrong.map(|why| format!("{} by {door:?}: {why}", case.id)));
        self.victim.assert_not_in(&self.out(), &case.id);
        drop(fs::remove_dir_all(self.out()));
    }

    /// All that was taken is sound, and nothing else was left.
    fn check_store(mut self, what: &str) {
        let request = FsckRequest { depth: FsckDepth::Data(100), repair: false, rebuilt: None };
        let report = self.engine.fsck(&request, &Silent, &Cancel::new()).unwrap();
        self.failures.extend(report.findings.iter().map(|finding| format!("fsck: {finding:?}")));
        self.engine.gc(GcMode::Run).unwrap();
        for dir in ["content/ingest", "active", "mounts"] {
            let left = fs::read_dir(self.dir.join("store").join(dir)).into_iter().flatten().flatten();
            self.failures.extend(left.map(|entry| format!("left behind: {}", entry.path().display())));
        }
        self.victim.assert_untouched(what);
        self.engine.close().unwrap();
        let (sent, failures) = (self.taken + self.refused + self.unable, self.failures.len());
        println!(
            "hostile archives, {what}: {sent} sent, {} taken, {} refused, {} beyond this user; {failures} failures",
            self.taken, self.refused, self.unable
        );
        assert!(self.failures.is_empty(), "{what}:\n{}", self.failures.join("\n"));
    }
}

/// The bytes for one door: none has the layer already that another made of the same archive.
fn own(case: &Case, door: &str) -> Vec<u8> {
    match case.expect {
        Expect::Refused => case.bytes.clone(),
        Expect::Taken | Expect::Either => [&case.bytes[..], door.as_bytes()].concat(),
    }
}

/// An image of one layer, the archive: as it is, if it is packed already.
fn image_of(case: &Case, door: &str, name: &str, index: usize) -> Image {
    let tar = own(case, door);
    if compress::detect(&case.bytes) == plies_oci::Compression::None {
        return Image::new(name).layer_tar(&tar, Packing::ALL[index % 3]);
    }
    let is_zstd = case.id.contains("zstd") || case.id.contains("window");
    let packing = if is_zstd { Packing::Zstd } else { Packing::Gzip };
    Image::new(name).layer_raw(&format!("sha256:{}", sha256_hex(&tar)), tar, packing.media_type())
}

fn send_all(dir: &Path, kind: FileSystem, in_user_namespace: bool) {
    let what = format!("{kind:?} as root{}", if in_user_namespace { " of a user namespace" } else { "" });
    let mut place = Place::new(dir, in_user_namespace);
    let cases = corpus(place.victim.path());
    let (watchdog, all) = (Watchdog::new(), std::env::var_os("PLIES_CHAOS").is_some());
    for (index, case) in cases.iter().enumerate() {
        for door in Door::ALL.into_iter().filter(|door| door.tries(index, kind, all)) {
            let now = format!("{what}: {} by {door:?}", case.id);
            watchdog.at(&now);
            let sent = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| place.send(case, index, door)));
            assert!(sent.is_ok(), "{now} panics");
            place.victim.assert_untouched(&now);
        }
    }
    watchdog.at("fsck");
    place.check_store(&what);
}

fn send_all_on(kind: FileSystem) {
    if !tools::privileged() {
        return;
    }
    let scratch = Scratch::new();
    let Some(dir) = scratch.mount("fs", kind) else { return };
    send_all(&dir, kind, false);
}

/// `test` is the calling test, which is run again, inside.
fn send_all_in_a_user_namespace_on(kind: FileSystem, test: &str) {
    if let Some(dir) = std::env::var_os(INNER) {
        return send_all(Path::new(&dir), kind, true);
    }
    if !(tools::privileged() && tools::have(&["unshare", "setpriv"])) {
        return;
    }
    let scratch = Scratch::new();
    let Some(mounted) = scratch.mount("fs", kind) else { return };
    // Who is root inside is anybody here, and must be able to come so far.
    fs::set_permissions(scratch.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    let dir = mounted.join("dir");
    fs::create_dir(&dir).unwrap();
    std::os::unix::fs::chown(&dir, Some(tools::MAPPED_ROOT), Some(tools::MAPPED_ROOT)).unwrap();
    let program = mounted.join("test");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let output = tools::in_user_namespace(&program, &["--exact", test, "--nocapture"], &[(INNER, dir.as_os_str())]);
    let said = [String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)].concat();
    assert!(output.status.success() && said.contains("1 passed"), "{}\n{said}", output.status);
    println!("{said}");
}

macro_rules! places {
    ($($root:ident, $inner:ident: $kind:ident;)*) => {
        $(#[test]
        fn $root() {
            send_all_on(FileSystem::$kind);
        }

        #[test]
        fn $inner() {
            send_all_in_a_user_namespace_on(FileSystem::$kind, stringify!($inner));
        })*
    };
}

places! {
    privileged_hostile_archives_on_ext4, privileged_hostile_archives_in_a_user_namespace_on_ext4: Ext4;
    privileged_hostile_archives_on_tmpfs, privileged_hostile_archives_in_a_user_namespace_on_tmpfs: Tmpfs;
    privileged_hostile_archives_on_btrfs, privileged_hostile_archives_in_a_user_namespace_on_btrfs: Btrfs;
}

/// A number of `/proc/self/status`, in KiB.
fn memory_kib(key: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
}

/// What archives cost that are refused, and those that are large or say that they are. Memory is asserted; time is not, since
/// that is the machine's too: it is told beside what it may be, the worst first.
#[test]
fn hostile_archives_cost_little_memory() {
    const MEMORY_KIB_MAX: u64 = 64 << 10;
    // For each whole MiB, and for what is less than one.
    const REFUSED_WITHIN: Duration = Duration::from_millis(100);
    let scratch = Scratch::new();
    let mut cases = corpus(&scratch.join("victim"));
    cases.retain(|case| case.expect == Expect::Refused || case.id.starts_with('B') || case.id.contains("mebibyte"));
    // A mebibyte of each of these, the rest is said only.
    let mebibyte = |case: &Case| case.bytes.len() < 8 << 20;
    assert!(cases.len() > 200 && cases.iter().all(mebibyte), "{}", cases.len());
    // Bytes behind the end are part of the diff ID, and read to the last one.
    let mut long_tail = plies_testkit::tar::archive([&plies_testkit::tar::Member::file("f", "")]);
    long_tail.resize(300 << 20, 0);
    let packed = Packing::Zstd.pack(&long_tail);
    drop(long_tail);
    let (mut costs, count) = (Vec::new(), cases.len());
    cases.push(Case { id: "B08".to_owned(), bytes: packed, expect: Expect::Either, shows: vec![], only_layers: false });
    for case in cases {
        let dir = scratch.dir("out");
        let root = fs::File::open(&dir).unwrap();
        // From here on the peak is counted anew (proc(5), clear_refs).
        fs::write("/proc/self/clear_refs", "5").unwrap();
        let (before, began) = (memory_kib("VmRSS"), Instant::now());
        let (compression, fd) = (compress::detect(&case.bytes), std::os::fd::AsFd::as_fd(&root));
        let result = unpack(&case.bytes[..], compression, fd, ApplyStyle::Merged, &Limits::default(), None);
        let (took, grew) = (began.elapsed(), memory_kib("VmHWM").saturating_sub(before));
        if result.is_err() {
            let bound = REFUSED_WITHIN * u32::try_from(case.bytes.len() >> 20).unwrap().max(1);
            let ratios = [took.as_secs_f64() / bound.as_secs_f64(), grew as f64 / MEMORY_KIB_MAX as f64];
            costs.push((ratios, format!("{:<60} {:>8} bytes {took:>10.1?} {grew:>6} KiB", case.id, case.bytes.len())));
        }
        assert!(case.expect != Expect::Refused || result.is_err(), "{}", case.id);
        assert!(grew < MEMORY_KIB_MAX, "{} took {grew} KiB", case.id);
        fs::remove_dir_all(&dir).unwrap();
    }
    let over = costs.iter().filter(|([time, _], _)| *time > 1.0).count();
    costs.sort_by(|(a, _), (b, _)| b[0].total_cmp(&a[0]));
    for ([time, memory], what) in costs.iter().take(12) {
        println!("cost of refusal: {what}  {time:.2} of the time, {memory:.2} of the memory");
    }
    println!(
        "costs of hostile archives: {count} archives, {} refused, {over} of them slower than may be; 0 failures",
        costs.len()
    );
}
