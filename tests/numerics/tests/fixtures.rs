//! Every recorded run that the `moeut` model covers, with every kernel, in both precisions.

use moeut_numerics::fixture::{self, Fixture};
use moeut_numerics::plugins;
use moeut_numerics::replay::{is_covered, replay};
use moeut_plugin_api::{DType, Device};

/// Recorded tensors are double-precision results rounded once to single precision (6e-8).
const TOLERANCE_F64: f64 = 1e-6;
/// The reference's own single-precision run is up to 2e-6 away.
const TOLERANCE_F32: f64 = 1e-5;

fn check(dtype: DType, tolerance: f64) {
    let mut failures = Vec::new();
    let kernels = plugins::kernels().unwrap();
    for path in fixture::all().unwrap() {
        let fixture = Fixture::read(&path).unwrap();
        if !is_covered(&fixture) {
            continue;
        }
        for kernel in &kernels {
            if !kernel.capabilities.supports(Device::Cpu, dtype) {
                continue;
            }
            let title = format!("{} {dtype} {}", fixture.name, kernel.name);
            match replay(&fixture, dtype, kernel) {
                Ok(errors) => {
                    println!("{title}:{errors}");
                    let above = errors.above(tolerance);
                    failures.extend(above.into_iter().map(|error| format!("{title}: {error}")));
                }
                Err(error) => failures.push(format!("{title}: {error}")),
            }
        }
    }
    assert!(failures.is_empty(), "above {tolerance}:\n{}", failures.join("\n"));
}

#[test]
fn recorded_runs_are_reproduced_in_double_precision() {
    check(DType::F64, TOLERANCE_F64);
}

#[test]
fn recorded_runs_are_reproduced_in_single_precision() {
    check(DType::F32, TOLERANCE_F32);
}
