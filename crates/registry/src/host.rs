//! Which address serves a host.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use plies_oci::Reference;
use serde::Deserialize;

use crate::http::with_query;

/// The host that names without one mean, and the one that serves it (docker's `IndexServer` and `DefaultV2Registry`).
const DOCKER_HUB: (&str, &str) = ("docker.io", "registry-1.docker.io");

/// What a user says of a host: `[registry."HOST"]` of the config file, as BuildKit has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct HostConfig {
    /// Hosts, with a path if need be, that are asked before this one when something is pulled, in this order.
    pub mirrors: Vec<String>,
    /// Speak plain HTTP to it. Unset: only if it is this machine (docker does the same).
    pub http: Option<bool>,
    /// Take any certificate.
    pub insecure: bool,
    /// PEM files of certificates to trust besides the system's.
    pub ca: Vec<PathBuf>,
    /// What we show to a host that wants to know who we are.
    pub keypair: Option<KeyPair>,
    /// Hosts of token services that may have the credentials of this host, besides its neighbours.
    pub token_hosts: Vec<String>,
}

/// A client's certificate (BuildKit's word, of which it has a list).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyPair {
    /// PEM file of its key.
    pub key: PathBuf,
    /// PEM file of the certificate, and of those between it and the host's own CA.
    pub cert: PathBuf,
}

/// A repository on a host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Repository {
    /// The host with its port, as references name it: `docker.io`, `localhost:5000`.
    pub host: String,
    /// The repository there: `library/busybox`.
    pub name: String,
}

impl Repository {
    /// The repository of a reference.
    pub fn of(reference: &Reference) -> Self {
        Self { host: reference.registry().to_owned(), name: reference.repository().to_owned() }
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.name)
    }
}

/// An address that serves a host: the host's own, or a mirror's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// The name that credentials and settings go by.
    pub(crate) host: String,
    /// Scheme and authority.
    pub(crate) base: String,
    /// What comes before a repository's name there, with a slash at its end: projects of a mirror that serves several.
    prefix: String,
    /// For a mirror: the host that it stands in for.
    pub(crate) mirror_of: Option<String>,
}

impl Endpoint {
    fn new(host: &str, hosts: &BTreeMap<String, HostConfig>, mirror_of: Option<&str>) -> Self {
        let (authority, path) = host.split_once('/').unwrap_or((host, ""));
        let path = path.trim_end_matches('/');
        let served_by = if authority == DOCKER_HUB.0 { DOCKER_HUB.1 } else { authority };
        let scheme = if speaks_http(authority, hosts) { "http" } else { "https" };
        Self {
            host: authority.to_owned(),
            base: format!("{scheme}://{served_by}"),
            prefix: if path.is_empty() { String::new() } else { format!("{path}/") },
            mirror_of: mirror_of.map(str::to_owned),
        }
    }

    /// The address that takes what is pushed to a host.
    pub(crate) fn own(host: &str, hosts: &BTreeMap<String, HostConfig>) -> Self {
        Self::new(host, hosts, None)
    }

    /// The addresses to pull from, in the order in which they are asked; the host's own is the last.
    pub(crate) fn all(host: &str, hosts: &BTreeMap<String, HostConfig>) -> Vec<Self> {
        let mirrors = hosts.get(host).map_or(&[][..], |config| &config.mirrors);
        let mirrors = mirrors.iter().map(|mirror| Self::new(mirror, hosts, Some(host)));
        mirrors.chain([Self::own(host, hosts)]).collect()
    }

    /// A repository's name there.
    pub(crate) fn name_of(&self, repository: &Repository) -> String {
        format!("{}{}", self.prefix, repository.name)
    }

    /// The address of something in a repository: `manifests/TAG`, `blobs/DIGEST`.
    pub(crate) fn url(&self, repository: &Repository, rest: &str) -> String {
        let url = format!("{}/v2/{}/{rest}", self.base, self.name_of(repository));
        // A mirror of several registries is told which one is meant (distribution-spec, "Registry proxying").
        self.mirror_of.as_ref().map_or_else(|| url.clone(), |host| with_query(&url, "ns", host))
    }

    /// Whether it is spoken to without TLS.
    pub(crate) fn is_plain(&self) -> bool {
        self.base.starts_with("http:")
    }
}

fn speaks_http(authority: &str, hosts: &BTreeMap<String, HostConfig>) -> bool {
    let said = hosts.get(authority).and_then(|config| config.http);
    said.unwrap_or_else(|| is_this_machine(without_port(authority)))
}

/// An authority without its port.
pub(crate) fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|c| c.is_ascii_digit()) && !host.ends_with(':') => host,
        _ => authority,
    }
}

fn address_of(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// Whether a host (without port) is this machine by its name: loopback addresses, and `localhost`, which never leaves
/// the machine (RFC 6761, section 6.3).
pub(crate) fn is_this_machine(host: &str) -> bool {
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    name == "localhost" || name.ends_with(".localhost") || address_of(host).is_some_and(|ip| ip.is_loopback())
}

/// Whether a host (without port) is an address that only means something from this machine: its own, or that of a cloud's
/// metadata service, which answers anybody who asks from inside. No public registry sends a client there.
pub(crate) fn is_inward(host: &str) -> bool {
    is_this_machine(host)
        || address_of(host).is_some_and(|ip| match ip {
            IpAddr::V4(ip) => ip.is_link_local() || ip.is_unspecified(),
            IpAddr::V6(ip) => {
                ip.is_unicast_link_local()
                    || ip.is_unspecified()
                    || ip.to_ipv4_mapped().is_some_and(|ip| ip.is_loopback() || ip.is_link_local())
            }
        })
}

/// Whether two hosts (without ports) belong to one owner as far as names tell: the same, or below one domain. A domain
/// that anybody can register names in is none: `com`, and by rule of thumb `co.uk`. (The public suffix list would
/// know better, changes weekly and has 15,000 lines; who is refused by this rule can say `token-hosts`.)
pub(crate) fn are_neighbours(one: &str, other: &str) -> bool {
    let (one, other) = (one.to_ascii_lowercase(), other.to_ascii_lowercase());
    if one == other {
        return true;
    }
    if address_of(&one).is_some() || address_of(&other).is_some() {
        return false;
    }
    let common: Vec<&str> =
        one.rsplit('.').zip(other.rsplit('.')).take_while(|(a, b)| a == b).map(|(label, _)| label).collect();
    match common.as_slice() {
        [] | [_] => false,
        [top, second] => !(top.len() == 2 && second.len() <= 3),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_served_as_docker_has_it() {
        let mut hosts = BTreeMap::new();
        hosts.insert("plain.example:80".to_owned(), HostConfig { http: Some(true), ..HostConfig::default() });
        hosts.insert("127.0.0.1:1".to_owned(), HostConfig { http: Some(false), ..HostConfig::default() });
        for (host, base) in [
            ("docker.io", "https://registry-1.docker.io"),
            ("registry.example", "https://registry.example"),
            ("plain.example:80", "http://plain.example:80"),
            ("plain.example", "https://plain.example"),
            ("localhost:5000", "http://localhost:5000"),
            ("127.8.8.8:5000", "http://127.8.8.8:5000"),
            ("127.0.0.1:1", "https://127.0.0.1:1"),
            ("127.example.com", "https://127.example.com"),
            ("localhost.example", "https://localhost.example"),
        ] {
            assert_eq!(Endpoint::own(host, &hosts).base, base, "{host}");
        }
    }

    #[test]
    fn mirrors_come_first_and_keep_their_path() {
        let mirrors = vec!["mirror.example/hub/".to_owned(), "127.0.0.1:5001".to_owned()];
        let hosts = BTreeMap::from([("docker.io".to_owned(), HostConfig { mirrors, ..HostConfig::default() })]);
        let repository = Repository { host: "docker.io".into(), name: "library/x".into() };
        let endpoints = Endpoint::all("docker.io", &hosts);
        let urls: Vec<String> = endpoints.iter().map(|one| one.url(&repository, "manifests/1")).collect();
        assert_eq!(
            urls,
            [
                "https://mirror.example/v2/hub/library/x/manifests/1?ns=docker.io",
                "http://127.0.0.1:5001/v2/library/x/manifests/1?ns=docker.io",
                "https://registry-1.docker.io/v2/library/x/manifests/1",
            ]
        );
    }

    #[test]
    fn neighbours_share_a_domain_that_has_an_owner() {
        for (one, other) in [
            ("registry-1.docker.io", "auth.docker.io"),
            ("registry.gitlab.com", "gitlab.com"),
            ("r.example", "R.example"),
            ("10.0.0.1", "10.0.0.1"),
            ("registry.shop.co.uk", "auth.shop.co.uk"),
        ] {
            assert!(are_neighbours(one, other), "{one} {other}");
        }
        for (one, other) in [
            ("registry.example.com", "auth.example.org"),
            ("a.com", "b.com"),
            ("shop.co.uk", "evil.co.uk"),
            ("10.0.0.1", "10.0.0.2"),
            ("1.2.3.4", "9.9.3.4"),
            ("localhost", "127.0.0.1"),
        ] {
            assert!(!are_neighbours(one, other), "{one} {other}");
        }
    }

    #[test]
    fn inward_addresses_are_known_in_every_spelling() {
        for host in ["127.0.0.1", "[::1]", "localhost", "a.localhost.", "169.254.169.254", "[fe80::1]", "0.0.0.0"] {
            assert!(is_inward(host), "{host}");
        }
        assert!(is_inward("[::ffff:169.254.169.254]"));
        for host in ["10.0.0.1", "registry.example", "[2001:db8::1]"] {
            assert!(!is_inward(host), "{host}");
        }
        assert_eq!(
            [without_port("h:80"), without_port("h"), without_port("[::1]:5"), without_port("[::1]")],
            ["h", "h", "[::1]", "[::1]"]
        );
    }
}
