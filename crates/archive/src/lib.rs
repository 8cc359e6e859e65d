//! Layer archives: a strict tar reader and writer, whiteouts, apply, diff, seal, tar-split, compression.

pub mod tar;
