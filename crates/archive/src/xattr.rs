//! Which extended attributes belong to a tree's content, and which to the machine that keeps it.

use rustix::io::{Errno, Result};

use crate::sys::Subject;

/// How overlayfs marks a directory that hides what lies below it (Documentation/filesystems/overlayfs.rst).
pub(crate) const OPAQUE: &[u8] = b"trusted.overlay.opaque";
/// How overlayfs marks a directory that was copied up from a lower layer; empty for "from we don't
/// know where". Without it, and where only one layer has the directory, overlayfs takes it that
/// there are no whiteouts to filter out and lists them (`ovl_get_inode` in fs/overlayfs/inode.c):
/// names that `ls` shows and nobody can open. So a layer's directories with whiteouts carry it.
pub(crate) const ORIGIN: &[u8] = b"trusted.overlay.origin";
/// Everything that overlayfs keeps for itself begins so.
pub(crate) const OVERLAY: &[u8] = b"trusted.overlay.";
/// The same for mounts with `userxattr`.
pub(crate) const USER_OVERLAY: &[u8] = b"user.overlay.";
/// What new files in a directory start with.
pub(crate) const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";
/// A file's access control list.
pub(crate) const ACL_ACCESS: &[u8] = b"system.posix_acl_access";
/// A file's capabilities.
pub(crate) const CAPABILITY: &[u8] = b"security.capability";

/// Extended attributes, sorted by name.
pub(crate) type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// Whether an attribute is part of a layer's content.
///
/// Overlayfs' own would let an archive point a directory elsewhere or hide another layer's files.
/// Labels of the host's security modules mean nothing on another host.
pub fn is_content(name: &[u8]) -> bool {
    !(name.starts_with(OVERLAY)
        || name.starts_with(USER_OVERLAY)
        || matches!(name, b"security.selinux" | b"security.ima" | b"security.evm"))
}

/// Whether a value is one that the kernel takes for file capabilities: version 2 (20 bytes) or 3
/// (24 bytes, with the user namespace's root), include/uapi/linux/capability.h.
fn is_capability(value: &[u8]) -> bool {
    let version = value.get(..4).map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) >> 24);
    matches!((version, value.len()), (Some(2), 20) | (Some(3), 24))
}

/// All attributes that are content.
pub(crate) fn read(subject: Subject<'_>) -> Result<Xattrs> {
    let list = subject.list()?;
    let mut found = Vec::new();
    for name in names(&list).filter(|name| is_content(name)) {
        // Gone between list and get: as if it had never been there.
        if let Some(value) = subject.get(name)? {
            found.push((name.to_vec(), value));
        }
    }
    found.sort();
    Ok(found)
}

/// The names in what listxattr(2) gives.
pub fn names(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    list.split(|byte| *byte == 0).filter(|name| !name.is_empty())
}

/// Whether an archive's attribute is to be set at all.
pub fn is_wanted(name: &[u8], value: &[u8]) -> bool {
    is_content(name) && (name != CAPABILITY || is_capability(value))
}

/// Whether an attribute that was refused with `error` can be left out.
///
/// `special` is anything but a regular file or a directory: those take no `user.` attributes, and
/// archives that carry some are common enough that the peers ignore it. So is an attribute in a
/// namespace that Linux doesn't have (`com.apple.…`).
pub(crate) fn may_leave_out(name: &[u8], error: Errno, special: bool) -> bool {
    match error {
        Errno::PERM => special,
        Errno::OPNOTSUPP => special || !is_known(name),
        _ => false,
    }
}

/// Sets what is content; says how many attributes were left out. `special` is anything but a regular file or a directory.
pub(crate) fn write(subject: Subject<'_>, xattrs: &[(Vec<u8>, Vec<u8>)], special: bool) -> Result<u64> {
    let mut left_out = 0;
    for (name, value) in xattrs {
        if !is_wanted(name, value) {
            left_out += 1;
            continue;
        }
        match subject.set(name, value) {
            Ok(()) => {}
            Err(error) if may_leave_out(name, error, special) => left_out += 1,
            Err(error) => return Err(error),
        }
    }
    Ok(left_out)
}

/// Whether losing this attribute would lose something that works on Linux.
fn is_known(name: &[u8]) -> bool {
    name.starts_with(b"user.") || name.starts_with(b"trusted.") || name.starts_with(b"system.") || name == CAPABILITY
}

/// Removes the attributes that are content and not in `wanted`.
pub(crate) fn remove_others(subject: Subject<'_>, wanted: &[(Vec<u8>, Vec<u8>)]) -> Result<()> {
    let list = subject.list()?;
    for name in names(&list).filter(|name| is_content(name)) {
        if !wanted.iter().any(|(kept, _)| kept == name) {
            subject.remove(name)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn m01_m02_m03_what_belongs_to_the_machine_is_not_content() {
        for name in [
            &b"trusted.overlay.opaque"[..],
            b"trusted.overlay.redirect",
            b"trusted.overlay.metacopy",
            b"trusted.overlay.overlay.opaque",
            b"user.overlay.whiteout",
            b"security.selinux",
            b"security.ima",
            b"security.evm",
        ] {
            assert!(!is_content(name), "{}", name.escape_ascii());
        }
        for name in [&b"security.capability"[..], b"user.note", b"trusted.note", b"system.posix_acl_access"] {
            assert!(is_content(name), "{}", name.escape_ascii());
        }
    }

    #[test]
    fn m03_only_capabilities_that_the_kernel_knows() {
        let mut v2 = vec![0; 20];
        v2[3] = 2;
        assert!(is_capability(&v2));
        let mut v3 = vec![0; 24];
        v3[3] = 3;
        assert!(is_capability(&v3));
        assert!(!is_capability(&v3[..20]));
        assert!(!is_capability(&[0; 20]));
        assert!(!is_capability(b""));
    }
}
