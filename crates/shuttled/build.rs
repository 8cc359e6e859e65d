//! Has the crate next door take its locks and threads from shuttle: see its `sync.rs`.

fn main() {
    println!("cargo::rustc-cfg=shuttle");
    println!("cargo::rerun-if-changed=build.rs");
}
