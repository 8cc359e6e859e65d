//! The config file, and what the environment says of registries.
//!
//! ```toml
//! driver = "auto"                    # as --driver, which goes before it, as does PLY_DRIVER
//!
//! [registry."docker.io"]
//! mirrors = ["mirror.example"]       # asked first, in this order
//!
//! [registry."registry.example:5000"]
//! http = true                        # plain HTTP
//! insecure = false                   # take any certificate
//! ca = ["/etc/ssl/example.pem"]      # trust these as well
//! keypair = { cert = "me.pem", key = "me.key" }   # who we are
//! token-hosts = ["sso.example.org"]  # may get its credentials
//!
//! [gc]                               # what keeps the build cache small; docs/space.md
//! enabled = true
//! max-used-space = "50GB"            # also reserved-space, min-free-space: the caps of the default rules
//!
//! [[gc.policy]]                      # rules of one's own, one after the other, instead of the default ones
//! filters = ["type==source.local"]
//! keep-duration = "48h"
//! max-used-space = "5%"              # of the file system; also all = true
//!
//! [limits]                           # what images may cost: numbers, or sizes where a key ends in -bytes
//! layers = 500                       # all keys: docs/security/model.md
//! unpacked-bytes = "20GiB"
//! ```
//!
//! Certificates are also looked for where docker looks: in `/etc/docker/certs.d/HOST`, for other users than root in
//! `docker/certs.d/HOST` of the XDG config directory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Context as _;
use plies_engine::registry::{ClientOptions, Credentials, HostConfig, Proxies, RetryPolicy};
use plies_engine::{ArchiveLimits, DocumentLimits, PruneOptions};
use serde::Deserialize;

use crate::args::Driver;
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
    driver: Option<Driver>,
    registry: BTreeMap<String, HostConfig>,
    gc: Gc,
    limits: LimitsTable,
}

/// What images may cost, by the names that errors use.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct LimitsTable {
    header_bytes: Option<Amount>,
    path_bytes: Option<Amount>,
    component_bytes: Option<Amount>,
    path_depth: Option<Amount>,
    symlink_bytes: Option<Amount>,
    entries: Option<Amount>,
    unpacked_bytes: Option<Amount>,
    file_bytes: Option<Amount>,
    expansion_ratio: Option<Amount>,
    xattr_bytes: Option<Amount>,
    xattrs_count: Option<Amount>,
    sparse_map_bytes: Option<Amount>,
    manifest_bytes: Option<Amount>,
    config_bytes: Option<Amount>,
    index_entries: Option<Amount>,
    index_depth: Option<Amount>,
    layers: Option<Amount>,
    history: Option<Amount>,
}

impl LimitsTable {
    /// The limits of archives and of documents; the default ones where nothing is said.
    fn limits(&self) -> (ArchiveLimits, DocumentLimits) {
        let of = |amount: Option<Amount>, or: u64| amount.map_or(or, |amount| amount.0);
        let (archive, documents) = (ArchiveLimits::default(), DocumentLimits::DEFAULT);
        let archive = ArchiveLimits {
            header_bytes: of(self.header_bytes, archive.header_bytes),
            path_bytes: of(self.path_bytes, archive.path_bytes),
            component_bytes: of(self.component_bytes, archive.component_bytes),
            path_depth: of(self.path_depth, archive.path_depth),
            symlink_bytes: of(self.symlink_bytes, archive.symlink_bytes),
            entries: of(self.entries, archive.entries),
            unpacked_bytes: of(self.unpacked_bytes, archive.unpacked_bytes),
            file_bytes: of(self.file_bytes, archive.file_bytes),
            expansion_ratio: of(self.expansion_ratio, archive.expansion_ratio),
            xattr_bytes: of(self.xattr_bytes, archive.xattr_bytes),
            xattrs_count: of(self.xattrs_count, archive.xattrs_count),
            sparse_map_bytes: of(self.sparse_map_bytes, archive.sparse_map_bytes),
        };
        let documents = DocumentLimits {
            manifest_bytes: of(self.manifest_bytes, documents.manifest_bytes),
            config_bytes: of(self.config_bytes, documents.config_bytes),
            index_entries: of(self.index_entries, documents.index_entries),
            index_depth: of(self.index_depth, documents.index_depth),
            layers: of(self.layers, documents.layers),
            history: of(self.history, documents.history),
        };
        (archive, documents)
    }
}

/// A number, or a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Written")]
struct Amount(u64);

/// A number as it may stand in the file.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Number(u64),
    Text(String),
}

impl TryFrom<Written> for Amount {
    type Error = &'static str;

    fn try_from(written: Written) -> Result<Self, Self::Error> {
        let amount = match written {
            Written::Number(number) => Some(number),
            Written::Text(text) => plies_engine::parse_bytes(&text),
        };
        amount.map(Self).ok_or("expected a number, or a size such as 500MB or 2GiB")
    }
}

/// How the build cache is kept. Keys are BuildKit's; its spelling is understood too.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Gc {
    enabled: Option<bool>,
    #[serde(alias = "reservedSpace")]
    reserved_space: Option<Space>,
    #[serde(alias = "maxUsedSpace")]
    max_used_space: Option<Space>,
    #[serde(alias = "minFreeSpace")]
    min_free_space: Option<Space>,
    #[serde(alias = "gcpolicy")]
    policy: Vec<Rule>,
}

/// One rule.
#[derive(Debug, Default, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Rule {
    all: bool,
    filters: Vec<String>,
    #[serde(alias = "keepDuration")]
    keep_duration: Option<Period>,
    #[serde(alias = "reservedSpace")]
    reserved_space: Option<Space>,
    #[serde(alias = "maxUsedSpace")]
    max_used_space: Option<Space>,
    #[serde(alias = "minFreeSpace")]
    min_free_space: Option<Space>,
}

/// A size, or a part of the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) enum Space {
    Bytes(u64),
    Percent(u64),
}

impl Space {
    /// In bytes, on a file system of this size.
    pub(crate) fn of(self, disk_bytes: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => disk_bytes / 100 * percent,
        }
    }
}

impl FromStr for Space {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let percent = |text: &str| text.parse().ok().filter(|percent| *percent <= 100).map(Self::Percent);
        let space = match text.strip_suffix('%') {
            Some(number) => percent(number),
            None => plies_engine::parse_bytes(text).map(Self::Bytes),
        };
        space.ok_or("expected a size such as 500MB or 2GiB, or a part of the file system such as 20%")
    }
}

impl TryFrom<String> for Space {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// A duration as people write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
struct Period(std::time::Duration);

impl TryFrom<String> for Period {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        plies_engine::parse_duration(&text).map(Self).ok_or("expected a duration such as 90s, 48h or 7d")
    }
}

impl Gc {
    fn rules(&self, disk_bytes: u64) -> anyhow::Result<Vec<PruneOptions>> {
        if self.enabled == Some(false) {
            return Ok(Vec::new());
        }
        let own_caps = [self.reserved_space, self.max_used_space, self.min_free_space];
        anyhow::ensure!(
            self.policy.is_empty() || own_caps == [None; 3],
            "the caps in [gc] are those of the default rules: with [[gc.policy]], put them there"
        );
        let of = |space: Option<Space>, or: u64| space.map_or(or, |space| space.of(disk_bytes));
        if !self.policy.is_empty() {
            let rule = |rule: &Rule| PruneOptions {
                all: rule.all,
                filters: rule.filters.clone(),
                keep_duration: rule.keep_duration.map_or_else(Default::default, |period| period.0),
                reserved_space_bytes: of(rule.reserved_space, 0),
                max_used_space_bytes: of(rule.max_used_space, 0),
                min_free_space_bytes: of(rule.min_free_space, 0),
            };
            let rules: Vec<PruneOptions> = self.policy.iter().map(rule).collect();
            rules.iter().try_for_each(PruneOptions::check)?;
            return Ok(rules);
        }
        let mut rules = PruneOptions::default_policy(disk_bytes);
        for rule in rules.iter_mut().filter(|rule| rule.filters.is_empty()) {
            rule.reserved_space_bytes = of(self.reserved_space, rule.reserved_space_bytes);
            rule.max_used_space_bytes = of(self.max_used_space, rule.max_used_space_bytes);
            rule.min_free_space_bytes = of(self.min_free_space, rule.min_free_space_bytes);
        }
        Ok(rules)
    }
}

/// What the file says to an engine.
pub(crate) struct Settings {
    /// How layers are kept and mounted, if it says so.
    pub(crate) driver: Option<Driver>,
    /// What the client of registries is to know.
    pub(crate) registry: ClientOptions,
    /// The rules that the build cache is kept by.
    pub(crate) policy: Vec<PruneOptions>,
    /// What archives may cost.
    pub(crate) limits: ArchiveLimits,
}

/// Reads the file, for a store on a file system of this size.
pub(crate) fn load(file: Option<&Path>, disk_bytes: u64) -> anyhow::Result<Settings> {
    let config = read(file)?;
    let policy = config.gc.rules(disk_bytes).context("[gc] of the config file is not valid")?;
    let (limits, documents) = config.limits.limits();
    let registry = ClientOptions { limits: documents, ..registries(config.registry) };
    Ok(Settings { driver: config.driver, registry, policy, limits })
}

fn registries(hosts: BTreeMap<String, HostConfig>) -> ClientOptions {
    let var = |names: [&str; 2]| names.iter().find_map(|name| std::env::var(name).ok()).filter(|text| !text.is_empty());
    ClientOptions {
        hosts,
        certificate_dirs: certificate_dir().into_iter().collect(),
        credentials: Credentials { file: credentials(), search_path: search_path() },
        // As curl: HTTP_PROXY in capitals could come from a request's header, where ply runs as a CGI program.
        proxies: Proxies {
            https: var(["https_proxy", "HTTPS_PROXY"]),
            http: std::env::var("http_proxy").ok(),
            none_for: var(["no_proxy", "NO_PROXY"]).unwrap_or_default(),
        },
        retry: RetryPolicy::default(),
        limits: DocumentLimits::DEFAULT,
    }
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

    #[test]
    fn limits_are_numbers_or_sizes_and_the_default_ones_where_nothing_is_said() {
        let limits = |text: &str| toml::from_str::<Config>(text).map(|config| config.limits.limits());
        assert_eq!(limits("").unwrap(), (ArchiveLimits::default(), DocumentLimits::DEFAULT));
        let (archive, documents) = limits("[limits]\nunpacked-bytes = \"2GiB\"\nlayers = 3\nentries = 7").unwrap();
        assert_eq!(archive, ArchiveLimits { unpacked_bytes: 2 << 30, entries: 7, ..ArchiveLimits::default() });
        assert_eq!(documents, DocumentLimits { layers: 3, ..DocumentLimits::DEFAULT });
        for bad in ["layer = 1", "layers = -1", "layers = \"many\"", "layers = 1.5", "file_bytes = 1"] {
            assert!(limits(&format!("[limits]\n{bad}")).is_err(), "{bad}");
        }
    }

    #[test]
    fn rules_are_read_and_their_sizes_may_be_parts_of_the_file_system() {
        const DISK: u64 = 40_000_000_000;
        let rules = |text: &str| toml::from_str::<Config>(text).map_err(anyhow::Error::from)?.gc.rules(DISK);
        assert_eq!(rules("").unwrap(), PruneOptions::default_policy(DISK));
        assert_eq!(rules("[gc]\nenabled = false").unwrap(), []);
        let mut expected = PruneOptions::default_policy(DISK);
        expected[1..].iter_mut().for_each(|rule| rule.max_used_space_bytes = 2_000_000_000);
        assert_eq!(rules("[gc]\nmax-used-space = \"5%\"").unwrap(), expected, "the first rule has a cap of its own");
        let own = "[[gc.policy]]\nfilters = [\"type==source.local\"]\nkeepDuration = \"2d\"\nreserved-space = \"1GB\"\n\
                   [[gc.policy]]\nall = true\nmaxUsedSpace = \"25%\"\nmin-free-space = \"2GiB\"";
        let first = PruneOptions {
            filters: vec!["type==source.local".into()],
            keep_duration: std::time::Duration::from_secs(2 * 86_400),
            reserved_space_bytes: 1_000_000_000,
            ..PruneOptions::default()
        };
        let second = PruneOptions {
            all: true,
            max_used_space_bytes: 10_000_000_000,
            min_free_space_bytes: 2 << 30,
            ..PruneOptions::default()
        };
        assert_eq!(rules(own).unwrap(), [first, second]);
        for (bad, word) in [
            ("[gc]\nmax-used-space = \"101%\"", "expected a size"),
            ("[gc]\nmax-used = \"1GB\"", "unknown field"),
            ("[gc]\nmax-used-space = \"1GB\"\n[[gc.policy]]\nall = true", "put them there"),
            ("[[gc.policy]]\nkeep-duration = \"long\"", "expected a duration"),
            ("[[gc.policy]]\nfilters = [\"type=x\"]", "filter"),
        ] {
            let error = format!("{:#}", rules(bad).unwrap_err());
            assert!(error.contains(word), "{bad}: {error}");
        }
    }
}
