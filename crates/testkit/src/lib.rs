//! For tests only: builders of archives and images, tree comparison, tools of the field as oracles.
//!
//! | module | role |
//! |---|---|
//! | [`bolt`] | writes database files of Go's bbolt library |
//! | [`buildkit`] | BuildKit workers' state directories, made by hand |
//! | [`containerd`] | a containerd with state of its own |
//! | [`docker`] | Docker's state: a daemon with a data root of its own, and data roots made by hand |
//! | [`tar`] | writes layer tars byte by byte, sound ones and hostile ones |
//! | [`hostile`] | archives that try what no archive may, with what must become of them |
//! | [`image`] | puts layers into OCI layouts and docker archives, reads blobs back out of them |
//! | [`tree`] | lists a directory with everything a layer can carry, and says how two differ |
//! | [`scratch`] | a directory on a real disk that unmounts and removes what a test left in it |
//! | [`ply`] | runs the binary on a store of its own |
//! | [`catalogue`] | changes rows of a store behind its back |
//! | [`kill`] | kills a process at its n-th mutating system call |
//! | [`power`] | cuts the power of a disk at any write, and gives what is left of it |
//! | [`registry`] | registries on loopback: Debian's, and one in memory that does wrong on demand |
//! | [`tools`] | the other programs, with their state kept inside a scratch directory |
//!
//! Nothing here knows the product's crates: an oracle that shares code with what it judges shares its
//! mistakes too. Helpers panic with the whole story, since a test that cannot go on has failed.

pub mod bolt;
pub mod buildkit;
pub mod catalogue;
pub mod containerd;
mod daemon;
pub mod docker;
pub mod hostile;
pub mod image;
pub mod kill;
pub mod ply;
pub mod power;
pub mod registry;
pub mod scratch;
pub mod tar;
pub mod tools;
pub mod tree;

/// SHA-256 of some bytes, as the 64 hexadecimal digits that name a blob.
pub fn sha256_hex(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    hex(&sha2::Sha256::digest(bytes))
}

/// Whether something comes true within ten seconds. For what another process does in its own time and
/// nobody reports; never to wait for a time to pass.
pub fn eventually(mut holds: impl FnMut() -> bool) -> bool {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        if holds() {
            return true;
        }
        if std::time::Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// The seed of a test that tries other inputs each time: printed, so that `PLIES_SEED` can bring them back.
pub fn seed() -> u64 {
    let given = std::env::var("PLIES_SEED").ok().and_then(|text| text.parse().ok());
    let random = || u64::from_str_radix(&random_hex()[..15], 16).expect("because these are hexadecimal digits");
    // Some generators stay at 0.
    let seed = given.unwrap_or_else(random).max(1);
    println!("PLIES_SEED={seed} tries the same again");
    seed
}

/// How often a test that tries random inputs does so: twenty times as often in the long version, `PLIES_CHAOS=1`.
pub fn rounds(usual: usize) -> usize {
    if std::env::var_os("PLIES_CHAOS").is_some() { usual * 20 } else { usual }
}

/// 32 random bytes as 64 hexadecimal digits: content that is nowhere else.
pub fn random_hex() -> String {
    let mut bytes = [0; 32];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    assert_eq!(filled, Ok(bytes.len()), "the kernel gives up to 256 bytes at once");
    hex(&bytes)
}

/// Base64 with padding (RFC 4648, 4).
pub fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for part in bytes.chunks(3) {
        let number = (0..3).fold(0, |number, place| number << 8 | usize::from(*part.get(place).unwrap_or(&0)));
        for place in 0..4 {
            let digit = DIGITS[number >> (18 - 6 * place) & 63];
            text.push(if place <= part.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("because writing to a String cannot fail");
        text
    })
}
