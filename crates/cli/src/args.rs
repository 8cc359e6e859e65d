//! What users type.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use plies_engine::IdRange;
use plies_engine::build::{Entitlement, Secret, SecretSource, SshAgent, SshSource};
use plies_engine::exec::{ExecutorChoice, ResourceLimit};
use plies_oci::{Platform, Reference};
use serde::Deserialize;

use crate::commands::search_path;
use crate::config::Space;
use crate::output;
use crate::progress;

/// Stores, builds and moves container images.
#[derive(Debug, Parser)]
#[command(name = "ply", version, max_term_width = 100, arg_required_else_help = true)]
pub(crate) struct Ply {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
pub(crate) struct Global {
    /// State directory [default: /var/lib/plies as root, the XDG data directory otherwise]
    #[arg(long, global = true, env = "PLY_ROOT", value_name = "DIR", help_heading = "Global options")]
    pub(crate) root: Option<PathBuf>,
    /// How layers are kept and mounted [default: as the config file says, or auto]
    #[arg(long, global = true, value_enum, env = "PLY_DRIVER", value_name = "DRIVER", help_heading = "Global options")]
    pub(crate) driver: Option<Driver>,
    /// Config file [default: /etc/plies/config.toml as root, plies/config.toml in the XDG config directory otherwise]
    #[arg(long, global = true, env = "PLY_CONFIG", value_name = "FILE", help_heading = "Global options")]
    pub(crate) config: Option<PathBuf>,
    /// One JSON document on standard output instead of a table
    #[arg(long, global = true, help_heading = "Global options")]
    pub(crate) json: bool,
    /// Show the whole chain of causes of an error
    #[arg(short, long, global = true, help_heading = "Global options")]
    pub(crate) verbose: bool,
    /// No progress
    #[arg(short, long, global = true, help_heading = "Global options")]
    pub(crate) quiet: bool,
    /// Fail at once if another process holds the state directory
    #[arg(long, global = true, help_heading = "Global options")]
    pub(crate) no_wait: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Driver {
    /// For a new store the first that works of `erofs`, `overlay` and `native`, then always the same
    #[default]
    Auto,
    /// A directory a layer, stacked by the kernel
    Overlay,
    /// Layers stay the tars that they came as, with an index that the kernel mounts and stacks (Linux 6.12, with loop devices 6.4)
    Erofs,
    /// Plain copies, where overlayfs is missing
    Native,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Build an image from a Dockerfile
    Build(Box<Build>),
    /// Fetch an image from a registry
    Pull(Pull),
    /// Send an image to a registry
    Push {
        /// Image name or ID
        image: String,
        /// Names to push it under [default: its own]
        #[arg(value_name = "NAME[:TAG]", value_parser = image_name)]
        names: Vec<String>,
    },
    /// Take in images from an archive: OCI layout or docker archive, directory or tar
    Load(Load),
    /// Write images into an archive
    Save(Save),
    /// List images
    Images,
    /// Show an image's config, layers and digests
    Inspect {
        /// Image name or ID
        image: String,
    },
    /// Show how an image came to be, newest step first
    History {
        /// Image name or ID
        image: String,
    },
    /// Give an image another name
    Tag {
        /// Image name or ID
        source: String,
        /// The new name
        #[arg(value_parser = image_name)]
        target: String,
    },
    /// Remove names, and images that lost their last one
    Rmi {
        /// Image names or IDs
        #[arg(required_unless_present = "dangling")]
        images: Vec<String>,
        /// Remove all images that no name points at and no other image was built on
        #[arg(long, conflicts_with = "images")]
        dangling: bool,
    },
    /// Layers by the chain that they complete, as docker's layer store keeps them
    #[command(subcommand)]
    Layer(Layer),
    /// Run a command in an image; what it changes is thrown away
    Run(Run),
    /// Mount an image or a record on a directory
    Mount {
        /// Image name or ID, or record ID
        target: String,
        /// An existing directory
        dir: PathBuf,
        /// Writable: of a mutable record its own data; of anything else a fresh upper, kept until unmounted
        #[arg(long)]
        rw: bool,
    },
    /// Undo `ply mount`
    Umount {
        /// The directory
        dir: PathBuf,
    },
    /// Records of the build cache by hand
    #[command(subcommand)]
    Ref(Ref),
    /// Show what uses disk space: by kind, or with -v or --filter each record and all else
    Du {
        /// Only records that match: `type==regular`, `inuse`, `shared`, `size>=10MB`, `until=24h`, …; comma is and,
        /// repeated is or
        #[arg(long, value_name = "FILTER")]
        filter: Vec<String>,
    },
    /// Show what keeps a record, layer, blob or image
    Why {
        /// Record, layer or chain ID, digest of a blob, or image name or ID
        target: String,
    },
    /// Show what stands on what
    Tree {
        /// Only this image or record
        target: Option<String>,
    },
    /// Remove records of the build cache, and what nothing needs any more
    Prune(Prune),
    /// Take over what another program keeps
    #[command(subcommand)]
    Import(Import),
    /// Remove what nothing refers to
    Gc {
        /// Only say what would go
        #[arg(long)]
        dry_run: bool,
        /// Trust no count: follow everything that holds something, and put wrong counts right
        #[arg(long, conflicts_with = "dry_run")]
        full: bool,
        /// Also give back what the catalogue's file has too much
        #[arg(long, conflicts_with = "dry_run")]
        compact: bool,
    },
    /// Bring a store that an older version made up to this one's format
    ///
    /// With --driver, layers that came as tars are then kept as that driver keeps them. Nothing may be mounted meanwhile.
    Migrate {
        /// Only say what would be done
        #[arg(long)]
        dry_run: bool,
    },
    /// Look for damage, and repair it
    ///
    /// Exits with 0 if nothing is wrong or all was repaired, with 1 if something is left, with 2 if it could not look.
    Fsck(Fsck),
    /// Say what this store is
    Info,
    /// Print completions for a shell
    Completions {
        /// Which shell
        shell: Shell,
    },
    /// Write man pages
    Man {
        /// Into this directory
        dir: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Fsck {
    /// Only the store's directories against its rows
    #[arg(long, conflicts_with_all = ["read_data", "rebuild"])]
    pub(crate) quick: bool,
    /// Also read blobs and layers: all of them, or another part of them each time
    #[arg(long, value_name = "N%", num_args = 0..=1, require_equals = true, default_missing_value = "100%", value_parser = percent)]
    pub(crate) read_data: Option<u8>,
    /// Put right what can be put right; what has to go is kept in lost/ below the root
    #[arg(long)]
    pub(crate) repair: bool,
    /// With --repair: only say what it would do
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Make a new catalogue of what is left of the old one and of the data, then repair
    #[arg(long, conflicts_with = "dry_run")]
    pub(crate) rebuild: bool,
    /// Remove what repairs have put into lost/, and do nothing else
    #[arg(long, conflicts_with_all = ["quick", "read_data", "repair", "rebuild", "dry_run"])]
    pub(crate) empty_lost: bool,
}

/// `10%` or `10`: 1 to 100.
fn percent(text: &str) -> Result<u8, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse();
    number.ok().filter(|number| (1..=100).contains(number)).ok_or_else(|| "a share of 1% to 100% is wanted".to_owned())
}

#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// What it is to run on, of the platforms that there are: `linux/arm64`, `linux/arm/v7` [default: this machine]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]", value_parser = platform)]
    pub(crate) platform: Option<Platform>,
    /// Fetch manifests and config only; layers come when they are needed
    #[arg(long)]
    pub(crate) lazy: bool,
    /// Image name, with a tag or a digest
    #[arg(value_name = "NAME[:TAG|@DIGEST]", value_parser = reference)]
    pub(crate) image: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Import {
    /// BuildKit's build cache: the state directory of its daemon, which must not run, or of one worker
    Buildkit(ImportFrom),
    /// Docker's images, of the overlay2 driver: its data root
    Docker(ImportImages),
    /// Images of podman, buildah or CRI-O, of the overlay driver: their graph root
    ContainersStorage(ImportImages),
    /// Images of containerd, with what its overlayfs snapshotter unpacked: its root directory; it must not run
    Containerd(ImportContainerd),
}

#[derive(Debug, Args)]
pub(crate) struct ImportContainerd {
    #[command(flatten)]
    pub(crate) images: ImportImages,
    /// Only what this namespace has; several: in this order, and a name is that of the first that has it
    #[arg(long = "namespace", value_name = "NAME")]
    pub(crate) namespaces: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ImportImages {
    #[command(flatten)]
    pub(crate) from: ImportFrom,
    /// Take containers' writable layers too: they are called by the containers' IDs (see `ply layer rw ls`)
    #[arg(long)]
    pub(crate) containers: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ImportFrom {
    /// Directory to read; it is never written to
    pub(crate) path: PathBuf,
    /// Only say what would come over
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Copy files instead of linking to them: for a directory on another file system
    #[arg(long)]
    pub(crate) copy: bool,
    /// Read all files of Docker's, podman's and buildah's layers, and hold them against the layers' digests
    #[arg(long)]
    pub(crate) verify: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Load {
    /// File or directory to read [default: standard input]
    #[arg(short, long, value_name = "PATH")]
    pub(crate) input: Option<PathBuf>,
    /// Name for an image that the archive leaves nameless
    #[arg(long, value_name = "NAME", value_parser = image_name)]
    pub(crate) tag: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Save {
    /// File, or directory for `oci-dir`, to write [default: standard output]
    #[arg(short, long, value_name = "PATH")]
    pub(crate) output: Option<PathBuf>,
    /// What to write
    #[arg(long, value_enum, default_value_t)]
    pub(crate) format: SaveFormat,
    /// Image names or IDs
    #[arg(required = true)]
    pub(crate) images: Vec<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum SaveFormat {
    /// OCI layout in a tar
    #[default]
    Oci,
    /// OCI layout in a directory
    OciDir,
    /// Docker archive, plain layers
    Docker,
}

#[derive(Debug, Args)]
pub(crate) struct Build {
    /// Name of the result; may be given several times
    #[arg(short, long, value_name = "NAME[:TAG]", value_parser = image_name)]
    pub(crate) tag: Vec<String>,
    /// The Dockerfile [default: CONTEXT/Dockerfile]
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Stage to build [default: the last]
    #[arg(long, value_name = "STAGE")]
    pub(crate) target: Option<String>,
    /// Value of an ARG; without `=VALUE` it is taken from the environment
    #[arg(long, value_name = "KEY[=VALUE]", value_parser = keyed)]
    pub(crate) build_arg: Vec<String>,
    /// Label of the result; without `=VALUE` it is empty
    #[arg(long, value_name = "KEY[=VALUE]", value_parser = keyed)]
    pub(crate) label: Vec<String>,
    /// Run every step, whatever is cached
    #[arg(long)]
    pub(crate) no_cache: bool,
    /// Run every step of these stages, whatever is cached
    #[arg(long, value_name = "STAGE", value_delimiter = ',')]
    pub(crate) no_cache_filter: Vec<String>,
    /// Only say what is questionable in the Dockerfile, as `docker build --check` does, and exit with 1 if anything is
    #[arg(long, conflicts_with_all = ["tag", "iidfile"])]
    pub(crate) check: bool,
    /// What the result is to run on [default: this machine]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]", value_parser = platform)]
    pub(crate) platform: Option<Platform>,
    /// Ask the registries for images to build on, also for those that are here
    #[arg(long)]
    pub(crate) pull: bool,
    /// Image that may have the results of steps that the build cache has not; may be given several times
    #[arg(long, value_name = "IMAGE", value_parser = cache_source)]
    pub(crate) cache_from: Vec<String>,
    /// Say for every step where its result came from
    #[arg(long)]
    pub(crate) explain: bool,
    /// Secret that RUN --mount=type=secret may ask for: `id=ID,src=FILE`, or `id=ID,env=NAME` for a variable's value
    #[arg(long, value_name = "id=ID[,src=FILE|,env=NAME]", value_parser = secret)]
    pub(crate) secret: Vec<Secret>,
    /// SSH agent that RUN --mount=type=ssh may ask for, or keys for one [default: the agent at $SSH_AUTH_SOCK]
    #[arg(long, value_name = "default|ID[=SOCKET|KEYFILE,…]", value_parser = ssh_agent)]
    pub(crate) ssh: Vec<SshAgent>,
    /// What the Dockerfile may ask for: `network.host`, `security.insecure`
    #[arg(long, value_name = "ENTITLEMENT", value_delimiter = ',', value_parser = entitlement)]
    pub(crate) allow: Vec<Entitlement>,
    /// Network of commands that do not say otherwise
    #[arg(long, value_enum, default_value_t, value_name = "NETWORK")]
    pub(crate) network: RunNetwork,
    /// Line of the commands' /etc/hosts
    #[arg(long, value_name = "HOST:IP", value_parser = host)]
    pub(crate) add_host: Vec<(String, String)>,
    /// Limit of the commands' processes, such as `nofile=1024:2048`
    #[arg(long, value_name = "NAME=SOFT[:HARD]", value_parser = ResourceLimit::parse)]
    pub(crate) ulimit: Vec<ResourceLimit>,
    /// Size of the commands' /dev/shm [default: 64m]
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    pub(crate) shm_size: Option<u64>,
    /// Write the image ID to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) iidfile: Option<PathBuf>,
    /// Write what was built to this file, as JSON with docker's names
    #[arg(long, value_name = "FILE")]
    pub(crate) metadata_file: Option<PathBuf>,
    /// Where the result goes besides the store: `type=oci|docker|local|tar,dest=PATH`, `type=registry`; `type=image` is
    /// done anyway, `type=cacheonly` is nowhere. Images take `compression=`, `annotation.KEY=`,
    /// `rewrite-timestamp=true` and more; may be given several times
    #[arg(short, long, value_name = "type=TYPE[,KEY=VALUE…]", value_parser = output::output)]
    pub(crate) output: Vec<output::Given>,
    /// Annotation of the result's manifest, or of its entry in a layout (`manifest-descriptor:`)
    #[arg(long, value_name = "[LEVEL:]KEY=VALUE", value_parser = output::annotation)]
    pub(crate) annotation: Vec<output::Annotation>,
    /// How to show progress
    #[arg(long, value_enum, default_value_t)]
    pub(crate) progress: progress::Style,
    /// What runs the steps
    #[command(flatten)]
    pub(crate) executor: ExecutorArg,
    /// Directory whose files COPY and ADD take
    pub(crate) context: PathBuf,
}

/// As docker's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum RunPull {
    /// Every time
    Always,
    /// If it is not here
    #[default]
    Missing,
    /// Not at all
    Never,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum RunNetwork {
    /// As `host`
    #[default]
    Default,
    /// Loopback only
    None,
    /// This machine's
    Host,
}

#[derive(Debug, Args)]
pub(crate) struct Prune {
    /// Also internal records, frontends, and what an image has as well
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Only records that match: `type==regular`, `description~=npm`, `until=24h`, `size>=10MB`, …; comma is and,
    /// repeated is or
    #[arg(long, value_name = "FILTER", value_parser = filter)]
    pub(crate) filter: Vec<String>,
    /// Only records that were not used for so long: 90s, 48h, 7d
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) keep_duration: Option<Duration>,
    /// Leave at least so much of the cache: 500MB, 2GiB, 10% (of the file system)
    #[arg(long, visible_alias = "keep-storage", value_name = "SIZE")]
    pub(crate) reserved_space: Option<Space>,
    /// Remove only what is over this size
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_used_space: Option<Space>,
    /// Remove only as much as is needed to have so much free on the file system
    #[arg(long, value_name = "SIZE")]
    pub(crate) min_free_space: Option<Space>,
    /// Only say what would go, and why the rest stays
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) force: bool,
}

/// A filter; docker's `KEY=VALUE` is `KEY==VALUE` here.
fn filter(text: &str) -> Result<String, std::convert::Infallible> {
    Ok(match text.split_once('=') {
        Some((key, value)) if ["type", "id"].contains(&key) && !value.starts_with('=') => format!("{key}=={value}"),
        _ => text.to_owned(),
    })
}

fn duration(text: &str) -> Result<Duration, String> {
    plies_engine::parse_duration(text).ok_or_else(|| "expected a duration such as 90s, 48h or 7d".into())
}

fn memory(text: &str) -> Result<u64, String> {
    let bytes = plies_engine::dockerfile::ram_bytes(text).filter(|bytes| *bytes > 0);
    bytes.ok_or_else(|| "expected a size such as 64m or 1g".into())
}

/// A secret, as docker takes it; its variable is read here, its file when a command needs it.
fn secret(text: &str) -> Result<Secret, String> {
    let (mut id, mut file, mut env, mut kind) = (None, None, None, None);
    for field in text.split(',') {
        let Some((key, value)) = field.split_once('=') else {
            return Err(format!("{field:?}: expected KEY=VALUE, as in id=token,src=token.txt"));
        };
        match key {
            "id" => id = Some(value.to_owned()),
            "src" | "source" => file = Some(value.to_owned()),
            "env" => env = Some(value.to_owned()),
            "type" if ["file", "env"].contains(&value) => kind = Some(value),
            "type" => return Err(format!("the type is file or env, not {value:?}")),
            _ => return Err(format!("unknown key {key:?}: there are id, src, env and type")),
        }
    }
    let id = id.filter(|id| !id.is_empty()).ok_or("id=ID is missing")?;
    // As docker: with `type=env`, `src` names the variable; without either, one of the id's name goes before a file.
    let is_set = |name: &str| std::env::var_os(name).is_some();
    let (file, env) = match (file, env) {
        (Some(_), Some(_)) => return Err("a secret has one source: src or env".into()),
        (Some(name), None) if kind == Some("env") => (None, Some(name)),
        (None, None) if kind == Some("env") || (kind.is_none() && is_set(&id)) => (None, Some(id.clone())),
        (None, None) => (Some(id.clone()), None),
        given => given,
    };
    let source = match (file, env) {
        (_, Some(name)) => {
            let value = std::env::var_os(&name).ok_or_else(|| format!("the variable {name} is not set"))?;
            SecretSource::Value(std::os::unix::ffi::OsStringExt::into_vec(value))
        }
        (file, None) => {
            let path = PathBuf::from(file.unwrap_or_default());
            let found = std::fs::metadata(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            if !found.is_file() {
                return Err(format!("{} is no regular file", path.display()));
            }
            SecretSource::File(path)
        }
    };
    Ok(Secret { id, source })
}

fn ssh_agent(text: &str) -> Result<SshAgent, String> {
    use std::os::unix::fs::FileTypeExt as _;
    let (id, paths) = text.split_once('=').map_or((text, ""), |(id, paths)| (id, paths));
    if id.is_empty() {
        return Err("the id is missing: default, ID=SOCKET or ID=KEYFILE[,KEYFILE]".into());
    }
    let mut paths: Vec<PathBuf> = paths.split(',').filter(|path| !path.is_empty()).map(PathBuf::from).collect();
    if paths.is_empty() {
        let agent = std::env::var_os("SSH_AUTH_SOCK").filter(|path| !path.is_empty());
        let agent = agent.ok_or("no agent: SSH_AUTH_SOCK is not set; give ID=SOCKET or ID=KEYFILE")?;
        paths.push(agent.into());
    }
    let kind = |path: &PathBuf| match std::fs::metadata(path) {
        Ok(found) if found.file_type().is_socket() => Ok(true),
        Ok(found) if found.is_file() => Ok(false),
        Ok(_) => Err(format!("{} is neither a socket nor a key file", path.display())),
        Err(error) => Err(format!("{}: {error}", path.display())),
    };
    let are_sockets = paths.iter().map(kind).collect::<Result<Vec<bool>, _>>()?;
    let source = match (are_sockets.as_slice(), paths.pop()) {
        ([true], Some(socket)) => SshSource::Socket(socket),
        (all, last) if !all.contains(&true) => SshSource::Keys(paths.into_iter().chain(last).collect()),
        _ => return Err("give one socket, or key files".into()),
    };
    Ok(SshAgent { id: id.to_owned(), source })
}

fn entitlement(text: &str) -> Result<Entitlement, String> {
    let found = Entitlement::ALL.into_iter().find(|known| known.name() == text);
    found.ok_or_else(|| format!("there are {}", Entitlement::ALL.map(Entitlement::name).join(" and ")))
}

/// A name and its address, with `:` or, as docker takes it too, `=` between.
fn host(text: &str) -> Result<(String, String), String> {
    let split = text.split_once('=').or_else(|| text.split_once(':'));
    let (name, address) = split.filter(|(name, _)| !name.is_empty()).ok_or("expected HOST:IP")?;
    if name.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(format!("{name:?} is no host name"));
    }
    let bare = address.strip_prefix('[').and_then(|address| address.strip_suffix(']')).unwrap_or(address);
    match bare.parse::<std::net::IpAddr>() {
        Ok(address) => Ok((name.to_owned(), address.to_string())),
        Err(_) => Err(format!("{address:?} is no IP address")),
    }
}

#[derive(Debug, Args)]
pub(crate) struct ExecutorArg {
    /// What runs commands: `auto`, `builtin`, or the path of an OCI runtime
    #[arg(long, default_value = "auto", value_name = "auto|builtin|PATH", value_parser = executor)]
    pub(crate) executor: ExecutorChoice,
}

/// A name that an image can be given.
fn image_name(text: &str) -> Result<String, String> {
    let name: Reference = text.parse().map_err(|error: plies_oci::ReferenceError| error.to_string())?;
    match name.digest() {
        Some(_) => Err("a digest cannot be given as a name".into()),
        None => Ok(text.to_owned()),
    }
}

/// A name that an image can be pulled by.
fn reference(text: &str) -> Result<String, String> {
    text.parse::<Reference>().map(|_| text.to_owned()).map_err(|error| format!("{:#}", anyhow::Error::new(error)))
}

fn platform(text: &str) -> Result<Platform, String> {
    if text.contains(',') {
        return Err("one platform at a time: build each under a name of its own".into());
    }
    text.parse().map_err(|error: plies_oci::PlatformError| error.to_string())
}

/// Something with a key, whatever its value.
fn keyed(text: &str) -> Result<String, String> {
    match text {
        "" => Err("the key is missing".into()),
        text if text.starts_with('=') => Err("the key before `=` is missing".into()),
        text => Ok(text.to_owned()),
    }
}

/// An image to take steps' results from. Of BuildKit's `type=…` none is known yet.
fn cache_source(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some(_) => Err("only images that are here can be given yet, by name or ID".into()),
        None if text.is_empty() => Err("an image name or ID is expected".into()),
        None => Ok(text.to_owned()),
    }
}

fn executor(text: &str) -> Result<ExecutorChoice, String> {
    Ok(match text {
        "auto" => ExecutorChoice::Auto,
        "builtin" => ExecutorChoice::Builtin,
        path if path.contains('/') => ExecutorChoice::Runtime(path.into()),
        // A bare name is looked for as a shell would.
        name => match search_path().iter().map(|dir| dir.join(name)).find(|path| path.is_file()) {
            Some(path) => ExecutorChoice::Runtime(path),
            None => return Err("expected auto, builtin, or an OCI runtime in PATH".into()),
        },
    })
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    #[command(flatten)]
    pub(crate) executor: ExecutorArg,
    /// What the image is to be made for [default: this machine]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]", value_parser = platform)]
    pub(crate) platform: Option<Platform>,
    /// When to ask the registry for the image
    #[arg(long, value_enum, default_value_t, value_name = "WHEN")]
    pub(crate) pull: RunPull,
    /// Image name or ID
    pub(crate) image: String,
    /// Command and arguments [default: the image's]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Ref {
    /// List records
    Ls,
    /// Show a record
    Inspect {
        /// Record ID
        id: String,
    },
    /// Make a mutable record and print its ID
    New {
        /// Record or image to start from [default: an empty tree]
        #[arg(long, value_name = "ID")]
        parent: Option<String>,
        /// What it is for
        #[arg(long, default_value = "", value_name = "TEXT")]
        description: String,
    },
    /// Make an immutable record of a mutable one, which goes, and print its ID
    Commit {
        /// Record ID
        id: String,
    },
    /// Fetch, unpack or compute what is missing of a record's tree and print its ID
    Get {
        /// Record ID
        id: String,
    },
    /// Make the record that shows all of these over one another and print its ID
    Merge {
        /// Records or images, the lowest first
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
    /// Make the record that leads from one tree to another and print its ID
    Diff {
        /// Record or image to start from; - is the empty tree
        lower: String,
        /// Record or image to end at
        upper: String,
    },
    /// Keep a record from being pruned
    Pin {
        /// Record ID
        id: String,
    },
    /// Let a record be pruned again
    Unpin {
        /// Record ID
        id: String,
    },
    /// Write a record's own layer, or the whole tree of a merge, as an archive
    Export {
        /// Record ID
        id: String,
        /// File to write; compressed if its name ends in .gz or .zst
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
    /// Remove records
    Rm {
        /// Record IDs
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Layer {
    /// Register a layer from a tar and print its chain ID
    Register {
        /// Chain ID of the layer to put it on [default: none]
        #[arg(long, value_name = "CHAINID")]
        parent: Option<String>,
        /// The tar, plain or packed; `-` is standard input
        #[arg(default_value = "-")]
        file: PathBuf,
    },
    /// List registered layers
    Ls,
    /// Show a registered layer
    Inspect {
        /// Chain ID
        chain: String,
    },
    /// Let go of a layer that was registered or committed by hand, once
    Release {
        /// Chain ID
        chain: String,
    },
    /// Write a layer's tar, byte for byte as it was registered
    Export {
        /// Chain ID
        chain: String,
        /// File to write [default: standard output]
        #[arg(short, long, value_name = "PATH")]
        output: Option<PathBuf>,
    },
    /// Writable layers by name
    #[command(subcommand)]
    Rw(Rw),
}

#[derive(Debug, Subcommand)]
pub(crate) enum Rw {
    /// Make a writable layer
    Create {
        /// Its name
        name: String,
        /// Chain ID of the layer to put it on [default: none]
        #[arg(long, value_name = "CHAINID")]
        parent: Option<String>,
        /// Security label of its mounts (SELinux)
        #[arg(long)]
        label: Option<String>,
        /// Whose its files show as while it is mounted: COUNT users from INSIDE on disk as those from OUTSIDE; may be
        /// given several times [default: --gid-map]
        #[arg(long, value_name = "INSIDE:OUTSIDE:COUNT")]
        uid_map: Vec<IdRange>,
        /// The same for groups [default: --uid-map]
        #[arg(long, value_name = "INSIDE:OUTSIDE:COUNT")]
        gid_map: Vec<IdRange>,
        /// Make what every container needs (/dev/console, /etc/hosts, …) in a layer of its own below it
        #[arg(long)]
        init: bool,
    },
    /// List writable layers
    Ls,
    /// Mount a writable layer
    Mount {
        /// Its name
        name: String,
        /// An existing directory
        dir: PathBuf,
    },
    /// Undo `ply layer rw mount`
    Umount {
        /// Its name
        name: String,
    },
    /// List what was written to it: A added, M modified, D deleted
    Changes {
        /// Its name
        name: String,
    },
    /// Make a layer of what was written to it, and print the chain ID
    Commit {
        /// Its name
        name: String,
    },
    /// Remove writable layers
    Rm {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
}
