//! Progress on stderr: live lines on a terminal, plain lines elsewhere, JSON lines on request.
//!
//! A *track* is what a line stands for: the cluster, or one machine. Each is in one step at a time. The reporter also
//! keeps how long each step took, for `--timings`.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use owo_colors::OwoColorize as _;
use serde::Serialize;

use crate::cli::{Global, Progress};

/// How long one step of one track took.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Timing {
    /// The cluster (empty) or a machine.
    pub track: String,
    /// The step.
    pub step: String,
    /// When it began, in seconds after the command.
    pub start_seconds: f64,
    /// How long it took, in seconds.
    pub seconds: f64,
}

/// Reports progress; clones share one state.
#[derive(Clone)]
pub(crate) struct Reporter(Arc<Inner>);

struct Inner {
    mode: Mode,
    start: Instant,
    state: Mutex<State>,
}

enum Mode {
    Silent,
    Plain,
    Json,
    Live(MultiProgress),
}

#[derive(Default)]
struct State {
    tracks: BTreeMap<String, Track>,
    timings: Vec<Timing>,
}

struct Track {
    step: String,
    since: Instant,
    bar: Option<ProgressBar>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Event<'a> {
    schema_version: u32,
    #[serde(rename = "event")]
    what: &'a str,
    track: &'a str,
    step: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<&'a str>,
    elapsed_seconds: f64,
}

impl Reporter {
    /// A reporter as the options ask for.
    pub(crate) fn new(global: &Global) -> Self {
        let live = std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|t| t != "dumb");
        let mode = match (global.no_progress, global.progress) {
            (true, _) | (_, Progress::None) => Mode::Silent,
            (_, Progress::Json) => Mode::Json,
            (_, Progress::Auto) if live => Mode::Live(MultiProgress::new()),
            (_, Progress::Plain | Progress::Auto) => Mode::Plain,
        };
        Self(Arc::new(Inner {
            mode,
            start: Instant::now(),
            state: Mutex::default(),
        }))
    }

    /// Time since the command began.
    pub(crate) fn elapsed(&self) -> Duration {
        self.0.start.elapsed()
    }

    /// The track enters a step; the one it was in is done.
    pub(crate) fn step(&self, track: &str, step: &str) {
        let mut state = self.lock();
        if state.tracks.get(track).is_some_and(|t| t.step == step) {
            return;
        }
        self.close(&mut state, track);
        let bar = self.bar(track, step);
        state.tracks.insert(
            track.to_owned(),
            Track {
                step: step.to_owned(),
                since: Instant::now(),
                bar,
            },
        );
        self.emit("started", track, step, None);
    }

    /// More about the step the track is in: what it waits for.
    pub(crate) fn message(&self, track: &str, message: &str) {
        let state = self.lock();
        let Some(t) = state.tracks.get(track) else { return };
        match &t.bar {
            Some(bar) => bar.set_message(format!("{}: {message}", t.step)),
            None => self.emit("message", track, &t.step, Some(message)),
        }
    }

    /// The track's step is done, and none follows.
    pub(crate) fn done(&self, track: &str) {
        let mut state = self.lock();
        self.close(&mut state, track);
        state.tracks.remove(track);
    }

    /// Everything is over, well or not: live lines vanish, so that what follows stands alone.
    pub(crate) fn finish(&self) {
        let mut state = self.lock();
        let tracks: Vec<_> = state.tracks.keys().cloned().collect();
        for track in tracks {
            if let Some(bar) = state.tracks.remove(&track).and_then(|t| t.bar) {
                bar.finish_and_clear();
            }
        }
    }

    /// A line for a person, beside the progress (a warning, say).
    pub(crate) fn note(&self, text: &str) {
        match &self.0.mode {
            Mode::Silent => {}
            Mode::Json => self.emit("note", "", "", Some(text)),
            Mode::Plain => {
                let _ = writeln!(anstream::stderr(), "{text}");
            }
            Mode::Live(multi) => {
                let _ = multi.println(text);
            }
        }
    }

    /// What each finished step took, in the order in which they began.
    pub(crate) fn timings(&self) -> Vec<Timing> {
        let mut timings = self.lock().timings.clone();
        timings.sort_by(|a, b| a.start_seconds.total_cmp(&b.start_seconds));
        timings
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, state: &mut State, track: &str) {
        let Some(Track { step, since, bar }) = state.tracks.remove(track) else {
            return;
        };
        let took = since.elapsed();
        state.timings.push(Timing {
            track: track.to_owned(),
            step: step.clone(),
            start_seconds: since.duration_since(self.0.start).as_secs_f64(),
            seconds: took.as_secs_f64(),
        });
        if let Some(bar) = bar {
            bar.finish_and_clear();
            if let Mode::Live(multi) = &self.0.mode {
                let line = format!(
                    "{} {} {}",
                    "✔".green(),
                    label(track, &step),
                    format!("{:.1} s", took.as_secs_f64()).dimmed()
                );
                let _ = multi.println(line);
            }
        }
        self.emit("finished", track, &step, None);
    }

    fn bar(&self, track: &str, step: &str) -> Option<ProgressBar> {
        let Mode::Live(multi) = &self.0.mode else { return None };
        let bar = multi.add(ProgressBar::new_spinner());
        let style = ProgressStyle::with_template("{spinner:.cyan} {prefix} {msg} {elapsed:.dim}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
        bar.set_prefix(if track.is_empty() {
            String::new()
        } else {
            format!("{track:<16}")
        });
        bar.set_message(step.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        Some(bar)
    }

    fn emit(&self, event: &str, track: &str, step: &str, message: Option<&str>) {
        let elapsed = self.elapsed().as_secs_f64();
        match &self.0.mode {
            Mode::Silent | Mode::Live(_) => {}
            Mode::Plain => {
                let text = match (event, message) {
                    (_, Some(message)) => format!("{}: {message}", label(track, step)),
                    ("finished", None) => format!("{}: done", label(track, step)),
                    _ => label(track, step),
                };
                let _ = writeln!(anstream::stderr(), "[{elapsed:7.1} s] {text}");
            }
            Mode::Json => {
                let event = Event {
                    schema_version: 1,
                    what: event,
                    track,
                    step,
                    message,
                    elapsed_seconds: elapsed,
                };
                if let Ok(line) = serde_json::to_string(&event) {
                    let _ = writeln!(std::io::stderr(), "{line}");
                }
            }
        }
    }
}

fn label(track: &str, step: &str) -> String {
    if track.is_empty() {
        step.to_owned()
    } else {
        format!("{track}: {step}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_follow_each_other_and_are_timed() {
        let global = Global {
            progress: Progress::None,
            no_progress: false,
            verbose: 0,
            home: None,
        };
        let reporter = Reporter::new(&global);
        reporter.step("", "network");
        reporter.step("", "network");
        reporter.step("", "machines");
        reporter.step("m", "booting");
        reporter.done("");
        let steps: Vec<_> = reporter.timings().into_iter().map(|t| (t.track, t.step)).collect();
        assert_eq!(
            steps,
            [
                (String::new(), "network".into()),
                (String::new(), "machines".to_owned())
            ]
        );
    }
}
