//! What the kernel makes of extended attributes that are set on a file, done without one.

use rustix::io::{Errno, Result};

use crate::xattr::{self, ACL_ACCESS, ACL_DEFAULT, Xattrs};

/// What an attribute is set on, as far as that matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sort {
    Directory,
    File,
    Symlink,
    /// A device or a named pipe.
    Special,
}

/// Sets what is content; says how many attributes were left out. The same are left out, and the same are errors, as in
/// [`xattr::write`].
pub(super) fn set(xattrs: &mut Xattrs, wanted: &[(Vec<u8>, Vec<u8>)], sort: Sort) -> Result<u64> {
    let mut left_out = 0;
    for (name, value) in wanted {
        if !xattr::is_wanted(name, value) {
            left_out += 1;
            continue;
        }
        match accept(name, value, sort) {
            Ok(value) => put(xattrs, name, value),
            Err(error) if xattr::may_leave_out(name, error, matches!(sort, Sort::Symlink | Sort::Special)) => {
                left_out += 1;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(left_out)
}

/// What becomes of a value; `None` means that there is no such attribute afterwards.
fn accept(name: &[u8], value: &[u8], sort: Sort) -> Result<Option<Vec<u8>>> {
    if name == ACL_ACCESS || name == ACL_DEFAULT {
        return match sort {
            Sort::Symlink => Err(Errno::OPNOTSUPP),
            _ => Acl::parse(value).and_then(|acl| match acl {
                // Only directories have a default list.
                Some(_) if name == ACL_DEFAULT && sort != Sort::Directory => Err(Errno::ACCESS),
                acl => acl.map(|acl| acl.checked().map(|acl| acl.bytes())).transpose(),
            }),
        };
    }
    let suffix = ["user.", "trusted.", "security."].iter().find_map(|prefix| name.strip_prefix(prefix.as_bytes()));
    match suffix {
        None => Err(Errno::OPNOTSUPP),
        Some(b"") => Err(Errno::INVAL),
        Some(_) if name.starts_with(b"user.") && matches!(sort, Sort::Symlink | Sort::Special) => Err(Errno::PERM),
        Some(_) => Ok(Some(value.to_vec())),
    }
}

fn put(xattrs: &mut Xattrs, name: &[u8], value: Option<Vec<u8>>) {
    let place = xattrs.binary_search_by(|(has, _)| has.as_slice().cmp(name));
    match (place, value) {
        (Ok(at), Some(value)) => xattrs[at].1 = value,
        (Ok(at), None) => drop(xattrs.remove(at)),
        (Err(at), Some(value)) => xattrs.insert(at, (name.to_vec(), value)),
        (Err(_), None) => {}
    }
}

/// A new owner takes away a file's capabilities.
pub(super) fn change_owner(xattrs: &mut Xattrs) {
    put(xattrs, xattr::CAPABILITY, None);
}

/// A new mode is written into the access control list, and a list that says no more than the mode goes.
pub(super) fn change_mode(xattrs: &mut Xattrs, mode: u32) {
    let Some((_, value)) = xattrs.iter().find(|(name, _)| name == ACL_ACCESS) else { return };
    // It was parsed when it was set.
    if let Ok(Some(acl)) = Acl::parse(value) {
        put(xattrs, ACL_ACCESS, acl.with_mode(mode));
    }
}

/// An access control list as attributes carry it (include/uapi/linux/posix_acl_xattr.h): a version, then 8 bytes an entry.
struct Acl(Vec<AclEntry>);

#[derive(Clone, Copy)]
struct AclEntry {
    tag: u16,
    permissions: u16,
    id: u32,
}

const ACL_VERSION: u32 = 2;
/// The one that has no id.
const NO_ID: u32 = u32::MAX;

/// Tags of entries (include/uapi/linux/posix_acl.h).
mod tag {
    pub(super) const USER_OBJ: u16 = 0x01;
    pub(super) const USER: u16 = 0x02;
    pub(super) const GROUP_OBJ: u16 = 0x04;
    pub(super) const GROUP: u16 = 0x08;
    pub(super) const MASK: u16 = 0x10;
    pub(super) const OTHER: u16 = 0x20;
}

impl Acl {
    /// `None` for one without entries, which means that there is none.
    fn parse(value: &[u8]) -> Result<Option<Self>> {
        let (version, rest) = value.split_first_chunk::<4>().ok_or(Errno::INVAL)?;
        if u32::from_le_bytes(*version) != ACL_VERSION {
            return Err(Errno::OPNOTSUPP);
        }
        let entry = |bytes: &[u8]| {
            let tag = u16::from_le_bytes([bytes[0], bytes[1]]);
            let id = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
            let named = matches!(tag, tag::USER | tag::GROUP);
            match tag {
                tag::USER_OBJ | tag::USER | tag::GROUP_OBJ | tag::GROUP | tag::MASK | tag::OTHER
                    if !(named && id == NO_ID) =>
                {
                    let id = if named { id } else { NO_ID };
                    Ok(AclEntry { tag, permissions: u16::from_le_bytes([bytes[2], bytes[3]]), id })
                }
                _ => Err(Errno::INVAL),
            }
        };
        let entries = rest.chunks_exact(8);
        if !entries.remainder().is_empty() {
            return Err(Errno::INVAL);
        }
        let entries = entries.map(entry).collect::<Result<Vec<_>>>()?;
        Ok((!entries.is_empty()).then_some(Self(entries)))
    }

    /// Refuses what `posix_acl_valid` (fs/posix_acl.c) refuses: entries in another order than that of their tags, one of
    /// the single ones missing or twice, no mask where somebody is named, unknown permissions.
    fn checked(self) -> Result<Self> {
        let count = |tag| self.0.iter().filter(|entry| entry.tag == tag).count();
        let single = [tag::USER_OBJ, tag::GROUP_OBJ, tag::OTHER].into_iter().all(|tag| count(tag) == 1);
        let masks = count(tag::MASK);
        let named = count(tag::USER) + count(tag::GROUP) > 0;
        let ordered = self.0.is_sorted_by_key(|entry| entry.tag);
        let known = self.0.iter().all(|entry| entry.permissions <= 7);
        let valid = single && masks <= 1 && (masks == 1 || !named) && ordered && known;
        if valid { Ok(self) } else { Err(Errno::INVAL) }
    }

    /// What a change of mode makes of it: the classes take the mode's permissions, of the group's the mask if there is one.
    fn with_mode(mut self, mode: u32) -> Option<Vec<u8>> {
        let has_mask = self.0.iter().any(|entry| entry.tag == tag::MASK);
        for entry in &mut self.0 {
            let shift = match entry.tag {
                tag::USER_OBJ => 6,
                tag::MASK => 3,
                tag::GROUP_OBJ if !has_mask => 3,
                tag::OTHER => 0,
                _ => continue,
            };
            entry.permissions = ((mode >> shift) & 7) as u16;
        }
        has_mask.then(|| self.bytes())
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = ACL_VERSION.to_le_bytes().to_vec();
        for entry in &self.0 {
            bytes.extend(entry.tag.to_le_bytes());
            bytes.extend(entry.permissions.to_le_bytes());
            bytes.extend(entry.id.to_le_bytes());
        }
        bytes
    }
}
