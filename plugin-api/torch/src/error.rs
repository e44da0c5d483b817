//! libtorch's errors as people read them: one line, or the three parts of a [`PluginError`].

use moeut_plugin_api::PluginError;
use tch::TchError;

/// Where libtorch starts to append its C++ stack.
const STACK: &str = "\nException raised from";

/// The message of `error` on one line, without the C++ stack that libtorch appends.
pub fn one_line(error: &TchError) -> String {
    let text = match error {
        TchError::Torch(text) => text.clone(),
        other => other.to_string(),
    };
    let message = text.split(STACK).next().unwrap_or_default();
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Says what was attempted (`what`) and, in libtorch's words, why it did not work; known causes get a fix.
pub fn plugin_error(what: impl Into<String>, error: &TchError) -> PluginError {
    let why = one_line(error);
    let fix = KNOWN
        .iter()
        .find(|(cause, _)| why.contains(cause))
        .map_or("", |(_, fix)| fix);
    PluginError::new(what).why(why).fix(fix)
}

/// Causes that libtorch words the same way each time, and the way out.
const KNOWN: [(&str, &str); 3] = [
    (
        "out of memory",
        "split the batch with a larger `-n_microbatch`, or lower `-batch_size`",
    ),
    (
        "no CUDA device",
        "set `-gpu none`, or run `nvidia-smi` to see the driver's devices",
    ),
    (
        "modified by an inplace operation",
        "copy the tensor before changing it in place",
    ),
];

/// `?` from tch's fallible calls (`f_…`) into a [`PluginError`].
pub trait OrPluginError<T> {
    /// Turns a tch error into a [`PluginError`] that starts with `what`.
    ///
    /// # Errors
    /// If `self` is one.
    fn or_plugin_error(self, what: &str) -> Result<T, PluginError>;
}

impl<T> OrPluginError<T> for Result<T, TchError> {
    fn or_plugin_error(self, what: &str) -> Result<T, PluginError> {
        self.map_err(|error| plugin_error(what, &error))
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    #[test]
    fn the_cpp_stack_is_cut() {
        let a = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu));
        let error = a.f_matmul(&a).unwrap_err();
        assert_eq!(
            one_line(&error),
            "mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"
        );
    }

    #[test]
    fn known_causes_get_a_fix() {
        let error = TchError::Torch("CUDA out of memory. Tried to allocate\n2 GiB".to_owned());
        let error = plugin_error("cannot run `moeut`", &error);
        assert_eq!(error.what, "cannot run `moeut`");
        assert_eq!(error.why, "CUDA out of memory. Tried to allocate 2 GiB");
        assert!(error.fix.contains("-n_microbatch"));
    }

    #[test]
    fn unknown_causes_get_no_fix() {
        let result: Result<(), TchError> = Err(TchError::Shape("odd".to_owned()));
        let error = result.or_plugin_error("cannot reshape").unwrap_err();
        assert_eq!(
            (error.why.as_str(), error.fix.as_str()),
            ("invalid shape: odd", "")
        );
    }
}
