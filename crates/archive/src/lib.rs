//! Layer archives: a strict tar reader and writer, whiteouts, apply, diff, seal, tar-split, compression.

pub mod compress;
pub mod limits;
pub mod tar;
pub mod tarsplit;

pub use limits::{LimitExceeded, Limits};
