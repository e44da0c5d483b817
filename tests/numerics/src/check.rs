//! All runs of all fixtures: each with every kernel, in both precisions, against its tolerance.

use crate::Result;
use crate::fixture::Fixture;
use crate::plugins::{self, KernelPlugin};
use crate::replay::replay;
use moeut_plugin_api::{DType, Device, PluginError};
use std::path::PathBuf;

/// Recorded tensors are double-precision results rounded once to single precision (6e-8).
const TOLERANCE_F64: f64 = 1e-6;
/// The reference's own single-precision run is up to 2e-6 away.
const TOLERANCE_F32: f64 = 1e-5;

/// How the runs went.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Fixtures that were run.
    pub n_fixtures: usize,
    /// Runs: a fixture with a kernel in a precision.
    pub n_runs: usize,
    /// Runs that failed or are too far off.
    pub n_failed: usize,
    /// What is wrong with them, one line each.
    pub failures: Vec<String>,
}

/// The error that `dtype` may have.
pub fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::F64 {
        TOLERANCE_F64
    } else {
        TOLERANCE_F32
    }
}

/// Runs the fixtures in the given precisions, with all kernels or the one of this name, and tells each outcome as a
/// line.
///
/// # Errors
/// If the kernels do not build, or there is none of this name that runs on the CPU. What is wrong with single fixtures
/// is in the verdict.
pub fn check(
    fixtures: &[PathBuf],
    kernel: Option<&str>,
    dtypes: &[DType],
    mut tell: impl FnMut(&str),
) -> Result<Verdict> {
    let kernels = chosen(kernel)?;
    let mut verdict = Verdict {
        n_fixtures: fixtures.len(),
        ..Verdict::default()
    };
    for path in fixtures {
        let fixture = Fixture::read(path);
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        for &dtype in dtypes {
            let able = kernels
                .iter()
                .filter(|kernel| kernel.capabilities.supports(Device::Cpu, dtype));
            for kernel in able {
                let title = format!("{name} {dtype} {}", kernel.name);
                let problems = match &fixture {
                    Ok(fixture) => run(fixture, dtype, kernel, &title, &mut tell),
                    Err(error) => vec![error.to_string()],
                };
                verdict.n_runs += 1;
                verdict.n_failed += usize::from(!problems.is_empty());
                let problems = problems.iter().map(|problem| format!("{title}: {problem}"));
                for problem in problems {
                    tell(&format!("FAILED {problem}"));
                    verdict.failures.push(problem);
                }
            }
        }
    }
    Ok(verdict)
}

/// What is wrong with one run.
fn run(
    fixture: &Fixture,
    dtype: DType,
    kernel: &KernelPlugin,
    title: &str,
    tell: &mut impl FnMut(&str),
) -> Vec<String> {
    match replay(fixture, dtype, kernel) {
        Ok(errors) => {
            tell(&format!("{title}:{errors}"));
            errors.above(tolerance(dtype))
        }
        Err(error) => vec![error.to_string()],
    }
}

fn chosen(name: Option<&str>) -> Result<Vec<KernelPlugin>> {
    let mut kernels = plugins::kernels()?;
    let known: Vec<String> = kernels
        .iter()
        .map(|kernel| format!("`{}`", kernel.name))
        .collect();
    if let Some(name) = name {
        kernels.retain(|kernel| kernel.name == name);
        if kernels.is_empty() {
            return Err(PluginError::new(format!("unknown kernel `{name}`"))
                .why(format!("the kernels are {}", known.join(", ")))
                .fix("name one of them, or leave out `--kernel` to run all")
                .into());
        }
    }
    Ok(kernels)
}
