//! Shows what the engine reports: live bars on a terminal, plain lines elsewhere, JSON for programs. Always on standard
//! error.

use std::collections::{HashMap, VecDeque};
use std::io::{IsTerminal as _, Write as _};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use base64::Engine as _;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use jiff::Timestamp;
use plies_engine::progress::{Event, Outcome, Progress, Stream, TaskId};
use serde_json::json;

use crate::format;

/// How often live bars are redrawn.
const TICK: Duration = Duration::from_millis(100);

/// Lines of a command's output that are shown while it runs.
const TAIL_SHOWN_LINES: usize = 6;

/// Lines that are shown of one that failed.
const TAIL_KEPT_LINES: usize = 20;

/// Bytes of a line that are kept for showing.
const LINE_BYTES_MAX: usize = 200;

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
    /// A JSON object for each of these, as BuildKit's SolveStatus.
    Rawjson,
    /// Nothing.
    Quiet,
}

impl Style {
    /// The renderer of this style.
    pub(crate) fn renderer(self) -> Box<dyn Progress + Send> {
        match self {
            Style::Quiet => Box::new(plies_engine::progress::Silent),
            Style::Plain => Box::new(Plain::default()),
            Style::Rawjson => Box::new(RawJson::default()),
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
            Event::Output { bytes, .. } => {
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
            Event::Ended { outcome, .. } => {
                let Some(task) = tasks.remove(&id) else { return };
                if !task.partial.is_empty() {
                    say(task.number, &line_text(&task.partial));
                }
                let took = task.started.elapsed();
                say(
                    task.number,
                    &match outcome {
                        Outcome::Cached => "CACHED".to_owned(),
                        Outcome::Failed => format!("ERROR {}", format::safe(&task.name)),
                        Outcome::Canceled => "CANCELED".to_owned(),
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

/// One JSON object a line, with the field names of BuildKit's `SolveStatus` (client/graph.go).
#[derive(Default)]
struct RawJson {
    tasks: Mutex<(u64, HashMap<TaskId, RawTask>)>,
}

struct RawTask {
    /// What tells the vertex from others: of a build's step the digest of its definition, as in BuildKit.
    digest: String,
    /// The vertices that it stands on.
    inputs: Vec<String>,
    name: String,
    started: String,
    total_bytes: Option<u64>,
    bytes: u64,
}

impl RawTask {
    fn vertex(&self, completed: Option<&str>, outcome: Option<Outcome>, error: Option<&str>) -> serde_json::Value {
        let mut vertex = json!({ "digest": self.digest, "name": self.name, "started": self.started });
        // As BuildKit, without what is empty.
        if !self.inputs.is_empty() {
            vertex["inputs"] = json!(self.inputs);
        }
        if let Some(completed) = completed {
            vertex["completed"] = json!(completed);
        }
        match outcome {
            Some(Outcome::Cached) => vertex["cached"] = json!(true),
            Some(Outcome::Failed) => vertex["error"] = json!(error.unwrap_or("failed")),
            // The text that clients of BuildKit know a cancel by.
            Some(Outcome::Canceled) => vertex["error"] = json!("context canceled"),
            Some(Outcome::Done) | None => {}
        }
        json!({ "vertexes": [vertex] })
    }

    fn status(&self, now: &str, completed: bool) -> serde_json::Value {
        let mut status = json!({
            "id": self.name, "vertex": self.digest, "current": self.bytes, "timestamp": now, "started": self.started,
        });
        if let Some(total) = self.total_bytes {
            status["total"] = json!(total);
        }
        if completed {
            status["completed"] = json!(now);
        }
        json!({ "statuses": [status] })
    }
}

fn digest_of(text: &str) -> plies_oci::BlobDigest {
    let mut sum = plies_oci::Sha256Hasher::default();
    sum.update(text.as_bytes());
    plies_oci::BlobDigest::from_bytes(sum.finish())
}

impl Progress for RawJson {
    fn report(&self, id: TaskId, event: Event<'_>) {
        let mut tasks = self.tasks.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (count, tasks) = &mut *tasks;
        let now = Timestamp::now().to_string();
        let mut lines = Vec::new();
        match event {
            Event::Started { name, total_bytes, vertex } => {
                *count += 1;
                // What is no part of a graph is told apart by its number.
                let digest = vertex.map_or_else(|| digest_of(&format!("{count} {name}")), |vertex| vertex.digest);
                let inputs = vertex.map_or(&[][..], |vertex| vertex.inputs);
                let (digest, inputs) = (digest.to_string(), inputs.iter().map(ToString::to_string).collect());
                let task = RawTask { digest, inputs, name: name.to_owned(), started: now, total_bytes, bytes: 0 };
                lines.push(task.vertex(None, None, None));
                tasks.insert(id, task);
            }
            Event::Advanced { bytes } => {
                if let Some(task) = tasks.get_mut(&id) {
                    task.bytes += bytes;
                    lines.push(task.status(&now, false));
                }
            }
            Event::Output { stream, bytes } => {
                if let Some(task) = tasks.get(&id) {
                    let stream = match stream {
                        Stream::Stdout => 1,
                        Stream::Stderr => 2,
                    };
                    let data = base64::engine::general_purpose::STANDARD.encode(bytes);
                    lines.push(json!({
                        "logs": [{ "vertex": task.digest, "stream": stream, "data": data, "timestamp": now }],
                    }));
                }
            }
            Event::Ended { outcome, error } => {
                let Some(task) = tasks.remove(&id) else { return };
                if task.bytes > 0 {
                    lines.push(task.status(&now, true));
                }
                lines.push(task.vertex(Some(&now), Some(outcome), error));
            }
        }
        let mut out = std::io::stderr().lock();
        for line in lines {
            drop(writeln!(out, "{line}"));
        }
    }
}

/// Bars that move, with the last lines of what a running command writes below. Finished tasks scroll away upwards.
struct Live {
    screen: MultiProgress,
    bars: Mutex<HashMap<TaskId, LiveTask>>,
}

struct LiveTask {
    bar: ProgressBar,
    name: String,
    started: Instant,
    bytes: u64,
    /// The last lines that its command wrote; the newest may not have ended yet.
    tail: VecDeque<Vec<u8>>,
}

impl LiveTask {
    fn take(&mut self, bytes: &[u8]) {
        for (index, part) in bytes.split(|byte| *byte == b'\n').enumerate() {
            if index > 0 || self.tail.is_empty() {
                self.tail.push_back(Vec::new());
            }
            let line = self.tail.back_mut().expect("because there is one by now");
            // A line that never ends is shown by its beginning.
            line.extend_from_slice(&part[..part.len().min(LINE_BYTES_MAX.saturating_sub(line.len()))]);
            if self.tail.len() > TAIL_KEPT_LINES {
                self.tail.pop_front();
            }
        }
    }

    /// The last lines that are not empty, for people.
    fn lines(&self, count: usize) -> Vec<String> {
        let lines = self.tail.iter().filter(|line| !line.is_empty());
        let lines: Vec<String> = lines.map(|line| format!("  │ {}", line_text(line))).collect();
        lines[lines.len().saturating_sub(count)..].to_vec()
    }
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
            Event::Started { name, total_bytes, .. } => {
                let bar = match total_bytes {
                    Some(total) => ProgressBar::new(total).with_style(style(
                        "{spinner} {msg:45!} [{bar:24}] {decimal_bytes:>9}/{decimal_total_bytes:9} {decimal_bytes_per_sec}",
                    )),
                    None => ProgressBar::new_spinner().with_style(style("{spinner} {msg} {elapsed}")),
                };
                let bar = self.screen.add(bar);
                bar.set_message(format::safe(name));
                bar.enable_steady_tick(TICK);
                let (name, started) = (name.to_owned(), Instant::now());
                bars.insert(id, LiveTask { bar, name, started, bytes: 0, tail: VecDeque::new() });
            }
            Event::Advanced { bytes } => {
                if let Some(task) = bars.get_mut(&id) {
                    task.bytes += bytes;
                    task.bar.inc(bytes);
                }
            }
            Event::Output { bytes, .. } => {
                if let Some(task) = bars.get_mut(&id) {
                    task.take(bytes);
                    let shown = task.lines(TAIL_SHOWN_LINES);
                    if !shown.is_empty() {
                        task.bar.set_style(style("{spinner} {msg} {elapsed}\n{prefix}"));
                        task.bar.set_prefix(shown.join("\n"));
                    }
                }
            }
            Event::Ended { outcome, .. } => {
                let Some(task) = bars.remove(&id) else { return };
                let (name, took) = (format::safe(&task.name), task.started.elapsed());
                let seconds = took.as_secs_f32();
                let mark = match outcome {
                    Outcome::Done => format!("✓ {name}  {seconds:.1}s{}", rate(task.bytes, took)),
                    Outcome::Cached => format!("= {name}  cached"),
                    Outcome::Failed => format!("✗ {name}  {seconds:.1}s"),
                    Outcome::Canceled => format!("- {name}  canceled"),
                };
                task.bar.finish_and_clear();
                self.screen.remove(&task.bar);
                drop(self.screen.println(mark));
                // Why it failed stands there, mostly.
                if outcome == Outcome::Failed {
                    task.lines(TAIL_KEPT_LINES).into_iter().for_each(|line| drop(self.screen.println(line)));
                }
            }
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("because the template is a constant").progress_chars("=> ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_the_last_lines_however_they_come() {
        let mut task = LiveTask {
            bar: ProgressBar::hidden(),
            name: String::new(),
            started: Instant::now(),
            bytes: 0,
            tail: VecDeque::new(),
        };
        task.take(b"one\ntw");
        task.take(b"o\n\nthree\n");
        assert_eq!(task.lines(9), ["  │ one", "  │ two", "  │ three"]);
        assert_eq!(task.lines(1), ["  │ three"]);
        for number in 0..1000 {
            task.take(format!("{number}\n").as_bytes());
        }
        task.take(&[b'x'; 5000]);
        assert_eq!(task.lines(2)[0], "  │ 999");
        assert_eq!(task.lines(1)[0].chars().filter(|c| *c == 'x').count(), LINE_BYTES_MAX);
        assert!(task.tail.len() <= TAIL_KEPT_LINES);
    }
}
