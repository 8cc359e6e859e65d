//! Archives that other tools made, byte for byte there and back; see fixtures/README.md.
#![allow(clippy::unwrap_used)] // the exemption for tests does not see their helpers

use std::fs::File;
use std::io::{Read, Seek as _};
use std::os::fd::AsFd as _;
use std::path::Path;

use plies_archive::tarsplit::{Output, Recorder, assemble, open_in};
use plies_archive::{Limits, Root, receive};
use plies_oci::{BlobDigest, Compression, DiffId};

/// The name, the digest of the archive, and the digest of what is recorded of it (the JSON lines).
const FIXTURES: &[(&str, &str, &str)] = &[
    (
        "bsdtar-gnu",
        "ca8fbceaaead75f068e1c5f3a08016154339e06675dacd7637d04d844d009607",
        "d2824c6611c21ef89f4c17076b677844028e833e1667ba150b49ae9170dddc04",
    ),
    (
        "bsdtar-pax",
        "06f38f37b78d3ee40c0d4db63e47031438463be35a0069450bbdd3f0ee25f3e0",
        "ce55b9e6939f1157d1dd3b5c1d1be60eea06bda41b838bec39ab7787c3c654f7",
    ),
    (
        "bsdtar-ustar",
        "c70b8d466b597e244e88caf948f47e5aa7b97114aac298cff49756c6e27b40fe",
        "767da40970816f4e09cc2c8955b1359aec580c256b10b2be33e4fdfadea21a3d",
    ),
    (
        "busybox",
        "740f1cb7abcfd7a7c399d2c10f7e9411b6dd14109364f4d5a5dddbdbdb15c0c7",
        "221bc0c91a8bb4b3ea822385935c8fd5601551f350bf2637e83c69d4a2bf286c",
    ),
    (
        "concatenated",
        "29bcab0ad319858f06501b00cf2bfa0b4fbef168d0c960498926550fed23f93d",
        "81eff4391ec260d8f447a39c7c1818d7c978a767c8bfd1c657a0fd9ffb7ce1e8",
    ),
    (
        "gnu-tar-gnu",
        "458527b75e41e501693790a9bba0f2033208b74d63aa00c931cf560884fed4e1",
        "b62a0d0af7ccbf78d805b31387a7b7bd93d72632f1a6d81cb25aeaa01ebeca9a",
    ),
    (
        "gnu-tar-oldgnu-sparse",
        "df0060360d33823c84d65d5cb4a7408c98b0d69e27bf34587ba8100e00f0ebae",
        "a11453dad132cc1cca93bfe1a1cd15cdbd6d6c53f938532abe63e4051c3009ce",
    ),
    (
        "gnu-tar-pax-sparse-0.0",
        "63cf7221a659ac39001091660324e2cc762a416b959ae7322e9a7191942180ee",
        "8300c1565ed98e0183f5407e2f5eb0bda64538e030a3465704183724dabbeb15",
    ),
    (
        "gnu-tar-pax-sparse-0.1",
        "ec550fd367d454e912badbe476536ed0604a80870ecfd1caa2cd4e2c3841cccb",
        "cc5ae789749a3b407b3d93031edc444b30cc7a96beb98e409bec9c9c3f9a6f07",
    ),
    (
        "gnu-tar-pax-sparse-1.0",
        "b291af42a2d6e2b6f4c868323d46ae0482951cf1c211c57ee07441959de56c7b",
        "9b93ffc151af7f8a49f3234a17996a6a121793ef0e52b801eabe72c60b3eccbc",
    ),
    (
        "gnu-tar-small-blocks",
        "fdff08c25d231ad9fdf4f41d70b551c45418f1703628a46461ff851a89dbd7c8",
        "25f1a0aa397b38086907730e571e5edfe1170eb160987e8faf274c07c8db9176",
    ),
    (
        "gnu-tar-ustar",
        "d063a8fef2de67800c527684aca311271abc7428032f783926c8b7bf61c4a9cb",
        "ed94de690ad43f65930a6317347aae6f55037c86715ff8bc856329a2f5871921",
    ),
    (
        "gnu-tar-v7",
        "39ea77c95960bc9c83a6d72c9431b3a00141dbf17b8ed03d92c8dddbecde180a",
        "ad99030806e8f8bbc605a8eb9a9413c136e04a605960118e7a57821675361a4c",
    ),
    (
        "go-gnu",
        "bee1fac1b935c58d425a69152c641d85523d1d6adc7ee519ae5580223cdf9561",
        "7f5f0468ac9c3510cd699eb457f1ab250b54e88cdee380c7b50b62f01bbc4bf3",
    ),
    (
        "go-pax",
        "37792494821f1f1f96202e8dadfe80accd4e31c0f4ec718f684947d9c58441c7",
        "3a8896c48d59c2297a76d783f72015c06840707cf456558fcb25dba12fb2f599",
    ),
    (
        "go-ustar",
        "5b30709a0799410845bc8e1ac5934b2c2683d5b070ffc5f376345abaa9074dd2",
        "1a09a4c07616e660ddce7450b39a0a31af9f23d9ee62a20f069f3bd408e9f895",
    ),
    (
        "python-gnu",
        "1fb44501de7556274df0fec70e8e2226d25e7698a7eea640de54793b4ba928b5",
        "1e282e6ca864d0f3b27fcfa5d9226288c20cd18967e7e333ec33a33136b3ce13",
    ),
    (
        "python-names-twice",
        "d43ed50aeca8308b2a2198ab3af9caf358462f15d8c714415a909eb3bc38b4f5",
        "c37cc5170d9f52c401c854e643f1fbe89d41e237038a86ebc511f28099824d7e",
    ),
    (
        "python-pax",
        "9e0a13d6791d0c97e581d2d5cbccac0d3d82c7c2747716f45a5871ef6a891e94",
        "c41490c7e7dc1a1ba2875cc2b251a0f22a6032563e97cbeeaf689e07c91fe1fa",
    ),
    (
        "trailing-bytes",
        "2a10804c6538f055c867709b0c6c6aced957d957c56fa28d1c3745ff11b59dd6",
        "f9873042b53b64cae05d600e49b17f979d668b270c306719a2ce8573aa8fac11",
    ),
];

#[test]
fn privileged_t18_fixtures_come_back_byte_by_byte_and_their_recordings_do_not_change() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: needs root, to set owners");
        return;
    }
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let there = std::fs::read_dir(&dir)
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().ends_with(".tar.gz"));
    assert_eq!(there.count(), FIXTURES.len(), "every fixture is in the list");
    let mut wrong = Vec::new();
    for (name, digest, recording) in FIXTURES {
        let mut tar = Vec::new();
        let file = File::open(dir.join(format!("{name}.tar.gz"))).unwrap();
        flate2::read::GzDecoder::new(file).read_to_end(&mut tar).unwrap();
        assert_eq!(BlobDigest::of(&tar).hex(), *digest, "{name}: the fixture itself");

        let place = tempfile::tempdir().unwrap();
        let tree = File::open(place.path()).unwrap();
        let recorder = Recorder::in_memory().with_spool(tempfile::tempfile().unwrap());
        let received = receive(tar.as_slice(), Compression::None, tree.as_fd(), &Limits::default(), recorder);
        let received = received.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(received.diff_id, DiffId::from_hex(digest).unwrap(), "{name}");
        assert!(received.applied.is_some(), "{name}");
        let Output::Memory(recorded) = &received.recorded.output else { panic!("asked for memory") };
        let mut back = Vec::new();
        match received.recorded.archive {
            Some(mut archive) => {
                assert!(name.contains("twice"), "{name} could have been assembled");
                archive.rewind().unwrap();
                archive.read_to_end(&mut back).unwrap();
            }
            None => {
                let root = Root::new(&tree).unwrap();
                assemble(recorded.as_slice(), |name, _| open_in(&root, name), &mut back).unwrap();
            }
        }
        assert!(back == tar, "{name}");
        let mut lines = Vec::new();
        flate2::read::GzDecoder::new(recorded.as_slice()).read_to_end(&mut lines).unwrap();
        let found = BlobDigest::of(&lines).hex();
        if found != *recording {
            wrong.push(format!("{name} {found}"));
        }
    }
    assert!(wrong.is_empty(), "other recordings than before:\n{}", wrong.join("\n"));
}
