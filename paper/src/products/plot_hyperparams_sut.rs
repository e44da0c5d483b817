//! Table 4: the hyper-parameters of the Sparse Universal Transformer.

use crate::model::Family;
use crate::product::{Made, Product, nothing_else};
use crate::run::Run;
use crate::table::{Column, Table};

pub(super) const PRODUCT: Product = Product {
    name: "plot_hyperparams_sut",
    summary: "hyper-parameters of SUT",
    make,
    sources: nothing_else,
};

const COLUMNS: [Column; 16] = [
    Column::new("Dataset"),
    Column::new("#params"),
    Column::math("n_layers", "$n_\\text{layers}$"),
    Column::math("d_model", "$d_\\text{model}$"),
    Column::math("d_expert", "$d_\\text{expert}$"),
    Column::math("H", "$H$"),
    Column::math("N_A", "$N_A$"),
    Column::math("d_att", "$d_\\text{att}$"),
    Column::math("d_head", "$d_\\text{head}$"),
    Column::math("N_E", "$N_E$"),
    Column::math("K", "$K$"),
    Column::math("L_MIM", "$\\mathcal{L}_\\text{MIM}$"),
    Column::math("L_ACT", "$\\mathcal{L}_\\text{ACT}$"),
    Column::math("N_warmup", "$N_\\text{warmup}$"),
    Column::math("κ", "$\\kappa$"),
    Column::origin("Run"),
];

fn make(runs: &[&Run]) -> Made {
    let mut made = Made::default();
    let rows = made.gather(runs, |run| match run.model.family() {
        Family::Sut => Ok(row(run)),
        family => Err(format!("it is no SUT but {}", family.name())),
    });
    if !rows.is_empty() {
        let table = Table {
            columns: COLUMNS.to_vec(),
            rows: rows.into_iter().map(|(_, row)| row).collect(),
            n_headings: 0,
        };
        made.tables.push((PRODUCT.name.to_owned(), table));
    }
    made
}

fn row(run: &Run) -> Vec<String> {
    let model = &run.model;
    let shown = |value: Option<u64>| value.map(|value| value.to_string()).unwrap_or_default();
    let integer = |name: &str| shown(model.integer(name));
    let number = |name: &str| {
        model
            .number(name)
            .map(|value| value.to_string())
            .unwrap_or_default()
    };
    // An attention expert is so wide, and has as many heads as fit.
    let d_att = model.integer("moe.att.expert_size");
    let n_heads = d_att
        .zip(model.d_head())
        .and_then(|(d_att, d_head)| d_att.checked_div(d_head));
    vec![
        model.dataset_title().to_owned(),
        model.size(),
        integer("transformer.encoder_n_layers"),
        integer("state_size"),
        integer("moe.expert_size"),
        shown(n_heads),
        integer("moe.att.n_experts"),
        shown(d_att),
        shown(model.d_head()),
        integer("moe.n_experts"),
        integer("pkm.n_heads"),
        number("moa.miloss"),
        number("transformer.act_loss"),
        integer("lr_warmup"),
        number("grad_clip"),
        run.name.clone(),
    ]
}
