//! Recordings give back the same bytes, and Go reads them as Docker does.
#![allow(clippy::unwrap_used)] // the exemption for tests does not see their helpers

mod common;

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::Command;

use common::{Block, Raw, go_oracle, have, run, seeds};
use plies_archive::tar::{EntryKind, EntryPath, Reader};
use plies_archive::tarsplit::{AssembleError, Headers, Output, Recorded, Recorder, Unfaithful, assemble};
use plies_archive::{Limits, compress::DecodeError};
use plies_oci::ErrorKind;

type Files = HashMap<EntryPath, Vec<u8>>;

/// Reads an archive with a recorder, keeping what an extracted tree would hold.
fn record(bytes: &[u8]) -> (Recorded, Files) {
    let mut reader = Reader::new(bytes, &Limits::default()).with_recorder(Recorder::in_memory());
    let mut files = Files::new();
    while let Some(entry) = reader.next_entry().unwrap_or_else(|error| panic!("{error}")) {
        let mut data = Vec::new();
        reader.entry_data().read_to_end(&mut data).unwrap();
        // A sparse file's stored bytes are not what the tree holds.
        match entry.kind {
            EntryKind::File { sparse: None, .. } => files.insert(entry.path, data),
            _ => files.remove(&entry.path),
        };
    }
    let finished = reader.finish().unwrap();
    assert_eq!(finished.size_bytes, bytes.len() as u64);
    (finished.recorded.unwrap(), files)
}

fn in_memory(recorded: &Recorded) -> &[u8] {
    match &recorded.output {
        Output::Memory(bytes) => bytes,
        Output::File(file) => panic!("{file:?}"),
    }
}

fn replay(recording: &[u8], files: &Files) -> Result<Vec<u8>, AssembleError> {
    let mut out = Vec::new();
    let open = |name: &[u8], size: u64| {
        let file = files.get(&EntryPath::clean(name).unwrap()).ok_or(io::ErrorKind::NotFound)?;
        assert_eq!(file.len() as u64, size);
        Ok(file.as_slice())
    };
    let size = assemble(recording, open, &mut out)?;
    assert_eq!(size, out.len() as u64);
    Ok(out)
}

fn lines(recording: &[u8]) -> Vec<serde_json::Value> {
    let mut text = String::new();
    flate2::read::GzDecoder::new(recording).read_to_string(&mut text).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// All that must come back, byte by byte.
fn archives() -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = seeds().into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect();
    let plain = Raw::new().file("a", "1").file("b", vec![7; 3000]);
    for (name, trailing) in [
        ("odd zeros behind the end", vec![0; 777]),
        ("garbage behind the end", b"garbage".to_vec()),
        ("another archive behind the end", plain.clone().end()),
        ("megabytes behind the end", vec![0xab; (5 << 20) + 3]),
    ] {
        all.push((name.to_owned(), [plain.clone().end(), trailing].concat()));
    }
    all.push(("nothing but the end".to_owned(), Raw::new().end()));
    all.push((
        "odd padding".to_owned(),
        Raw::new().block(Block::file("f", 3)).bytes("abc").bytes([0xee; 509]).file("g", "x").end(),
    ));
    all.push((
        "odd names".to_owned(),
        Raw::new()
            .file(b"\xff\xfe", "not utf-8")
            .file("<&>\u{2028}\"\\\n\t\x01\u{7f}", "escapes")
            .file("\u{fffd}", "a replacement character")
            .file("./dots//f", "x")
            .file("/absolute", "y")
            .end(),
    ));
    all.push((
        "repeated names without content".to_owned(),
        Raw::new()
            .block(Block::new("d/", b'5', 0))
            .block(Block::new("./d", b'5', 0))
            .file("d/f", "x")
            .block(Block::new("d", b'5', 0))
            .file("e", "")
            .file("e", "now with content")
            .end(),
    ));
    all
}

fn tool_archives() -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir_all(tree.join("sub/dir")).unwrap();
    let odd = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"\xff odd\n");
    std::fs::write(tree.join(odd), "odd").unwrap();
    std::fs::write(tree.join("sub/dir/file"), vec![b'x'; 70_000]).unwrap();
    std::fs::write(tree.join("sub/empty"), "").unwrap();
    std::fs::hard_link(tree.join("sub/dir/file"), tree.join("sub/hard")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", tree.join("sub/soft")).unwrap();
    let sparse = std::fs::File::create(tree.join("sparse")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, &[1; 5000], 1 << 20).unwrap();
    sparse.set_len(2 << 20).unwrap();
    if have("tar") {
        for format in ["v7", "oldgnu", "gnu", "ustar", "pax"] {
            for extra in [&[][..], &["--sparse"], &["--blocking-factor=1"]] {
                if matches!(format, "v7" | "ustar") && extra == ["--sparse"] {
                    continue;
                }
                let mut tar = Command::new("tar");
                tar.arg("--create").arg(format!("--format={format}")).args(extra).arg("-C").arg(&tree).arg(".");
                all.push((format!("tar --format={format} {extra:?}"), run(&mut tar)));
            }
        }
        std::fs::create_dir_all(tree.join("n".repeat(180))).unwrap();
        std::fs::write(tree.join("n".repeat(180)).join("m".repeat(180)), "long").unwrap();
        for format in ["gnu", "pax"] {
            let mut tar = Command::new("tar");
            tar.arg("--create").arg(format!("--format={format}")).arg("-C").arg(&tree).arg(".");
            all.push((format!("tar --format={format} with long names"), run(&mut tar)));
        }
    }
    if have("python3") {
        const SCRIPT: &str = "
import sys, tarfile
with tarfile.open('out', 'w', format=int(sys.argv[1])) as tar:
    tar.add('tree', arcname='.')
";
        for format in ["1", "2"] {
            run(Command::new("python3").args(["-c", SCRIPT, format]).current_dir(dir.path()));
            let bytes = std::fs::read(dir.path().join("out")).unwrap();
            all.push((format!("python format {format}"), bytes));
        }
    }
    all
}

#[test]
fn t18_archives_come_back_byte_by_byte() {
    for (name, bytes) in archives().into_iter().chain(tool_archives()) {
        let (recorded, files) = record(&bytes);
        assert_eq!(recorded.unfaithful, None, "{name}");
        let back = replay(in_memory(&recorded), &files).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(back == bytes, "{name}");
        let lines = lines(in_memory(&recorded));
        assert_eq!(lines.len() as u64, recorded.records_count, "{name}");
        for (position, line) in lines.iter().enumerate() {
            assert_eq!(line["position"], position, "{name}");
        }
    }
}

#[test]
fn go_reads_recordings_as_docker_does() {
    let dir = tempfile::tempdir().unwrap();
    let Some(oracle) = go_oracle(dir.path()) else { return };
    for (name, bytes) in archives().into_iter().chain(tool_archives()) {
        // The oracle wants a file record for every entry, also for the repeated ones.
        if name.starts_with("repeated") {
            continue;
        }
        let (recorded, _) = record(&bytes);
        std::fs::write(dir.path().join("archive"), &bytes).unwrap();
        std::fs::write(dir.path().join("recording"), in_memory(&recorded)).unwrap();
        eprintln!("{name}");
        run(Command::new(&oracle).args(["split", "archive", "recording"]).current_dir(dir.path()));
    }
}

#[test]
fn records_are_those_that_docker_writes() {
    let bytes = Raw::new().block(Block::new("d/", b'5', 0)).file("d/f", "hello").file(b"\xff", "").end();
    let (recorded, _) = record(&bytes);
    let mut text = String::new();
    flate2::read::GzDecoder::new(in_memory(&recorded)).read_to_string(&mut text).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].starts_with(r#"{"type":2,"payload":"ZC8A"#) && lines[0].ends_with(r#"=","position":0}"#));
    assert_eq!(lines[1], r#"{"type":1,"name":"d/","payload":null,"position":1}"#);
    assert!(lines[2].starts_with(r#"{"type":2,"payload":"ZC9mA"#));
    let crc = crc("hello");
    assert_eq!(lines[3], format!(r#"{{"type":1,"name":"d/f","size":5,"payload":"{crc}","position":3}}"#));
    assert_eq!(lines[5], r#"{"type":1,"name_raw":"/w==","payload":null,"position":5}"#);
    assert_eq!(lines.len(), 7);
}

/// CRC-64 as Go's hash/crc64 has it with the ISO table, bit by bit.
fn crc(text: &str) -> String {
    use base64::Engine as _;
    let mut crc = !0_u64;
    for byte in text.bytes() {
        crc ^= u64::from(byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0xd800_0000_0000_0000 } else { 0 };
        }
    }
    base64::engine::general_purpose::STANDARD.encode((!crc).to_be_bytes())
}

#[test]
fn replaced_content_is_unfaithful() {
    let raw = Raw::new;
    let link = |name| Block::new(name, b'2', 0).link("x");
    for (name, replaced, bytes) in [
        ("file over file", "a", raw().file("a", "1").file("a", "2").end()),
        ("same under another spelling", "a", raw().file("a", "1").file("./b/../a", "").end()),
        ("link over file", "a", raw().file("a", "1").block(link("a")).end()),
        ("directory over file", "a", raw().file("a", "1").block(Block::new("a", b'5', 0)).end()),
        ("link over the directory above", "d", raw().file("d/e/a", "1").block(link("d")).end()),
        ("file over the directory above", "d/e", raw().file("d/e/a", "1").file("d/e", "2").end()),
    ] {
        let (recorded, _) = record(&bytes);
        let path = EntryPath::clean(replaced.as_bytes()).unwrap();
        assert_eq!(recorded.unfaithful, Some(Unfaithful::Replaced { path }), "{name}");
    }
    let mut reader = Reader::new(&[0; 1024][..], &Limits::default()).with_recorder(Recorder::in_memory());
    reader.mark_unfaithful(Unfaithful::Replaced { path: EntryPath::root() });
    assert!(reader.finish().unwrap().recorded.unwrap().unfaithful.is_some());
}

#[test]
fn changed_files_and_damaged_recordings_are_data_loss() {
    let bytes = Raw::new().file("a", "content").end();
    let (recorded, files) = record(&bytes);
    let recording = in_memory(&recorded);
    let with = |content: &str| {
        let files = Files::from([(EntryPath::clean(b"a").unwrap(), content.as_bytes().to_vec())]);
        let open = |name: &[u8], _| Ok(files[&EntryPath::clean(name).unwrap()].as_slice());
        assemble(recording, open, &mut io::sink()).unwrap_err()
    };
    for content in ["", "conten", "contents", "c0ntent"] {
        let error = with(content);
        assert!(matches!(error, AssembleError::Changed { .. }), "{content}: {error}");
        assert_eq!(error.kind(), ErrorKind::DataLoss);
    }
    assert_eq!(replay(recording, &Files::new()).unwrap_err().kind(), ErrorKind::DataLoss);
    for len in 0..recording.len() {
        let error = replay(&recording[..len], &files).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DataLoss, "cut to {len}: {error}");
    }
    let zipped = |text: &str| {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(text.as_bytes()).unwrap();
        gzip.finish().unwrap()
    };
    for text in [
        "{}",
        "nonsense",
        r#"{"type":3,"payload":null,"position":0}"#,
        r#"{"type":2,"payload":"?","position":0}"#,
        r#"{"type":1,"name":"a","size":7,"payload":null,"position":0}"#,
        r#"{"type":1,"name":"a","size":-7,"payload":"AAAAAAAAAAA=","position":0}"#,
        r#"{"type":1,"name_raw":"?","size":7,"payload":"AAAAAAAAAAA=","position":0}"#,
    ] {
        assert_eq!(replay(&zipped(text), &files).unwrap_err().kind(), ErrorKind::DataLoss, "{text}");
    }
}

#[test]
fn a_recording_may_go_to_a_file_and_its_full_disk_is_an_error() {
    let bytes = Raw::new().file("a", "content").end();
    let read_all = |file: std::fs::File, bytes: &[u8]| {
        let mut reader = Reader::new(bytes, &Limits::default()).with_recorder(Recorder::new(Output::File(file)));
        while reader.next_entry()?.is_some() {}
        reader.finish().map(|_| ())
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tar-split.json.gz");
    read_all(std::fs::File::create(&path).unwrap(), &bytes).unwrap();
    let (_, files) = record(&bytes);
    assert_eq!(replay(&std::fs::read(&path).unwrap(), &files).unwrap(), bytes);

    if !Path::new("/dev/full").exists() {
        eprintln!("SKIPPED: no /dev/full");
        return;
    }
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let error = read_all(full, &bytes).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    let other = io::Error::other("not ours");
    assert_eq!(DecodeError::kind_of(&other), ErrorKind::Unavailable);
}

#[test]
fn an_archive_without_what_its_files_hold_lists_the_same() {
    let mut listed = 0;
    for (name, bytes) in seeds() {
        let (recorded, _) = record(&bytes);
        if recorded.unfaithful.is_some() {
            continue;
        }
        let mut headers = Headers::new(in_memory(&recorded));
        let mut whole = Reader::new(&bytes[..], &Limits::default());
        let mut without = Reader::new(&mut headers, &Limits::default()).without_data();
        loop {
            let entry = whole.next_entry().unwrap();
            assert_eq!(without.next_entry().unwrap(), entry, "{name}");
            if entry.is_none() {
                break;
            }
            listed += 1;
        }
        let left_out = without.left_out().to_vec();
        assert_eq!(left_out, headers.left_out(), "{name}");
        let headers_bytes = io::copy(&mut Headers::new(in_memory(&recorded)), &mut io::sink()).unwrap();
        let content_bytes: u64 = left_out.iter().map(|(_, size_bytes)| size_bytes).sum();
        assert_eq!(headers_bytes + content_bytes, bytes.len() as u64, "{name}");
    }
    assert!(listed > 10, "{listed}");
    let one = Raw::new().file("a", "text").end();
    let mut without = Reader::new(&one[..512], &Limits::default()).without_data();
    assert!(without.next_entry().unwrap().is_some());
    assert!(without.data().is_err(), "what was left out is not nothing");
}

#[test]
fn lengths_that_were_left_out_are_limited() {
    let huge = Raw::new().file("a", "").end();
    let mut block = huge[..512].to_vec();
    // 2^62 bytes, in base 256 (tar(5)); what follows is the same again, so that the sum of both is too large for a number.
    block[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0]);
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let limits = Limits { unpacked_bytes: 1 << 40, file_bytes: u64::MAX, ..Limits::default() };
    let input = block.repeat(8);
    let mut reader = Reader::new(&input[..], &limits).without_data();
    let error = std::iter::repeat_with(|| reader.next_entry()).find_map(Result::err).unwrap();
    assert!(error.to_string().contains("unpacked-bytes"), "{error}");
}
