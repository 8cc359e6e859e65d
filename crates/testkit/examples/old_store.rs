//! Keeps a store of today for the tests of tomorrow: fills one with the binary that is given, and writes it down
//! together with what that binary said of it.
//!
//! ```text
//! cargo run -p plies-testkit --example old_store -- path/to/ply crates/cli/tests/stores/schema-2
//! ```
//! makes `schema-2.tar.zst` and `schema-2.json`. To be run as root, with the last version of every schema.

use std::{collections::BTreeMap, path::PathBuf, process::Command};

use plies_testkit::{
    args,
    image::{Image, Packing},
    ply::Ply,
    tar::Member,
    tree::Tree,
};
use serde_json::{Value, json};

const DOCKERFILE: &str = "FROM localhost/base:1\nCOPY one /copied/one\nFROM scratch\nCOPY --from=0 /copied /copied\n\
                          COPY two /two\nENV A=b\nLABEL made=long-ago\n";

fn main() {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(binary), Some(out), None) = (arguments.next(), arguments.next(), arguments.next()) else {
        panic!("usage: old_store PLY OUT");
    };
    let ply = Ply::new(PathBuf::from(binary));
    let lower = [
        Member::dir("d").mode(0o750).owner(3, 4),
        Member::file("d/gone", "gone"),
        Member::file("d/kept", "kept").xattr("user.note", "x"),
        Member::dir("o"),
        Member::file("o/hidden", "hidden"),
        Member::symlink("link", "d/kept"),
        Member::hard_link("hard", "d/kept"),
    ];
    let upper =
        [Member::whiteout("d/gone"), Member::dir("o"), Member::opaque("o"), Member::file("o/new", "new").mode(0o4755)];
    let base = Image::new("localhost/base:1").layer(&lower, Packing::Gzip).layer(&upper, Packing::Zstd);
    ply.ok(args!["load", "-i", base.write_oci_tar(&ply.scratch().join("base.tar"))]);
    ply.ok(args!["tag", "localhost/base:1", "localhost/base:again"]);
    let context = ply.scratch().dir("context");
    for (name, content) in [("Dockerfile", DOCKERFILE), ("one", "1"), ("two", "2")] {
        ply.scratch().file(format!("context/{name}"), content);
    }
    ply.ok(args!["build", "-t", "localhost/built:1", context]);
    let record = ply.ok(args!["ref", "new"]).stdout.trim().to_owned();
    let at = ply.scratch().dir("at");
    ply.ok(args!["mount", "--rw", record, at]);
    ply.scratch().file("at/written", "in a cache");
    ply.ok(args!["umount", at]);
    let mut told = json!({ "record": record });
    // Versions that keep layers by chain, too.
    if ply.run(args!["layer", "ls"]).status.success() {
        let tar = ply.scratch().file("layer.tar", plies_testkit::tar::archive(&lower));
        let chain = ply.ok(args!["layer", "register", tar]).stdout.trim().to_owned();
        ply.ok(args!["layer", "rw", "create", "--parent", chain, "box"]);
        ply.ok(args!["layer", "rw", "mount", "box", at]);
        ply.scratch().file("at/written", "in a box");
        ply.ok(args!["layer", "rw", "umount", "box"]);
        told["chain"] = json!(chain);
    }
    let names = ["localhost/base:1", "localhost/base:again", "localhost/built:1"];
    let images: BTreeMap<&str, Value> = names.into_iter().map(|name| (name, of_image(&ply, name))).collect();
    told["images"] = json!(images);

    let out = PathBuf::from(out);
    let pack = Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*", "--sort=name", "--zstd", "-c", "-C"])
        .arg(ply.scratch().path())
        .arg("-f")
        .arg(out.with_extension("tar.zst"))
        .arg("root")
        .status();
    assert!(pack.is_ok_and(|status| status.success()), "tar failed");
    let text = serde_json::to_string_pretty(&told).expect("because it is plain data") + "\n";
    std::fs::write(out.with_extension("json"), text).expect("write what was told");
}

/// What must be the same for ever: the ID and each file.
fn of_image(ply: &Ply, name: &str) -> Value {
    let id = ply.json(args!["inspect", name])["id"].clone();
    let tree = Tree::of(ply.mount(name).path()).without_root();
    let files: BTreeMap<&str, String> = tree.names().map(|file| (file, format!("{:?}", tree.get(file)))).collect();
    json!({ "id": id, "files": files })
}
