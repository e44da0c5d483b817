//! `-profile_steps a:b`: a trace of steps a to b, with the host's phases and libtorch's operators and kernels.
//!
//! ```text
//! save/<name>/profile-<a>-<b>.json   for https://ui.perfetto.dev, or chrome://tracing
//! ```
//! The spans are libtorch's own annotations ([`moeut_torch::profiler::Span`]), so that one recorder writes everything
//! with one clock. A step's span goes from its beginning to that of the next step; its phases follow one another in it.

mod trace;

use crate::train::timing::Phase;
use moeut_plugin_api::PluginError;
use moeut_torch::OrPluginError;
use moeut_torch::profiler::{self, Profiler, Span};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use tch::{Cuda, Device};
use trace::Trace;

/// Operators and kernels in the table at the end.
const N_ROWS: usize = 15;

/// What `-profile_steps` takes.
pub const EXPECTATION: &str = "a first and a last step, as in `10:12`";

/// Steps to record, both included; step 1 is the first of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Steps {
    first: u64,
    last: u64,
}

impl TryFrom<String> for Steps {
    type Error = String;

    fn try_from(raw: String) -> Result<Self, String> {
        let ends = raw.split_once(':').and_then(|(first, last)| {
            let number = |text: &str| text.trim().parse::<u64>().ok();
            Some((number(first)?, number(last)?))
        });
        match ends {
            Some((first, last)) if 1 <= first && first <= last => Ok(Self { first, last }),
            _ => Err(EXPECTATION.to_owned()),
        }
    }
}

/// A profile of a run: waits for its steps, records them, and writes them down.
pub struct Profile {
    steps: Steps,
    device: Device,
    folder: PathBuf,
    state: State,
}

enum State {
    Waiting { is_ready: bool },
    Recording(Recording),
    Done,
}

/// Spans end before what holds them, and all before the recorder: in the order of the fields.
struct Recording {
    phase: Option<Span>,
    step: Option<Span>,
    profiler: Profiler,
    first: u64,
    last: u64,
}

impl Profile {
    /// A profile that goes to a file in `folder`.
    pub fn new(steps: Steps, device: Device, folder: &Path) -> Self {
        Self {
            steps,
            device,
            folder: folder.to_owned(),
            state: State::Waiting { is_ready: false },
        }
    }

    /// Begins a step. Returns what there is to say, if the steps to record are over.
    ///
    /// # Errors
    /// If libtorch refuses to record, or the file cannot be written. The profile is over then, and training is not.
    pub fn begin_step(&mut self, step: u64) -> Result<Option<String>, PluginError> {
        let mut said = None;
        if step > self.steps.last {
            said = self.finish()?;
        }
        match &mut self.state {
            State::Recording(recording) => {
                (recording.phase, recording.step) = (None, None);
                recording.step = Some(Span::begin(&format!("step {step}")));
                recording.last = step;
            }
            State::Waiting { is_ready } if step + 1 >= self.steps.first => {
                // The step before is the recorder's warm-up.
                if !*is_ready {
                    self.state = State::Done;
                    profiler::prepare(self.device).or_plugin_error(REFUSED)?;
                    self.state = State::Waiting { is_ready: true };
                }
                if step >= self.steps.first {
                    self.state = State::Done;
                    self.synchronize();
                    let profiler = Profiler::start(self.device).or_plugin_error(REFUSED)?;
                    self.state = State::Recording(Recording {
                        phase: None,
                        step: Some(Span::begin(&format!("step {step}"))),
                        profiler,
                        first: step,
                        last: step,
                    });
                }
            }
            State::Waiting { .. } | State::Done => {}
        }
        Ok(said)
    }

    /// Ends the phase of the host before, and begins another.
    pub fn enter(&mut self, phase: Phase) {
        if let State::Recording(recording) = &mut self.state {
            recording.phase = None;
            recording.phase = Some(Span::begin(phase.name()));
        }
    }

    /// Ends the recording, and returns where it is and which operators took longest.
    ///
    /// # Errors
    /// If the file cannot be written or read back.
    pub fn finish(&mut self) -> Result<Option<String>, PluginError> {
        let Steps { first, last } = self.steps;
        match std::mem::replace(&mut self.state, State::Done) {
            State::Done => Ok(None),
            State::Waiting { .. } => Ok(Some(format!(
                "`-profile_steps {first}:{last}` has no effect: none of these steps was made"
            ))),
            State::Recording(recording) => self.write(recording).map(Some),
        }
    }

    fn write(&self, recording: Recording) -> Result<String, PluginError> {
        let Recording {
            phase,
            step,
            profiler,
            first,
            last,
        } = recording;
        self.synchronize();
        drop(phase);
        drop(step);
        let path = self.folder.join(format!("profile-{first}-{last}.json"));
        let beside = path.with_extension("json.tmp");
        let fail = |error: std::io::Error| cannot_write(&path, &error.to_string());
        let stopped = profiler.stop(&beside);
        stopped.map_err(|error| cannot_write(&path, &moeut_torch::one_line(&error)))?;
        let trace = Trace::read(&beside).map_err(fail)?;
        std::fs::File::open(&beside)
            .and_then(|file| file.sync_all())
            .and_then(|()| std::fs::rename(&beside, &path))
            .map_err(fail)?;
        Ok(format!(
            "profile of steps {first} to {last}: `{}`, for https://ui.perfetto.dev\n{}",
            path.display(),
            trace.summary(N_ROWS, self.device.is_cuda())
        ))
    }

    /// So that kernels of the steps before are not in the recording, and those of the last one are.
    fn synchronize(&self) {
        if let Device::Cuda(index) = self.device {
            Cuda::synchronize(i64::try_from(index).unwrap_or(-1));
        }
    }
}

const REFUSED: &str = "libtorch does not record a profile";

fn cannot_write(path: &Path, why: &str) -> PluginError {
    PluginError::new(format!(
        "the profile `{}` cannot be written",
        path.display()
    ))
    .why(why)
    .fix("check permissions and free space, or record fewer steps")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_a_first_and_a_last_one() {
        let steps = |raw: &str| Steps::try_from(raw.to_owned());
        assert_eq!(steps("1:1"), Ok(Steps { first: 1, last: 1 }));
        assert_eq!(
            steps("10: 12"),
            Ok(Steps {
                first: 10,
                last: 12
            })
        );
        for raw in ["", "10", ":", "0:3", "3:2", "-1:2", "1:2:3", "a:b", "1-2"] {
            assert!(steps(raw).is_err(), "{raw}");
        }
    }
}
