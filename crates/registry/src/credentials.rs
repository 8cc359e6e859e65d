//! Who a user is to a registry: docker's `config.json`, podman's `auth.json` and credential helpers.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use base64::Engine as _;
use plies_oci::ErrorKind;
use serde::Deserialize;

use crate::host::Repository;

/// Bytes of a credentials file, and of a helper's answer. A token has a few KiB.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// How long a helper may take. Some ask a user, or a cloud's service.
const HELPER_PATIENCE: Duration = Duration::from_secs(60);

/// What a helper says when it knows nothing (docker-credential-helpers, `credentials/error.go`).
const HELPER_NOT_FOUND: &str = "credentials not found in native keychain";

/// The user name that stands for "what follows is an identity token" (docker-credential-helpers).
const TOKEN_USER: &str = "<token>";

/// The name under which docker keeps the credentials of its hub.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// Hosts that are docker's hub.
const DOCKER_HUB_HOSTS: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];

/// Why credentials could not be had. No variant holds any part of what a file or a helper says, but a helper's own error
/// message: that is meant for people.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialError {
    /// The file can't be read.
    #[error("read credentials from {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not one of credentials.
    #[error("{} is no credentials file: {why}", path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// What is wrong, and where.
        why: String,
    },
    /// A helper can't be run.
    #[error("run {helper}, which is to know the credentials of {host}")]
    Start {
        /// Its program.
        helper: String,
        /// Whose credentials.
        host: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A helper failed.
    #[error("{helper} does not say the credentials of {host}: {why}")]
    Helper {
        /// Its program.
        helper: String,
        /// Whose credentials.
        host: String,
        /// What it says.
        why: String,
    },
}

impl CredentialError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Read { .. } | Self::Start { .. } | Self::Helper { .. } => ErrorKind::Unavailable,
            Self::Format { .. } => ErrorKind::InvalidInput,
        }
    }
}

/// Text that is not for anybody's eyes.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Secret(pub(crate) String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// What proves who a user is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Credential {
    /// A name and a password.
    Password { user: String, password: Secret },
    /// What a token service takes for a new token (docker's `identitytoken`).
    Identity(Secret),
    /// A bearer token as it is (docker's `registrytoken`).
    Token(Secret),
}

impl Credential {
    /// All of it that is secret.
    pub(crate) fn secret(&self) -> &str {
        match self {
            Self::Password { password: secret, .. } | Self::Identity(secret) | Self::Token(secret) => &secret.0,
        }
    }
}

/// Where credentials are looked for.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    /// docker's `config.json` or podman's `auth.json`, which has the same form. Not there means that there are none.
    pub file: Option<PathBuf>,
    /// Directories in which helpers are looked for.
    pub search_path: Vec<PathBuf>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct ConfigFile {
    auths: BTreeMap<String, AuthEntry>,
    #[serde(rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
    #[serde(rename = "credsStore")]
    store: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct AuthEntry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

#[derive(Deserialize)]
struct HelperAnswer {
    #[serde(rename = "Username", default)]
    username: String,
    #[serde(rename = "Secret", default)]
    secret: String,
}

impl Credentials {
    /// The credentials for a repository; `None` means that nobody knows any. A helper for the host comes before the
    /// file's own entries, and those before the helper for all hosts, unless they are empty (docker leaves such behind
    /// for what its helper keeps).
    pub(crate) fn find(&self, repository: &Repository) -> Result<Option<Credential>, CredentialError> {
        let Some(config) = self.read()? else { return Ok(None) };
        let host = &repository.host;
        let helper = config.helpers.iter().find(|(key, _)| host_and_path(key) == (canonical(host), ""));
        if let Some((key, helper)) = helper {
            return self.ask(helper, key, host);
        }
        // Podman's keys may go down to a repository; the longest that fits counts.
        let fits = |key: &str| {
            let (key_host, path) = host_and_path(key);
            let rest = repository.name.strip_prefix(path);
            let whole = rest.is_some_and(|rest| path.is_empty() || rest.is_empty() || rest.starts_with('/'));
            (key_host == canonical(host) && whole).then_some(path.len())
        };
        let entries = config.auths.iter().filter_map(|(key, entry)| Some((fits(key)?, key, entry)));
        let mut entries: Vec<_> = entries.collect();
        entries.sort_by_key(|(length, ..)| std::cmp::Reverse(*length));
        for (_, key, entry) in entries {
            if let Some(credential) = self.credential_of(key, entry)? {
                return Ok(Some(credential));
            }
        }
        if config.store.is_empty() {
            return Ok(None);
        }
        let key = if DOCKER_HUB_HOSTS.contains(&host.as_str()) { DOCKER_HUB_KEY } else { host };
        self.ask(&config.store, key, host)
    }

    /// Where a user would put them, for messages.
    pub(crate) fn place(&self) -> String {
        self.file.as_ref().map_or_else(|| "no file".to_owned(), |path| path.display().to_string())
    }

    fn path(&self) -> PathBuf {
        self.file.clone().unwrap_or_default()
    }

    fn read(&self) -> Result<Option<ConfigFile>, CredentialError> {
        let Some(path) = &self.file else { return Ok(None) };
        let failed = |source| CredentialError::Read { path: path.clone(), source };
        let file = match std::fs::File::open(path) {
            Ok(file) => file,
            Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&error.kind()) => {
                return Ok(None);
            }
            Err(error) => return Err(failed(error)),
        };
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
        }
        let mut text = Vec::new();
        file.take(FILE_BYTES_MAX).read_to_end(&mut text).map_err(failed)?;
        // serde's own words quote what it found, which may be a password.
        let format = |error: serde_json::Error| CredentialError::Format {
            path: path.clone(),
            why: format!("not valid at line {}, column {}", error.line(), error.column()),
        };
        serde_json::from_slice(&text).map(Some).map_err(format)
    }

    fn credential_of(&self, key: &str, entry: &AuthEntry) -> Result<Option<Credential>, CredentialError> {
        if !entry.registrytoken.is_empty() {
            return Ok(Some(Credential::Token(Secret(entry.registrytoken.clone()))));
        }
        if !entry.identitytoken.is_empty() {
            return Ok(Some(Credential::Identity(Secret(entry.identitytoken.clone()))));
        }
        if !entry.auth.is_empty() {
            let decoded = base64::engine::general_purpose::STANDARD.decode(entry.auth.trim());
            let text = decoded.ok().and_then(|bytes| String::from_utf8(bytes).ok());
            // Docker for Windows once padded with NUL.
            let parts = text.as_deref().and_then(|text| text.trim_end_matches('\0').split_once(':'));
            let (user, password) = parts.ok_or_else(|| CredentialError::Format {
                path: self.path(),
                why: format!("\"auth\" of {key:?} is not base64 of user:password"),
            })?;
            return Ok(Some(password_or_token(user, password)));
        }
        let given = !entry.username.is_empty();
        Ok(given.then(|| password_or_token(&entry.username, &entry.password)))
    }

    /// Asks a credential helper.
    fn ask(&self, helper: &str, key: &str, host: &str) -> Result<Option<Credential>, CredentialError> {
        let program = format!("docker-credential-{helper}");
        let start = |source| CredentialError::Start { helper: program.clone(), host: host.to_owned(), source };
        let failed = |why: String| CredentialError::Helper { helper: program.clone(), host: host.to_owned(), why };
        let found = self.search_path.iter().map(|dir| dir.join(&program)).find(|path| path.is_file());
        // A name with a slash would leave the search path.
        let path = found.filter(|_| !helper.contains('/'));
        let path =
            path.ok_or_else(|| start(io::Error::new(io::ErrorKind::NotFound, "it is not in the search path")))?;
        let (status, out) = run(&path, key).map_err(start)?;
        if !status {
            let message: String = String::from_utf8_lossy(&out).trim().chars().take(300).collect();
            if message == HELPER_NOT_FOUND {
                return Ok(None);
            }
            return Err(failed(message.escape_debug().to_string()));
        }
        let answer: HelperAnswer =
            serde_json::from_slice(&out).map_err(|_| failed("its answer is not the JSON of the protocol".into()))?;
        if answer.secret.is_empty() {
            return Ok(None);
        }
        Ok(Some(password_or_token(&answer.username, &answer.secret)))
    }
}

fn password_or_token(user: &str, secret: &str) -> Credential {
    match user {
        TOKEN_USER => Credential::Identity(Secret(secret.to_owned())),
        user => Credential::Password { user: user.to_owned(), password: Secret(secret.to_owned()) },
    }
}

/// Runs a helper's `get` and gives whether it succeeded, and what it wrote to its standard output.
fn run(path: &Path, key: &str) -> io::Result<(bool, Vec<u8>)> {
    let mut child =
        Command::new(path).arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut input = child.stdin.take().expect("because it was asked for");
    let mut output = child.stdout.take().expect("because it was asked for");
    // One that does not read its input says why in its output.
    drop(input.write_all(key.as_bytes()));
    drop(input);
    let (done, ended) = mpsc::channel();
    let reader = std::thread::Builder::new().name("helper".into()).spawn(move || {
        let mut out = Vec::new();
        let read = (&mut output).take(FILE_BYTES_MAX).read_to_end(&mut out).map(|_| out);
        // Whoever waited may have given up.
        drop(done.send(read));
    })?;
    let Ok(out) = ended.recv_timeout(HELPER_PATIENCE) else {
        child.kill()?;
        child.wait()?;
        // The reader ends by itself: what it reads from is gone, or belongs to a grandchild.
        drop(reader);
        return Err(io::Error::new(io::ErrorKind::TimedOut, "it did not answer within a minute"));
    };
    Ok((child.wait()?.success(), out?))
}

/// The one name of a host that has several.
fn canonical(host: &str) -> &str {
    if DOCKER_HUB_HOSTS.contains(&host) { DOCKER_HUB_HOSTS[0] } else { host }
}

/// The host and the repository that a key means: docker's keys are addresses of its old protocol, or hosts.
fn host_and_path(key: &str) -> (&str, &str) {
    let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let path = path.trim_end_matches('/');
    (canonical(host), if ["v1", "v2"].contains(&path) { "" } else { path })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn repository(host: &str, name: &str) -> Repository {
        Repository { host: host.into(), name: name.into() }
    }

    fn password(user: &str, password: &str) -> Credential {
        Credential::Password { user: user.into(), password: Secret(password.into()) }
    }

    fn credentials(dir: &Path, text: &str) -> Credentials {
        std::fs::write(dir.join("config.json"), text).unwrap();
        Credentials { file: Some(dir.join("config.json")), search_path: vec![dir.to_owned()] }
    }

    fn helper(dir: &Path, name: &str, script: &str) {
        let path = dir.join(format!("docker-credential-{name}"));
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn entries_are_found_by_docker_s_and_podman_s_keys() {
        let dir = tempfile::tempdir().unwrap();
        let found = credentials(
            dir.path(),
            // "hub:one", "host:two", "deep:thr:ee"
            r#"{"auths": {
                "https://index.docker.io/v1/": {"auth": "aHViOm9uZQ=="},
                "https://r.example/v1/": {"auth": "aG9zdDp0d28="},
                "r.example/team": {"auth": "ZGVlcDp0aHI6ZWU="},
                "plain.example": {"username": "u", "password": "p"},
                "id.example": {"auth": "eDo=", "identitytoken": "refresh"},
                "token.example": {"registrytoken": "bearer"},
                "empty.example": {}
            }}"#,
        );
        for (host, name, expected) in [
            ("docker.io", "library/x", Some(password("hub", "one"))),
            ("r.example", "x", Some(password("host", "two"))),
            ("r.example", "team/x", Some(password("deep", "thr:ee"))),
            ("r.example", "teamwork/x", Some(password("host", "two"))),
            ("r.example:5000", "x", None),
            ("plain.example", "x", Some(password("u", "p"))),
            ("id.example", "x", Some(Credential::Identity(Secret("refresh".into())))),
            ("token.example", "x", Some(Credential::Token(Secret("bearer".into())))),
            ("empty.example", "x", None),
        ] {
            assert_eq!(found.find(&repository(host, name)).unwrap(), expected, "{host}/{name}");
        }
    }

    #[test]
    fn helpers_are_asked_for_their_hosts_and_for_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        helper(dir.path(), "one", r#"read key; echo "{\"Username\": \"one\", \"Secret\": \"$key\"}""#);
        helper(dir.path(), "rest", r#"read key; echo "{\"Username\": \"<token>\", \"Secret\": \"$1 $key\"}""#);
        let found = credentials(
            dir.path(),
            r#"{"credsStore": "rest", "credHelpers": {"one.example": "one"},
                "auths": {"file.example": {"auth": "aG9zdDp0d28="}, "left.example": {}}}"#,
        );
        let identity = |text: &str| Some(Credential::Identity(Secret(text.into())));
        for (host, expected) in [
            ("one.example", Some(password("one", "one.example"))),
            ("file.example", Some(password("host", "two"))),
            ("left.example", identity("get left.example")),
            ("docker.io", identity("get https://index.docker.io/v1/")),
        ] {
            assert_eq!(found.find(&repository(host, "x")).unwrap(), expected, "{host}");
        }
    }

    #[test]
    fn a_helper_that_knows_nothing_is_no_failure_and_one_that_fails_is() {
        let dir = tempfile::tempdir().unwrap();
        helper(dir.path(), "none", "echo 'credentials not found in native keychain'; exit 1");
        helper(dir.path(), "bad", "echo 'the keyring is locked'; exit 1");
        helper(dir.path(), "odd", "echo hunter2");
        let config = r#"{"credHelpers": {"a": "none", "b": "bad", "c": "odd", "d": "missing", "e": "../bad"}}"#;
        let found = credentials(dir.path(), config);
        assert_eq!(found.find(&repository("a", "x")).unwrap(), None);
        let error = |host| found.find(&repository(host, "x")).unwrap_err().to_string();
        assert!(error("b").ends_with("of b: the keyring is locked"), "{}", error("b"));
        assert!(!error("c").contains("hunter2") && error("c").contains("docker-credential-odd"), "{}", error("c"));
        assert!(error("d").contains("docker-credential-missing"), "{}", error("d"));
        assert!(matches!(found.find(&repository("e", "x")), Err(CredentialError::Start { .. })));
    }

    #[test]
    fn h01_r06_a_broken_file_is_told_without_what_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        for (text, place) in [
            (r#"{"auths": {"h": "hunter2"}}"#, "line 1"),
            (r#"{"auths": {"h": {"auth": ["hunter2"]}}}"#, "line 1"),
            (r#"{"auths": {"h": {"auth": "hunter2"}}}"#, "\"h\""),
            ("{\n\"auths\": hunter2", "line 2"),
        ] {
            let error = credentials(dir.path(), text).find(&repository("h", "x")).unwrap_err();
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains("hunter2"), "{shown}");
            assert!(shown.contains(place) && shown.contains("config.json"), "{shown}");
        }
        let missing = Credentials { file: Some(dir.path().join("no/config.json")), search_path: vec![] };
        assert_eq!(missing.find(&repository("h", "x")).unwrap(), None);
    }
}
