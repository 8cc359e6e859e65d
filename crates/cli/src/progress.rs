//! Shows what the engine reports: live bars on a terminal, plain lines elsewhere. Always on standard error.

use std::collections::HashMap;
use std::io::{IsTerminal as _, Write as _};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use plies_engine::progress::{Event, Outcome, Progress, TaskId};

use crate::format;

/// How often live bars are redrawn.
const TICK: Duration = Duration::from_millis(100);

/// `--progress`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Style {
    /// Live on a terminal, plain elsewhere.
    #[default]
    Auto,
    /// Live bars.
    Tty,
    /// A line when a task begins, ends or writes something.
    Plain,
    /// Nothing.
    Quiet,
}

impl Style {
    /// The renderer of this style.
    pub(crate) fn renderer(self) -> Box<dyn Progress> {
        match self {
            Style::Quiet => Box::new(plies_engine::progress::Silent),
            Style::Plain => Box::new(Plain::default()),
            Style::Tty => Box::new(Live::default()),
            Style::Auto if std::io::stderr().is_terminal() => Box::new(Live::default()),
            Style::Auto => Box::new(Plain::default()),
        }
    }
}

struct PlainTask {
    number: u64,
    name: String,
    started: Instant,
    bytes: u64,
    /// The beginning of an output line whose end has not come yet.
    partial: Vec<u8>,
}

/// One line an event. Task numbers tell interleaved output apart, as `docker build --progress=plain` does.
#[derive(Default)]
struct Plain {
    tasks: Mutex<(u64, HashMap<TaskId, PlainTask>)>,
}

impl Progress for Plain {
    fn report(&self, id: TaskId, event: Event<'_>) {
        let mut tasks = self.tasks.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (count, tasks) = &mut *tasks;
        let mut out = std::io::stderr().lock();
        // Progress that cannot be written is no reason to fail the work.
        let mut say = |number: u64, text: &str| drop(writeln!(out, "#{number} {text}"));
        match event {
            Event::Started { name, .. } => {
                *count += 1;
                say(*count, &format::safe(name));
                let task =
                    PlainTask { number: *count, name: name.into(), started: Instant::now(), bytes: 0, partial: vec![] };
                tasks.insert(id, task);
            }
            Event::Advanced { bytes } => {
                if let Some(task) = tasks.get_mut(&id) {
                    task.bytes += bytes;
                }
            }
            Event::Output { bytes } => {
                if let Some(task) = tasks.get_mut(&id) {
                    let seconds = task.started.elapsed().as_secs_f32();
                    let mut rest = bytes;
                    while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                        task.partial.extend_from_slice(&rest[..end]);
                        say(task.number, &format!("{seconds:.3} {}", line_text(&task.partial)));
                        task.partial.clear();
                        rest = &rest[end + 1..];
                    }
                    task.partial.extend_from_slice(rest);
                }
            }
            Event::Ended { outcome } => {
                let Some(task) = tasks.remove(&id) else { return };
                if !task.partial.is_empty() {
                    say(task.number, &line_text(&task.partial));
                }
                let took = task.started.elapsed();
                say(
                    task.number,
                    &match outcome {
                        Outcome::Cached => "CACHED".to_owned(),
                        Outcome::Failed => format!("FAILED {}", format::safe(&task.name)),
                        Outcome::Done => format!("DONE {:.1}s{}", took.as_secs_f32(), rate(task.bytes, took)),
                    },
                );
            }
        }
    }
}

fn line_text(bytes: &[u8]) -> String {
    format::safe(String::from_utf8_lossy(bytes).trim_end_matches(['\n', '\r']))
}

fn rate(bytes: u64, took: Duration) -> String {
    if bytes == 0 {
        return String::new();
    }
    let per_second = bytes as f64 / took.as_secs_f64().max(0.001);
    format!(", {} at {}/s", format::size(bytes), format::size(per_second as u64))
}

/// Bars that move. Finished tasks scroll away upwards as plain lines.
struct Live {
    screen: MultiProgress,
    bars: Mutex<HashMap<TaskId, (ProgressBar, String, Instant)>>,
}

impl Default for Live {
    fn default() -> Self {
        Self { screen: MultiProgress::new(), bars: Mutex::default() }
    }
}

impl Progress for Live {
    fn report(&self, id: TaskId, event: Event<'_>) {
        let mut bars = self.bars.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match event {
            Event::Started { name, total_bytes } => {
                let bar = match total_bytes {
                    Some(total) => ProgressBar::new(total).with_style(style(
                        "{spinner} {msg:45!} [{bar:24}] {decimal_bytes:>9}/{decimal_total_bytes:9} {decimal_bytes_per_sec}",
                    )),
                    None => ProgressBar::new_spinner().with_style(style("{spinner} {msg} {elapsed}")),
                };
                let bar = self.screen.add(bar);
                bar.set_message(format::safe(name));
                bar.enable_steady_tick(TICK);
                bars.insert(id, (bar, name.to_owned(), Instant::now()));
            }
            Event::Advanced { bytes } => {
                if let Some((bar, ..)) = bars.get(&id) {
                    bar.inc(bytes);
                }
            }
            Event::Output { bytes } => {
                for line in bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                    drop(self.screen.println(format!("  │ {}", line_text(line))));
                }
            }
            Event::Ended { outcome } => {
                let Some((bar, name, started)) = bars.remove(&id) else { return };
                let mark = match outcome {
                    Outcome::Done => format!("✓ {}  {:.1}s", format::safe(&name), started.elapsed().as_secs_f32()),
                    Outcome::Cached => format!("= {}  cached", format::safe(&name)),
                    Outcome::Failed => format!("✗ {}", format::safe(&name)),
                };
                bar.finish_and_clear();
                self.screen.remove(&bar);
                drop(self.screen.println(mark));
            }
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("because the template is a constant").progress_chars("=> ")
}
