//! The only unsafe code of this crate: calls that no safe wrapper has, and a child that is forked to hold a user
//! namespace for a moment.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_long, c_uint, c_ulong};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, waitpid};
use rustix::thread::UnshareFlags;

unsafe extern "C" {
    fn fork() -> c_int;
    fn _exit(status: c_int) -> !;
    fn syscall(number: c_long, ...) -> c_long;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    fn sync_file_range(fd: c_int, offset: i64, bytes: i64, flags: c_uint) -> c_int;
}

/// `SYNC_FILE_RANGE_WRITE` of `include/uapi/linux/fs.h`.
const SYNC_FILE_RANGE_WRITE: c_uint = 2;

/// Has the kernel begin to write a part of a file to the disk, without waiting for it. Where it cannot, nothing is lost: the sync
/// that follows does it all, and is also who tells of errors.
pub(crate) fn begin_write_back(file: &File, offset: u64, bytes: u64) {
    let (Ok(offset), Ok(bytes)) = (i64::try_from(offset), i64::try_from(bytes)) else { return };
    // SAFETY: the call takes numbers and an open descriptor.
    let _may_not_work_here = unsafe { sync_file_range(file.as_raw_fd(), offset, bytes, SYNC_FILE_RANGE_WRITE) };
}

/// `include/uapi/linux/loop.h`.
const LOOP_CTL_GET_FREE: c_ulong = 0x4c82;
const LOOP_CONFIGURE: c_ulong = 0x4c0a;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// How often another loop device is tried when somebody else was faster: as many as one overlay has layers.
const LOOP_TRIES: usize = 500;

/// `struct loop_config`, with the `struct loop_info64` inside it.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    /// Bytes.
    block_size: u32,
    /// Device, inode, rdevice, offset, size limit: all as the file has them.
    places: [u64; 5],
    number: u32,
    encryption: [u32; 2],
    flags: u32,
    names_and_key: [u8; 64 + 64 + 32],
    init: [u64; 2],
    reserved: [u64; 8],
}

/// Attaches a file to a loop device, to be read only. It is let go of with the last who has the device open or mounted.
pub(crate) fn loop_device(file: &File) -> io::Result<File> {
    let control = File::options().read(true).write(true).open("/dev/loop-control")?;
    let config = LoopConfig {
        fd: u32::try_from(file.as_raw_fd()).expect("because open descriptors are not negative"),
        // Blocks of a tar, which are those of its index.
        block_size: 512,
        places: [0; 5],
        number: 0,
        encryption: [0; 2],
        flags: LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR,
        names_and_key: [0; 160],
        init: [0; 2],
        reserved: [0; 8],
    };
    for _ in 0..LOOP_TRIES {
        // SAFETY: the call takes no argument.
        let number = unsafe { ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let device = File::open(format!("/dev/loop{number}"))?;
        // SAFETY: the structure is the one that the call takes; the kernel copies it.
        match unsafe { ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) } {
            0 => return Ok(device),
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::ResourceBusy => {}
                error => return Err(error),
            },
        }
    }
    Err(io::ErrorKind::ResourceBusy.into())
}

/// One number on all architectures (`include/uapi/asm-generic/unistd.h`).
const SYS_MOUNT_SETATTR: c_long = 442;
const AT_EMPTY_PATH: c_int = 0x1000;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// `struct mount_attr`.
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Has a detached mount show the owners that files have in a user namespace.
pub(crate) fn map_ids(mount: BorrowedFd<'_>, user_namespace: BorrowedFd<'_>) -> io::Result<()> {
    let fd = u64::try_from(user_namespace.as_raw_fd()).expect("because open descriptors are not negative");
    let attr = MountAttr { set: MOUNT_ATTR_IDMAP, clear: 0, propagation: 0, user_namespace: fd };
    let path: *const c_char = c"".as_ptr();
    // SAFETY: the path is a C string and the structure as large as is said; the kernel reads both and keeps neither.
    let done = unsafe {
        syscall(
            SYS_MOUNT_SETATTR,
            c_long::from(mount.as_raw_fd()),
            path,
            c_long::from(AT_EMPTY_PATH),
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes a user namespace. `set_up` gets a process in it, which lives until that returns.
pub(crate) fn with_user_namespace<T>(set_up: impl FnOnce(Pid) -> io::Result<T>) -> io::Result<T> {
    let (told, tells): (OwnedFd, OwnedFd) = pipe_with(PipeFlags::CLOEXEC)?;
    let (waits, releases) = pipe_with(PipeFlags::CLOEXEC)?;
    // SAFETY: other threads may hold locks, of which the child gets copies that nobody opens: it makes plain system
    // calls, allocates nothing, and ends with `_exit`.
    let child = match unsafe { fork() } {
        -1 => return Err(io::Error::last_os_error()),
        0 => {
            drop(releases);
            // SAFETY: unsafe because of `UnshareFlags::FILES`, which isn't asked for.
            let left = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) };
            let _ = rustix::io::write(&tells, &[u8::from(left.is_ok())]);
            let _ = rustix::io::read(&waits, &mut [0_u8; 1]);
            // SAFETY: ends the child at once, without running what its parent left for its end.
            unsafe { _exit(0) }
        }
        child => Pid::from_raw(child).expect("because a child has a number"),
    };
    drop((tells, waits));
    let mut left = [0];
    let set_up = match rustix::io::retry_on_intr(|| rustix::io::read(&told, &mut left)) {
        Ok(1) if left == [1] => set_up(child),
        Ok(_) => Err(io::Error::other("the kernel makes no user namespace")),
        Err(error) => Err(error.into()),
    };
    // Said, not only hung up: a child that another thread forks meanwhile has a copy of this end, and we have one of its.
    let _ = rustix::io::write(&releases, &[0]);
    rustix::io::retry_on_intr(|| waitpid(Some(child), WaitOptions::empty()))?;
    set_up
}
