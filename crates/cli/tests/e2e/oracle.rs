//! The tools of the field read what Plies writes, and Plies reads what they write.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use plies_testkit::{
    args,
    image::{Packing, blobs_of, untar},
    tar::Member,
    tools::{self, containers},
    tree::{Node, Tree},
};

use crate::common::{Context, busybox, everything, load, store, tree_of};

/// A file loses its link count where another of its names is hidden: overlay still counts the name
/// below, a flat directory cannot.
fn without_link_counts(_: &str, node: &mut Node) {
    node.links = 0;
}

/// A tree made on disk, with what the tools' own copying keeps.
fn make_tree(root: &Path) {
    fs::create_dir_all(root.join("usr/bin")).unwrap();
    fs::write(root.join("usr/bin/tool"), vec![9; 100_000]).unwrap();
    fs::hard_link(root.join("usr/bin/tool"), root.join("usr/bin/tool-1.0")).unwrap();
    symlink("usr/bin", root.join("bin")).unwrap();
    fs::create_dir(root.join("tmp")).unwrap();
    fs::write(root.join("tmp/file"), "content").unwrap();
    let long = root.join("long-name-".repeat(20));
    fs::create_dir(&long).unwrap();
    fs::write(long.join("x"), "").unwrap();
    let script = "chmod 1777 tmp; chmod 4755 usr/bin/tool; chown -h 7:8 bin; chown 1000:1000 tmp/file; \
                  mkfifo pipe; mknod null c 1 3; setfattr -n user.note -v hello tmp/file; \
                  find . -depth -exec touch -h -d @1500000000 {} +";
    tools::run(Command::new("sh").args(["-ec", script]).current_dir(root));
}

#[test]
fn skopeo_umoci_and_podman_read_what_is_saved_and_umoci_unpacks_the_mounted_tree() {
    if !tools::have(&["skopeo", "umoci", "podman"]) {
        return;
    }
    let Some(ply) = store() else { return };
    let image = everything("localhost/everything:1", Packing::Gzip);
    load(&ply, &image);
    let scratch = ply.scratch();
    let (dir, tar, docker) = (scratch.join("oci"), scratch.join("oci.tar"), scratch.join("docker.tar"));
    ply.ok(args!["save", "--format", "oci-dir", "-o", dir, image.tag()]);
    ply.ok(args!["save", "-o", tar, image.tag()]);
    ply.ok(args!["save", "--format", "docker", "-o", docker, image.tag()]);

    let state = scratch.join("state");
    let tag = tag_in(&dir);
    for from in [
        format!("oci:{}:{tag}", dir.display()),
        format!("oci-archive:{}:{tag}", tar.display()),
        format!("docker-archive:{}", docker.display()),
    ] {
        let to = format!("dir:{}", scratch.join("copied").display());
        tools::run(containers("skopeo", &state).args(["copy", &from, &to]));
    }

    let mounted = tree_of(&ply, image.tag());
    let unpacked = Tree::of(&tools::umoci_unpack(&dir, &tag, &scratch.join("bundle")));
    mounted.assert_same(&unpacked, "mounted by ply, unpacked by umoci");

    for archive in [&tar, &docker] {
        tools::run(containers("podman", &state).args(["load", "-q", "-i"]).arg(archive));
        let path = tools::run(containers("podman", &state).args(["image", "mount", image.tag()]));
        let podman = Tree::of(Path::new(path.trim()));
        tools::run(containers("podman", &state).args(["image", "unmount", "-f", image.tag()]));
        tools::run(containers("podman", &state).args(["rmi", "-f", image.tag()]));
        // A directory that a layer only implies gets 0755, no attributes and the time of unpacking there.
        let known = |name: &str, node: &mut Node| {
            without_link_counts(name, node);
            if node.kind == "dir" {
                node.mtime = (0, 0);
            }
            if ["tmp", "opt", "opt/replaced"].contains(&name) {
                node.mode = 0;
                node.xattrs.clear();
            }
        };
        let what = format!("mounted by ply and by podman from {}", archive.display());
        mounted.clone().map(known).without_root().assert_same(&podman.map(known).without_root(), &what);
    }
}

/// The reference name that `ply save` gave the only image of a layout.
fn tag_in(layout: &Path) -> String {
    let index: serde_json::Value = serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"]
        .as_str()
        .unwrap_or_else(|| panic!("no reference name in {index}"))
        .to_owned()
}

#[test]
fn built_layers_unpack_in_umoci_as_they_are_mounted() {
    if !tools::have(&["umoci"]) {
        return;
    }
    let Some(ply) = store() else { return };
    if !busybox(&ply) {
        return;
    }
    let context = Context::new(
        &ply,
        "FROM busybox\n\
         RUN mkdir -p /data/sub && echo 1 > /data/sub/one && ln /data/sub/one /data/two && ln -s sub/one /data/three\n\
         RUN mkfifo /data/pipe && mknod /data/null c 1 3 && chmod 2750 /data/sub && chown 3:4 /data/two\n\
         RUN mkdir -p /old/sub && touch /old/sub/x && rm -r /root /usr && mkdir /root && echo new > /root/only\n\
         COPY --chown=5:6 --chmod=640 added /data/added\n\
         RUN mv /data/sub /data/moved && rm -r /old/sub && mkdir /old/sub && rm /bin/vi && touch /tmp/x\n",
    );
    context.file("added", "added");
    context.build(&[]);
    let layout = ply.scratch().join("oci");
    ply.ok(args!["save", "--format", "oci-dir", "-o", layout, "built:latest"]);
    let unpacked = Tree::of(&tools::umoci_unpack(&layout, &tag_in(&layout), &ply.scratch().join("bundle")));
    let mounted = tree_of(&ply, "built:latest");
    assert_eq!(mounted.get("root/only").size_bytes, 4);
    assert!(mounted.find("usr").is_none() && mounted.find("old/sub/x").is_none());
    mounted
        .map(without_link_counts)
        .without_root()
        .assert_same(&unpacked.map(without_link_counts).without_root(), "mounted by ply, unpacked by umoci");
}

#[test]
fn images_made_by_umoci_load_with_the_same_tree() {
    if !tools::have(&["umoci", "setfattr"]) {
        return;
    }
    let Some(ply) = store() else { return };
    let scratch = ply.scratch();
    let layout = scratch.join("oci");
    let image = format!("{}:made", layout.display());
    let bundle = scratch.join("bundle");
    tools::run(Command::new("umoci").arg("init").arg("--layout").arg(&layout));
    tools::run(Command::new("umoci").args(["new", "--image", &image]));
    tools::run(Command::new("umoci").args(["unpack", "--image", &image]).arg(&bundle));
    make_tree(&bundle.join("rootfs"));
    tools::run(Command::new("umoci").args(["repack", "--image", &image]).arg(&bundle));
    // A second layer that removes and changes.
    fs::remove_dir_all(&bundle).unwrap();
    tools::run(Command::new("umoci").args(["unpack", "--image", &image]).arg(&bundle));
    fs::remove_file(bundle.join("rootfs/pipe")).unwrap();
    fs::write(bundle.join("rootfs/tmp/file"), "changed").unwrap();
    tools::run(Command::new("umoci").args(["repack", "--refresh-bundle", "--image", &image]).arg(&bundle));
    fs::remove_dir_all(&bundle).unwrap();
    let expected = Tree::of(&tools::umoci_unpack(&layout, "made", &bundle));

    ply.ok(args!["load", "--tag", "localhost/umoci:made", "-i", layout]);
    let mounted = tree_of(&ply, "localhost/umoci:made");
    assert!(mounted.find("pipe").is_none());
    mounted.without_root().assert_same(&expected.without_root(), "mounted by ply, unpacked by umoci");
}

#[test]
fn images_made_by_buildah_load_with_the_same_tree_in_every_form() {
    if !tools::have(&["buildah", "setfattr"]) {
        return;
    }
    let Some(ply) = store() else { return };
    let scratch = ply.scratch();
    let state = scratch.join("state");
    let buildah = |args: &[&str]| tools::run(containers("buildah", &state).args(args)).trim().to_owned();
    let container = buildah(&["from", "scratch"]);
    let root = PathBuf::from(buildah(&["mount", &container]));
    make_tree(&root);
    let expected = Tree::of(&root).without_root();
    buildah(&["config", "--entrypoint", r#"["/usr/bin/tool"]"#, "--env", "A=b c", &container]);
    buildah(&["umount", &container]);
    buildah(&["commit", &container, "localhost/buildah:1"]);

    let (oci, docker) = (scratch.join("oci.tar"), scratch.join("docker.tar"));
    buildah(&["push", "localhost/buildah:1", &format!("oci-archive:{}:localhost/buildah:oci", oci.display())]);
    buildah(&["push", "localhost/buildah:1", &format!("docker-archive:{}:localhost/buildah:docker", docker.display())]);
    for (archive, tag) in [(oci, "localhost/buildah:oci"), (docker, "localhost/buildah:docker")] {
        ply.ok(args!["load", "-i", archive]);
        tree_of(&ply, tag).without_root().assert_same(&expected, &format!("{tag} mounted by ply, made by buildah"));
    }
}

#[test]
fn images_copied_by_skopeo_load_with_the_same_tree_in_every_form() {
    if !tools::have(&["skopeo"]) {
        return;
    }
    let Some(ply) = store() else { return };
    let scratch = ply.scratch();
    let source = everything("localhost/source:1", Packing::Gzip);
    load(&ply, &source);
    let expected = tree_of(&ply, source.tag());
    let from = format!("oci:{}:1", source.write_oci_dir(&scratch.join("source")).display());
    let state = scratch.join("state");
    for (name, to, options) in [
        ("oci", format!("oci:{}:localhost/oci:1", scratch.join("to-oci").display()), &[][..]),
        ("archive", format!("oci-archive:{}:localhost/archive:1", scratch.join("to-archive").display()), &[]),
        ("docker", format!("docker-archive:{}:localhost/docker:1", scratch.join("to-docker").display()), &[]),
        (
            "zstd",
            format!("oci:{}:localhost/zstd:1", scratch.join("to-zstd").display()),
            &["--dest-compress-format", "zstd"],
        ),
    ] {
        tools::run(containers("skopeo", &state).arg("copy").args(options).args([&from, &to]));
        ply.ok(args!["load", "-i", scratch.join(format!("to-{name}"))]);
        tree_of(&ply, &format!("localhost/{name}:1")).assert_same(&expected, name);
    }
}

#[test]
fn blobs_stay_the_same_through_skopeo_and_back() {
    if !tools::have(&["skopeo"]) {
        return;
    }
    let Some(ply) = store() else { return };
    let image = everything("localhost/round:1", Packing::Gzip);
    load(&ply, &image);
    let scratch = ply.scratch();
    let (saved, copied) = (scratch.join("saved.tar"), scratch.join("copied"));
    ply.ok(args!["save", "-o", saved, image.tag()]);
    let tag = tag_in(&untar(&saved, &scratch.join("untar")));
    let (from, to) = (format!("oci-archive:{}:{tag}", saved.display()), format!("oci:{}:x", copied.display()));
    tools::run(containers("skopeo", &scratch.join("state")).args(["copy", &from, &to]));
    assert!(blobs_of(&copied) == image.blobs());
}

#[test]
fn buildah_builds_the_same_tree_from_the_same_dockerfile() {
    if !tools::have(&["buildah"]) {
        return;
    }
    let Some(ply) = store() else { return };
    if !busybox(&ply) {
        return;
    }
    let dockerfile = "ARG WHO=world\n\
         FROM localhost/busybox:latest AS one\n\
         ARG WHO\n\
         ENV GREETING=\"hello ${WHO}\" EMPTY=\n\
         WORKDIR /a/b\n\
         RUN echo \"$GREETING\" > greeting; id -u > who; pwd > where; umask > mask\n\
         FROM localhost/busybox:latest\n\
         WORKDIR /srv\n\
         COPY --from=one /a /from-one\n\
         COPY dir ./dir\n\
         COPY dir/ file.txt /both/\n\
         COPY *.txt globbed/\n\
         COPY --chown=1000:1001 --chmod=0751 file.txt renamed.txt\n\
         COPY link /link-itself\n\
         ADD archive.tar /added/\n\
         USER app\n\
         RUN id > /tmp/id; echo ~ > /tmp/home\n\
         USER 0:extra\n\
         RUN [\"/bin/sh\", \"-c\", \"id -G > /tmp/groups; echo $HOME > /tmp/root-home\"]\n\
         SHELL [\"/bin/sh\", \"-ec\"]\n\
         RUN echo shell > /tmp/shell; mkdir -p /x/y && touch /x/y/z && rm -r /both/sub\n";
    let dockerfile_for_ply = dockerfile.replace("localhost/busybox", "busybox");
    let context = Context::new(&ply, &dockerfile_for_ply);
    context.file("file.txt", "file");
    context.file("other.txt", "other");
    context.file("dir/one", "1");
    context.file("dir/sub/two", "2");
    symlink("file.txt", context.dir.join("link")).unwrap();
    context.file(
        "archive.tar",
        plies_testkit::tar::archive(&[Member::dir("inside"), Member::file("inside/f", "f").owner(9, 9).mode(0o600)]),
    );
    context.build(&[]);
    let ours = tree_of(&ply, "built:latest");

    // Its own directory: the Dockerfile differs in the base's name, and so would COPY of it.
    let state = ply.scratch().join("state");
    let base = ply.scratch().join("base.tar");
    ply.ok(args!["save", "--format", "docker", "-o", base, "busybox:latest"]);
    let from = format!("docker-archive:{}", base.display());
    tools::run(containers("skopeo", &state).args(["copy", &from, "containers-storage:localhost/busybox:latest"]));
    let other = ply.scratch().file("Dockerfile.buildah", dockerfile);
    tools::run(
        containers("buildah", &state)
            .args(["bud", "--isolation", "chroot", "--pull-never", "-t", "localhost/theirs", "-f"])
            .arg(other)
            .arg(&context.dir),
    );
    let container = tools::run(containers("buildah", &state).args(["from", "--pull-never", "localhost/theirs"]));
    let root = tools::run(containers("buildah", &state).args(["mount", container.trim()]));
    let theirs = Tree::of(Path::new(root.trim()));
    tools::run(containers("buildah", &state).args(["umount", container.trim()]));

    let known = |_: &str, node: &mut Node| {
        node.mtime = (0, 0);
        node.links = 0;
    };
    // Mount points of theirs that stay in the image.
    let gone = ["", "proc", "sys", "dev", "run", "etc/hosts", "etc/resolv.conf", "etc/hostname", "var"];
    ours.map(known).without(&gone).assert_same(&theirs.map(known).without(&gone), "built by ply, built by buildah");
}

#[test]
fn podman_sees_the_configuration_of_a_saved_image() {
    if !tools::have(&["podman"]) {
        return;
    }
    let Some(ply) = store() else { return };
    if !busybox(&ply) {
        return;
    }
    let context =
        Context::new(&ply, "FROM busybox\nENV A=1\nWORKDIR /w\nENTRYPOINT [\"/bin/sh\", \"-c\", \"echo $A; pwd\"]\n");
    context.build(&[]);
    let archive = ply.scratch().join("image.tar");
    ply.ok(args!["save", "-o", archive, "built:latest"]);
    let state = ply.scratch().join("state");
    let loaded = tools::run(containers("podman", &state).args(["load", "-q", "-i"]).arg(&archive));
    let name = loaded.trim().rsplit(": ").next().unwrap();
    let inspected = tools::run(containers("podman", &state).args(["image", "inspect", name]));
    let inspected: serde_json::Value = serde_json::from_str(&inspected).unwrap();
    assert_eq!(inspected[0]["Config"]["WorkingDir"], "/w");
    assert!(inspected[0]["Config"]["Env"].as_array().unwrap().contains(&"A=1".into()));
}
