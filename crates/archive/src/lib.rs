//! Layer archives: a strict tar reader and writer, whiteouts, apply, diff, seal, tar-split, compression.

mod apply;
pub mod compress;
pub mod hash;
pub mod limits;
pub mod prefetch;
pub mod tar;
pub mod tarsplit;
pub mod tree;
pub mod whiteout;
mod xattr;

pub use apply::{Applied, ApplyError, ApplyStyle, BaseNeed, Refusal, apply};
pub use index::{DirIndex, IndexError, Usage};
pub use limits::{LimitExceeded, Limits};
pub use root::Root;
