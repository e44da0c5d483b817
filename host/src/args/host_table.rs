//! The host's own arguments: the reference's flags and the fields of [`super::HostConfig`] that they fill.

use moeut_plugin_api::{ArgKind, ArgSpec};

/// Flags that describe one start and not the run, so that the next start does not inherit them.
pub(super) const NOT_SAVED: &[&str] = &["gpu", "prompt", "reset", "restore"];

/// Smallest values of numbers that cannot be just any.
pub(super) const MINIMUM: &[(&str, f64)] = &[
    ("batch_size", 1.0),
    ("grad_clip", 0.0),
    ("keep_last", 1.0),
    ("log_interval", 1.0),
    ("lr", 0.0),
    ("lr_warmup", 0.0),
    ("min_lr_multiplier", 0.0),
    ("n_microbatch", 1.0),
    ("n_samples", 0.0),
    ("per_device_batch_size", 1.0),
    ("sample_length", 1.0),
    ("sample_temperature", 0.0),
    ("sample_top_k", 1.0),
    ("save_interval", 1.0),
    ("stop_after", 0.0),
    ("test_batch_size", 1.0),
    ("test_interval", 1.0),
    ("threads", 1.0),
    ("wd", 0.0),
];

/// The host's argument table.
pub fn host_args() -> &'static [ArgSpec] {
    HOST_ARGS
}

const HOST_ARGS: &[ArgSpec] = &[
    // The run.
    ArgSpec::text("task", "none")
        .optional()
        .help("Which task to train"),
    ArgSpec::text("name", "none")
        .optional()
        .help("Name of the run; its files are in `<save_dir>/<name>`"),
    ArgSpec::new(ArgKind::StrList, "profile", "none")
        .field("")
        .help("Named bundles of arguments; later ones override"),
    ArgSpec::new(ArgKind::StrList, "plugin_dir", "")
        .field("plugin_dirs")
        .help("Folders with plugins, besides the one beside the program"),
    ArgSpec::text("restore", "")
        .optional()
        .help("Checkpoint to start from, or a folder with checkpoints"),
    ArgSpec::flag("reset", "0").help("Start anew: remove what an earlier run of this name left"),
    ArgSpec::text("save_dir", "save").help("Folder of all runs"),
    ArgSpec::text("data.cache_dir", "cache")
        .field("cache_dir")
        .help("Folder of tokenizers and tokenized data"),
    ArgSpec::int("seed", "none")
        .optional()
        .help("Fixes all random numbers"),
    ArgSpec::flag("compat", "0")
        .help("Repeat the reference's quirks, to compare with it or with its checkpoints"),
    // The machine.
    ArgSpec::text("gpu", "auto")
        .help("Index of the GPU; `auto` takes the first one, `none` the CPU"),
    ArgSpec::int("threads", "none")
        .optional()
        .help("CPU threads of a tensor operation"),
    ArgSpec::text("dtype", "f32")
        .choices("f32|f64")
        .help("Type of the parameters"),
    ArgSpec::flag("amp", "0").help("Compute in 16 bits where that is safe, on a GPU"),
    ArgSpec::flag("bfloat16", "1")
        .help("With `-amp`: bfloat16 rather than float16, where the GPU has it"),
    // Reports and checkpoints.
    ArgSpec::text("log", "tb")
        .choices("tb|none")
        .help("Where metrics go: TensorBoard files or nowhere"),
    ArgSpec::int("log_interval", "20")
        .unit("steps")
        .help("Metrics are averaged over so many steps"),
    ArgSpec::int("save_interval", "5000")
        .optional()
        .unit("steps")
        .help("A checkpoint each so many steps"),
    ArgSpec::int("keep_last", "1")
        .field("n_kept")
        .unit("checkpoints")
        .help("How many checkpoints stay"),
    ArgSpec::int("test_interval", "1000")
        .field("eval_interval")
        .unit("steps")
        .help("Validation each so many steps"),
    ArgSpec::int("n_samples", "3")
        .field("sample.n_prompts")
        .help("Prompts to continue at the end of training"),
    ArgSpec::int("sample_length", "100")
        .field("sample.length")
        .unit("tokens")
        .help("Length of a continuation"),
    ArgSpec::float("sample_temperature", "0.8")
        .field("sample.temperature")
        .help("Randomness of continuations; 0 takes the likeliest token"),
    ArgSpec::int("sample_top_k", "none")
        .optional()
        .field("sample.top_k")
        .unit("tokens")
        .help("Continuations choose among so many likeliest tokens"),
    ArgSpec::float("sample_top_p", "1.0")
        .field("sample.top_p")
        .unit("fraction")
        .help("And among the likeliest of these that have this share of the probability"),
    ArgSpec::text("prompt", "none")
        .optional()
        .help("Text to continue, instead of the task's prompts"),
    // Batches.
    ArgSpec::int("stop_after", "none")
        .optional()
        .field("n_steps")
        .unit("steps")
        .help("Length of the training"),
    ArgSpec::int("batch_size", "128")
        .unit("sequences")
        .help("Sequences in one step, over all devices"),
    ArgSpec::int("n_microbatch", "none")
        .optional()
        .field("n_microbatches")
        .help("Parts of a batch, one after the other, to save memory"),
    ArgSpec::int("per_device_batch_size", "none")
        .optional()
        .unit("sequences")
        .help("Instead of `-n_microbatch`: the most that a device takes at once"),
    ArgSpec::int("test_batch_size", "none")
        .optional()
        .field("eval_batch_size")
        .unit("sequences")
        .help("Batch of the validation; `none` takes that of the training"),
    // Learning rate.
    ArgSpec::float("lr", "1e-3")
        .field("schedule.lr")
        .help("Peak learning rate"),
    ArgSpec::text("lr_sched.type", "step")
        .field("schedule.kind")
        .choices("step|noam|cos")
        .help("Learning rate over time"),
    ArgSpec::int("lr_warmup", "0")
        .field("schedule.warmup_steps")
        .unit("steps")
        .help("Length of the linear warm-up"),
    ArgSpec::float("min_lr_multiplier", "0.0")
        .field("schedule.min_lr_multiplier")
        .help("`cos`: last learning rate, as a fraction of `-lr`"),
    ArgSpec::new(ArgKind::IntList, "lr_sched.steps", "")
        .field("schedule.boundaries")
        .unit("steps")
        .help("`step`: when the learning rate falls"),
    ArgSpec::float("lr_sched.gamma", "0.1")
        .field("schedule.gamma")
        .help("`step`: factor by which it falls"),
    // Optimizer.
    ArgSpec::text("optimizer", "adamw")
        .field("optimizer.kind")
        .choices("adamw")
        .help("Update rule"),
    ArgSpec::float("wd", "0.0")
        .field("optimizer.weight_decay")
        .help("Decoupled weight decay of all parameters"),
    ArgSpec::float("grad_clip", "1.0")
        .optional()
        .field("optimizer.max_grad_norm")
        .help("Largest norm of the gradient of all parameters together"),
    ArgSpec::new(ArgKind::FloatList, "adam.betas", "0.9,0.999")
        .field("optimizer.adam.betas")
        .help("Decay of the averages of gradient and squared gradient"),
    ArgSpec::float("adam.eps", "1e-8")
        .field("optimizer.adam.eps")
        .help("Added to the root of the squared gradient"),
    // Regularizers.
    ArgSpec::float("reg", "1.0")
        .field("reg_weight")
        .help("Weight of all regularizers together"),
    ArgSpec::new(ArgKind::FloatMap, "reg_scales", "")
        .help("Weights of single regularizers: `moe=0.5,act_loss=2`"),
];
