//! `moeut-paper`: tables and figures from runs, whole ones only, and made once.
#![expect(
    clippy::unwrap_used,
    reason = "what tests share panics where a test would"
)]

use moeut_e2e::{read, staged_plugins};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

/// What the program said.
struct Said {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Runs `moeut-paper` in a folder. It lies beside the host and its plugins.
fn paper(folder: &Path, args: &[&str]) -> Said {
    paper_with(folder, args, &[])
}

fn paper_with(folder: &Path, args: &[&str], variables: &[(&str, &str)]) -> Said {
    let output = Command::new(staged_plugins().with_file_name("moeut-paper"))
        .args(args)
        .current_dir(folder)
        .env("NO_COLOR", "1")
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Said {
        code: output.status.code(),
        stdout: text(&output.stdout),
        stderr: text(&output.stderr),
    }
}

fn repo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Parameters, parameters of the layers, and forward multiply-accumulates of one sequence in 10⁹. The reference's scripts
/// count none for SUT.
const SIZES: &[(&str, u64, u64, &str)] = &[
    (
        "c4_baseline_1b_rope_nodrop",
        1_044_300_608,
        1_019_713_536,
        "1159.641",
    ),
    (
        "c4_baseline_big_rope_nodrop",
        243_568_700,
        227_174_652,
        "271.111",
    ),
    (
        "c4_baseline_bigger_rope_nodrop",
        319_293_584,
        302_899_536,
        "361.482",
    ),
    (
        "c4_baseline_gigantic_rope_nodrop",
        728_694_080,
        708_203_520,
        "821.412",
    ),
    (
        "c4_baseline_mid_rope_nodrop",
        125_654_336,
        113_356_800,
        "141.734",
    ),
    (
        "c4_baseline_small_rope_long_nodrop",
        44_544_264,
        37_943_440,
        "52.544",
    ),
    (
        "c4_moeut_1b_switchead",
        1_040_319_296,
        1_015_732_224,
        "700.258",
    ),
    (
        "c4_moeut_big_matched_rope_noln_aabb",
        243_326_784,
        226_932_736,
        "162.338",
    ),
    (
        "c4_moeut_big_matched_rope_noln_g1",
        243_589_952,
        227_195_904,
        "170.115",
    ),
    (
        "c4_moeut_big_matched_rope_noln_g18",
        243_844_928,
        227_450_880,
        "136.103",
    ),
    (
        "c4_moeut_big_matched_rope_noln_g3",
        243_844_928,
        227_450_880,
        "159.790",
    ),
    (
        "c4_moeut_big_matched_rope_noln_g6",
        243_844_928,
        227_450_880,
        "157.186",
    ),
    (
        "c4_moeut_big_matched_rope_noln_g9",
        243_844_928,
        227_450_880,
        "156.318",
    ),
    (
        "c4_moeut_big_matched_rope_postln",
        243_324_736,
        226_932_736,
        "162.338",
    ),
    (
        "c4_moeut_big_matched_rope_preln",
        243_326_784,
        226_932_736,
        "162.338",
    ),
    (
        "c4_moeut_big_matched_rope_preln_linear_norot_nosm1",
        243_326_784,
        226_932_736,
        "162.338",
    ),
    (
        "c4_moeut_bigger_matched_rope_nonorm_g24",
        319_661_888,
        303_267_840,
        "181.471",
    ),
    (
        "c4_moeut_bigger_matched_rope_nonorm_g3",
        318_107_456,
        301_713_408,
        "215.218",
    ),
    (
        "c4_moeut_gigantic_switchead",
        727_424_320,
        706_933_760,
        "494.461",
    ),
    (
        "c4_moeut_gigantic_switchead_g36",
        731_228_480,
        710_737_920,
        "413.207",
    ),
    (
        "c4_moeut_mid_matched_rope_noln",
        125_669_696,
        113_372_160,
        "94.504",
    ),
    (
        "c4_moeut_mid_matched_rope_noln_g18",
        126_069_056,
        113_771_520,
        "80.136",
    ),
    (
        "c4_moeut_small_matched_rope_noln_long",
        44_345_792,
        37_744_968,
        "46.203",
    ),
    (
        "c4_moeut_small_matched_rope_noln_long_g16",
        44_129_080,
        37_528_256,
        "40.738",
    ),
    (
        "c4_moeut_small_matched_rope_postln",
        44_344_968,
        37_744_968,
        "46.203",
    ),
    ("c4_small_sut_lowreg2_fixed_44m", 44_657_100, 38_057_100, ""),
    (
        "c4_sut_big_lessloss2_ffflopmatch_attmatch_actloss",
        244_521_280,
        228_129_280,
        "",
    ),
    (
        "pes2o_baseline_big_rope_nodrop",
        243_568_700,
        227_174_652,
        "271.111",
    ),
    (
        "pes2o_baseline_small_rope_long_nodrop",
        44_544_264,
        37_943_440,
        "52.544",
    ),
    (
        "pes2o_moeut_big_matched_rope_noln",
        243_326_784,
        226_932_736,
        "162.338",
    ),
    (
        "pes2o_moeut_small_matched_rope_noln_long",
        44_345_792,
        37_744_968,
        "46.203",
    ),
    (
        "pes2o_small_sut_lowreg2_fixed_44m",
        44_657_100,
        38_057_100,
        "",
    ),
    (
        "pes2o_sut_big_lessloss2_ffflopmatch_attmatch_actloss",
        244_521_280,
        228_129_280,
        "",
    ),
    (
        "slimpajama_baseline_1b_rope_nodrop",
        1_044_300_608,
        1_019_713_536,
        "1159.641",
    ),
    (
        "slimpajama_baseline_big_rope_nodrop",
        243_568_700,
        227_174_652,
        "271.111",
    ),
    (
        "slimpajama_baseline_small_rope_long_nodrop",
        44_544_264,
        37_943_440,
        "52.544",
    ),
    (
        "slimpajama_moeut_1b_switchead",
        1_040_319_296,
        1_015_732_224,
        "700.258",
    ),
    (
        "slimpajama_moeut_big_matched_rope_noln",
        243_326_784,
        226_932_736,
        "162.338",
    ),
    (
        "slimpajama_moeut_small_matched_rope_noln_long",
        44_345_792,
        37_744_968,
        "46.203",
    ),
    (
        "thestack_baseline_big_rope_nodrop",
        243_568_700,
        227_174_652,
        "271.111",
    ),
    (
        "thestack_baseline_gigantic_rope_nodrop_multilang",
        728_694_080,
        708_203_520,
        "821.412",
    ),
    (
        "thestack_moeut_big_matched_rope_noln",
        243_326_784,
        226_932_736,
        "162.338",
    ),
    (
        "thestack_moeut_gigantic_switchead_multilang",
        727_424_320,
        706_933_760,
        "494.461",
    ),
];

#[test]
fn the_papers_configurations_have_its_sizes_and_costs() {
    let dir = tempfile::tempdir().unwrap();
    let sweeps = repo().join("sweeps");
    let said = paper(dir.path(), &["configurations", sweeps.to_str().unwrap()]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    let mut lines = said.stdout.lines();
    assert_eq!(
        lines.next(),
        Some(
            "Run,Dataset,Model,Size,Parameters,Parameters of the layers,\"MACs, forward\",\"MACs, training\",Norm"
        )
    );
    let found: Vec<(String, u64, u64, String)> = lines
        .map(|line| {
            let cells: Vec<&str> = line.split(',').collect();
            let number = |index: usize| cells[index].parse::<u64>().unwrap();
            let macs = format!("{:.3}", number(6) as f64 / 1e9);
            let macs = if cells[2] == "SUT" {
                String::new()
            } else {
                macs
            };
            (cells[0].to_owned(), number(4), number(5), macs)
        })
        .collect();
    let expected: Vec<_> = SIZES
        .iter()
        .map(|&(name, all, layers, macs)| (name.to_owned(), all, layers, macs.to_owned()))
        .collect();
    assert_eq!(found, expected);
    assert_eq!(
        expected
            .iter()
            .filter(|(.., macs)| !macs.is_empty())
            .count(),
        39
    );
    assert!(said.stdout.contains(",1.7351e18,") && said.stdout.contains(",4.4817e18,"));
}

type Args = BTreeMap<String, String>;

/// The arguments of all sweeps of the paper, and of the ablations whose files were never published.
fn papers_runs() -> BTreeMap<String, Args> {
    let host = staged_plugins().with_file_name("moeut-host");
    let mut runs = BTreeMap::new();
    for entry in fs::read_dir(repo().join("sweeps")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|ending| ending != "yaml") {
            continue;
        }
        let output = Command::new(&host)
            .args(["sweep", "show", path.to_str().unwrap(), "--json"])
            .output()
            .unwrap();
        let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
        let args: Args = serde_json::from_value(shown[0]["parameters"].clone()).unwrap();
        runs.insert(shown[0]["name"].as_str().unwrap().to_owned(), args);
    }
    let base = runs["c4_moeut_big_matched_rope_preln_linear_norot_nosm1"].clone();
    for (ending, flag, value) in [
        ("es256", "moe.expert_size", "256"),
        ("es512", "moe.expert_size", "512"),
        ("es1024", "moe.expert_size", "1024"),
        ("k8", "pkm.n_heads", "8"),
        ("k24", "pkm.n_heads", "24"),
    ] {
        let mut args = base.clone();
        args.insert(flag.to_owned(), value.to_owned());
        runs.insert(format!("c4_moeut_big_matched_rope_noln_{ending}"), args);
    }
    let mut universal = runs["c4_baseline_big_rope_nodrop"].clone();
    for (flag, value) in [
        ("transformer.variant", "preln_rope_universal"),
        ("transformer.universal.group_size", "1"),
        ("transformer.ff_multiplier", "106.3"),
    ] {
        universal.insert(flag.to_owned(), value.to_owned());
    }
    runs.insert("c4_universal_big".to_owned(), universal);
    runs
}

/// Where a made-up run ends.
struct End {
    step: u64,
    perplexity: Value,
    /// Behind the last line.
    torn: &'static str,
}

/// Writes the folder of a run whose numbers are made up: 90 minutes in two starts, 16 layers, steps of 800 ms and for
/// shared layers of 1200 ms, of which the first 20 took longer.
fn write_run(save: &Path, name: &str, args: &Args, end: &End) {
    let folder = save.join(name);
    fs::create_dir_all(folder.join("export")).unwrap();
    fs::write(
        folder.join("args.json"),
        serde_json::to_string(args).unwrap(),
    )
    .unwrap();
    let mut lines = String::new();
    let mut line = |record: Value| writeln!(lines, "{record}").unwrap();
    let ms = if args["transformer.variant"].contains("universal") {
        1200.0
    } else {
        800.0
    };
    line(json!({"step": 20, "time": 1600.0, "train/loss": 7.0, "timing/ms_per_iter": 9000.0}));
    let mut last = json!({
        "step": end.step, "time": 13_800.0, "validation/val/perplexity": end.perplexity, "timing/ms_per_iter": ms,
        "memory/peak_bytes": 3_u64 << 30, "average_num_chunks": 2.0,
    });
    for layer in 0..16 {
        last[format!("activation_norm/abs_update_layer_{layer}")] = json!(1.5 * f64::from(layer));
        last[format!("activation_norm/in_layer_{layer}")] = json!(10.0 + f64::from(layer));
    }
    line(last);
    fs::write(folder.join("metrics.jsonl"), lines + end.torn).unwrap();
    let start = |time: u64| {
        format!(
            "start        {time} s after 1970, box, process 1, in /\nCPU          Toy, 2 cores\n\n"
        )
    };
    fs::write(folder.join("startup_log.txt"), start(1000) + &start(9000)).unwrap();
    let results = json!({
        "lambada/accuracy/total": 0.25, "blimp/accuracy/group_average": 0.75, "cbt/accuracy/group_average": 0.8,
        "hellaswag/accuracy/group_average": 0.3, "piqa/accuracy/group_average": 0.6, "ai2arc/accuracy/ARC-Easy": 0.3,
    });
    fs::write(folder.join("result.json"), results.to_string()).unwrap();
}

/// Two groups of layers with four experts each; tokens 1 and 2 by turns.
fn write_selections(save: &Path, run: &str) {
    let experts: Vec<Value> = (0..8)
        .map(|index| json!([[index % 2], [3], [index % 2, 2], [index % 4]]))
        .collect();
    let selections = json!({
        "step": 100_000, "n_wanted": 8, "groups": [0, 1, 0, 1], "n_experts": 4,
        "texts": {"1": "▁the", "2": "a"}, "tokens": [1, 2, 1, 2, 1, 2, 1, 2], "experts": experts,
    });
    fs::write(
        save.join(run).join("export/token_experts.json"),
        selections.to_string(),
    )
    .unwrap();
}

const FIGURES: [&str; 17] = [
    "code",
    "expert_count_per_token_per_layer",
    "expert_layer_g0",
    "expert_layer_g1",
    "experts_per_token_per_layer",
    "group_ppl",
    "in_norm",
    "layer_similarity",
    "layernorm",
    "moe_expert_size",
    "moe_k",
    "scaling",
    "scaling_flops",
    "sut",
    "token_expert_g0",
    "token_expert_g1",
    "update_magnitude",
];
const TABLES: [&str; 6] = [
    "main_result_table",
    "plot_compute",
    "plot_hyperparams",
    "plot_hyperparams_sut",
    "sut_result_table",
    "time_and_memory",
];

/// Name and time of all files in a folder.
fn files(folder: &Path) -> BTreeMap<String, SystemTime> {
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries
        .filter(|entry| entry.file_type().unwrap().is_file())
        .map(|entry| {
            (
                entry.file_name().into_string().unwrap(),
                entry.metadata().unwrap().modified().unwrap(),
            )
        })
        .collect()
}

fn text(path: &Path) -> String {
    String::from_utf8(read(path)).unwrap()
}

/// Every figure and table is there in all its forms, and holds something.
fn check_all_forms(out: &Path) {
    let mut expected = Vec::new();
    for name in FIGURES {
        let bytes = |ending: &str| read(&out.join(format!("{name}.{ending}")));
        let pdf = bytes("pdf");
        let has = |part: &str| {
            pdf.windows(part.len())
                .any(|window| window == part.as_bytes())
        };
        assert!(
            has("%PDF-1.") && has("/FontFile2") && !has("/Type3"),
            "{name}"
        );
        assert!(bytes("png").starts_with(b"\x89PNG"), "{name}");
        let svg = String::from_utf8(bytes("svg")).unwrap();
        assert!(!svg.contains("<text") && !svg.contains("no data"), "{name}");
        assert!(
            text(&out.join(format!("{name}.csv"))).lines().count() >= 2,
            "{name}"
        );
        expected.extend(["csv", "pdf", "png", "svg"].map(|ending| format!("{name}.{ending}")));
    }
    for name in TABLES {
        let tex = text(&out.join(format!("{name}.tex")));
        assert!(
            tex.contains("\\midrule") && tex.contains("\\bottomrule"),
            "{name}"
        );
        assert!(
            text(&out.join(format!("{name}.md"))).lines().count() >= 3,
            "{name}"
        );
        expected.extend(["csv", "md", "tex"].map(|ending| format!("{name}.{ending}")));
    }
    expected.sort();
    assert_eq!(files(out).into_keys().collect::<Vec<_>>(), expected);
}

#[test]
#[expect(clippy::too_many_lines, reason = "one story, told in order")]
fn everything_is_made_of_whole_runs_once() {
    let dir = tempfile::tempdir().unwrap();
    let save = dir.path().join("save");
    let runs = papers_runs();
    for (index, (name, args)) in runs.iter().enumerate() {
        let mut end = End {
            step: 100_000,
            perplexity: json!(10.0 + index as f64 / 8.0),
            torn: "",
        };
        match name.as_str() {
            "c4_baseline_mid_rope_nodrop" => end.torn = "{\"step\":1000",
            "c4_moeut_mid_matched_rope_noln" => end.step = 50_000,
            "c4_baseline_gigantic_rope_nodrop" => end.perplexity = Value::Null,
            "c4_moeut_gigantic_switchead" => continue,
            _ => {}
        }
        write_run(&save, name, args, &end);
    }
    write_selections(&save, "c4_moeut_big_matched_rope_preln_linear_norot_nosm1");

    let said = paper(dir.path(), &["all"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    let out = dir.path().join("paper_out");
    check_all_forms(&out);
    for line in [
        "plot_scaling: `c4_baseline_mid_rope_nodrop` is left out: line 3 of `save/c4_baseline_mid_rope_nodrop/metrics.jsonl` is damaged",
        "plot_scaling: `c4_moeut_mid_matched_rope_noln` is left out: `save/c4_moeut_mid_matched_rope_noln` is half-finished: validated last at step 50000 of 100000",
        "plot_scaling: `c4_baseline_gigantic_rope_nodrop` is left out: `validation/val/perplexity` is not finite",
        "plot_scaling: `c4_moeut_gigantic_switchead` is left out: there is no folder `save/c4_moeut_gigantic_switchead`",
    ] {
        assert!(
            said.stderr.lines().any(|said| said == line),
            "{line}\n{}",
            said.stderr
        );
    }
    // 17 runs, of which four are left out.
    let scaling = text(&out.join("scaling.csv"));
    assert_eq!(scaling.lines().count(), 1 + 13, "{scaling}");
    let place = runs
        .keys()
        .position(|name| name == "c4_moeut_1b_switchead")
        .unwrap();
    let perplexity = 10.0 + place as f64 / 8.0;
    let line = format!("MoEUT,1015.732224,{perplexity},c4_moeut_1b_switchead");
    assert!(
        scaling.lines().any(|found| found == line),
        "{line}\n{scaling}"
    );
    let table = text(&out.join("main_result_table.csv"));
    let line = format!(
        "C4,1040M,MoEUT,{perplexity:.2},25.0,75.0,80.0,30.0,60.0,30.0,50.0,c4_moeut_1b_switchead"
    );
    assert!(table.lines().any(|found| found == line), "{line}\n{table}");
    let table = text(&out.join("plot_hyperparams.csv"));
    for line in [
        "MoEUT,44M,16,2,412,128,4,8,82,155,12,0,0.1,c4_moeut_small_matched_rope_noln_long",
        "Baseline,244M,18,,1024,4110,16,,64,,,4000,0.25,c4_baseline_big_rope_nodrop",
    ] {
        assert!(table.lines().any(|found| found == line), "{line}\n{table}");
    }
    let table = text(&out.join("plot_hyperparams_sut.csv"));
    let line = "C4,244M,18,1024,512,4,21,512,128,192,4,0.01,0.01,4000,0.25,c4_sut_big_lessloss2_ffflopmatch_attmatch_actloss";
    assert!(table.lines().any(|found| found == line), "{line}\n{table}");
    // 600 s in the first start, 4800 s in the second one.
    let table = text(&out.join("plot_compute.csv"));
    let line = "C4,MoEUT,44M,2.96e17,,\"Toy, 2 cores\",1:30,c4_moeut_small_matched_rope_noln_long";
    assert!(table.lines().any(|found| found == line), "{line}\n{table}");
    let table = text(&out.join("time_and_memory.csv"));
    for line in [
        "Baseline,244M,32 × 1024,800.0,1.00,3.00,\"Toy, 2 cores\",c4_baseline_big_rope_nodrop",
        "UT,244M,32 × 1024,1200.0,1.50,3.00,\"Toy, 2 cores\",c4_universal_big",
    ] {
        assert!(table.lines().any(|found| found == line), "{line}\n{table}");
    }
    let similarity = text(&out.join("layer_similarity.csv"));
    assert!(similarity.contains("\n0,2,0.5,"), "{similarity}");

    let before = files(&out);
    let again = paper(dir.path(), &["all"]);
    assert_eq!(again.code, Some(0));
    assert_eq!(files(&out), before);
    assert_eq!(
        again.stderr.matches(": nothing has changed").count(),
        19,
        "{}",
        again.stderr
    );
    let complaints = |text: &str| {
        text.lines()
            .filter(|line| line.contains("is left out"))
            .count()
    };
    assert_eq!(complaints(&again.stderr), complaints(&said.stderr));

    // What its run makes different is made anew, and nothing else.
    let args = &runs["c4_moeut_small_matched_rope_noln_long"];
    let end = End {
        step: 100_000,
        perplexity: json!(12.5),
        torn: "",
    };
    write_run(&save, "c4_moeut_small_matched_rope_noln_long", args, &end);
    let third = paper(dir.path(), &["group_size", "plot_scaling"]);
    assert!(
        third.stderr.contains("group_size: nothing has changed"),
        "{}",
        third.stderr
    );
    let scaling = text(&out.join("scaling.csv"));
    assert!(
        scaling.contains(",12.5,c4_moeut_small_matched_rope_noln_long"),
        "{scaling}"
    );

    // A run that was whole and is damaged later on is left out of what was made with it.
    for (name, file) in [
        ("c4_moeut_small_matched_rope_noln_long", "result.json"),
        ("c4_baseline_small_rope_long_nodrop", "args.json"),
    ] {
        fs::write(save.join(name).join(file), "{\"lambada/acc").unwrap();
    }
    let fourth = paper(dir.path(), &["plot_scaling"]);
    for line in [
        "plot_scaling: `c4_moeut_small_matched_rope_noln_long` is left out: `save/c4_moeut_small_matched_rope_noln_long/result.json` is damaged: ",
        "plot_scaling: `c4_baseline_small_rope_long_nodrop` is left out: ",
    ] {
        assert!(
            fourth.stderr.lines().any(|said| said.starts_with(line)),
            "{line}\n{}",
            fourth.stderr
        );
    }
    let scaling = text(&out.join("scaling.csv"));
    assert_eq!(scaling.lines().count(), 1 + 11, "{scaling}");
}

#[test]
fn what_has_no_run_is_not_made_and_misspellings_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let said = paper(dir.path(), &["plot_k"]);
    assert_eq!(said.code, Some(1));
    assert!(
        said.stderr
            .contains("plot_k: not made, for it has not a single run"),
        "{}",
        said.stderr
    );
    assert!(!dir.path().join("paper_out/moe_k.pdf").exists());
    for (args, expected) in [
        (
            &["plot_kk"][..],
            "there is no table or figure `plot_kk`, `plot_k` perhaps",
        ),
        (&["all", "-outt", "x"], "`-outt` is unknown here"),
        (
            &["reproduce", "-scale", "huge"],
            "`-scale huge` is none of small, gpu, smoke",
        ),
        (&["all", "-runs", "none.json"], "`none.json` cannot be read"),
        (&["reproduce"], "have 0.0 MB, and 1.5 MB are needed"),
        (
            &["reproduce", "-text", "nowhere"],
            "`-text nowhere` cannot be used",
        ),
        (
            &["reproduce", "-data.dir", "nowhere"],
            "`-data.dir nowhere` cannot be used",
        ),
    ] {
        let said = paper(dir.path(), args);
        assert_eq!(said.code, Some(2), "{args:?}");
        // Lines are broken to fit a terminal.
        let words: Vec<&str> = said.stderr.split_whitespace().collect();
        let said = words.join(" ");
        assert!(said.contains(expected), "{args:?}: {said}");
    }
    assert!(!dir.path().join("reproduction/save").exists());
}

/// Answers GraphQL queries: the first page of sweeps or runs, or the page behind a cursor. Returns its address.
fn graphql(pages: BTreeMap<&'static str, Value>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    // It ends with the test.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut reader = BufReader::new(stream.unwrap());
            let (mut length, mut is_known) = (0, false);
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            loop {
                line.clear();
                reader.read_line(&mut line).unwrap();
                let Some((name, value)) = line.trim_end().split_once(": ") else {
                    break;
                };
                match name.to_ascii_lowercase().as_str() {
                    // `api:secret`
                    "authorization" => is_known = value == "Basic YXBpOnNlY3JldA==",
                    "content-length" => length = value.parse().unwrap(),
                    _ => {}
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let body: Value = serde_json::from_slice(&body).unwrap();
            let query = body["query"].as_str().unwrap();
            let kind = if query.contains("sweeps(") {
                "sweeps"
            } else {
                "runs"
            };
            let page = body["variables"]["cursor"].as_str().unwrap_or(kind);
            let answer = if is_known {
                json!({"data": {"project": {"page": pages[page]}}})
            } else {
                json!({"errors": [{"message": "permission denied"}]})
            };
            let answer = answer.to_string();
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                answer.len()
            );
            reader
                .get_mut()
                .write_all((head + &answer).as_bytes())
                .unwrap();
        }
    });
    address
}

#[test]
#[expect(clippy::too_many_lines, reason = "one story, told in order")]
fn finished_runs_of_weights_and_biases_become_run_folders() {
    let runs = papers_runs();
    let config = |name: &str| -> String {
        let entries = runs[name]
            .iter()
            .map(|(flag, value)| (flag.clone(), json!({"value": value})));
        let mut config: serde_json::Map<String, Value> = entries.collect();
        // The reference logs arguments that nobody reads any more.
        config.insert("moe.att.variant".to_owned(), json!({"value": "moa"}));
        Value::Object(config).to_string()
    };
    let node = |id: &str, sweep: &str, state: &str, config: String| {
        let summary = json!({
            "validation/val/perplexity": 11.25, "iteration": 100_000, "_timestamp": 20_000.5,
            "_wandb": {"runtime": 7200}, "sample": "text",
        });
        json!({"node": {
            "name": id, "displayName": "sunny-lake-1", "sweepName": sweep, "state": state, "config": config,
            "summaryMetrics": summary.to_string(),
            "runInfo": {"gpu": "Toy V1", "gpuCount": 8, "cpuCount": 40},
        }})
    };
    let (dense, moeut) = (
        "c4_baseline_small_rope_long_nodrop",
        "c4_moeut_small_matched_rope_noln_long",
    );
    let sweep = |id: &str, name: &str| json!({"node": {"name": id, "displayName": name}});
    let page = |edges: Value, next: Value| json!({"edges": edges, "pageInfo": {"endCursor": next, "hasNextPage": !next.is_null()}});
    let pages = BTreeMap::from([
        (
            "sweeps",
            page(
                json!([sweep("s1", dense), sweep("s2", moeut), sweep("s3", "both")]),
                Value::Null,
            ),
        ),
        (
            "runs",
            page(
                json!([
                    node("r1", "s1", "finished", config(dense)),
                    node("r2", "s2", "running", config(moeut))
                ]),
                json!("more"),
            ),
        ),
        (
            "more",
            page(
                json!([
                    node("r3", "s3", "finished", config(moeut)),
                    node("r4", "s3", "finished", config(moeut))
                ]),
                Value::Null,
            ),
        ),
    ]);
    let address = graphql(pages);
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("config.json"),
        "{\"wandb_project\": \"people/moeut\"}",
    )
    .unwrap();
    let fetch = |key: &str| {
        paper_with(
            dir.path(),
            &["fetch"],
            &[("WANDB_BASE_URL", &address), ("WANDB_API_KEY", key)],
        )
    };
    let refused = fetch("wrong");
    assert_eq!(refused.code, Some(2));
    assert!(
        refused.stderr.contains("permission denied"),
        "{}",
        refused.stderr
    );
    let said = fetch("secret");
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    for line in [
        "`both` is left out: several runs are called so",
        "`c4_moeut_small_matched_rope_noln_long` is left out: it is running",
        "paper/wandb/c4_baseline_small_rope_long_nodrop: fetched",
    ] {
        assert!(
            said.stderr.lines().any(|said| said == line),
            "{line}\n{}",
            said.stderr
        );
    }
    let made = paper(dir.path(), &["plot_compute", "plot_scaling"]);
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    let table = text(&dir.path().join("paper_out/plot_compute.csv"));
    let line = format!("C4,Baseline,44M,3.36e17,8 × Toy V1,40 cores,2:00,{dense}");
    assert!(table.lines().any(|found| found == line), "{line}\n{table}");
    let scaling = text(&dir.path().join("paper_out/scaling.csv"));
    assert!(
        scaling.contains(&format!("37.94344,11.25,{dense}")),
        "{scaling}"
    );
    assert!(
        fetch("secret")
            .stderr
            .contains("c4_baseline_small_rope_long_nodrop: nothing has changed")
    );
}

/// Trains 23 tiny models of all families, scores those of the result tables, and makes everything from them.
#[test]
fn a_reproduction_of_two_steps_makes_everything_and_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let code = repo().join("host/src");
    let sets = dir.path().join("sets");
    fs::create_dir(&sets).unwrap();
    let passages = "{\"text\": \"one stone and another stone\"}\n".repeat(2);
    fs::write(sets.join("lambada_test.jsonl"), passages).unwrap();
    let line = [
        "reproduce",
        "-scale",
        "smoke",
        "-code",
        code.to_str().unwrap(),
        "-data.dir",
        "sets",
        "-out",
        "tiny",
    ];
    let said = paper(dir.path(), &line);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    assert!(
        said.stderr.contains(": 32 tokens; 0 of "),
        "tokens one by one select what whole windows select\n{}",
        said.stderr
    );
    let out = dir.path().join("tiny/figures");
    check_all_forms(&out);
    let table = text(&out.join("main_result_table.csv"));
    for run in ["C4,", "code,"] {
        let row = table.lines().find(|line| line.starts_with(run));
        let row = row.unwrap_or_else(|| panic!("{table}"));
        assert!(row.contains(",first 1 of each group,small_"), "{table}");
    }
    // A number of a figure is that of its run.
    let scaling = text(&out.join("scaling.csv"));
    let shown = scaling
        .lines()
        .find(|line| line.ends_with(",small_moeut"))
        .unwrap();
    let metrics = text(&dir.path().join("tiny/save/small_moeut/metrics.jsonl"));
    let records = metrics
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let logged = records
        .filter_map(|record| record["validation/val/perplexity"].as_f64())
        .next_back()
        .unwrap();
    let shown: f64 = shown.split(',').nth(2).unwrap().parse().unwrap();
    assert_eq!(shown.to_bits(), logged.to_bits());

    let (figures, before) = (
        files(&out),
        read(&dir.path().join("tiny/save/small_k-4/metrics.jsonl")),
    );
    let again = paper(dir.path(), &line);
    assert_eq!(again.code, Some(0), "{}", again.stderr);
    assert_eq!(files(&out), figures);
    assert!(read(&dir.path().join("tiny/save/small_k-4/metrics.jsonl")) == before);
    assert_eq!(
        again.stderr.matches(": nothing has changed").count(),
        19 + 1 + 7,
        "{}",
        again.stderr
    );
}
