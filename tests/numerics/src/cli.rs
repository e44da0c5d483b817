//! The command line: which recorded runs, on which device, in which precisions, with which kernels.

use moeut_plugin_api::{DType, Device, PluginError};
use std::path::PathBuf;

/// What to type, for errors.
const USAGE: &str = "`cargo xtask fixtures <folder> [--kernel <name>] [--device cpu|cuda[:<n>]] \
                     [--dtype f64|f32|bf16|f16,…] [--plugins <folder>]`";

const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::Bf16, DType::F16];

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Args {
    /// Where the recorded runs are.
    pub(crate) folder: PathBuf,
    /// The only kernel to run; without, all.
    pub(crate) kernel: Option<String>,
    /// Where to compute.
    pub(crate) device: Device,
    /// The precisions, in the order given.
    pub(crate) dtypes: Vec<DType>,
    /// Where plugins are; without, they are built.
    pub(crate) plugins: Option<PathBuf>,
}

/// Reads the arguments behind the program's name. A value follows its flag, or stands behind `=`.
///
/// # Errors
/// With what is wrong and how to type it.
pub(crate) fn parse(args: &[String]) -> Result<Args, PluginError> {
    let (mut folders, mut dtypes) = (Vec::new(), Vec::new());
    let (mut kernel, mut device, mut plugins) = (None, Device::Cpu, None);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        if !arg.starts_with("--") {
            folders.push(arg);
            continue;
        }
        let (flag, value) = match arg.split_once('=') {
            Some((flag, value)) => (flag, Some(value)),
            None => (arg.as_str(), None),
        };
        if !["--kernel", "--device", "--dtype", "--plugins"].contains(&flag) {
            return Err(PluginError::new(format!("unknown flag `{flag}`"))
                .why("the flags are `--kernel`, `--device`, `--dtype` and `--plugins`")
                .fix(USAGE));
        }
        let value = value.or_else(|| args.next().map(String::as_str));
        let Some(value) = value.filter(|value| !value.is_empty()) else {
            return Err(PluginError::new(format!("`{flag}` has no value"))
                .why("every flag takes one")
                .fix(USAGE));
        };
        match flag {
            "--kernel" => kernel = Some(value.to_owned()),
            "--device" => device = parse_device(value)?,
            "--plugins" => plugins = Some(PathBuf::from(value)),
            _ => {
                for name in value.split(',') {
                    let dtype = parse_dtype(name)?;
                    if !dtypes.contains(&dtype) {
                        dtypes.push(dtype);
                    }
                }
            }
        }
    }
    let [folder] = folders[..] else {
        return Err(
            PluginError::new("no single folder with recorded runs is named")
                .why(format!("{} are named: {folders:?}", folders.len()))
                .fix(USAGE),
        );
    };
    if dtypes.is_empty() {
        dtypes = vec![DType::F64, DType::F32];
    }
    Ok(Args {
        folder: folder.into(),
        kernel,
        device,
        dtypes,
        plugins,
    })
}

/// `cpu`, `cuda` for the first GPU, `cuda:1` for the second.
fn parse_device(text: &str) -> Result<Device, PluginError> {
    let index = match text.split_once(':') {
        None if text == "cpu" => return Ok(Device::Cpu),
        None if text == "cuda" => Some(0),
        Some(("cuda", index)) => index.parse().ok(),
        _ => None,
    };
    index.map(Device::Cuda).ok_or_else(|| {
        PluginError::new(format!("unknown device `{text}`"))
            .why("the devices are `cpu`, `cuda` and, of several GPUs, `cuda:0`, `cuda:1` and so on")
            .fix("`--device cpu` or `--device cuda`")
    })
}

fn parse_dtype(name: &str) -> Result<DType, PluginError> {
    let dtype = DTYPES.into_iter().find(|dtype| dtype.to_string() == name);
    dtype.ok_or_else(|| {
        PluginError::new(format!("unknown precision `{name}`"))
            .why("the precisions are `f64`, `f32`, and mixed with parameters in fp32 `bf16` and `f16`")
            .fix("`--dtype f64,f32,bf16,f16`, or some of them")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Args, PluginError> {
        let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        parse(&args)
    }

    #[test]
    fn without_flags_all_kernels_run_on_the_cpu_in_full_precision() {
        let expected = Args {
            folder: "runs".into(),
            kernel: None,
            device: Device::Cpu,
            dtypes: vec![DType::F64, DType::F32],
            plugins: None,
        };
        assert_eq!(parsed("runs"), Ok(expected));
    }

    #[test]
    fn flags_stand_before_or_behind_the_folder() {
        let expected = Args {
            folder: "runs".into(),
            kernel: Some("grouped".into()),
            device: Device::Cuda(1),
            dtypes: vec![DType::Bf16, DType::F16, DType::F32],
            plugins: Some("staged".into()),
        };
        let flags = "--kernel grouped --device cuda:1 --plugins staged";
        for line in [
            format!("{flags} --dtype bf16,f16 --dtype f32 runs"),
            format!("runs --dtype=bf16,f16,bf16,f32 {flags}"),
        ] {
            assert_eq!(parsed(&line).as_ref(), Ok(&expected), "{line}");
        }
        assert_eq!(
            parsed("runs --device cuda").map(|args| args.device),
            Ok(Device::Cuda(0))
        );
    }

    #[test]
    fn each_mistake_is_explained() {
        for (line, what) in [
            ("", "no single folder with recorded runs is named"),
            ("a b", "no single folder with recorded runs is named"),
            ("a --gpu 0", "unknown flag `--gpu`"),
            ("a --kernel", "`--kernel` has no value"),
            ("a --dtype=", "`--dtype` has no value"),
            ("a --dtype f8", "unknown precision `f8`"),
            ("a --dtype f32,", "unknown precision ``"),
            ("a --device tpu", "unknown device `tpu`"),
            ("a --device cuda:", "unknown device `cuda:`"),
            ("a --device cpu:0", "unknown device `cpu:0`"),
        ] {
            let error = parsed(line).unwrap_err();
            assert_eq!(error.what, what, "{line}");
            assert!(!error.why.is_empty() && !error.fix.is_empty(), "{line}");
        }
    }
}
