#!/bin/bash
# Runs every check and every test, after installing what they need (Debian; a second run installs
# nothing). Words given are passed on to the test runner: scripts/test.sh crash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/install-packages.sh @scripts/test-packages.txt
cargo nextest --version >/dev/null 2>&1 || cargo install --locked cargo-nextest

step() { printf '\n== %s\n' "$*"; "$@"; }

step cargo fmt --all --check
step cargo clippy --workspace --all-targets --locked -- -D warnings
step cargo test --workspace --doc --locked --quiet
# Its summary comes last: it is the verdict on the tests.
step cargo nextest run --workspace --locked "$@"
