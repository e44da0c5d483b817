//! How experts are used: numbers and pictures of selection counts.
//!
//! Shape letters: `L` applications of a layer, `E` experts.

use tch::{Kind, Tensor};

/// `exp(H(p)) / E` of the selection counts `[.., E]`: 1 if all experts are used alike, `1/E` if only one is. `[..]`.
pub fn relative_perplexity(counts: &Tensor) -> Tensor {
    let counts = counts.to_kind(Kind::Float);
    let n_experts = counts.size().last().copied().unwrap_or(1) as f64;
    let entropy = frequencies(&counts).special_entr();
    entropy.sum_dim_intlist(-1i64, false, None).exp() / n_experts
}

/// Share of the experts in counts `[E]` that nothing selected.
pub fn dead_share(counts_e: &Tensor) -> Tensor {
    counts_e.eq(0).to_kind(Kind::Float).mean(None)
}

/// Counts `[.., E]` as shares of their sum over the experts.
pub fn frequencies(counts: &Tensor) -> Tensor {
    let counts = counts.to_kind(Kind::Float);
    &counts / counts.sum_dim_intlist(-1i64, true, None)
}

/// `Σ_e min(f_ae, f_be)` of frequencies `[L, E]`, `[L, L]`: 1 where two applications use their experts equally often, 0
/// where they share none.
pub fn similarity(frequencies_le: &Tensor) -> Tensor {
    let (rows, columns) = (frequencies_le.unsqueeze(0), frequencies_le.unsqueeze(1));
    rows.minimum(&columns).sum_dim_intlist(-1i64, false, None)
}

/// Which entries of a row count in [`universal_scores`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Optimist {
    /// The most similar *other* application.
    Others,
    /// The reference's: also the application itself, so that the number is always 1.
    Reference,
}

/// How universal experts are, from the [`similarity`] `[L, L]` of at least two applications: its mean, and the mean of
/// the rows' maxima.
pub fn universal_scores(similarity_ll: &Tensor, optimist: Optimist) -> [Tensor; 2] {
    let rows = match optimist {
        Optimist::Others => similarity_ll - similarity_ll.diagonal(0, 0, 1).diag_embed(0, 0, 1),
        Optimist::Reference => similarity_ll.shallow_clone(),
    };
    [similarity_ll.mean(None), rows.amax(-1i64, false).mean(None)]
}

/// For `N` selections of `K` experts each, `[N, K]` and `[N, J]`: how often each of `E` is selected with each of `F`,
/// `[E, F]`. Autocast must be off, as its rounding would show in the counts.
pub fn pairs(ids_nk: &Tensor, n_experts: i64, others_nj: &Tensor, n_others: i64) -> Tensor {
    /// Tokens whose selections are spread out at a time, to bound the memory it takes.
    const PIECE: i64 = 8192;
    let pieces = ids_nk.split(PIECE, 0).into_iter();
    let products = pieces.zip(others_nj.split(PIECE, 0)).map(|(ids, others)| {
        let (of, with) = (membership(&ids, n_experts), membership(&others, n_others));
        of.tr().matmul(&with).to_kind(Kind::Int64)
    });
    products.sum()
}

/// 1 where an expert is selected, else 0: ids `[N, K]` → float `[N, E]`.
pub fn membership(ids_nk: &Tensor, n_experts: i64) -> Tensor {
    let options = (Kind::Float, ids_nk.device());
    Tensor::zeros([ids_nk.size()[0], n_experts], options).scatter_value(-1, ids_nk, 1)
}

/// Mean cosine of all pairs of different vectors, which are the rows (`axis` 2) or columns (`axis` 1) of the matrices
/// `[E, A, B]`. Autocast must be off.
///
/// ```text
/// Σ_{i≠j} x̂_i · x̂_j = ‖Σ x̂_i‖² − Σ ‖x̂_i‖²
/// ```
/// so that no pair has to be looked at. The reference multiplies every vector with every other.
pub fn mean_cosine(matrices: &Tensor, axis: i64) -> Tensor {
    let norms = matrices.norm_scalaropt_dim(2, axis, true);
    let inverse = norms.clamp_min(1e-12).reciprocal();
    let n = inverse.numel() as f64;
    let sum = if axis == 1 {
        matrices.bmm(&inverse.transpose(1, 2))
    } else {
        inverse.transpose(1, 2).bmm(matrices)
    };
    let sum = sum.sum_dim_intlist(0i64, false, Kind::Double);
    let own = (norms * inverse).square().sum(Kind::Double);
    (sum.square().sum(None) - own) / (n * (n - 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn close(a: &Tensor, b: f64) -> bool {
        (a.double_value(&[]) - b).abs() < 1e-6
    }

    #[test]
    fn perplexity_is_relative_to_even_use() {
        let counts = Tensor::from_slice2(&[[5i64, 5, 5, 5], [0, 7, 0, 0], [8, 8, 0, 0]]);
        let values = relative_perplexity(&counts);
        for (row, expected) in (0..).zip([1.0, 0.25, 0.5]) {
            assert!(close(&values.get(row), expected));
            assert!(close(&relative_perplexity(&counts.get(row)), expected));
        }
        assert!(close(&dead_share(&counts.get(2)), 0.5));
    }

    #[test]
    fn scores_say_how_alike_applications_are() {
        let counts = Tensor::from_slice2(&[[10i64, 0, 10], [1, 1, 2], [0, 3, 0]]);
        let similar = similarity(&frequencies(&counts));
        let expected = [[1.0, 0.75, 0.0], [0.75, 1.0, 0.25], [0.0, 0.25, 1.0]];
        for (row, expected) in (0..).zip(&expected) {
            for (column, &expected) in (0..).zip(expected) {
                assert!(close(&similar.get(row).get(column), expected));
            }
        }
        let [score, optimist] = universal_scores(&similar, Optimist::Others);
        assert!(close(&score, 5.0 / 9.0) && close(&optimist, 1.75 / 3.0));
        let [score, optimist] = universal_scores(&similar, Optimist::Reference);
        assert!(close(&score, 5.0 / 9.0) && close(&optimist, 1.0));
    }

    /// More tokens than are looked at at a time.
    #[test]
    fn pairs_are_counted_one_by_one() {
        let options = (Kind::Int64, Device::Cpu);
        let n = 10_000;
        // A permutation has no number twice.
        let ids = Tensor::rand([n, 5], (Kind::Float, Device::Cpu)).argsort(-1, false);
        let ids = ids.narrow(1, 0, 2);
        let others = Tensor::randint(3, [n, 1], options);
        let counted = pairs(&ids, 5, &others, 3);
        let mut expected = [[0i64; 3]; 5];
        let (ids, others) = (
            Vec::<Vec<i64>>::try_from(ids).unwrap(),
            Vec::<i64>::try_from(others.reshape([-1])).unwrap(),
        );
        for (of_token, &other) in ids.iter().zip(&others) {
            for &id in of_token {
                let index = |id: i64| usize::try_from(id).unwrap();
                expected[index(id)][index(other)] += 1;
            }
        }
        let counted = Vec::<Vec<i64>>::try_from(counted).unwrap();
        assert_eq!(counted, expected.map(Vec::from));
    }

    #[test]
    fn the_mean_cosine_is_that_of_all_pairs() {
        let matrices = Tensor::randn([3, 4, 5], (Kind::Double, Device::Cpu)) + 0.3;
        let of = |vectors: &Tensor| {
            let (n, mut sum) = (vectors.size()[0], 0.0);
            for (i, j) in (0..n).flat_map(|i| (0..n).map(move |j| (i, j))) {
                if i != j {
                    let (a, b) = (vectors.get(i), vectors.get(j));
                    sum += a.dot(&b).double_value(&[])
                        / (a.norm().double_value(&[]) * b.norm().double_value(&[]));
                }
            }
            sum / (n * (n - 1)) as f64
        };
        let rows = matrices.reshape([12, 5]);
        let columns = matrices.transpose(1, 2).reshape([15, 4]);
        for (axis, vectors) in [(2, rows), (1, columns)] {
            let difference = mean_cosine(&matrices, axis).double_value(&[]) - of(&vectors);
            assert!(difference.abs() < 1e-12, "{difference:e}");
        }
    }
}
