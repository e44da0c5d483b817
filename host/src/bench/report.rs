//! What a bench has found, as JSON and as a table.

use super::ceilings::{self, Ceilings};
use super::timer::Spread;
use crate::doctor;
use crate::error::HostError;
use moeut_plugin_api::PluginError;
use serde::Serialize;
use std::fmt;
use tch::{Device, Kind};

/// A whole bench.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Report {
    /// `step`, `moe`, `attention` or `data`.
    pub(super) bench: &'static str,
    /// Its arguments.
    pub(super) arguments: Vec<String>,
    pub(super) machine: Machine,
    pub(super) ceilings: Ceilings,
    pub(super) rows: Vec<Row>,
}

/// What was measured on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Machine {
    /// `NVIDIA H100 80GB HBM3`, or `CPU`.
    pub(super) device: String,
    /// Version of NVIDIA's driver; nothing on the CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) driver: Option<String>,
    pub(super) libtorch: Option<String>,
    pub(super) host: &'static str,
    /// CPU threads of a tensor operation.
    pub(super) n_threads: i32,
    /// Element type of products.
    pub(super) dtype: String,
}

/// Work of one call.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Work {
    /// Tokens that it is about.
    pub(super) n_tokens: u64,
    /// Floating-point operations of its products.
    pub(super) flops: Option<f64>,
    /// Bytes that pass through memory if each operand and each result does so once.
    pub(super) bytes: Option<f64>,
}

/// One thing that was measured.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub(super) struct Row {
    /// `244M σ-MoE`.
    pub(super) name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) kernel: Option<String>,
    /// Whether the kernel says that it gives the same bits each time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) is_deterministic: Option<bool>,
    /// `forward`, `forward + backward`, `step` or `batch`.
    pub(super) pass: &'static str,
    pub(super) seconds: Option<Spread>,
    pub(super) n_tokens: u64,
    pub(super) tokens_per_s: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tflop: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tflops_per_s: Option<f64>,
    /// Of the largest product's speed, 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) share_of_matmul: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bytes: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) gb_per_s: Option<f64>,
    /// Of the largest copy's speed, 0 to 1 and more where a cache helps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) share_of_copy: Option<f64>,
    /// The most that tensors held on a GPU, on the CPU the process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) peak_bytes: Option<u64>,
    /// The largest relative distance (Frobenius) of result and gradients from those of the first kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<f64>,
}

impl Machine {
    fn of(device: Device, kind: Kind) -> Result<Self, PluginError> {
        let card = device
            .is_cuda()
            .then(|| moeut_torch::cuda::describe(device))
            .transpose();
        let card =
            card.map_err(|error| moeut_torch::plugin_error("the GPU has no name", &error))?;
        Ok(Self {
            driver: card.is_some().then(doctor::driver),
            device: card.map_or_else(|| "CPU".to_owned(), |card| card.name),
            libtorch: moeut_torch::version::runtime_version(),
            host: env!("CARGO_PKG_VERSION"),
            n_threads: tch::get_num_threads(),
            dtype: ceilings::name(kind),
        })
    }
}

impl Row {
    /// With everything that follows from time and work.
    pub(super) fn new(
        name: String,
        pass: &'static str,
        seconds: Spread,
        work: Work,
        ceilings: &Ceilings,
    ) -> Self {
        let median = seconds.median;
        let tflop = work.flops.map(|flops| flops / 1e12);
        let tflops_per_s = tflop.map(|tflop| tflop / median);
        let gb_per_s = work.bytes.map(|bytes| bytes / 1e9 / median);
        Self {
            name,
            pass,
            n_tokens: work.n_tokens,
            tokens_per_s: work.n_tokens as f64 / median,
            tflop,
            tflops_per_s,
            share_of_matmul: tflops_per_s.map(|speed| speed / ceilings.matmul.tflops_per_s),
            bytes: work.bytes,
            gb_per_s,
            share_of_copy: gb_per_s.map(|speed| speed / ceilings.copy.gb_per_s),
            seconds: Some(seconds),
            ..Self::default()
        }
    }
}

impl Report {
    /// Of the arguments that follow the bench's name.
    ///
    /// # Errors
    /// If the device cannot be described.
    pub(super) fn new(
        bench: &'static str,
        argv: &[String],
        (device, kind): (Device, Kind),
        ceilings: Ceilings,
        rows: Vec<Row>,
    ) -> Result<Self, HostError> {
        Ok(Self {
            bench,
            arguments: argv.to_vec(),
            machine: Machine::of(device, kind)?,
            ceilings,
            rows,
        })
    }

    /// With a line break at its end.
    ///
    /// # Errors
    /// Never for finite numbers; the signature leaves room.
    pub(super) fn json(&self) -> Result<String, HostError> {
        let json = serde_json::to_string_pretty(self).map_err(|error| {
            PluginError::new("the result cannot be written as JSON").why(error.to_string())
        })?;
        Ok(json + "\n")
    }
}

const TITLES: [&str; 11] = [
    "", "kernel", "pass", "ms", "from", "to", "tokens/s", "TFLOP/s", "GB/s", "peak GB", "error",
];

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ceilings { matmul, copy } = &self.ceilings;
        writeln!(
            f,
            "{}, {}, {} threads; most: {} TFLOP/s in a product of {} x {} ({}), {} GB/s in a copy of {} MiB\n",
            self.machine.device,
            self.machine.dtype,
            self.machine.n_threads,
            significant(matmul.tflops_per_s),
            matmul.width,
            matmul.width,
            matmul.dtype,
            significant(copy.gb_per_s),
            copy.bytes >> 20
        )?;
        let rows: Vec<[String; 11]> = std::iter::once(TITLES.map(str::to_owned))
            .chain(self.rows.iter().map(Row::cells))
            .collect();
        let width = |column: usize| {
            let widths = || rows.iter().map(|row| row[column].chars().count());
            // Nobody has a number there.
            let is_empty = widths().skip(1).all(|width| width == 0);
            widths().max().filter(|_| !is_empty).unwrap_or(0)
        };
        let widths: Vec<usize> = (0..TITLES.len()).map(width).collect();
        for row in &rows {
            let cells = row.iter().zip(&widths).enumerate();
            let cells: Vec<String> = cells
                .filter(|(_, (_, width))| **width > 0)
                .map(|(column, (cell, width))| match column {
                    0..3 => format!("{cell:width$}"),
                    _ => format!("{cell:>width$}"),
                })
                .collect();
            writeln!(f, "{}", cells.join("  ").trim_end())?;
        }
        Ok(())
    }
}

impl Row {
    fn cells(&self) -> [String; 11] {
        let ms = |of: fn(&Spread) -> f64| {
            let seconds = self.seconds.as_ref().map(of);
            seconds.map_or_else(String::new, |seconds| format!("{:.3}", seconds * 1e3))
        };
        let speed = |speed: Option<f64>, share: Option<f64>| match (speed, share) {
            (Some(speed), Some(share)) => {
                format!("{} ({:.0} %)", significant(speed), share * 100.0)
            }
            _ => String::new(),
        };
        [
            self.name.clone(),
            self.kernel.clone().unwrap_or_default(),
            self.pass.to_owned(),
            ms(|seconds| seconds.median),
            ms(|seconds| seconds.min),
            ms(|seconds| seconds.max),
            format!("{:.0}", self.tokens_per_s),
            speed(self.tflops_per_s, self.share_of_matmul),
            speed(self.gb_per_s, self.share_of_copy),
            self.peak_bytes
                .map_or_else(String::new, |bytes| format!("{:.2}", bytes as f64 / 1e9)),
            self.error
                .map_or_else(String::new, |error| format!("{error:.1e}")),
        ]
    }
}

/// With about three digits.
fn significant(number: f64) -> String {
    let n_decimals = match number {
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        0.1.. => 3,
        _ => 5,
    };
    format!("{number:.n_decimals$}")
}

#[cfg(test)]
mod tests {
    use super::super::ceilings::{Copy, Matmul};
    use super::*;

    fn spread(median: f64) -> Spread {
        Spread {
            median,
            min: median / 2.0,
            max: median * 2.0,
            n_rounds: 7,
            n_calls: 4,
        }
    }

    fn report() -> Report {
        let ceilings = Ceilings {
            matmul: Matmul {
                width: 1024,
                dtype: "f32".into(),
                seconds: spread(0.01),
                tflops_per_s: 2.0,
            },
            copy: Copy {
                bytes: 1 << 28,
                seconds: spread(0.01),
                gb_per_s: 50.0,
            },
        };
        let work = Work {
            n_tokens: 1000,
            flops: Some(1e12),
            bytes: Some(5e9),
        };
        let mut row = Row::new("244M σ-MoE".into(), "forward", spread(2.0), work, &ceilings);
        row.kernel = Some("grouped".into());
        row.peak_bytes = Some(3_500_000_000);
        let bare = Work {
            n_tokens: 10,
            ..Work::default()
        };
        let other = Row::new("x".into(), "batch", spread(0.5), bare, &ceilings);
        Report {
            bench: "moe",
            arguments: vec!["-shape".into(), "244M".into()],
            machine: Machine {
                device: "CPU".into(),
                driver: None,
                libtorch: Some("2.11.0".into()),
                host: "0.1.0",
                n_threads: 2,
                dtype: "f32".into(),
            },
            ceilings,
            rows: vec![row, other],
        }
    }

    #[test]
    fn everything_follows_from_time_and_work() {
        let row = &report().rows[0];
        let near = |value: Option<f64>, wanted: f64| (value.unwrap() - wanted).abs() < 1e-12;
        assert!((row.tokens_per_s - 500.0).abs() < 1e-12);
        assert!(near(row.tflops_per_s, 0.5) && near(row.share_of_matmul, 0.25));
        assert!(near(row.gb_per_s, 2.5) && near(row.share_of_copy, 0.05));
    }

    /// Columns of which nobody has a number are left out.
    #[test]
    fn a_table_for_people() {
        insta::assert_snapshot!(report(), @"
        CPU, f32, 2 threads; most: 2.00 TFLOP/s in a product of 1024 x 1024 (f32), 50.0 GB/s in a copy of 256 MiB

                    kernel   pass           ms      from        to  tokens/s       TFLOP/s        GB/s  peak GB
        244M σ-MoE  grouped  forward  2000.000  1000.000  4000.000       500  0.500 (25 %)  2.50 (5 %)     3.50
        x                    batch     500.000   250.000  1000.000        20
        ");
    }

    #[test]
    fn json_leaves_out_what_was_not_measured() {
        let json: serde_json::Value = serde_json::from_str(&report().json().unwrap()).unwrap();
        let rows = json["rows"].as_array().unwrap();
        assert_eq!(rows[0]["seconds"]["median"], 2.0);
        assert_eq!(rows[0]["kernel"], "grouped");
        assert!(rows[1].get("tflops_per_s").is_none() && rows[1].get("error").is_none());
    }
}
