//! What the program says to input that it cannot use: one table, one text for each row.
//!
//! Every row must end with exit code 2 and say what, why and fix. The texts are in `snapshots/`; after a change,
//! `INSTA_UPDATE=always cargo xtask test --test bad_input` writes them anew, and `git diff` shows what a user will see.

use insta::assert_snapshot;
use moeut_e2e::{Outcome, Sandbox, checkpoint_files, tiny};
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A start of the program takes about a quarter of a second on one core.
const N_THREADS: usize = 2;

/// Added to the arguments of a run that would otherwise do two steps.
const ROWS: &[&str] = &[
    // What is no pair of flag and value.
    "-batchsize 4",
    "-moe.att.se 1",
    "-test_ 5",
    "-lr",
    "-lr -batch_size 4",
    "stray -lr 1",
    "-lr 1 2",
    // The run.
    "-task moeut_c5",
    "-task c4",
    "-task moeut_c4@nope",
    "-name none",
    "-name ../x",
    "-name a/b",
    "-name .",
    "-profile dmeo",
    "-plugin_dir nowhere",
    "-reset again",
    "-reset 2",
    "-reset -1",
    "-test_only 1",
    "-test_only maybe",
    "-dry_run 2",
    "-keep_alive yess",
    "-load_pretrained_model no/such.pth",
    "-load_pretrained_model a-file",
    "-load_pretrained_model empty",
    "-load_pretrained_model save/good/checkpoint/model-2 -state_size 16",
    "-test_pretrained 3",
    "-sweep_id_for_grid_search first",
    "-save_dir a-file",
    "-data.cache_dir a-file",
    "-seed one",
    "-seed 99999999999999999999",
    "-compat maybe",
    "-deterministic 2",
    // The machine.
    "-gpu first",
    "-gpu -1",
    "-threads 0",
    "-threads all",
    "-dtype f16",
    "-amp some",
    "-bfloat16 half",
    // Reports and checkpoints.
    "-log csv",
    "-tb_server maybe",
    "-tb_bind_all all",
    "-log_interval 0",
    "-log_interval often",
    "-details_log_interval 0",
    "-debug_plot_interval often",
    "-plot.n_steps last",
    "-save_interval 0",
    "-save_interval 1.5",
    "-keep_last 0",
    "-test_interval 0",
    "-n_samples -1",
    "-sample_length 0",
    "-sample_temperature -1",
    "-sample_temperature hot",
    "-sample_top_k 0",
    "-sample_top_p 0",
    "-sample_top_p 1.5",
    "-speedtest step",
    "-log_grad_norms 2",
    "-peak_tflops 0",
    "-peak_tflops fast",
    // Batches.
    "-stop_after -1",
    "-stop_after soon",
    "-batch_size 0",
    "-batch_size 1e5",
    "-n_microbatch 0",
    "-n_microbatch 9 -batch_size 4",
    "-per_device_batch_size 0",
    "-n_microbatch 2 -per_device_batch_size 2",
    "-test_batch_size 0",
    "-overfit_batches 0",
    "-nan_policy ignore",
    "-nan_budget -1",
    "-nan_detect 2",
    // Learning rate, optimizer, regularizers.
    "-lr fast",
    "-lr -1",
    "-lr nan",
    "-lr_sched.type linear",
    "-lr_sched.type cos -stop_after none",
    "-lr_warmup -1",
    "-min_lr_multiplier -1",
    "-min_lr_multiplier 2",
    "-lr_sched.steps 1,-2",
    "-lr_sched.steps 1,x",
    "-lr_sched.gamma x",
    "-lr_sched.gamma -1",
    "-optimizer lion",
    "-optimizer AdamW",
    "-wd -1",
    "-grad_clip -1",
    "-adam.betas 0.9",
    "-adam.betas 1,2",
    "-adam.betas 0.9,0.99,0.999",
    "-adam.betas a,b",
    "-adam.eps small",
    "-adam.eps -1",
    "-reg much",
    "-reg_scales moe",
    "-reg_scales mo=1",
    "-reg_lin_decay moe -moe.perplexity_reg 0.01 -stop_after none",
    "-reg_lin_decay mo -moe.perplexity_reg 0.01",
    // The task and its data.
    "-lm.unroll 0",
    "-lm.unroll -3",
    "-lm.unroll long",
    "-lmds.valid_ratio 2",
    "-data.source web",
    "-data.dir nowhere",
    "-sentencepiece.n_pieces many",
    "-sentencepiece.n_pieces -3",
    "-sentencepiece.n_pieces 3",
    "-sentencepiece.n_pieces 100000",
    // The model.
    "-state_size 0",
    "-state_size wide",
    "-transformer.encoder_n_layers 0",
    "-transformer.variant dense",
    "-transformer.variant preln_moe_univrsal",
    "-transformer.universal.group_size 3",
    "-transformer.universal.group_size 0",
    "-transformer.universal.group_type abba",
    "-transformer.n_heads 0",
    "-transformer.n_heads 3",
    "-transformer.head_projection_size 0",
    "-transformer.activation swish",
    "-transformer.p_drop_layer 2",
    "-dropout 1",
    "-dropout 2",
    "-rope.rotate_fraction 2",
    "-rope.base 0",
    "-lm.trafo.context_blocks -1",
    "-lm.state_drop_probability 2",
    "-moe.kernel best",
    "-moe.n_experts 0",
    "-moe.expert_size 0",
    "-pkm.n_heads 5",
    "-moe.selection_mode tanh",
    "-moe.drop_expert 1",
    "-moe.perplexity_reg_mode never",
    "-moe.att.enable 1 -moe.att.k 5",
    "-moe.att.n_experts 0",
    "-moe.att.v_size 0",
    "-moe.att.drop_expert -0.5",
    // Checkpoints and folders of runs; `good` has one of step 2, in `torn` and `cut` it is damaged.
    "-restore nowhere",
    "-restore a-file",
    "-restore none.pth",
    "-restore no.pth",
    "-restore empty",
    "-restore save/torn/checkpoint/model-2",
    "-restore save/torn/checkpoint",
    "-name torn",
    "-name cut",
    "-name garbled-args",
    "-name a-file",
    "-name good -profile demo",
    "-restore save",
    "-restore save/good/checkpoint -state_size 16",
    "-restore save/good/checkpoint -transformer.variant moe_universal",
    "-restore save/good/checkpoint -moe.att.enable 1",
    "-name good -moe.bias 1",
];

#[test]
fn every_mistake_gets_what_why_and_fix() {
    let sandbox = Sandbox::new();
    prepare(&sandbox).unwrap();
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(ROWS.iter().map(|_| None).collect::<Vec<_>>());
    std::thread::scope(|scope| {
        for _ in 0..N_THREADS {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(row) = ROWS.get(index) else { break };
                    let outcome = outcome(&sandbox, &format!("row-{index}"), row);
                    outcomes.lock().unwrap()[index] = Some(outcome);
                }
            });
        }
    });

    let (mut table, mut accepted) = (String::new(), String::new());
    for (row, outcome) in ROWS.iter().zip(outcomes.into_inner().unwrap()) {
        match parts(&outcome.unwrap()) {
            Ok(text) => writeln!(table, "{row}\n{text}").unwrap(),
            Err(outcome) => writeln!(accepted, "{row}: {outcome}").unwrap(),
        }
    }
    assert!(accepted.is_empty(), "{accepted}");
    assert_snapshot!("bad_input", table);
    // None of this may have touched the good run.
    checkpoint_files(&sandbox.run_folder("good"), 2);
}

/// Starts the run that the row is about.
fn outcome(sandbox: &Sandbox, name: &str, row: &str) -> Outcome {
    let words: Vec<&str> = row.split(' ').collect();
    sandbox.run(&tiny(name, &[&["-stop_after", "2"], &words[..]].concat()).as_strs())
}

/// The error, if it has exit code 2 and all three parts; without them, the outcome as it is.
fn parts(outcome: &Outcome) -> Result<&str, &Outcome> {
    let start = outcome.stderr.find("Error: ").unwrap_or(0);
    let error = &outcome.stderr[start..];
    let has_all = ["Error:   × ", "\n  ╰─▶ ", "\n  help: "]
        .iter()
        .all(|part| error.contains(part));
    if has_all && outcome.code == Some(2) {
        Ok(error.trim_start_matches("Error: ").trim_start_matches(' '))
    } else {
        Err(outcome)
    }
}

/// What some rows stumble over.
fn prepare(sandbox: &Sandbox) -> io::Result<()> {
    let work = sandbox.work();
    let write = |path: &str, text: &str| fs::write(work.join(path), text);
    write("a-file", "")?;
    write("no.pth", "weights")?;
    fs::create_dir(work.join("empty"))?;
    let good = tiny("good", &["-stop_after", "2"]);
    sandbox.run(&good.as_strs()).ok();
    for name in ["torn", "cut"] {
        copy(&work.join("save/good"), &work.join("save").join(name))?;
    }
    write("save/torn/checkpoint/model-2/optimizer.safetensors", "")?;
    write("save/cut/checkpoint/model-2/MANIFEST.json", "{")?;
    fs::create_dir(work.join("save/garbled-args"))?;
    write("save/garbled-args/args.json", "{")?;
    write("save/a-file", "")
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

#[test]
fn without_the_plugin_that_is_needed() {
    let sandbox = Sandbox::new();
    fs::remove_file(sandbox.installed().join(moeut_e2e::MODEL)).unwrap();
    let no_model = sandbox.run(&["-task", "moeut_c4", "-name", "a", "-gpu", "none"]);
    assert_snapshot!(parts(&no_model).unwrap(), @r"
    × unknown model `moeut`
      ╰─▶ found no models at all
      help: `moeut-host plugins list` shows what there is, `moeut-host doctor` what is wrong
    ");
    let elsewhere =
        Sandbox::bare().run(&["-task", "moeut_c4", "-name", "a", "-plugin_dir", "nowhere"]);
    assert_snapshot!(parts(&elsewhere).unwrap(), @r"
    × invalid value for `-plugin_dir`
      ╰─▶ `nowhere` is no folder
      help: set `-plugin_dir` to folders with plugins, or leave it out
    ");
}
