//! The only unsafe code of this crate: two calls that no safe wrapper has, and a child that is forked to hold a user
//! namespace for a moment.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_long};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, waitpid};
use rustix::thread::UnshareFlags;

unsafe extern "C" {
    fn fork() -> c_int;
    fn _exit(status: c_int) -> !;
    fn syscall(number: c_long, ...) -> c_long;
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
