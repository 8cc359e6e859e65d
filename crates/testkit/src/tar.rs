//! Writes tar archives byte by byte: ustar headers, PAX records where ustar has no room, and
//! whatever nonsense a hostile test asks for.
//!
//! Nothing is sorted, merged or repaired: the archive holds the members as they were added.

/// The time given to members that ask for none: whole seconds, long past, so that "set from the
/// archive" and "set by the clock" cannot be mixed up.
pub const DEFAULT_MTIME: i64 = 1_500_000_000;

const BLOCK: usize = 512;

/// One member of an archive, to be filled in by chained calls.
#[derive(Debug, Clone)]
pub struct Member {
    path: Vec<u8>,
    kind: u8,
    mode: u32,
    owner: (u64, u64),
    mtime: (i64, u32),
    link: Vec<u8>,
    device: (u32, u32),
    data: Vec<u8>,
    pax: Vec<(Vec<u8>, Vec<u8>)>,
    size_field: Option<u64>,
    encoding: Encoding,
}

/// Where a member's name and link target are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Encoding {
    /// Into the header, and into PAX records where it has no room.
    #[default]
    Ustar,
    /// The name's directories into ustar's prefix field, where they fit.
    Prefix,
    /// Into GNU's long name and long link headers; the header itself has other ones.
    Gnu,
    /// Into PAX records; the header itself has other ones.
    Pax,
}

impl Encoding {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ustar, Self::Prefix, Self::Gnu, Self::Pax];
}

/// What a header says where an extension says something else: who believes it is found out.
const DECOY: &[u8] = b"decoy";

impl Member {
    fn new(path: impl AsRef<[u8]>, kind: u8, mode: u32) -> Self {
        Self {
            path: path.as_ref().to_vec(),
            kind,
            mode,
            owner: (0, 0),
            mtime: (DEFAULT_MTIME, 0),
            link: Vec::new(),
            device: (0, 0),
            data: Vec::new(),
            pax: Vec::new(),
            size_field: None,
            encoding: Encoding::default(),
        }
    }

    /// A regular file, 0644.
    pub fn file(path: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Self {
        Self { data: data.as_ref().to_vec(), ..Self::new(path, b'0', 0o644) }
    }

    /// A directory, 0755; a slash is put at the end of its name, as everyone writes it.
    pub fn dir(path: impl AsRef<[u8]>) -> Self {
        let mut member = Self::new(path, b'5', 0o755);
        if !member.path.ends_with(b"/") {
            member.path.push(b'/');
        }
        member
    }

    /// A symbolic link.
    pub fn symlink(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self { link: target.as_ref().to_vec(), ..Self::new(path, b'2', 0o777) }
    }

    /// Another name of `target`.
    pub fn hard_link(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self { link: target.as_ref().to_vec(), ..Self::new(path, b'1', 0o644) }
    }

    /// A character device.
    pub fn char_device(path: impl AsRef<[u8]>, major: u32, minor: u32) -> Self {
        Self { device: (major, minor), ..Self::new(path, b'3', 0o600) }
    }

    /// A block device.
    pub fn block_device(path: impl AsRef<[u8]>, major: u32, minor: u32) -> Self {
        Self { device: (major, minor), ..Self::new(path, b'4', 0o600) }
    }

    /// A named pipe.
    pub fn fifo(path: impl AsRef<[u8]>) -> Self {
        Self::new(path, b'6', 0o600)
    }

    /// Hides `path` of the layers below: `dir/name` becomes the empty file `dir/.wh.name`.
    pub fn whiteout(path: impl AsRef<[u8]>) -> Self {
        let path = path.as_ref();
        let name = path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
        Self::new([&path[..name], b".wh.", &path[name..]].concat(), b'0', 0o600)
    }

    /// Hides everything that the layers below have in the directory `path`.
    pub fn opaque(path: impl AsRef<[u8]>) -> Self {
        Self::new([path.as_ref(), b"/.wh..wh..opq"].concat(), b'0', 0o600)
    }

    /// Permission bits with setuid, setgid and sticky.
    #[must_use]
    pub fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    /// Owner and group.
    #[must_use]
    pub fn owner(self, uid: u64, gid: u64) -> Self {
        Self { owner: (uid, gid), ..self }
    }

    /// Seconds since 1970 and nanoseconds.
    #[must_use]
    pub fn mtime(self, seconds: i64, nanos: u32) -> Self {
        Self { mtime: (seconds, nanos), ..self }
    }

    /// An extended attribute.
    #[must_use]
    pub fn xattr(self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.pax(format!("SCHILY.xattr.{name}"), value)
    }

    /// Any PAX record, written as given.
    #[must_use]
    pub fn pax(mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Self {
        self.pax.push((key.as_ref().to_vec(), value.as_ref().to_vec()));
        self
    }

    /// Any type flag, also one that does not exist.
    #[must_use]
    pub fn type_flag(self, kind: u8) -> Self {
        Self { kind, ..self }
    }

    /// A size in the header that may differ from the data that follows.
    #[must_use]
    pub fn size_field(self, size_bytes: u64) -> Self {
        Self { size_field: Some(size_bytes), ..self }
    }

    /// Name and link target in this encoding.
    #[must_use]
    pub fn encoding(self, encoding: Encoding) -> Self {
        Self { encoding, ..self }
    }

    /// The member as archive bytes: extension headers if needed, header, data, padding.
    pub fn bytes(&self) -> Vec<u8> {
        let plain = |member: Self| member.encoding(Encoding::Ustar).bytes();
        let decoy = |bytes: &[u8]| if bytes.is_empty() { Vec::new() } else { DECOY.to_vec() };
        match self.encoding {
            Encoding::Ustar => {}
            Encoding::Prefix => return self.with_prefix(),
            Encoding::Pax => {
                let named = |member: Self| match self.link.is_empty() {
                    true => member.pax("path", &self.path),
                    false => member.pax("path", &self.path).pax("linkpath", &self.link),
                };
                return plain(named(Self { path: DECOY.to_vec(), link: decoy(&self.link), ..self.clone() }));
            }
            Encoding::Gnu => {
                let long = |kind, name: &[u8]| match name {
                    [] => Vec::new(),
                    name => plain(Self { kind, ..Self::file("././@LongLink", [name, b"\0"].concat()) }),
                };
                let rest = Self { path: DECOY.to_vec(), link: decoy(&self.link), ..self.clone() };
                return [long(b'L', &self.path), long(b'K', &self.link), plain(rest)].concat();
            }
        }
        let mut records = self.pax.clone();
        let mut ask = |key: &str, value: Vec<u8>| {
            if !records.iter().any(|(have, _)| have == key.as_bytes()) {
                records.push((key.as_bytes().to_vec(), value));
            }
        };
        if self.path.len() > 100 {
            ask("path", self.path.clone());
        }
        if self.link.len() > 100 {
            ask("linkpath", self.link.clone());
        }
        for (key, id) in [("uid", self.owner.0), ("gid", self.owner.1)] {
            if id > 0o7_777_777 {
                ask(key, id.to_string().into_bytes());
            }
        }
        let (seconds, nanos) = self.mtime;
        if nanos != 0 {
            ask("mtime", format!("{seconds}.{nanos:09}").into_bytes());
        } else if seconds < 0 {
            ask("mtime", seconds.to_string().into_bytes());
        }
        let mut bytes = Vec::new();
        if !records.is_empty() {
            let body: Vec<u8> = records.iter().flat_map(|(key, value)| pax_record(key, value)).collect();
            bytes.extend(Self { kind: b'x', pax: Vec::new(), ..Self::file("PaxHeaders/0", body) }.bytes());
        }
        bytes.extend(self.header());
        bytes.extend(&self.data);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        bytes
    }

    /// The member with its directories in the prefix field; in the ordinary way where there are none or they are too
    /// long for it.
    fn with_prefix(&self) -> Vec<u8> {
        let inner = self.path.strip_suffix(b"/").unwrap_or(&self.path);
        let slash = inner.iter().rposition(|byte| *byte == b'/').filter(|slash| (1..=155).contains(slash));
        let plain = self.clone().encoding(Encoding::Ustar);
        let Some(slash) = slash.filter(|slash| self.path.len() - slash <= 101) else { return plain.bytes() };
        let mut bytes = Self { path: self.path[slash + 1..].to_vec(), ..plain }.bytes();
        // The header is the last block before the data, behind extensions for what else has no room.
        let header = bytes.len() - self.data.len().next_multiple_of(BLOCK) - BLOCK;
        bytes[header + 345..header + 345 + slash].copy_from_slice(&self.path[..slash]);
        fix_checksum(&mut bytes[header..header + BLOCK]);
        bytes
    }

    fn header(&self) -> [u8; BLOCK] {
        let mut header = [0; BLOCK];
        let mut put = |at: usize, bytes: &[u8], room: usize| {
            let length = bytes.len().min(room);
            header[at..at + length].copy_from_slice(&bytes[..length]);
        };
        let octal = |value: u64, digits: usize| format!("{value:0digits$o}").into_bytes();
        put(0, &self.path, 100);
        put(100, &octal(u64::from(self.mode), 7), 7);
        put(108, &octal(self.owner.0.min(0o7_777_777), 7), 7);
        put(116, &octal(self.owner.1.min(0o7_777_777), 7), 7);
        put(124, &octal(self.size_field.unwrap_or(self.data.len() as u64), 11), 11);
        put(136, &octal(u64::try_from(self.mtime.0).unwrap_or(0), 11), 11);
        put(156, &[self.kind], 1);
        put(157, &self.link, 100);
        put(257, b"ustar\x0000", 8);
        put(329, &octal(u64::from(self.device.0), 7), 7);
        put(337, &octal(u64::from(self.device.1), 7), 7);
        fix_checksum(&mut header);
        header
    }
}

/// Makes the checksum of a header block right.
pub fn fix_checksum(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// `length key=value\n`, where the length counts its own digits.
fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    [format!("{length} ").as_bytes(), key, b"=", value, b"\n"].concat()
}

/// An archive of these members, ended by two zero blocks.
pub fn archive<'a>(members: impl IntoIterator<Item = &'a Member>) -> Vec<u8> {
    let mut bytes: Vec<u8> = members.into_iter().flat_map(Member::bytes).collect();
    bytes.resize(bytes.len() + 2 * BLOCK, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{scratch::Scratch, tree::Tree};
    use std::{fs, process::Command};

    #[test]
    fn pax_record_length_counts_its_own_digits() {
        assert_eq!(pax_record(b"path", b"x"), b"9 path=x\n");
        assert_eq!(pax_record(b"path", b"xy"), b"11 path=xy\n");
        assert_eq!(pax_record(b"a", b"bcd"), b"8 a=bcd\n");
        let long = pax_record(b"path", &[b'x'; 90]);
        assert!(long.starts_with(format!("{} path=", long.len()).as_bytes()));
    }

    #[test]
    fn names_are_the_same_in_every_encoding() {
        let scratch = Scratch::new();
        for encoding in Encoding::ALL {
            let members = [
                Member::dir("d/e").encoding(encoding),
                Member::file("d/e/f", "1").mtime(1, 5).encoding(encoding),
                Member::symlink("d/e/s", "f").encoding(encoding),
                Member::hard_link("d/g", "d/e/f").encoding(encoding),
            ];
            let file = scratch.path().join("a.tar");
            fs::write(&file, archive(&members)).unwrap();
            let listing = crate::tools::run(Command::new("tar").arg("-tvf").arg(&file));
            let names: Vec<_> = listing.lines().collect();
            assert!(listing.contains("d/g link to d/e/f") && listing.contains("d/e/s -> f"), "{encoding:?}: {names:?}");
            assert!(!listing.contains("decoy"), "{encoding:?}: {names:?}");
        }
    }

    #[test]
    fn gnu_tar_reads_back_what_was_asked_for() {
        let scratch = Scratch::new();
        let long = format!("{}/name", "long".repeat(40));
        let members = [
            Member::dir("d").mode(0o1777).mtime(1_400_000_000, 0),
            Member::file("d/f", "content").mode(0o4755).owner(1000, 3_000_000).mtime(1_400_000_001, 123_456_789),
            Member::hard_link("d/g", "d/f").mode(0o4755).owner(1000, 3_000_000).mtime(1_400_000_001, 123_456_789),
            Member::symlink("d/s", "../f"),
            Member::fifo("p"),
            Member::file(&long, "x").xattr("user.note", "hello"),
        ];
        let file = scratch.path().join("a.tar");
        fs::write(&file, archive(&members)).unwrap();
        let into = scratch.dir("out");
        let status = Command::new("tar")
            .args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf"])
            .arg(&file)
            .arg("-C")
            .arg(&into)
            .status()
            .unwrap();
        assert!(status.success());
        let tree = Tree::of(&into);
        let f = tree.get("d/f");
        assert_eq!((f.mode, f.mtime, f.size_bytes), (0o4755, (1_400_000_001, 123_456_789), 7));
        if rustix::process::geteuid().is_root() {
            assert_eq!((f.uid, f.gid), (1000, 3_000_000));
        }
        assert_eq!(f.names, ["d/f", "d/g"]);
        assert_eq!(tree.get("d").mode, 0o1777);
        assert_eq!(tree.get("d/s").target.as_deref(), Some("../f"));
        assert_eq!(tree.get(&long).xattrs["user.note"], b"hello");
    }
}
