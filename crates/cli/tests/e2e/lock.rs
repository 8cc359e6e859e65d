//! One process owns a store; a second waits and says for whom, or fails at once when told to.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, Stdio},
};

use plies_testkit::{args, eventually, image::Image, image::Packing, ply::Ply, tar::Member};

use crate::common::{store, tree_of};

fn image() -> Image {
    let noise: Vec<u8> = (0..300_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    Image::new("localhost/held:1").layer(&[Member::file("noise", noise)], Packing::Plain)
}

/// A load that has the store and waits for the rest of its input.
fn holder(ply: &Ply) -> (Child, std::process::ChildStdin, Vec<u8>) {
    let bytes = std::fs::read(image().write_oci_tar(&ply.scratch().join("in.tar"))).unwrap();
    let mut child = ply.command(args!["load"]).stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // More than a pipe holds: when this returns, the load has begun to read.
    stdin.write_all(&bytes[..bytes.len() / 2]).unwrap();
    assert!(eventually(|| !ply.run(args!["--no-wait", "images"]).status.success()), "a load does not hold the store");
    (child, stdin, bytes)
}

#[test]
fn no_wait_fails_at_once_and_names_the_holder() {
    let Some(ply) = store() else { return };
    let (mut child, mut stdin, bytes) = holder(&ply);
    let ran = ply.fails(1, args!["--no-wait", "images"]);
    assert!(ran.stderr.contains(&child.id().to_string()), "the holder is {}:\n{}", child.id(), ran.stderr);
    stdin.write_all(&bytes[bytes.len() / 2..]).unwrap();
    drop(stdin);
    assert!(child.wait().unwrap().success());
    ply.ok(args!["--no-wait", "images"]);
}

#[test]
fn the_second_waits_says_for_whom_and_then_goes_on() {
    let Some(ply) = store() else { return };
    let (mut first, mut stdin, bytes) = holder(&ply);
    let mut second =
        ply.command(args!["--json", "images"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    let mut stderr = BufReader::new(second.stderr.take().unwrap());
    stderr.read_line(&mut said).unwrap();
    assert!(said.contains(&first.id().to_string()), "the holder is {}: {said:?}", first.id());
    assert!(second.try_wait().unwrap().is_none(), "it waits");
    stdin.write_all(&bytes[bytes.len() / 2..]).unwrap();
    drop(stdin);
    assert!(first.wait().unwrap().success());
    let output = second.wait_with_output().unwrap();
    assert!(output.status.success());
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(listed.contains("localhost/held"), "it sees what the first has done: {listed}");
}

#[test]
fn a_killed_holder_holds_no_longer() {
    let Some(ply) = store() else { return };
    let (mut child, _stdin, _) = holder(&ply);
    child.kill().unwrap();
    child.wait().unwrap();
    ply.ok(args!["--no-wait", "images"]);
}

#[test]
fn many_loads_at_once_all_come_to_pass() {
    let Some(ply) = store() else { return };
    let children: Vec<Child> = (0..6)
        .map(|n| {
            let base = image().named(&format!("localhost/n{n}:1"));
            let path = base
                .layer(&[Member::file("own", n.to_string())], Packing::Gzip)
                .write_oci_tar(&ply.scratch().join(format!("{n}.tar")));
            ply.command(args!["load", "-i", path]).stderr(Stdio::null()).spawn().unwrap()
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    for n in 0..6 {
        assert!(tree_of(&ply, &format!("localhost/n{n}:1")).find("own").is_some());
    }
}
