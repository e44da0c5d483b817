//! Which distinct layer runs at each place of the stack.

use moeut_plugin_api::PluginError;
use serde::Deserialize;

/// How `G` distinct layers make a stack of `L`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sharing {
    /// Each place has its own layer.
    Unshared,
    /// The group repeats: A B A B.
    Abab,
    /// Each layer repeats: A A B B.
    Aabb,
}

impl Sharing {
    /// For each of the `n_layers` places the index of its distinct layer.
    ///
    /// # Errors
    /// If `group_size` is not a divisor of `n_layers`.
    pub fn order(self, n_layers: usize, group_size: usize) -> Result<Vec<usize>, PluginError> {
        if self == Self::Unshared {
            return Ok((0..n_layers).collect());
        }
        if group_size == 0 || !n_layers.is_multiple_of(group_size) {
            return Err(PluginError::new("layers cannot be shared")
                .why(format!(
                    "`transformer.encoder_n_layers` is {n_layers}, which is no multiple of \
                     `transformer.universal.group_size` {group_size}"
                ))
                .fix(format!(
                    "set `-transformer.encoder_n_layers {}`",
                    n_layers.next_multiple_of(group_size.max(1))
                )));
        }
        let n_repeats = n_layers / group_size;
        let distinct = |place| match self {
            Self::Unshared => place,
            Self::Abab => place % group_size,
            Self::Aabb => place / n_repeats,
        };
        Ok((0..n_layers).map(distinct).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_what_their_names_say() {
        assert_eq!(Sharing::Unshared.order(3, 1).unwrap(), [0, 1, 2]);
        assert_eq!(Sharing::Abab.order(4, 2).unwrap(), [0, 1, 0, 1]);
        assert_eq!(Sharing::Aabb.order(4, 2).unwrap(), [0, 0, 1, 1]);
        assert_eq!(Sharing::Abab.order(3, 1).unwrap(), [0, 0, 0]);
    }

    #[test]
    fn a_group_must_divide_the_stack() {
        let error = Sharing::Abab.order(7, 2).unwrap_err();
        assert_eq!(error.fix, "set `-transformer.encoder_n_layers 8`");
        assert!(Sharing::Aabb.order(7, 0).is_err());
    }
}
