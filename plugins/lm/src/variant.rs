//! The variants of the paper's code, and which model has each.

use moeut_plugin_api::PluginError;

/// By the model that has them.
const VARIANTS: &[(&str, &[&str])] = &[
    (
        "moeut",
        &[
            "moe",
            "preln_moe",
            "moe_universal",
            "preln_moe_universal",
            "preln_moe_parallel",
        ],
    ),
    (
        "dense",
        &[
            "rope",
            "preln_rope",
            "preln_rope_parallel",
            "rope_universal",
            "preln_rope_universal",
        ],
    ),
    (
        "sut",
        &[
            "sut_universal",
            "preln_sut_universal",
            "actsut_universal",
            "preln_actsut_universal",
        ],
    ),
];

/// The model of a variant.
///
/// A name that has nothing of the paper's variants is that of a model, so that another model needs no edit here. One
/// that does have something of them is a misspelled variant, unless it says `name@plugin`.
///
/// # Errors
/// For a misspelled variant.
pub fn model(variant: &str) -> Result<&str, PluginError> {
    let of_paper = VARIANTS
        .iter()
        .find(|(_, variants)| variants.contains(&variant));
    let resembles = |part: &&str| variant.contains(part) && !variant.contains('@');
    match (
        of_paper,
        ["sut", "rope", "moe"].iter().find(|part| resembles(part)),
    ) {
        (Some((model, _)), _) => Ok(model),
        (None, None) => Ok(variant),
        (None, Some(_)) => {
            let known: Vec<String> = VARIANTS
                .iter()
                .flat_map(|(_, variants)| *variants)
                .map(|known| format!("`{known}`"))
                .collect();
            let error = PluginError::new(format!("unknown variant `{variant}`"))
                .why(format!("the variants are {}", known.join(", ")))
                .fix(
                    "set `-transformer.variant` to one of these, or to the name of a model plugin",
                );
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_lead_to_models() {
        for (variant, expected) in [
            ("preln_moe_universal", "moeut"),
            ("moe", "moeut"),
            ("preln_rope", "dense"),
            ("rope_universal", "dense"),
            ("actsut_universal", "sut"),
            ("gpt", "gpt"),
            ("dense", "dense"),
            ("moe_plus@somebodys-model", "moe_plus@somebodys-model"),
        ] {
            assert_eq!(model(variant), Ok(expected));
        }
        let error = model("prelm_rope").unwrap_err();
        assert_eq!(error.what, "unknown variant `prelm_rope`");
        for (_, variants) in VARIANTS {
            assert!(
                variants
                    .iter()
                    .all(|one| error.why.contains(&format!("`{one}`")))
            );
        }
    }
}
