pub use oci_spec::image::MediaType;

/// How a blob's bytes are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Plain bytes.
    None,
    /// RFC 1952, any number of members.
    Gzip,
    /// RFC 8878, any number of frames.
    Zstd,
}

/// What a blob is, whichever of the two families (OCI, Docker) named its media type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MediaClass {
    /// A list of manifests: OCI image index or Docker manifest list.
    Index,
    /// One image: OCI image manifest or Docker schema 2 manifest.
    Manifest,
    /// An image's config.
    Config,
    /// A filesystem layer.
    Layer(Compression),
}

/// Docker's manifest, schema 2 (distribution, "Image Manifest Version 2, Schema 2").
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// The config that it names.
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// Who named a media type. The documents are the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Family {
    /// The image specification.
    #[default]
    Oci,
    /// Docker's schema 2, which has neither annotations nor zstd (containerd has a name for such layers).
    Docker,
}

impl Family {
    /// The family of a manifest with this config.
    pub(crate) fn of(config: &MediaType) -> Self {
        if config.to_string() == DOCKER_CONFIG { Self::Docker } else { Self::Oci }
    }

    /// What it calls a config.
    pub fn config(self) -> MediaType {
        match self {
            Self::Oci => MediaType::ImageConfig,
            Self::Docker => MediaType::from(DOCKER_CONFIG),
        }
    }

    /// What it calls a layer.
    pub fn layer(self, compression: Compression) -> MediaType {
        match (self, compression) {
            (Self::Oci, Compression::None) => MediaType::ImageLayer,
            (Self::Oci, Compression::Gzip) => MediaType::ImageLayerGzip,
            (Self::Oci, Compression::Zstd) => MediaType::ImageLayerZstd,
            (Self::Docker, Compression::None) => MediaType::from("application/vnd.docker.image.rootfs.diff.tar"),
            (Self::Docker, Compression::Gzip) => MediaType::from("application/vnd.docker.image.rootfs.diff.tar.gzip"),
            (Self::Docker, Compression::Zstd) => MediaType::from("application/vnd.docker.image.rootfs.diff.tar.zstd"),
        }
    }
}

/// Says what a media type means to us; `None` for one that we don't know.
///
/// "Non-distributable" and "foreign" layers are layers: the word only ever asked tools not to push them.
pub fn classify(media_type: &MediaType) -> Option<MediaClass> {
    use Compression::{Gzip, None as Plain, Zstd};
    Some(match media_type.to_string().as_str() {
        "application/vnd.oci.image.index.v1+json" | "application/vnd.docker.distribution.manifest.list.v2+json" => {
            MediaClass::Index
        }
        "application/vnd.oci.image.manifest.v1+json" | DOCKER_MANIFEST => MediaClass::Manifest,
        "application/vnd.oci.image.config.v1+json" | DOCKER_CONFIG => MediaClass::Config,
        "application/vnd.oci.image.layer.v1.tar"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar"
        | "application/vnd.docker.image.rootfs.diff.tar" => MediaClass::Layer(Plain),
        "application/vnd.oci.image.layer.v1.tar+gzip"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
        | "application/vnd.docker.image.rootfs.diff.tar.gzip"
        | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => MediaClass::Layer(Gzip),
        "application/vnd.oci.image.layer.v1.tar+zstd"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
        | "application/vnd.docker.image.rootfs.diff.tar.zstd" => MediaClass::Layer(Zstd),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_mean_the_same() {
        for (name, class) in [
            ("application/vnd.docker.distribution.manifest.v2+json", MediaClass::Manifest),
            ("application/vnd.oci.image.manifest.v1+json", MediaClass::Manifest),
            ("application/vnd.docker.distribution.manifest.list.v2+json", MediaClass::Index),
            ("application/vnd.oci.image.layer.v1.tar+zstd", MediaClass::Layer(Compression::Zstd)),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", MediaClass::Layer(Compression::Gzip)),
            ("application/vnd.oci.image.layer.v1.tar", MediaClass::Layer(Compression::None)),
        ] {
            assert_eq!(classify(&MediaType::from(name)), Some(class), "{name}");
        }
        assert_eq!(classify(&MediaType::from("application/vnd.oci.image.layer.v1.tar+lz4")), None);
    }
}
