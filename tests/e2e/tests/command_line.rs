//! What the program says when it is asked, or asked wrongly.

use insta::assert_snapshot;
use moeut_e2e::{Sandbox, TASK};
use std::fs;

#[test]
fn plugins_list_follows_the_folder() {
    let sandbox = Sandbox::new();
    let list = || sandbox.run(&["plugins", "list"]);
    let full = list().to_string();
    assert_snapshot!(full, @r"
    exit: 0
    --- stdout
    KIND     NAME                       VERSION  ABI  LIBTORCH  FILE
    dataset  c4                         0.1.0    1.1  -         [sandbox]/bin/plugins/libmoeut_dataset_c4.so
    kernel   grouped                    0.1.0    1.1  2.11.0    [sandbox]/bin/plugins/libmoeut_kernel_grouped.so
    kernel   reference                  0.1.0    1.1  2.11.0    [sandbox]/bin/plugins/libmoeut_kernel_reference.so
    model    moeut                      0.1.0    1.1  2.11.0    [sandbox]/bin/plugins/libmoeut_model_moeut.so
    task     moeut_c4 (c4_transformer)  0.1.0    1.1  -         [sandbox]/bin/plugins/libmoeut_task_moeut_c4.so
    --- stderr
    ");
    let file = sandbox.installed().join(TASK);
    let bytes = fs::read(&file).unwrap();
    fs::remove_file(&file).unwrap();
    assert_snapshot!(list(), @r"
    exit: 0
    --- stdout
    KIND     NAME       VERSION  ABI  LIBTORCH  FILE
    dataset  c4         0.1.0    1.1  -         [sandbox]/bin/plugins/libmoeut_dataset_c4.so
    kernel   grouped    0.1.0    1.1  2.11.0    [sandbox]/bin/plugins/libmoeut_kernel_grouped.so
    kernel   reference  0.1.0    1.1  2.11.0    [sandbox]/bin/plugins/libmoeut_kernel_reference.so
    model    moeut      0.1.0    1.1  2.11.0    [sandbox]/bin/plugins/libmoeut_model_moeut.so
    --- stderr
    ");
    fs::write(&file, bytes).unwrap();
    assert_eq!(list().to_string(), full);
}

#[test]
fn no_plugins() {
    assert_snapshot!(Sandbox::bare().run(&["plugins", "list"]), @r"
    exit: 0
    --- stdout
    no plugins
    --- stderr
    ");
}

#[test]
fn nothing_typed_shows_how_to_use_it() {
    assert_snapshot!(Sandbox::bare().run(&[]), @r"
    exit: 0
    --- stdout
    usage: moeut-host -task <task> -name <name> [-<argument> <value> …]   train
           moeut-host plugins list                                        what is found, and where
           moeut-host config show -task <task> [-<argument> <value> …]    every argument and where its value is from
           moeut-host checkpoint info|convert|export                      what one holds; from and to Python
           moeut-host generate -name <name> -prompt <text>                a trained model continues a text
           moeut-host model show -task <task> [-<argument> <value> …]     size, cost and layers of the model; --json
           moeut-host doctor                                              what is wrong with this machine, and the fix
           moeut-host --help [-task <task>]                               every argument
    --- stderr
    ");
}

#[test]
fn help_without_plugins_has_the_hosts_arguments() {
    assert_snapshot!(Sandbox::bare().run(&["--help"]), @r#"
    exit: 0
    --- stdout
    usage: moeut-host -task <task> -name <name> [-<argument> <value> …]   train
           moeut-host plugins list                                        what is found, and where
           moeut-host config show -task <task> [-<argument> <value> …]    every argument and where its value is from
           moeut-host checkpoint info|convert|export                      what one holds; from and to Python
           moeut-host generate -name <name> -prompt <text>                a trained model continues a text
           moeut-host model show -task <task> [-<argument> <value> …]     size, cost and layers of the model; --json
           moeut-host doctor                                              what is wrong with this machine, and the fix
           moeut-host --help [-task <task>]                               every argument

    host:
      -task <text|none>                   Which task to train [default none]
      -name <text|none>                   Name of the run; its files are in `<save_dir>/<name>` [default none]
      -profile <text,…>                   Named bundles of arguments; later ones override [default none]
      -plugin_dir <text,…>                Folders with plugins, besides the one beside the program [default ""]
      -restore <text|none>                Checkpoint to start from, or a folder with checkpoints [default ""]
      -reset <0|1>                        Start anew: remove what an earlier run of this name left [default 0]
      -load_pretrained_model <text|none>  Start from these weights: a checkpoint's folder, or a `.safetensors`
                                          file [default ""]
      -test_pretrained <0|1>              Validate after `-load_pretrained_model`, before training [default 1]
      -test_only <0|1>                    Validate once, print the scores as JSON, and end [default 0]
      -dry_run <0|1>                      Build everything, make one step, print plan, memory and speed; save
                                          nothing [default 0]
      -keep_alive <0|1>                   Stay after the end, until SIGINT or SIGTERM [default 0]
      -sweep_id_for_grid_search <int>     No effect of its own, so that a grid can repeat a run; folder below
                                          `-load_pretrained_model` [default 0]
      -save_dir <text>                    Folder of all runs [default save]
      -data.cache_dir <text>              Folder of tokenizers and tokenized data [default cache]
      -seed <int|none>                    Fixes all random numbers [default none]
      -deterministic <0|1>                Only operations that give the same bits each time; those that cannot are
                                          errors [default 0]
      -compat <0|1>                       Repeat the reference's quirks, to compare with it or with its
                                          checkpoints [default 0]
      -gpu <text>                         Index of the GPU; `auto` takes a free one, `none` the CPU [default auto]
      -threads <int|none>                 CPU threads of a tensor operation [default none]
      -dtype <f32|f64>                    Type of the parameters [default f32]
      -amp <0|1>                          Compute in 16 bits where that is safe, on a GPU [default 0]
      -bfloat16 <0|1>                     With `-amp`: bfloat16 rather than float16, where the GPU has it
                                          [default 1]
      -log <tb|wandb|all|none>            Where metrics go besides `metrics.jsonl`; `wandb` and `all` are
                                          TensorBoard only, for now [default tb]
      -log_interval <int>                 Metrics are averaged over so many steps [steps; default 20]
      -save_interval <int|none>           A checkpoint each so many steps [steps; default 5000]
      -keep_last <int>                    How many checkpoints stay [checkpoints; default 1]
      -test_interval <int>                Validation each so many steps [steps; default 1000]
      -n_samples <int>                    Prompts to continue at the end of training [default 3]
      -sample_length <int>                Length of a continuation [tokens; default 100]
      -sample_temperature <float>         Randomness of continuations; 0 takes the likeliest token [default 0.8]
      -sample_top_k <int|none>            Continuations choose among so many likeliest tokens
                                          [tokens; default none]
      -sample_top_p <float>               And among the likeliest of these that have this share of the probability
                                          [fraction; default 1.0]
      -prompt <text|none>                 Text to continue, instead of the task's prompts [default none]
      -stop_after <int|none>              Length of the training [steps; default none]
      -batch_size <int>                   Sequences in one step, over all devices [sequences; default 128]
      -n_microbatch <int|none>            Parts of a batch, one after the other, to save memory [default none]
      -per_device_batch_size <int|none>   Instead of `-n_microbatch`: the most that a device takes at once
                                          [sequences; default none]
      -test_batch_size <int|none>         Batch of the validation; `none` takes that of the training
                                          [sequences; default none]
      -lm.state_drop_probability <float>  Share of microbatches that start with an empty segment memory
                                          (`-lm.trafo.context_blocks`) [fraction; default 0.0]
      -overfit_batches <int|none>         Train on the first so many batches only, again and again: can the model
                                          learn at all? [default none]
      -lr <float>                         Peak learning rate [default 1e-3]
      -lr_sched.type <step|noam|cos>      Learning rate over time [default step]
      -lr_warmup <int>                    Length of the linear warm-up [steps; default 0]
      -min_lr_multiplier <float>          `cos`: last learning rate, as a fraction of `-lr` [default 0.0]
      -lr_sched.steps <int,…>             `step`: when the learning rate falls [steps; default ""]
      -lr_sched.gamma <float>             `step`: factor by which it falls [default 0.1]
      -optimizer <adam|adamw|sgd|adagrad>
                                          Update rule; the momentum of `sgd` is 0.9 [default adamw]
      -wd <float>                         Weight decay of all parameters; decoupled for `adamw`, else added to the
                                          gradient [default 0.0]
      -grad_clip <float|none>             Largest norm of the gradient of all parameters together [default 1.0]
      -adam.betas <float,…>               Decay of the averages of gradient and squared gradient
                                          [default 0.9,0.999]
      -adam.eps <float>                   Added to the root of the squared gradient [default 1e-8]
      -reg <float>                        Weight of all regularizers together [default 1.0]
      -reg_scales <key=float,…>           Weights of single regularizers: `moe=0.5,act_loss=2` [default ""]
      -reg_lin_decay <text,…>             Regularizers that fall linearly to 0 over the training [default ""]
      -nan_policy <abort|skip>            When loss or gradient are not finite: end, or drop that step's update
                                          [default abort]
      -nan_budget <int>                   With `-nan_policy skip`: drop at most so many in the whole run
                                          [steps; default 10]
      -nan_detect <0|1>                   Look for what is not finite in every tensor of every step; slow
                                          [default 0]
      -speedtest <none|iter>              `iter` waits for the device around each step and logs its exact time
                                          [default none]
      -log_grad_norms <0|1>               Log the norm of each parameter's gradient, after clipping [default 0]
      -peak_tflops <float|none>           Peak of the device, for the logged share of it (MFU); known for common
                                          GPUs [10^12/s; default none]
      accepted without effect             -train_baseline -wandb_save_interval -wandb_bug_workaround
                                          -wandb_sync_checkpoints -fs_cache_pattern -length_bucketed_sampling
                                          -max_length_per_batch -lm.unroll_eval -lm.example_context
                                          -lm.example_window -val_log_details -dump_logs -dump_validation_plots
                                          -debug_plot_interval -details_log_interval -lm.eval.enabled
                                          -thestack.languages
    --- stderr
    "#);
}

#[test]
fn help_has_a_group_for_each_component() {
    let text = Sandbox::new().run(&["--help"]).ok().stdout;
    for argument in [
        "-lr ",
        "-lm.unroll",
        "-moe.n_experts",
        "-sentencepiece.n_pieces",
        "-profile",
    ] {
        assert!(text.contains(argument), "{argument} is missing in\n{text}");
    }
}

/// Which values the profile sets is no business of this test: they change with every measurement.
#[test]
fn config_show_says_where_each_value_is_from() {
    let text = Sandbox::new()
        .run(&[
            "config",
            "show",
            "-task",
            "moeut_c4",
            "-profile",
            "demo",
            "-lr=1e-4",
            "--batch_size",
            "8",
        ])
        .ok()
        .stdout;
    for line in [
        "task = moeut_c4  # command line",
        "lr = 1e-4  # command line",
        "batch_size = 8  # command line",
        "dtype = f32  # default",
        "data.source = embedded  # profile `demo`",
    ] {
        assert!(
            text.lines().any(|shown| shown == line),
            "{line} is missing in\n{text}"
        );
    }
}

/// The rest of the report is about the machine.
#[test]
fn doctor_shows_folders_and_what_is_wrong_in_them() {
    let sandbox = Sandbox::new();
    sandbox.drop_in("plugins", "x.so", b"garbage");
    let text = sandbox.run(&["doctor"]).ok().stdout;
    for part in [
        "libtorch     2.11.0",
        "[sandbox]/bin/plugins (beside the executable): 5 libraries",
        "plugins (the current folder): 1 libraries",
        "problem: plugin file `plugins/x.so` is refused",
        "fix: copy or build `plugins/x.so` anew",
    ] {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
}

#[test]
fn a_misspelled_argument() {
    assert_snapshot!(Sandbox::new().run(&["-task", "moeut_c4", "-name", "a", "-batchsize", "4"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × unknown argument `-batchsize`
      ╰─▶ neither the host nor a component of this task has an argument that begins so
      help: did you mean `-batch_size`?
    ");
}

#[test]
fn an_ambiguous_abbreviation() {
    assert_snapshot!(Sandbox::bare().run(&["-lr_sched", "cos", "-name", "a"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × ambiguous argument `-lr_sched`
      ╰─▶ it may stand for `-lr_sched.gamma`, `-lr_sched.steps`, `-lr_sched.type`
      help: write more of the name
    ");
}

#[test]
fn a_value_of_the_wrong_kind() {
    assert_snapshot!(Sandbox::bare().run(&["-batch_size", "many", "-name", "a"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × invalid value for `-batch_size`
      ╰─▶ `many` is not a whole number (from: command line)
      help: set `-batch_size` to a whole number
    ");
}

#[test]
fn a_value_that_is_no_choice() {
    assert_snapshot!(Sandbox::bare().run(&["-lr_sched.type", "cosine", "-name", "a"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × invalid value for `-lr_sched.type`
      ╰─▶ `cosine` is not one of step, noam, cos (from: command line)
      help: set `-lr_sched.type` to one of step, noam, cos
    ");
}

#[test]
fn a_value_out_of_range() {
    assert_snapshot!(Sandbox::bare().run(&["-batch_size", "0", "-name", "a"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × invalid value for `-batch_size`
      ╰─▶ `0` is not 1 or more (from: command line)
      help: set `-batch_size` to 1 or more
    ");
}

#[test]
fn an_unknown_profile() {
    assert_snapshot!(Sandbox::new().run(&["-task", "moeut_c4", "-name", "a", "-profile", "dmeo"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × unknown profile `dmeo`
      ╰─▶ known profiles: `demo`
      help: run `moeut-host --help` with this `-task` for its profiles
    ");
}

#[test]
fn a_run_without_a_name() {
    assert_snapshot!(Sandbox::new().run(&["-task", "moeut_c4"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × the run has no name
      ╰─▶ its checkpoints and logs go to `save/<name>`, and `-name` is missing
      help: add `-name`, for instance `-name first`
    ");
}

#[test]
fn a_run_without_a_task() {
    assert_snapshot!(Sandbox::bare().run(&["-name", "a", "-gpu", "none"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × no task is named
      ╰─▶ `-task` is missing
      help: type `moeut-host -task moeut_c4 -name <name>`; `moeut-host plugins list` shows all tasks
    ");
}

#[test]
fn an_unknown_command() {
    assert_snapshot!(Sandbox::bare().run(&["plugin", "list"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × unknown command `plugin list`
      ╰─▶ commands are `plugins list`, `config show`, `model show`, `checkpoint`, `generate` and
          `doctor`; without one it trains
      help: type `moeut-host --help`
    ");
}

#[test]
fn model_show_counts_without_data() {
    let args = ["model", "show", "-task", "moeut_c4", "-profile", "demo"];
    let sandbox = Sandbox::new();
    let text = sandbox.run(&args).ok().stdout;
    let first: Vec<&str> = text.lines().take(12).collect();
    assert_snapshot!(first.join("\n"), @r"
    model `moeut`, 128 tokens per sequence, vocabulary 8000

    parameters (n_params)                            3445824
      routers                                          12288
      norms                                             1280
      attention                                       327680
      feed-forward                                   1048576
      embedding                                      1024000
      output                                         1032000
    in distinct layers (n_model_weights)             1389568
    in attention (n_attention_weights)                336384
    with gradients and AdamW's averages              55.1 MB
    ");
    let json = sandbox.run(&[&args[..], &["--json"]].concat()).ok().stdout;
    assert!(json.contains(r#""n_params":3445824"#), "{json}");
    assert!(!sandbox.work().join("cache").exists());
}

#[test]
fn a_misspelled_variant_names_all_variants() {
    let show = |variant| {
        let args = [
            "config",
            "show",
            "-task",
            "moeut_c4",
            "-transformer.variant",
            variant,
        ];
        Sandbox::new().run(&args)
    };
    assert_snapshot!(show("prelm_rope"), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × unknown variant `prelm_rope`
      ╰─▶ the variants are `moe`, `preln_moe`, `moe_universal`, `preln_moe_universal`,
          `preln_moe_parallel`, `rope`, `preln_rope`, `preln_rope_parallel`, `rope_universal`,
          `preln_rope_universal`, `sut_universal`, `preln_sut_universal`, `actsut_universal`,
          `preln_actsut_universal`
      help: set `-transformer.variant` to one of these, or to the name of a model plugin
    ");
    assert_snapshot!(show("gpt"), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × unknown model `gpt`
      ╰─▶ found `moeut`; `-transformer.variant` takes: The model: `[preln_]moe[_universal]`,
          `[preln_]rope[_universal]`, `preln_{moe,rope}_parallel`, `[preln_][act]sut_universal`, or
          the name of any other model plugin
      help: `moeut-host plugins list` shows what there is, `moeut-host doctor` what is wrong
    ");
}

#[test]
fn a_task_refuses_its_arguments() {
    let sandbox = Sandbox::new();
    let outcome = sandbox.run(&[
        "-task",
        "moeut_c4",
        "-name",
        "a",
        "-gpu",
        "none",
        "-lm.unroll",
        "0",
    ]);
    assert_snapshot!(outcome.stderr, @r"
    Error:   × `lm.unroll` is 0
      ╰─▶ a sequence needs at least one token
      help: set `-lm.unroll` to 1 or more; the paper uses 1024
    ");
}
