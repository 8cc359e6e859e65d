//! Fuzz targets: every parser of what comes from outside, and a runner that needs no nightly compiler.
//!
//! A [`Target`] is a function of bytes that must return, whatever they are: a panic, a hang and much memory are findings.
//! Where two answers must agree, it compares them. `cargo fuzz` can call the same functions ([`run`]).
//!
//! [`fuzz`] mutates seeds for a while. A finding is written to a directory, and belongs into `findings/TARGET/` of this
//! crate once it is mended: the tests send all that is there through its target.

mod catalogue;
mod targets;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use targets::TARGETS;

/// No input that is mutated grows beyond this, so that time goes to many inputs.
const INPUT_BYTES_MAX: usize = 64 << 10;

/// An input that takes longer hangs: all are small.
const INPUT_TIME_MAX: Duration = Duration::from_secs(5);

/// One parser.
#[derive(Clone, Copy)]
pub struct Target {
    /// What it is called on the command line.
    pub name: &'static str,
    /// Parses some bytes, and panics if that goes wrong.
    pub run: fn(&[u8]),
    /// Inputs to begin with, sound ones and others.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Makes checksums right again, so that not all mutations die of them.
    pub repair: fn(&mut [u8]),
    /// How many inputs a test run sends: a few seconds' worth.
    pub sample: usize,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("name", &self.name).finish_non_exhaustive()
    }
}

/// When to stop.
#[derive(Debug, Clone, Copy)]
pub enum Until {
    /// After so many inputs.
    Inputs(u64),
    /// After some time.
    Time(Duration),
}

/// Something that a target did not stand.
#[derive(Debug, Clone)]
pub struct Found {
    /// The input.
    pub input: Vec<u8>,
    /// What it did: the panic's message, or how long it took.
    pub what: String,
}

/// Calls a target by its name, as `cargo fuzz` does.
///
/// # Panics
/// When there is no such target, and when it found something.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.unwrap_or_else(|| panic!("no target is called {name}")).run)(data);
}

/// Where inputs are kept that were findings once.
pub fn findings(target: &Target) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("findings").join(target.name);
    let mut paths: Vec<_> = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// Sends mutated seeds through a target until something is found or it is time to stop; how many it were.
///
/// # Errors
/// What was found.
pub fn fuzz(target: &Target, seed: u64, until: Until) -> Result<u64, Found> {
    let mut random = Random(seed.max(1));
    let (seeds, began) = ((target.seeds)(), Instant::now());
    for input in &seeds {
        check(target, input)?;
    }
    let mut count = seeds.len() as u64;
    loop {
        let is_over = match until {
            Until::Inputs(inputs) => count >= inputs,
            Until::Time(time) => began.elapsed() >= time,
        };
        if is_over {
            return Ok(count);
        }
        let mut input = random.pick(&seeds).clone();
        for _ in 0..=random.below(6) {
            mutate(&mut input, &seeds, &mut random);
        }
        input.truncate(INPUT_BYTES_MAX);
        if random.below(4) > 0 {
            (target.repair)(&mut input);
        }
        check(target, &input)?;
        count += 1;
    }
}

fn check(target: &Target, input: &[u8]) -> Result<(), Found> {
    let began = Instant::now();
    let found = |what| Err(Found { input: input.to_vec(), what });
    match catch_unwind(AssertUnwindSafe(|| (target.run)(input))) {
        Ok(()) if began.elapsed() > INPUT_TIME_MAX => found(format!("took {:?}", began.elapsed())),
        Ok(()) => Ok(()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            found(text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default())
        }
    }
}

/// A generator of numbers that looks random enough (Marsaglia's xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % (end.max(1) as u64)).unwrap_or_default()
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

/// Changes an input in one of the ways that parsers stumble over.
fn mutate(input: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) {
    const BYTES: &[u8] = b"\0\x01\x7f\x80\xff 019-+.,=:/\\\"'{}[]$`#\n\r\tax@";
    const NUMBERS: [u64; 8] = [0, 1, 0x7f, 0xffff, 0x7fff_ffff, 0xffff_ffff, i64::MAX as u64, u64::MAX];
    let at = random.below(input.len() + 1);
    let longest = if random.below(4) == 0 { 600 } else { 8 };
    let length = random.below(longest).min(input.len() - at);
    match random.below(9) {
        0 => input.truncate(at),
        1 => drop(input.drain(at..at + length)),
        2 => {
            let part = input[at..at + length].to_vec();
            let to = random.below(input.len() + 1);
            input.splice(to..to, part);
        }
        3 => {
            let other = random.pick(seeds);
            let from = random.below(other.len() + 1);
            let end = (from + random.below(1024)).min(other.len());
            input.splice(at..at + length, other[from..end].iter().copied());
        }
        4 => {
            let byte = *random.pick(BYTES);
            let times = if random.below(8) == 0 { random.below(5_000) } else { random.below(4) + 1 };
            input.splice(at..at, std::iter::repeat_n(byte, times));
        }
        5 => {
            let number = *random.pick(&NUMBERS);
            let text = match random.below(4) {
                0 => number.to_string().into_bytes(),
                1 => format!("{number:o}").into_bytes(),
                2 => number.to_le_bytes()[..1 << random.below(4)].to_vec(),
                _ => number.to_be_bytes().to_vec(),
            };
            let end = (at + text.len()).min(input.len());
            input.splice(at..end, text);
        }
        _ => {
            let byte = if random.below(2) == 0 { *random.pick(BYTES) } else { random.below(256).to_le_bytes()[0] };
            match input.get_mut(at) {
                Some(there) if random.below(3) == 0 => *there ^= 1 << random.below(8),
                Some(there) => *there = byte,
                None => input.push(byte),
            }
        }
    }
}
