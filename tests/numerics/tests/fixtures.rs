//! Every recorded run on the CPU, with every kernel, in every precision of trainings but f16.

use moeut_numerics::Result;
use moeut_numerics::check::check;
use moeut_numerics::fixture;
use moeut_plugin_api::{DType, Device};

/// The outcome of each run in one precision, and what is wrong.
fn check_all(dtype: DType) -> Result<(Vec<String>, Vec<String>)> {
    let fixtures = fixture::all()?;
    if fixtures.is_empty() {
        let line = "no recorded runs found: set MOEUT_SHARED to the shared data";
        return Ok((vec![line.to_owned()], Vec::new()));
    }
    let mut lines = Vec::new();
    let verdict = check(&fixtures, None, Device::Cpu, &[dtype], |line| {
        lines.push(line.to_owned());
    })?;
    Ok((lines, verdict.failures))
}

#[test]
fn recorded_runs_are_reproduced_in_double_precision() {
    let (lines, failures) = check_all(DType::F64).unwrap();
    println!("{}", lines.join("\n"));
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn recorded_runs_are_reproduced_in_mixed_precision() {
    let (lines, failures) = check_all(DType::Bf16).unwrap();
    println!("{}", lines.join("\n"));
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn recorded_runs_are_reproduced_in_single_precision() {
    let (lines, failures) = check_all(DType::F32).unwrap();
    println!("{}", lines.join("\n"));
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Of one fixture GPUs can repeat no more than the forward pass.
#[test]
fn one_recorded_run_depends_on_the_order_of_top_k() {
    let mut by_order = Vec::new();
    let all = fixture::all().unwrap();
    for path in &all {
        let fixture = fixture::Fixture::read(path).unwrap();
        if fixture.balances_by_order().unwrap() {
            by_order.push(fixture.name);
        }
    }
    let expected = ["14_moe_activation_after_topk_global"];
    assert!(all.is_empty() || by_order == expected, "{by_order:?}");
}
