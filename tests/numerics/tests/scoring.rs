//! Evaluation against scorers that were written apart from it: probabilities of tokens, and metrics made of scores.

use moeut_host::eval::item::{Item, Tokens};
use moeut_host::eval::metrics::{Accuracy, is_right};
use moeut_host::eval::predict::{Client, Effort, predict};
use moeut_numerics::fixture::{Fixture, shared};
use moeut_numerics::placement::Placement;
use moeut_numerics::subject::Subject;
use moeut_numerics::{Result, plugins};
use moeut_plugin_api::{DType, PluginError, Question};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Nats; in single precision, against double.
const TOLERANCE: f64 = 1e-4;

/// Between two ways through the same model.
const SAME: f64 = 1e-5;

/// The sets and where the test data has them.
const SETS: [(&str, &str); 6] = [
    ("ai2arc", "arc"),
    ("blimp", "blimp"),
    ("cbt", "cbt_made"),
    ("hellaswag", "dev_samples/hellaswag"),
    ("lambada", "dev_samples/lambada"),
    ("piqa", "piqa"),
];

/// The recorded runs whose parameters the models have, by the files of `expected.py`.
const MODELS: [(&str, &str); 2] = [
    ("dense", "01_dense_preln_rope"),
    ("moeut", "04_moeut_nonorm_g2"),
];

const N_ITEMS: usize = 50;

/// As `cut` of `expected.py`: bytes of a prefix, of an option behind one, and of one alone.
const N_PREFIX: usize = 24;
const N_OPTION: usize = 12;
const N_ALONE: usize = 36;

/// Byte values modulo the vocabulary of the recorded runs.
fn encode(text: &str) -> Vec<i32> {
    text.bytes().map(|byte| i32::from(byte % 100)).collect()
}

/// The first items of a set, cut.
fn items(set: &str, folder: &Path) -> Result<Vec<Item>> {
    let plugin = plugins::open(&format!("moeut-dataset-{set}"))?;
    let component = plugin.components()?.into_iter().next();
    let component = component.ok_or("the plugin registers nothing")?;
    let folder = folder.to_str().ok_or("the path is not UTF-8")?;
    let mut values = BTreeMap::new();
    for def in &component.args {
        let raw = if def.name == "data.dir" {
            folder
        } else {
            &def.default
        };
        values.insert(def.name.clone(), def.parse(raw)?);
    }
    let config = moeut_plugin_api::args::configuration(&component.args, &values)?;
    let kernel = plugins::kernels()?
        .into_iter()
        .next()
        .ok_or("there is no kernel")?;
    let dataset = plugin.new_choice_dataset(set, &config, &plugins::services(&kernel))?;
    let n_read = dataset.info()?.n_questions.min(N_ITEMS as u64);
    let tokens = Tokens {
        set,
        rule: dataset.info()?.rule,
        vocab_size: 100,
        encode: &|text| Ok(encode(text)),
    };
    let questions = dataset.read(0, n_read)?.into_iter().enumerate();
    let items = questions
        .map(|(index, question): (usize, Question)| Ok(cut(tokens.item(index as u64, question)?)));
    Ok(items.collect::<std::result::Result<_, PluginError>>()?)
}

fn cut(mut item: Item) -> Item {
    let n_over = item.prefix.len().saturating_sub(N_PREFIX);
    item.prefix.drain(..n_over);
    for option in &mut item.options {
        if item.prefix.is_empty() {
            option.drain(..option.len().saturating_sub(N_ALONE));
        } else {
            option.truncate(N_OPTION);
        }
    }
    item
}

/// `log p` of each token by item and option, through a model in its plugin.
fn log_p(
    subject: &mut Subject,
    items: &[Item],
    can_fork: bool,
) -> Result<(Vec<Vec<Vec<f64>>>, Effort)> {
    let _no_grad = tch::no_grad_guard();
    let mut client = Client {
        model: &mut subject.model,
        device: Device::Cpu,
        can_fork,
    };
    let predicted = predict(&mut client, items, 32, false, (0, 1), |_, _| true)?;
    let (predicted, effort) = predicted.ok_or("nobody ended it")?;
    let of_item = |options: Vec<_>| options.into_iter().map(log_p_of).collect();
    Ok((predicted.into_iter().map(of_item).collect(), effort))
}

fn log_p_of(predicted: moeut_host::eval::metrics::Predicted) -> Vec<f64> {
    predicted.log_p
}

/// The recorded model in single precision.
fn subject(fixture: &str) -> Result<Option<Subject>> {
    let Some(json) = shared(&format!("fixtures/{fixture}.json"))? else {
        return Ok(None);
    };
    // Many small calls, in which threads would wait for each other.
    tch::set_num_threads(1);
    let kernel = plugins::kernels()?
        .into_iter()
        .next()
        .ok_or("there is no kernel")?;
    Ok(Some(Subject::of(
        &Fixture::read(&json)?,
        Placement::on_cpu(DType::F32),
        &kernel,
    )?))
}

/// Row of expected numbers up to the first that is not one.
fn expected(of_set: &Tensor, item: usize, option: usize) -> Result<Vec<f64>> {
    let index = |n: usize| i64::try_from(n);
    let row = of_set
        .get(index(item)?)
        .get(index(option)?)
        .to_kind(Kind::Double);
    let row = Vec::<f64>::try_from(&row)?;
    Ok(row
        .into_iter()
        .take_while(|value| !value.is_nan())
        .collect())
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f64::max)
}

/// Numbers of `tests/numerics/scoring/expected.py`; shared prefixes change nothing.
#[test]
fn probabilities_are_those_of_an_independent_scorer() {
    for (name, fixture) in MODELS {
        let Some(mut subject) = subject(fixture).unwrap() else {
            return;
        };
        assert!(subject.model.abilities().unwrap().can_fork);
        let path = format!("{}/scoring/{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
        let numbers: BTreeMap<String, Tensor> = Tensor::read_safetensors(path)
            .unwrap()
            .into_iter()
            .collect();
        for (set, folder) in SETS {
            let folder = shared(&format!("data/eval/{folder}")).unwrap().unwrap();
            let items = items(set, &folder).unwrap();
            assert_eq!(items.len(), N_ITEMS, "{set}");
            let (whole, _) = log_p(&mut subject, &items, false).unwrap();
            let (shared, _) = log_p(&mut subject, &items, true).unwrap();
            let (mut worst, mut apart, mut n_tokens) = (0.0_f64, 0.0_f64, 0);
            for (index, options) in whole.iter().enumerate() {
                for (option, own) in options.iter().enumerate() {
                    let expected = expected(&numbers[set], index, option).unwrap();
                    worst = worst.max(largest_difference(own, &expected));
                    apart = apart.max(largest_difference(own, &shared[index][option]));
                    n_tokens += own.len();
                }
            }
            println!(
                "{name} {set}: {} items, {n_tokens} tokens, worst {worst:.1e}; shared prefixes {apart:.1e}",
                items.len()
            );
            assert!(worst <= TOLERANCE, "{name} {set}: {worst:e}");
            assert!(apart <= SAME, "{name} {set}: {apart:e}");
        }
    }
}

/// Scores of an independent scorer, with its verdict on each item and its averages.
#[test]
fn verdicts_and_averages_are_those_of_an_independent_scorer() {
    let Some(folder) = shared("data/eval_crosscheck").unwrap() else {
        return;
    };
    let summary = std::fs::read(folder.join("smollm2_summary.json")).unwrap();
    let summary: Value = serde_json::from_slice(&summary).unwrap();
    let mut n_checked = 0;
    for name in ["arc_easy_first50", "blimp_first3_per_file", "piqa_first80"] {
        let text = std::fs::read_to_string(folder.join(format!("{name}.tsv"))).unwrap();
        let mut accuracy = Accuracy::default();
        let mut n = 0;
        for line in text.lines().skip(1) {
            let fields: Vec<&str> = line.split('\t').collect();
            let [item, group, _, _, scores, ok] = fields[..] else {
                panic!("{line}");
            };
            let scores: Vec<f64> = scores
                .split(',')
                .map(|score| score.parse().unwrap())
                .collect();
            let is_right = is_right(&scores, 0);
            assert_eq!(is_right, ok == "1", "{name} item {item}");
            accuracy.add(group, is_right);
            n += 1;
        }
        let recorded = &summary["results"][name];
        assert_eq!(recorded["n"], json!(n));
        for (metric, value) in [
            ("group_average", accuracy.group_average()),
            ("seq_average", accuracy.seq_average()),
        ] {
            let recorded = recorded[metric].as_f64().unwrap();
            assert!(
                (value - recorded).abs() < 1e-12,
                "{name} {metric}: {value} {recorded}"
            );
        }
        n_checked += n;
    }
    assert_eq!(n_checked, 331);
}

/// What the cache saves on whole questions of the Children's Book Test.
#[test]
fn shared_prefixes_save_most_tokens_of_a_long_context() {
    let Some(mut subject) = subject(MODELS[1].1).unwrap() else {
        return;
    };
    let folder = shared("data/eval/cbt_made").unwrap().unwrap();
    let mut items = items("cbt", &folder).unwrap();
    for (index, item) in items.iter_mut().enumerate() {
        // Contexts of 300 tokens and some more; not two of a length, so that nothing is batched.
        item.prefix = item
            .prefix
            .iter()
            .copied()
            .cycle()
            .take(300 + index)
            .collect();
    }
    let (whole, alone) = log_p(&mut subject, &items[..4], false).unwrap();
    let (shared, effort) = log_p(&mut subject, &items[..4], true).unwrap();
    println!(
        "4 questions, 10 options: {} tokens computed, {} without shared prefixes",
        effort.n_computed, alone.n_computed
    );
    assert!(effort.n_computed * 5 < alone.n_computed);
    for (whole, shared) in whole.iter().flatten().zip(shared.iter().flatten()) {
        let apart = largest_difference(whole, shared);
        assert!(apart <= SAME, "{apart:e}");
    }
}
