//! Power cuts, on a block device that writes down what it is told.
//!
//! A file system is made on a disk image that qemu-storage-daemon offers over FUSE, with its `blklogwrites` filter between:
//! every write and every flush that the kernel sends to the disk is appended to a log, in the format of Linux's dm-log-writes
//! target (Documentation/admin-guide/device-mapper/log-writes.rst). From the image as it was at the beginning and a part of
//! that log comes the disk as a power cut leaves it: all up to the last flush, and of what was written since then whatever
//! the disk had got round to.
//!
//! What was acknowledged when is told by how long the log was at that moment.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::fs::SeekFrom as Extent;

use crate::scratch::Scratch;
use crate::tools;

/// Bytes of the disk: the least that mkfs.btrfs takes is 109 MiB.
const DISK_BYTES: u64 = 128 << 20;

/// The first eight bytes of a log.
const MAGIC: u64 = 0x006a_7366_7773_6872;

/// In these units the log counts.
const SECTOR: usize = 512;

/// Sectors that a disk writes whole or not at all: 4 KiB, as disks have them now. (ext4 does not survive half a
/// superblock.)
const ATOM: u64 = 8;

const FLAG_FLUSH: u64 = 1;
const FLAG_FUA: u64 = 2;
const FLAG_DISCARD: u64 = 4;

/// What the disk is formatted with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    /// ext4 as Debian mounts it.
    Ext4,
    /// ext4 that does not order data before the metadata that name it.
    Ext4Writeback,
    /// btrfs.
    Btrfs,
}

impl FileSystem {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ext4, Self::Ext4Writeback, Self::Btrfs];

    fn format(self, image: &Path) {
        match self {
            Self::Ext4 | Self::Ext4Writeback => tools::run(
                // Blocks as large disks have them.
                Command::new("mkfs.ext4")
                    .args(["-q", "-F", "-m", "0", "-b", "4096", "-E", "lazy_itable_init=0"])
                    .arg(image),
            ),
            Self::Btrfs => tools::run(Command::new("mkfs.btrfs").arg("-q").arg(image)),
        };
    }

    fn mount(self, device: &Path, at: &Path) {
        fs::create_dir_all(at).expect("because its parent is a scratch directory");
        let mut mount = Command::new("mount");
        // `-o loop` where it is no device: what it makes goes with the mount.
        let of_file = if device.starts_with("/dev") { "rw" } else { "loop" };
        let data = if self == Self::Ext4Writeback { ",data=writeback" } else { "" };
        tools::run(mount.args(["-o", &format!("{of_file}{data}")]).arg(device).arg(at));
    }
}

/// Whether the programs are there that this takes, and whether they may do it.
#[track_caller]
pub fn possible() -> bool {
    tools::privileged()
        && tools::have(&["qemu-storage-daemon", "losetup", "mkfs.ext4", "mkfs.btrfs", "mount", "umount"])
}

/// A mounted disk that is being watched.
#[derive(Debug)]
pub struct Disk {
    dir: PathBuf,
    file_system: FileSystem,
    daemon: Child,
    device: PathBuf,
    log: Log,
}

impl Disk {
    /// Formats one; all its files lie in a new directory `name` of `scratch`.
    ///
    /// # Panics
    /// When that does not work.
    pub fn new(scratch: &Scratch, name: &str, file_system: FileSystem) -> Self {
        let dir = scratch.dir(name);
        let start = dir.join("start");
        File::create(&start).and_then(|file| file.set_len(DISK_BYTES)).expect("because the disk has room");
        file_system.format(&start);
        Self::on(dir, file_system)
    }

    /// One that begins as `image`, which stays as it is.
    ///
    /// # Panics
    /// When that does not work.
    pub fn from_image(scratch: &Scratch, name: &str, file_system: FileSystem, image: &Path) -> Self {
        let dir = scratch.dir(name);
        copy_sparse(image, &dir.join("start"));
        Self::on(dir, file_system)
    }

    fn on(dir: PathBuf, file_system: FileSystem) -> Self {
        copy_sparse(&dir.join("start"), &dir.join("disk"));
        File::create(dir.join("log")).expect("because its directory is new");
        File::create(dir.join("export")).expect("because its directory is new");
        let daemon = Command::new("qemu-storage-daemon")
            .current_dir(&dir)
            .args(["--blockdev", "driver=file,node-name=disk,filename=disk"])
            .args(["--blockdev", "driver=file,node-name=log,filename=log"])
            .args(["--blockdev", "driver=blklogwrites,node-name=logged,file=disk,log=log,log-sector-size=512"])
            .args(["--export", "type=fuse,id=export,node-name=logged,mountpoint=export,writable=on"])
            .spawn()
            .expect("because it is installed");
        let export = dir.join("export");
        assert!(
            crate::eventually(|| fs::metadata(&export).is_ok_and(|file| file.len() == DISK_BYTES)),
            "qemu-storage-daemon exports nothing"
        );
        let device = tools::run(Command::new("losetup").args(["-f", "--show"]).arg(&export));
        let disk = Self { log: Log::new(dir.join("log")), device: device.trim_end().into(), dir, file_system, daemon };
        file_system.mount(&disk.device, &disk.root());
        disk
    }

    /// Where it is mounted.
    pub fn root(&self) -> PathBuf {
        self.dir.join("mounted")
    }

    /// How many writes and flushes have reached it. What a call made durable is among those that had when it returned.
    pub fn logged(&mut self) -> usize {
        self.log.read_on();
        self.log.entries.len()
    }

    /// Unmounts it.
    ///
    /// # Panics
    /// When it is in use.
    pub fn end(mut self) -> Recording {
        tools::run(Command::new("umount").arg(self.root()));
        self.detach();
        self.log.read_on();
        Recording {
            file_system: self.file_system,
            dir: self.dir.clone(),
            log: std::mem::replace(&mut self.log, Log::new(PathBuf::new())),
        }
    }

    fn detach(&mut self) {
        if self.device.as_os_str().is_empty() {
            return;
        }
        tools::run(Command::new("losetup").arg("-d").arg(&self.device));
        self.device = PathBuf::new();
        // Not SIGKILL: it has a mount of its own to take away.
        let pid = rustix::process::Pid::from_child(&self.daemon);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("because it runs");
        self.daemon.wait().expect("because it is a child");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if !self.device.as_os_str().is_empty() {
            drop(Command::new("umount").arg("-l").arg(self.root()).status());
            self.detach();
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    first_sector: u64,
    sectors_count: u64,
    flags: u64,
    /// Of the data, in the log.
    at: u64,
}

/// The log, as far as it was read.
#[derive(Debug)]
struct Log {
    path: PathBuf,
    entries: Vec<Entry>,
    read_bytes: u64,
}

impl Log {
    fn new(path: PathBuf) -> Self {
        Self { path, entries: Vec::new(), read_bytes: 0 }
    }

    /// Takes in what was appended meanwhile.
    fn read_on(&mut self) {
        let file = File::open(&self.path).expect("because it was made with the disk");
        let len = file.metadata().expect("because it is open").len();
        let number = |bytes: &[u8], at: usize| {
            u64::from_le_bytes(bytes[at * 8..at * 8 + 8].try_into().expect("because these are eight"))
        };
        if self.read_bytes == 0 && len >= SECTOR as u64 {
            let mut head = [0; SECTOR];
            file.read_exact_at(&mut head, 0).expect("because it is so long");
            assert_eq!(number(&head, 0), MAGIC, "{} is a log of writes", self.path.display());
            self.read_bytes = SECTOR as u64;
        }
        while self.read_bytes + SECTOR as u64 <= len && self.read_bytes > 0 {
            let mut head = [0; 32];
            file.read_exact_at(&mut head, self.read_bytes).expect("because it is so long");
            let entry = Entry {
                first_sector: number(&head, 0),
                sectors_count: number(&head, 1),
                flags: number(&head, 2),
                at: self.read_bytes + SECTOR as u64,
            };
            let has_data = entry.flags & FLAG_DISCARD == 0;
            let end = entry.at + if has_data { entry.sectors_count * SECTOR as u64 } else { 0 };
            // A hole, whose entry is still to come, or one whose data is.
            if (entry.sectors_count, entry.flags) == (0, 0) || end > len {
                break;
            }
            self.entries.push(entry);
            self.read_bytes = end;
        }
    }
}

/// All that a disk was told, from its beginning to its end.
#[derive(Debug)]
pub struct Recording {
    file_system: FileSystem,
    dir: PathBuf,
    log: Log,
}

/// A power cut.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cut {
    /// How much of the log there was.
    pub logged: usize,
    /// What is lost of what was not flushed. 0: nothing. Others: each write by itself, as drawn from this number, and the
    /// last of those that are not lost is torn.
    pub seed: u64,
}

impl Recording {
    /// The length of the log.
    pub fn logged(&self) -> usize {
        self.log.entries.len()
    }

    /// Moments to cut the power at: behind every flush and behind every write, each once with nothing lost and
    /// `subsets` times with something.
    pub fn cuts(&self, subsets: u64) -> Vec<Cut> {
        let moments = 0..=self.logged();
        moments.flat_map(|logged| (0..=subsets).map(move |seed| Cut { logged, seed })).collect()
    }

    /// Cuts the power at each of these moments and calls `judge` with the file system that is left, mounted, and with the
    /// image of the disk as it was before it was mounted.
    ///
    /// # Panics
    /// When the file system cannot be mounted, or `judge` panics: with the moment.
    pub fn cut_at(&self, cuts: &BTreeSet<Cut>, mut judge: impl FnMut(&Cut, &Path, &Path)) {
        // In memory, since each is copied: 128 MiB, most of it holes.
        let memory = self.dir.join("memory");
        fs::create_dir_all(&memory).expect("because the disk has room");
        tools::run(Command::new("mount").args(["-t", "tmpfs", "-o", "mode=700", "tmpfs"]).arg(&memory));
        let (flushed, kept, mounted) = (memory.join("flushed"), memory.join("kept"), self.dir.join("mounted"));
        copy_sparse(&self.dir.join("start"), &flushed);
        let log = File::open(&self.log.path).expect("because it was read");
        let disk = File::options().write(true).open(&flushed).expect("because it was copied");
        let mut flushed_count = 0;
        for (number, cut) in cuts.iter().enumerate() {
            // Under a name of its own: the loop device of the one before may still be there, with what it had read of it.
            let left = memory.join(format!("left{number}"));
            let entries = &self.log.entries[..cut.logged];
            let flush = entries.iter().rposition(|entry| entry.flags & FLAG_FLUSH != 0).map_or(0, |at| at + 1);
            for entry in &entries[flushed_count..flush] {
                apply(entry, &log, &disk, entry.sectors_count);
            }
            flushed_count = flush.max(flushed_count);
            copy_sparse(&flushed, &left);
            let image = File::options().write(true).open(&left).expect("because it was copied");
            let mut random = cut.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ cut.logged as u64;
            let written: Vec<&Entry> = entries[flushed_count..]
                .iter()
                .filter(|entry| cut.seed == 0 || entry.flags & FLAG_FUA != 0 || draw(&mut random).is_multiple_of(2))
                .collect();
            for (at, entry) in written.iter().enumerate() {
                let is_torn = cut.seed != 0 && at + 1 == written.len() && entry.flags & FLAG_FUA == 0;
                let sectors = match is_torn {
                    true => torn(entry, draw(&mut random)),
                    false => entry.sectors_count,
                };
                apply(entry, &log, &image, sectors);
            }
            drop(image);
            copy_sparse(&left, &kept);
            self.file_system.mount(&left, &mounted);
            judge(cut, &mounted, &kept);
            unmount(&mounted);
            fs::remove_file(&left).expect("because it was copied");
        }
        drop(disk);
        unmount(&memory);
    }
}

/// The next of a row of random numbers: Steele, Lea and Flood's SplitMix64.
pub fn draw(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// How many sectors of a write that was cut short have arrived.
fn torn(entry: &Entry, random: u64) -> u64 {
    let arrived = entry.first_sector + random % (entry.sectors_count + 1);
    if arrived == entry.first_sector + entry.sectors_count {
        return entry.sectors_count;
    }
    (arrived / ATOM * ATOM).saturating_sub(entry.first_sector)
}

/// Whoever used it may still be about to let go of it.
fn unmount(at: &Path) {
    let unmounts = || {
        let mut umount = Command::new("umount");
        umount.arg(at).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    };
    assert!(crate::eventually(unmounts), "{} stays in use", at.display());
}

fn apply(entry: &Entry, log: &File, disk: &File, sectors_count: u64) {
    let at = entry.first_sector * SECTOR as u64;
    let len = sectors_count * SECTOR as u64;
    if entry.flags & FLAG_DISCARD != 0 {
        let hole = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        if len > 0 {
            rustix::fs::fallocate(disk, hole, at, len).expect("because every file system here can");
        }
        return;
    }
    let mut data = vec![0; usize::try_from(len).expect("because writes are small")];
    log.read_exact_at(&mut data, entry.at).expect("because the log was read that far");
    disk.write_all_at(&data, at).expect("because there is room");
}

/// Copies a file with its holes.
fn copy_sparse(from: &Path, to: &Path) {
    let mut source = File::open(from).unwrap_or_else(|error| panic!("open {}: {error}", from.display()));
    let mut target = File::create(to).unwrap_or_else(|error| panic!("create {}: {error}", to.display()));
    let len = source.metadata().expect("because it is open").len();
    target.set_len(len).expect("because there is room");
    let mut at = 0;
    while let Ok(data) = rustix::fs::seek(&source, Extent::Data(at)) {
        at = rustix::fs::seek(&source, Extent::Hole(data)).expect("because there is always one at the end");
        let mut extent = vec![0; usize::try_from(at - data).expect("because the disk is small")];
        source.seek(SeekFrom::Start(data)).and_then(|_| source.read_exact(&mut extent)).expect("because it is there");
        target.seek(SeekFrom::Start(data)).and_then(|_| target.write_all(&extent)).expect("because there is room");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a program without syncs loses, and one with them does not: or the cuts would prove nothing.
    #[test]
    fn privileged_a_cut_loses_what_was_not_synced_and_nothing_else() {
        if !possible() {
            return;
        }
        for file_system in FileSystem::ALL {
            let scratch = Scratch::new();
            let mut disk = Disk::new(&scratch, "disk", file_system);
            let root = disk.root();
            fs::write(root.join("unsynced"), "text").unwrap();
            let mut synced = Vec::new();
            for name in ["one", "two"] {
                let file = File::create(root.join(name)).unwrap();
                (&file).write_all(name.as_bytes()).unwrap();
                file.sync_all().unwrap();
                File::open(&root).unwrap().sync_all().unwrap();
                synced.push((disk.logged(), name));
            }
            let recording = disk.end();
            let mut lost = 0;
            recording.cut_at(&recording.cuts(1).into_iter().collect(), |cut, left, _| {
                lost += usize::from(fs::read_to_string(left.join("unsynced")).is_ok_and(|text| text != "text"));
                lost += usize::from(!left.join("unsynced").exists());
                for (logged, name) in &synced {
                    if *logged <= cut.logged {
                        let text = fs::read_to_string(left.join(name));
                        assert_eq!(text.unwrap(), *name, "{file_system:?} {cut:?}");
                    }
                }
            });
            assert!(lost > 0, "{file_system:?}");
            assert!(synced[0].0 < synced[1].0 && synced[1].0 <= recording.logged());
        }
    }
}
