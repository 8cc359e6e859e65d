//! Packed layers: the tar as it is, and an index of it that the kernel mounts.
//!
//! ```text
//! layers/<id>/layer.tar           the uncompressed tar, byte for byte
//! layers/<id>/layer.erofs         where in it everything is (docs/format/erofs.md)
//! ```
//!
//! Either both stand in a layer's directory, or `fs/` does; which of them says how the layer is kept, whatever driver made it.
//! All readers come through [`open_tree`], so a store may hold layers of both kinds.
//!
//! A packed layer's tree is a mount that is attached nowhere: it ends with its last user, be that a descriptor or an
//! overlay on top of it, and a process that dies leaves nothing to clean up. Two files are all there is to remove.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::num::NonZero;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use plies_archive::{DirIndex, Limits, Usage, erofs, tar};
use plies_oci::DiffId;
use rustix::fs::{Advice, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
};

use crate::error::{At as _, FileError};
use crate::sys;
use crate::tree::{self, STAT_BLOCK_BYTES};

const TREE: &str = "fs";
pub(crate) const TAR: &str = "layer.tar";
pub(crate) const IMAGE: &str = "layer.erofs";

/// Bytes of a file that are read or written at once.
const BUFFER_BYTES: usize = 256 << 10;

/// Bytes of an index that are read as soon as it is mounted: those of a layer of about 60,000 files.
const AHEAD_BYTES: u64 = 8 << 20;

/// The tar of the layer in `dir`, if it is packed.
pub(crate) fn open_tar(dir: &Path) -> Result<Option<File>, FileError> {
    let path = dir.join(TAR);
    match File::open(&path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(FileError::new("open", path, error)),
    }
}

/// Whether the layer in `dir` is packed.
pub(crate) fn is_packed(dir: &Path) -> Result<bool, FileError> {
    let path = dir.join(TAR);
    path.try_exists().at("stat", path)
}

/// Whether the files that make the tree of the layer in `dir` are there. Mounts nothing.
pub(crate) fn has_tree(dir: &Path) -> Result<bool, FileError> {
    if is_packed(dir)? {
        let image = dir.join(IMAGE);
        return image.try_exists().at("stat", image);
    }
    match tree::open_own(&dir.join(TREE)) {
        Ok(_) => Ok(true),
        Err(error) if error.source.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// The root of the tree of the layer in `dir`, however it is kept.
pub(crate) fn open_tree(dir: &Path) -> Result<OwnedFd, FileError> {
    let path = dir.join(TREE);
    match tree::open_own(&path) {
        Err(error) if error.source.kind() == io::ErrorKind::NotFound && is_packed(dir)? => {
            let mount = mount(dir)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::openat(mount, ".", flags, Mode::empty()).at("open", dir.join(IMAGE))
        }
        opened => opened,
    }
}

/// Mounts the packed layer in `dir`, attached nowhere.
pub(crate) fn mount(dir: &Path) -> Result<OwnedFd, FileError> {
    let path = dir.join(IMAGE);
    let image = File::open(&path).at("open", &path)?;
    // EROFS takes a block of its metadata at a time and reads none ahead. All of them are some megabytes, and whoever walks
    // the tree needs most. A disk that is too slow for it only comes later to what is asked for then.
    let _advice_only = rustix::fs::fadvise(&image, 0, NonZero::new(AHEAD_BYTES), Advice::WillNeed);
    let tar = dir.join(TAR);
    let tar = File::open(&tar).at("open", tar)?;
    mount_files(&image, &tar).at("mount", path)
}

fn mount_files(image: &File, tar: &File) -> io::Result<OwnedFd> {
    match mount_from(image, tar) {
        // Before Linux 6.12, and where it was built so, EROFS mounts block devices alone.
        Err(Errno::NOTBLK) => mount_by_loop(image, tar),
        mounted => Ok(mounted?),
    }
}

/// By way of loop devices, which the mount keeps, and which end with it.
fn mount_by_loop(image: &File, tar: &File) -> io::Result<OwnedFd> {
    let devices = [sys::loop_device(image)?, sys::loop_device(tar)?];
    Ok(mount_from(&devices[0], &devices[1])?)
}

/// By descriptor, so that no option has a path in it that would need to be short or escaped.
fn mount_from(image: &File, tar: &File) -> rustix::io::Result<OwnedFd> {
    let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let context = context.as_fd();
    for (key, file) in [("source", image), ("device", tar)] {
        fsconfig_set_string(context, key, format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    }
    // Loop devices that are to be read only are not opened to write.
    fsconfig_set_flag(context, "ro")?;
    fsconfig_create(context)?;
    fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY)
}

/// Writes the image of an archive that was read to `dir`.
pub(crate) fn write_image(dir: &Path, index: &erofs::Index, diff_id: DiffId, tar_bytes: u64) -> Result<(), FileError> {
    let path = dir.join(IMAGE);
    let write = || {
        let mut out = BufWriter::with_capacity(BUFFER_BYTES, File::create_new(&path)?);
        index.write(diff_id, tar_bytes, &mut out)?;
        out.flush()
    };
    write().at("write", &path)
}

/// What the layer in `dir` costs: `told` is what reading the archive said, without bytes on disk.
pub(crate) fn usage(dir: &Path, told: Usage) -> Result<Usage, FileError> {
    let mut size_bytes = 0;
    for path in [TAR, IMAGE].map(|name| dir.join(name)) {
        size_bytes += std::fs::symlink_metadata(&path).at("stat", &path)?.blocks() * STAT_BLOCK_BYTES;
    }
    Ok(Usage { size_bytes, ..told })
}

/// What a packed layer is found to be when all of it is read.
#[derive(Debug)]
pub(crate) struct Examined {
    /// The digest of its tar.
    pub(crate) diff_id: DiffId,
    /// What it costs, and which of its directories are implied, if the tar is one that can be indexed and the image is the
    /// one that is made of it.
    pub(crate) sound: Option<(Usage, DirIndex)>,
}

/// Reads the packed layer in `dir` whole: its tar is hashed, and its image made again and compared.
pub(crate) fn examine(dir: &Path, limits: &Limits) -> Result<Examined, FileError> {
    let path = dir.join(TAR);
    let file = File::open(&path).at("open", &path)?;
    let mut reader = tar::Reader::new(plies_archive::hash::HashingReader::new(file), limits);
    let index = erofs::index(&mut reader, limits).ok();
    let (mut hashing, index) = match reader.finish() {
        Ok(finished) => (finished.inner, index),
        // What is no archive has a digest all the same.
        Err(_) => {
            let file = File::open(&path).at("open", &path)?;
            (plies_archive::hash::HashingReader::new(file), None)
        }
    };
    io::copy(&mut hashing, &mut io::sink()).at("read", &path)?;
    let (_, hashed) = hashing.finish();
    let diff_id = DiffId::from_bytes(hashed.sha256);
    let Some(index) = index else { return Ok(Examined { diff_id, sound: None }) };
    let image = dir.join(IMAGE);
    let mut same = Same(BufReader::with_capacity(BUFFER_BYTES, File::open(&image).at("open", &image)?));
    let is_same = match index.write(diff_id, hashed.size_bytes, &mut same) {
        Ok(()) => same.is_at_end().at("read", &image)?,
        Err(error) if error.kind() == io::ErrorKind::InvalidData => false,
        Err(error) => return Err(FileError::new("read", image, error)),
    };
    let applied = index.applied();
    let sound = if is_same { Some((usage(dir, applied.usage)?, applied.index.clone())) } else { None };
    Ok(Examined { diff_id, sound })
}

/// Takes only the bytes that a file has.
struct Same<R>(R);

impl<R: io::BufRead> Same<R> {
    fn is_at_end(&mut self) -> io::Result<bool> {
        Ok(self.0.fill_buf()?.is_empty())
    }
}

impl<R: io::BufRead> Write for Same<R> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let here = self.0.fill_buf()?;
        let n = here.len().min(bytes.len());
        if n == 0 || here[..n] != bytes[..n] {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.0.consume(n);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether this process and its kernel can mount packed layers under an overlay, tried with an empty one of files without a
/// name: in `dir`, or above it as long as there is none.
///
/// # Errors
/// Why not.
pub(crate) fn check(dir: &Path) -> Result<(), FileError> {
    let dir = dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(dir);
    let unnamed = |bytes: &[u8]| -> io::Result<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR)?);
        file.write_all(bytes)?;
        Ok(file)
    };
    let probe = || -> io::Result<[File; 2]> {
        let tar = tar::Writer::new(Vec::new()).finish().map_err(io::Error::other)?;
        let limits = Limits::default();
        let index = erofs::index(&mut tar::Reader::new(tar.as_slice(), &limits), &limits).map_err(io::Error::other)?;
        let mut image = Vec::new();
        index.write(DiffId::from_bytes([0; 32]), tar.len() as u64, &mut image)?;
        Ok([unnamed(&image)?, unnamed(&tar)?])
    };
    let [image, tar] = probe().at("make files to try EROFS with in", dir)?;
    let lower = mount_files(&image, &tar).at("mount an EROFS image from", dir)?;
    // Refused where too many file systems are stacked already.
    let stack = || -> io::Result<()> {
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let below = rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        for tree in [&lower, &below] {
            fsconfig_set_string(context.as_fd(), "lowerdir+", format!("/proc/self/fd/{}", tree.as_raw_fd()))?;
        }
        Ok(fsconfig_create(context.as_fd())?)
    };
    stack().at("mount an overlay over an EROFS image from", dir)
}

#[cfg(test)]
mod tests {
    use plies_testkit::tar::{Member, archive};
    use plies_testkit::{eventually, tools};

    use super::*;

    /// Kernels before 6.12 are not at hand, but all of them can do this.
    #[test]
    fn privileged_loop_devices_show_the_same_and_go_with_their_mount() {
        if !tools::privileged() {
            return;
        }
        if let Err(error) = check(&std::env::temp_dir()) {
            eprintln!("SKIPPED: {error}: {}", error.source);
            return;
        }
        let tar = archive(&[Member::file("d/f", "content".repeat(1000)).xattr("user.a", "b")]);
        let limits = Limits::default();
        let index = erofs::index(&mut tar::Reader::new(tar.as_slice(), &limits), &limits).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(TAR), &tar).unwrap();
        write_image(dir.path(), &index, DiffId::from_bytes([1; 32]), tar.len() as u64).unwrap();
        let files = [IMAGE, TAR].map(|name| File::open(dir.path().join(name)).unwrap());
        let mount = mount_by_loop(&files[0], &files[1]).unwrap();
        let read = |mount: &OwnedFd| {
            let file = rustix::fs::openat(mount, "d/f", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
            let mut text = String::new();
            io::Read::read_to_string(&mut File::from(file), &mut text).unwrap();
            text
        };
        assert_eq!(read(&mount), "content".repeat(1000));
        let attached = || {
            let devices = std::fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path());
            let files = devices.filter_map(|device| std::fs::read_to_string(device.join("loop/backing_file")).ok());
            files.filter(|file| file.starts_with(dir.path().to_str().unwrap())).count()
        };
        assert_eq!(attached(), 2);
        // The names may go first, as when a layer is removed.
        for name in [IMAGE, TAR] {
            std::fs::remove_file(dir.path().join(name)).unwrap();
        }
        assert_eq!(read(&mount).len(), 7000);
        drop(mount);
        assert!(eventually(|| attached() == 0), "the devices are let go of");
    }
}
