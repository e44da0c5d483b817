//! The host's own arguments: the reference's flags and the fields of [`super::HostConfig`] that they fill.

use moeut_plugin_api::{ArgKind, ArgSpec};

/// Flags that describe one start and not the run, so that the next start does not inherit them.
pub(super) const NOT_SAVED: &[&str] = &[
    "distributed_timeout",
    "dry_run",
    "gpu",
    "keep_alive",
    "plugin_verify",
    "profile_steps",
    "prompt",
    "reset",
    "restore",
    "tb_bind_all",
    "tb_server",
    "test_only",
    "watchdog",
];

/// Smallest values of numbers that cannot be just any.
pub(super) const MINIMUM: &[(&str, f64)] = &[
    ("adam.eps", 0.0),
    ("batch_size", 1.0),
    ("debug_plot_interval", 1.0),
    ("details_log_interval", 1.0),
    ("distributed_timeout", 1.0),
    ("grad_clip", 0.0),
    ("keep_last", 1.0),
    ("log_interval", 1.0),
    ("lr", 0.0),
    ("lr_sched.gamma", 0.0),
    ("lr_warmup", 0.0),
    ("min_lr_multiplier", 0.0),
    ("n_microbatch", 1.0),
    ("n_samples", 0.0),
    ("nan_budget", 0.0),
    ("overfit_batches", 1.0),
    ("per_device_batch_size", 1.0),
    ("sample_length", 1.0),
    ("sample_temperature", 0.0),
    ("sample_top_k", 1.0),
    ("save_interval", 1.0),
    ("stop_after", 0.0),
    ("test_batch_size", 1.0),
    ("test_interval", 1.0),
    ("threads", 1.0),
    ("watchdog", 0.0),
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
    ArgSpec::text("plugin_verify", "warn")
        .choices("strict|warn|off")
        .field("")
        .help("Plugins that `plugins.lock` does not name with their SHA-256: refuse, warn if changed, or do not look"),
    ArgSpec::text("restore", "")
        .optional()
        .help("Checkpoint to start from, or a folder with checkpoints"),
    ArgSpec::flag("reset", "0").help("Start anew: remove what an earlier run of this name left"),
    ArgSpec::text("load_pretrained_model", "")
        .optional()
        .field("pretrained")
        .help("Start from these weights: a checkpoint's folder, or a `.safetensors` file"),
    ArgSpec::flag("test_pretrained", "1")
        .help("Validate after `-load_pretrained_model`, before training"),
    ArgSpec::flag("test_only", "0").help("Validate once, print the scores as JSON, and end"),
    ArgSpec::flag("dry_run", "0")
        .help("Build everything, make one step, print plan, memory and speed; save nothing"),
    ArgSpec::flag("keep_alive", "0").help("Stay after the end, until SIGINT or SIGTERM"),
    ArgSpec::int("sweep_id_for_grid_search", "0")
        .field("sweep_id")
        .help("No effect of its own, so that a grid can repeat a run; folder below `-load_pretrained_model`"),
    ArgSpec::text("save_dir", "save").help("Folder of all runs"),
    ArgSpec::text("data.cache_dir", "cache")
        .field("cache_dir")
        .help("Folder of tokenizers and tokenized data"),
    ArgSpec::int("seed", "none")
        .optional()
        .help("Fixes all random numbers"),
    ArgSpec::flag("deterministic", "0")
        .help("Only operations that give the same bits each time; those that cannot are errors"),
    ArgSpec::flag("cuda_graphs", "0")
        .help("Launch the passes of a step as one piece, where the CPU is slower than the GPU; activations take their memory twice"),
    ArgSpec::flag("compat", "0")
        .help("Repeat the reference's quirks, to compare with it or with its checkpoints"),
    // The machine.
    ArgSpec::text("gpu", "auto")
        .help("Index of the GPU; `auto` takes a free one, `none` the CPU"),
    ArgSpec::int("threads", "none")
        .optional()
        .help("CPU threads of a tensor operation"),
    ArgSpec::float("distributed_timeout", "600")
        .unit("s")
        .help("Of several processes: how long each waits for the others before it ends"),
    ArgSpec::text("dtype", "f32")
        .choices("f32|f64")
        .help("Type of the parameters"),
    ArgSpec::flag("amp", "0").help("Compute in 16 bits where that is safe, on a GPU"),
    ArgSpec::flag("bfloat16", "1")
        .help("With `-amp`: bfloat16 rather than float16, where the GPU has it"),
    // Reports and checkpoints.
    ArgSpec::text("log", "tb")
        .choices("tb|wandb|all|none")
        .help("Where metrics go besides `metrics.jsonl`: TensorBoard, Weights & Biases, both, or nowhere"),
    ArgSpec::text("tb_server", "auto")
        .choices("auto|1|0")
        .help("With `-log tb` and `all`: a TensorBoard server while the run lasts; `auto` starts it in a terminal"),
    ArgSpec::flag("tb_bind_all", "0").help("Let other machines look at the TensorBoard server"),
    ArgSpec::text("wandb_project", "none")
        .optional()
        .help("Project in Weights & Biases; `none` takes `WANDB_PROJECT`, or `lm`"),
    ArgSpec::flag("wandb_bug_workaround", "0")
        .field("wandb_drops_tables")
        .help("Send no tables to Weights & Biases"),
    ArgSpec::int("log_interval", "20")
        .unit("steps")
        .help("Metrics are averaged over so many steps"),
    ArgSpec::int("details_log_interval", "100")
        .optional()
        .field("reports.details_interval")
        .unit("steps")
        .help("Charts and costly statistics each so many steps"),
    ArgSpec::int("debug_plot_interval", "none")
        .optional()
        .field("reports.map_interval")
        .unit("steps")
        .help("Attention maps each so many steps"),
    ArgSpec::int("plot.n_steps", "-128")
        .field("reports.n_map_steps")
        .unit("positions")
        .help("Size of an attention map: the last so many positions if negative, the first if positive, all if 0"),
    ArgSpec::flag("transformer.plot_head_details", "0")
        .field("reports.has_head_maps")
        .help("With `-debug_plot_interval`: a map for each head, with the experts that it selects"),
    ArgSpec::flag("val_log_details", "0")
        .field("reports.logs_validation")
        .help("Log what layers report during validation, below `validation/<set>/`"),
    ArgSpec::flag("dump_logs", "0")
        .field("reports.dumps")
        .help("Write how often experts are selected, each step, below `export/log_dumps/`"),
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
    ArgSpec::float("lm.state_drop_probability", "0.0")
        .field("memory_drop_probability")
        .unit("fraction")
        .help("Share of microbatches that start with an empty segment memory (`-lm.trafo.context_blocks`)"),
    ArgSpec::flag("length_bucketed_sampling", "0")
        .field("is_bucketed")
        .help("Put documents of about the same length into a batch; for datasets of documents, not of one stream"),
    ArgSpec::int("overfit_batches", "none")
        .optional()
        .field("n_batches")
        .help("Train on the first so many batches only, again and again: can the model learn at all?"),
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
        .choices("adam|adamw|sgd|adagrad")
        .help("Update rule; the momentum of `sgd` is 0.9"),
    ArgSpec::float("wd", "0.0")
        .field("optimizer.weight_decay")
        .help("Weight decay of all parameters; decoupled for `adamw`, else added to the gradient"),
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
    ArgSpec::flag("shard_optimizer", "0")
        .field("optimizer.is_sharded")
        .help("Of several processes each holds a part of the optimizer's state and updates that part of the parameters"),
    // Regularizers.
    ArgSpec::float("reg", "1.0")
        .field("reg_weight")
        .help("Weight of all regularizers together"),
    ArgSpec::new(ArgKind::FloatMap, "reg_scales", "")
        .help("Weights of single regularizers: `moe=0.5,act_loss=2`"),
    ArgSpec::new(ArgKind::StrList, "reg_lin_decay", "")
        .help("Regularizers that fall linearly to 0 over the training"),
    // When a step goes wrong, and how fast it is.
    ArgSpec::text("nan_policy", "abort")
        .field("non_finite.policy")
        .choices("abort|skip")
        .help("When loss or gradient are not finite: end, or drop that step's update"),
    ArgSpec::float("watchdog", "300")
        .unit("s")
        .help("Name a call into a plugin that does not return for so long, and a process that grows; 0 never"),
    ArgSpec::int("nan_budget", "10")
        .field("non_finite.n_skips")
        .unit("steps")
        .help("With `-nan_policy skip`: drop at most so many in the whole run"),
    ArgSpec::flag("nan_detect", "0")
        .field("non_finite.is_traced")
        .help("Look for what is not finite in every tensor of every step; slow"),
    ArgSpec::text("speedtest", "none")
        .choices("none|iter")
        .help("`iter` waits for the device around each step and logs its exact time"),
    ArgSpec::text("profile_steps", "none")
        .optional()
        .field("profile")
        .help("`10:12` records these steps for a trace viewer: `profile-10-12.json` in the run's folder"),
    ArgSpec::flag("log_grad_norms", "0")
        .field("logs_grad_norms")
        .help("Log the norm of each gradient with each step, after clipping"),
    ArgSpec::float("peak_tflops", "none")
        .optional()
        .unit("10^12/s")
        .help("Peak of the device, for the logged share of it (MFU); known for common GPUs"),
    // Accepted so that the reference's command lines and sweeps run.
    ArgSpec::retired(ArgKind::Bool, "train_baseline", "the method that it calls is not in the reference"),
    ArgSpec::retired(ArgKind::Int, "wandb_save_interval", "the reference never reads it; see `-save_interval`"),
    ArgSpec::retired(ArgKind::Bool, "wandb_sync_checkpoints", "checkpoints stay in the run's folder"),
    ArgSpec::retired(ArgKind::Int, "max_length_per_batch", "only sequence-to-sequence tasks of the reference read it; see `-length_bucketed_sampling`"),
    ArgSpec::retired(ArgKind::Int, "lm.unroll_eval", "only a task that the reference cannot start reads it"),
    ArgSpec::retired(ArgKind::Int, "lm.example_context", "the reference never shows its examples; see `-n_samples`"),
    ArgSpec::retired(ArgKind::Int, "lm.example_window", "the reference never shows its examples; see `-sample_length`"),
    ArgSpec::retired(ArgKind::Str, "dump_validation_plots", "the reference never reaches the code that reads it"),
];
