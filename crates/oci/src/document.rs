use std::collections::{BTreeMap, HashSet};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use oci_spec::image as spec;
use serde::de::{self, DeserializeOwned, DeserializeSeed, MapAccess, SeqAccess, Visitor};

use crate::{BlobDigest, DiffId, DigestError, ErrorKind, Family, ImageId, MediaClass, MediaType, classify};

/// Limits on documents that come in, so that a hostile one costs little. All are inclusive: a value equal to the limit
/// passes. Errors name them as the config file does, `limits.manifest-bytes`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DocumentLimits {
    /// Bytes of a manifest or an index. Default 4 MiB: containerd refuses more than 4·1048·1048 (`MaxManifestSize`, after
    /// CVE-2023-25153), and registries commonly stop there too.
    pub manifest_bytes: u64,
    /// Bytes of an image config. Default 8 MiB; the largest seen in public images are below 1 MiB.
    pub config_bytes: u64,
    /// Manifests listed by one index. Default 10,000.
    pub index_entries: u64,
    /// Indexes on the way to a manifest, an archive's `index.json` not counted. Default 4: builders nest one level, and a
    /// chain of them could be endless.
    pub index_depth: u64,
    /// Layers of an image. Default 1,000: the kernel stacks 500 overlay directories, far deeper images are squashed by their
    /// builders, and each layer costs a mount slot.
    pub layers: u64,
    /// Entries of an image's history. Default 10,000: an entry for each layer, and ten without one.
    pub history: u64,
}

impl DocumentLimits {
    /// What holds where nobody says otherwise.
    pub const DEFAULT: Self = Self {
        manifest_bytes: 4 << 20,
        config_bytes: 8 << 20,
        index_entries: 10_000,
        index_depth: 4,
        layers: 1_000,
        history: 10_000,
    };

    /// For documents that were held against limits before.
    const NONE: Self = Self {
        manifest_bytes: u64::MAX,
        config_bytes: u64::MAX,
        index_entries: u64::MAX,
        index_depth: u64::MAX,
        layers: u64::MAX,
        history: u64::MAX,
    };

    fn check(
        limit: &'static str,
        maximum: u64,
        what: &'static str,
        actual: usize,
        unit: &'static str,
    ) -> Result<(), DocumentError> {
        let actual = actual as u64;
        if actual > maximum { Err(DocumentError::Limit { what, actual, unit, limit, maximum }) } else { Ok(()) }
    }

    fn check_manifest_bytes(&self, what: &'static str, raw: &[u8]) -> Result<(), DocumentError> {
        Self::check("limits.manifest-bytes", self.manifest_bytes, what, raw.len(), "bytes")
    }

    fn check_layers(&self, what: &'static str, layers: usize) -> Result<(), DocumentError> {
        Self::check("limits.layers", self.layers, what, layers, "layers")
    }
}

impl Default for DocumentLimits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Why a document is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DocumentError {
    /// Not the JSON that the document's specification asks for.
    #[error("{what} {digest} is not valid")]
    Json {
        /// What it should have been.
        what: &'static str,
        /// Which one.
        digest: BlobDigest,
        /// Where it goes wrong.
        #[source]
        source: serde_json::Error,
    },
    /// A digest in it does not parse.
    #[error("{what} {digest} holds a bad digest")]
    Digest {
        /// What the document is.
        what: &'static str,
        /// Which one.
        digest: BlobDigest,
        /// What is wrong with the digest inside.
        #[source]
        source: DigestError,
    },
    /// A rule that JSON can't express is broken.
    #[error("{what} {digest}: {rule}")]
    Rule {
        /// What the document is.
        what: &'static str,
        /// Which one.
        digest: BlobDigest,
        /// The broken rule.
        rule: String,
    },
    /// A limit was passed.
    #[error("{what} has {actual} {unit}, the limit {limit} is {maximum}")]
    Limit {
        /// What the document is.
        what: &'static str,
        /// How many it has.
        actual: u64,
        /// Of what.
        unit: &'static str,
        /// The limit's name.
        limit: &'static str,
        /// The limit's value.
        maximum: u64,
    },
}

impl DocumentError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Limit { .. } => ErrorKind::Limit,
            _ => ErrorKind::InvalidInput,
        }
    }
}

/// Media type, digest and size of a blob elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// What the blob is.
    pub media_type: MediaType,
    /// Which blob it is.
    pub digest: BlobDigest,
    /// Its length.
    pub size_bytes: u64,
    /// Where else it can be had.
    pub urls: Vec<String>,
    /// Free-form notes, sorted by key.
    pub annotations: BTreeMap<String, String>,
    /// What the image runs on, where an index says so.
    pub platform: Option<Platform>,
}

impl Descriptor {
    /// A descriptor without URLs, annotations or platform.
    pub fn new(media_type: MediaType, digest: BlobDigest, size_bytes: u64) -> Self {
        Self { media_type, digest, size_bytes, urls: Vec::new(), annotations: BTreeMap::new(), platform: None }
    }

    /// Parses a descriptor that stands in the document `what`. Content that it embeds must be what it describes: a reader
    /// that takes it from here must not get something else than one that fetches it.
    fn parse(what: &'static str, document: BlobDigest, spec: &spec::Descriptor) -> Result<Self, DocumentError> {
        let digest = spec.digest().to_string().parse();
        let digest: BlobDigest = digest.map_err(|source| DocumentError::Digest { what, digest: document, source })?;
        if let Some(data) = spec.data() {
            let data = BASE64.decode(data).unwrap_or_default();
            if BlobDigest::of(&data) != digest || data.len() as u64 != spec.size() {
                let rule = format!("the data that it embeds for {digest} is something else");
                return Err(DocumentError::Rule { what, digest: document, rule });
            }
        }
        Ok(Self {
            media_type: spec.media_type().clone(),
            digest,
            size_bytes: spec.size(),
            urls: spec.urls().clone().unwrap_or_default(),
            annotations: spec.annotations().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect(),
            platform: spec.platform().as_ref().map(Platform::from_spec),
        })
    }

    /// As it stands in a manifest or an index; keys come out sorted, so equal descriptors give equal bytes.
    pub fn to_json(&self) -> serde_json::Value {
        let mut json = serde_json::json!({
            "mediaType": self.media_type.to_string(),
            "digest": self.digest.to_string(),
            "size": self.size_bytes,
        });
        if !self.urls.is_empty() {
            json["urls"] = serde_json::json!(self.urls);
        }
        if !self.annotations.is_empty() {
            json["annotations"] = serde_json::json!(self.annotations);
        }
        if let Some(platform) = &self.platform {
            json["platform"] = platform.to_json();
        }
        json
    }
}

/// What an image runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// GOOS.
    pub os: String,
    /// GOARCH.
    pub architecture: String,
    /// GOARM and its like: `v7`, `v8`.
    pub variant: Option<String>,
}

impl Platform {
    /// The platform that this program was built for, in Go's words.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self { os: "linux".into(), architecture: architecture.into(), variant: None }
    }

    fn from_spec(spec: &spec::Platform) -> Self {
        Self {
            os: spec.os().to_string(),
            architecture: spec.architecture().to_string(),
            variant: spec.variant().clone(),
        }
    }

    fn to_json(&self) -> serde_json::Value {
        let mut json = serde_json::json!({"os": self.os, "architecture": self.architecture});
        if let Some(variant) = &self.variant {
            json["variant"] = variant.as_str().into();
        }
        json
    }

    /// Whether an image for `self` runs where `wanted` is asked for. A variant counts only when both name one.
    pub fn serves(&self, wanted: &Platform) -> bool {
        self.os == wanted.os
            && self.architecture == wanted.architecture
            && (self.variant.is_none() || wanted.variant.is_none() || self.variant == wanted.variant)
    }
}

/// Not a platform.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is not a platform, expected OS/ARCHITECTURE[/VARIANT], such as linux/arm64 or linux/arm/v7")]
pub struct PlatformError {
    /// What was given.
    pub text: String,
}

impl PlatformError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidInput
    }
}

/// Takes the names of architectures that people use besides Go's (containerd, `platforms`, `normalizeArch`).
impl std::str::FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let wrong = || PlatformError { text: text.chars().take(300).collect() };
        let parts: Vec<String> = text.split('/').map(str::to_ascii_lowercase).collect();
        let is_word = |word: &String| {
            !word.is_empty() && word.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'-' | b'.'))
        };
        if !parts.iter().all(is_word) {
            return Err(wrong());
        }
        // As containerd: an architecture alone is linux's, and a system alone is for this machine's.
        const LINUX: &str = "linux";
        const ALONE: [&str; 9] = ["amd64", "x86_64", "arm64", "aarch64", "arm", "386", "ppc64le", "s390x", "riscv64"];
        let host = Self::host();
        let (os, architecture, variant) = match parts.as_slice() {
            [os] if os == LINUX => (LINUX, host.architecture.as_str(), None),
            [architecture] if ALONE.contains(&architecture.as_str()) => (LINUX, architecture.as_str(), None),
            [os, architecture] => (os.as_str(), architecture.as_str(), None),
            [os, architecture, variant] => (os.as_str(), architecture.as_str(), Some(variant.as_str())),
            _ => return Err(wrong()),
        };
        let (architecture, variant) = match (architecture, variant) {
            ("x86_64" | "x86-64", variant) => ("amd64", variant),
            ("i386" | "i686", _) => ("386", None),
            ("aarch64", variant) => ("arm64", variant),
            ("armhf", _) => ("arm", Some("v7")),
            ("armel", _) => ("arm", Some("v6")),
            other => other,
        };
        Ok(Self { os: os.to_owned(), architecture: architecture.to_owned(), variant: variant.map(str::to_owned) })
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().try_for_each(|variant| write!(f, "/{variant}"))
    }
}

/// A parsed document with the bytes that it was parsed from. The bytes are its identity; the value is never
/// written back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document<T> {
    raw: Vec<u8>,
    digest: BlobDigest,
    value: T,
}

impl<T> Document<T> {
    /// The bytes as received.
    pub fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// The digest of those bytes.
    pub fn digest(&self) -> BlobDigest {
        self.digest
    }

    /// What the bytes say, in the specification's types.
    pub fn value(&self) -> &T {
        &self.value
    }
}

/// Parses JSON for a document whose identity is its bytes. Stricter than JSON: a key that appears twice, in any case
/// variant, is refused, because readers in other languages disagree on which one counts (hazards J02, J03).
fn parse_json<T: DeserializeOwned>(what: &'static str, raw: &[u8]) -> Result<Document<T>, DocumentError> {
    let digest = BlobDigest::of(raw);
    let json = |source| DocumentError::Json { what, digest, source };
    check_unique_keys(raw).map_err(json)?;
    let value = serde_json::from_slice(raw).map_err(json)?;
    Ok(Document { raw: raw.to_vec(), digest, value })
}

/// Checks that no object in a JSON document names a key twice, in any case variant: readers in other languages disagree
/// on which one counts.
///
/// # Errors
/// The key, or where it is no JSON.
pub fn check_unique_keys(raw: &[u8]) -> Result<(), serde_json::Error> {
    UniqueKeys { free: false }.deserialize(&mut serde_json::Deserializer::from_slice(raw))
}

/// Keys of objects whose own keys are anybody's to choose. There `A` and `a` are two keys; among the specification's
/// they are one to readers that fold case (Go's), so only one may stand there.
const FREE_OBJECTS: [&str; 4] = ["annotations", "Labels", "ExposedPorts", "Volumes"];

/// Reads any JSON value and fails if an object in it names a key twice.
#[derive(Clone, Copy)]
struct UniqueKeys {
    /// Whether the keys of the value itself are anybody's to choose.
    free: bool,
}

impl<'de> DeserializeSeed<'de> for UniqueKeys {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for UniqueKeys {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JSON")
    }
    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }
    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }
    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }
    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }
    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(self)?.is_some() {}
        Ok(())
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            let free = FREE_OBJECTS.iter().any(|object| object.eq_ignore_ascii_case(&key));
            map.next_value_seed(UniqueKeys { free })?;
            // Upper case first: Go takes ſ for s and the Kelvin sign for k.
            let folded = if self.free { key.clone() } else { key.to_uppercase().to_lowercase() };
            if !seen.insert(folded) {
                return Err(de::Error::custom(format_args!("key {key:?} appears twice")));
            }
        }
        Ok(())
    }
}

/// Image manifest: one config and the layers, bottom first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    document: Document<spec::ImageManifest>,
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// The keys that tell a manifest from an index; a document with both means different images to different readers
/// (CVE-2021-41190).
#[derive(serde::Deserialize)]
struct ShapeProbe {
    manifests: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
    #[serde(rename = "mediaType")]
    media_type: Option<String>,
}

fn check_shape(what: &'static str, raw: &[u8], wanted: MediaClass) -> Result<(), DocumentError> {
    let document = parse_json::<ShapeProbe>(what, raw)?;
    let rule = |rule: String| Err(DocumentError::Rule { what, digest: document.digest, rule });
    let probe = &document.value;
    if probe.manifests.is_some() && probe.layers.is_some() {
        return rule("has both `manifests` and `layers`, so it is ambiguous what it is".into());
    }
    match &probe.media_type {
        Some(named) if classify(&MediaType::from(named.as_str())) != Some(wanted) => {
            rule(format!("calls itself {named:?}"))
        }
        _ => Ok(()),
    }
}

impl Manifest {
    /// Parses a manifest of either family that is here already, and was held against limits when it came.
    ///
    /// # Errors
    /// Any [`DocumentError`] but a limit.
    pub fn parse(raw: &[u8]) -> Result<Self, DocumentError> {
        Self::parse_within(raw, &DocumentLimits::NONE)
    }

    /// Parses a manifest of either family that comes from outside.
    ///
    /// # Errors
    /// Any [`DocumentError`]; the config and every layer must have a media type that we know.
    pub fn parse_within(raw: &[u8], limits: &DocumentLimits) -> Result<Self, DocumentError> {
        const WHAT: &str = "image manifest";
        limits.check_manifest_bytes(WHAT, raw)?;
        check_shape(WHAT, raw, MediaClass::Manifest)?;
        let document: Document<spec::ImageManifest> = parse_json(WHAT, raw)?;
        limits.check_layers(WHAT, document.value.layers().len())?;
        let digest = document.digest;
        let descriptor = |spec| Descriptor::parse(WHAT, digest, spec);
        let config = descriptor(document.value.config())?;
        let layers = document.value.layers().iter().map(descriptor).collect::<Result<Vec<_>, _>>()?;
        if let Some(odd) = layers.iter().find(|l| !matches!(classify(&l.media_type), Some(MediaClass::Layer(_)))) {
            let rule =
                format!("layer {} has media type {:?}, which is not supported", odd.digest, odd.media_type.to_string());
            return Err(DocumentError::Rule { what: WHAT, digest, rule });
        }
        Ok(Self { document, config, layers })
    }

    /// Makes a manifest of the family that its config is of: the same arguments always give the same bytes.
    ///
    /// # Errors
    /// [`DocumentError::Limit`]: its annotations or layers are too many for anybody whose limits are the default ones.
    pub fn build(
        config: &Descriptor,
        layers: &[Descriptor],
        annotations: &BTreeMap<String, String>,
    ) -> Result<Self, DocumentError> {
        let media_type = match Family::of(&config.media_type) {
            Family::Oci => MediaType::ImageManifest,
            Family::Docker => MediaType::from(crate::media::DOCKER_MANIFEST),
        };
        let mut json = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": media_type.to_string(),
            "config": config.to_json(),
            "layers": layers.iter().map(Descriptor::to_json).collect::<Vec<_>>(),
        });
        if !annotations.is_empty() {
            json["annotations"] = serde_json::json!(annotations);
        }
        Self::parse_within(json.to_string().as_bytes(), &DocumentLimits::DEFAULT)
    }

    /// Free-form notes on the image, sorted by key.
    pub fn annotations(&self) -> BTreeMap<String, String> {
        self.document.value.annotations().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect()
    }

    /// The document with its raw bytes.
    pub fn document(&self) -> &Document<spec::ImageManifest> {
        &self.document
    }

    /// The image's config.
    pub fn config(&self) -> &Descriptor {
        &self.config
    }

    /// The layers, bottom first.
    pub fn layers(&self) -> &[Descriptor] {
        &self.layers
    }

    /// A descriptor of this manifest itself.
    pub fn descriptor(&self) -> Descriptor {
        let media_type = self.document.value.media_type().clone().unwrap_or(MediaType::ImageManifest);
        Descriptor::new(media_type, self.document.digest, self.document.raw.len() as u64)
    }
}

/// Image index: manifests of several platforms or names, or further indexes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    document: Document<spec::ImageIndex>,
    manifests: Vec<Descriptor>,
}

impl Index {
    /// Parses an index of either family that is here already, and was held against limits when it came.
    ///
    /// # Errors
    /// Any [`DocumentError`] but a limit.
    pub fn parse(raw: &[u8]) -> Result<Self, DocumentError> {
        Self::parse_within(raw, &DocumentLimits::NONE)
    }

    /// Parses an index of either family that comes from outside.
    ///
    /// # Errors
    /// Any [`DocumentError`].
    pub fn parse_within(raw: &[u8], limits: &DocumentLimits) -> Result<Self, DocumentError> {
        const WHAT: &str = "image index";
        limits.check_manifest_bytes(WHAT, raw)?;
        check_shape(WHAT, raw, MediaClass::Index)?;
        let document: Document<spec::ImageIndex> = parse_json(WHAT, raw)?;
        let entries = document.value.manifests().len();
        DocumentLimits::check("limits.index-entries", limits.index_entries, WHAT, entries, "manifests")?;
        let digest = document.digest;
        let manifests = document.value.manifests().iter().map(|spec| Descriptor::parse(WHAT, digest, spec));
        let manifests = manifests.collect::<Result<Vec<_>, _>>()?;
        Ok(Self { document, manifests })
    }

    /// Makes an OCI index: the same arguments always give the same bytes.
    pub fn build(manifests: &[Descriptor]) -> Self {
        let json = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": MediaType::ImageIndex.to_string(),
            "manifests": manifests.iter().map(Descriptor::to_json).collect::<Vec<_>>(),
        });
        Self::parse(json.to_string().as_bytes()).expect("because an index of our own is valid")
    }

    /// The document with its raw bytes.
    pub fn document(&self) -> &Document<spec::ImageIndex> {
        &self.document
    }

    /// What it lists, in its order.
    pub fn manifests(&self) -> &[Descriptor] {
        &self.manifests
    }
}

/// Image config: how to run it, its history, and the diff IDs of its layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageConfig {
    document: Document<spec::ImageConfiguration>,
    diff_ids: Vec<DiffId>,
}

impl ImageConfig {
    /// Parses a config of either family that is here already, and was held against limits when it came.
    ///
    /// # Errors
    /// Any [`DocumentError`] but a limit.
    pub fn parse(raw: &[u8]) -> Result<Self, DocumentError> {
        Self::parse_within(raw, &DocumentLimits::NONE)
    }

    /// Parses a config of either family that comes from outside.
    ///
    /// # Errors
    /// Any [`DocumentError`]; more non-empty history entries than diff IDs are refused, since indexing layers by
    /// history would run past the end.
    pub fn parse_within(raw: &[u8], limits: &DocumentLimits) -> Result<Self, DocumentError> {
        const WHAT: &str = "image config";
        DocumentLimits::check("limits.config-bytes", limits.config_bytes, WHAT, raw.len(), "bytes")?;
        let document: Document<spec::ImageConfiguration> = parse_json(WHAT, raw)?;
        let digest = document.digest;
        let diff_ids = document
            .value
            .rootfs()
            .diff_ids()
            .iter()
            .map(|text| text.parse().map_err(|source| DocumentError::Digest { what: WHAT, digest, source }))
            .collect::<Result<Vec<DiffId>, _>>()?;
        limits.check_layers(WHAT, diff_ids.len())?;
        let entries = document.value.history().as_ref().map_or(0, Vec::len);
        DocumentLimits::check("limits.history", limits.history, WHAT, entries, "history entries")?;
        let history = document.value.history().iter().flatten();
        let filled = history.filter(|entry| !entry.empty_layer().unwrap_or(false)).count();
        if filled > diff_ids.len() {
            let rule = format!("history names {filled} layers, diff_ids only {}", diff_ids.len());
            return Err(DocumentError::Rule { what: WHAT, digest, rule });
        }
        Ok(Self { document, diff_ids })
    }

    /// The document with its raw bytes.
    pub fn document(&self) -> &Document<spec::ImageConfiguration> {
        &self.document
    }

    /// The image ID: the digest of the config's bytes.
    pub fn id(&self) -> ImageId {
        ImageId::from_bytes(*self.document.digest.as_bytes())
    }

    /// Diff IDs of the layers, bottom first.
    pub fn diff_ids(&self) -> &[DiffId] {
        &self.diff_ids
    }

    /// What the image runs on.
    pub fn platform(&self) -> Platform {
        let value = &self.document.value;
        Platform {
            os: value.os().to_string(),
            architecture: value.architecture().to_string(),
            variant: value.variant().clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Compression;

    const DIGEST: &str = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn manifest(extra: &str) -> String {
        format!(
            r#"{{"schemaVersion":2,{extra}"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{DIGEST}","size":3}},"layers":[]}}"#
        )
    }

    #[test]
    fn identity_is_the_bytes_received() {
        let spaced = manifest("").replace(',', " ,\n");
        let parsed = Manifest::parse(spaced.as_bytes()).unwrap();
        assert_eq!(parsed.document().raw(), spaced.as_bytes());
        assert_eq!(parsed.descriptor().digest, BlobDigest::of(spaced.as_bytes()));
        assert_ne!(parsed.descriptor().digest, Manifest::parse(manifest("").as_bytes()).unwrap().descriptor().digest);
    }

    #[test]
    fn j01_ambiguous_documents_are_refused() {
        let both = manifest(r#""manifests":[],"#);
        assert!(matches!(Manifest::parse(both.as_bytes()), Err(DocumentError::Rule { .. })));
        assert!(matches!(Index::parse(both.as_bytes()), Err(DocumentError::Rule { .. })));
        let liar = manifest(r#""mediaType":"application/vnd.oci.image.index.v1+json","#);
        assert!(matches!(Manifest::parse(liar.as_bytes()), Err(DocumentError::Rule { .. })));
    }

    #[test]
    fn j02_duplicate_keys_are_refused_at_any_depth() {
        let twice = manifest("").replace(r#""size":3"#, r#""size":3,"size":4"#);
        let error = Manifest::parse(twice.as_bytes()).unwrap_err();
        assert!(matches!(error, DocumentError::Json { .. }));
    }

    #[test]
    fn j03_keys_that_differ_in_case_are_one_key_except_where_they_are_free() {
        let folded = manifest("").replace(r#""layers":[]"#, r#""layers":[],"Layers":[]"#);
        assert!(matches!(Manifest::parse(folded.as_bytes()), Err(DocumentError::Json { .. })));
        // Go takes ſ for s.
        let folded = manifest("").replace(r#""layers":[]"#, r#""layers":[],"layerſ":[]"#);
        assert!(matches!(Manifest::parse(folded.as_bytes()), Err(DocumentError::Json { .. })));
        let free = manifest(r#""annotations":{"a":"1","A":"2"},"#);
        Manifest::parse(free.as_bytes()).unwrap();
        let twice = manifest(r#""annotations":{"a":"1","a":"2"},"#);
        assert!(matches!(Manifest::parse(twice.as_bytes()), Err(DocumentError::Json { .. })));
        let config = |config: &str| {
            let text = format!(
                r#"{{"architecture":"amd64","os":"linux","config":{config},"rootfs":{{"type":"layers","diff_ids":[]}}}}"#
            );
            ImageConfig::parse(text.as_bytes())
        };
        for (free, value) in [("Labels", r#""v""#), ("ExposedPorts", "{}"), ("Volumes", "{}")] {
            config(&format!(r#"{{"{free}":{{"/a":{value},"/A":{value}}}}}"#))
                .unwrap_or_else(|e| panic!("{free}: {e:?}"));
            let twice = config(&format!(r#"{{"{free}":{{"/a":{value},"/a":{value}}}}}"#));
            assert!(matches!(twice, Err(DocumentError::Json { .. })), "{free}");
            // Free are the keys in it, not its own name and not what lies deeper.
            let named = config(&format!(r#"{{"{free}":{{}},"{}":{{}}}}"#, free.to_lowercase()));
            assert!(matches!(named, Err(DocumentError::Json { .. })), "{free}");
        }
        let deeper = config(r#"{"Volumes":{"/a":{"k":1,"K":2}}}"#);
        assert!(matches!(deeper, Err(DocumentError::Json { .. })));
        assert!(matches!(config(r#"{"User":"","user":"root"}"#), Err(DocumentError::Json { .. })));
    }

    #[test]
    fn j04_trailing_bytes_and_byte_order_marks_are_refused() {
        assert!(Manifest::parse(format!("{}x", manifest("")).as_bytes()).is_err());
        assert!(Manifest::parse(format!("\u{feff}{}", manifest("")).as_bytes()).is_err());
        assert!(Manifest::parse("[".repeat(100_000).as_bytes()).is_err());
        for value in [r#""\ud800""#, "1e400", "-1e400"] {
            let odd = manifest(&format!(r#""x":{value},"#));
            assert!(matches!(Manifest::parse(odd.as_bytes()), Err(DocumentError::Json { .. })), "{value}");
        }
    }

    #[test]
    fn unknown_layer_media_type_is_named() {
        let odd = manifest("")
            .replace("[]", &format!(r#"[{{"mediaType":"application/x-odd","digest":"{DIGEST}","size":1}}]"#));
        let text = Manifest::parse(odd.as_bytes()).unwrap_err().to_string();
        assert!(text.contains("application/x-odd") && text.contains(DIGEST), "{text}");
    }

    #[test]
    fn j07_a_negative_size_is_refused() {
        assert!(Manifest::parse(manifest("").replace(r#""size":3"#, r#""size":-3"#).as_bytes()).is_err());
    }

    #[test]
    fn j08_embedded_data_is_what_the_descriptor_says() {
        let with = |data: &str| manifest("").replace(r#""size":3"#, &format!(r#""size":3,"data":"{data}""#));
        // "abc", whose digest it is.
        Manifest::parse(with("YWJj").as_bytes()).unwrap();
        for wrong in ["", "YWJk", "YWJjZA==", "not base64"] {
            let error = Manifest::parse(with(wrong).as_bytes()).unwrap_err();
            assert!(matches!(error, DocumentError::Rule { .. }), "{wrong}: {error}");
        }
    }

    #[test]
    fn j11_more_history_than_layers_is_refused() {
        let config = r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"history":[{"created_by":"x"}]}"#;
        assert!(matches!(ImageConfig::parse(config.as_bytes()), Err(DocumentError::Rule { .. })));
        let empty = config.replace(r#""created_by":"x""#, r#""created_by":"x","empty_layer":true"#);
        assert!(ImageConfig::parse(empty.as_bytes()).is_ok());
    }

    #[test]
    fn b09_an_oversized_manifest_is_refused_by_name() {
        let big = format!("{}{}", manifest(""), " ".repeat(DocumentLimits::DEFAULT.manifest_bytes as usize));
        let text = Manifest::parse_within(big.as_bytes(), &DocumentLimits::DEFAULT).unwrap_err().to_string();
        assert!(text.contains("limits.manifest-bytes"), "{text}");
    }

    #[test]
    fn what_we_build_is_stable_and_parses() {
        let config = Descriptor::new(MediaType::ImageConfig, DIGEST.parse().unwrap(), 3);
        let notes =
            BTreeMap::from([("b".to_owned(), "1".to_owned()), ("A".into(), "2".into()), ("a".into(), "".into())]);
        let built = Manifest::build(&config, &[], &notes).unwrap();
        assert_eq!(built.document().raw(), Manifest::build(&config, &[], &notes).unwrap().document().raw());
        assert_eq!((built.config(), built.annotations()), (&config, notes));
        let huge = BTreeMap::from([("a".to_owned(), "x".repeat(DocumentLimits::DEFAULT.manifest_bytes as usize))]);
        let refused = Manifest::build(&config, &[], &huge).unwrap_err();
        assert!(matches!(refused, DocumentError::Limit { limit: "limits.manifest-bytes", .. }), "{refused}");
        assert_eq!(Index::build(&[built.descriptor()]).manifests(), &[built.descriptor()]);
    }

    #[test]
    fn a_manifest_is_of_its_configs_family() {
        for (family, media_type) in [
            (Family::Oci, "application/vnd.oci.image.manifest.v1+json"),
            (Family::Docker, "application/vnd.docker.distribution.manifest.v2+json"),
        ] {
            let config = Descriptor::new(family.config(), DIGEST.parse().unwrap(), 3);
            let layers = [Compression::None, Compression::Gzip, Compression::Zstd]
                .map(|packed| Descriptor::new(family.layer(packed), DIGEST.parse().unwrap(), 4));
            let built = Manifest::build(&config, &layers, &BTreeMap::new()).unwrap();
            assert_eq!(built.descriptor().media_type.to_string(), media_type);
            assert_eq!(built.layers(), layers);
        }
    }

    /// A document at a bound passes, one beyond it fails by the bound's name; what is here already has none.
    fn at_the_bound<T: std::fmt::Debug>(
        parse: impl Fn(&DocumentLimits) -> Result<T, DocumentError>,
        key: &str,
        maximum: impl Fn(u64) -> DocumentLimits,
        actual: u64,
    ) {
        parse(&maximum(actual)).unwrap();
        match parse(&maximum(actual - 1)).unwrap_err() {
            DocumentError::Limit { limit, maximum, actual: said, .. } => {
                assert_eq!((limit, maximum, said), (key, actual - 1, actual));
            }
            other => panic!("{key}: {other}"),
        }
    }

    #[test]
    fn b09_b10_every_limit_of_documents_is_inclusive_and_named() {
        let default = || DocumentLimits::DEFAULT;
        let layer = format!(r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{DIGEST}","size":3}}"#);
        let layers = manifest("").replace("[]", &format!("[{layer},{layer},{layer}]"));
        let of_manifest = |limits: &DocumentLimits| Manifest::parse_within(layers.as_bytes(), limits);
        let bytes = layers.len() as u64;
        at_the_bound(
            of_manifest,
            "limits.manifest-bytes",
            |n| DocumentLimits { manifest_bytes: n, ..default() },
            bytes,
        );
        at_the_bound(of_manifest, "limits.layers", |n| DocumentLimits { layers: n, ..default() }, 3);
        let entry = layer.replace("layer.v1.tar", "manifest.v1+json");
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{entry},{entry}]}}"#);
        let of_index = |limits: &DocumentLimits| Index::parse_within(index.as_bytes(), limits);
        let bytes = index.len() as u64;
        at_the_bound(of_index, "limits.manifest-bytes", |n| DocumentLimits { manifest_bytes: n, ..default() }, bytes);
        at_the_bound(of_index, "limits.index-entries", |n| DocumentLimits { index_entries: n, ..default() }, 2);
        let config = format!(
            r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["{DIGEST}","{DIGEST}"]}},
            "history":[{{"empty_layer":true}},{{}},{{"empty_layer":true}}]}}"#
        );
        let of_config = |limits: &DocumentLimits| ImageConfig::parse_within(config.as_bytes(), limits);
        let bytes = config.len() as u64;
        at_the_bound(of_config, "limits.config-bytes", |n| DocumentLimits { config_bytes: n, ..default() }, bytes);
        at_the_bound(of_config, "limits.layers", |n| DocumentLimits { layers: n, ..default() }, 2);
        at_the_bound(of_config, "limits.history", |n| DocumentLimits { history: n, ..default() }, 3);
        let large = format!("{}{}", manifest(""), " ".repeat(5 << 20));
        Manifest::parse(large.as_bytes()).unwrap();
    }
}
