#!/bin/bash
# Runs the long versions of the tests that try what goes wrong, and prints one table: what was tried, how often, with how
# many failures. The tests print their own lines, `NAME: COUNT THINGS[, …]; FAILURES failures`, in any order. A line of the
# kind PLIES_SEED=… says how a run that failed can be had again. Words given are passed on to the test runner.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

log=$(mktemp)
trap 'rm -f "$log"' EXIT
filter='binary(hostile) or test(mutated_archives_mean_the_same) or test(fuzz_) or binary(power) or binary(interleavings)
    or test(/^catalogue::batch::power::/) or test(/^script::/)'
CI=true PLIES_CHAOS=1 cargo nextest run --workspace --cargo-profile chaos --profile chaos --no-fail-fast --success-output final \
    -E "$filter" "$@" 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
scripts/tsan.sh 2>&1 | tee -a "$log"
[ "${PIPESTATUS[0]}" = 0 ] || status=1

printf '\n%-60s %-50s %s\n' tests points failures
sed -nE 's/^ *([a-z][^:]*): ([0-9].*); ([0-9]+) failures$/\1\t\2\t\3/p' "$log" | sort -u |
    while IFS=$'\t' read -r tests points failures; do printf '%-60s %-50s %s\n' "$tests" "$points" "$failures"; done
printf '\nThe slowest refusals, beside 100 ms for each MiB and 64 MiB of memory\n'
sed -nE 's/^ *cost of refusal: //p' "$log" | awk '!seen[$0]++'
grep -aE '^ *(FAIL|TIMEOUT|SIGNAL)|^NOT CHECKED' "$log" | sort -u
exit "$status"
