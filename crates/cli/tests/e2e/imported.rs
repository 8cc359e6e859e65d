//! Reports of imports, as the tests of all sources of images read them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use plies_testkit::args;
use plies_testkit::kill::{self, Outcome};
use plies_testkit::ply::Ply;
use plies_testkit::tools;
use plies_testkit::tree::Tree;
use serde_json::Value;

/// What became of everything of a kind: outcome and reason by name.
pub(crate) fn items<'r>(report: &'r Value, kind: &str) -> BTreeMap<&'r str, (&'r str, &'r str)> {
    let items = report["items"].as_array().unwrap().iter().filter(|item| item["kind"] == kind);
    let text = |item: &'r Value, key: &str| item[key].as_str().unwrap_or_default();
    items.map(|item| (text(item, "name"), (text(item, "outcome"), text(item, "why")))).collect()
}

/// Names of all that ended so, of all kinds.
pub(crate) fn ended(report: &Value, outcome: &str) -> BTreeSet<String> {
    let items = report["items"].as_array().unwrap().iter().filter(|item| item["outcome"] == outcome);
    items.map(|item| item["name"].as_str().unwrap().to_owned()).collect()
}

/// An import that could not read everything: its report.
#[track_caller]
pub(crate) fn fails(ply: &Ply, source: &str, args: &[&str], path: &Path) -> Value {
    let args: Vec<_> = ["--json", "import", source].iter().chain(args).map(Into::into).chain([path.into()]).collect();
    serde_json::from_str(&ply.fails(1, &args).stdout).unwrap()
}

/// A tree but for how many names its files have: an import makes more of them.
pub(crate) fn without_links(tree: Tree) -> Tree {
    tree.map(|_, node| node.links = 0)
}

/// Kills an import at many moments: whatever is then listed is whole, and the next import brings the rest.
#[track_caller]
pub(crate) fn kill_everywhere(ply: &Ply, source: &str, path: &Path) {
    if !tools::have(&["strace"]) {
        return;
    }
    let import = args!["import", source, "--containers", path];
    let command = ply.command(import);
    let counts = kill::count(&command, &ply.scratch().join("strace.log"));
    let names = |ply: &Ply| -> BTreeSet<String> {
        let images = ply.json(args!["images"]);
        images.as_array().unwrap().iter().map(|image| format!("{} {}", image["id"], image["names"])).collect()
    };
    let containers = |ply: &Ply| -> BTreeSet<String> {
        let all = ply.json(args!["layer", "rw", "ls"]);
        all.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
    };
    let whole = (names(ply), containers(ply));
    assert!(!whole.0.is_empty() && !whole.1.is_empty(), "there is something to lose");
    let before = without_links(Tree::of(path));
    let mut killed = 0;
    for point in kill::spread(&counts, 2) {
        std::fs::remove_dir_all(ply.root()).unwrap();
        if let Outcome::Killed = kill::kill_at(&command, &point) {
            killed += 1;
        }
        // Opening it removes what was not finished.
        ply.ok(args!["du"]);
        ply.ok(args!["fsck"]);
        for image in ply.json(args!["images"]).as_array().unwrap() {
            drop(ply.mount(image["id"].as_str().unwrap()));
        }
        let report = ply.json(import);
        assert_eq!(ended(&report, "failed"), BTreeSet::new(), "{point}: {report:#}");
        assert_eq!((names(ply), containers(ply)), whole, "{point}");
    }
    assert!(killed > 5, "too few kills: {counts:?}");
    ply.ok(args!["fsck", "--read-data"]);
    without_links(Tree::of(path)).assert_same(&before, "the source after all kills");
}
