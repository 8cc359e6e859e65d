//! Layer archives: a strict tar reader and writer, whiteouts, apply, diff, seal, tar-split, compression.

mod apply;
mod changes;
pub mod compress;
mod confine;
mod diff;
pub mod erofs;
pub mod hash;
mod index;
pub mod limits;
pub mod prefetch;
mod root;
mod seal;
mod sys;
pub mod tar;
pub mod tarsplit;
#[cfg(test)]
mod testing;
pub mod tree;
mod unpack;
pub mod whiteout;
pub mod xattr;

pub use apply::{Applied, ApplyError, ApplyStyle, BaseNeed, NewOwner, Refusal, apply};
pub use changes::{Change, ChangeKind, UpperForm, changes};
pub use diff::{At, DiffError, diff_trees, is_newer, layer_to_tar, same_file};
pub use index::{DirIndex, Implied, IndexError, Usage};
pub use limits::{LimitExceeded, Limits};
pub use root::Root;
pub use seal::{Lower, SealError, Sealed, same_directory, seal_over, seal_upper};
pub use unpack::{Packed, Received, UnpackError, Unpacked, pack, receive, unpack};
