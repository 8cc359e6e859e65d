//! Blobs and manifests into a registry.

use plies_oci::{BlobDigest, Descriptor};
use ureq::http::header;
use ureq::http::{Method, StatusCode};

use crate::auth::Scope;
use crate::host::Endpoint;
use crate::http::{Call, Open, Payload, check_target, is_same_origin, location, said_digest, shown, with_query};
use crate::{Client, RegistryError, Repository};

/// A blob to push.
pub struct Upload<'a> {
    /// Which one.
    pub digest: BlobDigest,
    /// Its length.
    pub size_bytes: u64,
    /// Repositories of the same host that have it, the likeliest first.
    pub known_in: &'a [Repository],
    /// Opens it at a place; asked anew for each try, and not at all if it need not be sent.
    pub open: Open<'a>,
}

impl std::fmt::Debug for Upload<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Upload({})", self.digest)
    }
}

/// How a blob came to be in a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PushedBlob {
    /// It was there.
    Present,
    /// The registry took it from another repository of its own.
    Mounted {
        /// Which.
        from: Repository,
    },
    /// It was sent.
    Uploaded,
}

/// An upload that a registry has begun.
struct Session {
    url: String,
}

impl Client {
    /// Whether a repository has a blob.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn has_blob(&self, repository: &Repository, digest: BlobDigest) -> Result<bool, RegistryError> {
        let endpoint = Endpoint::own(&repository.host, &self.options.hosts);
        self.patiently(|_| {
            let scopes = [Scope::push(repository.name.clone())];
            let url = endpoint.url(repository, &format!("blobs/{digest}"));
            let mut call = Call::get(&endpoint, repository, &scopes, url);
            call.method = Method::HEAD;
            let response = self.send_any(&call)?;
            match response.status() {
                status if status.is_success() => Ok(true),
                StatusCode::NOT_FOUND => Ok(false),
                _ => Err(self.refused(&call, response)),
            }
        })
    }

    /// Puts a blob into a repository: not at all if it is there, without sending it if another repository of the host has
    /// it, and else by sending it. A connection that breaks is taken up again where the registry says it did.
    ///
    /// # Errors
    /// [`RegistryError`]; [`RegistryError::Local`] if the blob could not be read.
    pub fn push_blob(&self, repository: &Repository, upload: &Upload<'_>) -> Result<PushedBlob, RegistryError> {
        if self.has_blob(repository, upload.digest)? {
            return Ok(PushedBlob::Present);
        }
        let endpoint = Endpoint::own(&repository.host, &self.options.hosts);
        let mut begun = None;
        for from in upload.known_in.iter().filter(|from| from.host == repository.host && *from != repository) {
            match self.mount(&endpoint, repository, upload.digest, from) {
                Ok(None) => return Ok(PushedBlob::Mounted { from: from.clone() }),
                Ok(Some(session)) => begun = Some(session),
                Err(RegistryError::Stopped) => return Err(RegistryError::Stopped),
                // Whoever may not read the other repository may still write to this one.
                Err(_) => {}
            }
        }
        self.patiently(|_| {
            let session = match begun.take() {
                Some(session) => session,
                None => self.begin(&endpoint, repository)?,
            };
            self.send_blob(&endpoint, repository, upload, session)
        })?;
        Ok(PushedBlob::Uploaded)
    }

    /// Puts a manifest or an index into a repository, under a tag or its own digest. What it names must be there.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn push_manifest(
        &self,
        repository: &Repository,
        tag: Option<&str>,
        descriptor: &Descriptor,
        bytes: &[u8],
    ) -> Result<(), RegistryError> {
        let endpoint = Endpoint::own(&repository.host, &self.options.hosts);
        let name = tag.map_or_else(|| descriptor.digest.to_string(), str::to_owned);
        self.patiently(|_| {
            let scopes = [Scope::push(repository.name.clone())];
            let call = Call {
                endpoint: &endpoint,
                repository,
                scopes: &scopes,
                method: Method::PUT,
                url: endpoint.url(repository, &format!("manifests/{name}")),
                headers: vec![(header::CONTENT_TYPE, descriptor.media_type.to_string())],
                payload: Payload::Bytes(bytes),
            };
            let response = self.send(&call)?;
            match said_digest(&response) {
                Some(actual) if actual != descriptor.digest => {
                    let (url, expected) = (shown(&call.url), descriptor.digest);
                    Err(RegistryError::Digest { url, expected, actual })
                }
                _ => Ok(()),
            }
        })
    }

    /// Asks the registry to take a blob from another repository. An upload has begun if it does not.
    fn mount(
        &self,
        endpoint: &Endpoint,
        repository: &Repository,
        digest: BlobDigest,
        from: &Repository,
    ) -> Result<Option<Session>, RegistryError> {
        let url = endpoint.url(repository, "blobs/uploads/");
        let url = with_query(&with_query(&url, "mount", &digest.to_string()), "from", &from.name);
        let scopes = [Scope::push(repository.name.clone()), Scope::pull(from.name.clone())];
        let (headers, payload) = (vec![(header::CONTENT_LENGTH, "0".to_owned())], Payload::Nothing);
        let call = Call { endpoint, repository, scopes: &scopes, method: Method::POST, url, headers, payload };
        let response = self.send(&call)?;
        match response.status() {
            StatusCode::CREATED => Ok(None),
            _ => self.session(endpoint, &call.url, &location(&call.url, &response)?).map(Some),
        }
    }

    fn begin(&self, endpoint: &Endpoint, repository: &Repository) -> Result<Session, RegistryError> {
        let url = endpoint.url(repository, "blobs/uploads/");
        let scopes = [Scope::push(repository.name.clone())];
        let (headers, payload) = (vec![(header::CONTENT_LENGTH, "0".to_owned())], Payload::Nothing);
        let call = Call { endpoint, repository, scopes: &scopes, method: Method::POST, url, headers, payload };
        let response = self.send(&call)?;
        self.session(endpoint, &call.url, &location(&call.url, &response)?)
    }

    /// The upload that a registry says is to go on at `to`.
    fn session(&self, endpoint: &Endpoint, from: &str, to: &str) -> Result<Session, RegistryError> {
        // Registries behind a proxy that does TLS for them often don't know that it does. Their own address is meant.
        let over_tls = to.replacen("http://", "https://", 1);
        let url = if !endpoint.is_plain() && is_same_origin(&over_tls, &endpoint.base) { &over_tls } else { to };
        let refuse = |why| RegistryError::Redirect { from: shown(from), to: shown(to), why };
        check_target(from, url).map_err(refuse)?;
        Ok(Session { url: url.to_owned() })
    }

    /// Sends a blob: whole at first, and what is missing if the connection breaks.
    fn send_blob(
        &self,
        endpoint: &Endpoint,
        repository: &Repository,
        upload: &Upload<'_>,
        session: Session,
    ) -> Result<(), RegistryError> {
        let scopes = [Scope::push(repository.name.clone())];
        let call = |method, url: String, headers, payload| Call {
            endpoint,
            repository,
            scopes: &scopes,
            method,
            url,
            headers,
            payload,
        };
        let octets = || (header::CONTENT_TYPE, "application/octet-stream".to_owned());
        let digest = upload.digest.to_string();
        let payload = Payload::Stream { open: upload.open, offset: 0, length: upload.size_bytes };
        let put = self.send(&call(Method::PUT, with_query(&session.url, "digest", &digest), vec![octets()], payload));
        let mut failure = match put {
            Ok(response) => return self.check_uploaded(upload, &session.url, said_digest(&response)),
            Err(error) => error,
        };
        let (mut session, mut sent_before) = (session, 0);
        // As long as it gets further it is worth going on; otherwise whoever asked begins anew.
        while failure.is_transient() && !self.is_stopped() {
            self.wait_before(2, &failure)?;
            let Ok(status) = self.send(&call(Method::GET, session.url.clone(), vec![], Payload::Nothing)) else {
                return Err(failure);
            };
            let range = status.headers().get(header::RANGE).and_then(|range| range.to_str().ok());
            // `0-99` are a hundred bytes; nothing, or `0-0` from registries that can't say nothing, is to be sent whole.
            let last =
                range.and_then(|range| range.trim_start_matches("bytes=").split_once('-')?.1.parse::<u64>().ok());
            let offset = match last {
                Some(last) if last > 0 && last < upload.size_bytes => last + 1,
                _ => return Err(failure),
            };
            if offset <= sent_before {
                return Err(failure);
            }
            sent_before = offset;
            if status.headers().contains_key(header::LOCATION) {
                session = self.session(endpoint, &session.url, &location(&session.url, &status)?)?;
            }
            let length = upload.size_bytes - offset;
            let range = format!("{offset}-{}", upload.size_bytes - 1);
            if length > 0 {
                let payload = Payload::Stream { open: upload.open, offset, length };
                let headers = vec![octets(), (header::CONTENT_RANGE, range)];
                match self.send(&call(Method::PATCH, session.url.clone(), headers, payload)) {
                    Ok(response) => {
                        let to = location(&session.url, &response)?;
                        session = self.session(endpoint, &session.url, &to)?;
                    }
                    Err(error) => {
                        failure = error;
                        continue;
                    }
                }
            }
            let headers = vec![(header::CONTENT_LENGTH, "0".to_owned())];
            let url = with_query(&session.url, "digest", &digest);
            let response = self.send(&call(Method::PUT, url, headers, Payload::Nothing))?;
            return self.check_uploaded(upload, &session.url, said_digest(&response));
        }
        Err(failure)
    }

    fn check_uploaded(&self, upload: &Upload<'_>, url: &str, said: Option<BlobDigest>) -> Result<(), RegistryError> {
        match said {
            Some(actual) if actual != upload.digest => {
                Err(RegistryError::Digest { url: shown(url), expected: upload.digest, actual })
            }
            _ => Ok(()),
        }
    }
}
