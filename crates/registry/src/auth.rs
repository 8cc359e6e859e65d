//! What to put into `Authorization`.
//!
//! A registry says with a 401 how it wants to be asked: with a name and a password (RFC 7617), or with a bearer token
//! (RFC 6750) from a token service that it names ([distribution's token specification]). What it said is remembered, so
//! that only the first request is refused. A token is used until nine tenths of its time are over, or until it is
//! refused.
//!
//! [distribution's token specification]: https://distribution.github.io/distribution/spec/auth/token/

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use serde::Deserialize;
use ureq::http::header::{self, HeaderMap};
use ureq::http::{Method, StatusCode};

use crate::credentials::{Credential, Secret};
use crate::host::{Endpoint, are_neighbours, is_inward, without_port};
use crate::http::{ANSWER_BYTES_MAX, Payload, encoded, is_same_origin, shown, with_query};
use crate::{Client, RegistryError, Repository};

/// What we call ourselves to token services.
const CLIENT_ID: &str = "plies";

/// How long a token is good if its service does not say (token specification, `expires_in`).
const TOKEN_LIFE: Duration = Duration::from_secs(60);

/// Secrets shorter than this are not looked for in what registries say: they would be found by chance.
const SECRET_CHARS_MIN: usize = 4;

/// What may be done with a repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Scope {
    repository: String,
    push: bool,
}

impl Scope {
    /// To read a repository, by its name at the endpoint.
    pub(crate) fn pull(repository: String) -> Self {
        Self { repository, push: false }
    }

    /// To read it and to write to it.
    pub(crate) fn push(repository: String) -> Self {
        Self { repository, push: true }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "repository:{}:{}", self.repository, if self.push { "pull,push" } else { "pull" })
    }
}

/// How a registry wants to be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Scheme {
    Basic,
    Bearer { realm: String, service: Option<String> },
}

#[derive(Debug, Clone)]
struct Token {
    header: Header,
    until: Instant,
}

/// A value of `Authorization`.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Header(pub(crate) String);

impl fmt::Debug for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

type TokenKey = (String, Vec<Scope>);

/// What is known of how to authenticate, by the address of the registry.
#[derive(Debug, Default)]
pub(crate) struct Auth {
    schemes: Mutex<HashMap<String, Scheme>>,
    tokens: Mutex<HashMap<TokenKey, Token>>,
    credentials: Mutex<HashMap<Repository, Option<Credential>>>,
    /// All that was ever sent in confidence.
    secrets: Mutex<HashSet<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Auth {
    /// What to send to `endpoint`; nothing as long as it has not asked.
    pub(crate) fn header(
        &self,
        client: &Client,
        endpoint: &Endpoint,
        repository: &Repository,
        scopes: &[Scope],
    ) -> Result<Option<Header>, RegistryError> {
        let Some(scheme) = lock(&self.schemes).get(&endpoint.base).cloned() else { return Ok(None) };
        let repository = Repository { host: endpoint.host.clone(), name: repository.name.clone() };
        let credential = self.credential(client, &repository)?;
        match (scheme, credential) {
            (Scheme::Basic, Some(Credential::Password { user, password })) => Ok(Some(self.basic(&user, &password))),
            (Scheme::Basic, Some(_)) => {
                let detail = ": it wants a name and a password, and there is a token".to_owned();
                Err(client.denied(&endpoint.host, &repository, detail))
            }
            (Scheme::Basic, None) => Ok(None),
            (Scheme::Bearer { .. }, Some(Credential::Token(token))) => Ok(Some(self.bearer(&token.0))),
            (Scheme::Bearer { realm, service }, credential) => {
                let key = (endpoint.base.clone(), scopes.to_vec());
                if let Some(token) = lock(&self.tokens).get(&key).filter(|token| token.until > Instant::now()) {
                    return Ok(Some(token.header.clone()));
                }
                check_realm(client, endpoint, &realm, credential.is_some())?;
                let token = self.fetch(client, &repository, &realm, service.as_deref(), scopes, credential.as_ref())?;
                let header = token.header.clone();
                lock(&self.tokens).insert(key, token);
                Ok(Some(header))
            }
        }
    }

    /// Takes in what a 401 says, and that what was sent is no good any more.
    pub(crate) fn challenged(&self, endpoint: &Endpoint, scopes: &[Scope], sent: Option<&Header>, headers: &HeaderMap) {
        let texts = headers.get_all(header::WWW_AUTHENTICATE).into_iter().filter_map(|value| value.to_str().ok());
        let offered: Vec<Scheme> = texts.flat_map(challenges).collect();
        // A token says less of its user than a password does.
        let bearer = offered.iter().find(|scheme| matches!(scheme, Scheme::Bearer { .. }));
        if let Some(scheme) = bearer.or(offered.first()) {
            lock(&self.schemes).insert(endpoint.base.clone(), scheme.clone());
        }
        // Somebody else may have a new one already.
        let key = (endpoint.base.clone(), scopes.to_vec());
        let mut tokens = lock(&self.tokens);
        if tokens.get(&key).is_some_and(|token| Some(&token.header) == sent) {
            tokens.remove(&key);
        }
    }

    /// Whether there are credentials for a host among those that were looked for.
    pub(crate) fn has_credential(&self, host: &str) -> bool {
        lock(&self.credentials).iter().any(|(repository, found)| repository.host == host && found.is_some())
    }

    /// Text without anything that was sent in confidence.
    pub(crate) fn without_secrets(&self, text: String) -> String {
        let secrets = lock(&self.secrets);
        secrets.iter().fold(text, |text, secret| text.replace(secret, "(secret)"))
    }

    fn remember(&self, secret: &str) {
        if secret.len() >= SECRET_CHARS_MIN {
            lock(&self.secrets).insert(secret.to_owned());
        }
    }

    fn credential(&self, client: &Client, repository: &Repository) -> Result<Option<Credential>, RegistryError> {
        if let Some(known) = lock(&self.credentials).get(repository) {
            return Ok(known.clone());
        }
        let found = client.options.credentials.find(repository)?;
        if let Some(credential) = &found {
            self.remember(credential.secret());
        }
        lock(&self.credentials).insert(repository.clone(), found.clone());
        Ok(found)
    }

    fn basic(&self, user: &str, password: &Secret) -> Header {
        let text = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{}", password.0));
        self.remember(&text);
        Header(format!("Basic {text}"))
    }

    fn bearer(&self, token: &str) -> Header {
        self.remember(token);
        Header(format!("Bearer {token}"))
    }

    /// Has a token service make a token.
    fn fetch(
        &self,
        client: &Client,
        repository: &Repository,
        realm: &str,
        service: Option<&str>,
        scopes: &[Scope],
        credential: Option<&Credential>,
    ) -> Result<Token, RegistryError> {
        #[derive(Deserialize)]
        struct Answer {
            #[serde(default)]
            token: String,
            #[serde(default)]
            access_token: String,
            expires_in: Option<u64>,
        }
        let mut fields: Vec<(&str, String)> =
            service.map(|service| ("service", service.to_owned())).into_iter().collect();
        let mut headers = Vec::new();
        let (mut form, mut method) = (String::new(), Method::GET);
        match credential {
            // All scopes in one field here (OAuth 2), a field each there.
            Some(Credential::Identity(identity)) => {
                let all: Vec<String> = scopes.iter().map(Scope::to_string).collect();
                fields.push(("scope", all.join(" ")));
                fields.push(("grant_type", "refresh_token".into()));
                fields.push(("client_id", CLIENT_ID.into()));
                fields.push(("refresh_token", identity.0.clone()));
                headers.push((header::CONTENT_TYPE, "application/x-www-form-urlencoded".to_owned()));
                let fields: Vec<String> =
                    fields.iter().map(|(key, value)| format!("{key}={}", encoded(value))).collect();
                (form, method) = (fields.join("&"), Method::POST);
            }
            credential => {
                fields.extend(scopes.iter().map(|scope| ("scope", scope.to_string())));
                fields.push(("client_id", CLIENT_ID.into()));
                if let Some(Credential::Password { user, password }) = credential {
                    fields.push(("account", user.clone()));
                    headers.push((header::AUTHORIZATION, self.basic(user, password).0));
                }
            }
        }
        let is_form = method == Method::POST;
        let url = match is_form {
            true => realm.to_owned(),
            false => fields.iter().fold(realm.to_owned(), |url, (key, value)| with_query(&url, key, value)),
        };
        let payload = if is_form { Payload::Bytes(form.as_bytes()) } else { Payload::Nothing };
        let asked = Instant::now();
        let response = client.patiently(|_| {
            // A redirect would take the password along, so none is followed.
            let response = client.raw(method.clone(), &url, &headers, payload)?;
            match response.status() {
                status if status.is_success() => Ok(response),
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST => {
                    let detail = client.detail(response);
                    Err(client.denied(&repository.host, repository, detail))
                }
                status => {
                    let (url, status) = (shown(realm), status.as_u16());
                    Err(RegistryError::Status { url, status, detail: client.detail(response), retry_after: None })
                }
            }
        })?;
        let protocol = |why: &str| RegistryError::Protocol { url: shown(realm), why: why.to_owned() };
        let body = response.into_body().into_with_config().limit(ANSWER_BYTES_MAX).read_to_vec();
        let body = body.map_err(|error| client.broken(realm, error))?;
        let answer: Answer = serde_json::from_slice(&body).map_err(|_| protocol("its answer is no token"))?;
        let token = if answer.token.is_empty() { answer.access_token } else { answer.token };
        if token.is_empty() {
            return Err(protocol("its answer is without a token"));
        }
        let life = answer.expires_in.map_or(TOKEN_LIFE, Duration::from_secs);
        // A tenth early: clocks differ, and a request takes time. A day is for ever here.
        let life = (life - life / 10).min(Duration::from_secs(24 * 3600));
        Ok(Token { header: self.bearer(&token), until: asked + life })
    }
}

/// Whether a token service is asked at all, and with a user's credentials if there are any.
fn check_realm(client: &Client, endpoint: &Endpoint, realm: &str, with_credential: bool) -> Result<(), RegistryError> {
    let refuse = |why: String| Err(RegistryError::Realm { host: endpoint.host.clone(), realm: shown(realm), why });
    if is_same_origin(realm, &endpoint.base) {
        return Ok(());
    }
    let Some((scheme, rest)) = realm.split_once("://") else { return refuse("that is no address".into()) };
    if !(scheme == "https" || (scheme == "http" && endpoint.is_plain())) {
        return refuse("it is not HTTPS".into());
    }
    let of_realm = without_port(rest.split(['/', '?', '#']).next().unwrap_or_default());
    let own = endpoint.base.split_once("://").map_or("", |(_, rest)| rest);
    let own = without_port(own.split('/').next().unwrap_or_default());
    if is_inward(of_realm) && !is_inward(own) {
        return refuse("it leads back into this machine or its cloud's own services".into());
    }
    let said = client.options.hosts.get(&endpoint.host);
    let is_allowed = said.is_some_and(|said| said.token_hosts.iter().any(|host| host == of_realm));
    if with_credential && !is_allowed && !are_neighbours(of_realm, own) {
        let host = &endpoint.host;
        return refuse(format!(
            "it would get the credentials of {host}; if it may, say token-hosts = [{of_realm:?}] under [registry.{host:?}]"
        ));
    }
    Ok(())
}

/// The challenges in a `WWW-Authenticate` that are understood (RFC 9110, section 11.6.1): schemes, each with parameters,
/// all with commas between.
fn challenges(text: &str) -> Vec<Scheme> {
    let mut found: Vec<(String, HashMap<String, String>)> = Vec::new();
    let mut rest = text.trim_start_matches([' ', ',', '\t']);
    while !rest.is_empty() {
        let word_end = rest.find([' ', '=', ',', '\t']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(word_end);
        let after = after.trim_start();
        if let Some(value) = after.strip_prefix('=') {
            let (value, after) = parameter(value.trim_start());
            if let Some((_, parameters)) = found.last_mut() {
                parameters.insert(word.to_ascii_lowercase(), value);
            }
            rest = after;
        } else {
            found.push((word.to_ascii_lowercase(), HashMap::new()));
            rest = after;
        }
        rest = rest.trim_start_matches([' ', ',', '\t']);
    }
    let known = |(scheme, mut parameters): (String, HashMap<String, String>)| match scheme.as_str() {
        "basic" => Some(Scheme::Basic),
        "bearer" => {
            let realm = parameters.remove("realm")?;
            Some(Scheme::Bearer { realm, service: parameters.remove("service") })
        }
        _ => None,
    };
    found.into_iter().filter_map(known).collect()
}

/// A parameter's value, quoted or not, and what follows it.
fn parameter(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let (mut value, mut escaped) = (String::new(), false);
    for (at, c) in quoted.char_indices() {
        match c {
            c if escaped => {
                value.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => return (value, &quoted[at + 1..]),
            c => value.push(c),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read_whatever_their_order_and_quotes() {
        let bearer = |realm: &str, service: Option<&str>| Scheme::Bearer {
            realm: realm.into(),
            service: service.map(str::to_owned),
        };
        for (text, expected) in [
            (r#"Basic realm="x""#, vec![Scheme::Basic]),
            (
                r#"Bearer realm="https://a/t?x=1,2",service="s p",scope="repository:a:pull,push""#,
                vec![bearer("https://a/t?x=1,2", Some("s p"))],
            ),
            (r#"bearer realm=https://a , service = "q\"q""#, vec![bearer("https://a", Some("q\"q"))]),
            (r#"Negotiate, Basic realm="a, b", Bearer realm="c""#, vec![Scheme::Basic, bearer("c", None)]),
            ("Bearer scope=x", vec![]),
            (r#"Bearer realm="unfinished"#, vec![bearer("unfinished", None)]),
            ("", vec![]),
            (",, =x, ", vec![]),
        ] {
            assert_eq!(challenges(text), expected, "{text}");
        }
    }

    #[test]
    fn h01_r01_r02_credentials_go_to_neighbours_and_to_those_that_the_user_names() {
        use std::collections::BTreeMap;

        use crate::{ClientOptions, HostConfig};
        let token_hosts = vec!["sso.example.org".to_owned()];
        let hosts = BTreeMap::from([("r.named.net".to_owned(), HostConfig { token_hosts, ..HostConfig::default() })]);
        let client = Client::new(ClientOptions { hosts, ..ClientOptions::default() });
        let verdict = |host: &str, realm: &str, with_credential| {
            let endpoint = Endpoint::own(host, &client.options.hosts);
            check_realm(&client, &endpoint, realm, with_credential).is_ok()
        };
        for (host, realm, anonymous, with_credential) in [
            ("docker.io", "https://auth.docker.io/token", true, true),
            ("r.example.com", "https://r.example.com:444/token", true, true),
            ("r.example.com", "https://evil.org/token", true, false),
            ("r.example.com", "https://r.example.com.evil.org/token", true, false),
            ("r.example.com", "https://evil.org/?https://r.example.com/", true, false),
            ("r.example.com", "http://r.example.com/token", false, false),
            ("r.example.com", "https://169.254.169.254/latest", false, false),
            ("r.example.com", "https://localhost/token", false, false),
            ("r.example.com", "file:///etc/passwd", false, false),
            ("r.example.com", "token", false, false),
            ("r.named.net", "https://sso.example.org/token", true, true),
            ("127.0.0.1:5000", "http://127.0.0.1:5001/token", true, true),
            ("127.0.0.1:5000", "http://evil.org/token", true, false),
        ] {
            assert_eq!(verdict(host, realm, false), anonymous, "{host} -> {realm}, anonymous");
            assert_eq!(verdict(host, realm, true), with_credential, "{host} -> {realm}, with credentials");
        }
    }
}
