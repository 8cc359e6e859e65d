//! What of a file counts: the header that is hashed before its bytes.
//!
//! The header is BuildKit's, so that equal trees have the digests that BuildKit gives them (its `cache/contenthash`, which
//! took the form from docker's tarsum): the fields of a tar header as text, without separators, the name left empty and
//! the time of modification left out, then names and values of the extended attributes.
//!
//! ```text
//! "name" "mode" <dec> "uid" <dec> "gid" <dec> "size" <dec> "typeflag" <tar's> "linkname" <target> "uname" "gname"
//! "devmajor" <dec> "devminor" <dec> <attribute name> <attribute value> … <the file's bytes>
//! ```
//!
//! Without attributes that can be read in one way only, because the size tells where the bytes begin. With them it
//! can't: `user.a` = `b` looks like `user.ab` with nothing. So any attribute other than a lone `security.capability`, which
//! is what images have, puts a list of all of them with their lengths in front, and the digest is not BuildKit's.
//! It isn't for devices either: BuildKit means to count their numbers and, by a slip, does not.

use std::fs::File;
use std::io::{self, Read as _};

use plies_archive::tree::Kind;
use plies_oci::Sha256Hasher;

use super::walk::Xattrs;

/// How much of a file is best read at a time, in bytes: large enough for the hash to be what takes the time.
pub const READ_BYTES: usize = 128 << 10;

const CAPABILITY: &[u8] = b"security.capability";

/// Begins a header with extended attributes that could be read in two ways. No other header begins so.
const WITH_XATTRS: &[u8] = b"xattrs\0";

/// Everything about a file that counts, but its bytes.
#[derive(Debug)]
pub struct Header<'a> {
    /// Its type; a device's numbers count.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky, `0o0` to `0o7777`. A symbolic link's count as 0777, whatever the
    /// file system says.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length in bytes of a regular file; ignored for all others.
    pub size_bytes: u64,
    /// What a symbolic link says; empty for all others.
    pub link: &'a [u8],
    /// The extended attributes that count, sorted by name.
    pub xattrs: &'a Xattrs,
}

impl Header<'_> {
    /// A hasher that has taken in the header, ready for the file's bytes.
    pub fn begin(&self) -> Sha256Hasher {
        let mut sum = Sha256Hasher::default();
        let plain = self.xattrs.iter().all(|(name, _)| name == CAPABILITY);
        if !plain {
            sum.update(WITH_XATTRS);
            sum.update(&(self.xattrs.len() as u64).to_le_bytes());
            for bytes in self.xattrs.iter().flat_map(|(name, value)| [name, value]) {
                sum.update(&(bytes.len() as u64).to_le_bytes());
                sum.update(bytes);
            }
        }
        let (typeflag, device) = match self.kind {
            // Walks pass sockets over, so that no tree holds one beside files.
            Kind::File | Kind::Socket => ('0', None),
            Kind::Symlink => ('2', None),
            Kind::CharDevice(device) => ('3', Some(device)),
            Kind::BlockDevice(device) => ('4', Some(device)),
            Kind::Directory => ('5', None),
            Kind::Fifo => ('6', None),
        };
        let mode = if self.kind == Kind::Symlink { 0o777 } else { self.mode };
        let size = if self.kind == Kind::File { self.size_bytes } else { 0 };
        let (uid, gid) = (self.uid, self.gid);
        sum.update(format!("namemode{mode}uid{uid}gid{gid}size{size}typeflag{typeflag}linkname").as_bytes());
        sum.update(self.link);
        let (major, minor) = device.map_or((0, 0), |device| (device.major, device.minor));
        sum.update(format!("unamegnamedevmajor{major}devminor{minor}").as_bytes());
        if plain {
            for bytes in self.xattrs.iter().flat_map(|(name, value)| [name, value]) {
                sum.update(bytes);
            }
        }
        sum
    }
}

/// Whether an extended attribute counts: not those that a host's security modules and its file systems put on a file,
/// nor overlay's own, which belong to the driver.
pub(super) fn counts(xattr: &[u8]) -> bool {
    let dropped: [&[u8]; 4] = [b"security.", b"system.", b"trusted.overlay.", b"user.overlay."];
    xattr == CAPABILITY || !dropped.iter().any(|prefix| xattr.starts_with(prefix))
}

/// Feeds all of a file to `sum` through `buffer`, of [`READ_BYTES`] or less, and tells how many bytes it were. `go_on` is
/// asked before each read.
///
/// # Errors
/// The kernel's, and what `go_on` says.
pub fn add_content(
    mut file: &File,
    sum: &mut Sha256Hasher,
    buffer: &mut [u8],
    go_on: &dyn Fn() -> io::Result<()>,
) -> io::Result<u64> {
    let mut total_bytes = 0;
    loop {
        go_on()?;
        match file.read(buffer) {
            Ok(0) => return Ok(total_bytes),
            Ok(length) => {
                sum.update(&buffer[..length]);
                total_bytes += length as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use plies_archive::tar::Device;

    use super::*;

    fn digest(header: &Header<'_>) -> [u8; 32] {
        header.begin().finish()
    }

    #[test]
    fn every_field_counts_and_no_two_headers_run_together() {
        let xattrs = |list: &[(&str, &str)]| -> Xattrs {
            list.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())).collect()
        };
        let none = xattrs(&[]);
        let file = |mode, uid, gid, size_bytes| Header {
            kind: Kind::File,
            mode,
            uid,
            gid,
            size_bytes,
            link: b"",
            xattrs: &none,
        };
        let of = |kind| Header { kind, ..file(0o644, 0, 0, 0) };
        let device = |major, minor| Device { major, minor };
        let mut seen = vec![
            digest(&file(0o644, 0, 0, 0)),
            digest(&file(0o645, 0, 0, 0)),
            digest(&file(0o4644, 0, 0, 0)),
            digest(&file(0o644, 1, 0, 0)),
            digest(&file(0o644, 0, 1, 0)),
            digest(&file(0o644, 0, 0, 1)),
            digest(&file(0o644, 1, 11, 0)),
            digest(&file(0o644, 11, 1, 0)),
            digest(&of(Kind::Directory)),
            digest(&of(Kind::Fifo)),
            digest(&of(Kind::CharDevice(device(1, 11)))),
            digest(&of(Kind::CharDevice(device(11, 1)))),
            digest(&of(Kind::CharDevice(device(1, 1)))),
            digest(&of(Kind::BlockDevice(device(1, 11)))),
            digest(&Header { link: b"a", ..of(Kind::Symlink) }),
            digest(&Header { link: b"b", ..of(Kind::Symlink) }),
            // A link's text that tries to pass for the fields behind it.
            digest(&Header { link: b"aunamegnamedevmajor0devminor0", ..of(Kind::Symlink) }),
        ];
        for list in [
            &[("user.a", "b")][..],
            &[("user.ab", "")],
            &[("user.a", "buser.cd")],
            &[("user.a", "b"), ("user.c", "d")],
            &[("security.capability", "x")],
            &[("security.capability", "xuser.a")],
            &[("security.capability", "x"), ("user.a", "")],
        ] {
            seen.push(digest(&Header { xattrs: &xattrs(list), ..file(0o644, 0, 0, 0) }));
        }
        let count = seen.len();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), count);
        assert_eq!(
            digest(&Header { mode: 0o777, link: b"a", ..of(Kind::Symlink) }),
            digest(&Header { mode: 0, link: b"a", ..of(Kind::Symlink) }),
            "a link has no mode of its own"
        );
    }

    #[test]
    fn m01_m02_attributes_of_the_host_and_the_driver_do_not_count() {
        for name in ["security.selinux", "security.ima", "system.posix_acl_access", "trusted.overlay.origin"] {
            assert!(!counts(name.as_bytes()), "{name}");
        }
        for name in ["security.capability", "user.note", "trusted.note", "user.overlayed"] {
            assert!(counts(name.as_bytes()), "{name}");
        }
    }
}
