#!/usr/bin/env python3
"""Compares Plies with the engines that a Debian machine has: just bench, or bench/run.py --ply PATH.

Eleven questions, each with its own table:

    load    an image comes in and is unpacked: ply load, ctr images import, skopeo copy into
            containers-storage, and with --engines all also podman load, buildah pull, docker load and
            umoci unpack; each run ends in a sync of its file system
    read    every name, and every byte, through a mount of that image, cold and warm, beside the same
            tree in a plain directory
    remove  the image goes: ply rmi beside rm -rf of the tree
    merge   ten layers of 5,000 files become one tree: ply ref merge and ply mount beside cp -al
    export  the image becomes an archive: ply save, and skopeo copy out of containers-storage
    mount   an image of 100 layers is mounted and unmounted
    build   a Dockerfile of 20 steps is built again, everything cached: ply build, buildah
    again   builds of which nothing changed: 30 steps over a context of 20,000 files, one over 1 GiB
    steps   steps that copy or change 10,000 files, and steps that do nothing
    layers  the layers of that image, plain, are registered in the layer store, exported to /dev/null from
            the page cache and released; against tar -x and rm -rf of the same
    list    10,000 images are listed

Every run of `load` gets a fresh ext4 on a loop device over a file written beforehand, in a private
mount namespace: ext4 skips recently deleted inodes by a linear search, so deleting and repeating on
one file system measures that instead. Engines take turns (A B C A B C), all state is private, the
input is in the page cache, and medians are given with their smallest and largest. CPU counts
client and daemon with their children. This machine may be busy with other things: trust ratios.

Needs root. The first run makes the data (see dataset.py) and writes the file for the loop device.
"""

import argparse
import ctypes
import hashlib
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
DISK_GIB = 12
LAYERS_TO_MOUNT = 100
BUILD_STEPS = 20
IMAGES_TO_LIST = 10_000
CONTEXT_FILES = 20_000
CHANGED_FILES = 10_000
AGAIN_STEPS = 30
TRIVIAL_STEPS = 15
HASHED_MIB = 1024
MERGED_LAYERS = 10
MERGED_FILES = 5_000
# Short commands are repeated, since one is over before the clock says much.
REPEATS = 15


def run(*command, **options):
    return subprocess.run([str(word) for word in command], check=True, **options)


def quiet(*command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"bench: {command}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


class Measured:
    """What one run cost."""

    def __init__(self, wall, cpu, rss_bytes, disk_bytes=0, sync=0.0):
        self.wall, self.cpu, self.rss_bytes, self.disk_bytes, self.sync = wall, cpu, rss_bytes, disk_bytes, sync


# Runs a command and tells what it cost. A process of its own, and a small one: the kernel counts the
# memory of whoever starts a program as the program's.
MEASURE = """
import json, os, subprocess, sys, time
started = time.monotonic()
process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=2)
_, status, usage = os.wait4(process.pid, 0)
wall = time.monotonic() - started
print(json.dumps([os.waitstatus_to_exitcode(status), wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024]))
"""


def measure(command, environment=None, log=None):
    """Runs a command to its end: wall and CPU seconds, and the largest memory of any process in it."""
    words = [sys.executable, "-I", "-S", "-c", MEASURE, *(str(word) for word in command)]
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=log or subprocess.DEVNULL, check=True)
    code, wall, cpu, rss_bytes = json.loads(done.stdout)
    if code != 0:
        sys.exit(f"bench: {command}: exit {code}\n{Path(log.name).read_text() if log else ''}")
    return Measured(wall, cpu, rss_bytes)


class Disk:
    """A fresh ext4 for one run."""

    def __init__(self, data):
        self.image, self.mount = data / "disk.img", data / "disk"
        self.mount.mkdir(exist_ok=True)

    def __enter__(self):
        if not self.image.exists():
            print(f"bench: writing {DISK_GIB} GiB for the loop device", file=sys.stderr)
            run("dd", "if=/dev/zero", f"of={self.image}.new", "bs=8M", f"count={DISK_GIB * 128}", "oflag=direct", "status=none")
            os.rename(f"{self.image}.new", self.image)
        # Discarding would give the blocks back that were written beforehand.
        run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", self.image)
        loop = quiet("losetup", "--direct-io=on", "--show", "-f", self.image).strip()
        run("mount", loop, self.mount)
        # Busy as long as it is mounted: it goes with the mount, also when this program is killed.
        run("losetup", "-d", loop)
        self.empty = self.used()
        return self

    def used(self):
        stat = os.statvfs(self.mount)
        return (stat.f_blocks - stat.f_bfree) * stat.f_frsize

    def sync(self):
        """Makes everything on it durable; seconds."""
        started = time.monotonic()
        handle = os.open(self.mount, os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).syncfs(handle) != 0:
            sys.exit(f"bench: syncfs: {os.strerror(ctypes.get_errno())}")
        os.close(handle)
        return time.monotonic() - started

    def __exit__(self, *_):
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            at = line.split(" ")[4]
            if at == str(self.mount) or at.startswith(f"{self.mount}/"):
                run("umount", at)


class Ply:
    name = "ply --driver overlay load"
    driver = "overlay"

    def __init__(self, options):
        self.binary = options.ply

    def version(self):
        return quiet(self.binary, "--version").strip()

    def load(self, archive, disk):
        self.root = disk.mount / "ply"
        with open(disk.mount / "log", "w") as log:
            return measure([self.binary, "--root", self.root, "--driver", self.driver, "load", "-i", archive], log=log)

    def tree(self, image, at):
        run(self.binary, "--root", self.root, "mount", image, at, stdout=subprocess.DEVNULL)
        try:
            return listing(at)
        finally:
            run(self.binary, "--root", self.root, "umount", at, stdout=subprocess.DEVNULL)

    def stop(self):
        pass


class PlyErofs(Ply):
    name = "ply --driver erofs load"
    driver = "erofs"


class Daemon:
    """A peer that is a daemon with a client."""

    def __init__(self, _):
        pass

    def start(self, base, command, client):
        log = open(base / "log", "w")
        self.client = client
        self.daemon = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while subprocess.run([*client, "version"], capture_output=True).returncode != 0:
            if time.monotonic() > deadline or self.daemon.poll() is not None:
                sys.exit(f"bench: {command[0]} does not answer: {(base / 'log').read_text()}")
            time.sleep(0.05)
        return log

    def measure(self, words, log):
        before = self.cpu()
        client = measure([*self.client, *words], log=log)
        rss = int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{self.daemon.pid}/status").read_text())[1]) * 1024
        return Measured(client.wall, client.cpu + self.cpu() - before, max(client.rss_bytes, rss))

    def cpu(self):
        """User and system time of the daemon and of the children it has waited for."""
        fields = Path(f"/proc/{self.daemon.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        self.daemon.send_signal(signal.SIGTERM)
        self.daemon.wait()


class Containerd(Daemon):
    name = "ctr images import"

    def version(self):
        helper = "unpigz" if shutil.which("unpigz") else "no unpigz"
        return f"{quiet('containerd', '--version').split(' ')[2]} ({helper})"

    def load(self, archive, disk):
        base = disk.mount / "containerd"
        base.mkdir()
        (base / "config.toml").write_text(
            f'version = 2\nroot = "{base}/root"\nstate = "{base}/state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n'
            f'[grpc]\naddress = "{base}/sock"\n[debug]\nlevel = "error"\n')
        log = self.start(base, ["containerd", "--config", base / "config.toml"], ["ctr", "--address", base / "sock"])
        return self.measure(["images", "import", "--snapshotter", "overlayfs", archive], log)

    def tree(self, image, at):
        run(*self.client, "images", "mount", "--snapshotter", "overlayfs", image, at, stdout=subprocess.DEVNULL)
        try:
            return listing(at)
        finally:
            run("umount", at)


class Docker(Daemon):
    name = "docker load"

    def version(self):
        return quiet("docker", "--version").split(",")[0]

    def load(self, archive, disk):
        base = disk.mount / "docker"
        base.mkdir()
        host = f"unix://{base}/sock"
        daemon = ["dockerd", "--bridge=none", "--iptables=false", "--storage-driver=overlay2", f"--host={host}"]
        for option, name in [("--data-root", "data"), ("--exec-root", "exec"), ("--pidfile", "pid")]:
            daemon += [option, base / name]
        log = self.start(base, daemon, ["docker", "--host", host])
        # Of the same blobs, by docker's own table of contents, which is looked for first.
        readable = base / "archive.tar"
        shutil.copy(archive, readable)
        blob = lambda descriptor: "blobs/sha256/" + descriptor["digest"].removeprefix("sha256:")
        with tarfile.open(readable) as tar:
            index = json.load(tar.extractfile("index.json"))
            manifest = json.load(tar.extractfile(blob(index["manifests"][0])))
        with tarfile.open(readable, "a") as tar:
            content = json.dumps([{"Config": blob(manifest["config"]), "RepoTags": ["localhost/many:latest"],
                                   "Layers": [blob(layer) for layer in manifest["layers"]]}]).encode()
            info = tarfile.TarInfo("manifest.json")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        disk.sync()
        measured = self.measure(["load", "-i", readable], log)
        readable.unlink()
        return measured

    def tree(self, image, at):
        layers = json.loads(quiet(*self.client, "image", "inspect", image))[0]["GraphDriver"]["Data"]
        if "LowerDir" not in layers:
            return listing(layers["UpperDir"])
        lower = layers["UpperDir"] + ":" + layers["LowerDir"]
        # A mount takes a page of options; docker's own short names are beside the layers.
        where = Path(layers["UpperDir"]).parent.parent
        short = [f"l/{(Path(path).parent / 'link').read_text()}" for path in lower.split(":")]
        run("mount", "-t", "overlay", "overlay", "-o", "ro,lowerdir=" + ":".join(short), at, cwd=where)
        try:
            return listing(at)
        finally:
            run("umount", at)


class Storage:
    """A peer that keeps its images in a containers-storage."""

    def __init__(self, _):
        pass

    def version(self):
        return quiet(self.program, "--version").strip()

    def load(self, archive, disk):
        base = disk.mount / "containers"
        (base / "tmp").mkdir(parents=True)
        (base / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{base}/storage"\nrunroot = "{base}/run"\n')
        (base / "policy.json").write_text('{"default":[{"type":"insecureAcceptAnything"}]}')
        self.environment = {**os.environ, "CONTAINERS_STORAGE_CONF": str(base / "storage.conf"), "TMPDIR": str(base / "tmp")}
        with open(base / "log", "w") as log:
            return measure([self.program, *self.words(archive, base)], environment=self.environment, log=log)

    def tree(self, _, at):
        if not shutil.which("podman"):
            return None
        image = quiet("podman", "images", "-q", env=self.environment).split()[0]
        path = quiet("podman", "image", "mount", image, env=self.environment).strip()
        try:
            return listing(path)
        finally:
            quiet("podman", "image", "unmount", "-f", image, env=self.environment)

    def stop(self):
        pass


class Skopeo(Storage):
    name, program = "skopeo copy", "skopeo"

    def words(self, archive, base):
        return ["--policy", base / "policy.json", "--tmpdir", base / "tmp", "copy", f"oci-archive:{archive}",
                "containers-storage:localhost/many:latest"]


class Podman(Storage):
    name, program = "podman load", "podman"

    def words(self, archive, base):
        return ["load", "--signature-policy", base / "policy.json", "-i", archive]


class Buildah(Storage):
    name, program = "buildah pull", "buildah"

    def words(self, archive, base):
        return ["pull", "--signature-policy", base / "policy.json", f"oci-archive:{archive}"]


class Umoci:
    """It makes one tree of all layers, and keeps no blobs: less work than that of the others."""
    name = "umoci unpack"

    def __init__(self, _):
        pass

    def version(self):
        return quiet("umoci", "--version").strip()

    def load(self, archive, disk):
        layout, self.bundle = disk.mount / "layout", disk.mount / "bundle"
        layout.mkdir()
        run("tar", "-C", layout, "-xf", archive)
        disk.sync()
        disk.empty = disk.used()
        with open(disk.mount / "log", "w") as log:
            return measure(["umoci", "unpack", "--image", f"{layout}:latest", self.bundle], log=log)

    def tree(self, _image, _at):
        return listing(self.bundle / "rootfs")

    def stop(self):
        pass


ENGINES = [Ply, PlyErofs, Containerd, Skopeo, Podman, Buildah, Docker, Umoci]


def listing(root):
    """Every name with what it is. Times of directories are left out: where a layer only implies a
    directory, containerd and containers-storage make up a time for it."""
    found = {}
    for top, directories, files in os.walk(root):
        for name in directories + files:
            path = os.path.join(top, name)
            stat = os.lstat(path)
            is_directory = (stat.st_mode & 0o170000) == 0o040000
            is_file = (stat.st_mode & 0o170000) == 0o100000
            content = os.readlink(path) if os.path.islink(path) else None
            if is_file:
                with open(path, "rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
            found[os.path.relpath(path, root)] = (
                oct(stat.st_mode), stat.st_uid, stat.st_gid, None if is_directory else stat.st_mtime_ns,
                stat.st_rdev, content, sorted(os.listxattr(path, follow_symlinks=False)))
    return found


def compare(trees):
    """Says whether all engines show the same tree."""
    (first, reference), *others = [(name, tree) for name, tree in trees.items() if tree is not None]
    for name, tree in others:
        differing = sorted(path for path in reference.keys() | tree.keys() if reference.get(path) != tree.get(path))
        print(f"trees: {first} and {name}: {len(reference):,} names, {len(differing)} differ")
        for path in differing[:10]:
            print(f"  {path}: {reference.get(path)} != {tree.get(path)}")


def spread(values, unit=1.0, digits=2):
    values = [value / unit for value in values]
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def table(title, header, rows):
    print(f"\n{title}")
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        print("  " + "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                               for column, (cell, width) in enumerate(zip(row, widths))))


def bench_load(options, results):
    archive = options.data / f"{options.set}.oci.tar"
    engines = [engine(options) for engine in ENGINES if engine.__name__.lower() in options.engines]
    runs = {engine.name: [] for engine in engines}
    trees = {}
    for turn in range(options.runs):
        for engine in engines:
            run("cat", archive, stdout=subprocess.DEVNULL)
            with Disk(options.data) as disk:
                try:
                    measured = engine.load(archive, disk)
                    measured.sync = disk.sync()
                    measured.disk_bytes = disk.used() - disk.empty
                    if turn == 0 and not options.no_compare:
                        at = disk.mount / "tree"
                        at.mkdir()
                        trees[engine.name] = engine.tree("localhost/many:latest", at)
                finally:
                    engine.stop()
            runs[engine.name].append(measured)
            print(f"bench: {engine.name} {turn + 1}/{options.runs}: {measured.wall:.2f} s and {measured.sync:.2f} s of sync, "
                  f"{measured.cpu:.2f} s of CPU", file=sys.stderr)
    ours = statistics.median(run.wall + run.sync for run in runs[engines[0].name])
    rows = []
    for engine in engines:
        own = runs[engine.name]
        total = [run.wall + run.sync for run in own]
        rows.append([engine.name, spread(total), spread([run.wall for run in own]), spread([run.cpu for run in own]),
                     f"{max(run.rss_bytes for run in own) / 1e6:.0f} MB", f"{statistics.median(run.disk_bytes for run in own) / 1e6:,.0f} MB",
                     f"{statistics.median(total) / ours:.2f}x", engine.version()])
    made = json.loads((options.data / f"{options.set}.json").read_text())
    table(f"load: {options.set}, {len(made['layers'])} layers, {made['entries']:,} entries, {made['raw_bytes'] / 1e6:,.0f} MB unpacked; n={options.runs}",
          ["", "with sync, s", "wall, s", "CPU, s", "peak RSS", "disk", "ratio", "version"], rows)
    results["load"] = {name: [vars(run) for run in own] for name, own in runs.items()}
    if trees:
        compare(trees)


def cold():
    """What is read next comes from the disk."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def bench_read(options, results):
    """Names are what `tar -cf /dev/null` takes: GNU tar opens no file for it. Bytes go through a pipe."""
    archive = options.data / f"{options.set}.oci.tar"
    found = {}
    for turn in range(options.runs):
        with Disk(options.data) as disk:
            at, plain = disk.mount / "at", disk.mount / "plain"
            at.mkdir(), plain.mkdir()
            places = []
            for engine in (Ply(options), PlyErofs(options)):
                engine.load(archive, disk)
                os.rename(engine.root, disk.mount / engine.driver)
                ply = [options.ply, "--root", disk.mount / engine.driver]
                places.append((f"mounted, driver {engine.driver}", at, [*ply, "mount", "localhost/many:latest", at], [*ply, "umount", at]))
            quiet(*places[0][2])
            run("cp", "-a", f"{at}/.", plain)
            quiet(*places[0][3])
            places.insert(0, ("a plain directory", plain, ["true"], ["true"]))
            for name, tree, mount, umount in places:
                # A mount of its own for each, so that nothing is left of the one before.
                names = ["tar", "-C", tree, "-cf", "/dev/null", "."]
                contents = ["sh", "-c", 'tar -C "$0" -cf - . | cat > /dev/null', tree]
                for what, command in [("names", names), ("bytes", contents)]:
                    quiet(*mount)
                    cold()
                    for how in ("cold", "warm"):
                        found.setdefault(name, {}).setdefault(f"{what} {how}", []).append(measure(command).wall)
                    quiet(*umount)
            print(f"bench: read {turn + 1}/{options.runs}", file=sys.stderr)
    columns = ["names cold", "names warm", "bytes cold", "bytes warm"]
    table(f"read: {options.set}; n={options.runs}; milliseconds", ["", *columns],
          [[name, *(spread(times[column], 1e-3, 0) for column in columns)] for name, times in found.items()])
    results["read"] = found


def bench_remove(options, results):
    archive = options.data / f"{options.set}.oci.tar"
    found = {}
    for turn in range(options.runs):
        for engine in (Ply(options), PlyErofs(options)):
            with Disk(options.data) as disk:
                engine.load(archive, disk)
                ply = [options.ply, "--root", engine.root]
                if engine.driver == "overlay":
                    at, plain = disk.mount / "at", disk.mount / "plain"
                    at.mkdir(), plain.mkdir()
                    quiet(*ply, "mount", "localhost/many:latest", at)
                    run("cp", "-a", f"{at}/.", plain)
                    quiet(*ply, "umount", at)
                    disk.sync()
                    found.setdefault("rm -rf of the tree", []).append(measure(["rm", "-rf", plain]).wall + disk.sync())
                removed = measure([*ply, "rmi", "localhost/many:latest"]).wall + disk.sync()
                found.setdefault(f"ply rmi, driver {engine.driver}", []).append(removed)
                if json.loads(quiet(*ply, "layer", "ls", "--json")) or json.loads(quiet(*ply, "images", "--json")):
                    sys.exit("bench: something is left of the image")
    table(f"remove: {options.set}; n={options.runs}", ["", "with sync, ms"], [[name, spread(walls, 1e-3, 0)] for name, walls in found.items()])
    results["remove"] = found


def bench_merge(options, results):
    """What BuildKit's MergeOp does: trees of 50 directories that all of them have, laid over one another."""
    found = {}
    for driver in ("overlay", "erofs"):
        with Disk(options.data) as disk:
            ply, images, trees = [options.ply, "--root", disk.mount / "ply", "--driver", driver], [], disk.mount / "trees"
            at = disk.mount / "at"
            at.mkdir()
            for layer in range(MERGED_LAYERS):
                context = disk.mount / f"context-{layer}"
                for number in range(MERGED_FILES):
                    path = context / "files" / f"d{number % 50}" / f"f{layer}-{number}"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(b"x" * 1024)
                shutil.copytree(context / "files", trees / str(layer))
                (context / "Dockerfile").write_text("FROM scratch\nCOPY files /\n")
                images.append(f"localhost/layer-{layer}:latest")
                quiet(*ply, "build", "-t", images[-1], context)
            disk.sync()
            for turn in range(options.runs):
                # Each merge is another one: the same would be found.
                order = images[turn:] + images[:turn]
                merged = measure([*ply, "ref", "merge", *order]).wall
                record = quiet(*ply, "ref", "merge", *order).strip()
                mounted = measure([*ply, "mount", record, at]).wall
                if len(list(at.glob("d0/*"))) != MERGED_LAYERS * MERGED_FILES // 50:
                    sys.exit("bench: the merged tree is not what was merged")
                quiet(*ply, "umount", at)
                found.setdefault(f"ply ref merge, driver {driver}", []).append(merged)
                found.setdefault(f"ply mount of it, driver {driver}", []).append(mounted)
                into = disk.mount / f"linked-{turn}"
                into.mkdir()
                linked = sum(measure(["cp", "-al", f"{trees / str(layer)}/.", into]).wall for layer in range(MERGED_LAYERS))
                found.setdefault("cp -al", []).append(linked)
            floor = [measure([options.ply, "--version"]).wall for _ in range(REPEATS)]
    found["starting ply and nothing else"] = floor
    table(f"merge: {MERGED_LAYERS} layers of {MERGED_FILES:,} files; n={options.runs}", ["", "wall, ms"],
          [[name, spread(walls, 1e-3, 1)] for name, walls in found.items()])
    results["merge"] = found


def bench_export(options, results):
    archive = options.data / f"{options.set}.oci.tar"
    found, rss, bytes_out = {}, {}, {}

    def note(name, measured, out, disk):
        found.setdefault(name, []).append(measured.wall + disk.sync())
        rss[name] = max(rss.get(name, 0), measured.rss_bytes)
        bytes_out[name] = out.stat().st_size
        out.unlink()

    for turn in range(options.runs):
        with Disk(options.data) as disk:
            out = disk.mount / "out"
            for engine in (Ply(options), PlyErofs(options)):
                engine.load(archive, disk)
                os.rename(engine.root, disk.mount / engine.driver)
                ply = [options.ply, "--root", disk.mount / engine.driver]
                disk.sync()
                note(f"ply save, driver {engine.driver}", measure([*ply, "save", "-o", out, "localhost/many:latest"]), out, disk)
                name = f"ply save --format docker, driver {engine.driver}"
                note(name, measure([*ply, "save", "--format", "docker", "-o", out, "localhost/many:latest"]), out, disk)
                run("rm", "-rf", disk.mount / engine.driver)
            skopeo = Skopeo(options)
            skopeo.load(archive, disk)
            base = disk.mount / "containers"
            copy = ["skopeo", "--policy", base / "policy.json", "--tmpdir", base / "tmp", "copy", "containers-storage:localhost/many:latest"]
            disk.sync()
            note("skopeo copy to oci-archive", measure([*copy, f"oci-archive:{out}"], environment=skopeo.environment), out, disk)
            note("skopeo copy to docker-archive", measure([*copy, f"docker-archive:{out}"], environment=skopeo.environment), out, disk)
            print(f"bench: export {turn + 1}/{options.runs}", file=sys.stderr)
    table(f"export: {options.set}; n={options.runs}", ["", "with sync, s", "peak RSS", "archive"],
          [[name, spread(walls), f"{rss[name] / 1e6:.0f} MB", f"{bytes_out[name] / 1e6:,.0f} MB"] for name, walls in found.items()])
    results["export"] = found


def write_layers(path, count):
    """An OCI archive of small layers that share a directory, named localhost/deep:latest."""
    files, layers, diff_ids = {}, [], []
    for number in range(count):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name, content in [(f"shared/{number}", b"x" * 100), ("last", str(number).encode())]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        layers.append(add_blob(files, buffer.getvalue(), "application/vnd.oci.image.layer.v1.tar"))
        diff_ids.append(layers[-1]["digest"])
    config = add_blob(files, json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {
        "type": "layers", "diff_ids": diff_ids}}).encode(), "application/vnd.oci.image.config.v1+json")
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = add_blob(files, json.dumps({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers}).encode(), kind)
    manifest["annotations"] = {"org.opencontainers.image.ref.name": "latest", "io.containerd.image.name": "localhost/deep:latest"}
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [manifest]}).encode()
    files["oci-layout"] = b'{"imageLayoutVersion":"1.0.0"}'
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def add_blob(files, content, media_type):
    digest = hashlib.sha256(content).hexdigest()
    files[f"blobs/sha256/{digest}"] = content
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}


def bench_mount(options, results):
    with Disk(options.data) as disk:
        archive, at = disk.mount / "deep.tar", disk.mount / "at"
        write_layers(archive, LAYERS_TO_MOUNT)
        at.mkdir()
        ply = [options.ply, "--root", disk.mount / "ply"]
        quiet(*ply, "load", "-i", archive)
        mounts, umounts = [], []
        for _ in range(REPEATS):
            mounts.append(measure([*ply, "mount", "localhost/deep:latest", at]).wall)
            if (at / "last").read_text() != str(LAYERS_TO_MOUNT - 1):
                sys.exit("bench: the mounted tree is not the one that was loaded")
            umounts.append(measure([*ply, "umount", at]).wall)
        floor = [measure([options.ply, "--version"]).wall for _ in range(REPEATS)]
    table(f"mount: {LAYERS_TO_MOUNT} layers; n={REPEATS}", ["", "wall, ms"], [
        ["ply mount", spread(mounts, 1e-3, 1)], ["ply umount", spread(umounts, 1e-3, 1)],
        ["starting ply and nothing else", spread(floor, 1e-3, 1)]])
    results["mount"] = {"mount": mounts, "umount": umounts, "start": floor}


def bench_build(options, results):
    with Disk(options.data) as disk:
        base, context = disk.mount / "base", disk.mount / "context"
        for directory in (base, context):
            directory.mkdir()
        shutil.copy(shutil.which("busybox") or "/bin/busybox", base / "busybox")
        (base / "Dockerfile").write_text(
            "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]\nENV PATH=/bin\n")
        (context / "file").write_text("content\n" * 1000)
        steps = [f"RUN echo {number} > /{number}" if number % 4 else f"COPY file /copy-{number}" for number in range(BUILD_STEPS)]
        (context / "Dockerfile").write_text("\n".join(["FROM localhost/base:latest", *steps, ""]))
        rows = []

        ply = [options.ply, "--root", disk.mount / "ply", "build"]
        quiet(*ply, "-t", "localhost/base:latest", base)
        first = measure([*ply, "-t", "localhost/built", context]).wall
        again = [measure([*ply, "-t", "localhost/built", context]) for _ in range(REPEATS)]
        ours = [run.wall for run in again]
        rows.append(["ply build", f"{first:.2f}", spread(ours, digits=3), spread([run.cpu for run in again], digits=3), "1.0x"])
        results["build"] = {"ply": ours}

        if shutil.which("buildah"):
            state = disk.mount / "containers"
            (state / "tmp").mkdir(parents=True)
            (state / "storage.conf").write_text(
                f'[storage]\ndriver = "overlay"\ngraphroot = "{state}/storage"\nrunroot = "{state}/run"\n')
            environment = {**os.environ, "CONTAINERS_STORAGE_CONF": str(state / "storage.conf"), "TMPDIR": str(state / "tmp")}
            bud = ["buildah", "bud", "--layers", "--isolation", "chroot", "--pull-never"]
            quiet(*bud, "-t", "localhost/base:latest", base, env=environment)
            first = measure([*bud, "-t", "localhost/built", context], environment).wall
            again = [measure([*bud, "-t", "localhost/built", context], environment) for _ in range(5)]
            theirs = [run.wall for run in again]
            rows.append(["buildah bud --layers", f"{first:.2f}", spread(theirs, digits=3), spread([run.cpu for run in again], digits=3),
                         f"{statistics.median(theirs) / statistics.median(ours):.1f}x"])
            results["build"]["buildah"] = theirs
    table(f"build: {BUILD_STEPS} steps, everything cached; n={REPEATS} and 5", ["", "first, s", "again, s", "CPU, s", "ratio"], rows)


def bench_layers(options, results):
    """Everything twice or more, in turn, on a file system of its own; n is the number of turns."""
    made = json.loads((options.data / "many.json").read_text())
    blobs = options.data / "oci" / "many" / "blobs" / "sha256"
    found = {name: [] for name in ("register", "unpack", "export", "release", "remove")}
    rss = {"register": 0, "export": 0}
    for turn in range(options.runs):
        with Disk(options.data) as disk:
            tars = []
            for number, layer in enumerate(made["layers"]):
                tars.append(disk.mount / f"{number}.tar")
                with open(tars[-1], "wb") as tar:
                    run("gzip", "-dc", blobs / layer["blob"].removeprefix("sha256:"), stdout=tar)
            disk.sync()
            ply = [options.ply, "--root", disk.mount / "ply", "-q", "layer"]

            def register():
                chains, spent = [], 0.0
                for tar in tars:
                    parent = ["--parent", chains[-1]] if chains else []
                    run("cat", tar, stdout=subprocess.DEVNULL)
                    done = measure([*ply, "register", *parent, tar])
                    spent += done.wall
                    rss["register"] = max(rss["register"], done.rss_bytes)
                    chains = [*chains, chain_of(tar, chains)]
                found["register"].append(spent + disk.sync())
                return chains

            def unpack():
                spent = 0.0
                for number, tar in enumerate(tars):
                    into = disk.mount / "unpacked" / str(number)
                    into.mkdir(parents=True)
                    run("cat", tar, stdout=subprocess.DEVNULL)
                    spent += measure(["tar", "-C", into, "--xattrs", "--numeric-owner", "-xpf", tar]).wall
                found["unpack"].append(spent + disk.sync())

            chains = register() if turn % 2 == 0 else None
            unpack()
            chains = chains or register()
            spent = 0.0
            for chain in chains:
                quiet(*ply, "export", chain, "-o", "/dev/null")
                done = measure([*ply, "export", chain, "-o", "/dev/null"])
                spent += done.wall
                rss["export"] = max(rss["export"], done.rss_bytes)
            found["export"].append(spent)
            found["release"].append(sum(measure([*ply, "release", chain]).wall for chain in reversed(chains)) + disk.sync())
            found["remove"].append(measure(["rm", "-rf", disk.mount / "unpacked"]).wall + disk.sync())
            if json.loads(quiet(*ply, "ls", "--json")):
                sys.exit("bench: layers are left")
    raw = made["raw_bytes"]
    rate = [raw / seconds / 1e6 for seconds in found["export"]]
    ratio = lambda one, other: f"{statistics.median(found[one]) / statistics.median(found[other]):.2f}x"
    table(f"layers: {len(made['layers'])} plain layers, {made['entries']:,} entries, {raw / 1e6:,.0f} MB; n={options.runs}",
          ["", "with sync, s", "ratio", "peak RSS"], [
              ["ply layer register", spread(found["register"]), ratio("register", "unpack"), f"{rss['register'] / 1e6:.0f} MB"],
              ["tar -x", spread(found["unpack"]), "1", ""],
              ["ply layer release", spread(found["release"]), ratio("release", "remove"), ""],
              ["rm -rf", spread(found["remove"]), "1", ""],
              ["ply layer export", f"{spread(found['export'])}, {spread(rate, digits=0)} MB/s", "", f"{rss['export'] / 1e6:.0f} MB"]])
    results["layers"] = found


class Builders:
    """Plies and buildah, each with a state of its own on one disk and the same base image. podman builds by the same
    library as buildah. A build is measured with the sync of the file system that follows it."""

    def __init__(self, options, disk):
        self.disk, self.rows, self.runs = disk, [], options.runs
        self.all = {"ply build": Builder([options.ply, "--root", disk.mount / "ply", "build"], None)}
        if shutil.which("buildah"):
            state = disk.mount / "containers"
            (state / "tmp").mkdir(parents=True)
            (state / "storage.conf").write_text(
                f'[storage]\ndriver = "overlay"\ngraphroot = "{state}/storage"\nrunroot = "{state}/run"\n')
            environment = {**os.environ, "CONTAINERS_STORAGE_CONF": str(state / "storage.conf"), "TMPDIR": str(state / "tmp")}
            command = ["buildah", "bud", "--layers", "--isolation", "chroot", "--pull-never"]
            self.all["buildah bud --layers"] = Builder(command, environment)
        base = disk.mount / "base"
        base.mkdir()
        shutil.copy(shutil.which("busybox") or "/bin/busybox", base / "busybox")
        (base / "Dockerfile").write_text(
            "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]\nENV PATH=/bin\n")
        for builder in self.all.values():
            builder.build("localhost/base:latest", base)

    def once(self, tag, context):
        for builder in self.all.values():
            builder.build(tag, context)

    def turns(self, tag, context, before=lambda turn: None, build_args=lambda turn: ()):
        """Seconds of each builder's runs, taken in turn."""
        found = {name: [] for name in self.all}
        for turn in range(self.runs):
            before(turn)
            for name, builder in self.all.items():
                wall = builder.build(tag, context, build_args(turn)).wall
                found[name].append(wall + self.disk.sync())
        return found

    def row(self, what, found, digits=0):
        ours = statistics.median(found["ply build"])
        for name, walls in found.items():
            self.rows.append([what, name, spread(walls, 1e-3, digits), f"{statistics.median(walls) / ours:.1f}x"])


def bench_again(options, results):
    """Builds of which nothing changed: a large context of small files, and one of many bytes."""
    with Disk(options.data) as disk:
        builders = Builders(options, disk)
        small = disk.mount / "small"
        for number in range(CONTEXT_FILES):
            directory = small / f"d{number // 100}"
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"f{number}").write_text(f"{number}\n" * (1 + number % 500))
        steps = [f"RUN echo {number} > /{number}" if number % 3 else f"COPY d{number} /d{number}" for number in range(AGAIN_STEPS - 1)]
        (small / "Dockerfile").write_text("\n".join(["FROM localhost/base:latest", *steps, "COPY . /all", ""]))
        (small / ".dockerignore").write_text("Dockerfile\n.dockerignore\n")
        builders.once("localhost/small", small)
        disk.sync()
        found = builders.turns("localhost/small", small)
        builders.row(f"{AGAIN_STEPS} steps, {CONTEXT_FILES:,} files", found)
        results["again: files"] = found

        large = disk.mount / "large"
        (large / "data").mkdir(parents=True)
        for number in range(HASHED_MIB // 8):
            (large / "data" / str(number)).write_bytes(os.urandom(8 << 20))
        (large / "Dockerfile").write_text("FROM localhost/base:latest\nCOPY data /data\n")
        builders.once("localhost/large", large)
        disk.sync()
        found = builders.turns("localhost/large", large)
        builders.row(f"1 step, {HASHED_MIB} MiB in files of 8", found)
        results["again: bytes"] = found
        # What a build costs that hashes nothing.
        nothing = disk.mount / "nothing"
        nothing.mkdir()
        (nothing / "Dockerfile").write_text("FROM localhost/base:latest\nENV A=1\n")
        floor = statistics.median(builders.turns("localhost/nothing", nothing)["ply build"])
        rates = [HASHED_MIB * (1 << 20) / (wall - floor) for wall in found["ply build"]]
        builders.rows.append(["", "of that, ply hashing, GB/s", spread(rates, 1e9), ""])
    table(f"again: nothing changed; n={options.runs}", ["", "", "with sync, ms", "ratio"], builders.rows)


def bench_steps(options, results):
    """Steps that change many files, and steps that change none."""
    with Disk(options.data) as disk:
        alone = bare_crun(disk)
        builders = Builders(options, disk)
        context = disk.mount / "context"
        files = [context / "files" / f"d{number // 100}" / f"f{number}" for number in range(CHANGED_FILES)]
        for number, path in enumerate(files):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{number}\n" * 100)

        def change(turn):
            for path in files:
                with open(path, "a") as file:
                    file.write(f"{turn}\n")
            disk.sync()

        (context / "Dockerfile").write_text("FROM localhost/base:latest\nCOPY files /files\n")
        found = builders.turns("localhost/files:latest", context, change)
        builders.row(f"COPY of {CHANGED_FILES:,} changed files", found)
        results["steps: copy"] = found
        (context / "Dockerfile").write_text(
            "FROM localhost/files:latest\nARG TURN\nRUN find /files -type f | xargs -n 500 sh -c 'for f; do echo $TURN >> $f; done' sh\n")
        found = builders.turns("localhost/ran", context, build_args=lambda turn: ("--build-arg", f"TURN={turn}"))
        builders.row(f"RUN that changes {CHANGED_FILES:,} files", found)
        results["steps: run"] = found

        # The difference of many and one, by the number of the others.
        trivial = disk.mount / "trivial"
        trivial.mkdir()
        walls = {}
        for count in (1, 1 + TRIVIAL_STEPS):
            def change(turn):
                lines = [f"RUN true {turn} {count} {number}" for number in range(count)]
                (trivial / "Dockerfile").write_text("\n".join(["FROM localhost/base:latest", *lines, ""]))
            walls[count] = builders.turns("localhost/trivial", trivial, change)
        few, many = walls.values()
        found = {name: [(b - a) / TRIVIAL_STEPS for a, b in zip(few[name], many[name])] for name in few}
        builders.row("each RUN true", found, digits=1)
        builders.rows.append(["", "crun alone", spread(alone, 1e-3, 1), ""])
        results["steps: trivial"], results["steps: crun"] = found, alone
    table(f"steps: n={options.runs}", ["", "", "with sync, ms", "ratio"], builders.rows)


class Builder:
    """Something that builds Dockerfiles, with a state of its own."""

    def __init__(self, command, environment):
        self.command, self.environment = command, environment

    def build(self, tag, context, more=()):
        with open(Path(context).parent / "log", "w") as log:
            return measure([*self.command, "-t", tag, *more, context], self.environment, log)


def bare_crun(disk):
    """What starting a process by crun and waiting for it takes, in a directory that is there: wall seconds."""
    bundle = disk.mount / "bundle"
    (bundle / "rootfs" / "bin").mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", bundle / "rootfs" / "bin" / "true")
    quiet("crun", "spec", cwd=bundle)
    config = json.loads((bundle / "config.json").read_text())
    config["process"]["args"], config["process"]["terminal"] = ["/bin/true"], False
    config["linux"]["namespaces"] = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
    config["linux"].pop("resources", None)
    config["mounts"] = [mount for mount in config["mounts"] if mount["destination"] in ("/proc", "/dev")]
    (bundle / "config.json").write_text(json.dumps(config))
    # crun refuses to start where cgroup v2 has controllers beside v1; these mounts are nobody else's.
    subprocess.run(["umount", "-l", "/sys/fs/cgroup/unified"], capture_output=True)
    command = ["crun", "--cgroup-manager=disabled", "--root", disk.mount / "crun", "run", "--bundle", bundle]
    return [measure([*command, f"bare-{number}"]).wall for number in range(REPEATS)]


def chain_of(tar, below):
    """The chain ID of a tar on a chain (image-spec, config.md)."""
    with open(tar, "rb") as file:
        diff_id = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    return diff_id if not below else "sha256:" + hashlib.sha256(f"{below[-1]} {diff_id}".encode()).hexdigest()


def bench_list(options, results):
    with Disk(options.data) as disk:
        archive, images = disk.mount / "images.tar", []
        with tarfile.open(archive, "w") as tar:
            def add(name, content):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            for number in range(IMAGES_TO_LIST):
                config = json.dumps({"architecture": "amd64", "os": "linux", "author": str(number), "created": "2024-01-01T00:00:00Z",
                                     "config": {"Env": ["PATH=/bin"] * 20}, "rootfs": {"type": "layers", "diff_ids": []}}).encode()
                add(f"{number}.json", config)
                images.append({"Config": f"{number}.json", "RepoTags": [f"localhost/image-{number}:1"], "Layers": []})
            add("manifest.json", json.dumps(images).encode())
        ply = [options.ply, "--root", disk.mount / "ply"]
        quiet(*ply, "load", "-i", archive)
        if len(json.loads(quiet(*ply, "images", "--json"))) != IMAGES_TO_LIST:
            sys.exit("bench: the list is not whole")
        rows = []
        for name, command in [("ply images", ["images"]), ("ply images --json", ["images", "--json"]), ("ply images -q", ["images", "-q"])]:
            runs = [measure([*ply, *command]) for _ in range(REPEATS)]
            rows.append([name, spread([run.wall for run in runs], 1e-3, 1), f"{max(run.rss_bytes for run in runs) / 1e6:.0f} MB"])
            results[name] = [run.wall for run in runs]
    table(f"list: {IMAGES_TO_LIST:,} images; n={REPEATS}", ["", "wall, ms", "peak RSS"], rows)


SETS = [name + packing for name in ("many", "base", "big") for packing in ("", "-zstd")]
TABLES = {"load": bench_load, "read": bench_read, "remove": bench_remove, "merge": bench_merge, "export": bench_export,
          "mount": bench_mount, "build": bench_build, "again": bench_again, "steps": bench_steps, "layers": bench_layers,
          "list": bench_list}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ply", type=Path, required=True, help="the release binary")
    parser.add_argument("--data", type=Path, default=Path("/var/tmp/plies-bench"), help="where the data is kept between runs")
    parser.add_argument("--runs", type=int, default=5, help="turns of everything that takes long")
    parser.add_argument("--only", default=",".join(TABLES), help="which tables, comma between")
    parser.add_argument("--set", default="many", choices=SETS, help="what is loaded")
    parser.add_argument("--engines", default="ply,plyerofs,containerd,skopeo",
                        help="who takes part in load, comma between, or all: " + ",".join(engine.__name__.lower() for engine in ENGINES))
    parser.add_argument("--no-compare", action="store_true", help="do not compare the trees")
    parser.add_argument("--json", type=Path, help="write every single result here")
    options = parser.parse_args()
    options.ply, options.data = options.ply.resolve(), options.data.resolve()
    every = [engine.__name__.lower() for engine in ENGINES]
    options.engines = every if options.engines == "all" else options.engines.split(",")
    if os.geteuid() != 0:
        sys.exit("bench: needs root: it makes file systems and mounts")
    if "PLIES_BENCH_NAMESPACE" not in os.environ:
        more = {"podman": "podman", "docker": "docker.io", "umoci": "umoci"}
        peers = [package for engine, package in more.items() if engine in options.engines]
        run(REPOSITORY / "scripts" / "install-packages.sh", *peers, "containerd", "skopeo", "pigz", "busybox-static", "buildah", "crun", "e2fsprogs", "util-linux", "zstd")
        run(HERE / "dataset.py", "--dir", options.data, "--set", options.set)
        os.environ["PLIES_BENCH_NAMESPACE"] = "private"
        os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.argv])
    print(f"{os.uname().release}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    results = {}
    for name in options.only.split(","):
        TABLES[name](options, results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
