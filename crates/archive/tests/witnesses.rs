//! GNU tar and Python's tarfile read the archives that we accept: where they see something else, it is known why.
#![allow(clippy::unwrap_used)] // the exemption for tests does not see their helpers

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use common::{have, read, run, seeds};
use plies_archive::tar::{Entry, EntryKind, EntryPath};
use plies_archive::{Limits, compress};
use plies_testkit::hostile::corpus;
use serde::Deserialize;

/// Where a witness reads an archive of this beginning of an id otherwise than we and Go do, and why. Each is needed: one
/// that no archive asks for any more is an error.
const KNOWN: &[(&str, &str, &str)] = &[
    ("gnu", "T03/symlink", "it skips the size of what has no data"),
    ("gnu", "T03/char", "it skips the size of what has no data"),
    ("gnu", "T03/block", "it skips the size of what has no data"),
    ("gnu", "T03/fifo", "it skips the size of what has no data"),
    (
        "gnu",
        "T09/path",
        "a path in a global header is the name of all that follow (POSIX, pax); Go takes none from there",
    ),
    ("python", "T09/path", "as for GNU tar"),
];

/// What a witness sees: the type flags and the names of the entries, or that it cannot read the archive.
type Seen = Result<Vec<(char, EntryPath)>, String>;

/// An archive, with what we see in it.
struct Accepted {
    id: String,
    bytes: Vec<u8>,
    seen: Vec<(char, EntryPath)>,
}

/// All archives that we accept.
fn accepted() -> Vec<Accepted> {
    let ours = |entry: &Entry| {
        let flag = match entry.kind {
            EntryKind::File { .. } => '0',
            EntryKind::HardLink { .. } => '1',
            EntryKind::Symlink { .. } => '2',
            EntryKind::CharDevice(_) => '3',
            EntryKind::BlockDevice(_) => '4',
            EntryKind::Directory => '5',
            EntryKind::Fifo => '6',
        };
        (flag, entry.path.clone())
    };
    let corpus = corpus(Path::new("/somewhere/victim")).into_iter().map(|case| (case.id, case.bytes));
    let seeds = seeds().into_iter().map(|(name, bytes)| (format!("seed/{name}"), bytes));
    let tars = corpus.chain(seeds).filter(|(_, bytes)| compress::detect(bytes) == plies_oci::Compression::None);
    tars.filter_map(|(id, bytes)| {
        let entries = read(&bytes, &Limits::default()).ok()?;
        let seen = entries.iter().map(|(entry, _)| ours(entry)).collect();
        Some(Accepted { id, bytes, seen })
    })
    .collect()
}

/// Fails unless all differences are known, and all that are known are there.
fn judge(witness: &str, archives: &[Accepted], seen: Vec<Seen>) {
    assert!(archives.len() > 500 && seen.len() == archives.len());
    let (mut used, mut unknown) = (BTreeSet::new(), Vec::new());
    for (Accepted { id, seen: ours, .. }, theirs) in archives.iter().zip(seen) {
        let difference = match theirs {
            Ok(theirs) if theirs == *ours => continue,
            Ok(theirs) => {
                let first = ours.iter().zip(&theirs).position(|(one, other)| one != other);
                let at = first.unwrap_or(ours.len().min(theirs.len()));
                format!("entry {at} is {:?}, not {:?}", theirs.get(at), ours.get(at))
            }
            Err(error) => error,
        };
        match KNOWN.iter().find(|(who, begins, _)| *who == witness && id.starts_with(begins)) {
            Some((_, begins, _)) => drop(used.insert(*begins)),
            None => unknown.push(format!("{id}: {difference}")),
        }
    }
    assert!(unknown.is_empty(), "{witness} sees otherwise:\n{}", unknown.join("\n"));
    let needless: Vec<_> = KNOWN.iter().filter(|(who, begins, _)| *who == witness && !used.contains(begins)).collect();
    assert!(needless.is_empty(), "{witness} sees the same after all: {needless:?}");
}

#[derive(Deserialize)]
struct PythonListing {
    error: Option<String>,
    entries: Vec<(String, String, u64, String)>,
}

#[test]
fn what_python_makes_of_the_corpus_is_known() {
    if !have("python3") {
        return;
    }
    let archives = accepted();
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new("python3");
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/list.py")).current_dir(dir.path());
    for (number, Accepted { bytes, .. }) in archives.iter().enumerate() {
        std::fs::write(dir.path().join(number.to_string()), bytes).unwrap();
        command.arg(number.to_string());
    }
    let unhex = |text: &str| -> Vec<u8> {
        text.as_bytes().chunks(2).map(|two| u8::from_str_radix(str::from_utf8(two).unwrap(), 16).unwrap()).collect()
    };
    let output = run(&mut command);
    let seen = output.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(|line| {
        let listing: PythonListing = serde_json::from_slice(line).unwrap();
        if let Some(error) = listing.error {
            return Err(error);
        }
        let entries = listing.entries.iter().map(|(name, flag, ..)| {
            let flag =
                flag.chars().next().map_or('?', |flag| if matches!(flag, '\0' | '7' | 'S') { '0' } else { flag });
            let name = unhex(name);
            EntryPath::clean(&name).map(|path| (flag, path)).map_err(|error| error.to_string())
        });
        entries.collect()
    });
    judge("python", &archives, seen.collect());
}

#[test]
fn what_gnu_tar_makes_of_the_corpus_is_known() {
    if !have("tar") {
        return;
    }
    let archives = accepted();
    let file = tempfile::NamedTempFile::new().unwrap();
    let seen = archives.iter().map(|Accepted { bytes, .. }| {
        std::fs::write(file.path(), bytes).unwrap();
        let mut command = Command::new("tar");
        command.env("LC_ALL", "C").args(["--quoting-style=escape", "--numeric-owner", "-tvf"]).arg(file.path());
        let output = command.output().unwrap();
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(gnu_entry).collect()
    });
    judge("gnu", &archives, seen.collect());
}

/// `drwxr-xr-x 0/0    0 2017-07-14 02:40 name`, and what it links to.
fn gnu_entry(line: &[u8]) -> Result<(char, EntryPath), String> {
    let text = String::from_utf8_lossy(line);
    let mut rest = &*text;
    for _ in 0..5 {
        rest = rest.trim_start();
        rest = &rest[rest.find(' ').ok_or_else(|| format!("no entry: {text}"))?..];
    }
    let (flag, separator) = match text.as_bytes()[0] {
        b'-' | b'C' => ('0', None),
        b'h' => ('1', Some(" link to ")),
        b'l' => ('2', Some(" -> ")),
        b'c' => ('3', None),
        b'b' => ('4', None),
        b'd' => ('5', None),
        b'p' => ('6', None),
        _ => return Err(format!("no entry: {text}")),
    };
    let name = separator.and_then(|separator| rest.split_once(separator)).map_or(rest, |(name, _)| name);
    let path = EntryPath::clean(&unescaped(&name.as_bytes()[1..]));
    path.map(|path| (flag, path)).map_err(|error| error.to_string())
}

/// What GNU tar wrote in its escape style.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let (mut bytes, mut rest) = (Vec::new(), text.iter().copied());
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'\\' => match rest.next() {
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                Some(b't') => b'\t',
                Some(digit @ b'0'..=b'7') => {
                    let digits = [digit, rest.next().unwrap_or(b'0'), rest.next().unwrap_or(b'0')];
                    digits.iter().fold(0_u8, |value, digit| value.wrapping_mul(8).wrapping_add(digit - b'0'))
                }
                Some(other) => other,
                None => b'\\',
            },
            byte => byte,
        });
    }
    bytes
}
