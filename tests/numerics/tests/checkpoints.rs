//! Parameters that come from a file of the reference compute what the reference computed with them.

use moeut_e2e::{RawTensor, ReferenceRun, read_safetensors};
use moeut_host::checkpoint::{Layout, convert, export, read_model_tensors};
use moeut_numerics::fixture::{self, Fixture};
use moeut_numerics::placement::Placement;
use moeut_numerics::subject::Subject;
use moeut_numerics::{Result, error_of, plugins};
use moeut_plugin_api::{DType, Past};
use serde_json::Value;
use std::path::Path;
use tch::Kind;

/// As in `fixtures.rs`, single precision.
const TOLERANCE: f64 = 1e-5;

/// The paper's model: shared peri-layernorm blocks with experts in attention and feed-forward.
const FIXTURE: &str = "04_moeut_nonorm_g2";

/// The recorded initial parameters and arguments, as the reference would have saved them.
fn as_reference(fixture: &Fixture, json: &Path) -> Result<ReferenceRun> {
    let raw = |value: &Value| {
        value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned)
    };
    let args = fixture.meta.args_effective.iter();
    let file = std::fs::read(json.with_extension("safetensors"))?;
    let parameter = |(name, tensor): (String, RawTensor)| {
        let name = name.strip_prefix("param.")?.to_owned();
        Some((name, tensor))
    };
    Ok(ReferenceRun {
        args: args
            .map(|(flag, value)| (flag.clone(), raw(value)))
            .collect(),
        model: read_safetensors(&file)
            .into_iter()
            .filter_map(parameter)
            .collect(),
        ..ReferenceRun::default()
    })
}

/// The error of the logits with the parameters in `path`.
fn error_with(path: &Path, json: &Path) -> Result<f64> {
    let mut fixture = Fixture::read(json)?;
    fixture
        .tensors
        .retain(|name, _| !name.starts_with("param."));
    for (name, tensor) in read_model_tensors(path)? {
        fixture.tensors.insert(format!("param.{name}"), tensor);
    }
    let kernels = plugins::kernels()?;
    let kernel = kernels.first().ok_or("there is no kernel")?;
    let mut subject = Subject::of(&fixture, Placement::on_cpu(DType::F32), kernel)?;
    let tokens = fixture.tensor("input.tokens.step0")?.to_kind(Kind::Int64);
    let (logits, _) = subject.forward(&tokens.narrow(0, 0, tokens.size()[0] - 1), Past::None)?;
    Ok(error_of::tensor(
        &logits,
        fixture.tensor("expected.logits")?,
    ))
}

#[test]
fn logits_are_those_of_the_reference_by_every_way_its_file_can_take() {
    let Some(json) = fixture::all()
        .unwrap()
        .into_iter()
        .find(|path| path.ends_with(format!("{FIXTURE}.json")))
    else {
        return;
    };
    let fixture = Fixture::read(&json).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str| dir.path().join(name);
    std::fs::write(
        place("model.pth"),
        as_reference(&fixture, &json).unwrap().to_bytes(),
    )
    .unwrap();
    convert(&place("model.pth"), &place("converted")).unwrap();
    for (folder, layout) in [("training", Layout::Training), ("clean", Layout::Clean)] {
        export(&place("converted"), &place(folder), layout, None).unwrap();
    }
    for way in ["model.pth", "converted", "training", "clean"] {
        let error = error_with(&place(way), &json).unwrap();
        println!("{way}: {error:.1e}");
        assert!(error <= TOLERANCE, "{way}: {error:.1e}");
    }
}
