//! The vocabulary of Plies: digests, descriptors, manifests, configs, references.
//!
//! This crate does no I/O. It turns bytes that somebody else read into types that cannot be
//! mixed up (a diff ID never passes for a blob digest), and it keeps the bytes: the identity of
//! a document is the digest of what was received, never of what we would write.
//!
//! - [`BlobDigest`], [`DiffId`], [`ChainId`], [`ImageId`]: sha256 under four names.
//! - [`Descriptor`]: media type, digest and size of a blob elsewhere.
//! - [`Manifest`], [`Index`], [`ImageConfig`]: parsed documents with their raw bytes.
//! - [`MediaType`] helpers: what a blob is, whichever of the two families named it.
//! - [`Reference`]: `host/name:tag@digest` as a user writes it.
//! - [`ErrorKind`]: what a caller can do about an error, the same ten words in every crate.

mod document;
mod id;
mod kind;
mod media;
mod reference;

pub use document::{Document, DocumentError, DocumentLimits, ImageConfig, Index, Manifest, check_unique_keys};
pub use id::{BlobDigest, ChainId, DiffId, DigestError, ImageId, Sha256Hasher};
pub use kind::ErrorKind;
pub use media::{Compression, Family, MediaClass, MediaType, classify};
pub use reference::{Reference, ReferenceError};

pub use document::{Descriptor, Platform, PlatformError};
pub use oci_spec;
