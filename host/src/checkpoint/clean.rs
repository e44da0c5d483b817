//! The layout of the clean `MoEUT` package (`MoEUTLM`): its parameter names, its constructor's arguments, and which
//! models of the training code it can express.
//!
//! ```text
//! training code                                   clean package
//! embedding.weight                                embedding.weight
//! out_norm.*                                      out_norm.*
//! output.*                                        lm_head.*
//! unique_layers.<g>.self_attn.projections.{q,k}   transformer.layers.<g>.attention.{q,k}.weight
//! unique_layers.<g>.self_attn.projections.{v,o}   transformer.layers.<g>.attention.{v,o}
//! unique_layers.<g>.self_attn.selections.{v,o}    transformer.layers.<g>.attention.sel_{v,o}
//! unique_layers.<g>.self_attn.norm.*              transformer.layers.<g>.ln1.*
//! unique_layers.<g>.pkm.{keys,values,expert_sel}  transformer.layers.<g>.ffn.{keys,values,expert_sel}
//! unique_layers.<g>.pkm.norm.*                    transformer.layers.<g>.ln2.*
//! unique_layers.<g>.pkm.{iter,kv_sel_counts_100}  none; they are saved and not used
//! ```
//!
//! Shapes are the same on both sides. The package is the paper's model and nothing else: peri-layernorm, values and
//! outputs with two or more experts, `relu`, sigmoid gates. Both compute the same logits then, in evaluation; while
//! training, dropout is on queries there and on keys here.
//!
//! Source: the clean package's `moeut/moeut.py`; reference `full_moe_relative_attention.py`, `moe_layer.py`.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::reference::Named;

const LAYERS: &str = "unique_layers.";
const CLEAN_LAYERS: &str = "transformer.layers.";

/// Prefixes or whole names outside and inside a layer: ours, theirs.
const OUTSIDE: [(&str, &str); 3] = [
    ("embedding.weight", "embedding.weight"),
    ("out_norm.", "out_norm."),
    ("output.", "lm_head."),
];
const INSIDE: [(&str, &str); 11] = [
    ("self_attn.projections.q", "attention.q.weight"),
    ("self_attn.projections.k", "attention.k.weight"),
    ("self_attn.projections.v", "attention.v"),
    ("self_attn.projections.o", "attention.o"),
    ("self_attn.selections.v", "attention.sel_v"),
    ("self_attn.selections.o", "attention.sel_o"),
    ("self_attn.norm.", "ln1."),
    ("pkm.keys", "ffn.keys"),
    ("pkm.values", "ffn.values"),
    ("pkm.expert_sel", "ffn.expert_sel"),
    ("pkm.norm.", "ln2."),
];
/// Below a layer; without counterpart and without effect.
const UNUSED: [&str; 2] = ["pkm.iter", "pkm.kv_sel_counts_100"];

/// Flags that change what the model computes, the only value that the package can express, and the reference's
/// default, for checkpoints that do not say.
const FIXED: [(&str, &str, &str); 13] = [
    ("moe.nonorm", "1", "0"),
    ("moe.att.enable", "1", "0"),
    ("moe.att.q_expert", "0", "1"),
    ("moe.att.k_expert", "0", "1"),
    ("moe.att.v_expert", "1", "1"),
    ("moe.att.o_expert", "1", "1"),
    ("moe.selection_mode", "sigmoid", "sigmoid"),
    ("moe.att.selection_mode", "sigmoid", "sigmoid"),
    ("transformer.activation", "relu", "relu"),
    ("rope.rotate_fraction", "0.5", "0.5"),
    ("rope.base", "10000", "10000"),
    ("lm.trafo.norm_input", "0", "0"),
    ("lm.trafo.context_blocks", "0", "1"),
];

/// Whether the names are those of the clean package.
pub(super) fn is_clean(model: &Named) -> bool {
    model.iter().any(|(name, _)| name.starts_with(CLEAN_LAYERS))
}

/// Renames to the training code's names, and adds its unused buffers. Unknown names stay.
pub(super) fn to_training(model: Named) -> Named {
    let mut renamed = Vec::with_capacity(model.len());
    for (name, tensor) in model {
        let Some((index, inner)) = layer(&name, CLEAN_LAYERS) else {
            let translated = translate(&name, OUTSIDE.map(swap).as_slice());
            renamed.push((translated.unwrap_or(name), tensor));
            continue;
        };
        let translated = translate(inner, INSIDE.map(swap).as_slice());
        let inner = translated.as_deref().unwrap_or(inner);
        if let ("pkm.keys", &[n_experts, _, d_expert]) = (inner, tensor.size().as_slice()) {
            let counts = Tensor::zeros([n_experts, d_expert], (Kind::Float, Device::Cpu));
            let below = |name: &str| format!("{LAYERS}{index}.{name}");
            renamed.push((below("pkm.iter"), Tensor::from(0i64)));
            renamed.push((below("pkm.kv_sel_counts_100"), counts));
        }
        renamed.push((format!("{LAYERS}{index}.{inner}"), tensor));
    }
    renamed
}

/// Renames to the clean package's names.
///
/// # Errors
/// In words, for a parameter that the package does not have.
pub(super) fn to_clean(model: Named) -> Result<Named, String> {
    let mut renamed = Vec::with_capacity(model.len());
    for (name, tensor) in model {
        let translated = match layer(&name, LAYERS) {
            Some((_, inner)) if UNUSED.contains(&inner) => continue,
            Some((index, inner)) => {
                translate(inner, &INSIDE).map(|inner| format!("{CLEAN_LAYERS}{index}.{inner}"))
            }
            None => translate(&name, &OUTSIDE),
        };
        let translated = translated
            .ok_or_else(|| format!("the clean package has no parameter like `{name}`"))?;
        renamed.push((translated, tensor));
    }
    Ok(renamed)
}

fn swap((ours, theirs): (&'static str, &'static str)) -> (&'static str, &'static str) {
    (theirs, ours)
}

/// Splits `<prefix><index>.<rest>`.
fn layer<'a>(name: &'a str, prefix: &str) -> Option<(u64, &'a str)> {
    let (index, inner) = name.strip_prefix(prefix)?.split_once('.')?;
    Some((index.parse().ok()?, inner))
}

/// A pattern with a dot at the end stands for everything that begins so.
fn translate(name: &str, patterns: &[(&str, &str)]) -> Option<String> {
    patterns.iter().find_map(|&(from, to)| {
        let rest = name.strip_prefix(from)?;
        (rest.is_empty() || from.ends_with('.')).then(|| format!("{to}{rest}"))
    })
}

/// The arguments of `MoEUTLM(…)` for a model under the training code's names.
///
/// # Errors
/// In words, what the package cannot express or the checkpoint does not say.
pub(super) fn constructor(args: &BTreeMap<String, String>, model: &Named) -> Result<Value, String> {
    for (flag, only, default) in FIXED {
        let value = args.get(flag).map_or(default, String::as_str);
        if !is_same(value, only) {
            return Err(format!(
                "`{flag}` is {value}, and the clean package computes as with {only}"
            ));
        }
    }
    let variant = args
        .get("transformer.variant")
        .map_or("preln_moe_universal", String::as_str);
    if !variant.starts_with("preln_") {
        return Err(format!(
            "`transformer.variant` is {variant}, and the clean package has the shell of `preln` variants"
        ));
    }
    let scale = args
        .get("transformer.embedding_scale")
        .map_or("none", String::as_str);
    if !is_same(scale, "none") && !is_same(scale, "1") {
        return Err(format!(
            "`transformer.embedding_scale` is {scale}, and the clean package does not scale"
        ));
    }
    let number = |flag: &str| {
        let raw = args
            .get(flag)
            .ok_or_else(|| format!("its arguments do not say `{flag}`"))?;
        raw.parse::<i64>()
            .map_err(|_| format!("`{flag}` is {raw}, no number"))
    };
    let float = |flag: &str| args.get(flag).and_then(|raw| raw.parse::<f64>().ok());

    let [vocab_size, d_model] = shape(model, "embedding.weight")?;
    let [q_rows, _] = shape(model, "unique_layers.0.self_attn.projections.q")?;
    let [_, _, d_value] = shape(model, "unique_layers.0.self_attn.projections.v")?;
    let [n_selections, _] = shape(model, "unique_layers.0.self_attn.selections.v")?;
    let [n_experts, _, d_expert] = shape(model, "unique_layers.0.pkm.keys")?;
    let n_heads = number("transformer.n_heads")?;
    let n_layers = number("transformer.encoder_n_layers")?;
    if n_heads < 1 || q_rows % n_heads != 0 || n_selections % n_heads != 0 {
        return Err(format!(
            "`transformer.n_heads` is {n_heads}, its queries have {q_rows} rows"
        ));
    }
    let (d_head, n_att_experts) = (q_rows / n_heads, n_selections / n_heads);
    if n_att_experts == 1 {
        return Err(
            "`moe.att.n_experts` is 1: the training code gates values then, the clean package does not"
                .to_owned(),
        );
    }
    if d_value != d_head {
        return Err(format!(
            "value heads are {d_value} wide and the others {d_head}, which the clean package does not have"
        ));
    }
    let group_size = model
        .iter()
        .filter_map(|(name, _)| layer(name, LAYERS))
        .map(|(index, _)| index + 1)
        .max()
        .and_then(|n_blocks| i64::try_from(n_blocks).ok())
        .unwrap_or(1);
    let is_aabb = args
        .get("transformer.universal.group_type")
        .is_some_and(|kind| kind == "aabb");
    if is_aabb && group_size != 1 && group_size != n_layers {
        return Err(
            "`transformer.universal.group_type` is aabb, and the clean package repeats groups as abab"
                .to_owned(),
        );
    }
    let ff_expert_dropout = float("moe.drop_expert").unwrap_or(0.0);
    let entropy_reg = float("moe.perplexity_reg").unwrap_or(0.0);
    Ok(json!({
        "n_tokens": vocab_size,
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "ff_n_experts": n_experts,
        "att_n_experts": n_att_experts,
        "d_head": d_head,
        "group_size": group_size,
        "ff_k": number("pkm.n_heads")?,
        "att_k": number("moe.att.k")?,
        "ff_expert_dropout": ff_expert_dropout,
        "att_expert_dropout": float("moe.att.drop_expert").unwrap_or(ff_expert_dropout),
        "ff_expert_size": d_expert,
        "dropout": float("dropout").unwrap_or(0.0),
        "entropy_reg": entropy_reg,
        "att_entropy_reg": float("moe.att.perplexity_reg").unwrap_or(entropy_reg),
    }))
}

/// Values of arguments are texts: `1`, `1.0` and `true` are the same.
fn is_same(a: &str, b: &str) -> bool {
    let value = |raw: &str| match raw.to_ascii_lowercase().as_str() {
        "true" => Ok(1.0),
        "false" => Ok(0.0),
        other => other.parse::<f64>().map_err(|_| other.to_owned()),
    };
    value(a) == value(b)
}

fn shape<const N: usize>(model: &Named, name: &str) -> Result<[i64; N], String> {
    let tensor = model.iter().find(|(found, _)| found == name);
    let (_, tensor) = tensor.ok_or_else(|| format!("it has no parameter `{name}`"))?;
    let size = tensor.size();
    <[i64; N]>::try_from(size.as_slice())
        .map_err(|_| format!("`{name}` is {size:?}, which the clean package does not have"))
}

#[cfg(test)]
mod tests {
    use super::super::reference::Reference;
    use super::super::reference::tests::{assert_digests, run_pth};
    use super::*;

    fn run() -> (BTreeMap<String, String>, Named) {
        let reference = Reference::open(&run_pth()).unwrap();
        (reference.args().unwrap(), reference.model().unwrap())
    }

    #[test]
    fn names_go_there_and_back() {
        let (_, model) = run();
        let clean = to_clean(model).unwrap();
        let mut names: Vec<&str> = clean.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        // `MoEUTLM(…).state_dict()` of the clean package has these, for one layer.
        assert_eq!(
            names,
            [
                "embedding.weight",
                "lm_head.bias",
                "lm_head.weight",
                "out_norm.bias",
                "out_norm.weight",
                "transformer.layers.0.attention.k.weight",
                "transformer.layers.0.attention.o",
                "transformer.layers.0.attention.q.weight",
                "transformer.layers.0.attention.sel_o",
                "transformer.layers.0.attention.sel_v",
                "transformer.layers.0.attention.v",
                "transformer.layers.0.ffn.expert_sel",
                "transformer.layers.0.ffn.keys",
                "transformer.layers.0.ffn.values",
                "transformer.layers.0.ln1.bias",
                "transformer.layers.0.ln1.weight",
                "transformer.layers.0.ln2.bias",
                "transformer.layers.0.ln2.weight",
            ]
        );
        assert!(is_clean(&clean));
        let back = to_training(clean);
        assert!(!is_clean(&back));
        let (_, model) = run();
        assert_eq!(back.len(), model.len());
        for (name, tensor) in &model {
            let (_, found) = back.iter().find(|(found, _)| found == name).unwrap();
            assert_eq!(found.size(), tensor.size(), "{name}");
            // The counter is not kept.
            assert!(name.ends_with("pkm.iter") || found.equal(tensor), "{name}");
        }
    }

    #[test]
    fn the_constructor_is_read_from_arguments_and_shapes() {
        let (args, model) = run();
        assert_eq!(
            constructor(&args, &model).unwrap(),
            json!({
                "n_tokens": 7, "d_model": 4, "n_layers": 2, "n_heads": 2, "ff_n_experts": 3, "att_n_experts": 2,
                "d_head": 2, "group_size": 1, "ff_k": 2, "att_k": 1, "ff_expert_dropout": 0.0,
                "att_expert_dropout": 0.0, "ff_expert_size": 2, "dropout": 0.0, "entropy_reg": 0.01,
                "att_entropy_reg": 0.001,
            })
        );
        assert_digests(&model, "model");
    }

    #[test]
    fn what_the_package_cannot_express_is_refused_with_the_reason() {
        for (flag, value, expected) in [
            (
                "moe.nonorm",
                "0",
                "`moe.nonorm` is 0, and the clean package computes as with 1",
            ),
            (
                "transformer.variant",
                "moe_universal",
                "the shell of `preln` variants",
            ),
            (
                "transformer.embedding_scale",
                "2.5",
                "the clean package does not scale",
            ),
            ("rope.base", "500000", "computes as with 10000"),
            ("transformer.activation", "gelu", "computes as with relu"),
            ("transformer.n_heads", "3", "its queries have 4 rows"),
            ("pkm.n_heads", "many", "`pkm.n_heads` is many, no number"),
        ] {
            let (mut args, model) = run();
            args.insert(flag.to_owned(), value.to_owned());
            let why = constructor(&args, &model).unwrap_err();
            assert!(why.contains(expected), "{why}");
        }
        let (mut args, model) = run();
        args.insert("rope.base".to_owned(), "10000.0".to_owned());
        args.insert("moe.nonorm".to_owned(), "True".to_owned());
        assert!(constructor(&args, &model).is_ok());
        args.remove("moe.att.k");
        let why = constructor(&args, &model).unwrap_err();
        assert_eq!(why, "its arguments do not say `moe.att.k`");
    }

    #[test]
    fn one_attention_expert_and_foreign_parameters_are_refused() {
        let (args, mut model) = run();
        for (name, tensor) in &mut model {
            if name.contains("selections.") {
                *tensor = tensor.narrow(0, 0, 2);
            }
        }
        let why = constructor(&args, &model).unwrap_err();
        assert!(why.contains("the training code gates values"), "{why}");
        model.push(("unique_layers.0.pkm.bias".to_owned(), Tensor::from(0.0)));
        let why = to_clean(model).unwrap_err();
        assert_eq!(
            why,
            "the clean package has no parameter like `unique_layers.0.pkm.bias`"
        );
    }
}
