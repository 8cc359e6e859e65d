use std::fmt;
use std::str::FromStr;

use oci_spec::distribution;

use crate::{BlobDigest, DigestError, ErrorKind};

/// The registry that a bare name means, by docker's convention.
const DEFAULT_REGISTRY: &str = "docker.io";
/// The namespace of bare names there.
const DEFAULT_NAMESPACE: &str = "library/";

/// Why a string is not an image reference.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceError {
    /// Not of the form `[host/]name[:tag][@digest]`.
    #[error("{text:?} is not an image reference, expected [host/]name[:tag][@sha256:…]")]
    Format {
        /// What was given.
        text: String,
        /// Which part is wrong.
        #[source]
        source: distribution::ParseError,
    },
    /// The digest part is not one that we accept.
    #[error("{text:?} has a bad digest")]
    Digest {
        /// What was given.
        text: String,
        /// What is wrong with it.
        #[source]
        source: DigestError,
    },
}

impl ReferenceError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidInput
    }
}

/// An image name as a user writes it, completed by docker's rules: `busybox` means
/// `docker.io/library/busybox:latest`. A digest pins what the name may stand for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<BlobDigest>,
}

impl Reference {
    /// The host (with port) that would serve it.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository there, with the `library/` of bare names.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag; `None` only when a digest stands in its place.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if one was given.
    pub fn digest(&self) -> Option<BlobDigest> {
        self.digest
    }

    /// The name without tag and digest, as short as docker prints it.
    pub fn familiar_name(&self) -> String {
        if self.registry != DEFAULT_REGISTRY {
            return format!("{}/{}", self.registry, self.repository);
        }
        self.repository.strip_prefix(DEFAULT_NAMESPACE).unwrap_or(&self.repository).to_owned()
    }

    /// The whole reference, as short as docker prints it.
    pub fn familiar(&self) -> String {
        self.familiar_name() + &self.suffix()
    }

    fn suffix(&self) -> String {
        let tag = self.tag.iter().map(|tag| format!(":{tag}"));
        tag.chain(self.digest.map(|digest| format!("@{digest}"))).collect()
    }
}

/// The full form; it parses back to the same reference.
impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}{}", self.registry, self.repository, self.suffix())
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let format = |source| ReferenceError::Format { text: text.chars().take(300).collect(), source };
        let parsed: distribution::Reference = text.parse().map_err(format)?;
        // Docker's image store keeps this name for IDs; a name made of 64 hex digits would shadow one.
        if parsed
            .repository()
            .strip_prefix(DEFAULT_NAMESPACE)
            .is_some_and(|name| crate::ImageId::from_hex(name).is_ok())
        {
            return Err(format(distribution::ParseError::ReferenceInvalidFormat));
        }
        let digest = parsed.digest().map(str::parse).transpose();
        Ok(Self {
            registry: parsed.registry().to_owned(),
            repository: parsed.repository().to_owned(),
            tag: parsed.tag().map(str::to_owned),
            digest: digest.map_err(|source| ReferenceError::Digest { text: text.to_owned(), source })?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_and_shortened_as_docker_does() {
        for (text, full, familiar) in [
            ("busybox", "docker.io/library/busybox:latest", "busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36", "busybox:1.36"),
            ("me/app", "docker.io/me/app:latest", "me/app:latest"),
            ("localhost:5000/a/b:t", "localhost:5000/a/b:t", "localhost:5000/a/b:t"),
            ("localhost/app", "localhost/app:latest", "localhost/app:latest"),
            ("index.docker.io/library/x", "docker.io/library/x:latest", "x:latest"),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!((reference.to_string().as_str(), reference.familiar().as_str()), (full, familiar));
            assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
        }
        let pinned = format!("app@sha256:{}", "0a".repeat(32));
        let reference: Reference = pinned.parse().unwrap();
        assert_eq!((reference.tag(), reference.familiar()), (None, pinned));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for bad in ["", "UPPER", "a b", "../x", "x:", ":x", "a//b", "x@sha256:00", "-x", &"0a".repeat(32)] {
            assert!(bad.parse::<Reference>().is_err(), "{bad:?} must not parse");
        }
        assert!(format!("x@sha512:{}", "0a".repeat(64)).parse::<Reference>().is_err());
    }
}
