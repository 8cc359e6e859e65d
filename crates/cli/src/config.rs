//! The config file, and what the environment says of registries.
//!
//! ```toml
//! [registry."docker.io"]
//! mirrors = ["mirror.example"]       # asked first, in this order
//!
//! [registry."registry.example:5000"]
//! http = true                        # plain HTTP
//! insecure = false                   # take any certificate
//! ca = ["/etc/ssl/example.pem"]      # trust these as well
//! keypair = { cert = "me.pem", key = "me.key" }   # who we are
//! token-hosts = ["sso.example.org"]  # may get its credentials
//! ```
//!
//! Certificates are also looked for where docker looks: in `/etc/docker/certs.d/HOST`, for other users than root in
//! `docker/certs.d/HOST` of the XDG config directory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use plies_engine::registry::{ClientOptions, Credentials, HostConfig, Proxies, RetryPolicy};
use serde::Deserialize;

use crate::commands::search_path;

/// The config file of root.
const SYSTEM_CONFIG: &str = "/etc/plies/config.toml";

/// Docker's certificates of root.
const SYSTEM_CERTIFICATES: &str = "/etc/docker/certs.d";

/// Bytes of a config file.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// What the file says.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Config {
    registry: BTreeMap<String, HostConfig>,
}

/// What the client of registries is to know.
pub(crate) fn registries(file: Option<&Path>) -> anyhow::Result<ClientOptions> {
    let var = |names: [&str; 2]| names.iter().find_map(|name| std::env::var(name).ok()).filter(|text| !text.is_empty());
    Ok(ClientOptions {
        hosts: read(file)?.registry,
        certificate_dirs: certificate_dir().into_iter().collect(),
        credentials: Credentials { file: credentials(), search_path: search_path() },
        // As curl: HTTP_PROXY in capitals could come from a request's header, where ply runs as a CGI program.
        proxies: Proxies {
            https: var(["https_proxy", "HTTPS_PROXY"]),
            http: std::env::var("http_proxy").ok(),
            none_for: var(["no_proxy", "NO_PROXY"]).unwrap_or_default(),
        },
        retry: RetryPolicy::default(),
    })
}

fn read(file: Option<&Path>) -> anyhow::Result<Config> {
    let path = match file {
        Some(path) => path.to_owned(),
        None => match usual_file() {
            Some(path) if path.exists() => path,
            _ => return Ok(Config::default()),
        },
    };
    let text = || -> std::io::Result<String> {
        let metadata = std::fs::metadata(&path)?;
        if !metadata.is_file() || metadata.len() > CONFIG_BYTES_MAX {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file of at most 1 MiB"));
        }
        std::fs::read_to_string(&path)
    };
    let text = text().with_context(|| format!("read the config file {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("{} is not valid", path.display()))
}

fn usual_file() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Some(SYSTEM_CONFIG.into());
    }
    user_config().map(|dir| dir.join("plies/config.toml"))
}

/// Docker's directory of certificates (`registry.CertsDir`).
fn certificate_dir() -> Option<PathBuf> {
    match rustix::process::geteuid().is_root() {
        true => Some(SYSTEM_CERTIFICATES.into()),
        false => user_config().map(|dir| dir.join("docker/certs.d")),
    }
}

fn user_config() -> Option<PathBuf> {
    let config = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".config"));
    config.or_else(home)
}

/// Where docker and podman keep credentials: REGISTRY_AUTH_FILE is podman's word for it, DOCKER_CONFIG docker's.
fn credentials() -> Option<PathBuf> {
    let var = |name| std::env::var_os(name).filter(|text| !text.is_empty()).map(PathBuf::from);
    let docker = || var("DOCKER_CONFIG").or_else(|| Some(var("HOME")?.join(".docker")));
    var("REGISTRY_AUTH_FILE").or_else(|| Some(docker()?.join("config.json")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_read_and_what_is_not_known_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        let parse = |text: &str| {
            std::fs::write(&path, text).unwrap();
            read(Some(&path))
        };
        let config = parse("[registry.\"r.example:5000\"]\nhttp = true\ntoken-hosts = [\"a\"]\n").unwrap();
        let expected = HostConfig { http: Some(true), token_hosts: vec!["a".into()], ..HostConfig::default() };
        assert_eq!(config.registry, BTreeMap::from([("r.example:5000".to_owned(), expected)]));
        assert_eq!(parse("").unwrap(), Config::default());
        for bad in ["[registry.\"r\"]\nhtpp = true", "[registries]", "registry = 1", "["] {
            let error = format!("{:#}", parse(bad).unwrap_err());
            assert!(error.contains("config.toml"), "{error}");
        }
        assert!(read(Some(&dir.path().join("missing"))).is_err(), "one that was named must be there");
    }
}
