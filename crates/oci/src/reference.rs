use std::fmt;
use std::str::FromStr;

use crate::{BlobDigest, DigestError, ErrorKind};

/// The registry that a bare name means, by docker's convention.
const DEFAULT_REGISTRY: &str = "docker.io";
/// What docker called it before.
const LEGACY_REGISTRY: &str = "index.docker.io";
/// The tag of a name that has neither tag nor digest.
const DEFAULT_TAG: &str = "latest";
/// Characters of registry and repository together (distribution, `reference.go`, `RepositoryNameTotalLengthMax`).
const NAME_CHARS_MAX: usize = 255;
/// Characters of a tag (distribution-spec, "Pulling manifests").
const TAG_CHARS_MAX: usize = 128;
/// The namespace of bare names there.
const DEFAULT_NAMESPACE: &str = "library/";

/// Why a string is not an image reference.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceError {
    /// Not of the form `[host/]name[:tag][@digest]`.
    #[error("{text:?} is not an image reference, expected [host/]name[:tag][@sha256:…]: {why}")]
    Format {
        /// What was given.
        text: String,
        /// What is wrong with it.
        why: &'static str,
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

    /// What has this digest under the same name, whatever the tag stands for.
    #[must_use]
    pub fn with_digest(&self, digest: BlobDigest) -> Self {
        Self { tag: None, digest: Some(digest), ..self.clone() }
    }

    /// The name without tag and digest, as short as docker prints it, and no shorter than means the same.
    pub fn familiar_name(&self) -> String {
        let full = format!("{}/{}", self.registry, self.repository);
        if self.registry != DEFAULT_REGISTRY {
            return full;
        }
        // `library/a/b` is not `a/b`, and `docker.io/x.org/a` not on x.org.
        let means_this = |short: &&str| {
            let read = short.parse::<Self>();
            read.is_ok_and(|read| read.registry == self.registry && read.repository == self.repository)
        };
        let short = self.repository.strip_prefix(DEFAULT_NAMESPACE).into_iter().chain([self.repository.as_str()]);
        short.into_iter().find(means_this).map_or(full, str::to_owned)
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

/// The grammar of distribution's `reference` package, read by hand: the regular expression that defines it takes
/// longer to compile than most commands take to run.
impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let wrong = |why| ReferenceError::Format { text: text.chars().take(300).collect(), why };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                let digest =
                    digest.parse().map_err(|source| ReferenceError::Digest { text: text.to_owned(), source })?;
                (rest, Some(digest))
            }
            None => (text, None),
        };
        // A colon after the last slash parts the tag; one before it parts a port.
        let name_end = rest.rfind('/').map_or(0, |slash| slash + 1);
        let (name, tag) = match rest[name_end..].find(':') {
            Some(colon) => (&rest[..name_end + colon], Some(&rest[name_end + colon + 1..])),
            None => (rest, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(wrong("a tag is up to 128 letters, digits, '_', '.' and '-'"));
        }
        // By docker's rule the first part is a host if it could not be a part of a name, or is "localhost".
        let host = name.split_once('/').filter(|(first, _)| {
            first.contains(['.', ':']) || *first == "localhost" || first.chars().any(|c| c.is_ascii_uppercase())
        });
        let (registry, path) = host.unwrap_or((DEFAULT_REGISTRY, name));
        if host.is_some() && !is_host(registry) {
            return Err(wrong("the host is not one"));
        }
        if path.is_empty() || !path.split('/').all(is_path_component) {
            return Err(wrong("a name is lower-case letters and digits, parted by '/', '.', '_', '__' or '-'"));
        }
        let registry = if registry == LEGACY_REGISTRY { DEFAULT_REGISTRY } else { registry };
        let namespace = if registry == DEFAULT_REGISTRY && !path.contains('/') { DEFAULT_NAMESPACE } else { "" };
        let repository = format!("{namespace}{path}");
        if registry.len() + 1 + repository.len() > NAME_CHARS_MAX {
            return Err(wrong("host and name have more than 255 characters"));
        }
        // Either would shadow the ID of another image.
        if crate::ImageId::from_hex(name).is_ok() || name == "sha256" {
            return Err(wrong("that is the form of an ID, not a name"));
        }
        let tag = tag.or(if digest.is_none() { Some(DEFAULT_TAG) } else { None }).map(str::to_owned);
        Ok(Self { registry: registry.to_owned(), repository, tag, digest })
    }
}

fn is_tag(tag: &str) -> bool {
    tag.len() <= TAG_CHARS_MAX
        && tag.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && tag.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

/// Letters and digits, with single separators between: `.`, `_`, `__`, or any number of `-`.
fn is_path_component(component: &str) -> bool {
    let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let is_separator = |text: &str| matches!(text, "." | "_" | "__") || text.bytes().all(|c| c == b'-');
    component.starts_with(is_word)
        && component.ends_with(is_word)
        && component.split(is_word).filter(|between| !between.is_empty()).all(is_separator)
}

fn is_host(host: &str) -> bool {
    let (name, port) = host.split_once(':').unwrap_or((host, "0"));
    let is_label = |label: &str| {
        let is_word = |c: char| c.is_ascii_alphanumeric();
        label.starts_with(is_word) && label.ends_with(is_word) && label.chars().all(|c| is_word(c) || c == '-')
    };
    name.split('.').all(is_label) && !port.is_empty() && port.bytes().all(|c| c.is_ascii_digit())
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
            ("library/a/b", "docker.io/library/a/b:latest", "library/a/b:latest"),
            ("docker.io/x.org/a", "docker.io/x.org/a:latest", "docker.io/x.org/a:latest"),
            ("library/sha256", "docker.io/library/sha256:latest", "library/sha256:latest"),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!((reference.to_string().as_str(), reference.familiar().as_str()), (full, familiar));
            assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
            assert_eq!(reference.familiar().parse::<Reference>().unwrap(), reference);
        }
        let pinned = format!("app@sha256:{}", "0a".repeat(32));
        let reference: Reference = pinned.parse().unwrap();
        assert_eq!((reference.tag(), reference.familiar()), (None, pinned));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for bad in ["", "UPPER", "a b", "../x", "x:", ":x", "a//b", "x@sha256:00", "-x", "sha256:1", &"0a".repeat(32)] {
            assert!(bad.parse::<Reference>().is_err(), "{bad:?} must not parse");
        }
        assert!(format!("x@sha512:{}", "0a".repeat(64)).parse::<Reference>().is_err());
    }

    #[test]
    fn what_could_be_taken_for_an_id_is_no_name() {
        for id in ["sha256", "sha256:latest", &format!("sha256:{}", "0a".repeat(32)), &"0a".repeat(32)] {
            assert!(matches!(id.parse::<Reference>(), Err(ReferenceError::Format { .. })), "{id}");
        }
        for name in ["sha256/app", "localhost/sha256:1", "sha256sum"] {
            assert!(name.parse::<Reference>().is_ok(), "{name}");
        }
    }

    proptest::proptest! {
        /// The oracle compiles the grammar's own regular expression. (It takes a host with upper-case letters for a part of
        /// the name, unlike docker, so there are none.)
        #[test]
        fn verdicts_and_parts_are_those_of_the_grammar(
            text in "([a-z0-9.-]{1,6}(:[0-9]{0,2})?/)?[a-z0-9]{0,3}([._-]{0,3}[a-z/0-9]{0,3}){0,3}(:[a-zA-Z0-9._-]{0,4})?",
        ) {
            let theirs = text.parse::<oci_spec::distribution::Reference>();
            match (text.parse::<Reference>(), theirs) {
                (Ok(ours), Ok(theirs)) => {
                    assert_eq!(ours.registry(), theirs.registry(), "{text}");
                    assert_eq!(ours.repository(), theirs.repository(), "{text}");
                    assert_eq!(ours.tag(), theirs.tag(), "{text}");
                }
                (Err(_), Err(_)) => {}
                (ours, theirs) => panic!("{text}: {ours:?}, the oracle says {theirs:?}"),
            }
        }
    }
}
