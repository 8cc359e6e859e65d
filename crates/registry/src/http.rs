//! One request: redirects, what may be sent where, trying again.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use plies_oci::{BlobDigest, DocumentLimits};
use serde::Deserialize;
use ureq::http::header::{self, HeaderName, HeaderValue};
use ureq::http::{Method, Request, Response, StatusCode, Uri};
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig};
use ureq::{Agent, Body, SendBody};

use crate::auth::{Auth, Scope};
use crate::host::{Endpoint, HostConfig, KeyPair, is_inward, without_port};
use crate::{Credentials, RegistryError, Repository};

/// What this client calls itself.
const USER_AGENT: &str = concat!("plies/", env!("CARGO_PKG_VERSION"));

/// Until a connection is there. Go's clients take 30 s, which is long for a name that was misspelt.
const CONNECT_PATIENCE: Duration = Duration::from_secs(15);

/// Without a single byte. A registry may hash gigabytes before it answers the end of an upload.
const IDLE_PATIENCE: Duration = Duration::from_secs(300);

/// Redirects that are followed: registries send to a store, which may send on (net/http follows 10).
const REDIRECTS_MAX: usize = 10;

/// How often one request is authenticated anew: once for what was not known, once for what has run out.
const CHALLENGES_MAX: usize = 2;

/// Bytes of a document that says what went wrong, or that holds a token.
pub(crate) const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// Characters that are shown of what a registry says.
const DETAIL_CHARS_MAX: usize = 300;

/// Proxies by the scheme of what is asked for. This machine is never asked through one.
#[derive(Clone, Default)]
pub struct Proxies {
    /// For HTTPS, `http://[user:password@]host:port`.
    pub https: Option<String>,
    /// For plain HTTP.
    pub http: Option<String>,
    /// Hosts and domains that are asked directly, with commas between; `*` is all.
    pub none_for: String,
}

impl fmt::Debug for Proxies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An address may hold a password.
        let (https, http) = (self.https.is_some(), self.http.is_some());
        f.debug_struct("Proxies").field("https", &https).field("http", &http).finish_non_exhaustive()
    }
}

impl Proxies {
    fn of(&self, host: &str, tls: bool) -> Option<&str> {
        let proxy = if tls { self.https.as_deref() } else { self.http.as_deref() };
        let direct = |rule: &str| {
            let rule = without_port(rule.trim()).trim_start_matches('.');
            rule == "*" || host == rule || (!rule.is_empty() && host.ends_with(&format!(".{rule}")))
        };
        proxy.filter(|proxy| !proxy.is_empty() && !is_inward(host) && !self.none_for.split(',').any(direct))
    }
}

/// How often and after which time something is tried again that may go well then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Tries in all; docker's downloads have five.
    pub tries: u32,
    /// Before the second try, up to. Each further wait is twice as long, and by chance between its half and its whole:
    /// clients that failed together do not come back together.
    pub first_wait: Duration,
    /// Waits do not grow beyond.
    pub longest_wait: Duration,
    /// A registry that asks to come back later than this is given up.
    pub patience: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { tries: 5, first_wait: seconds(1), longest_wait: seconds(15), patience: seconds(120) }
    }
}

impl RetryPolicy {
    /// How long to wait before try number `next` (from 2).
    fn wait(&self, next: u32, chance: u64) -> Duration {
        let whole = self.first_wait.saturating_mul(1 << next.saturating_sub(2).min(16)).min(self.longest_wait);
        whole / 2 + (whole / 2).mul_f64(chance as f64 / u64::MAX as f64)
    }
}

/// What a client knows from outside.
#[derive(Debug, Clone, Default)]
pub struct ClientOptions {
    /// By host with port, as references name it.
    pub hosts: BTreeMap<String, HostConfig>,
    /// Directories with one for each host, as docker has them in `/etc/docker/certs.d`: `HOST/*.crt` are certificates to
    /// trust, `HOST/*.cert` with `HOST/*.key` say who we are. Of several of those the first by name counts.
    pub certificate_dirs: Vec<PathBuf>,
    /// Where credentials are looked for.
    pub credentials: Credentials,
    /// Proxies.
    pub proxies: Proxies,
    /// Trying again.
    pub retry: RetryPolicy,
    /// What documents may cost.
    pub limits: DocumentLimits,
}

/// A client of registries.
pub struct Client {
    pub(crate) options: ClientOptions,
    pub(crate) auth: Auth,
    /// By the host that is spoken to and whether with TLS: each has its connections, and its own trust.
    agents: Mutex<HashMap<(String, bool), Agent>>,
    system_certificates: OnceLock<Vec<Certificate<'static>>>,
    stopped: Mutex<bool>,
    stop: Condvar,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("options", &self.options).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens what is to be sent, from a place on.
pub type Open<'a> = &'a (dyn Fn(u64) -> io::Result<Box<dyn Read + Send + 'a>> + Sync);

/// What a request carries.
#[derive(Clone, Copy)]
pub(crate) enum Payload<'a> {
    Nothing,
    Bytes(&'a [u8]),
    Stream { open: Open<'a>, offset: u64, length: u64 },
}

/// A request to a registry.
pub(crate) struct Call<'a, 'p> {
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) repository: &'a Repository,
    pub(crate) scopes: &'a [Scope],
    pub(crate) method: Method,
    pub(crate) url: String,
    pub(crate) headers: Vec<(HeaderName, String)>,
    pub(crate) payload: Payload<'p>,
}

impl<'a> Call<'a, 'static> {
    /// Something to read.
    pub(crate) fn get(endpoint: &'a Endpoint, repository: &'a Repository, scopes: &'a [Scope], url: String) -> Self {
        let (method, headers, payload) = (Method::GET, Vec::new(), Payload::Nothing);
        Self { endpoint, repository, scopes, method, url, headers, payload }
    }
}

/// An error of what a request was to carry, told apart from those of the connection.
#[derive(Debug, thiserror::Error)]
#[error("read what is sent")]
struct LocalError(#[source] io::Error);

struct LocalReader<'a>(Box<dyn Read + Send + 'a>);

impl Read for LocalReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::Interrupted => error,
            _ => io::Error::other(LocalError(error)),
        })
    }
}

impl Client {
    /// A client that knows nothing yet. Reads no file and opens no connection.
    pub fn new(options: ClientOptions) -> Self {
        Self {
            options,
            auth: Auth::default(),
            agents: Mutex::default(),
            system_certificates: OnceLock::new(),
            stopped: Mutex::new(false),
            stop: Condvar::new(),
        }
    }

    /// Ends whatever blocks, now and from now on, with [`RegistryError::Stopped`].
    pub fn stop(&self) {
        *lock(&self.stopped) = true;
        self.stop.notify_all();
        for agent in lock(&self.agents).values() {
            agent.clone().shutdown();
        }
    }

    pub(crate) fn is_stopped(&self) -> bool {
        *lock(&self.stopped)
    }

    /// Does `work` until it succeeds, fails for good, or was tried often enough. It is told which try it is, from 1.
    pub(crate) fn patiently<T>(
        &self,
        mut work: impl FnMut(u32) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        let mut number = 1;
        loop {
            match work(number) {
                Err(error) if error.is_transient() && number < self.options.retry.tries => {
                    number += 1;
                    self.wait_before(number, &error)?;
                }
                done => return done,
            }
        }
    }

    /// Waits before try number `next`, as long as the registry asks for or as is usual.
    pub(crate) fn wait_before(&self, next: u32, error: &RegistryError) -> Result<(), RegistryError> {
        let policy = &self.options.retry;
        let wait = match error {
            RegistryError::Status { url, retry_after: Some(wait), .. } if *wait > policy.patience => {
                return Err(RegistryError::TooBusy { url: url.clone(), wait: *wait });
            }
            RegistryError::Status { retry_after: Some(wait), .. } => *wait,
            // A hasher is seeded by chance, which is all the chance that is needed.
            _ => policy.wait(next, RandomState::new().hash_one(next)),
        };
        let stopped = self.stop.wait_timeout_while(lock(&self.stopped), wait, |stopped| !*stopped);
        let (stopped, _) = stopped.unwrap_or_else(PoisonError::into_inner);
        if *stopped { Err(RegistryError::Stopped) } else { Ok(()) }
    }

    /// Sends a request once and gives a successful answer, or the error that another one means.
    pub(crate) fn send(&self, call: &Call<'_, '_>) -> Result<Response<Body>, RegistryError> {
        let response = self.send_any(call)?;
        if response.status().is_success() { Ok(response) } else { Err(self.refused(call, response)) }
    }

    /// Sends a request once, with whatever authentication is asked for, and gives the answer. Redirects of what is read
    /// are followed; a secret is sent to the endpoint alone.
    pub(crate) fn send_any(&self, call: &Call<'_, '_>) -> Result<Response<Body>, RegistryError> {
        let (mut url, mut challenges, mut redirects) = (call.url.clone(), 0, 0);
        let authorization = || self.auth.header(self, call.endpoint, call.repository, call.scopes);
        let mut known = authorization()?;
        loop {
            let at_home = is_same_origin(&url, &call.endpoint.base);
            let mut headers = call.headers.clone();
            if at_home {
                headers.extend(known.iter().map(|known| (header::AUTHORIZATION, known.0.clone())));
            }
            let response = self.raw(call.method.clone(), &url, &headers, call.payload)?;
            let status = response.status();
            if status == StatusCode::UNAUTHORIZED && at_home && challenges < CHALLENGES_MAX {
                challenges += 1;
                self.auth.challenged(call.endpoint, call.scopes, known.as_ref(), response.headers());
                let better = authorization()?;
                if better != known {
                    known = better;
                    continue;
                }
            }
            let is_read = call.method == Method::GET || call.method == Method::HEAD;
            if !(is_read && matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)) {
                return Ok(response);
            }
            let to = location(&url, &response)?;
            redirects += 1;
            let refuse = |why| RegistryError::Redirect { from: shown(&url), to: shown(&to), why };
            if redirects > REDIRECTS_MAX {
                return Err(refuse("there were ten before it"));
            }
            check_target(&url, &to).map_err(refuse)?;
            url = to;
        }
    }

    /// Sends one request as it is.
    pub(crate) fn raw(
        &self,
        method: Method,
        url: &str,
        headers: &[(HeaderName, String)],
        payload: Payload<'_>,
    ) -> Result<Response<Body>, RegistryError> {
        let protocol = |why: &str| RegistryError::Protocol { url: shown(url), why: why.to_owned() };
        let uri: Uri = url.parse().map_err(|_| protocol("that is no address"))?;
        let authority = uri.authority().ok_or_else(|| protocol("that address has no host"))?;
        if authority.as_str().contains('@') {
            return Err(protocol("an address with a user in it is not used"));
        }
        let agent = self.agent(authority.as_str(), uri.scheme_str() == Some("https"))?;
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            let value = HeaderValue::from_str(value).map_err(|_| protocol("a header cannot hold what it should"))?;
            request = request.header(name, value);
        }
        let unsent = |_| protocol("that is no request");
        let answer = match payload {
            Payload::Nothing => agent.run(request.body(SendBody::none()).map_err(unsent)?),
            Payload::Bytes(bytes) => agent.run(request.body(bytes).map_err(unsent)?),
            Payload::Stream { open, offset, length } => {
                let mut reader = LocalReader(open(offset).map_err(RegistryError::Local)?);
                let request = request.header(header::CONTENT_LENGTH, length);
                agent.run(request.body(SendBody::from_reader(&mut reader)).map_err(unsent)?)
            }
        };
        answer.map_err(|error| self.broken(url, error))
    }

    /// What an error of the connection means.
    pub(crate) fn broken(&self, url: &str, error: ureq::Error) -> RegistryError {
        if self.is_stopped() {
            return RegistryError::Stopped;
        }
        let source = match error {
            ureq::Error::Io(error) => match error.get_ref().is_some_and(|inner| inner.is::<LocalError>()) {
                true => return RegistryError::Local(error),
                false => error,
            },
            ureq::Error::Timeout(_) => io::Error::new(io::ErrorKind::TimedOut, "it does not answer"),
            ureq::Error::HostNotFound => io::Error::new(io::ErrorKind::NotFound, "there is no such host"),
            ureq::Error::Rustls(error) => io::Error::new(io::ErrorKind::InvalidData, error),
            error => io::Error::other(error.to_string()),
        };
        RegistryError::Connection { url: shown(url), source }
    }

    /// The error that an answer means.
    pub(crate) fn refused(&self, call: &Call<'_, '_>, response: Response<Body>) -> RegistryError {
        let (status, url) = (response.status(), shown(&call.url));
        let retry_after = retry_after(&response);
        let detail = self.detail(response);
        match status {
            StatusCode::NOT_FOUND => RegistryError::NotFound { url, detail },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                self.denied(&call.endpoint.host, call.repository, detail)
            }
            status => RegistryError::Status { url, status: status.as_u16(), detail, retry_after },
        }
    }

    /// That a host lets nobody in, or not this user.
    pub(crate) fn denied(&self, host: &str, repository: &Repository, detail: String) -> RegistryError {
        let place = self.options.credentials.place();
        let hint = match self.auth.has_credential(host) {
            true => format!("with the credentials from {place}"),
            false => format!("{place} has no credentials for it: docker login or podman login writes them"),
        };
        RegistryError::Denied { host: host.to_owned(), what: repository.name.clone(), detail, hint }
    }

    /// What an answer says went wrong, for people, after a colon; nothing if it says nothing.
    pub(crate) fn detail(&self, response: Response<Body>) -> String {
        #[derive(Deserialize)]
        struct Said {
            #[serde(default)]
            errors: Vec<One>,
        }
        #[derive(Deserialize)]
        struct One {
            #[serde(default)]
            code: String,
            #[serde(default)]
            message: String,
        }
        let body = response.into_body().into_with_config().limit(ANSWER_BYTES_MAX).read_to_vec();
        let said: Option<Said> = body.ok().and_then(|body| serde_json::from_slice(&body).ok());
        let text: Vec<String> = said
            .iter()
            .flat_map(|said| &said.errors)
            .map(|one| if one.message.is_empty() { one.code.clone() } else { one.message.clone() })
            .filter(|text| !text.is_empty())
            .collect();
        if text.is_empty() {
            return String::new();
        }
        let text = self.auth.without_secrets(text.join("; "));
        let text: String = text.chars().take(DETAIL_CHARS_MAX).collect();
        format!(": {}", text.escape_debug())
    }

    fn agent(&self, authority: &str, tls: bool) -> Result<Agent, RegistryError> {
        let key = (authority.to_owned(), tls);
        if let Some(agent) = lock(&self.agents).get(&key) {
            return Ok(agent.clone());
        }
        let mut config = Agent::config_builder()
            .user_agent(USER_AGENT)
            .accept_encoding("identity")
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(CONNECT_PATIENCE))
            .timeout_connect(Some(CONNECT_PATIENCE))
            .timeout_per_read(Some(IDLE_PATIENCE))
            .timeout_per_write(Some(IDLE_PATIENCE))
            .proxy(None);
        if let Some(proxy) = self.options.proxies.of(without_port(authority), tls) {
            config = config.proxy(Some(ureq::Proxy::new(proxy).map_err(|_| RegistryError::Proxy)?));
        }
        if tls {
            config = config.tls_config(self.trust(authority)?);
        }
        let agent = Agent::new_with_config(config.build());
        let agent = lock(&self.agents).entry(key).or_insert(agent).clone();
        // A stop between two looks has not seen this one.
        if self.is_stopped() {
            return Err(RegistryError::Stopped);
        }
        Ok(agent)
    }

    /// Whose certificates count for a host.
    fn trust(&self, authority: &str) -> Result<TlsConfig, RegistryError> {
        let said = self.options.hosts.get(authority);
        let system = self.system_certificates.get_or_init(|| {
            // Files of the system's that don't parse are no reason not to take the others.
            let found = rustls_native_certs::load_native_certs().certs;
            found.iter().map(|one| Certificate::from_der(one).to_owned()).collect()
        });
        let mut roots = system.clone();
        let mut keypair = said.and_then(|said| said.keypair.clone());
        let mut trusted = said.map_or_else(Vec::new, |said| said.ca.clone());
        for dir in &self.options.certificate_dirs {
            let found = HostCertificates::in_dir(dir, authority)?;
            trusted.extend(found.trusted);
            keypair = keypair.or(found.keypair);
        }
        for path in &trusted {
            roots.extend(certificates(path)?);
        }
        let client_certificate = keypair.as_ref().map(client_certificate).transpose()?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        Ok(TlsConfig::builder()
            .root_certs(RootCerts::Specific(Arc::new(roots)))
            .client_cert(client_certificate)
            .disable_verification(said.is_some_and(|said| said.insecure))
            .unversioned_rustls_crypto_provider(provider)
            .build())
    }
}

/// What a directory of certificates has for a host.
#[derive(Debug, Default)]
struct HostCertificates {
    trusted: Vec<PathBuf>,
    keypair: Option<KeyPair>,
}

impl HostCertificates {
    /// Looks for those of `authority` in `dir`, where there may be none.
    fn in_dir(dir: &Path, authority: &str) -> Result<Self, RegistryError> {
        let mut this = Self::default();
        // A host that somebody sends us to is no way to other directories.
        if authority.starts_with('.') {
            return Ok(this);
        }
        let dir = dir.join(authority);
        let failed = |source| RegistryError::Certificates { path: dir.clone(), source };
        let names = match std::fs::read_dir(&dir) {
            // As docker: what only others may read is for others.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {
                return Ok(this);
            }
            entries => {
                entries.and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>())
            }
        };
        let mut names = names.map_err(failed)?;
        names.sort();
        for path in &names {
            match path.extension().and_then(|end| end.to_str()) {
                Some("crt") => this.trusted.push(path.clone()),
                Some("cert") if this.keypair.is_none() => {
                    let key = path.with_extension("key");
                    if !names.contains(&key) {
                        let why = format!("its key {} is missing; a CA's certificate ends in .crt", key.display());
                        let source = io::Error::new(io::ErrorKind::NotFound, why);
                        return Err(RegistryError::Certificates { path: path.clone(), source });
                    }
                    this.keypair = Some(KeyPair { key, cert: path.clone() });
                }
                _ => {}
            }
        }
        Ok(this)
    }
}

fn client_certificate(pair: &KeyPair) -> Result<ClientCert, RegistryError> {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
    let failed = |source| RegistryError::Certificates { path: pair.key.clone(), source };
    let invalid = |why: String| failed(io::Error::new(io::ErrorKind::InvalidData, why));
    let text = std::fs::read(&pair.key).map_err(failed)?;
    let key = PrivateKeyDer::from_pem_slice(&text).map_err(|error| invalid(error.to_string()))?;
    let chain = certificates(&pair.cert)?;
    // Looked at here: the client takes it for granted that one is the other's, and panics.
    let ders = chain.iter().map(|one| CertificateDer::from(one.der().to_vec())).collect();
    let provider = rustls::crypto::ring::default_provider();
    let matched = rustls::sign::CertifiedKey::from_der(ders, key, &provider);
    matched.map_err(|error| invalid(format!("it is not the key of {}: {error}", pair.cert.display())))?;
    let key = PrivateKey::from_pem(&text).map_err(|error| invalid(error.to_string()))?;
    Ok(ClientCert::new_with_certs(&chain, key))
}

fn certificates(path: &PathBuf) -> Result<Vec<Certificate<'static>>, RegistryError> {
    let failed = |source| RegistryError::Certificates { path: path.clone(), source };
    let text = std::fs::read(path).map_err(failed)?;
    let mut found = Vec::new();
    for item in ureq::tls::parse_pem(&text) {
        let item = item.map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error.to_string())))?;
        if let PemItem::Certificate(one) = item {
            found.push(one);
        }
    }
    if found.is_empty() {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidData, "there is no PEM certificate in it")));
    }
    Ok(found)
}

/// An address for people: without its query, which may hold a signature, and without a user.
pub(crate) fn shown(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    let text = match url.split_once("://") {
        Some((scheme, rest)) => {
            let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            format!("{scheme}://{}{path}", authority.rsplit('@').next().unwrap_or_default())
        }
        None => url.to_owned(),
    };
    let text: String = text.chars().take(DETAIL_CHARS_MAX).collect();
    text.escape_debug().to_string()
}

fn authority(url: &str) -> Option<(String, String)> {
    let uri: Uri = url.parse().ok()?;
    Some((uri.scheme_str()?.to_owned(), uri.authority()?.as_str().to_ascii_lowercase()))
}

/// Whether two addresses have scheme, host and port in common: what is a secret of one is one of the other.
pub(crate) fn is_same_origin(one: &str, other: &str) -> bool {
    let port = |(scheme, authority): (String, String)| {
        let default = if scheme == "https" { ":443" } else { ":80" };
        let authority = authority.strip_suffix(default).map_or_else(|| authority.clone(), str::to_owned);
        (scheme, authority)
    };
    let one = authority(one).map(port);
    one.is_some() && one == authority(other).map(port)
}

/// Whether what `from` says may lead to `to`.
pub(crate) fn check_target(from: &str, to: &str) -> Result<(), &'static str> {
    let (Some((old_scheme, old)), Some((scheme, new))) = (authority(from), authority(to)) else {
        return Err("that is no address");
    };
    if !["http", "https"].contains(&scheme.as_str()) {
        return Err("that is neither http nor https");
    }
    if new.contains('@') {
        return Err("it has a user in it");
    }
    if old_scheme == "https" && scheme == "http" {
        return Err("it would leave TLS");
    }
    if is_inward(without_port(&new)) && !is_inward(without_port(&old)) {
        return Err("it leads back into this machine or its cloud's own services");
    }
    Ok(())
}

/// Where an answer sends its reader.
pub(crate) fn location(from: &str, response: &Response<Body>) -> Result<String, RegistryError> {
    let to = response.headers().get(header::LOCATION).and_then(|to| to.to_str().ok());
    let to = to.ok_or_else(|| RegistryError::Protocol {
        url: shown(from),
        why: format!("answers {} without a Location", response.status().as_u16()),
    })?;
    Ok(resolved(from, to))
}

/// An address as it is meant where it stands (RFC 3986, section 5.2, as far as servers use it).
fn resolved(base: &str, to: &str) -> String {
    let (scheme, rest) = base.split_once("://").unwrap_or(("https", base));
    let host_end = rest.find('/').unwrap_or(rest.len());
    let (host, path) = rest.split_at(host_end);
    if to.split(['/', '?', '#']).next().unwrap_or_default().contains(':') {
        return to.to_owned();
    }
    if let Some(rest) = to.strip_prefix("//") {
        return format!("{scheme}://{rest}");
    }
    if to.starts_with('/') {
        return format!("{scheme}://{host}{to}");
    }
    let path = path.split(['?', '#']).next().unwrap_or_default();
    if to.starts_with('?') {
        return format!("{scheme}://{host}{path}{to}");
    }
    format!("{scheme}://{host}{}/{to}", path.rsplit_once('/').map_or("", |(dir, _)| dir))
}

/// When to come back: seconds, or a time (RFC 9110, section 10.2.3).
fn retry_after(response: &Response<Body>) -> Option<Duration> {
    let text = response.headers().get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let time = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
    let wait = time.duration_since(jiff::Timestamp::now());
    Some(Duration::try_from(wait).unwrap_or_default())
}

/// The digest that a registry says it sends. It is not believed, only compared.
pub(crate) fn said_digest(response: &Response<Body>) -> Option<BlobDigest> {
    response.headers().get("docker-content-digest")?.to_str().ok()?.parse().ok()
}

/// Text as a part of a query.
pub(crate) fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// An address with one more `key=value` in its query.
pub(crate) fn with_query(url: &str, key: &str, value: &str) -> String {
    let mark = if url.contains('?') { '&' } else { '?' };
    format!("{url}{mark}{key}={}", encoded(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_limit_and_are_spread() {
        let policy = RetryPolicy::default();
        let range = |next| (policy.wait(next, 0).as_millis(), policy.wait(next, u64::MAX).as_millis());
        assert_eq!([range(2), range(3), range(4)], [(500, 1000), (1000, 2000), (2000, 4000)]);
        assert_eq!(range(60), (7500, 15_000));
    }

    #[test]
    fn addresses_are_resolved_and_shown_without_what_is_secret() {
        let base = "https://r.example:5000/v2/a/blobs/uploads/?x=1";
        for (to, whole) in [
            ("http://other/p?q", "http://other/p?q"),
            ("//other/p", "https://other/p"),
            ("/p?sig=1", "https://r.example:5000/p?sig=1"),
            ("p", "https://r.example:5000/v2/a/blobs/uploads/p"),
            ("?y=2", "https://r.example:5000/v2/a/blobs/uploads/?y=2"),
        ] {
            assert_eq!(resolved(base, to), whole);
        }
        assert_eq!(shown("https://user:pass@h/p?sig=secret#f"), "https://h/p");
        assert_eq!(shown("https://h/\u{1b}[31m"), "https://h/\\u{1b}[31m");
    }

    #[test]
    fn h01_r01_r08_an_origin_is_scheme_host_and_port_and_tls_is_never_left() {
        assert!(is_same_origin("https://h/a", "https://H:443/b?c"));
        for other in ["http://h/a", "https://h:8443/a", "https://i.h/a", "https://h.evil/a", "nonsense"] {
            assert!(!is_same_origin("https://h/a", other), "{other}");
        }
        for (from, to) in [
            ("https://h/a", "http://h/a"),
            ("https://h/a", "file:///etc/passwd"),
            ("https://h/a", "https://u@i/a"),
            ("https://h/a", "https://localhost/a"),
            ("https://h/a", "https://169.254.169.254/latest"),
            ("http://h/a", "http://[::1]:8080/a"),
        ] {
            assert!(check_target(from, to).is_err(), "{from} -> {to}");
        }
        for (from, to) in [("https://h/a", "https://i/a"), ("http://127.0.0.1:1/a", "http://127.0.0.1:2/a")] {
            assert!(check_target(from, to).is_ok(), "{from} -> {to}");
        }
    }

    #[test]
    fn this_machine_and_named_hosts_are_asked_without_a_proxy() {
        let proxies = Proxies {
            https: Some("http://proxy:1".into()),
            http: None,
            none_for: "internal.example, .corp, direct:5000".into(),
        };
        for (host, through) in [
            ("r.example", true),
            ("internal.example", false),
            ("a.internal.example", false),
            ("notinternal.example", true),
            ("a.corp", false),
            ("direct", false),
            ("localhost", false),
            ("127.0.0.1", false),
        ] {
            assert_eq!(proxies.of(host, true).is_some(), through, "{host}");
            assert_eq!(proxies.of(host, false), None);
        }
    }
}
