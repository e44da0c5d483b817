//! What a recorded trace says in short: the operators and kernels that took longest.

use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

/// Events of Chrome's trace format, as far as they matter here.
#[derive(Debug, Deserialize)]
pub(super) struct Trace {
    #[serde(rename = "traceEvents")]
    events: Vec<Event>,
}

#[derive(Debug, Deserialize)]
struct Event {
    #[serde(default)]
    ph: String,
    #[serde(default)]
    cat: String,
    #[serde(default)]
    name: String,
    /// Number or text.
    #[serde(default)]
    tid: serde_json::Value,
    /// Beginning, µs.
    #[serde(default)]
    ts: f64,
    /// Length, µs.
    #[serde(default)]
    dur: f64,
}

/// Where time went: by name, number of calls and µs.
type Totals<'a> = BTreeMap<&'a str, (u64, f64)>;

impl Trace {
    /// Reads a file.
    ///
    /// # Errors
    /// If it is not there, or no trace.
    pub(super) fn read(path: &Path) -> std::io::Result<Self> {
        let trace = serde_json::from_reader(BufReader::new(File::open(path)?))?;
        Ok(trace)
    }

    /// Tables of the `n` longest operators by their own time, and of the `n` longest kernels if the device has such.
    pub(super) fn summary(&self, n: usize, is_cuda: bool) -> String {
        let mut text = table("self time on the CPU", "operator", &self.self_times(), n);
        if is_cuda {
            let kernels = self.kernels();
            text.push('\n');
            text.push_str(&if kernels.is_empty() {
                "no kernels of the GPU are in it: libtorch could not use CUPTI; look for its reason above, and whether \
                 another profiler is running"
                    .to_owned()
            } else {
                table("time on the GPU", "kernel", &kernels, n)
            });
        }
        text
    }

    /// Time of each operator without that of operators and spans that it called.
    fn self_times(&self) -> Totals<'_> {
        let is_of_host = |event: &&Event| {
            event.ph == "X" && matches!(event.cat.as_str(), "cpu_op" | "user_annotation")
        };
        let mut by_thread: BTreeMap<String, Vec<&Event>> = BTreeMap::new();
        for event in self.events.iter().filter(is_of_host) {
            let thread = by_thread.entry(event.tid.to_string()).or_default();
            thread.push(event);
        }
        let mut totals = Totals::new();
        for events in by_thread.values_mut() {
            // A caller begins no later than what it calls, and is longer.
            events.sort_by(|a, b| a.ts.total_cmp(&b.ts).then(b.dur.total_cmp(&a.dur)));
            let mut open: Vec<&Event> = Vec::new();
            for event in &*events {
                while open.pop_if(|caller| caller.end() <= event.ts).is_some() {}
                if let Some(caller) = open.last().filter(|caller| caller.is_operator()) {
                    totals.entry(&caller.name).or_default().1 -= event.dur;
                }
                if event.is_operator() {
                    let total = totals.entry(&event.name).or_default();
                    *total = (total.0 + 1, total.1 + event.dur);
                }
                open.push(event);
            }
        }
        totals
    }

    fn kernels(&self) -> Totals<'_> {
        let mut totals = Totals::new();
        let is_kernel = |event: &&Event| {
            event.ph == "X" && matches!(event.cat.as_str(), "kernel" | "gpu_memcpy" | "gpu_memset")
        };
        for event in self.events.iter().filter(is_kernel) {
            let total = totals.entry(&event.name).or_default();
            *total = (total.0 + 1, total.1 + event.dur);
        }
        totals
    }
}

impl Event {
    fn end(&self) -> f64 {
        self.ts + self.dur
    }

    fn is_operator(&self) -> bool {
        self.cat == "cpu_op"
    }
}

fn table(time: &str, what: &str, totals: &Totals<'_>, n: usize) -> String {
    let sum: f64 = totals.values().map(|(_, time)| time).sum();
    let mut rows: Vec<_> = totals.iter().collect();
    rows.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
    let mut text = format!("{time:>22}   share    calls  {what}");
    for (name, (calls, time)) in rows.iter().take(n) {
        let share = time / sum * 100.0;
        let _ = write!(
            text,
            "\n{:>19.3} ms {share:>5.1} % {calls:>8}  {}",
            time / 1e3,
            shortened(name)
        );
    }
    text
}

/// Names of kernels are C++ signatures.
fn shortened(name: &str) -> String {
    const WIDTH: usize = 80;
    match name.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(events: &[(&str, &str, u64, f64, f64)]) -> Trace {
        let events = events.iter().map(|&(cat, name, tid, ts, dur)| {
            serde_json::json!({"ph": "X", "cat": cat, "name": name, "tid": tid, "ts": ts, "dur": dur})
        });
        let others = [serde_json::json!({"ph": "M", "name": "process_name", "pid": "Spans"})];
        let all: Vec<_> = events.chain(others).collect();
        serde_json::from_value(serde_json::json!({ "traceEvents": all })).unwrap()
    }

    #[test]
    fn own_time_is_without_that_of_calls() {
        let trace = trace(&[
            ("user_annotation", "step 1", 1, 0.0, 100.0),
            ("cpu_op", "aten::matmul", 1, 10.0, 50.0),
            ("cpu_op", "aten::mm", 1, 20.0, 30.0),
            ("cpu_op", "aten::empty", 1, 20.0, 5.0),
            ("cpu_op", "aten::mm", 2, 25.0, 7.0),
            ("cpu_op", "aten::add", 1, 60.0, 10.0),
            ("kernel", "gemm", 7, 0.0, 99.0),
        ]);
        let times = trace.self_times();
        let own = |name: &str| times[name];
        assert_eq!(own("aten::matmul"), (1, 20.0));
        assert_eq!(own("aten::mm"), (2, 32.0));
        assert_eq!(own("aten::empty"), (1, 5.0));
        assert_eq!(own("aten::add"), (1, 10.0));
        assert_eq!(times.len(), 4, "neither spans nor kernels");
    }

    #[test]
    fn the_summary_has_the_longest_first_and_misses_kernels_aloud() {
        let mut trace = trace(&[
            ("cpu_op", "aten::add", 1, 0.0, 1000.0),
            ("cpu_op", "aten::mm", 1, 2000.0, 3000.0),
            ("cpu_op", "aten::sum", 1, 6000.0, 1.0),
        ]);
        insta::assert_snapshot!(trace.summary(2, false), @r"
          self time on the CPU   share    calls  operator
                      3.000 ms  75.0 %        1  aten::mm
                      1.000 ms  25.0 %        1  aten::add
        ");
        assert!(
            trace
                .summary(2, true)
                .contains("no kernels of the GPU are in it")
        );
        trace.events[1].cat = "kernel".into();
        let text = trace.summary(2, true);
        assert!(
            text.ends_with("3.000 ms 100.0 %        1  aten::mm"),
            "{text}"
        );
    }
}
