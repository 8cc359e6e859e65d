#!/bin/bash
# Runs the tests of the store and the cache with many threads under ThreadSanitizer, and prints their lines for the table of
# scripts/chaos.sh. Wants the sources of the standard library (rustup component add rust-src), which is compiled for it as well:
# it would not see the library's own locks otherwise, and take what they guard for unguarded. RUSTC names another compiler,
# as for cargo. Words given are passed on to the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

rustc=${RUSTC:-rustc}
sources=$("$rustc" --print sysroot)/lib/rustlib/src/rust/library/Cargo.lock
if [ ! -e "$sources" ]; then
    echo "NOT CHECKED: ThreadSanitizer, for want of the standard library's sources (rustup component add rust-src)"
    exit 0
fi
# The sanitizer is behind a flag that stable compilers take from those who say that they know.
export RUSTC_BOOTSTRAP=1
export RUSTFLAGS="-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer"
export TSAN_OPTIONS="suppressions=$PWD/scripts/tsan.supp ${TSAN_OPTIONS:-}"
host=$("$rustc" -vV | sed -n 's/^host: //p')
build=(cargo test -Zbuild-std --target "$host" --target-dir "${CARGO_TARGET_DIR:-target}/tsan")
status=0
for tests in "plies-store --lib" "plies-cache --test stress" "plies-cache --test model" "plies-cache --test lazy"; do
    # A race ends a run with a status of its own, whatever the tests say.
    # shellcheck disable=SC2086
    if "${build[@]}" -p $tests -- "$@"; then failures=0; else failures=1 status=1; fi
    echo "thread sanitizer, $tests: 1 run; $failures failures"
done
exit "$status"
