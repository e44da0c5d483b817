//! All tables and figures, one file each.

mod experts_per_token;
mod group_size;
mod layer_similarity;
mod main_result_table;
mod plot_analysis;
mod plot_code;
mod plot_compute;
mod plot_expert_size;
mod plot_flops_scaling;
mod plot_hyperparams;
mod plot_hyperparams_sut;
mod plot_k;
mod plot_layernorm;
mod plot_scaling;
mod plot_update_magnitude;
mod sut;
mod sut_result_table;
mod time_and_memory;
mod token_experts;

use crate::product::Product;

/// In the order of the paper: tables, then figures.
pub(crate) const ALL: &[Product] = &[
    main_result_table::PRODUCT,
    sut_result_table::PRODUCT,
    plot_hyperparams::PRODUCT,
    plot_hyperparams_sut::PRODUCT,
    time_and_memory::PRODUCT,
    plot_compute::PRODUCT,
    plot_scaling::PRODUCT,
    plot_flops_scaling::PRODUCT,
    plot_code::PRODUCT,
    group_size::PRODUCT,
    sut::PRODUCT,
    plot_layernorm::PRODUCT,
    plot_analysis::PRODUCT,
    experts_per_token::PRODUCT,
    layer_similarity::PRODUCT,
    token_experts::PRODUCT,
    plot_update_magnitude::PRODUCT,
    plot_expert_size::PRODUCT,
    plot_k::PRODUCT,
];
