//! Archives made by hand, byte by byte, and other people's tools.
#![allow(dead_code, unreachable_pub)]

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use plies_archive::Limits;
use plies_archive::tar::{Entry, EntryKind, Reader, TarError};

/// A header block under construction.
#[derive(Clone)]
pub struct Block(pub [u8; 512]);

impl Block {
    /// A ustar header.
    pub fn new(name: impl AsRef<[u8]>, type_flag: u8, size: usize) -> Self {
        let mut block = Self([0; 512])
            .put(0, name)
            .put(100, "0000644\0")
            .put(108, "0000000\0")
            .put(116, "0000000\0")
            .put(124, format!("{size:011o}\0"))
            .put(136, "00000000000\0")
            .put(257, "ustar\x0000")
            .put(329, "0000000\0")
            .put(337, "0000000\0");
        block.0[156] = type_flag;
        block
    }

    pub fn file(name: impl AsRef<[u8]>, size: usize) -> Self {
        Self::new(name, b'0', size)
    }

    pub fn gnu(self) -> Self {
        self.put(257, "ustar  \0")
    }

    pub fn v7(self) -> Self {
        self.put(257, [0; 255])
    }

    pub fn link(self, target: impl AsRef<[u8]>) -> Self {
        self.put(157, target)
    }

    /// Puts bytes at an offset.
    pub fn put(mut self, at: usize, bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// The block with its checksum.
    pub fn sum(mut self) -> [u8; 512] {
        self.0[148..156].fill(b' ');
        let sum: u32 = self.0.iter().map(|byte| u32::from(*byte)).sum();
        self.put(148, format!("{sum:06o}\0 ")).0
    }
}

/// An archive under construction.
#[derive(Clone, Default)]
pub struct Raw(pub Vec<u8>);

impl Raw {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn block(mut self, block: Block) -> Self {
        self.0.extend_from_slice(&block.sum());
        self
    }

    pub fn bytes(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.0.extend_from_slice(bytes.as_ref());
        self
    }

    /// Data and its padding.
    pub fn data(mut self, data: impl AsRef<[u8]>) -> Self {
        self.0.extend_from_slice(data.as_ref());
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn file(self, name: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Self {
        self.block(Block::file(name, data.as_ref().len())).data(data)
    }

    /// An extension header.
    pub fn extension(self, type_flag: u8, payload: impl AsRef<[u8]>) -> Self {
        self.block(Block::new("././@Extension", type_flag, payload.as_ref().len())).data(payload)
    }

    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        self.extension(b'x', records.iter().flat_map(|(key, value)| record(key, value)).collect::<Vec<u8>>())
    }

    pub fn end(self) -> Vec<u8> {
        self.bytes([0; 1024]).0
    }
}

/// One PAX record.
pub fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let body = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
    let len = (1..).find(|len: &usize| len.to_string().len() + body.len() == *len).unwrap();
    [len.to_string().as_bytes(), &body].concat()
}

/// Reads a whole archive; files with their holes filled in.
pub fn read(bytes: &[u8], limits: &Limits) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
    read_from(Reader::new(bytes, limits))
}

pub fn read_from(mut reader: Reader<&[u8]>) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        let mut data = Vec::new();
        loop {
            let chunk = reader.data()?;
            if chunk.is_empty() {
                break;
            }
            data.extend_from_slice(chunk);
            let n = chunk.len();
            reader.consume(n);
        }
        entries.push((entry.clone(), expand(&entry, data)));
    }
    reader.finish()?;
    Ok(entries)
}

fn expand(entry: &Entry, stored: Vec<u8>) -> Vec<u8> {
    let EntryKind::File { size_bytes, sparse: Some(runs) } = &entry.kind else { return stored };
    let mut file = vec![0; usize::try_from(*size_bytes).unwrap()];
    let mut stored = stored.as_slice();
    for run in runs {
        let at = usize::try_from(run.offset).unwrap();
        let len = usize::try_from(run.length).unwrap();
        stored.read_exact(&mut file[at..at + len]).unwrap();
    }
    assert!(stored.is_empty());
    file
}

/// The paths of an archive that must be readable.
pub fn paths(bytes: &[u8]) -> Vec<String> {
    let entries = read(bytes, &Limits::default()).unwrap_or_else(|error| panic!("{error}"));
    entries.iter().map(|(entry, _)| String::from_utf8_lossy(entry.path.as_bytes()).into_owned()).collect()
}

/// The error of an archive that must be refused.
pub fn refused(bytes: &[u8]) -> TarError {
    match read(bytes, &Limits::default()) {
        Ok(entries) => panic!("accepted: {entries:?}"),
        Err(error) => error,
    }
}

/// Whether a tool is there; says so when not.
pub fn have(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok_and(|output| output.status.success())
        || Command::new(tool).arg("version").output().is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("SKIPPED: {tool} is not installed");
    }
    found
}

/// Runs a command that must succeed and returns what it printed.
pub fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Builds the Go oracle into `dir`; `None`, said aloud, without Go.
pub fn go_oracle(dir: &Path) -> Option<PathBuf> {
    if !have("go") {
        return None;
    }
    let oracle = dir.join("oracle");
    run(Command::new("go")
        .args(["build", "-o"])
        .arg(&oracle)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/go/main.go"))
        .env("GOFLAGS", "-mod=mod")
        .env("GOPROXY", "off")
        .env("GO111MODULE", "off")
        // Shared by all tests: what the first compiled the others only link.
        .env("GOCACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("gocache")));
    Some(oracle)
}

/// A few archives of each kind that tools write, as seeds.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let sparse_1_0 = |map: &str, size: usize, stored: &[u8]| {
        let mut data = map.as_bytes().to_vec();
        data.resize(data.len().next_multiple_of(512), 0);
        data.extend_from_slice(stored);
        let size = size.to_string();
        Raw::new()
            .pax(&[
                ("GNU.sparse.major", b"1"),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.name", b"sparse"),
                ("GNU.sparse.realsize", size.as_bytes()),
            ])
            .file("GNUSparseFile.0/sparse", data)
            .file("after", "x")
            .end()
    };
    let old_gnu = {
        let header = Block::new("sparse", b'S', 1024)
            .gnu()
            .put(386, "00000000000\0")
            .put(398, "00000001000\0")
            .put(410, "00000010000\0")
            .put(422, "00000001000\0")
            .put(483, "00000020000\0");
        Raw::new().block(header).data([7; 1024]).file("after", "x").end()
    };
    vec![
        (
            "ustar",
            Raw::new()
                .block(Block::new("dir/", b'5', 0))
                .file("dir/file", "content")
                .block(Block::new("dir/hard", b'1', 0).link("dir/file"))
                .block(Block::new("dir/soft", b'2', 0).link("../file"))
                .block(Block::new("dev", b'3', 0).put(329, "0000001\0").put(337, "0000003\0"))
                .block(Block::new("fifo", b'6', 0))
                .end(),
        ),
        ("prefix", Raw::new().block(Block::file("name", 1).put(345, "some/prefix")).data("x").end()),
        ("v7", Raw::new().block(Block::new("dir/", 0, 0).v7()).block(Block::new("f", 0, 2).v7()).data("ab").end()),
        (
            "gnu",
            Raw::new()
                .extension(b'L', [&[b'n'; 150][..], b"\0"].concat())
                .extension(b'K', [&[b'l'; 150][..], b"\0"].concat())
                .block(Block::new("short", b'2', 0).gnu().link("short"))
                .block(
                    Block::file("big", 0)
                        .gnu()
                        .put(108, b"\x80\0\0\0\0\x20\0\0")
                        .put(136, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\0"),
                )
                .end(),
        ),
        (
            "pax",
            Raw::new()
                .extension(b'g', record("comment", b"global"))
                .pax(&[
                    ("path", b"pax/path"),
                    ("mtime", b"1234567890.123456789"),
                    ("uid", b"3000000"),
                    ("SCHILY.xattr.user.a", b"\n\0="),
                    ("size", b"5"),
                ])
                .block(Block::file("short", 0))
                .data("hello")
                .file("after", "x")
                .end(),
        ),
        ("sparse 1.0", sparse_1_0("2\n0\n512\n4096\n512\n", 8192, &[5; 1024])),
        (
            "sparse 0.1",
            Raw::new()
                .pax(&[
                    ("GNU.sparse.major", b"0"),
                    ("GNU.sparse.minor", b"1"),
                    ("GNU.sparse.name", b"sparse"),
                    ("GNU.sparse.size", b"100"),
                    ("GNU.sparse.numblocks", b"2"),
                    ("GNU.sparse.map", b"0,3,50,2"),
                ])
                .file("GNUSparseFile.0/sparse", "abcde")
                .file("after", "x")
                .end(),
        ),
        (
            "sparse 0.0",
            Raw::new()
                .pax(&[
                    ("GNU.sparse.size", b"100"),
                    ("GNU.sparse.numblocks", b"2"),
                    ("GNU.sparse.offset", b"0"),
                    ("GNU.sparse.numbytes", b"3"),
                    ("GNU.sparse.offset", b"50"),
                    ("GNU.sparse.numbytes", b"2"),
                ])
                .file("sparse", "abcde")
                .file("after", "x")
                .end(),
        ),
        ("sparse old gnu", old_gnu),
    ]
}
