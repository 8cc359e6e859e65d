//! Manifests and blobs out of a registry.

use std::fmt;
use std::io::{self, Read};
use std::sync::Arc;

use plies_oci::{BlobDigest, Descriptor, MediaType, Reference, classify};
use serde::Deserialize;
use ureq::Body;
use ureq::http::header;
use ureq::http::{Response, StatusCode};

use crate::auth::Scope;
use crate::host::Endpoint;
use crate::http::{Call, said_digest, shown};
use crate::{Client, RegistryError, Repository};

/// What documents are asked for: both families of manifests and indexes.
const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json";

/// Bytes after which a connection counts as a good one, so that what broke before is forgotten. A blob is then fetched
/// over however many connections it takes, and one that brings nothing ends after a few.
const GOOD_BYTES: u64 = 64 << 10;

/// A manifest or an index, as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// Its media type, digest and size.
    pub descriptor: Descriptor,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl Client {
    /// Fetches what a reference points at: a manifest, or an index of several. Its digest is that of the bytes that came;
    /// one that the reference names, or the registry says, must be the same.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn resolve(&self, reference: &Reference) -> Result<Fetched, RegistryError> {
        let repository = Repository::of(reference);
        let name = match reference.digest() {
            Some(digest) => digest.to_string(),
            None => reference.tag().expect("because a reference has a tag or a digest").to_owned(),
        };
        self.ask_any(&repository, |endpoint| self.manifest_at(endpoint, &repository, &name, reference.digest()))
    }

    /// Fetches a manifest or an index that a descriptor describes.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn manifest(&self, repository: &Repository, descriptor: &Descriptor) -> Result<Vec<u8>, RegistryError> {
        let (digest, expected) = (descriptor.digest, descriptor.size_bytes);
        self.ask_any(repository, |endpoint| {
            let fetched = self.manifest_at(endpoint, repository, &digest.to_string(), Some(digest))?;
            match fetched.descriptor.size_bytes {
                actual if actual == expected => Ok(fetched.bytes),
                actual => {
                    Err(RegistryError::Size { url: manifest_url(endpoint, repository, digest), expected, actual })
                }
            }
        })
    }

    /// Fetches a small blob, such as a config, whole.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn small_blob(
        &self,
        repository: &Repository,
        descriptor: &Descriptor,
        maximum: u64,
        limit: &'static str,
    ) -> Result<Vec<u8>, RegistryError> {
        let (digest, expected) = (descriptor.digest, descriptor.size_bytes);
        self.ask_any(repository, |endpoint| {
            let url = endpoint.url(repository, &format!("blobs/{digest}"));
            if expected > maximum {
                return Err(RegistryError::TooLarge { url: shown(&url), maximum, limit });
            }
            let scopes = [Scope::pull(endpoint.name_of(repository))];
            let response = self.send(&Call::get(endpoint, repository, &scopes, url.clone()))?;
            let bytes = self.read_all(response, &url, maximum, limit)?;
            let actual = bytes.len() as u64;
            if actual != expected {
                return Err(RegistryError::Size { url: shown(&url), expected, actual });
            }
            same_digest(&url, digest, BlobDigest::of(&bytes))?;
            Ok(bytes)
        })
    }

    /// Begins to fetch a blob from `offset` on. Connections that break are taken up again where they did. The bytes are
    /// not hashed here: the reader knows those before `offset`.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn blob(
        self: &Arc<Self>,
        repository: &Repository,
        descriptor: &Descriptor,
        offset: u64,
    ) -> Result<BlobReader, RegistryError> {
        let mut reader = BlobReader {
            client: Arc::clone(self),
            repository: repository.clone(),
            endpoints: Endpoint::all(&repository.host, &self.options.hosts),
            digest: descriptor.digest,
            size_bytes: descriptor.size_bytes,
            position: offset,
            body: None,
            failures: 0,
            good_bytes: 0,
            ranges: true,
        };
        reader.connect()?;
        Ok(reader)
    }

    /// Asks the mirrors of a host, each once, and then the host itself, patiently. What a mirror does wrong is no failure.
    fn ask_any<T>(
        &self,
        repository: &Repository,
        mut ask: impl FnMut(&Endpoint) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        for mirror in Endpoint::all(&repository.host, &self.options.hosts).iter().filter(|one| one.mirror_of.is_some())
        {
            match ask(mirror) {
                Err(RegistryError::Stopped) => return Err(RegistryError::Stopped),
                Err(_) => {}
                found => return found,
            }
        }
        let own = Endpoint::own(&repository.host, &self.options.hosts);
        self.patiently(|_| ask(&own))
    }

    fn manifest_at(
        &self,
        endpoint: &Endpoint,
        repository: &Repository,
        name: &str,
        expected: Option<BlobDigest>,
    ) -> Result<Fetched, RegistryError> {
        let url = manifest_url(endpoint, repository, name);
        let scopes = [Scope::pull(endpoint.name_of(repository))];
        let mut call = Call::get(endpoint, repository, &scopes, url.clone());
        call.headers.push((header::ACCEPT, ACCEPT.to_owned()));
        let response = self.send(&call)?;
        let said = said_digest(&response);
        let content_type = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let content_type = content_type.map(|text| text.split(';').next().unwrap_or_default().trim().to_owned());
        let bytes = self.read_all(response, &url, self.options.limits.manifest_bytes, "limits.manifest-bytes")?;
        let digest = BlobDigest::of(&bytes);
        for wanted in expected.into_iter().chain(said) {
            same_digest(&url, wanted, digest)?;
        }
        let media_type = media_type_of(content_type, &bytes);
        Ok(Fetched { descriptor: Descriptor::new(media_type, digest, bytes.len() as u64), bytes })
    }

    fn read_all(
        &self,
        response: Response<Body>,
        url: &str,
        maximum: u64,
        limit: &'static str,
    ) -> Result<Vec<u8>, RegistryError> {
        let too_large = || RegistryError::TooLarge { url: shown(url), maximum, limit };
        // Its limit is the first length that is too much.
        match response.into_body().into_with_config().limit(maximum + 1).read_to_vec() {
            Ok(bytes) if bytes.len() as u64 > maximum => Err(too_large()),
            Err(ureq::Error::BodyExceedsLimit(_)) => Err(too_large()),
            read => read.map_err(|error| self.broken(url, error)),
        }
    }

    /// Begins to read a blob at `position` from one address. `None`: it does not give parts of it.
    fn blob_at(
        &self,
        endpoint: &Endpoint,
        wanted: &BlobReader,
        position: u64,
        by_range: bool,
    ) -> Result<Option<Box<dyn Read + Send>>, RegistryError> {
        let (repository, size) = (&wanted.repository, wanted.size_bytes);
        let url = endpoint.url(repository, &format!("blobs/{}", wanted.digest));
        let scopes = [Scope::pull(endpoint.name_of(repository))];
        let mut call = Call::get(endpoint, repository, &scopes, url.clone());
        if by_range {
            call.headers.push((header::RANGE, format!("bytes={position}-")));
        }
        let response = self.send_any(&call)?;
        let has = |actual| RegistryError::Size { url: shown(&url), expected: size, actual };
        let begins_at = match response.status() {
            StatusCode::OK => match response.body().content_length() {
                Some(actual) if actual != size => return Err(has(actual)),
                _ => 0,
            },
            StatusCode::PARTIAL_CONTENT => match content_range(&response) {
                Some((_, Some(total))) if total != size => return Err(has(total)),
                // One that begins earlier than it was asked to is as good as the whole.
                Some((first, _)) if first <= position => first,
                _ => return Ok(None),
            },
            StatusCode::RANGE_NOT_SATISFIABLE if by_range => return Ok(None),
            _ => return Err(self.refused(&call, response)),
        };
        let mut body = response.into_body().into_reader();
        let skipped = io::copy(&mut (&mut body).take(position - begins_at), &mut io::sink());
        match skipped.map_err(|error| self.broken(&url, error.into()))? {
            skipped if skipped == position - begins_at => Ok(Some(Box::new(body))),
            skipped => Err(has(begins_at + skipped)),
        }
    }
}

fn manifest_url(endpoint: &Endpoint, repository: &Repository, name: impl fmt::Display) -> String {
    endpoint.url(repository, &format!("manifests/{name}"))
}

fn same_digest(url: &str, expected: BlobDigest, actual: BlobDigest) -> Result<(), RegistryError> {
    match actual == expected {
        true => Ok(()),
        false => Err(RegistryError::Digest { url: shown(url), expected, actual }),
    }
}

/// What a document is: as the registry says, or as it says itself where the registry has no word for it.
fn media_type_of(said: Option<String>, bytes: &[u8]) -> MediaType {
    #[derive(Deserialize)]
    struct Own {
        #[serde(rename = "mediaType")]
        media_type: String,
    }
    let said = MediaType::from(said.unwrap_or_default().as_str());
    if classify(&said).is_some() {
        return said;
    }
    let own: Option<Own> = serde_json::from_slice(bytes).ok();
    own.map_or(said, |own| MediaType::from(own.media_type.as_str()))
}

/// The first byte and the length of the whole, out of `Content-Range: bytes 5-9/10` (RFC 9110, section 14.4).
fn content_range(response: &Response<Body>) -> Option<(u64, Option<u64>)> {
    let text = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, _) = range.split_once('-')?;
    Some((first.trim().parse().ok()?, total.trim().parse().ok()))
}

/// A blob on its way.
pub struct BlobReader {
    client: Arc<Client>,
    repository: Repository,
    /// Those that are still to be asked; the first one serves now.
    endpoints: Vec<Endpoint>,
    digest: BlobDigest,
    size_bytes: u64,
    position: u64,
    body: Option<Box<dyn Read + Send>>,
    /// Tries that failed since a connection was a good one.
    failures: u32,
    good_bytes: u64,
    ranges: bool,
}

impl fmt::Debug for BlobReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlobReader({} of {} at {})", self.digest, self.repository, self.position)
    }
}

impl BlobReader {
    fn connect(&mut self) -> Result<(), RegistryError> {
        while self.body.is_none() {
            let by_range = self.ranges && self.position > 0;
            let begun = self.client.blob_at(&self.endpoints[0], self, self.position, by_range);
            match begun {
                Ok(Some(body)) => self.body = Some(body),
                Ok(None) if by_range => self.ranges = false,
                Ok(None) => {
                    let url = shown(&self.endpoints[0].url(&self.repository, &format!("blobs/{}", self.digest)));
                    let why = "answers with a part of it that nobody asked for".to_owned();
                    self.failed(RegistryError::Protocol { url, why })?;
                }
                Err(error) => self.failed(error)?,
            }
        }
        Ok(())
    }

    /// Makes ready for another try, or gives the error back if there is none.
    fn failed(&mut self, error: RegistryError) -> Result<(), RegistryError> {
        self.body = None;
        if matches!(error, RegistryError::Stopped) {
            return Err(error);
        }
        if self.endpoints.len() > 1 {
            self.endpoints.remove(0);
            (self.ranges, self.failures) = (true, 0);
            return Ok(());
        }
        self.failures += 1;
        if !error.is_transient() || self.failures >= self.client.options.retry.tries {
            return Err(error);
        }
        self.client.wait_before(self.failures + 1, &error)
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, RegistryError> {
        loop {
            self.connect()?;
            let body = self.body.as_mut().expect("because it was connected");
            let left = self.size_bytes - self.position;
            // One byte more than there should be tells that it is too long.
            let wanted = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX)).max(1);
            let mut one = [0];
            let target = if left == 0 { &mut one[..] } else { &mut buffer[..wanted] };
            let url = || shown(&self.endpoints[0].url(&self.repository, &format!("blobs/{}", self.digest)));
            let error = match body.read(target) {
                Ok(0) if left == 0 => return Ok(0),
                Ok(0) => {
                    let source = io::Error::new(io::ErrorKind::UnexpectedEof, "it ended early");
                    RegistryError::Connection { url: url(), source }
                }
                Ok(_) if left == 0 => {
                    let (expected, actual) = (self.size_bytes, self.size_bytes + 1);
                    return Err(RegistryError::Size { url: url(), expected, actual });
                }
                Ok(read) => {
                    self.position += read as u64;
                    self.good_bytes += read as u64;
                    if self.good_bytes >= GOOD_BYTES {
                        self.failures = 0;
                    }
                    return Ok(read);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => self.client.broken(&url(), error.into()),
            };
            self.good_bytes = 0;
            self.failed(error)?;
        }
    }
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        self.fill(buffer).map_err(io::Error::other)
    }
}
