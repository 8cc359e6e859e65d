//! Content hashes: what of a tree's files counts, and how trees are walked for it.
//!
//! ```text
//! header.rs    what of a file counts, and in which form it is hashed
//! walk.rs      one entry of a tree after the other, with rules that show and hide
//! inroot.rs    resolution of hostile paths inside a directory handle
//! wildcard.rs  what a path with wildcards stands for
//! patterns.rs  lists of patterns, as in `.dockerignore`
//! glob.rs      one pattern
//! ```

pub mod glob;
pub mod header;
pub mod inroot;
pub mod patterns;
pub mod walk;
pub mod wildcard;
