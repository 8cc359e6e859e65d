#!/bin/bash
# Builds Plies, makes a base image, builds a Dockerfile twice, looks around and saves the image.
#
#   scripts/quickstart.sh [FILE]     the image is saved as FILE, else as greeter.oci.tar right here
#
# Runs from any directory, on Debian, as root (for overlay mounts). The store is a temporary one,
# gone at the end, unless PLY_ROOT names one to keep.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
image=$(realpath -m "${1:-greeter.oci.tar}")

"$repo/scripts/install-packages.sh" busybox-static crun gcc
command -v cargo >/dev/null || { echo "Plies is built with Rust 1.95 or newer: no cargo in PATH" >&2; exit 1; }

bold= plain=
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then bold=$'\033[1m' plain=$'\033[0m'; fi
say() { printf '\n%s$ %s%s\n' "$bold" "$*" "$plain"; "$@"; }

(cd "$repo" && say cargo build --release --locked --bin ply)
target=${CARGO_TARGET_DIR:-$repo/target}
PATH=$target/release:$PATH

# On a disk: overlay cannot keep its layers in memory or on another overlay.
work=$(mktemp -d /var/tmp/plies-quickstart.XXXXXX)
trap 'rm -rf "$work"' EXIT
export PLY_ROOT=${PLY_ROOT:-$work/root}

cp -r "$repo/examples/quickstart" "$work/context"
cp "$(command -v busybox || echo /bin/busybox)" "$work/context/base/busybox"
cd "$work/context"

say ply build -t busybox:latest base
say ply build -t greeter:latest .
say ply build -t greeter:latest .    # the same again: every step comes from the cache

say ply images
say ply du
say ply tree
say ply save -o "$image" greeter:latest
ls -lh "$image"
