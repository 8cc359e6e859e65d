//! The client against a registry that does wrong.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{self, Read as _};
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use plies_oci::{BlobDigest, Descriptor, ErrorKind, MediaType, Reference};
use plies_registry::{
    Client, ClientOptions, Credentials, HostConfig, KeyPair, PushedBlob, RegistryError, Repository, RetryPolicy, Upload,
};
use plies_testkit::image::{Image, Packing};
use plies_testkit::registry::{DockerRegistry, Fault, FaultyRegistry, TokenAuth};
use plies_testkit::scratch::Scratch;
use plies_testkit::tar::Member;
use plies_testkit::tools;

/// Base64 of `me:canary-password`.
const BASIC: &str = "Basic bWU6Y2FuYXJ5LXBhc3N3b3Jk";

fn options() -> ClientOptions {
    let millisecond = Duration::from_millis(1);
    let retry =
        RetryPolicy { tries: 3, first_wait: millisecond, longest_wait: millisecond, patience: Duration::from_secs(2) };
    ClientOptions { retry, ..ClientOptions::default() }
}

fn client(options: ClientOptions) -> Arc<Client> {
    Arc::new(Client::new(options))
}

/// A client that knows `me` and `canary-password` for a host.
fn known(scratch: &Scratch, host: &str) -> ClientOptions {
    let text = format!(r#"{{"auths": {{"{host}": {{"auth": "{}"}}}}}}"#, BASIC.trim_start_matches("Basic "));
    let file = Some(scratch.file("config.json", text));
    ClientOptions { credentials: Credentials { file, search_path: vec![] }, ..options() }
}

fn with_host(mut options: ClientOptions, host: &str, config: HostConfig) -> ClientOptions {
    options.hosts = BTreeMap::from([(host.to_owned(), config)]);
    options
}

fn repository(registry: &FaultyRegistry) -> Repository {
    Repository { host: registry.host(), name: "team/app".into() }
}

fn reference(registry: &FaultyRegistry, rest: &str) -> Reference {
    format!("{}/team/app{rest}", registry.host()).parse().unwrap()
}

/// Bytes that no part of repeats.
fn noise(length: usize) -> Vec<u8> {
    (0..length as u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u8).collect()
}

fn blob(bytes: &[u8]) -> Descriptor {
    Descriptor::new(MediaType::ImageLayer, BlobDigest::of(bytes), bytes.len() as u64)
}

/// A registry with one blob.
fn with_blob(bytes: &[u8]) -> FaultyRegistry {
    let registry = FaultyRegistry::start();
    registry.put_blob("team/app", bytes);
    registry
}

fn read(client: &Arc<Client>, registry: &FaultyRegistry, bytes: &[u8], offset: u64) -> Result<Vec<u8>, RegistryError> {
    let mut reader = client.blob(&repository(registry), &blob(bytes), offset)?;
    let mut out = Vec::new();
    reader.read_to_end(&mut out).map_err(|error| error.downcast::<RegistryError>().unwrap())?;
    Ok(out)
}

fn small_image() -> Image {
    Image::new("app:1").layer(&[Member::file("f", "text")], Packing::Gzip)
}

#[test]
fn a_name_is_resolved_to_the_bytes_that_came() {
    let registry = FaultyRegistry::start();
    let image = small_image();
    registry.put("team/app", "1", &image);
    let client = client(options());
    let digest = format!("sha256:{}", image.manifest_digest());
    for name in [":1", &format!("@{digest}"), &format!(":other@{digest}")] {
        let fetched = client.resolve(&reference(&registry, name)).unwrap();
        assert_eq!(fetched.descriptor.digest.to_string(), digest);
        assert_eq!(fetched.descriptor.size_bytes, fetched.bytes.len() as u64);
        assert_eq!(fetched.descriptor.media_type, MediaType::ImageManifest);
    }
    let missing = client.resolve(&reference(&registry, ":2")).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert!(missing.to_string().contains("MANIFEST_UNKNOWN it is"), "{missing}");
}

#[test]
fn h01_r05_the_digest_of_the_received_bytes_decides() {
    let registry = FaultyRegistry::start();
    let image = small_image();
    registry.put("team/app", "1", &image);
    let client = client(options());
    let pinned = format!("@sha256:{}", image.manifest_digest());
    registry.fault("manifests/", 1, Fault::WrongByte);
    let wrong = client.resolve(&reference(&registry, &pinned)).unwrap_err();
    assert!(matches!(wrong, RegistryError::Digest { .. }), "{wrong}");
    assert_eq!(registry.seen().len(), 1, "other bytes are not asked for again");
    let headers = vec![("docker-content-digest", format!("sha256:{}", "0".repeat(64)))];
    registry.fault("manifests/1", 1, Fault::Answer(200, headers, b"{}".to_vec()));
    let wrong = client.resolve(&reference(&registry, ":1")).unwrap_err();
    assert_eq!(wrong.kind(), ErrorKind::DataLoss);
    assert!(client.resolve(&reference(&registry, ":1")).is_ok());
}

#[test]
fn documents_have_a_size_that_is_not_passed() {
    let registry = FaultyRegistry::start();
    let client = client(options());
    registry.fault("manifests/", 1, Fault::Answer(200, vec![], vec![b' '; (4 << 20) + 1]));
    let large = client.resolve(&reference(&registry, ":1")).unwrap_err();
    assert_eq!(large.kind(), ErrorKind::Limit);
    assert!(large.to_string().contains("limits.manifest-bytes"), "{large}");
    let bytes = noise(100);
    registry.put_blob("team/app", &bytes);
    let small = |maximum| client.small_blob(&repository(&registry), &blob(&bytes), maximum, "TEST_MAX");
    assert_eq!(small(100).unwrap(), bytes);
    assert_eq!(small(99).unwrap_err().kind(), ErrorKind::Limit);
}

#[test]
fn h01_r03_a_blob_goes_on_whatever_becomes_of_the_range() {
    let bytes = noise(200_000);
    let registry = with_blob(&bytes);
    let client = client(options());
    let rest = |offset: usize| read(&client, &registry, &bytes, offset as u64);
    assert_eq!(rest(150_000).unwrap(), bytes[150_000..]);
    assert_eq!(registry.seen()[0].header("range"), Some("bytes=150000-"));

    registry.fault("blobs/", 1, Fault::IgnoreRange);
    assert_eq!(rest(150_000).unwrap(), bytes[150_000..], "the whole came");
    registry.fault("blobs/", 1, Fault::OtherRange { first: 0, total: None });
    assert_eq!(rest(150_000).unwrap(), bytes[150_000..], "it began at 0");
    registry.seen();
    registry.fault("blobs/", 1, Fault::OtherRange { first: 160_000, total: None });
    assert_eq!(rest(150_000).unwrap(), bytes[150_000..], "it began too late");
    let ranges: Vec<bool> = registry.seen().iter().map(|seen| seen.header("range").is_some()).collect();
    assert_eq!(ranges, [true, false], "then it is asked for whole");
    registry.fault("blobs/", 1, Fault::Status(416, vec![]));
    assert_eq!(rest(150_000).unwrap(), bytes[150_000..], "no range would do");
    registry.fault("blobs/", 1, Fault::OtherRange { first: 150_000, total: Some(300_000) });
    assert!(matches!(rest(150_000), Err(RegistryError::Size { actual: 300_000, .. })));
}

#[test]
fn h01_r04_a_connection_that_breaks_is_taken_up_where_it_did() {
    let bytes = noise(1_000_000);
    let registry = with_blob(&bytes);
    let client = client(options());
    // More often than there are tries: each brings enough to count as a good one.
    registry.fault("blobs/", 6, Fault::DropAfter(150_000));
    assert_eq!(read(&client, &registry, &bytes, 0).unwrap(), bytes);
    let ranges: Vec<Option<String>> =
        registry.seen().iter().map(|seen| seen.header("range").map(str::to_owned)).collect();
    assert_eq!(ranges.len(), 7);
    let begins = |at: usize| ranges[at].as_ref().unwrap()[6..].trim_end_matches('-').parse::<u64>().unwrap();
    assert!(ranges[0].is_none() && (1..6).all(|at| begins(at) < begins(at + 1)), "{ranges:?}");

    registry.fault("blobs/", 100, Fault::DropAfter(10));
    let broken = read(&client, &registry, &bytes, 0).unwrap_err();
    assert_eq!(broken.kind(), ErrorKind::Unavailable);
    assert_eq!(registry.seen().len(), 3, "as many tries as the policy has");
}

#[test]
fn h01_r04_a_body_of_another_length_is_refused_and_not_tried_again() {
    let bytes = noise(1000);
    let registry = with_blob(&bytes);
    let client = client(options());
    registry.fault("blobs/", 1, Fault::Truncate(990));
    assert!(matches!(read(&client, &registry, &bytes, 0), Err(RegistryError::Size { actual: 990, .. })));
    registry.fault("blobs/", 1, Fault::TooLong);
    assert!(matches!(read(&client, &registry, &bytes, 0), Err(RegistryError::Size { actual: 1001, .. })));
    assert_eq!(registry.seen().len(), 2);
}

#[test]
fn what_may_go_well_later_is_tried_again_and_what_may_not_is_not() {
    let bytes = noise(1000);
    let registry = with_blob(&bytes);
    let client = client(options());
    for (status, requests) in [(429, 2), (500, 2), (502, 2), (503, 2), (504, 2), (400, 1), (404, 1), (403, 1), (501, 1)]
    {
        registry.fault("blobs/", 1, Fault::Status(status, vec![]));
        assert_eq!(read(&client, &registry, &bytes, 0).is_ok(), requests == 2, "{status}");
        assert_eq!(registry.seen().len(), requests, "{status}");
    }
    registry.fault("blobs/", 100, Fault::Status(503, vec![]));
    assert_eq!(read(&client, &registry, &bytes, 0).unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(registry.seen().len(), 3);
}

#[test]
fn a_registry_says_when_to_come_back() {
    let bytes = noise(1000);
    let registry = with_blob(&bytes);
    // Nothing but what the registry says can make this wait short.
    let mut options = options();
    options.retry.first_wait = Duration::from_secs(3600);
    options.retry.longest_wait = Duration::from_secs(3600);
    let client = client(options);
    for text in ["0", "1", "Sun, 06 Nov 1994 08:49:37 GMT"] {
        registry.fault("blobs/", 1, Fault::Status(429, vec![("retry-after", text.to_owned())]));
        assert_eq!(read(&client, &registry, &bytes, 0).unwrap(), bytes, "{text}");
    }
    registry.seen();
    registry.fault("blobs/", 1, Fault::Status(429, vec![("retry-after", "3".to_owned())]));
    let busy = read(&client, &registry, &bytes, 0).unwrap_err();
    assert!(matches!(busy, RegistryError::TooBusy { wait, .. } if wait.as_secs() == 3), "{busy}");
    assert_eq!(registry.seen().len(), 1);
}

#[test]
fn a_token_that_runs_out_is_renewed() {
    let bytes = noise(1000);
    let registry = with_blob(&bytes);
    registry.put("team/app", "1", &small_image());
    registry.require_token(TokenAuth { authorization: None, identity: None, realm: None, uses: 2 });
    let client = client(options());
    for _ in 0..4 {
        client.resolve(&reference(&registry, ":1")).unwrap();
        assert_eq!(read(&client, &registry, &bytes, 0).unwrap(), bytes);
    }
    let lines: Vec<String> = registry.seen().iter().map(|seen| seen.line()).collect();
    let tokens: Vec<&String> = lines.iter().filter(|line| line.starts_with("GET /token?")).collect();
    assert_eq!(tokens.len(), 4, "{lines:#?}");
    assert!(tokens[0].contains("service=test") && tokens[0].contains("scope=repository%3Ateam%2Fapp%3Apull"));
}

#[test]
fn a_password_or_an_identity_token_buys_a_token() {
    let scratch = Scratch::new();
    let registry = with_blob(b"");
    registry.put("team/app", "1", &small_image());
    let auth = TokenAuth { authorization: Some(BASIC.into()), identity: None, realm: None, uses: 9 };
    registry.require_token(auth.clone());
    let name = reference(&registry, ":1");
    assert!(client(known(&scratch, &registry.host())).resolve(&name).is_ok());
    let denied = client(options()).resolve(&name).unwrap_err();
    assert_eq!(denied.kind(), ErrorKind::FailedPrecondition);
    assert!(denied.to_string().contains("docker login"), "{denied}");

    registry.require_token(TokenAuth { identity: Some("refresh-me".into()), ..auth });
    let text = format!(r#"{{"auths": {{"{}": {{"identitytoken": "refresh-me"}}}}}}"#, registry.host());
    let credentials = Credentials { file: Some(scratch.file("identity.json", text)), search_path: vec![] };
    registry.seen();
    assert!(client(ClientOptions { credentials, ..options() }).resolve(&name).is_ok());
    assert!(registry.seen().iter().any(|seen| seen.line() == "POST /token"));
}

#[test]
fn h01_r01_a_redirect_takes_no_secret_to_another_host() {
    let scratch = Scratch::new();
    let bytes = noise(100_000);
    let (registry, store) = (with_blob(&bytes), with_blob(&bytes));
    registry.require_token(TokenAuth { authorization: Some(BASIC.into()), identity: None, realm: None, uses: 9 });
    let to = format!("http://{}/v2/team/app/blobs/{}?signature=abc", store.host(), blob(&bytes).digest);
    registry.fault(
        "blobs/",
        1,
        Fault::Status(401, vec![("www-authenticate", format!("Bearer realm=\"http://{}/token\"", registry.host()))]),
    );
    registry.fault("blobs/", 2, Fault::Redirect(to));
    // Its connection breaks, and it goes on with a new redirect.
    store.fault("blobs/", 1, Fault::DropAfter(70_000));
    let client = client(known(&scratch, &registry.host()));
    assert_eq!(read(&client, &registry, &bytes, 0).unwrap(), bytes);
    let (at_home, away) = (registry.seen(), store.seen());
    assert!(at_home.iter().any(|seen| seen.header("authorization").is_some_and(|text| text.starts_with("Bearer "))));
    assert_eq!(away.len(), 2);
    for seen in away {
        assert_eq!(seen.header("authorization"), None, "{seen:?}");
        assert!(!format!("{seen:?}").contains("canary"), "{seen:?}");
    }
}

#[test]
fn redirects_end() {
    let bytes = noise(10);
    let registry = with_blob(&bytes);
    let here = format!("http://{}/v2/team/app/blobs/{}", registry.host(), blob(&bytes).digest);
    registry.fault("blobs/", 100, Fault::Redirect(here));
    let client = client(options());
    assert!(matches!(read(&client, &registry, &bytes, 0), Err(RegistryError::Redirect { .. })));
    assert_eq!(registry.seen().len(), 11);
}

#[test]
fn h01_r01_a_foreign_token_service_gets_no_credentials_unless_it_may() {
    let scratch = Scratch::new();
    let (registry, other) = (FaultyRegistry::start(), FaultyRegistry::start());
    registry.put("team/app", "1", &small_image());
    // The same machine by another name is another host.
    let realm = format!("http://localhost:{}/token", other.host().rsplit(':').next().unwrap());
    let auth = TokenAuth { authorization: Some(BASIC.into()), identity: None, realm: Some(realm), uses: 9 };
    registry.require_token(auth);
    let options = known(&scratch, &registry.host());
    let refused = client(options.clone()).resolve(&reference(&registry, ":1")).unwrap_err();
    assert!(matches!(refused, RegistryError::Realm { .. }), "{refused}");
    assert!(refused.to_string().contains("token-hosts = [\"localhost\"]"), "{refused}");
    assert!(other.seen().is_empty());

    let allowed = HostConfig { token_hosts: vec!["localhost".into()], ..HostConfig::default() };
    let client = client(with_host(options, &registry.host(), allowed));
    drop(client.resolve(&reference(&registry, ":1")));
    assert_eq!(other.seen()[0].header("authorization"), Some(BASIC));
}

#[test]
fn h01_r06_no_secret_is_in_any_error() {
    let scratch = Scratch::new();
    let registry = FaultyRegistry::start();
    let body = |text: &str| format!(r#"{{"errors": [{{"code": "X", "message": "you sent {text}"}}]}}"#).into_bytes();
    let client = client(known(&scratch, &registry.host()));
    registry.require_token(TokenAuth { authorization: Some("Basic x".into()), identity: None, realm: None, uses: 9 });
    registry.fault("/token", 1, Fault::Answer(401, vec![], body(&format!("{BASIC} canary-password"))));
    let error = client.resolve(&reference(&registry, ":1")).unwrap_err();
    let shown = format!("{error} {error:?} {client:?}");
    assert!(shown.contains("you sent Basic (secret) (secret)"), "{shown}");
    assert!(!shown.contains("canary") && !shown.contains("bWU6"), "{shown}");

    // What leads on may be signed.
    let (registry, client) = (FaultyRegistry::start(), self::client(options()));
    registry.fault("manifests/", 1, Fault::Redirect("ftp://user:canary@host/x?signature=canary".into()));
    let error = client.resolve(&reference(&registry, ":1")).unwrap_err();
    let shown = format!("{error} {error:?}");
    assert!(shown.contains("ftp://host/x") && !shown.contains("canary"), "{shown}");
}

#[test]
fn h01_r08_a_host_of_tls_is_not_spoken_to_in_plain() {
    let registry = FaultyRegistry::start();
    registry.put("team/app", "1", &small_image());
    for insecure in [false, true] {
        let config = HostConfig { http: Some(false), insecure, ..HostConfig::default() };
        let client = client(with_host(options(), &registry.host(), config));
        assert!(client.resolve(&reference(&registry, ":1")).is_err());
    }
    assert!(registry.seen().iter().all(|seen| !seen.target.contains("/v2/")), "a request came in plain");
}

#[test]
fn mirrors_are_asked_first_and_may_fail() {
    let (registry, mirror) = (FaultyRegistry::start(), FaultyRegistry::start());
    let (image, bytes) = (small_image(), noise(200_000));
    registry.put("team/app", "1", &image);
    registry.put_blob("team/app", &bytes);
    mirror.put("hub/team/app", "1", &image);
    mirror.put_blob("hub/team/app", &bytes);
    let mirrors = vec![format!("{}/hub", mirror.host())];
    let config = HostConfig { mirrors, ..HostConfig::default() };
    let client = client(with_host(options(), &registry.host(), config));
    client.resolve(&reference(&registry, ":1")).unwrap();
    assert_eq!(read(&client, &registry, &bytes, 0).unwrap(), bytes);
    assert!(registry.seen().is_empty());
    assert!(mirror.seen()[0].target.ends_with(&format!("?ns={}", registry.host().replace(':', "%3A"))));

    mirror.fault("blobs/", 1, Fault::DropAfter(120_000));
    assert_eq!(read(&client, &registry, &bytes, 0).unwrap(), bytes);
    assert!(registry.seen()[0].header("range").is_some(), "the host goes on where its mirror broke off");
    mirror.fault("manifests/", 1, Fault::Status(500, vec![]));
    mirror.fault("blobs/", 1, Fault::Truncate(10));
    client.resolve(&reference(&registry, ":1")).unwrap();
    assert_eq!(read(&client, &registry, &bytes, 0).unwrap(), bytes);
    assert_eq!(registry.seen().len(), 2);
}

fn push(
    client: &Client,
    registry: &FaultyRegistry,
    bytes: &[u8],
    known_in: &[Repository],
) -> Result<PushedBlob, RegistryError> {
    let open = |offset: u64| {
        let rest = bytes[usize::try_from(offset).unwrap()..].to_vec();
        Ok(Box::new(io::Cursor::new(rest)) as Box<dyn io::Read + Send>)
    };
    let upload = Upload { digest: BlobDigest::of(bytes), size_bytes: bytes.len() as u64, known_in, open: &open };
    client.push_blob(&repository(registry), &upload)
}

#[test]
fn a_blob_is_sent_once_and_mounted_where_it_can_be() {
    let registry = FaultyRegistry::start();
    let client = client(options());
    let bytes = noise(100_000);
    assert_eq!(push(&client, &registry, &bytes, &[]).unwrap(), PushedBlob::Uploaded);
    registry.seen();
    assert_eq!(push(&client, &registry, &bytes, &[]).unwrap(), PushedBlob::Present);
    assert_eq!(registry.seen().len(), 1);

    let from = Repository { host: registry.host(), name: "base".into() };
    let elsewhere = Repository { host: "elsewhere.example".into(), name: "base".into() };
    let other = noise(70_000);
    registry.put_blob("base", &other);
    let mounted = push(&client, &registry, &other, &[elsewhere, from.clone()]).unwrap();
    assert_eq!(mounted, PushedBlob::Mounted { from });
    assert!(registry.seen().iter().all(|seen| seen.body.is_empty()), "nothing was sent");
    assert_eq!(registry.blobs("team/app").len(), 2);
}

#[test]
fn h01_r07_a_blob_that_another_repository_no_longer_has_is_sent() {
    let registry = FaultyRegistry::start();
    let client = client(options());
    let bytes = noise(100_000);
    let gone = Repository { host: registry.host(), name: "base".into() };
    assert_eq!(push(&client, &registry, &bytes, std::slice::from_ref(&gone)).unwrap(), PushedBlob::Uploaded);
    let lines: Vec<String> = registry.seen().iter().map(|seen| seen.method.clone()).collect();
    assert_eq!(lines, ["HEAD", "POST", "PUT"], "the upload that was begun instead of a mount is used");
    // A registry that will not say is no reason to fail.
    registry.fault("mount=", 1, Fault::Status(403, vec![]));
    assert_eq!(push(&client, &registry, &noise(10), &[gone]).unwrap(), PushedBlob::Uploaded);
}

#[test]
fn an_upload_that_breaks_goes_on_where_it_did() {
    let registry = FaultyRegistry::start();
    let client = client(options());
    let bytes = noise(3_000_000);
    registry.fault("PUT ", 1, Fault::DropAfter(1_000_000));
    registry.fault("PATCH ", 1, Fault::DropAfter(500_000));
    assert_eq!(push(&client, &registry, &bytes, &[]).unwrap(), PushedBlob::Uploaded);
    let ranges: Vec<String> =
        registry.seen().iter().filter_map(|seen| seen.header("content-range").map(str::to_owned)).collect();
    assert_eq!(ranges, ["1000000-2999999", "1500000-2999999"]);
    assert_eq!(registry.blobs("team/app").values().collect::<Vec<_>>(), [&bytes]);

    // One that has forgotten the upload gets it anew.
    let other = noise(100_000);
    registry.fault("PUT ", 1, Fault::DropAfter(1000));
    registry.fault("GET ", 1, Fault::Status(404, vec![]));
    assert_eq!(push(&client, &registry, &other, &[]).unwrap(), PushedBlob::Uploaded);
    registry.fault("PUT ", 1, Fault::Status(500, vec![]));
    assert_eq!(push(&client, &registry, &noise(10), &[]).unwrap(), PushedBlob::Uploaded);
    registry.fault("PUT ", 1, Fault::Status(400, vec![]));
    assert!(push(&client, &registry, &noise(11), &[]).is_err());
}

#[test]
fn what_cannot_be_read_is_told_apart_from_a_broken_connection() {
    let registry = FaultyRegistry::start();
    let client = client(options());
    let open = |_| Ok(Box::new(BrokenDisk) as Box<dyn io::Read + Send>);
    let upload = Upload { digest: BlobDigest::of(b"x"), size_bytes: 1, known_in: &[], open: &open };
    let failed = client.push_blob(&repository(&registry), &upload).unwrap_err();
    assert!(matches!(failed, RegistryError::Local(_)), "{failed:?}");

    struct BrokenDisk;
    impl io::Read for BrokenDisk {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("the disk is gone"))
        }
    }
}

#[test]
fn stopping_ends_waits_and_reads() {
    let registry = FaultyRegistry::start();
    registry.fault("manifests/", 100, Fault::Status(503, vec![]));
    let mut patient = options();
    patient.retry.first_wait = Duration::from_secs(3600);
    patient.retry.longest_wait = Duration::from_secs(3600);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let to_silent: Reference = format!("{}/x:1", silent.local_addr().unwrap()).parse().unwrap();
    for name in [reference(&registry, ":1"), to_silent] {
        let client = client(patient.clone());
        std::thread::scope(|scope| {
            let resolving = scope.spawn(|| client.resolve(&name));
            // Once it waits for an answer, or for the next try.
            if name.repository() == "x" {
                drop(silent.accept().unwrap());
            } else {
                assert!(plies_testkit::eventually(|| !registry.seen().is_empty()));
            }
            client.stop();
            assert!(matches!(resolving.join().unwrap(), Err(RegistryError::Stopped)));
        });
        assert!(matches!(client.resolve(&name), Err(RegistryError::Stopped)));
    }
}

#[test]
fn a_registry_that_asks_who_we_are_is_told_as_docker_tells_it() {
    if !tools::have(&["docker-registry", "openssl"]) {
        return;
    }
    let scratch = Scratch::new();
    let registry = DockerRegistry::start_mutual_tls(&scratch.join("registry"));
    let reference: Reference = format!("{}/team/app:1", registry.host()).parse().unwrap();
    // Loopback is plain HTTP unless somebody says otherwise.
    let tls = HostConfig { http: Some(false), ..HostConfig::default() };
    let ask = |options: ClientOptions| client(options).resolve(&reference).map(drop).unwrap_err();
    let in_config = |config: HostConfig| ask(with_host(options(), &registry.host(), config));
    let certificates = scratch.dir("certs.d");
    let in_dir = || {
        let certificate_dirs = vec![certificates.clone()];
        ask(ClientOptions { certificate_dirs, ..with_host(options(), &registry.host(), tls.clone()) })
    };
    let of_registry = |name: &str| scratch.join("registry").join(name);
    let put = |from: &str, name: &str| {
        let dir = scratch.dir(std::path::Path::new("certs.d").join(registry.host()));
        std::fs::copy(of_registry(from), dir.join(name)).unwrap();
    };
    let is_in = |error: &RegistryError| matches!(error, RegistryError::NotFound { .. });

    // Neither knows the other, then we know it, then it knows us: it has no such image.
    assert!(!is_in(&in_dir()));
    put("certificate.pem", "ca.crt");
    assert!(!is_in(&in_dir()));
    put("client.cert", "client.cert");
    let no_key = in_dir();
    assert!(format!("{:?}", no_key).contains("client.key") && no_key.kind() == ErrorKind::InvalidInput, "{no_key:?}");
    put("client.key", "client.key");
    let inside = in_dir();
    assert!(is_in(&inside), "{inside:?}");
    // A key that is not the certificate's.
    put("key.pem", "client.key");
    let other = in_dir();
    assert!(format!("{other:?}").contains("not the key of") && other.kind() == ErrorKind::InvalidInput, "{other:?}");

    let ca = vec![of_registry("certificate.pem")];
    let known = HostConfig { ca, ..tls.clone() };
    assert!(!is_in(&in_config(known.clone())));
    let keypair = Some(KeyPair { key: of_registry("client.key"), cert: of_registry("client.cert") });
    let inside = in_config(HostConfig { keypair, ..known });
    assert!(is_in(&inside), "{inside:?}");
}
