//! For tests only: builders of archives and images, tree comparison, tools of the field as oracles.
//!
//! | module | role |
//! |---|---|
//! | [`bolt`] | writes database files of Go's bbolt library |
//! | [`docker`] | Docker's state: a daemon with a data root of its own, and data roots made by hand |
//! | [`tar`] | writes layer tars byte by byte, sound ones and hostile ones |
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
pub mod catalogue;
pub mod docker;
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

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("because writing to a String cannot fail");
        text
    })
}
