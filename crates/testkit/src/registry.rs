//! Registries: Debian's own, and one in memory that does wrong on demand.
//!
//! The one in memory speaks HTTP/1.1 over loopback with a thread a connection, writes down what it was asked, and has a
//! list of faults, each for so many requests whose line holds a text.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};

use crate::{eventually, image::Image, sha256_hex, tools};

/// Debian's `docker-registry` on a port of its own, for as long as this lives.
#[derive(Debug)]
pub struct DockerRegistry {
    child: Child,
    address: SocketAddr,
}

impl DockerRegistry {
    /// Starts one that keeps its files in `dir`. With a user it wants that name and password for everything.
    pub fn start(dir: &Path, user: Option<(&str, &str)>) -> Self {
        Self::start_with(dir, user, "")
    }

    /// Starts one that speaks TLS, with a certificate of its own making: `certificate.pem` in `dir`.
    pub fn start_tls(dir: &Path) -> Self {
        Self::start_with(dir, None, &server_tls(dir))
    }

    /// The same, and it speaks only with who has the key to a certificate that it knows: `client.cert` and `client.key`
    /// in `dir`.
    pub fn start_mutual_tls(dir: &Path) -> Self {
        let tls = server_tls(dir);
        let client = dir.join("client.cert");
        make_certificate(&client, &dir.join("client.key"));
        Self::start_with(dir, None, &format!("{tls}    clientcas:\n      - {}\n", client.display()))
    }

    fn start_with(dir: &Path, user: Option<(&str, &str)>, tls: &str) -> Self {
        fs::create_dir_all(dir).unwrap_or_else(|error| panic!("make {}: {error}", dir.display()));
        let auth = user.map_or_else(String::new, |(name, password)| {
            let file = dir.join("htpasswd");
            // bcrypt is the one form that it takes.
            let lines = tools::run(Command::new("htpasswd").args(["-nbB", name, password]));
            fs::write(&file, lines).unwrap_or_else(|error| panic!("write {}: {error}", file.display()));
            format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", file.display())
        });
        // Another process may take the port between asking for a free one and using it.
        for _ in 0..10 {
            let address = free_address();
            let config = dir.join("config.yml");
            let text = format!(
                "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}/data\n\
                 http:\n  addr: {address}\n{tls}{auth}",
                dir.display()
            );
            fs::write(&config, text).unwrap_or_else(|error| panic!("write {}: {error}", config.display()));
            let mut command = Command::new("docker-registry");
            command.arg("serve").arg(&config).env("OTEL_TRACES_EXPORTER", "none");
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let mut child = command.spawn().unwrap_or_else(|error| panic!("start {command:?}: {error}"));
            let mut ended = false;
            let listens = eventually(|| {
                ended = matches!(child.try_wait(), Ok(Some(_)));
                ended || TcpStream::connect(address).is_ok()
            });
            if listens && !ended {
                return Self { child, address };
            }
            drop(child.kill());
            drop(child.wait());
        }
        panic!("docker-registry does not start with {}", dir.display());
    }

    /// Host and port, as names of images have it.
    pub fn host(&self) -> String {
        self.address.to_string()
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        // It ends with the test either way.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Makes a certificate of a registry, and the part of its configuration that names it.
fn server_tls(dir: &Path) -> String {
    fs::create_dir_all(dir).unwrap_or_else(|error| panic!("make {}: {error}", dir.display()));
    let (certificate, key) = (dir.join("certificate.pem"), dir.join("key.pem"));
    make_certificate(&certificate, &key);
    format!("  tls:\n    certificate: {}\n    key: {}\n", certificate.display(), key.display())
}

/// A certificate that says so itself, for this machine.
fn make_certificate(certificate: &Path, key: &Path) {
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]);
    openssl.args(["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]);
    openssl.args(["-addext", "basicConstraints=critical,CA:FALSE"]);
    tools::run(openssl.arg("-keyout").arg(key).arg("-out").arg(certificate));
}

fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("because loopback has free ports");
    listener.local_addr().expect("because it is bound")
}

/// What goes wrong with a request.
#[derive(Debug, Clone)]
pub enum Fault {
    /// This status with these headers, and a body that says so.
    Status(u16, Vec<(&'static str, String)>),
    /// This status and body, instead of what was asked for.
    Answer(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// The connection breaks after so many bytes of the body, whichever way it goes.
    DropAfter(usize),
    /// The body has its last byte changed.
    WrongByte,
    /// The body ends after so many bytes, and that is said to be all.
    Truncate(usize),
    /// The body has one byte more, and that is said to be all.
    TooLong,
    /// A range is asked for, and the whole comes.
    IgnoreRange,
    /// A range is asked for, and another one comes, of a blob of another size if so said.
    OtherRange {
        /// First byte.
        first: usize,
        /// Length that the blob is said to have.
        total: Option<usize>,
    },
    /// Somewhere else.
    Redirect(String),
    /// The answer comes once everything is healed.
    Held,
}

/// A request that came.
#[derive(Debug, Clone)]
pub struct Seen {
    /// GET, PUT, …
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Names in lower case.
    pub headers: HashMap<String, String>,
    /// Its body, as far as it came.
    pub body: Vec<u8>,
}

impl Seen {
    /// Method and target, with a blank between.
    pub fn line(&self) -> String {
        format!("{} {}", self.method, self.target)
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// How [`FaultyRegistry`] lets somebody in.
#[derive(Debug, Clone)]
pub struct TokenAuth {
    /// The value of `Authorization` that the token service wants; `None` gives everybody a token.
    pub authorization: Option<String>,
    /// The refresh token that it takes instead.
    pub identity: Option<String>,
    /// Where it is, if not at `/token` of the registry itself.
    pub realm: Option<String>,
    /// Requests for which a token is good.
    pub uses: usize,
}

#[derive(Debug, Default)]
struct State {
    /// By repository and digest.
    blobs: BTreeMap<(String, String), Vec<u8>>,
    /// By repository and tag or digest: media type and bytes.
    manifests: BTreeMap<(String, String), (String, Vec<u8>)>,
    uploads: BTreeMap<String, Vec<u8>>,
    faults: Vec<(String, usize, Fault)>,
    seen: Vec<Seen>,
    auth: Option<TokenAuth>,
    /// Tokens that were given, with the uses that they have left.
    tokens: HashMap<String, usize>,
    count: usize,
}

/// A registry in memory.
#[derive(Debug)]
pub struct FaultyRegistry {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
}

impl Default for FaultyRegistry {
    fn default() -> Self {
        Self::start()
    }
}

impl FaultyRegistry {
    /// Starts one that is empty and does nothing wrong.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("because loopback has free ports");
        let address = listener.local_addr().expect("because it is bound");
        let (state, stop) = (Arc::<Mutex<State>>::default(), Arc::<AtomicBool>::default());
        let (shared, stopped) = (Arc::clone(&state), Arc::clone(&stop));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let shared = Arc::clone(&shared);
                // A client that goes away is none of our trouble.
                std::thread::spawn(move || drop(serve(&stream, address, &shared)));
            }
        });
        Self { address, state, stop }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Host and port, as names of images have it.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Puts an image into a repository, under a tag and its digest.
    pub fn put(&self, repository: &str, tag: &str, image: &Image) {
        let manifest = image.manifest_digest();
        for (hex, bytes) in image.blobs() {
            if hex == manifest {
                let media_type = "application/vnd.oci.image.manifest.v1+json";
                self.put_manifest(repository, tag, media_type, &bytes);
            } else {
                self.put_blob(repository, &bytes);
            }
        }
    }

    /// Puts a blob into a repository.
    pub fn put_blob(&self, repository: &str, bytes: &[u8]) {
        let digest = format!("sha256:{}", sha256_hex(bytes));
        self.state().blobs.insert((repository.to_owned(), digest), bytes.to_vec());
    }

    /// Puts a manifest or an index into a repository, under a tag and its digest, which is given back.
    pub fn put_manifest(&self, repository: &str, tag: &str, media_type: &str, bytes: &[u8]) -> String {
        let digest = format!("sha256:{}", sha256_hex(bytes));
        for name in [tag, &digest] {
            let key = (repository.to_owned(), name.to_owned());
            self.state().manifests.insert(key, (media_type.to_owned(), bytes.to_vec()));
        }
        digest
    }

    /// The blobs of a repository, by digest.
    pub fn blobs(&self, repository: &str) -> BTreeMap<String, Vec<u8>> {
        let of = |((have, digest), bytes): (&(String, String), &Vec<u8>)| {
            (have == repository).then(|| (digest.clone(), bytes.clone()))
        };
        self.state().blobs.iter().filter_map(of).collect()
    }

    /// A manifest's bytes.
    pub fn manifest(&self, repository: &str, name: &str) -> Option<Vec<u8>> {
        let key = (repository.to_owned(), name.to_owned());
        self.state().manifests.get(&key).map(|(_, bytes)| bytes.clone())
    }

    /// The next `times` requests whose line holds `text` go wrong.
    pub fn fault(&self, text: &str, times: usize, fault: Fault) {
        self.state().faults.push((text.to_owned(), times, fault));
    }

    /// Nothing goes wrong any more.
    pub fn heal(&self) {
        self.state().faults.clear();
    }

    /// Lets in only who has a token from now on.
    pub fn require_token(&self, auth: TokenAuth) {
        self.state().auth = Some(auth);
    }

    /// What came since the last time somebody asked.
    pub fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.state().seen)
    }
}

impl Drop for FaultyRegistry {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // So that it looks.
        drop(TcpStream::connect(self.address));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An answer in the making.
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Answer {
    fn new(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new() }
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn error(status: u16, code: &str) -> Self {
        let body = json!({"errors": [{"code": code, "message": format!("{code} it is")}]});
        Self { body: body.to_string().into_bytes(), ..Self::new(status) }
    }
}

fn serve(stream: &TcpStream, address: SocketAddr, state: &Mutex<State>) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut reader = BufReader::new(stream);
    while let Some((mut seen, length)) = read_head(&mut reader)? {
        let fault = take_fault(state, &seen.line());
        let wanted = match fault {
            Some(Fault::DropAfter(bytes)) if length > 0 => bytes.min(length),
            _ => length,
        };
        let mut body = vec![0; wanted];
        reader.read_exact(&mut body)?;
        seen.body = body;
        lock(state).seen.push(seen.clone());
        if wanted < length {
            // What came of an upload stays, as real ones keep it.
            keep_part(state, &seen);
            return stream.shutdown(std::net::Shutdown::Both);
        }
        while matches!(fault, Some(Fault::Held)) && !lock(state).faults.is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let answer = match &fault {
            Some(Fault::Status(status, headers)) => {
                Answer { headers: headers.clone(), ..Answer::error(*status, "FAULT") }
            }
            Some(Fault::Answer(status, headers, body)) => {
                Answer { status: *status, headers: headers.clone(), body: body.clone() }
            }
            Some(Fault::Redirect(to)) => Answer::new(307).with("location", to),
            _ => respond(state, address, &seen, fault.as_ref()),
        };
        let Answer { status, headers, mut body } = answer;
        let is_read = seen.method == "GET" && status < 300;
        match fault {
            Some(Fault::WrongByte) if is_read => body.last_mut().into_iter().for_each(|byte| *byte ^= 1),
            Some(Fault::Truncate(bytes)) if is_read => body.truncate(bytes),
            Some(Fault::TooLong) if is_read => body.push(0),
            _ => {}
        }
        let mut head = format!("HTTP/1.1 {status} Status\r\ncontent-length: {}\r\n", body.len());
        headers.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
        let mut out = stream;
        out.write_all(format!("{head}\r\n").as_bytes())?;
        match fault {
            Some(Fault::DropAfter(bytes)) => {
                out.write_all(&body[..bytes.min(body.len())])?;
                return stream.shutdown(std::net::Shutdown::Both);
            }
            _ if seen.method == "HEAD" => {}
            _ => out.write_all(&body)?,
        }
    }
    Ok(())
}

/// A request's line and headers, and how long its body is.
fn read_head(reader: &mut BufReader<&TcpStream>) -> std::io::Result<Option<(Seen, usize)>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split(' ');
    let (method, target) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
    Ok(Some((Seen { method, target, headers, body: Vec::new() }, length)))
}

fn take_fault(state: &Mutex<State>, line: &str) -> Option<Fault> {
    let mut state = lock(state);
    let (_, times, fault) =
        state.faults.iter_mut().find(|(text, times, _)| *times > 0 && line.contains(text.as_str()))?;
    *times -= 1;
    Some(fault.clone())
}

/// The value of a key in a query or a form, without the signs that stand for others.
fn field(text: &str, key: &str) -> Option<String> {
    let value = text.split(['?', '&']).find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='))?;
    Some(value.replace("%3A", ":").replace("%2F", "/"))
}

fn keep_part(state: &Mutex<State>, seen: &Seen) {
    let path = seen.target.split('?').next().unwrap_or_default();
    if let Some(upload) = lock(state).uploads.get_mut(path.rsplit('/').next().unwrap_or_default()) {
        upload.extend_from_slice(&seen.body);
    }
}

fn respond(shared: &Mutex<State>, address: SocketAddr, seen: &Seen, fault: Option<&Fault>) -> Answer {
    let mut state = lock(shared);
    let state = &mut *state;
    let (path, query) = seen.target.split_once('?').unwrap_or((&seen.target, ""));
    if path == "/token" {
        return token(state, seen, query);
    }
    if let Some(auth) = &state.auth {
        let bearer = seen.header("authorization").and_then(|text| text.strip_prefix("Bearer "));
        let uses = bearer.and_then(|token| state.tokens.get_mut(token)).filter(|uses| **uses > 0);
        match uses {
            Some(uses) => *uses -= 1,
            None => {
                let realm = auth.realm.clone().unwrap_or_else(|| format!("http://{address}/token"));
                let challenge = format!("Bearer realm=\"{realm}\",service=\"test\"");
                return Answer::error(401, "UNAUTHORIZED").with("www-authenticate", challenge);
            }
        }
    }
    let Some(rest) = path.strip_prefix("/v2/") else { return Answer::error(404, "NOT_FOUND") };
    let parts: Vec<&str> = rest.split('/').collect();
    match parts.as_slice() {
        [name @ .., "manifests", reference] => {
            let key = (name.join("/"), (*reference).to_owned());
            if seen.method == "PUT" {
                let media_type = seen.header("content-type").unwrap_or_default().to_owned();
                let digest = format!("sha256:{}", sha256_hex(&seen.body));
                state.manifests.insert((key.0.clone(), digest.clone()), (media_type.clone(), seen.body.clone()));
                state.manifests.insert(key, (media_type, seen.body.clone()));
                return Answer::new(201).with("docker-content-digest", digest);
            }
            let Some((media_type, bytes)) = state.manifests.get(&key) else {
                return Answer::error(404, "MANIFEST_UNKNOWN");
            };
            let answer = Answer { body: bytes.clone(), ..Answer::new(200) };
            answer.with("content-type", media_type.clone())
        }
        [name @ .., "blobs", "uploads", ""] => {
            let name = name.join("/");
            if let (Some(digest), Some(from)) = (field(query, "mount"), field(query, "from"))
                && let Some(bytes) = state.blobs.get(&(from, digest.clone())).cloned()
            {
                state.blobs.insert((name, digest), bytes);
                return Answer::new(201);
            }
            state.count += 1;
            let id = format!("upload-{}", state.count);
            state.uploads.insert(id.clone(), Vec::new());
            Answer::new(202).with("location", format!("/v2/{name}/blobs/uploads/{id}"))
        }
        [name @ .., "blobs", "uploads", id] => upload(state, seen, &name.join("/"), id, query),
        [name @ .., "blobs", digest] => {
            let Some(bytes) = state.blobs.get(&(name.join("/"), (*digest).to_owned())) else {
                return Answer::error(404, "BLOB_UNKNOWN");
            };
            part(bytes, seen.header("range"), fault)
        }
        _ => Answer::error(404, "NOT_FOUND"),
    }
}

fn token(state: &mut State, seen: &Seen, query: &str) -> Answer {
    let Some(auth) = state.auth.clone() else { return Answer::error(404, "NOT_FOUND") };
    let form = String::from_utf8_lossy(&seen.body).into_owned();
    let by_identity = auth.identity.is_some() && field(&form, "refresh_token") == auth.identity;
    let by_password = auth.authorization.as_deref().is_none_or(|wanted| seen.header("authorization") == Some(wanted));
    if !(by_identity || (by_password && auth.identity.is_none())) {
        return Answer::error(401, "UNAUTHORIZED");
    }
    let scopes = if by_identity { form } else { query.to_owned() };
    if !scopes.contains("scope=repository") {
        return Answer::error(400, "NO_SCOPE");
    }
    state.count += 1;
    let token = format!("token-{}-0123456789", state.count);
    state.tokens.insert(token.clone(), auth.uses);
    let body: Value = json!({"token": token, "expires_in": 300});
    Answer { body: body.to_string().into_bytes(), ..Answer::new(200) }
}

fn upload(state: &mut State, seen: &Seen, name: &str, id: &str, query: &str) -> Answer {
    let here = format!("/v2/{name}/blobs/uploads/{id}");
    let Some(upload) = state.uploads.get_mut(id) else { return Answer::error(404, "BLOB_UPLOAD_UNKNOWN") };
    let range = |upload: &Vec<u8>| format!("0-{}", upload.len().saturating_sub(1));
    match seen.method.as_str() {
        "GET" => Answer::new(204).with("location", here).with("range", range(upload)),
        "PATCH" => {
            let first = seen.header("content-range").and_then(|text| text.split('-').next()?.parse::<usize>().ok());
            if first.is_some_and(|first| first != upload.len()) {
                return Answer::error(416, "BLOB_UPLOAD_INVALID");
            }
            upload.extend_from_slice(&seen.body);
            Answer::new(202).with("location", here).with("range", range(upload))
        }
        _ => {
            upload.extend_from_slice(&seen.body);
            let digest = format!("sha256:{}", sha256_hex(upload));
            if field(query, "digest").as_ref() != Some(&digest) {
                return Answer::error(400, "DIGEST_INVALID");
            }
            let bytes = state.uploads.remove(id).expect("because it was there");
            state.blobs.insert((name.to_owned(), digest.clone()), bytes);
            Answer::new(201).with("docker-content-digest", digest)
        }
    }
}

/// A blob, or the part of it that is asked for.
fn part(bytes: &[u8], range: Option<&str>, fault: Option<&Fault>) -> Answer {
    let whole = || Answer { body: bytes.to_vec(), ..Answer::new(200) };
    let first = range.and_then(|text| text.strip_prefix("bytes=")?.split('-').next()?.parse::<usize>().ok());
    let Some(first) = first else { return whole() };
    let (first, total) = match fault {
        Some(Fault::IgnoreRange) => return whole(),
        Some(Fault::OtherRange { first, total }) => (*first, total.unwrap_or(bytes.len())),
        _ => (first, bytes.len()),
    };
    if first >= bytes.len() {
        return Answer::error(416, "RANGE");
    }
    let answer = Answer { body: bytes[first..].to_vec(), ..Answer::new(206) };
    answer.with("content-range", format!("bytes {first}-{}/{total}", bytes.len() - 1))
}
