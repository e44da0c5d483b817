//! The smallest run that learns: a model of 40,000 parameters; a step takes milliseconds.

use crate::cached_data;

/// Arguments of every training test; a later argument wins.
#[rustfmt::skip] // one argument a line
const TINY: &[&str] = &[
    "-seed", "1",
    "-gpu", "none",
    "-threads", "1",
    "-sentencepiece.n_pieces", "500",
    "-lmds.valid_ratio", "1e-6",
    "-lm.eval.enabled", "0",
    "-lm.unroll", "32",
    "-lm.trafo.context_blocks", "0",
    "-batch_size", "4",
    "-state_size", "32",
    "-transformer.encoder_n_layers", "2",
    "-transformer.n_heads", "2",
    "-moe.n_experts", "4",
    "-moe.expert_size", "16",
    "-pkm.n_heads", "2",
    "-dropout", "0.1",
    "-lr", "3e-3",
    "-log_interval", "1",
    "-n_samples", "0",
];

/// A command line.
pub struct Args(Vec<String>);

impl Args {
    /// As the host wants it.
    pub fn as_strs(&self) -> Vec<&str> {
        self.0.iter().map(String::as_str).collect()
    }
}

/// A tiny run called `name` on the embedded corpus, with `more` arguments.
pub fn tiny(name: &str, more: &[&str]) -> Args {
    let cache = cached_data();
    let cache = cache.to_str().expect("the path is UTF-8");
    let embedded = ["-data.source", "embedded", "-data.cache_dir", cache];
    tiny_on("moeut_c4", name, &[&embedded, more].concat())
}

/// A tiny run of a task, whose data `more` must say; its cache is in the working folder.
pub fn tiny_on(task: &str, name: &str, more: &[&str]) -> Args {
    Args(
        TINY.iter()
            .chain(&["-task", task, "-name", name])
            .chain(more)
            .map(|&arg| arg.to_owned())
            .collect(),
    )
}
