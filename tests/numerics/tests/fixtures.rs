//! Every recorded run, with every kernel, in both precisions.

use moeut_numerics::Result;
use moeut_numerics::fixture::{self, Fixture};
use moeut_numerics::plugins;
use moeut_numerics::replay::replay;
use moeut_plugin_api::{DType, Device};

/// Recorded tensors are double-precision results rounded once to single precision (6e-8).
const TOLERANCE_F64: f64 = 1e-6;
/// The reference's own single-precision run is up to 2e-6 away.
const TOLERANCE_F32: f64 = 1e-5;

/// One line per run, and one per quantity that is too far off.
fn replay_all(dtype: DType, tolerance: f64) -> Result<(Vec<String>, Vec<String>)> {
    let (mut lines, mut failures) = (Vec::new(), Vec::new());
    let mut kernels = plugins::kernels()?;
    kernels.retain(|kernel| kernel.capabilities.supports(Device::Cpu, dtype));
    for path in fixture::all()? {
        let fixture = Fixture::read(&path)?;
        for kernel in &kernels {
            let title = format!("{} {dtype} {}", fixture.name, kernel.name);
            match replay(&fixture, dtype, kernel) {
                Ok(errors) => {
                    let above = errors.above(tolerance).into_iter();
                    failures.extend(above.map(|error| format!("{title}: {error}")));
                    lines.push(format!("{title}:{errors}"));
                }
                Err(error) => failures.push(format!("{title}: {error}")),
            }
        }
    }
    if lines.is_empty() && failures.is_empty() {
        lines.push("no recorded runs found: set MOEUT_SHARED to the shared data".to_owned());
    }
    Ok((lines, failures))
}

#[test]
fn recorded_runs_are_reproduced_in_double_precision() {
    let (lines, failures) = replay_all(DType::F64, TOLERANCE_F64).unwrap();
    println!("{}", lines.join("\n"));
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn recorded_runs_are_reproduced_in_single_precision() {
    let (lines, failures) = replay_all(DType::F32, TOLERANCE_F32).unwrap();
    println!("{}", lines.join("\n"));
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
