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
    dataset  c4                         0.1.0    1.4  -         [sandbox]/bin/plugins/libmoeut_dataset_c4.so
    kernel   grouped                    0.1.0    1.4  2.11.0    [sandbox]/bin/plugins/libmoeut_kernel_grouped.so
    kernel   reference                  0.1.0    1.4  2.11.0    [sandbox]/bin/plugins/libmoeut_kernel_reference.so
    model    moeut                      0.1.0    1.4  2.11.0    [sandbox]/bin/plugins/libmoeut_model_moeut.so
    task     moeut_c4 (c4_transformer)  0.1.0    1.4  -         [sandbox]/bin/plugins/libmoeut_task_moeut_c4.so
    --- stderr
    ");
    let file = sandbox.installed().join(TASK);
    let bytes = fs::read(&file).unwrap();
    fs::remove_file(&file).unwrap();
    assert_snapshot!(list(), @r"
    exit: 0
    --- stdout
    KIND     NAME       VERSION  ABI  LIBTORCH  FILE
    dataset  c4         0.1.0    1.4  -         [sandbox]/bin/plugins/libmoeut_dataset_c4.so
    kernel   grouped    0.1.0    1.4  2.11.0    [sandbox]/bin/plugins/libmoeut_kernel_grouped.so
    kernel   reference  0.1.0    1.4  2.11.0    [sandbox]/bin/plugins/libmoeut_kernel_reference.so
    model    moeut      0.1.0    1.4  2.11.0    [sandbox]/bin/plugins/libmoeut_model_moeut.so
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
           moeut-host launch -n <processes> -task … -name … […]           train with several processes on this machine
           moeut-host plugins list|show|verify|lock|new|pack|install|…    what is found, and where; files to trust; a start
           moeut-host config show -task <task> [-<argument> <value> …]    every argument and where its value is from
           moeut-host checkpoint info|convert|export                      what one holds; from and to Python
           moeut-host generate -name <name> -prompt <text>                a trained model continues a text
           moeut-host eval -name <name> -sets all -data.dir <folder>      how well it finds the right one of several texts
           moeut-host model show -task <task> [-<argument> <value> …]     size, cost and layers of the model; --json
           moeut-host sweep show|run|slurm|results|convert <file>         the runs of a sweep file: looked at, or trained
           moeut-host report <run folder> … [-out <file>]                 one HTML page of runs: curves, charts, differences
           moeut-host bench step|moe|attention|data                       how fast training, layers and data are here; --json
           moeut-host doctor                                              what is wrong with this machine, and the fix
           moeut-host --help [-task <task>]                               every argument
           moeut-host --version                                           of the program, the plugin ABI and libtorch

    Everywhere: -q (--quiet) warnings, errors and results only; -v (--verbose) what plugins say to find a fault, too.
    --- stderr
    ");
}

#[test]
fn versions_are_those_that_doctor_says() {
    let sandbox = Sandbox::bare();
    let versions = sandbox.run(&["--version"]).ok().stdout;
    assert_eq!(versions.lines().count(), 2, "{versions}");
    let doctor = sandbox.run(&["doctor"]).ok().stdout;
    assert!(doctor.starts_with(&versions), "{doctor}");
}

#[test]
fn help_without_plugins_has_the_hosts_arguments() {
    assert_snapshot!("help", Sandbox::bare().run(&["--help"]));
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
  ╰─▶ known profiles: `demo`, `small`
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
      ╰─▶ commands are `launch`, `plugins`, `config show`, `model show`, `checkpoint`, `generate`,
          `eval`, `sweep`, `report`, `bench` and `doctor`; without one it trains
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
