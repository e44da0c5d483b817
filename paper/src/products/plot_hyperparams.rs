//! Table 3: the hyper-parameters of dense models, σ-MoE and MoEUT.

use crate::model::Family;
use crate::product::{Made, Product, nothing_else};
use crate::run::Run;
use crate::table::{Column, Table};

pub(super) const PRODUCT: Product = Product {
    name: "plot_hyperparams",
    summary: "hyper-parameters",
    make,
    sources: nothing_else,
};

const COLUMNS: [Column; 14] = [
    Column::new("Model"),
    Column::new("#params"),
    Column::math("n_layers", "$n_\\text{layers}$"),
    Column::math("G", "$G$"),
    Column::math("d_model", "$d_\\text{model}$"),
    Column::math("d_ff", "$d_\\text{ff}$"),
    Column::math("H", "$H$"),
    Column::math("N_A", "$N_A$"),
    Column::math("d_head", "$d_\\text{head}$"),
    Column::math("N_E", "$N_E$"),
    Column::math("K", "$K$"),
    Column::math("N_warmup", "$N_\\text{warmup}$"),
    Column::math("κ", "$\\kappa$"),
    Column::origin("Run"),
];

fn make(runs: &[&Run]) -> Made {
    let mut made = Made::default();
    let rows = made.gather(runs, |run| match run.model.family() {
        Family::Sut => Err("it is a SUT, and Table 4 is theirs".to_owned()),
        family => Ok(row(run, family)),
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

fn row(run: &Run, family: Family) -> Vec<String> {
    let model = &run.model;
    let shown = |value: Option<u64>| value.map(|value| value.to_string()).unwrap_or_default();
    let integer = |name: &str| shown(model.integer(name));
    let has_experts = matches!(family, Family::SigmaMoe | Family::Moeut);
    let of_experts = |value: String| if has_experts { value } else { String::new() };
    vec![
        family.name().to_owned(),
        model.size(),
        integer("transformer.encoder_n_layers"),
        of_experts(model.n_groups().to_string()),
        integer("state_size"),
        // The width of an expert where there are experts.
        shown(if has_experts {
            model.integer("moe.expert_size")
        } else {
            model.d_ff()
        }),
        integer("transformer.n_heads"),
        of_experts(integer("moe.att.n_experts")),
        shown(model.d_head()),
        of_experts(integer("moe.n_experts")),
        of_experts(integer("pkm.n_heads")),
        integer("lr_warmup"),
        model
            .number("grad_clip")
            .map(|clip| clip.to_string())
            .unwrap_or_default(),
        run.name.clone(),
    ]
}
