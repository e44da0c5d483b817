//! Statistics of σ-MoE and SwitchHead against counting by hand.
#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: what they cannot do fails the test"
)]
#![expect(clippy::cast_possible_wrap, reason = "sizes below ten")]

use moeut_nn::attention::Heads;
use moeut_nn::balance::{BalanceConfig, BalanceMode};
use moeut_nn::moe::{MoeConfig, MoePlace, SigmaMoe};
use moeut_nn::switchhead::{ExpertSides, SwitchHeadConfig, SwitchHeadPlace};
use moeut_nn::usage::Optimist;
use moeut_nn::{
    Activation, AttentionMaps, Context, LayerPast, Params, Reading, RopeConfig, Scoring,
    SwitchHead, Tally, moe_stats, switchhead_stats, testing,
};
use moeut_plugin_api::{AxisPart, Chart, ChartKind, MapWish, Wishes};
use moeut_torch::IntoTensor;
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);
const D_MODEL: i64 = 4;
const N_EXPERTS: usize = 5;
const D_EXPERT: i64 = 3;
const TOP_K: usize = 2;
/// Of three applications of one layer.
const PLACES: [usize; 3] = [1, 3, 5];
/// Numbers cross float32 on their way.
const ROUNDING: f64 = 1e-6;

const EVERYTHING: Wishes = Wishes {
    stats: true,
    counts: true,
    pairs: true,
    details: true,
    selections: true,
    maps: Some(MapWish {
        n_steps: -3,
        has_heads: true,
    }),
};

fn context(is_training: bool) -> Context {
    Context {
        wishes: EVERYTHING,
        ..testing::context(is_training)
    }
}

const NO_BALANCE: BalanceConfig = BalanceConfig {
    is_everywhere: true,
    weight: 0.0,
    mode: BalanceMode::Step,
};

fn sigma_moe(params: &Params, scoring: Scoring) -> SigmaMoe {
    let place = MoePlace {
        d_model: D_MODEL,
        depth_init: None,
        has_norm: false,
        activation: Activation::Relu,
        balances_selected: false,
    };
    let config = MoeConfig {
        n_experts: N_EXPERTS as i64,
        d_expert: D_EXPERT,
        top_k: TOP_K as i64,
        scoring,
        scores_after_top_k: false,
        has_bias: false,
        has_router_bias: true,
        expert_dropout: 0.0,
        router_dropout: 0.0,
        init_scale: 1.0,
        layer_std_constant: 2.0,
        balance: NO_BALANCE,
    };
    let layer = SigmaMoe::new(params, place, config);
    let bias = Tensor::from_slice(&[0.3, -0.2, 0.0, 0.1, -0.4]);
    tch::no_grad(|| parameter(params, "sel_bias").copy_(&bias));
    layer
}

fn parameter(params: &Params, name: &str) -> Tensor {
    let mut all = params.parameters().into_iter();
    let found = all.find(|parameter| parameter.name == name).unwrap();
    found.tensor.into_tensor()
}

fn numbers(charts: Vec<Chart>) -> BTreeMap<String, f64> {
    let numbers = charts
        .into_iter()
        .filter(|chart| chart.kind == ChartKind::Number);
    numbers
        .map(|chart| (chart.name, chart.values.into_tensor().double_value(&[])))
        .collect()
}

fn matrix(x: &Tensor) -> Vec<Vec<f64>> {
    Vec::try_from(x.to_kind(Kind::Double)).unwrap()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let values: Vec<f64> = values.into_iter().collect();
    values.iter().sum::<f64>() / values.len() as f64
}

/// Experts and scores of a token, best first.
type Selected = Vec<(usize, f64)>;

/// The best of a token's scores.
fn selected(scores: &[f64]) -> Selected {
    let mut ranked: Vec<(usize, f64)> = scores.iter().copied().enumerate().collect();
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
    ranked.truncate(TOP_K);
    ranked
}

/// By hand: for each application and token, what it selects.
fn routed(params: &Params, inputs: &[Tensor]) -> Vec<Vec<Selected>> {
    let router = matrix(&parameter(params, "expert_sel"));
    let bias = Vec::<f64>::try_from(parameter(params, "sel_bias")).unwrap();
    let of_token = |token: &Vec<f64>| {
        let score = |(row, bias): (&Vec<f64>, &f64)| 1.0 / (1.0 + (-dot(row, token) - bias).exp());
        selected(&router.iter().zip(&bias).map(score).collect::<Vec<f64>>())
    };
    let tokens = |x: &Tensor| matrix(&x.reshape([-1, D_MODEL]));
    inputs
        .iter()
        .map(|x| tokens(x).iter().map(of_token).collect())
        .collect()
}

#[test]
fn a_moe_layer_tells_what_counting_by_hand_tells() {
    tch::manual_seed(5);
    let params = Params::new(Kind::Double, Device::Cpu);
    let layer = sigma_moe(&params, Scoring::Sigmoid);
    let inputs: Vec<Tensor> = (0..3)
        .map(|_| Tensor::randn([2, 7, D_MODEL], DOUBLE))
        .collect();
    let ctx = context(true);
    let mut pass = layer.begin(&ctx);
    for x in &inputs {
        let _ = layer.forward(&Reading::plain(x), &mut pass, &ctx).unwrap();
    }
    let stats = SigmaMoe::finish(pass, &PLACES).unwrap().stats;

    let routed = routed(&params, &inputs);
    let mut counts = vec![vec![0.0; N_EXPERTS]; 3];
    let mut pairs = vec![vec![0.0; N_EXPERTS]; N_EXPERTS];
    for (application, tokens) in routed.iter().enumerate() {
        for (&(a, _), &(b, _)) in tokens
            .iter()
            .flat_map(|t| t.iter().flat_map(move |a| t.iter().map(move |b| (a, b))))
        {
            pairs[a][b] += 1.0;
            counts[application][a] += if a == b { 1.0 } else { 0.0 };
        }
    }
    assert_eq!(stats.counts[0].0, moe_stats::COUNTS);
    assert_eq!(matrix(&stats.counts[0].1), counts);
    assert_eq!(stats.pairs[0].0, moe_stats::PAIRS);
    assert_eq!(matrix(&stats.pairs[0].1), pairs);

    let all_tokens = || routed.iter().flatten();
    let overlap = |application: usize| {
        mean((0..14).map(|token| {
            let before = &routed[application - 1][token];
            let is_shared = |(id, _): &&(usize, f64)| before.iter().any(|(other, _)| other == id);
            routed[application][token].iter().filter(is_shared).count() as f64 / TOP_K as f64
        }))
    };
    let keys = parameter(&params, "keys");
    let above_zero = inputs.iter().zip(&routed).flat_map(|(x, tokens)| {
        let x = matrix(&x.reshape([-1, D_MODEL]));
        let keys = &keys;
        x.into_iter().zip(tokens).flat_map(move |(x, token)| {
            token.iter().flat_map(move |&(expert, _)| {
                let x = x.clone();
                let hidden = matrix(&keys.get(expert as i64).tr()).into_iter();
                hidden.map(move |key| f64::from(u8::from(dot(&key, &x) > 0.0)))
            })
        })
    });
    let cosine = |vectors: Vec<Vec<f64>>| {
        let n = vectors.len();
        let pairs = (0..n).flat_map(|i| (0..n).filter(move |&j| i != j).map(move |j| (i, j)));
        mean(pairs.map(|(i, j)| {
            let (a, b) = (&vectors[i], &vectors[j]);
            dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
        }))
    };
    let expected = [
        ("min_sel_score", mean(all_tokens().map(|token| token[1].1))),
        ("max_sel_score", mean(all_tokens().map(|token| token[0].1))),
        ("layer_sel_overlap_3", overlap(1)),
        ("layer_sel_overlap_5", overlap(2)),
        ("relu_pass_rate", mean(above_zero)),
        (
            "ani/keys",
            cosine(matrix(&keys.transpose(1, 2).reshape([-1, D_MODEL]))),
        ),
        (
            "ani/values",
            cosine(matrix(&parameter(&params, "values").reshape([-1, D_MODEL]))),
        ),
        (
            "ani/expert_sel",
            cosine(matrix(&parameter(&params, "expert_sel"))),
        ),
        ("sel_bias_min", -0.4),
        ("sel_bias_max", 0.3),
    ];
    let told = numbers(stats.charts);
    assert_eq!(told.len(), expected.len(), "{told:?}");
    for (name, expected) in expected {
        let value = told[name];
        assert!(
            (value - expected).abs() < ROUNDING,
            "{name}: {value}, by hand {expected}"
        );
    }
    let of_record: Vec<&str> = stats.stats.iter().map(|(name, _)| *name).collect();
    let names = [
        "usag_rel_perplexity_all_layers",
        "dead_expert_proportion_all_layers",
    ];
    assert_eq!(of_record, names);
}

#[test]
fn experts_that_compete_have_a_perplexity_per_selection() {
    tch::manual_seed(6);
    let params = Params::new(Kind::Double, Device::Cpu);
    let layer = sigma_moe(&params, Scoring::Softmax);
    let x = Tensor::randn([2, 3, D_MODEL], DOUBLE);
    let ctx = context(false);
    let mut pass = layer.begin(&ctx);
    let _ = layer.forward(&Reading::plain(&x), &mut pass, &ctx).unwrap();
    let stats = SigmaMoe::finish(pass, &PLACES[..1]).unwrap().stats;
    let logits = x.linear(
        &parameter(&params, "expert_sel"),
        Some(&parameter(&params, "sel_bias")),
    );
    let rows = matrix(&logits.softmax(-1, None).reshape([-1, N_EXPERTS as i64])).into_iter();
    let perplexity = rows.map(|p| (-p.iter().map(|p| p * p.ln()).sum::<f64>()).exp() / 5.0);
    let expected = mean(perplexity);
    let (name, value) = &stats.stats[0];
    assert_eq!(*name, "expert_rel_perplexity_per_selection");
    assert!((value.double_value(&[]) - expected).abs() < ROUNDING);
    assert!(stats.charts.is_empty(), "details are of training");
}

#[test]
fn what_was_counted_over_passes_becomes_charts() {
    let mut tally = Tally::default();
    let counts = |rows: [[i64; 3]; 2]| vec![("pkm/counts".to_owned(), Tensor::from_slice2(&rows))];
    tally.add(&counts([[3, 0, 1], [0, 1, 1]]));
    tally.add(&counts([[5, 0, 1], [0, 1, 1]]));
    // [[8, 0, 2], [0, 2, 2]] in all: 8, 2 and 4.
    let charts = moe_stats::usage_charts(&tally, "pkm/", Optimist::Others);
    let mut values: BTreeMap<String, Vec<f64>> = charts
        .into_iter()
        .map(|chart| {
            (
                chart.name,
                Vec::try_from(
                    chart
                        .values
                        .into_tensor()
                        .to_kind(Kind::Double)
                        .reshape([-1]),
                )
                .unwrap(),
            )
        })
        .collect();
    let entropy: f64 = [8.0, 2.0, 4.0]
        .iter()
        .map(|n: &f64| -(n / 14.0) * (n / 14.0).ln())
        .sum();
    for (name, expected) in [
        ("usag_rel_perplexity_100", vec![entropy.exp() / 3.0]),
        ("dead_expert_proportion_100", vec![0.0]),
        ("usage_counts_100", vec![8.0, 4.0, 2.0]),
        ("moe_per_layer_100", vec![0.8, 0.0, 0.2, 0.0, 0.5, 0.5]),
        ("layer_sel_similarity_100", vec![1.0, 0.2, 0.2, 1.0]),
        ("universal_score", vec![0.6]),
        ("universal_score_optimist", vec![0.2]),
    ] {
        let value = values.remove(&format!("pkm/{name}")).unwrap();
        assert_eq!(value.len(), expected.len(), "{name}");
        for (value, expected) in value.iter().zip(&expected) {
            assert!(
                (value - expected).abs() < ROUNDING,
                "{name}: {value}, not {expected}"
            );
        }
    }
    assert!(values.is_empty(), "{values:?}");

    let chart = moe_stats::evaluation_chart(&tally, "pkm/").unwrap();
    assert_eq!(chart.name, "pkm/test_exert_channel_usage");
    let pairs = Tensor::from_slice2(&[[4i64, 1], [1, 0]]);
    tally.add(&[("pkm/pairs".to_owned(), pairs)]);
    let chart = moe_stats::pairs_chart(&tally, "pkm/").unwrap();
    assert_eq!(chart.name, "pkm/expert_coocurence");
    assert_eq!(
        matrix(&chart.values.into_tensor()),
        [[1.0, 0.25], [1.0, 0.0]]
    );
}

const HEADS: Heads = Heads {
    n_heads: 2,
    d_head: 4,
};
const N_HEAD_EXPERTS: usize = 3;

fn switchhead(params: &Params) -> SwitchHead {
    let place = SwitchHeadPlace {
        d_model: D_MODEL,
        depth_init: None,
        has_norm: false,
    };
    let config = SwitchHeadConfig {
        heads: HEADS,
        d_value: 4,
        n_experts: N_HEAD_EXPERTS as i64,
        top_k: TOP_K as i64,
        sides: ExpertSides {
            q: false,
            k: false,
            v: true,
            o: true,
            same_sel: false,
            separate_kq_sel: false,
        },
        scoring: Scoring::Sigmoid,
        dropout: 0.0,
        expert_dropout: 0.0,
        router_dropout: 0.0,
        has_norm_init: false,
        balance: NO_BALANCE,
        rope: RopeConfig {
            fraction: 0.5,
            base: 10_000.0,
        },
    };
    SwitchHead::new(params, place, config)
}

/// By hand: for each token and head what it selects.
fn routed_heads(params: &Params, side: &str, x: &Tensor) -> Vec<Vec<Selected>> {
    let rows = matrix(&parameter(params, &format!("selections.{side}")));
    let sigmoid = |z: f64| 1.0 / (1.0 + (-z).exp());
    let of_token = |token: &Vec<f64>| {
        let of_head = |rows: &[Vec<f64>]| {
            selected(
                &rows
                    .iter()
                    .map(|row| sigmoid(dot(row, token)))
                    .collect::<Vec<f64>>(),
            )
        };
        rows.chunks(N_HEAD_EXPERTS).map(of_head).collect()
    };
    matrix(&x.reshape([-1, D_MODEL]))
        .iter()
        .map(of_token)
        .collect()
}

#[test]
fn a_switchhead_layer_tells_what_counting_by_hand_tells() {
    tch::manual_seed(7);
    let params = Params::new(Kind::Double, Device::Cpu);
    let layer = switchhead(&params);
    let inputs: Vec<Tensor> = (0..2)
        .map(|_| Tensor::randn([2, 5, D_MODEL], DOUBLE))
        .collect();
    let ctx = context(true);
    let (mut pass, mut maps) = (layer.begin(&ctx), AttentionMaps::new(&ctx));
    for x in &inputs {
        let mut earlier = LayerPast::none(false);
        let _ = layer
            .forward(
                &Reading::plain(x),
                None,
                &mut pass,
                (&mut earlier, &mut maps),
                &ctx,
            )
            .unwrap();
    }
    let stats = layer.finish(pass).unwrap().stats;

    let by_hand = |side: &str| -> Vec<_> {
        inputs
            .iter()
            .map(|x| routed_heads(&params, side, x))
            .collect()
    };
    let (v, o) = (by_hand("v"), by_hand("o"));
    let mut tally = Tally::default();
    tally.add(&stats.counts);
    for (side, routed) in [("v", &v), ("o", &o)] {
        let mut counts = vec![0.0; 2 * 2 * N_HEAD_EXPERTS];
        for (application, tokens) in routed.iter().enumerate() {
            for (head, selected) in tokens.iter().flat_map(|token| token.iter().enumerate()) {
                for (expert, _) in selected {
                    counts[(application * 2 + head) * N_HEAD_EXPERTS + expert] += 1.0;
                }
            }
        }
        let told = tally.get(&format!("counts/{side}")).unwrap();
        assert_eq!(told.size(), [2, 2, 3]);
        assert_eq!(matrix(&told.reshape([1, -1]))[0], counts, "{side}");
    }
    let mut pairs = vec![0.0; 2 * N_HEAD_EXPERTS * N_HEAD_EXPERTS];
    for (v, o) in v.iter().flatten().zip(o.iter().flatten()) {
        for (head, (v, o)) in v.iter().zip(o).enumerate() {
            for ((v, _), (o, _)) in v.iter().flat_map(|v| o.iter().map(move |o| (v, o))) {
                pairs[(head * N_HEAD_EXPERTS + v) * N_HEAD_EXPERTS + o] += 1.0;
            }
        }
    }
    assert_eq!(stats.pairs[0].0, switchhead_stats::PAIRS);
    assert_eq!(matrix(&stats.pairs[0].1.reshape([1, -1]))[0], pairs);

    // Three positions are shown; left of them the gates of `o`, below them those of `v`.
    let charts = maps.finish(&[0, 2]);
    let names: Vec<&str> = charts.iter().map(|chart| chart.name.as_str()).collect();
    assert_eq!(names, ["attention_max", "head_0", "head_1"]);
    let ChartKind::Frames { x, y, titles, .. } = &charts[2].kind else {
        panic!("{:?}", charts[2].kind);
    };
    assert_eq!(titles, &["layer 0", "layer 2"]);
    let experts = |side: &str| {
        let names = (0..N_HEAD_EXPERTS).map(|expert| format!("{side} {expert}"));
        AxisPart::Names(names.collect())
    };
    assert_eq!((&x.parts[0], &y.parts[1]), (&experts("o"), &experts("v")));
    let frames = charts[2].values.tensor();
    assert_eq!(frames.size(), [2, 3 + 3, 3 + 3]);
    for application in 0..2 {
        let frame = matrix(&frames.get(application as i64));
        for position in 0..3 {
            for expert in 0..N_HEAD_EXPERTS {
                let gate = |routed: &[Vec<Vec<Selected>>]| {
                    let selected = routed[application][2 + position][1].iter();
                    selected
                        .filter(|(id, _)| *id == expert)
                        .map(|(_, gate)| gate)
                        .sum::<f64>()
                };
                let (of_o, of_v) = (frame[position][expert], frame[3 + expert][3 + position]);
                assert!((of_o - gate(&o)).abs() < ROUNDING && (of_v - gate(&v)).abs() < ROUNDING);
            }
        }
    }
}

#[test]
fn counts_of_heads_become_charts() {
    let mut tally = Tally::default();
    let counts = Tensor::from_slice(&[4i64, 0, 1, 3, 2, 2, 0, 4]).view([2, 2, 2]);
    tally.add(&[("self_attn/counts/v".to_owned(), counts)]);
    let charts = switchhead_stats::usage_charts(&tally, "self_attn/");
    let of = |name: &str| {
        let chart = charts
            .iter()
            .find(|chart| chart.name == format!("self_attn/{name}"));
        matrix(&chart.unwrap().values.tensor().reshape([1, -1])).remove(0)
    };
    // Head 0 has 6 and 2, head 1 has 1 and 7: means 6.5 and 1.5, both half a selection off.
    assert_eq!(of("sel_counts/v"), [6.5, 1.5, 0.5, 0.5, 0.5, 0.5]);
    assert_eq!(of("moe_per_layer_100/v_h0"), [4.0, 0.0, 2.0, 2.0]);
    assert_eq!(of("moe_per_layer_100/v_h1"), [1.0, 3.0, 0.0, 4.0]);
    let perplexity = |p: f64| (-p * p.ln() - (1.0 - p) * (1.0 - p).ln()).exp() / 2.0;
    let expected = mean([perplexity(0.75), perplexity(0.125)]);
    assert!((of("usag_rel_perplexity_100")[0] - expected).abs() < ROUNDING);
    assert_eq!(charts.len(), 4);
}
