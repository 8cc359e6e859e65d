#!/usr/bin/env python3
"""Makes the data the bench loads: `many`, an image of 20 gzip layers.

It is what an image on Debian looks like that grew by one install step after another: a minimal
base, then languages, tools and libraries a layer each, then layers that chown a tree, delete and
replace. About 110,000 entries and 1.9 GB unpacked.

The packages come through apt as it is set up on this machine, as if nothing were installed; what
is already in DIR is not made again. In DIR afterwards:

    debs/            the packages
    oci/many/        the image as an OCI layout
    many.oci.tar     the same as one tar archive
    many.json        what is in it: entries, bytes, digests of layers

With --set also one of those that are made of it, in files of that name: `base`, its first layer alone; `big`, one
layer of 17 files, 1.6 GB, cut out of its tars; with `-zstd` behind the name, the same with zstd layers (needs zstd).

Runs as root (owners and devices are kept) and needs about 6 GB while it works.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

# One entry a layer. What apt adds to these to make them work belongs to the layer too.
PACKAGE_LAYERS = [
    ("base", []),
    ("python3", ["python3"]),
    ("gcc", ["build-essential", "clang-14"]),
    ("perl-doc", ["perl", "perl-doc"]),
    ("nodejs", ["nodejs", "npm"]),
    ("git", ["git", "openssh-client", "ca-certificates"]),
    ("numpy", ["python3-numpy"]),
    ("kernel-headers", ["linux-headers-amd64"]),
    ("cmake", ["cmake", "ninja-build", "llvm-14-dev"]),
    ("vim", ["vim", "openjdk-17-jre-headless"]),
    ("ruby", ["ruby"]),
    ("locales", ["locales", "iso-codes"]),
    ("manpages", ["manpages", "manpages-dev"]),
    ("django", ["python3-django", "python3-pip"]),
    ("boost", ["libboost-dev"]),
]
# Whole seconds, so that every tool that packs and unpacks keeps them.
NEWEST_MTIME = 1_700_000_000
GZIP_LEVEL = 6
BIG_FILES = 17
BIG_BYTES = 1_600_000_000
SETS = [name + packing for name in ("many", "base", "big") for packing in ("", "-zstd")]
ARCH = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)


def run(*command, **options):
    return subprocess.run(command, check=True, **options)


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def essential_packages():
    """What a minimal Debian holds: everything essential or required, and apt itself."""
    names = {"apt"}
    for stanza in output("apt-cache", "dumpavail").split("\n\n"):
        name = re.search(r"^Package: (\S+)", stanza, re.M)
        if name and re.search(r"^(Essential: yes|Priority: required)", stanza, re.M):
            names.add(name[1])
    return sorted(names)


def closure(wanted, status):
    """Name and version of every package an install of `wanted` on an empty system takes, in apt's order."""
    listing = output(
        "apt-get", "-s", "-o", f"Dir::State::status={status}", "-o", "Debug::NoLocking=1",
        "--no-install-recommends", "install", *wanted)
    return re.findall(r"^Inst (\S+) \((\S+) ", listing, re.M)


def plan_layers(status):
    """The packages of each layer: what it adds to the closure of those below."""
    wanted, seen, layers = essential_packages(), set(), []
    for name, packages in PACKAGE_LAYERS:
        wanted = wanted + packages
        new = [package for package in closure(wanted, status) if package[0] not in seen]
        seen.update(package for package, _ in new)
        layers.append((name, new))
    return layers


def download(packages, debs):
    debs.mkdir(parents=True, exist_ok=True)
    have = {path.name.split("_")[0] + "=" + path.name.split("_")[1].replace("%3a", ":") for path in debs.glob("*.deb")}
    missing = [f"{name.split(':')[0]}={version}" for name, version in packages]
    missing = [package for package in missing if package not in have]
    for start in range(0, len(missing), 50):
        run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *missing[start:start + 50], cwd=debs,
            stdout=subprocess.DEVNULL)


def deb_of(debs, package):
    name, version = package[0].split(":")[0], package[1].replace(":", "%3a")
    found = list(debs.glob(f"{name}_{version}_*.deb"))
    if not found:
        sys.exit(f"dataset: {debs}: no package file for {name} {version}")
    return found[0]


def entries(root):
    """Every path below root, parents first, in byte order."""
    found = []
    for top, directories, files in os.walk(root):
        directories.sort()
        relative = os.path.relpath(top, root)
        found += [os.path.normpath(os.path.join(relative, name)) for name in directories + files]
    return sorted(found, key=os.fsencode)


class Layer:
    """One layer tar as it is written: hashed before and after compression."""

    def __init__(self, blobs):
        self.blobs = blobs
        self.raw = hashlib.sha256()
        self.size = 0
        self.file = tempfile.NamedTemporaryFile(dir=blobs, delete=False)
        self.zip = gzip.GzipFile(filename="", mode="wb", compresslevel=GZIP_LEVEL, fileobj=self.file, mtime=0)

    def write(self, data):
        self.raw.update(data)
        self.size += len(data)
        return self.zip.write(data)

    def finish(self):
        self.zip.close()
        self.file.close()
        digest = digest_file(self.file.name)
        size = os.path.getsize(self.file.name)
        os.chmod(self.file.name, 0o644)
        os.rename(self.file.name, self.blobs / digest)
        return {"blob": f"sha256:{digest}", "size_bytes": size, "diff_id": f"sha256:{self.raw.hexdigest()}",
                "raw_bytes": self.size}


def digest_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(info):
    """Numbers only, and no time later than the day the data was fixed on."""
    info.uname = info.gname = ""
    info.mtime = min(int(info.mtime), NEWEST_MTIME)
    return info


def pack(root, blobs, paths=None, change=plain):
    """Packs a directory (or some paths of it) as a layer."""
    layer, count, regular = Layer(blobs), 0, 0
    with tarfile.open(fileobj=layer, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for path in entries(root) if paths is None else paths:
            info = tar.gettarinfo(os.path.join(root, path), arcname=path)
            if info is None:
                continue
            info = change(plain(info))
            count += 1
            regular += info.isreg()
            if info.isreg():
                with open(os.path.join(root, path), "rb") as file:
                    tar.addfile(info, file)
            else:
                tar.addfile(info)
    return {**layer.finish(), "entries": count, "regular": regular}


def pack_made(blobs, members):
    """Packs made-up members: (name, type, content)."""
    layer = Layer(blobs)
    with tarfile.open(fileobj=layer, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.mtime, info.size = kind, NEWEST_MTIME, len(content)
            info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
            tar.addfile(info, io.BytesIO(content))
    return {**layer.finish(), "entries": len(members), "regular": sum(kind == tarfile.REGTYPE for _, kind, _ in members)}


def under(root, prefix):
    top = os.path.join(root, prefix)
    return [os.path.join(prefix, path) for path in entries(top)] if os.path.isdir(top) else []


def made_layers(trees, blobs):
    """The five layers that no package makes: they chown, delete, replace and add."""
    def owned(info):
        info.uid, info.gid = 1000, 1000
        return info

    boost = [path for path in under(trees["boost"], "usr/include/boost") if not os.path.isdir(trees["boost"] / path)]
    yield "chown", pack(trees["boost"], blobs, boost[:5000], owned)

    doomed = [path for path in under(trees["perl-doc"], "usr") if not os.path.isdir(trees["perl-doc"] / path)][:1000]
    yield "delete", pack_made(blobs, [
        (os.path.join(os.path.dirname(path), ".wh." + os.path.basename(path)), tarfile.REGTYPE, b"") for path in doomed])

    replaced = [("usr/share/doc/", tarfile.DIRTYPE, b""), ("usr/share/doc/.wh..wh..opq", tarfile.REGTYPE, b"")]
    replaced += [(f"usr/share/doc/kept-{number}", tarfile.REGTYPE, b"kept\n" * number) for number in range(500)]
    replaced += [("usr/share/lintian/", tarfile.DIRTYPE, b""), ("usr/share/lintian/.wh..wh..opq", tarfile.REGTYPE, b"")]
    yield "replace", pack_made(blobs, replaced)

    yield "retouch", pack(trees["nodejs"], blobs, under(trees["nodejs"], "usr/share/nodejs")[:3000])

    app = [("srv/", tarfile.DIRTYPE, b""), ("srv/app/", tarfile.DIRTYPE, b"")]
    app += [(f"srv/app/module_{number:04}.py", tarfile.REGTYPE, f"VALUE = {number}\n".encode() * (number % 97 + 1))
            for number in range(2000)]
    yield "app", pack_made(blobs, app)


def write_blob(blobs, document):
    data = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def write_layout(layout, layers, compression="gzip"):
    """Config, manifest and index around the layers, so that the directory is an OCI layout."""
    blobs = layout / "blobs" / "sha256"
    config = write_blob(blobs, {
        "architecture": ARCH, "os": "linux", "config": {"Cmd": ["/bin/bash"], "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [layer["diff_id"] for layer in layers]},
        "history": [{"created_by": layer["name"]} for layer in layers]})
    manifest = write_blob(blobs, {
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **config},
        "layers": [{"mediaType": f"application/vnd.oci.image.layer.v1.tar+{compression}", "digest": layer["blob"],
                    "size": layer["size_bytes"]} for layer in layers]})
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (layout / "index.json").write_text(json.dumps({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json", **manifest,
                       "platform": {"architecture": ARCH, "os": "linux"},
                       "annotations": {"org.opencontainers.image.ref.name": "latest",
                                       "io.containerd.image.name": "localhost/many:latest"}}]}))


def build(directory):
    debs, layout, work = directory / "debs", directory / "oci" / "many", directory / "work"
    for old in (work, layout):
        shutil.rmtree(old, ignore_errors=True)
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    work.mkdir(parents=True)
    (work / "status").touch()

    plan = plan_layers(work / "status")
    for name, packages in plan:
        print(f"dataset: {name}: {len(packages)} packages", file=sys.stderr)
        download(packages, debs)

    trees, layers = {}, []
    for name, packages in plan:
        tree = trees[name] = work / name
        tree.mkdir()
        for package in packages:
            run("dpkg-deb", "-x", deb_of(debs, package), tree)
        layers.append({"name": name, **pack(tree, blobs)})
        print(f"dataset: {name}: {layers[-1]['entries']} entries, {layers[-1]['raw_bytes'] >> 20} MiB", file=sys.stderr)
    for name, layer in made_layers(trees, blobs):
        layers.append({"name": name, **layer})

    write_archive(directory, "many", layers)
    shutil.rmtree(work)


def write_archive(directory, name, layers, compression="gzip"):
    """The layout as one file, and what is in it."""
    layout, new = directory / "oci" / name, directory / f"{name}.oci.tar.new"
    write_layout(layout, layers, compression)
    run("tar", "-C", layout, "--owner=0", "--group=0", "-cf", new, "oci-layout", "index.json", "blobs")
    totals = {key: sum(layer[key] for layer in layers) for key in ("entries", "regular", "raw_bytes", "size_bytes")}
    (directory / f"{name}.json").write_text(json.dumps({**totals, "layers": layers}, indent=1))
    os.rename(new, directory / f"{name}.oci.tar")


class Tars:
    """The tars of layers, one behind the other."""

    def __init__(self, blobs, layers):
        self.left = [blobs / layer["blob"].removeprefix("sha256:") for layer in reversed(layers)]
        self.tar = gzip.open(self.left.pop())

    def read(self, size):
        data = self.tar.read(size)
        while len(data) < size and self.left:
            self.tar = gzip.open(self.left.pop())
            data += self.tar.read(size - len(data))
        return data


def derive(directory, name):
    """Makes one of the sets that consist of what `many`, or a set of gzip layers, has."""
    origin = name.removesuffix("-zstd") if name.endswith("-zstd") else "many"
    if not (directory / "oci" / origin).exists():
        derive(directory, origin)
    many = json.loads((directory / f"{origin}.json").read_text())["layers"]
    source = directory / "oci" / origin / "blobs" / "sha256"
    blobs = directory / "oci" / name / "blobs" / "sha256"
    shutil.rmtree(directory / "oci" / name, ignore_errors=True)
    blobs.mkdir(parents=True)
    if name == "base":
        shutil.copy(source / many[0]["blob"].removeprefix("sha256:"), blobs)
        write_archive(directory, name, many[:1])
    elif name == "big":
        layer, files = Layer(blobs), Tars(source, many)
        with tarfile.open(fileobj=layer, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            for number in range(BIG_FILES):
                info = tarfile.TarInfo(f"f{number}")
                info.size, info.mtime = BIG_BYTES // BIG_FILES, NEWEST_MTIME
                tar.addfile(info, files)
        write_archive(directory, name, [{"name": name, **layer.finish(), "entries": BIG_FILES, "regular": BIG_FILES}])
    else:
        layers = []
        for layer in many:
            new = blobs / "new"
            with open(new, "wb") as file:
                unzip = subprocess.Popen(["gzip", "-dc", source / layer["blob"].removeprefix("sha256:")], stdout=subprocess.PIPE)
                run("zstd", "-q", "-c", stdin=unzip.stdout, stdout=file)
            digest = digest_file(new)
            layers.append({**layer, "blob": f"sha256:{digest}", "size_bytes": os.path.getsize(new)})
            os.rename(new, blobs / digest)
        write_archive(directory, name, layers, "zstd")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp/plies-bench"), help="where the data is kept")
    parser.add_argument("--again", action="store_true", help="make it again though it is there")
    parser.add_argument("--set", choices=SETS, default="many", help="which")
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    if options.again or not (options.dir / "many.oci.tar").exists():
        build(options.dir)
    archive = options.dir / f"{options.set}.oci.tar"
    if options.set != "many" and (options.again or not archive.exists()):
        derive(options.dir, options.set)
        for name in SETS[1:]:
            shutil.rmtree(options.dir / "oci" / name, ignore_errors=True)
    made = json.loads((options.dir / f"{options.set}.json").read_text())
    print(f"{archive}: {len(made['layers'])} layers, {made['entries']:,} entries, "
          f"{made['raw_bytes'] / 1e6:,.0f} MB unpacked, {made['size_bytes'] / 1e6:,.0f} MB compressed")


if __name__ == "__main__":
    main()
