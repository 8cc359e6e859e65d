//! A client of image registries, by the OCI distribution specification and docker's conventions.
//!
//! ```text
//! host.rs         which address serves a host: mirrors, plain HTTP, certificates
//! credentials.rs  docker's config.json and credential helpers
//! auth.rs         what to put into Authorization: basic, or a bearer token and its cache
//! http.rs         one request: redirects, what may be sent where, trying again
//! pull.rs         manifests, blobs, parts of blobs
//! push.rs         is it there, mount it, upload it; manifests
//! download.rs     files that are no registry's, for `ADD`
//! ```
//!
//! Everything blocks, and [`Client::stop`] ends what blocks from another thread. A client serves one request of a user,
//! from many threads at once; what it learns (schemes, tokens) goes with it.
//!
//! # What a registry may not do
//! A registry is not trusted with more than the bytes it is asked for, and those are checked by whoever asked: by digest
//! and size. A secret goes to the host that it is for, to the token service that the host names if that is a neighbour
//! of it or was allowed by the user, and nowhere else: not to where a redirect leads, not into an error's text, not over
//! plain HTTP unless the host itself is spoken to so.

mod auth;
mod credentials;
mod download;
mod error;
mod host;
mod http;
mod pull;
mod push;

pub use credentials::{CredentialError, Credentials};
pub use download::Download;
pub use error::RegistryError;
pub use host::{HostConfig, KeyPair, Repository};
pub use http::{Client, ClientOptions, Open, Proxies, RetryPolicy};
pub use pull::{BlobReader, Fetched};
pub use push::{PushedBlob, Upload};
