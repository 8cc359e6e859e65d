use std::io;
use std::path::PathBuf;
use std::time::Duration;

use plies_oci::{BlobDigest, ErrorKind};

use crate::CredentialError;

/// Why a registry did not do what it was asked for. No variant's text holds a secret: addresses are without queries, and
/// what a registry says is shown only if it does not repeat what was sent to it in confidence.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// It can't be reached, or the connection broke.
    #[error("talk to {url}")]
    Connection {
        /// The address.
        url: String,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// It does not have it.
    #[error("{url} is not there{detail}")]
    NotFound {
        /// The address.
        url: String,
        /// What it says itself, after `: `; may be empty.
        detail: String,
    },
    /// It wants other credentials, or none would do.
    #[error("{host} denies access to {what}{detail} ({hint})")]
    Denied {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
        /// What it says itself, after `: `; may be empty.
        detail: String,
        /// What to do.
        hint: String,
    },
    /// It answered, but not with success.
    #[error("{url} answers {status}{detail}")]
    Status {
        /// The address.
        url: String,
        /// The HTTP status.
        status: u16,
        /// What it says itself, after `: `; may be empty.
        detail: String,
        /// When to come back, if it says so.
        retry_after: Option<Duration>,
    },
    /// It wants to be left alone for longer than anybody waits here.
    #[error("{url} asks to come back in {} seconds", wait.as_secs())]
    TooBusy {
        /// The address.
        url: String,
        /// How long.
        wait: Duration,
    },
    /// It answers in a way that the specification does not know.
    #[error("{url}: {why}")]
    Protocol {
        /// The address.
        url: String,
        /// What is wrong.
        why: String,
    },
    /// A document is larger than is read.
    #[error("{url} has more than {maximum} bytes ({limit})")]
    TooLarge {
        /// The address.
        url: String,
        /// The limit's value in bytes.
        maximum: u64,
        /// The limit's name.
        limit: &'static str,
    },
    /// Other bytes than were asked for.
    #[error("{url} has other bytes: they give {actual}, expected {expected}")]
    Digest {
        /// The address.
        url: String,
        /// As asked for.
        expected: BlobDigest,
        /// As received.
        actual: BlobDigest,
    },
    /// Too many or too few bytes.
    #[error("{url} has {actual} bytes, its descriptor says {expected}")]
    Size {
        /// The address.
        url: String,
        /// As described.
        expected: u64,
        /// As received.
        actual: u64,
    },
    /// A redirect that is not followed.
    #[error("{from} redirects to {to}, which is not followed: {why}")]
    Redirect {
        /// The address.
        from: String,
        /// Where it leads.
        to: String,
        /// Why not.
        why: &'static str,
    },
    /// A token service that is not asked.
    #[error("{host} names {realm} as its token service, which is not asked: {why}")]
    Realm {
        /// The registry.
        host: String,
        /// The token service.
        realm: String,
        /// Why not.
        why: String,
    },
    /// Credentials could not be had.
    #[error(transparent)]
    Credentials(#[from] CredentialError),
    /// A file of certificates, or the system's.
    #[error("read certificates from {}", path.display())]
    Certificates {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The address of a proxy.
    #[error("the proxy's address is not one, expected http://host:port")]
    Proxy,
    /// What is to be pushed could not be read.
    #[error("read what is to be pushed")]
    Local(#[source] io::Error),
    /// [`crate::Client::stop`] was called.
    #[error("stopped")]
    Stopped,
}

impl RegistryError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Connection { .. } | Self::TooBusy { .. } => ErrorKind::Unavailable,
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Denied { .. } | Self::Redirect { .. } | Self::Realm { .. } => ErrorKind::FailedPrecondition,
            Self::Status { status, .. } if *status >= 500 || [408, 429].contains(status) => ErrorKind::Unavailable,
            Self::Status { .. } | Self::Protocol { .. } => ErrorKind::Internal,
            Self::TooLarge { .. } => ErrorKind::Limit,
            Self::Digest { .. } | Self::Size { .. } => ErrorKind::DataLoss,
            Self::Credentials(source) => source.kind(),
            Self::Certificates { .. } | Self::Proxy => ErrorKind::InvalidInput,
            Self::Local(_) => ErrorKind::Unavailable,
            Self::Stopped => ErrorKind::Canceled,
        }
    }

    /// Whether the same may go well a moment later.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Connection { source, .. } => {
                // Nobody listens, there is no such host, or it is not who it says it is: that stays so.
                !matches!(
                    source.kind(),
                    io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound | io::ErrorKind::InvalidData
                )
            }
            // 501 and 505 say that it cannot, not that it cannot now.
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500 | 502 | 503 | 504),
            _ => false,
        }
    }
}
