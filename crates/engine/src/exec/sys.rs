//! The only unsafe code of this crate: what a process does between `fork` and `exec`, and four calls that no safe
//! wrapper has.
//!
//! Everything but [`pass_fds`] and [`hide_mount`] runs in the helper, which has one thread; that is what makes most of it sound.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_int, c_long, c_ulong};
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::io::FdFlags;
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::process::Pid;
use rustix::thread::{CapabilitySets, Gid, Uid, UnshareFlags};

use super::seccomp::Instruction;
use super::user::User;

/// `sigset_t` of the C libraries on Linux: 1024 bits.
#[repr(C)]
struct SignalSet([c_ulong; SIGNAL_SET_WORDS]);

const SIGNAL_SET_WORDS: usize = 1024 / c_ulong::BITS as usize;

/// `struct sock_fprog`.
#[repr(C)]
struct FilterProgram {
    length: u16,
    filter: *const Instruction,
}

unsafe extern "C" {
    fn fork() -> c_int;
    fn prctl(operation: c_int, ...) -> c_int;
    fn sigfillset(set: *mut SignalSet) -> c_int;
    fn sigprocmask(how: c_int, set: *const SignalSet, old: *mut SignalSet) -> c_int;
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    fn sigwait(set: *const SignalSet, signal: *mut c_int) -> c_int;
}

const PR_SET_SECCOMP: c_int = 22;
const SECCOMP_MODE_FILTER: c_long = 2;
const SIG_SETMASK: c_int = 2;
const AF_INET: c_int = 2;
const SOCK_DGRAM_CLOEXEC: c_int = 2 | 0o2_000_000;
const SIOCSIFFLAGS: c_ulong = 0x8914;
const IFF_UP: u16 = 1;

/// `struct ifreq` with its flags (netdevice(7)): 16 bytes of name, 24 of a union.
#[repr(C)]
struct InterfaceFlags {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Has `command`'s process keep these descriptors over its `exec`, and no other process that starts meanwhile: they
/// stay close-on-exec in this one.
pub(super) fn pass_fds(command: &mut Command, fds: Vec<RawFd>) {
    let keep = move || {
        for fd in &fds {
            // SAFETY: the caller holds these descriptors until the command is spawned, so they are open in the new
            // process, whose copies these are.
            let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
            rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; this makes plain fcntl system calls, and
    // allocates nothing: the list is made before.
    unsafe { command.pre_exec(keep) };
}

/// Has `command`'s process see the file systems without the mount at `path`, in a mount namespace of its own.
pub(super) fn hide_mount(command: &mut Command, path: &'static CStr) {
    let hide = move || {
        // SAFETY: unsafe because of `UnshareFlags::FILES`, which isn't asked for.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
        rustix::mount::mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        rustix::mount::unmount(path, UnmountFlags::DETACH)?;
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; these are plain system calls on strings
    // that are C strings already, so nothing is allocated.
    unsafe { command.pre_exec(hide) };
}

/// Takes over a descriptor that [`pass_fds`] passed, by the number given on the command line. `None` if it isn't open.
pub(super) fn take_fd(fd: RawFd) -> Option<std::os::fd::OwnedFd> {
    use std::os::fd::FromRawFd as _;
    if fd < 3 {
        return None;
    }
    // SAFETY: borrowed only to find out whether it is open, which is harmless for any number.
    rustix::io::fcntl_setfd(unsafe { BorrowedFd::borrow_raw(fd) }, FdFlags::CLOEXEC).ok()?;
    // SAFETY: open, as just seen; the process was started with it for this one use, and nothing else in it knows it.
    Some(unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) })
}

/// Has the descriptor of that number closed by an `exec`, if it is open.
pub(super) fn set_close_on_exec(fd: RawFd) {
    // SAFETY: borrowed for one call that changes a flag; harmless for any number, and nothing else is told the number.
    let _ = rustix::io::fcntl_setfd(unsafe { BorrowedFd::borrow_raw(fd) }, FdFlags::CLOEXEC);
}

/// Has `command`'s process act as `user` from the start, with no signal held back: groups first, while it may
/// still change them. With `keep_capabilities` it keeps all that this process has, whoever the user is.
pub(super) fn run_as(command: &mut Command, user: &User, keep_capabilities: bool) {
    let groups: Vec<Gid> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let become_user = move || {
        // The helper waits for its signals; the step gets them.
        let none = SignalSet([0; SIGNAL_SET_WORDS]);
        // SAFETY: the C library only reads the set, which is as large as its type.
        if unsafe { sigprocmask(SIG_SETMASK, &raw const none, std::ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        rustix::thread::set_keep_capabilities(keep_capabilities)?;
        rustix::thread::set_thread_groups(&groups)?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        if keep_capabilities {
            let all = rustix::thread::capabilities(None)?.permitted;
            let sets = CapabilitySets { effective: all, permitted: all, inheritable: all };
            rustix::thread::set_capabilities(None, sets)?;
            for one in all.iter() {
                rustix::thread::configure_capability_in_ambient_set(one, true)?;
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; these are plain system calls, and the
    // list of groups is made before. They change the calling thread only, which is all there is after a fork.
    unsafe { command.pre_exec(become_user) };
}

/// `fork`: `None` in the child.
pub(super) fn fork_helper() -> io::Result<Option<Pid>> {
    // SAFETY: the helper has one thread, so no lock or allocator state can be copied half-changed.
    match unsafe { fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(Pid::from_raw(pid)),
    }
}

/// Leaves the host's namespaces. A new pid namespace begins with the next child.
pub(super) fn unshare_helper(namespaces: UnshareFlags) -> io::Result<()> {
    // SAFETY: unsafe because of `UnshareFlags::FILES`, which could close descriptors under other threads' feet: it is
    // never asked for, and there are no other threads.
    debug_assert!(!namespaces.contains(UnshareFlags::FILES));
    Ok(unsafe { rustix::thread::unshare_unsafe(namespaces) }?)
}

/// Starts the loopback interface of this process's network namespace: a new one has it, but down.
pub(super) fn raise_loopback() -> io::Result<()> {
    use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
    // SAFETY: takes three numbers.
    let socket = unsafe { socket(AF_INET, SOCK_DGRAM_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was just opened, and nobody else knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let mut request = InterfaceFlags { name: [0; 16], flags: IFF_UP, rest: [0; 22] };
    request.name[..2].copy_from_slice(b"lo");
    // SAFETY: the kernel reads one `struct ifreq`, which this is as large as.
    match unsafe { ioctl(socket.as_raw_fd(), SIOCSIFFLAGS, &raw const request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Installs a system call filter for this process and all that come from it. Needs `CAP_SYS_ADMIN`, because
/// `no_new_privs` stays off: steps run `sudo`.
pub(super) fn install_filter(filter: &[Instruction]) -> io::Result<()> {
    let length = u16::try_from(filter.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let program = FilterProgram { length, filter: filter.as_ptr() };
    // SAFETY: the kernel reads `length` instructions, which the slice has, and keeps nothing of our memory.
    match unsafe { prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &raw const program, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// All signals, held back from now on: each is waited for.
pub(super) struct Signals(SignalSet);

impl Signals {
    /// Holds back all signals that can be.
    pub(super) fn block() -> io::Result<Self> {
        let mut set = SignalSet([0; SIGNAL_SET_WORDS]);
        // SAFETY: `set` is as large as the C library's type, and both calls only read and write it.
        let result = unsafe {
            sigfillset(&raw mut set);
            sigprocmask(SIG_SETMASK, &raw const set, std::ptr::null_mut())
        };
        if result == 0 { Ok(Self(set)) } else { Err(io::Error::last_os_error()) }
    }

    /// The number of the next one.
    pub(super) fn wait(&self) -> i32 {
        let mut signal = 0;
        loop {
            // SAFETY: reads the set, writes one number.
            if unsafe { sigwait(&raw const self.0, &raw mut signal) } == 0 {
                return signal;
            }
        }
    }
}

/// Lets this crate's test program be its own helper, though the test harness has the `main`.
#[cfg(test)]
mod test_helper {
    extern "C" fn before_main() {
        if let Some(code) = super::super::init::helper_main() {
            #[expect(clippy::disallowed_methods, reason = "there is no main to return to")]
            std::process::exit(code);
        }
    }

    // SAFETY: the section holds pointers to functions that the C library calls before `main`, once; Rust's own arguments
    // are set up earlier (`.init_array.00099`).
    #[used]
    #[unsafe(link_section = ".init_array")]
    static BEFORE_MAIN: extern "C" fn() = before_main;
}
