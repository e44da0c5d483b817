//! All runs of all fixtures: each with every kernel, in every precision that is asked for, against its bounds.

use crate::Result;
use crate::fixture::Fixture;
use crate::placement::Placement;
use crate::plugins::{self, KernelPlugin};
use crate::replay::replay;
use moeut_plugin_api::{DType, Device, PluginError};
use std::path::PathBuf;

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

/// Runs the fixtures in the given precisions on a device that is open, with all kernels or the one of this name, and
/// tells each outcome as a line.
///
/// # Errors
/// If the kernels do not build, or none of them, or not the one of this name, computes so. What is wrong with single
/// fixtures is in the verdict.
pub fn check(
    fixtures: &[PathBuf],
    kernel: Option<&str>,
    device: Device,
    dtypes: &[DType],
    mut tell: impl FnMut(&str),
) -> Result<Verdict> {
    // Many small calls, in which threads would wait for each other.
    tch::set_num_threads(1);
    let settings = settings(&chosen(kernel)?, device, dtypes)?;
    let mut verdict = Verdict {
        n_fixtures: fixtures.len(),
        ..Verdict::default()
    };
    for path in fixtures {
        let fixture = Fixture::read(path);
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        for (placement, kernel) in &settings {
            let title = title(&name, *placement, kernel);
            let problems = match &fixture {
                Ok(fixture) => run(fixture, *placement, kernel, &title, &mut tell),
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
    Ok(verdict)
}

/// A run in words; the CPU goes without saying.
fn title(fixture: &str, placement: Placement, kernel: &KernelPlugin) -> String {
    let Placement { device, dtype } = placement;
    let kernel = &kernel.name;
    match device {
        Device::Cpu => format!("{fixture} {dtype} {kernel}"),
        Device::Cuda(_) => format!("{fixture} {device} {dtype} {kernel}"),
    }
}

/// What is wrong with one run.
fn run(
    fixture: &Fixture,
    placement: Placement,
    kernel: &KernelPlugin,
    title: &str,
    tell: &mut impl FnMut(&str),
) -> Vec<String> {
    match replay(fixture, placement, kernel) {
        Ok(errors) => {
            tell(&format!("{title}:{errors}"));
            errors.above()
        }
        Err(error) => vec![error.to_string()],
    }
}

/// Each precision with each kernel that has it on the device.
fn settings(
    kernels: &[KernelPlugin],
    device: Device,
    dtypes: &[DType],
) -> Result<Vec<(Placement, KernelPlugin)>> {
    let mut settings = Vec::new();
    for &dtype in dtypes {
        let able = kernels
            .iter()
            .filter(|kernel| kernel.capabilities.supports(device, dtype));
        settings.extend(able.map(|kernel| (Placement { device, dtype }, kernel.clone())));
    }
    if settings.is_empty() {
        let list = |words: Vec<String>| words.join(", ");
        let names = kernels.iter().map(|kernel| format!("`{}`", kernel.name));
        let dtypes = dtypes.iter().map(|dtype| format!("`{dtype}`"));
        let error = PluginError::new(format!("nothing can be run on `{device}`"));
        return Err(error
            .why(format!(
                "of the kernels {} none computes there in {}",
                list(names.collect()),
                list(dtypes.collect())
            ))
            .fix("name another `--device` or `--dtype`, or leave out `--kernel` to run all")
            .into());
    }
    Ok(settings)
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
