//! The image: where everything lies in it, and its bytes.
//!
//! The format is the kernel's (fs/erofs/erofs_fs.h, Documentation/filesystems/erofs.rst); docs/format/erofs.md draws it.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::ops::Range;

use plies_oci::DiffId;

use super::sparse::{CHUNK_BITS_MIN, Chunk};
use super::tree::{Data, Dir, Id, Inode, Kind, ROOT, Tree};
use super::{BLOCK_BYTES, MAGIC, TRAILER_BYTES, VERSION};
use crate::hash::HashingWriter;
use crate::xattr;

/// Where the superblock stands.
pub(super) const SUPERBLOCK_AT: u64 = 1024;
/// The slot of the tar among the devices: right behind the superblock, in units of its own size.
pub(super) const DEVICE_SLOT_AT: u64 = SUPERBLOCK_AT + SUPERBLOCK_BYTES;
const SUPERBLOCK_BYTES: u64 = 128;
const DEVICE_SLOT_BYTES: u64 = 128;
const SUPERBLOCK_MAGIC: u32 = 0xE0F5_E1E2;
/// Where the first inode, the root's, stands: its number must fit 16 bits.
const INODES_AT: u64 = SUPERBLOCK_AT + BLOCK_BYTES;

/// The superblock has a checksum; times are those of last modification.
const FEATURES_COMPATIBLE: u32 = 0x1 | 0x2;
/// Files in chunks, and a table of devices.
const FEATURES_INCOMPATIBLE: u32 = 0x4 | 0x8;

/// An inode stands at a multiple of this, and its number is the multiple.
const INODE_UNIT: u64 = 32;
const INODE_BYTES: u64 = 64;
const DIRENT_BYTES: usize = 12;
const XATTR_HEADER_BYTES: u64 = 12;

/// The longest contents that fit behind an inode in the same block, whatever the block holds before: an inode's end is
/// a multiple of 4 past one of 32, so up to 28 bytes of room are lost.
const INLINE_BYTES_MAX: u64 = BLOCK_BYTES - 28;

/// Of an inode's number of shared attributes there is one byte.
const SHARED_XATTRS_MAX: usize = u8::MAX as usize;

/// How an inode's contents are kept, with the bit that says that it has 64 bytes.
#[derive(Debug, Clone, Copy)]
enum Layout {
    /// In blocks of their own.
    Plain = 1,
    /// Behind the inode.
    Inline = (2 << 1) | 1,
    /// By a table of chunks.
    Chunks = (4 << 1) | 1,
}

/// An entry of a file's table of chunks: no such block.
const NO_BLOCK: u32 = u32::MAX;

/// Numbers of devices, as the tables of chunks name them.
const THIS_DEVICE: u16 = 0;
const TAR_DEVICE: u16 = 1;

/// An attribute as it is written: number of its prefix, the rest of its name, its value.
type Attribute<'a> = (u8, &'a [u8], &'a [u8]);

/// Where an inode lies.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    /// Its number; 0 while it has none.
    number: u64,
    /// Names that lead to it, for a directory its own dot and its subdirectories' too.
    links: u32,
    /// The first block of its contents, counted from the first block of any, if it has some of its own.
    block: u32,
}

/// An image that knows where everything goes.
pub(super) struct Image<'a> {
    tree: &'a Tree,
    /// By inode.
    places: Vec<Place>,
    /// Inodes as they stand in the image.
    order: Vec<Id>,
    /// Attributes that several inodes have, with where they stand in the table.
    shared: BTreeMap<Attribute<'a>, u32>,
    /// Where the table of shared attributes begins, the blocks of contents, the blocks that were copied, the trailer.
    shared_at: u64,
    blocks_at: u64,
    copied_at: u64,
    trailer_at: u64,
}

impl<'a> Image<'a> {
    pub(super) fn new(tree: &'a Tree) -> Self {
        let mut image = Self {
            tree,
            places: vec![Place::default(); tree.inodes.len()],
            order: Vec::new(),
            shared: BTreeMap::new(),
            shared_at: 0,
            blocks_at: 0,
            copied_at: 0,
            trailer_at: 0,
        };
        image.arrange();
        let mut shared_bytes = 0;
        image.shared = image.find_shared();
        for (attribute, at) in &mut image.shared {
            *at = shared_bytes;
            shared_bytes += entry_bytes(attribute) as u32;
        }
        let mut end = INODES_AT;
        let mut blocks = 0;
        for id in &image.order {
            let (at, bytes) = image.fit(*id, end);
            end = at + bytes;
            let place = &mut image.places[*id];
            (place.number, place.block) = (at / INODE_UNIT, blocks);
            blocks += image.own_blocks(*id);
        }
        image.shared_at = end.next_multiple_of(BLOCK_BYTES);
        image.blocks_at = (image.shared_at + u64::from(shared_bytes)).next_multiple_of(BLOCK_BYTES);
        image.copied_at = image.blocks_at + u64::from(blocks) * BLOCK_BYTES;
        image.trailer_at = image.copied_at + tree.copied.len() as u64;
        image
    }

    /// Bytes of the whole image.
    fn size_bytes(&self) -> u64 {
        self.trailer_at + TRAILER_BYTES
    }

    /// Puts inodes in order, a directory's together and before those that lie deeper, and counts links.
    fn arrange(&mut self) {
        let mut pending = vec![ROOT];
        self.order.push(ROOT);
        while let Some(node) = pending.pop() {
            let dir = self.tree.dir(node);
            // Its name above, and its own dot; the root is above itself.
            self.places[node].links = 2 + dir.subdirs.len() as u32;
            for (_, id) in names(dir) {
                let place = &mut self.places[id];
                place.links += 1;
                if place.links == 1 {
                    self.order.push(id);
                }
            }
            pending.extend(dir.subdirs.values().rev());
        }
    }

    fn find_shared(&self) -> BTreeMap<Attribute<'a>, u32> {
        let mut found: BTreeMap<Attribute<'a>, u32> = BTreeMap::new();
        for id in &self.order {
            for attribute in attributes(&self.tree.inodes[*id]) {
                *found.entry(attribute).or_default() += 1;
            }
        }
        found.retain(|_, count| *count > 1);
        found
    }

    /// Attributes of an inode that are in the table, and those that are not.
    fn split_attributes(&self, inode: &'a Inode) -> (Vec<u32>, Vec<Attribute<'a>>) {
        let (mut shared, mut own) = (Vec::new(), Vec::new());
        for attribute in attributes(inode) {
            match self.shared.get(&attribute) {
                Some(at) if shared.len() < SHARED_XATTRS_MAX => shared.push(at / 4),
                _ => own.push(attribute),
            }
        }
        (shared, own)
    }

    fn xattrs_bytes(&self, inode: &'a Inode) -> u64 {
        if inode.xattrs.is_empty() && !has_marks(inode) {
            return 0;
        }
        let (shared, own) = self.split_attributes(inode);
        XATTR_HEADER_BYTES + 4 * shared.len() as u64 + own.iter().map(entry_bytes).sum::<u64>()
    }

    /// Where an inode can stand from `from` on, and how many bytes it takes with what belongs behind it.
    fn fit(&self, id: Id, from: u64) -> (u64, u64) {
        let inode = &self.tree.inodes[id];
        let head = INODE_BYTES + self.xattrs_bytes(inode);
        let mut at = from.next_multiple_of(INODE_UNIT);
        match self.layout(inode) {
            Layout::Plain => (at, head),
            Layout::Chunks => (at, head.next_multiple_of(8) + 8 * chunk_count(inode)),
            Layout::Inline => {
                let contents = self.contents_bytes(inode);
                while (at + head) % BLOCK_BYTES + contents > BLOCK_BYTES {
                    at += INODE_UNIT;
                }
                (at, head + contents)
            }
        }
    }

    fn layout(&self, inode: &Inode) -> Layout {
        match &inode.kind {
            Kind::File { size_bytes: 1.., .. } => Layout::Chunks,
            Kind::Directory(_) | Kind::Symlink(_) if self.contents_bytes(inode) <= INLINE_BYTES_MAX => Layout::Inline,
            _ => Layout::Plain,
        }
    }

    /// Length of what the image holds for an inode: the entries of a directory, the target of a link.
    fn contents_bytes(&self, inode: &Inode) -> u64 {
        match &inode.kind {
            Kind::Directory(dir) => directory_bytes(&all_names(dir, ROOT)),
            Kind::Symlink(target) => target.len() as u64,
            _ => 0,
        }
    }

    /// Blocks that an inode has for itself.
    fn own_blocks(&self, id: Id) -> u32 {
        let inode = &self.tree.inodes[id];
        match self.layout(inode) {
            Layout::Plain => self.contents_bytes(inode).div_ceil(BLOCK_BYTES) as u32,
            _ => 0,
        }
    }

    /// Writes the image of the layer whose tar has this digest and length.
    pub(super) fn write(&self, diff_id: DiffId, tar_bytes: u64, out: impl Write) -> io::Result<()> {
        let mut out = Output { inner: HashingWriter::new(out), at: 0 };
        out.put(&[0; SUPERBLOCK_AT as usize])?;
        out.put(&self.superblock(diff_id, tar_bytes))?;
        for id in &self.order {
            out.pad_to(self.places[*id].number * INODE_UNIT)?;
            self.write_inode(*id, &mut out)?;
        }
        out.pad_to(self.shared_at)?;
        for attribute in self.shared.keys() {
            write_attribute(attribute, &mut out)?;
        }
        for id in &self.order {
            if self.own_blocks(*id) > 0 {
                out.pad_to(self.blocks_at + u64::from(self.places[*id].block) * BLOCK_BYTES)?;
                self.write_contents(*id, &mut out)?;
            }
        }
        out.pad_to(self.copied_at)?;
        out.put(&self.tree.copied)?;
        debug_assert_eq!(out.at, self.trailer_at, "everything lies where it was planned");
        let (mut inner, hashed) = out.inner.finish();
        inner.write_all(&trailer(&hashed.sha256))?;
        inner.flush()
    }

    /// The block with the superblock and the table of devices.
    fn superblock(&self, diff_id: DiffId, tar_bytes: u64) -> [u8; BLOCK_BYTES as usize] {
        let mut block = [0; BLOCK_BYTES as usize];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        let number = |bytes: u64| (bytes / BLOCK_BYTES) as u32;
        put(0, &SUPERBLOCK_MAGIC.to_le_bytes());
        put(8, &FEATURES_COMPATIBLE.to_le_bytes());
        put(12, &[BLOCK_BYTES.trailing_zeros() as u8]);
        put(14, &(self.places[ROOT].number as u16).to_le_bytes());
        put(16, &(self.order.len() as u64).to_le_bytes());
        put(36, &number(self.size_bytes()).to_le_bytes());
        put(44, &number(self.shared_at).to_le_bytes());
        put(48, &diff_id.as_bytes()[..16]);
        put(80, &FEATURES_INCOMPATIBLE.to_le_bytes());
        put(86, &1_u16.to_le_bytes());
        put(88, &((DEVICE_SLOT_AT / DEVICE_SLOT_BYTES) as u16).to_le_bytes());
        let slot = (DEVICE_SLOT_AT - SUPERBLOCK_AT) as usize;
        put(slot, diff_id.hex().as_bytes());
        put(slot + 64, &number(tar_bytes.next_multiple_of(BLOCK_BYTES)).to_le_bytes());
        let checksum = checksum(&block);
        block[4..8].copy_from_slice(&checksum.to_le_bytes());
        block
    }

    fn write_inode<W: Write>(&self, id: Id, out: &mut Output<W>) -> io::Result<()> {
        let inode = &self.tree.inodes[id];
        let place = self.places[id];
        let layout = self.layout(inode);
        let first_block = (self.blocks_at / BLOCK_BYTES) as u32 + place.block;
        // What the union in the middle of an inode says depends on what it is.
        let (format, size, union) = match &inode.kind {
            Kind::Directory(_) => (S_IFDIR, self.contents_bytes(inode), first_block),
            Kind::Symlink(target) => (S_IFLNK, target.len() as u64, first_block),
            Kind::File { size_bytes: 0, .. } => (S_IFREG, 0, 0),
            Kind::File { size_bytes, .. } => (S_IFREG, *size_bytes, chunk_format(inode)),
            Kind::CharDevice(device) => (S_IFCHR, 0, device_number(device.major, device.minor)),
            Kind::BlockDevice(device) => (S_IFBLK, 0, device_number(device.major, device.minor)),
            Kind::Fifo => (S_IFIFO, 0, 0),
            Kind::Whiteout => (S_IFCHR, 0, 0),
        };
        let xattrs_units = match self.xattrs_bytes(inode) {
            0 => 0,
            bytes => (bytes - XATTR_HEADER_BYTES) / 4 + 1,
        };
        let mut bytes = [0; INODE_BYTES as usize];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &(layout as u16).to_le_bytes());
        put(2, &(xattrs_units as u16).to_le_bytes());
        put(4, &(format | inode.mode as u16).to_le_bytes());
        put(8, &size.to_le_bytes());
        put(16, &union.to_le_bytes());
        put(20, &(place.number as u32).to_le_bytes());
        put(24, &inode.uid.to_le_bytes());
        put(28, &inode.gid.to_le_bytes());
        put(32, &inode.mtime.seconds.to_le_bytes());
        put(40, &inode.mtime.nanos.to_le_bytes());
        put(44, &place.links.to_le_bytes());
        out.put(&bytes)?;
        if xattrs_units > 0 {
            let (shared, own) = self.split_attributes(inode);
            let mut header = [0; XATTR_HEADER_BYTES as usize];
            header[4] = shared.len() as u8;
            out.put(&header)?;
            shared.iter().try_for_each(|number| out.put(&number.to_le_bytes()))?;
            own.iter().try_for_each(|attribute| write_attribute(attribute, out))?;
        }
        match layout {
            Layout::Plain => Ok(()),
            Layout::Inline => self.write_contents(id, out),
            Layout::Chunks => self.write_chunks(inode, out),
        }
    }

    fn write_chunks<W: Write>(&self, inode: &Inode, out: &mut Output<W>) -> io::Result<()> {
        out.pad_to(out.at.next_multiple_of(8))?;
        let copied = (self.copied_at / BLOCK_BYTES) as u32;
        let mut entry = |device: u16, block: u32| {
            let mut bytes = [0; 8];
            bytes[2..4].copy_from_slice(&device.to_le_bytes());
            bytes[4..].copy_from_slice(&block.to_le_bytes());
            out.put(&bytes)
        };
        match &inode.kind {
            Kind::File { data: Data::Stored(block), .. } => {
                let step = 1 << (chunk_bits(inode) - CHUNK_BITS_MIN).min(31);
                (0..chunk_count(inode) as u32).try_for_each(|chunk| entry(TAR_DEVICE, block + chunk * step))
            }
            Kind::File { data: Data::Sparse(chunks), .. } => chunks.list.iter().try_for_each(|chunk| match chunk {
                Chunk::Hole => entry(THIS_DEVICE, NO_BLOCK),
                Chunk::Stored(block) => entry(TAR_DEVICE, *block),
                Chunk::Copied(block) => entry(THIS_DEVICE, copied + block),
            }),
            _ => Ok(()),
        }
    }

    fn write_contents<W: Write>(&self, id: Id, out: &mut Output<W>) -> io::Result<()> {
        match &self.tree.inodes[id].kind {
            Kind::Directory(dir) => {
                let names = all_names(dir, id);
                let mut blocks = DirectoryBlocks { names: &names, next: 0 }.peekable();
                while let Some(range) = blocks.next() {
                    let begins = out.at;
                    let names = &names[range];
                    let mut name_at = DIRENT_BYTES * names.len();
                    for (name, id) in names {
                        let mut entry = [0; DIRENT_BYTES];
                        entry[..8].copy_from_slice(&self.places[*id].number.to_le_bytes());
                        entry[8..10].copy_from_slice(&(name_at as u16).to_le_bytes());
                        entry[10] = file_type(&self.tree.inodes[*id].kind);
                        out.put(&entry)?;
                        name_at += name.len();
                    }
                    names.iter().try_for_each(|(name, _)| out.put(name))?;
                    if blocks.peek().is_some() {
                        out.pad_to(begins + BLOCK_BYTES)?;
                    }
                }
                Ok(())
            }
            Kind::Symlink(target) => out.put(target),
            _ => Ok(()),
        }
    }
}

/// The last block of an image.
pub(super) fn trailer(sha256: &[u8; 32]) -> [u8; TRAILER_BYTES as usize] {
    let mut block = [0; TRAILER_BYTES as usize];
    block[..8].copy_from_slice(&MAGIC);
    block[8..12].copy_from_slice(&VERSION.to_le_bytes());
    block[16..48].copy_from_slice(sha256);
    block
}

/// The checksum of the block with the superblock, in which its own place is zero: CRC-32C, not inverted at the end.
fn checksum(block: &[u8; BLOCK_BYTES as usize]) -> u32 {
    !(crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, block) as u32)
}

const S_IFIFO: u16 = 0o010_000;
const S_IFCHR: u16 = 0o020_000;
const S_IFDIR: u16 = 0o040_000;
const S_IFBLK: u16 = 0o060_000;
const S_IFREG: u16 = 0o100_000;
const S_IFLNK: u16 = 0o120_000;

/// The types of a directory's entries (include/linux/fs_types.h).
fn file_type(kind: &Kind) -> u8 {
    match kind {
        Kind::File { .. } => 1,
        Kind::Directory(_) => 2,
        Kind::CharDevice(_) | Kind::Whiteout => 3,
        Kind::BlockDevice(_) => 4,
        Kind::Fifo => 5,
        Kind::Symlink(_) => 7,
    }
}

/// As the kernel encodes device numbers in 32 bits (`new_encode_dev`).
fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The size of a file's chunks: one for a file that lies in the tar as it is, unless it is larger than any chunk.
fn chunk_bits(inode: &Inode) -> u32 {
    match &inode.kind {
        Kind::File { size_bytes, data: Data::Stored(_) } => {
            size_bytes.next_power_of_two().trailing_zeros().clamp(CHUNK_BITS_MIN, super::sparse::CHUNK_BITS_MAX)
        }
        Kind::File { data: Data::Sparse(chunks), .. } => chunks.bits,
        _ => CHUNK_BITS_MIN,
    }
}

fn chunk_count(inode: &Inode) -> u64 {
    match &inode.kind {
        Kind::File { size_bytes, .. } => size_bytes.div_ceil(1 << chunk_bits(inode)),
        _ => 0,
    }
}

/// How a table of chunks is to be read: entries with a device each, of chunks of this size.
fn chunk_format(inode: &Inode) -> u32 {
    const ENTRIES: u32 = 0x20;
    ENTRIES | (chunk_bits(inode) - CHUNK_BITS_MIN)
}

fn has_marks(inode: &Inode) -> bool {
    matches!(&inode.kind, Kind::Directory(dir) if dir.opaque || dir.whiteouts)
}

/// An inode's attributes with the overlay's marks, in a fixed order.
fn attributes(inode: &Inode) -> Vec<Attribute<'_>> {
    let marks = match &inode.kind {
        Kind::Directory(dir) => {
            [dir.opaque.then_some((xattr::OPAQUE, &b"y"[..])), dir.whiteouts.then_some((xattr::ORIGIN, &b""[..]))]
        }
        _ => [None; 2],
    };
    let own = inode.xattrs.iter().map(|(name, value)| (name.as_slice(), value.as_slice()));
    let with_prefix = own.chain(marks.into_iter().flatten()).filter_map(|(name, value)| {
        PREFIXES.iter().find_map(|(number, prefix)| Some((*number, name.strip_prefix(*prefix)?, value)))
    });
    let mut attributes: Vec<_> = with_prefix.collect();
    attributes.sort_unstable();
    attributes
}

/// The prefixes of names that have a number; no other name is among a layer's attributes.
const PREFIXES: [(u8, &[u8]); 5] =
    [(1, b"user."), (2, xattr::ACL_ACCESS), (3, xattr::ACL_DEFAULT), (4, b"trusted."), (6, b"security.")];

fn entry_bytes((_, suffix, value): &Attribute<'_>) -> u64 {
    (4 + suffix.len() as u64 + value.len() as u64).next_multiple_of(4)
}

fn write_attribute<W: Write>(attribute: &Attribute<'_>, out: &mut Output<W>) -> io::Result<()> {
    let (prefix, suffix, value) = attribute;
    let [low, high] = (value.len() as u16).to_le_bytes();
    let end = out.at + entry_bytes(attribute);
    out.put(&[suffix.len() as u8, *prefix, low, high])?;
    out.put(suffix)?;
    out.put(value)?;
    out.pad_to(end)
}

/// The names in a directory, in no order.
fn names(dir: &Dir) -> impl Iterator<Item = (&[u8], Id)> {
    dir.subdirs.iter().chain(&dir.others).map(|(name, id)| (&**name, *id))
}

/// A directory's entries, the dots among them, by bytes.
fn all_names(dir: &Dir, id: Id) -> Vec<(&[u8], Id)> {
    let mut all: Vec<(&[u8], Id)> = names(dir).chain([(&b"."[..], id), (&b".."[..], dir.parent)]).collect();
    all.sort_unstable();
    all
}

/// Which entries of a directory go into which block: as many as it takes, in order.
#[derive(Debug)]
struct DirectoryBlocks<'a> {
    names: &'a [(&'a [u8], Id)],
    next: usize,
}

impl Iterator for DirectoryBlocks<'_> {
    type Item = Range<usize>;

    fn next(&mut self) -> Option<Range<usize>> {
        let begins = self.next;
        let mut bytes = 0;
        for (name, _) in &self.names[begins..] {
            bytes += DIRENT_BYTES + name.len();
            if bytes > BLOCK_BYTES as usize {
                break;
            }
            self.next += 1;
        }
        (begins < self.next).then_some(begins..self.next)
    }
}

/// Length of a directory: whole blocks, and what is in the last.
fn directory_bytes(names: &[(&[u8], Id)]) -> u64 {
    let mut bytes = 0_u64;
    for range in (DirectoryBlocks { names, next: 0 }) {
        bytes = bytes.next_multiple_of(BLOCK_BYTES);
        bytes += names[range].iter().map(|(name, _)| (DIRENT_BYTES + name.len()) as u64).sum::<u64>();
    }
    bytes
}

/// Writes and knows where it is.
struct Output<W> {
    inner: HashingWriter<W>,
    at: u64,
}

impl<W: Write> Output<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.at += bytes.len() as u64;
        self.inner.write_all(bytes)
    }

    fn pad_to(&mut self, at: u64) -> io::Result<()> {
        const ZEROS: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];
        while self.at < at {
            self.put(&ZEROS[..ZEROS.len().min((at - self.at) as usize)])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_the_kernels() {
        for (major, minor) in [(0, 0), (1, 3), (8, 255), (259, 256), (4095, 1_048_575)] {
            let kernel = rustix::fs::makedev(major, minor);
            let low = (kernel & 0xff) | (u64::from(major & 0xfff) << 8) | (u64::from(minor & !0xff) << 12);
            assert_eq!(u64::from(device_number(major, minor)), low & 0xffff_ffff, "{major}:{minor}");
        }
    }

    #[test]
    fn the_kernels_seed_is_that_of_a_checksum_over_magic_and_zeros() {
        // `erofs_superblock_csum_verify` begins with this number behind the two fields.
        let mut head = SUPERBLOCK_MAGIC.to_le_bytes().to_vec();
        head.extend([0; 4]);
        assert_eq!(!(crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &head) as u32), 0x5045_B54A);
    }
}
