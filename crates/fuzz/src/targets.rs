//! The targets. Each is a call of one function of a library, and what must hold of its answer.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};

use plies_archive::compress::{self, Decoder};
use plies_archive::tar::Reader;
use plies_archive::tarsplit::{Recorder, assemble};
use plies_archive::{Limits, tarsplit};
use plies_cache::{BlobRow, Filters, RecordRow, UseRow};
use plies_engine::dockerfile::{self, Ignore, words::Lexer};
use plies_oci::{BlobDigest, Compression, DiffId, DocumentLimits, ImageConfig, Index, Manifest, Reference};
use plies_store::Row;
use plies_testkit::hostile::corpus;
use plies_testkit::image::{Image, Packing};
use plies_testkit::tar::{Member, archive, fix_checksum};

use crate::{Target, catalogue};

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "tar", run: tar, seeds: tars, repair: fix_headers, sample: 3_000 },
    Target { name: "pax", run: pax, seeds: pax_records, repair: nothing, sample: 3_000 },
    Target { name: "sparse", run: sparse, seeds: sparse_maps, repair: nothing, sample: 3_000 },
    Target { name: "compression", run: compression, seeds: packed, repair: nothing, sample: 3_000 },
    Target { name: "tar-split", run: tar_split, seeds: recordings, repair: nothing, sample: 3_000 },
    Target { name: "manifest", run: manifest, seeds: documents, repair: nothing, sample: 3_000 },
    Target { name: "index", run: index, seeds: documents, repair: nothing, sample: 3_000 },
    Target { name: "config", run: config, seeds: documents, repair: nothing, sample: 3_000 },
    Target { name: "reference", run: reference, seeds: references, repair: nothing, sample: 3_000 },
    Target { name: "digest", run: digest, seeds: references, repair: nothing, sample: 3_000 },
    Target { name: "dockerfile", run: dockerfile, seeds: dockerfiles, repair: nothing, sample: 3_000 },
    Target { name: "words", run: words, seeds: dockerfiles, repair: nothing, sample: 3_000 },
    Target { name: "ignore", run: ignore, seeds: patterns, repair: nothing, sample: 3_000 },
    Target { name: "filters", run: filters, seeds: filter_texts, repair: nothing, sample: 3_000 },
    Target { name: "bolt", run: bolt, seeds: databases, repair: nothing, sample: 3_000 },
    Target { name: "rows", run: rows, seeds: row_bytes, repair: nothing, sample: 3_000 },
    // A store is opened, checked and repaired for each.
    Target { name: "catalogue", run: catalogue::run, seeds: catalogue::seeds, repair: nothing, sample: 600 },
];

/// Enough for every seed, and soon reached.
fn limits() -> Limits {
    Limits { unpacked_bytes: 16 << 20, file_bytes: 16 << 20, entries: 100_000, ..Limits::default() }
}

fn nothing(_: &mut [u8]) {}

fn fix_headers(bytes: &mut [u8]) {
    bytes.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar").for_each(fix_checksum);
}

/// What is read to its end is recorded, and comes back byte by byte.
fn tar(data: &[u8]) {
    let mut contents: Vec<Vec<u8>> = Vec::new();
    let mut reader = Reader::new(data, &limits()).with_recorder(Recorder::in_memory());
    loop {
        match reader.next_entry() {
            Ok(Some(_)) => {}
            Ok(None) => break,
            Err(_) => return,
        }
        let mut content = Vec::new();
        if reader.entry_data().read_to_end(&mut content).is_err() {
            return;
        }
        contents.extend((!content.is_empty()).then_some(content));
    }
    let Ok(finished) = reader.finish() else { return };
    assert_eq!(finished.size_bytes, data.len() as u64, "bytes were not counted");
    let recorded = finished.recorded.expect("because it was asked for");
    let tarsplit::Output::Memory(recording) = recorded.output else { panic!("asked for memory") };
    // What a tree would not give back, for an order or holes that it does not have, is said.
    if recorded.unfaithful.is_some() {
        return;
    }
    let mut next = contents.into_iter();
    let mut back = Vec::new();
    let open = |_: &[u8], size: u64| {
        let content = next.next().ok_or(io::ErrorKind::NotFound)?;
        // Of a sparse file, what is stored: its holes are not tried here.
        if content.len() as u64 == size { Ok(io::Cursor::new(content)) } else { Err(io::ErrorKind::InvalidData.into()) }
    };
    if assemble(recording.as_slice(), open, &mut back).is_ok() {
        assert!(back == data, "another archive came back");
    }
}

/// The bytes as the records of one entry.
fn pax(data: &[u8]) {
    let members = [Member::file("x", data).type_flag(b'x'), Member::file("f", ""), Member::file("after", "")];
    tar(&archive(&members));
}

/// The bytes as a map and what follows it.
fn sparse(data: &[u8]) {
    let member = |name| Member::file(name, data).pax("GNU.sparse.major", "1").pax("GNU.sparse.minor", "0");
    tar(&archive([&member("f").pax("GNU.sparse.realsize", "1000000").pax("GNU.sparse.name", "s")]));
    let old = Member::file("f", data).pax("GNU.sparse.size", "1000000").pax("GNU.sparse.map", data);
    tar(&archive([&old.pax("GNU.sparse.numblocks", "2")]));
}

fn compression(data: &[u8]) {
    for compression in [Compression::Gzip, Compression::Zstd, compress::detect(data)] {
        let Ok(decoder) = Decoder::new(data, compression, &limits()) else { continue };
        // One more than it may give, if it does not stop by itself.
        let mut decoder = decoder.take((16 << 20) + 1);
        let read = io::copy(&mut decoder, &mut io::sink());
        assert!(read.is_err() || read.is_ok_and(|bytes| bytes <= 16 << 20), "more came out than the limit allows");
    }
}

fn tar_split(data: &[u8]) {
    let open = |_: &[u8], size: u64| Ok(io::repeat(b'x').take(size.min(1 << 20)));
    let plain = assemble(data, open, &mut io::sink());
    // It is compressed; a recording that mutations reach is not.
    let packed = assemble(Packing::Gzip.pack(data).as_slice(), open, &mut io::sink());
    drop((plain, packed));
}

/// What parses within limits parses without, to the same.
fn manifest(data: &[u8]) {
    if let Ok(within) = Manifest::parse_within(data, &DocumentLimits::DEFAULT) {
        assert_eq!(Manifest::parse(data).ok(), Some(within.clone()));
        assert_eq!(within.document().raw(), data);
        assert!(Index::parse(data).is_err() || within.layers().is_empty(), "it is two things at once");
    }
}

fn index(data: &[u8]) {
    if let Ok(within) = Index::parse_within(data, &DocumentLimits::DEFAULT) {
        assert_eq!(Index::parse(data).ok(), Some(within));
    }
}

fn config(data: &[u8]) {
    if let Ok(within) = ImageConfig::parse_within(data, &DocumentLimits::DEFAULT) {
        assert_eq!(within.document().digest(), BlobDigest::of(data));
        assert_eq!(ImageConfig::parse(data).ok(), Some(within));
    }
}

/// What is printed is read again, to the same.
fn reference(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(reference) = text.parse::<Reference>() {
        assert_eq!(reference.to_string().parse::<Reference>().ok(), Some(reference.clone()), "{reference}");
        assert_eq!(reference.familiar().parse::<Reference>().ok(), Some(reference.clone()), "{}", reference.familiar());
    }
}

fn digest(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(digest) = text.parse::<BlobDigest>() {
        assert_eq!(digest.to_string(), text, "a digest has one spelling");
        assert_eq!(digest.hex().len(), 64);
    }
    assert_eq!(text.parse::<DiffId>().is_ok(), text.parse::<BlobDigest>().is_ok());
}

fn dockerfile(data: &[u8]) {
    drop(dockerfile::parse("Dockerfile", data));
}

fn words(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let variables = BTreeMap::from([("A".to_owned(), "a b".to_owned()), ("B".to_owned(), "${A}".to_owned())]);
    for lexer in [Lexer::new('\\'), Lexer::new('`'), Lexer::for_heredoc()] {
        drop((lexer.expand(&text, &variables), lexer.split(&text, &variables)));
    }
}

fn ignore(data: &[u8]) {
    if let Ok(ignore) = Ignore::parse(".dockerignore", data) {
        for path in [&b"a"[..], b"a/b/c", b"deep/er/and/deeper/file.tar.gz", b"\xff", b"aaaaaaaaaaaaaaaaaaaaaaaaaaaa"] {
            ignore.hides(path);
        }
    }
}

fn filters(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let numbers = (plies_cache::parse_bytes(&text), plies_cache::parse_duration(&text));
    drop((numbers, Filters::parse("prune", &text.lines().collect::<Vec<_>>())));
}

fn bolt(data: &[u8]) {
    fn walk(bucket: &plies_bolt::Bucket<'_>, depth: usize) -> Result<(), plies_bolt::BoltError> {
        bucket.each(|_, item| {
            match item.bucket() {
                Some(inner) if depth < 64 => walk(&inner, depth + 1)?,
                _ => {}
            }
            Ok::<_, plies_bolt::BoltError>(())
        })
    }
    let mut file = tempfile::NamedTempFile::new().expect("because there is a directory for such files");
    file.write_all(data).expect("because there is room for it");
    if let Ok(database) = plies_bolt::Bolt::open(file.path()) {
        let read = walk(&database.root(), 0);
        drop((read, database.root().get(b"a").map(drop)));
    }
}

fn rows(data: &[u8]) {
    fn row<V: Row>(data: &[u8]) {
        let Some((version, body)) = data.split_first() else { return };
        if *version < V::VERSION {
            drop(V::upgrade(*version, body));
        } else if let Ok((row, [])) = postcard::take_from_bytes::<V>(body) {
            // What is read is written as something that is read.
            let again = postcard::to_stdvec(&row).expect("because rows are plain data");
            postcard::take_from_bytes::<V>(&again).expect("because it was just written");
        }
    }
    row::<RecordRow>(data);
    row::<UseRow>(data);
    if let Ok(blob) = postcard::from_bytes::<BlobRow>(data) {
        postcard::to_stdvec(&blob).expect("because rows are plain data");
    }
}

fn tars() -> Vec<Vec<u8>> {
    let small = corpus(std::path::Path::new("/somewhere/victim")).into_iter().map(|case| case.bytes);
    small.filter(|bytes| (1024..20_000).contains(&bytes.len())).collect()
}

fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

fn pax_records() -> Vec<Vec<u8>> {
    texts(&[
        "9 path=x\n",
        "16 linkpath=x/y\n12 size=100\n",
        "30 mtime=1234567890.123456789\n",
        "25 SCHILY.xattr.user.a=b\n33 LIBARCHIVE.xattr.user.b=MTIz\n",
        "22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n",
        "26 GNU.sparse.map=0,1,5,2\n29 GNU.sparse.numblocks=2\n24 GNU.sparse.size=100\n",
        "11 uid=100\n11 gid=200\n14 uname=root\n",
    ])
}

fn sparse_maps() -> Vec<Vec<u8>> {
    let block = |map: &str, stored: usize| {
        let mut bytes = map.as_bytes().to_vec();
        bytes.resize(512 + stored, 0);
        bytes
    };
    vec![block("1\n0\n512\n", 512), block("2\n0\n512\n4096\n512\n", 1024), block("0\n", 0), b"0,512,1024,512".to_vec()]
}

fn packed() -> Vec<Vec<u8>> {
    let text = "some text that repeats, some text that repeats\n".repeat(40);
    let pack = |packing: Packing| packing.pack(text.as_bytes());
    let [_, gzip, zstd] = Packing::ALL.map(pack);
    let twice = |bytes: &[u8]| [bytes, bytes].concat();
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4][..], &zstd].concat();
    vec![twice(&gzip), twice(&zstd), gzip, zstd, skippable]
}

fn recordings() -> Vec<Vec<u8>> {
    texts(&[
        "{\"type\":2,\"payload\":\"YWJj\",\"position\":0}\n",
        "{\"type\":1,\"name\":\"f\",\"size\":3,\"payload\":\"AAAAAAAAAAA=\",\"position\":0}\n{\"type\":2,\"payload\":\"\",\"position\":1}\n",
        "{\"type\":1,\"name_raw\":\"/w==\",\"size\":9223372036854775807,\"payload\":null,\"position\":0}\n",
    ])
}

fn documents() -> Vec<Vec<u8>> {
    let image = Image::new("localhost/a:1").layer(&[Member::file("f", "")], Packing::Gzip);
    let mut documents: Vec<_> = image.blobs().into_values().filter(|bytes| bytes.first() == Some(&b'{')).collect();
    documents.extend(image.oci_files().into_iter().filter(|(name, _)| name.ends_with(".json")).map(|(_, bytes)| bytes));
    documents
        .extend(image.docker_files().into_iter().filter(|(name, _)| name.ends_with(".json")).map(|(_, bytes)| bytes));
    documents
}

fn references() -> Vec<Vec<u8>> {
    let hex = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    let mut all = texts(&[
        "debian",
        "library/debian:12",
        "localhost/a:1",
        "[::1]:5000/a/b_c-d.e:Tag_1",
        "registry.example:5000/team/app:v1",
        "docker.io/library/busybox:latest",
    ]);
    all.extend(
        [format!("sha256:{hex}"), format!("a@sha256:{hex}"), format!("r.example/a:1@sha256:{hex}")].map(Into::into),
    );
    all
}

fn dockerfiles() -> Vec<Vec<u8>> {
    texts(&[
        "# syntax=docker/dockerfile:1\n# escape=`\nARG V=1\nFROM --platform=$BUILDPLATFORM a:${V:-2} AS b\nRUN echo `\n  x\n",
        "FROM scratch\nCOPY --from=a --chown=1:2 --link a* [\"b c\", \"/d\"]\nADD --checksum=sha256:00 https://x.org/a /b\n",
        "FROM a\nRUN <<A <<-'B' cat\nx $Y\nA\n\ty\n\tB\nCOPY <<\"E\" /f\n${Z}\nE\n",
        "FROM a\nRUN --mount=type=cache,id=x,target=/y,sharing=locked --network=none [\"a\", \"b\"]\nONBUILD COPY . .\n",
        "FROM a\nHEALTHCHECK --interval=5s --retries=3 CMD [\"x\"]\nENV A=b 'C'=\"d e\" F\\ G=h\nEXPOSE 80/tcp 9000-9010\nSTOPSIGNAL 9\n",
        "${A:-b}${A#a*}${A%%b}${A/x/y}'a'\"b $C\"\\$D`$E",
    ])
}

fn patterns() -> Vec<Vec<u8>> {
    texts(&[
        "*.log\n!keep.log\n**/x\n/top\ndeep/*/x\n",
        "# comment\n\\!a\n[a-z]?*\n[^x]\n",
        "**/a**/**\n*/*/*\n!**/..\n",
    ])
}

fn filter_texts() -> Vec<Vec<u8>> {
    texts(&[
        "id~=^abc.*$",
        "type==exec.cachemount,inuse",
        "description!=x,until=24h",
        "size>=10MB",
        "parents~=[a-f]{3}",
        "1.5GiB",
        "1h30m",
        "7d",
    ])
}

fn databases() -> Vec<Vec<u8>> {
    use plies_testkit::bolt::{Node, Tree, file};
    let value = |number: u32| (format!("key {number}").into_bytes(), Node::Value(b"value".to_vec()));
    let inner: Tree = (0..20).map(value).collect();
    let outer = Tree::from([(b"a".to_vec(), Node::Bucket(inner)), (b"b".to_vec(), Node::Bucket(Tree::new()))]);
    vec![file(&outer, 4096, 4), file(&outer, 1024, 2)]
}

fn row_bytes() -> Vec<Vec<u8>> {
    (0..4_u8).flat_map(|version| (0..8).map(move |fill| [&[version][..], &[fill; 60]].concat())).collect()
}
