# Everything a developer runs. `scripts/test.sh` is the same as `just check` without the licences and
# then `just test`, and installs what they need.

# Formatting, lints, docs, licences and advisories.
check:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items
    @if command -v cargo-deny >/dev/null; then just deny; else echo "NOT CHECKED: licences and advisories, for want of cargo-deny (cargo install cargo-deny)"; fi

# What comes in from outside: licences, bans, sources, and advisories if their list can be fetched.
deny:
    cargo deny check licenses bans sources
    @if cargo deny fetch; then cargo deny check advisories; else echo "NOT CHECKED: advisories, for want of their list"; fi

# All tests. FILTER as cargo-nextest takes it.
test *FILTER:
    cargo nextest run --workspace {{FILTER}}
    cargo test --workspace --doc --quiet

# The tests that mount, chown and make devices, as root, failing where something is missing.
test-privileged *FILTER:
    CI=true cargo nextest run --workspace -E 'test(/privileged_/) or binary(e2e)' {{FILTER}}

# Compares cached builds with clean ones after random edits, others and more of them than every test run does.
edits COUNT="100000" SEED="1":
    PLIES_EDITS={{COUNT}} PROPTEST_RNG_SEED={{SEED}} cargo test --release -p plies-engine --test edits

# The long versions of what every test run does in short: as root, with other seeds each time; one table at the end.
chaos *FILTER:
    scripts/chaos.sh {{FILTER}}

# The tests with many threads under ThreadSanitizer: it wants the standard library's sources (rustup component add rust-src).
tsan *ARGS:
    scripts/tsan.sh {{ARGS}}

# Fuzzes every target for so many seconds, each with another seed every time: just fuzz 3600
fuzz SECONDS="60" TARGET="all":
    cargo run --release -p plies-fuzz -- {{TARGET}} {{SECONDS}}

# Compares with other engines, as root: just bench --help
bench *OPTIONS:
    cargo build --release --bin ply
    bench/run.py --ply target/release/ply {{OPTIONS}}

# What records and rows cost, by their number, beside BuildKit's figures: just bench-records 1000 1000000
bench-records *RECORDS:
    cargo bench -p plies-cache --bench records -- {{RECORDS}}
    cargo bench -p plies-cache --bench space -- {{RECORDS}}
    cargo bench -p plies-store --bench scale -- {{RECORDS}}

# Requests of every kind in one process for so many seconds, as root; fails if what they take grows: just soak 600
soak SECONDS="3600":
    cargo bench -p plies-engine --bench soak -- {{SECONDS}}

fmt:
    cargo fmt --all
