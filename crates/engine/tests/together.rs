//! What two requests of one process want at the same time is done once.

// Clippy's allowance for tests stops at their helpers, and all of this is a test.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::Write as _;
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use plies_engine::build::{BuildOutput, BuildRequest};
use plies_engine::exec::Cancel;
use plies_engine::progress::{Event, Progress, Silent, TaskId};
use plies_engine::{Engine, EngineOptions, GcMode, Input, PullRequest};
use plies_testkit::image::{Image, Packing, busybox_members};
use plies_testkit::registry::{Fault, FaultyRegistry};
use plies_testkit::tar::Member;
use plies_testkit::{eventually, scratch::Scratch, tools};

fn engine(scratch: &Scratch) -> Engine {
    Engine::open(&scratch.join("root"), EngineOptions::default()).unwrap()
}

/// One with an image that can run shell scripts, `busybox:latest`.
fn engine_with_base(scratch: &Scratch) -> Engine {
    let engine = engine(scratch);
    let base = Image::new("busybox:latest").layer(&busybox_members().unwrap(), Packing::Plain);
    let archive = base.write_oci_tar(&scratch.join("base.tar"));
    engine.load(&Input::Path(archive), None, &Silent, &Cancel::new()).unwrap();
    engine
}

/// Counts the tasks that have begun and whose name holds a text.
struct Begun<'a>(&'a str, &'a AtomicUsize);

impl Progress for Begun<'_> {
    fn report(&self, _: TaskId, event: Event<'_>) {
        if matches!(event, Event::Started { name, .. } if name.contains(self.0)) {
            self.1.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[test]
fn privileged_a_step_that_two_builds_want_at_once_is_run_once() {
    if !(tools::privileged() && tools::have(&["busybox", "crun"])) {
        return;
    }
    let scratch = Scratch::new();
    let engine = engine_with_base(&scratch);

    // The step says that it runs, and goes on when it is answered.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (begun, runs) = (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&runs);
    let (release, released) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            counted.fetch_add(1, Ordering::SeqCst);
            // The first is kept until both builds want it; a second one should not be.
            let _ = released.recv();
            drop(stream.unwrap().write_all(b"go\n"));
        }
    });
    let build = |name: &str| {
        let step = format!("RUN nc 127.0.0.1 {port} < /dev/null > /answer");
        scratch.file(format!("{name}/Dockerfile"), format!("FROM busybox\n{step}\nRUN echo {name} > /name\n"));
        BuildRequest {
            outputs: vec![BuildOutput::default()],
            context: scratch.join(name),
            names: vec![format!("{name}:latest")],
            search_path: std::env::split_paths(&std::env::var_os("PATH").unwrap()).collect::<Vec<PathBuf>>(),
            ..BuildRequest::default()
        }
    };
    let (one, other) = (build("one"), build("other"));
    let progress = Begun("RUN nc", &begun);
    let (first, second) = std::thread::scope(|scope| {
        let first = scope.spawn(|| engine.build(&one, &progress, &Cancel::new()));
        let second = scope.spawn(|| engine.build(&other, &progress, &Cancel::new()));
        assert!(eventually(|| begun.load(Ordering::SeqCst) == 2 && runs.load(Ordering::SeqCst) >= 1));
        // Time for the second to do wrong.
        std::thread::sleep(Duration::from_millis(500));
        drop(release);
        (first.join().unwrap().unwrap(), second.join().unwrap().unwrap())
    });
    assert_eq!(runs.load(Ordering::SeqCst), 1);
    assert_eq!((first.steps_count, second.steps_count), (2, 2));
    assert_eq!(first.cached_count + second.cached_count, 1);
    assert_ne!(first.id, second.id);
    engine.close().unwrap();
}

#[test]
fn privileged_a_step_that_is_waited_for_can_be_cancelled() {
    if !(tools::privileged() && tools::have(&["busybox", "crun"])) {
        return;
    }
    let scratch = Scratch::new();
    let engine = engine_with_base(&scratch);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    scratch.file("c/Dockerfile", format!("FROM busybox\nRUN nc 127.0.0.1 {port} < /dev/null\n"));
    let request = BuildRequest {
        context: scratch.join("c"),
        search_path: std::env::split_paths(&std::env::var_os("PATH").unwrap()).collect(),
        ..BuildRequest::default()
    };
    let (begun, cancel) = (AtomicUsize::new(0), Cancel::new());
    let progress = Begun("RUN nc", &begun);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| engine.build(&request, &Silent, &Cancel::new()));
        let (held, _) = listener.accept().unwrap();
        let second = scope.spawn(|| engine.build(&request, &progress, &cancel));
        assert!(eventually(|| begun.load(Ordering::SeqCst) == 1));
        cancel.cancel();
        let error = second.join().unwrap().unwrap_err();
        assert_eq!(error.to_string(), "cancelled");
        drop(held);
        first.join().unwrap().unwrap();
    });
    engine.close().unwrap();
}

#[test]
fn privileged_a_blob_that_two_pulls_want_at_once_is_fetched_once() {
    if !tools::privileged() {
        return;
    }
    let scratch = Scratch::new();
    let engine = engine(&scratch);
    let registry = FaultyRegistry::start();
    let layer = |name: &str| [Member::file(name, name.repeat(1000))];
    // Each other's order, so that neither could wait for the other's layers one by one.
    let one = Image::new("one:1").layer(&layer("a"), Packing::Gzip).layer(&layer("b"), Packing::Gzip);
    let other = Image::new("other:1").layer(&layer("b"), Packing::Gzip).layer(&layer("a"), Packing::Gzip);
    let other = other.layer(&layer("c"), Packing::Gzip);
    registry.put("x", "one", &one);
    registry.put("x", "other", &other);
    let requests = |registry: &FaultyRegistry, seen: &mut Vec<String>| {
        seen.extend(registry.seen().iter().map(plies_testkit::registry::Seen::line));
        let of = |text: &str| seen.iter().filter(|line| line.contains(text)).count();
        let layers = [one.layer_digest(0), one.layer_digest(1), other.layer_digest(2)];
        (of("/manifests/"), layers.map(|digest| of(&digest)))
    };
    let (first, second) =
        (format!("blobs/sha256:{}", one.layer_digest(0)), format!("blobs/sha256:{}", one.layer_digest(1)));
    registry.fault(&first, 100, Fault::Held);
    registry.fault(&second, 100, Fault::Held);
    let pull = |tag: &str| {
        let request = PullRequest { name: format!("{}/x:{tag}", registry.host()), ..PullRequest::default() };
        engine.pull(&request, &Silent, &Cancel::new())
    };
    let mut seen = Vec::new();
    std::thread::scope(|scope| {
        let one = scope.spawn(|| pull("one"));
        let other = scope.spawn(|| pull("other"));
        assert!(eventually(|| {
            let (manifests, layers) = requests(&registry, &mut seen);
            manifests >= 2 && layers[0] >= 1 && layers[1] >= 1
        }));
        // Time for the second to do wrong.
        std::thread::sleep(Duration::from_millis(500));
        registry.heal();
        one.join().unwrap().unwrap();
        other.join().unwrap().unwrap();
    });
    let (_, layers) = requests(&registry, &mut seen);
    assert_eq!(layers, [1, 1, 1], "{seen:#?}");
    engine.close().unwrap();
}

#[test]
fn privileged_a_mount_that_is_being_made_is_not_taken_for_one_that_is_gone() {
    if !(tools::privileged() && tools::have(&["busybox"])) {
        return;
    }
    let scratch = Scratch::new();
    let engine = engine_with_base(&scratch);
    let at = scratch.join("at");
    std::fs::create_dir_all(&at).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // A collection looks for mounts that went with a restart, and lets go of what they held.
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                engine.gc(GcMode::Run).unwrap();
            }
        });
        let mounted_and_not = (0..100).try_for_each(|_| {
            engine.mount("busybox", &at, false)?;
            engine.umount(&at)
        });
        over.store(true, Ordering::Relaxed);
        mounted_and_not.unwrap();
    });
}
