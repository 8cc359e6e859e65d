//! Fuzzes for a while: `plies-fuzz [TARGET|all] [SECONDS] [SEED]`. Without a seed it takes another each time, and prints it.

use std::process::ExitCode;
use std::time::Duration;

use plies_fuzz::{TARGETS, Until, fuzz};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let wanted = args.first().map_or("all", String::as_str);
    let number = |at: usize| args.get(at).map(|text| text.parse::<u64>());
    let (Ok(seconds), Ok(seed)) = (number(1).unwrap_or(Ok(60)), number(2).transpose()) else {
        eprintln!("plies-fuzz [TARGET|all] [SECONDS] [SEED]");
        return ExitCode::from(2);
    };
    let targets: Vec<_> = TARGETS.iter().filter(|target| wanted == "all" || target.name == wanted).collect();
    if targets.is_empty() {
        let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
        eprintln!("no target is called {wanted}: there are {}", names.join(", "));
        return ExitCode::from(2);
    }
    let seed = seed.unwrap_or_else(plies_testkit::seed);
    // Panics are what is looked for, and told once.
    std::panic::set_hook(Box::new(|_| {}));
    let mut failures = 0;
    for target in targets {
        match fuzz(target, seed, Until::Time(Duration::from_secs(seconds))) {
            Ok(count) => println!("fuzz {}: {count} inputs, seed {seed}; 0 failures", target.name),
            Err(found) => {
                failures += 1;
                let name = &plies_testkit::sha256_hex(&found.input)[..16];
                let path = std::env::temp_dir().join(format!("plies-fuzz-{}-{name}", target.name));
                let kept = std::fs::write(&path, &found.input);
                println!("fuzz {}: 1 input, seed {seed}; 1 failures", target.name);
                println!("  {}: {} ({kept:?})", path.display(), found.what);
            }
        }
    }
    ExitCode::from(u8::from(failures > 0))
}
