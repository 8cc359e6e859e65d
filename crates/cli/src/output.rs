//! `-o`, as docker buildx and BuildKit take it: fields between commas, `KEY=VALUE` each, with the quotes of CSV where a
//! value holds a comma. And `--annotation`, which says the same of all outputs.

use std::path::{Path, PathBuf};
use std::str::FromStr as _;

use plies_engine::build::{BuildOutput, ImageOptions, TreeOutput};
use plies_engine::{Output, SaveFormat};
use plies_oci::{Compression, Family, Platform, Reference};

/// Types that there are.
const TYPES: &str = "image, registry, oci, docker, local, tar and cacheonly";

/// What says how an image is packed and described.
const IMAGE_KEYS: [&str; 5] =
    ["compression", "compression-level", "force-compression", "oci-mediatypes", "rewrite-timestamp"];

/// One `-o`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Given {
    /// Nothing: the steps are cached, and that is all.
    CacheOnly,
    /// To somewhere.
    To(BuildOutput),
}

/// One `--annotation`, for each level that it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Annotation {
    levels: Vec<Level>,
    key: String,
    value: String,
}

/// What an annotation is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Manifest,
    ManifestDescriptor,
}

impl Level {
    /// Reads `LEVEL[PLATFORM]`; nothing for a level is the manifest.
    fn parse(text: &str) -> Result<Self, String> {
        let (level, platform) = match text.split_once('[') {
            None => (text, None),
            Some((level, rest)) => {
                (level, Some(rest.strip_suffix(']').ok_or_else(|| format!("{text:?}: a ] is missing"))?))
            }
        };
        let host = Platform::host();
        if let Some(platform) = platform
            && Platform::from_str(platform).map_err(|error| error.to_string())? != host
        {
            return Err(format!("this builds for {host}, and for {platform} there is nothing to annotate"));
        }
        match level {
            "" | "manifest" => Ok(Self::Manifest),
            "manifest-descriptor" => Ok(Self::ManifestDescriptor),
            "index" | "index-descriptor" => {
                Err(format!("{level}: what is built is one manifest, without an index (take manifest)"))
            }
            _ => Err(format!("unknown level {level:?}: there are manifest and manifest-descriptor")),
        }
    }
}

/// `[LEVEL[PLATFORM],…:]KEY=VALUE`, as docker buildx takes it.
pub(crate) fn annotation(text: &str) -> Result<Annotation, String> {
    let (left, value) = text.split_once('=').ok_or("expected KEY=VALUE, or LEVEL:KEY=VALUE")?;
    let (levels, key) = match left.split_once(':') {
        None => (vec![Level::Manifest], left),
        Some((levels, key)) => (levels.split(',').map(Level::parse).collect::<Result<_, _>>()?, key),
    };
    if key.is_empty() {
        return Err("the key is missing".into());
    }
    Ok(Annotation { levels, key: key.to_owned(), value: value.to_owned() })
}

/// Reads one `-o`. A path alone is a directory, or with `-` a tar on standard output.
pub(crate) fn output(text: &str) -> Result<Given, String> {
    if !text.contains('=') {
        let to = if text == "-" { TreeOutput::Tar(Output::Stdout) } else { TreeOutput::Directory(text.into()) };
        return Ok(Given::To(BuildOutput::Tree(to)));
    }
    let fields = split(text)?;
    let mut pairs = Vec::new();
    for field in &fields {
        match field.split_once('=') {
            Some((key, _)) if pairs.iter().any(|(known, _)| *known == key) => {
                return Err(format!("{key} is given twice"));
            }
            Some(pair) => pairs.push(pair),
            None => return Err(format!("{field:?}: expected KEY=VALUE, as in type=oci,dest=out.tar")),
        }
    }
    let kind = pairs.iter().position(|(key, _)| *key == "type").ok_or("type=TYPE is missing")?;
    let (_, kind) = pairs.remove(kind);
    let mut keys = Keys { kind, pairs };
    let given = match kind {
        "image" => Given::To(BuildOutput::Image {
            names: keys.names()?,
            push: keys.flag("push")?.unwrap_or(false),
            options: keys.options()?,
        }),
        // As BuildKit: short for an image that is pushed.
        "registry" => Given::To(BuildOutput::Image { names: keys.names()?, push: true, options: keys.options()? }),
        "oci" => {
            let dest = keys.dest();
            let format = match (keys.flag("tar")?, &dest) {
                (None | Some(true), _) => SaveFormat::Oci,
                (Some(false), Output::Path(_)) => SaveFormat::OciDirectory,
                (Some(false), Output::Stdout) => return Err("tar=false needs dest=DIR".into()),
            };
            let (names, options) = (keys.names()?, keys.options()?);
            Given::To(BuildOutput::Archive { options, names, format, output: dest })
        }
        "docker" => {
            let (dest, names) = (keys.dest(), keys.names()?);
            let rewrite_timestamp = keys.flag("rewrite-timestamp")?.unwrap_or(false);
            match (keys.take("compression"), keys.flag("tar")?) {
                (None | Some("uncompressed"), None | Some(true)) => {}
                (Some(other), _) => return Err(format!("a docker archive has plain layers, not {other} ones")),
                (_, _) => return Err("a docker archive is a tar".into()),
            }
            let options = ImageOptions { rewrite_timestamp, ..ImageOptions::default() };
            Given::To(BuildOutput::Archive { options, names, format: SaveFormat::Docker, output: dest })
        }
        "local" => match keys.dest() {
            Output::Path(path) => Given::To(BuildOutput::Tree(TreeOutput::Directory(path))),
            Output::Stdout => return Err("type=local needs dest=DIR".into()),
        },
        "tar" => Given::To(BuildOutput::Tree(TreeOutput::Tar(keys.dest()))),
        "cacheonly" => Given::CacheOnly,
        other => return Err(format!("unknown type {other:?}: there are {TYPES}")),
    };
    keys.end()?;
    Ok(given)
}

/// The fields between commas. A field in quotes may hold commas, and quotes that are doubled (RFC 4180).
fn split(text: &str) -> Result<Vec<String>, String> {
    let mut fields = Vec::new();
    let mut rest = text;
    loop {
        let mut field = String::new();
        if let Some(mut quoted) = rest.strip_prefix('"') {
            loop {
                let (part, after) = quoted.split_once('"').ok_or_else(|| format!("{text:?}: a quote is not closed"))?;
                field.push_str(part);
                match after.strip_prefix('"') {
                    Some(more) => {
                        field.push('"');
                        quoted = more;
                    }
                    None => {
                        rest = after;
                        break;
                    }
                }
            }
        } else {
            let end = rest.find(',').unwrap_or(rest.len());
            field.push_str(&rest[..end]);
            rest = &rest[end..];
        }
        fields.push(field);
        match rest.strip_prefix(',') {
            Some(more) => rest = more,
            None if rest.is_empty() => return Ok(fields),
            None => return Err(format!("{text:?}: a comma is expected after a closing quote")),
        }
    }
}

/// The keys of one `-o` that nobody has asked for yet.
struct Keys<'a> {
    kind: &'a str,
    pairs: Vec<(&'a str, &'a str)>,
}

impl<'a> Keys<'a> {
    fn take(&mut self, key: &str) -> Option<&'a str> {
        let at = self.pairs.iter().position(|(known, _)| *known == key)?;
        Some(self.pairs.remove(at).1)
    }

    /// The words for yes and no are Go's.
    fn flag(&mut self, key: &str) -> Result<Option<bool>, String> {
        match self.take(key) {
            None => Ok(None),
            Some("true" | "1" | "t" | "T" | "TRUE" | "True") => Ok(Some(true)),
            Some("false" | "0" | "f" | "F" | "FALSE" | "False") => Ok(Some(false)),
            Some(other) => Err(format!("{key} is true or false, not {other:?}")),
        }
    }

    fn dest(&mut self) -> Output {
        match self.take("dest") {
            None | Some("" | "-") => Output::Stdout,
            Some(path) => Output::Path(path.into()),
        }
    }

    fn names(&mut self) -> Result<Vec<String>, String> {
        let names = self.take("name").map(|names| names.split(',').map(str::to_owned).collect::<Vec<_>>());
        let names = names.unwrap_or_default();
        for name in &names {
            match name.parse::<Reference>() {
                Ok(parsed) if parsed.digest().is_none() => {}
                Ok(_) => return Err(format!("{name} holds a digest, which cannot be given as a name")),
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(names)
    }

    fn options(&mut self) -> Result<ImageOptions, String> {
        let mut options = ImageOptions::default();
        let packing = &mut options.manifest.packing;
        packing.compression = match self.take("compression") {
            None | Some("gzip") => Compression::Gzip,
            Some("zstd") => Compression::Zstd,
            Some("uncompressed") => Compression::None,
            Some(other) => {
                let known = "there are gzip, zstd and uncompressed";
                return Err(match other {
                    "estargz" => format!("compression {other} is not supported: {known}"),
                    _ => format!("unknown compression {other:?}: {known}"),
                });
            }
        };
        if let Some(level) = self.take("compression-level") {
            let (format, range) = match packing.compression {
                Compression::Gzip => ("gzip", 0..=9),
                Compression::Zstd => ("zstd", 0..=22),
                Compression::None => return Err("compression-level: what is uncompressed has none".into()),
            };
            let number = level.parse().ok().filter(|level| range.contains(level));
            let wrong =
                || format!("compression-level of {format} is {} to {}, not {level:?}", range.start(), range.end());
            packing.level = Some(number.ok_or_else(wrong)?);
        }
        packing.force = self.flag("force-compression")?.unwrap_or(false);
        let is_zstd = packing.compression == Compression::Zstd;
        if self.flag("oci-mediatypes")? == Some(false) {
            options.manifest.family = Family::Docker;
        }
        options.rewrite_timestamp = self.flag("rewrite-timestamp")?.unwrap_or(false);
        let is_annotation = |key: &str| key.starts_with("annotation");
        let (annotations, others) =
            std::mem::take(&mut self.pairs).into_iter().partition(|(key, _)| is_annotation(key));
        self.pairs = others;
        let annotations: Vec<(&str, &str)> = annotations;
        for (field, value) in annotations {
            let (levels, key) = field.split_once('.').ok_or_else(|| format!("{field}: expected annotation.KEY"))?;
            let level = levels.strip_prefix("annotation").unwrap_or_default();
            let level = Level::parse(level.strip_prefix('-').unwrap_or(level))?;
            if key.is_empty() {
                return Err(format!("{field}: expected annotation.KEY"));
            }
            annotate(&mut options, level, key, value);
        }
        if self.kind != "oci" && !options.entry_annotations.is_empty() {
            return Err("manifest-descriptor: only the index of a layout (type=oci) has such an entry".into());
        }
        if options.manifest.family == Family::Docker && (is_zstd || !options.manifest.annotations.is_empty()) {
            let what = if is_zstd { "zstd" } else { "annotations" };
            return Err(format!("docker's media types have no {what}: leave oci-mediatypes=false out"));
        }
        Ok(options)
    }

    /// Nothing may be left that nobody understands.
    fn end(self) -> Result<(), String> {
        let Some((key, _)) = self.pairs.first() else { return Ok(()) };
        let image = format!("name, {}, annotation.KEY, annotation-manifest.KEY", IMAGE_KEYS.join(", "));
        let known = match self.kind {
            "image" => format!("push, {image}"),
            "registry" => image,
            "oci" => format!("dest, tar, {image}, annotation-manifest-descriptor.KEY"),
            "docker" => "dest, tar, name, compression, rewrite-timestamp".to_owned(),
            "local" | "tar" => "dest".to_owned(),
            _ => return Err(format!("unknown key {key:?}: type={} has none", self.kind)),
        };
        Err(format!("unknown key {key:?}: type={} has {known}", self.kind))
    }
}

fn annotate(options: &mut ImageOptions, level: Level, key: &str, value: &str) {
    let annotations = match level {
        Level::Manifest => &mut options.manifest.annotations,
        Level::ManifestDescriptor => &mut options.entry_annotations,
    };
    annotations.insert(key.to_owned(), value.to_owned());
}

/// What all of `-o` and `--annotation` come to. The result goes into the store unless it goes nowhere; an archive's is
/// the same image.
///
/// # Errors
/// What cannot be done together, for a user.
pub(crate) fn outputs(
    given: &[Given],
    annotations: &[Annotation],
    names_given: bool,
) -> Result<Vec<BuildOutput>, String> {
    let mut outputs: Vec<BuildOutput> = Vec::new();
    for one in given {
        if let Given::To(output) = one {
            outputs.push(output.clone());
        }
    }
    let is_image = |output: &BuildOutput| matches!(output, BuildOutput::Image { .. });
    let goes_nowhere = !given.is_empty() && outputs.is_empty();
    if !goes_nowhere && !outputs.iter().any(is_image) {
        let options = outputs.iter().find_map(|output| match output {
            BuildOutput::Archive { options, .. } => Some(options.clone()),
            _ => None,
        });
        let options = ImageOptions { entry_annotations: Default::default(), ..options.unwrap_or_default() };
        outputs.push(BuildOutput::Image { options, names: vec![], push: false });
    }
    for Annotation { levels, key, value } in annotations {
        for level in levels {
            let mut found = false;
            for output in &mut outputs {
                let (options, has_entry) = match output {
                    BuildOutput::Image { options, .. } => (options, false),
                    BuildOutput::Archive { options, format, .. } if *format != SaveFormat::Docker => (options, true),
                    _ => continue,
                };
                if *level == Level::Manifest || has_entry {
                    annotate(options, *level, key, value);
                    found = true;
                }
                if options.manifest.family == Family::Docker && !options.manifest.annotations.is_empty() {
                    return Err("docker's media types have no annotations: leave oci-mediatypes=false out".into());
                }
            }
            if !found {
                return Err(format!("--annotation {key}: no output has a place for it"));
            }
        }
    }
    let no_name =
        |output: &BuildOutput| matches!(output, BuildOutput::Image { names, push: true, .. } if names.is_empty());
    if !names_given && outputs.iter().any(no_name) {
        return Err("push needs a name: -t NAME, or name=NAME".into());
    }
    let mut taken: Vec<Option<PathBuf>> = Vec::new();
    for output in &outputs {
        let Some(dest) = dest(output) else { continue };
        let dest = dest.map(|path| path.canonicalize().or_else(|_| std::path::absolute(path)).unwrap_or(path.into()));
        if taken.contains(&dest) {
            let name = dest.map_or_else(|| "standard output".to_owned(), |path| path.display().to_string());
            return Err(format!("two outputs go to {name}"));
        }
        taken.push(dest);
    }
    Ok(outputs)
}

/// Where an output goes, if it goes out of the store: `None` is standard output.
fn dest(output: &BuildOutput) -> Option<Option<&Path>> {
    match output {
        BuildOutput::Image { .. } => None,
        BuildOutput::Tree(TreeOutput::Directory(path)) => Some(Some(path)),
        BuildOutput::Tree(TreeOutput::Tar(output)) | BuildOutput::Archive { output, .. } => Some(match output {
            Output::Path(path) => Some(path),
            Output::Stdout => None,
        }),
    }
}

/// Whether an output takes standard output.
pub(crate) fn to_stdout(output: &BuildOutput) -> bool {
    dest(output) == Some(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(text: &str) -> ImageOptions {
        match output(text).unwrap() {
            Given::To(BuildOutput::Image { options, .. } | BuildOutput::Archive { options, .. }) => options,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn fields_are_split_as_csv_is() {
        for (text, expected) in [
            ("type=oci,dest=a", vec!["type=oci", "dest=a"]),
            (r#"type=image,"name=a,b",push=true"#, vec!["type=image", "name=a,b", "push=true"]),
            (r#""annotation.q=say ""hi"", all",type=oci"#, vec![r#"annotation.q=say "hi", all"#, "type=oci"]),
            ("a=,", vec!["a=", ""]),
        ] {
            assert_eq!(split(text).unwrap(), expected, "{text}");
        }
        assert!(split(r#"type=oci,"dest=a"#).is_err() && split(r#""a"b"#).is_err());
    }

    #[test]
    fn compression_is_read_with_its_level() {
        for (text, compression, level, force) in [
            ("type=oci", Compression::Gzip, None, false),
            ("type=oci,compression=zstd,compression-level=22", Compression::Zstd, Some(22), false),
            (
                "type=image,compression=gzip,compression-level=0,force-compression=true",
                Compression::Gzip,
                Some(0),
                true,
            ),
            ("type=image,compression=uncompressed,force-compression=1", Compression::None, None, true),
        ] {
            let packing = image(text).manifest.packing;
            assert_eq!((packing.compression, packing.level, packing.force), (compression, level, force), "{text}");
        }
    }

    #[test]
    fn annotations_are_read_at_their_levels() {
        let host = Platform::host();
        let text = format!(
            "type=oci,annotation.a.b=1,annotation-manifest.c=x=y,annotation[{host}].d=,\
             annotation-manifest-descriptor.e=2,annotation-manifest-descriptor[{host}].f=3"
        );
        let options = image(&text);
        let pairs = |of: &std::collections::BTreeMap<String, String>| {
            of.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(pairs(&options.manifest.annotations), "a.b=1 c=x=y d=");
        assert_eq!(pairs(&options.entry_annotations), "e=2 f=3");
        let both = annotation("manifest,manifest-descriptor:k=v:w=x").unwrap();
        assert_eq!((both.levels.len(), &*both.key, &*both.value), (2, "k", "v:w=x"));
        assert_eq!(annotation("k=").unwrap().levels, [Level::Manifest]);
        for bad in ["k", "=v", "manifest:=v", "index:k=v", "other:k=v", "manifest[linux/none]:k=v", "manifest[x:k=v"] {
            assert!(annotation(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_wrong_with_an_output_is_told() {
        for (text, part) in [
            ("type=image,dest=x", "type=image has push, name"),
            ("type=oci,push=true", "unknown key \"push\""),
            ("type=docker,oci-mediatypes=true", "unknown key"),
            ("type=local,dest=d,tar=true", "type=local has dest"),
            ("type=cacheonly,dest=x", "has none"),
            ("type=local", "needs dest=DIR"),
            ("type=oci,tar=false", "needs dest=DIR"),
            ("type=docker,tar=false", "is a tar"),
            ("type=docker,compression=gzip", "plain layers"),
            ("type=oci,compression=estargz", "estargz is not supported: there are gzip, zstd and uncompressed"),
            ("type=oci,compression=lz4", "unknown compression"),
            ("type=oci,compression-level=10", "0 to 9"),
            ("type=oci,compression=zstd,compression-level=x", "0 to 22"),
            ("type=oci,compression=uncompressed,compression-level=1", "has none"),
            ("type=oci,compression=zstd,oci-mediatypes=false", "no zstd"),
            ("type=oci,annotation.a=b,oci-mediatypes=false", "no annotations"),
            ("type=image,force-compression=perhaps", "true or false"),
            ("type=image,annotation-manifest-descriptor.a=b", "type=oci"),
            ("type=image,annotation-index.a=b", "without an index"),
            ("type=image,annotation.=b", "annotation.KEY"),
            ("type=image,annotation=b", "annotation.KEY"),
            ("type=image,name=UPPER", "UPPER"),
            ("type=s3,dest=x", "unknown type \"s3\": there are image, registry, oci"),
            ("dest=x", "type=TYPE is missing"),
            ("type=oci,dest=a,dest=b", "dest is given twice"),
            ("type=oci,tar", "expected KEY=VALUE"),
        ] {
            let told = output(text).unwrap_err();
            assert!(told.contains(part), "{text}: {told}");
        }
    }

    #[test]
    fn outputs_come_together() {
        let all = |given: &[&str], annotations: &[&str], named| {
            let given: Vec<Given> = given.iter().map(|text| output(text).unwrap()).collect();
            let annotations: Vec<Annotation> = annotations.iter().map(|text| annotation(text).unwrap()).collect();
            outputs(&given, &annotations, named)
        };
        assert_eq!(all(&[], &[], false).unwrap().len(), 1, "into the store");
        assert_eq!(all(&["type=cacheonly"], &[], false).unwrap(), []);
        let both = all(&["type=oci,dest=a,compression=zstd"], &["k=v", "manifest-descriptor:e=w"], false).unwrap();
        let [BuildOutput::Archive { options: archive, .. }, BuildOutput::Image { options: stored, .. }] = &both[..]
        else {
            panic!("{both:?}");
        };
        assert_eq!(archive.manifest, stored.manifest, "the store has the archive's image");
        assert_eq!(archive.manifest.annotations["k"], "v");
        assert_eq!((archive.entry_annotations.len(), stored.entry_annotations.len()), (1, 0));
        for (given, annotations, part) in [
            (&["type=registry"][..], &[][..], "push needs a name"),
            (&["type=oci,dest=x", "type=tar,dest=./x"], &[], "two outputs go to"),
            (&["-", "type=oci"], &[], "two outputs go to standard output"),
            (&["type=image"], &["manifest-descriptor:k=v"], "no output has a place"),
            (&["type=cacheonly"], &["k=v"], "no output has a place"),
            (&["type=image,oci-mediatypes=false"], &["k=v"], "no annotations"),
        ] {
            let told = all(given, annotations, false).unwrap_err();
            assert!(told.contains(part), "{given:?} {annotations:?}: {told}");
        }
        assert!(all(&["type=registry"], &[], true).is_ok());
        assert!(all(&["type=image,push=true,name=localhost:5000/a"], &[], false).is_ok());
    }
}
