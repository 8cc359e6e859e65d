//! A little of the fuzzing in every test run, with another seed each time; and all that was ever found.

use plies_fuzz::{TARGETS, Target, Until, findings, fuzz, run};

fn sample(name: &str) {
    let target: &Target = TARGETS.iter().find(|target| target.name == name).expect("because it is in the list");
    for path in findings(target) {
        println!("{}", path.display());
        run(name, &std::fs::read(&path).expect("because it was just listed"));
    }
    let seed = plies_testkit::seed();
    match fuzz(target, seed, Until::Inputs(plies_testkit::rounds(target.sample) as u64)) {
        Ok(count) => println!("fuzz {name}, seed {seed}: {count} inputs; 0 failures"),
        Err(found) => panic!(
            "seed {seed}: {}: {} bytes: {}",
            found.what,
            found.input.len(),
            found.input[..found.input.len().min(4_096)].escape_ascii()
        ),
    }
}

macro_rules! samples {
    ($($test:ident: $name:literal,)*) => {
        $(#[test]
        fn $test() {
            sample($name);
        })*

        #[test]
        fn every_target_has_a_sample() {
            assert_eq!(TARGETS.iter().map(|target| target.name).collect::<Vec<_>>(), [$($name),*]);
        }
    };
}

samples! {
    fuzz_tar: "tar",
    fuzz_pax: "pax",
    fuzz_sparse: "sparse",
    fuzz_compression: "compression",
    fuzz_tar_split: "tar-split",
    fuzz_manifest: "manifest",
    fuzz_index: "index",
    fuzz_config: "config",
    fuzz_reference: "reference",
    fuzz_digest: "digest",
    fuzz_dockerfile: "dockerfile",
    fuzz_words: "words",
    fuzz_ignore: "ignore",
    fuzz_filters: "filters",
    fuzz_bolt: "bolt",
    fuzz_rows: "rows",
    fuzz_catalogue: "catalogue",
}

#[test]
fn what_panics_or_hangs_is_found() {
    fn seeds() -> Vec<Vec<u8>> {
        vec![b"some seed".to_vec()]
    }
    fn nothing(_: &mut [u8]) {}
    fn panics(data: &[u8]) {
        assert!(!data.contains(&b'{'), "a brace");
    }
    let target = Target { name: "itself", run: panics, seeds, repair: nothing, sample: 1 };
    let found = fuzz(&target, 1, Until::Inputs(100_000)).expect_err("a brace is among what is put in");
    assert!(found.input.contains(&b'{') && found.what.contains("a brace"));
}
