//! Groups of like rows: agglomerative clustering with complete linkage.

use crate::plot::Matrix;

/// Share of the largest distance up to which rows are one cluster, as in the reference.
const CUT: f64 = 0.5;

/// An order of the first `n` rows in which like ones are neighbours, and the lengths of the clusters in that order.
///
/// ```text
/// distance(a, b)  = |row a - row b|₂                      of two rows; NaN counts as 0
/// distance(A, B)  = max of distance(a, b)                 of two groups: complete linkage
/// clusters: the groups that are left when the nearest two are merged while distance ≤ 0.5 · the largest distance
/// ```
///
/// Ties go to the earlier rows, and the group of the earlier row stands first, so that the order is the same everywhere.
///
/// # Source
/// Murtagh's nearest-neighbour chains, in O(n²) steps; reference code `framework/visualize/plot.py`, `Clustermap`.
pub(crate) fn order(matrix: &Matrix, n: usize) -> (Vec<usize>, Vec<usize>) {
    let mut distances = distances(matrix, n);
    let largest = distances.iter().flatten().copied().fold(0.0, f64::max);
    let mut groups: Vec<Group> = (0..n)
        .map(|row| Group {
            rows: vec![row],
            lengths: vec![1],
        })
        .collect();
    let mut alive: Vec<bool> = vec![true; n];
    let mut chain: Vec<usize> = Vec::new();
    for _ in 1..n {
        let (a, b) = reciprocal_neighbours(&mut chain, &distances, &alive);
        let (a, b) = (a.min(b), a.max(b));
        let distance = distances[a][b];
        // The group keeps the slot of its earlier row.
        let other = std::mem::take(&mut groups[b]);
        groups[a].merge(other, distance <= CUT * largest);
        alive[b] = false;
        for c in (0..n).filter(|&c| alive[c] && c != a) {
            let farthest = distances[a][c].max(distances[b][c]);
            distances[a][c] = farthest;
            distances[c][a] = farthest;
        }
    }
    let all = groups.into_iter().next().unwrap_or_default();
    (all.rows, all.lengths)
}

fn distances(matrix: &Matrix, n: usize) -> Vec<Vec<f64>> {
    let rows: Vec<Vec<f64>> = matrix
        .rows()
        .take(n)
        .map(|row| {
            let finite = |&value: &f32| {
                if value.is_finite() {
                    f64::from(value)
                } else {
                    0.0
                }
            };
            row.iter().map(finite).collect()
        })
        .collect();
    let distance = |a: &[f64], b: &[f64]| {
        let squares = a.iter().zip(b).map(|(x, y)| (x - y).powi(2));
        squares.sum::<f64>().sqrt()
    };
    let mut distances = vec![vec![0.0; n]; n];
    for a in 0..n {
        for b in 0..a {
            let found = distance(&rows[a], &rows[b]);
            distances[a][b] = found;
            distances[b][a] = found;
        }
    }
    distances
}

/// Follows nearest neighbours until two are each other's.
fn reciprocal_neighbours(
    chain: &mut Vec<usize>,
    distances: &[Vec<f64>],
    alive: &[bool],
) -> (usize, usize) {
    if chain.is_empty() {
        chain.extend(alive.iter().position(|&is_alive| is_alive));
    }
    loop {
        let tip = chain[chain.len() - 1];
        let before = chain.len().checked_sub(2).map(|index| chain[index]);
        let others = (0..alive.len()).filter(|&other| alive[other] && other != tip);
        // The one before wins a tie, or chains could run in circles.
        let key = |&other: &usize| (distances[tip][other], before != Some(other));
        let nearest = others.min_by(|a, b| {
            let ((near_a, new_a), (near_b, new_b)) = (key(a), key(b));
            near_a.total_cmp(&near_b).then(new_a.cmp(&new_b))
        });
        let Some(nearest) = nearest else {
            return (tip, tip);
        };
        if before == Some(nearest) {
            chain.truncate(chain.len() - 2);
            return (tip, nearest);
        }
        chain.push(nearest);
    }
}

/// Rows in their order, cut into clusters.
#[derive(Default)]
struct Group {
    rows: Vec<usize>,
    /// Their sum is the number of rows.
    lengths: Vec<usize>,
}

impl Group {
    fn merge(&mut self, other: Group, is_one_cluster: bool) {
        self.rows.extend(other.rows);
        if is_one_cluster {
            self.lengths = vec![self.rows.len()];
        } else {
            self.lengths.extend(other.lengths);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(values: &[f32]) -> Matrix {
        Matrix {
            n_rows: values.len(),
            n_cols: 1,
            values: values.to_vec(),
        }
    }

    /// Places on a line; the largest distance is 10.
    #[test]
    fn groups_are_those_within_half_of_the_largest_distance() {
        let (order, lengths) = order(&column(&[0.0, 10.0, 1.0, 5.5, 9.0, 0.5]), 6);
        assert_eq!(order, [0, 5, 2, 1, 4, 3]);
        assert_eq!(lengths, [3, 3]);
    }

    #[test]
    fn complete_linkage_joins_by_the_farthest_members() {
        // By the nearest members 0, 2, 4, 6 would be one cluster.
        let (order, lengths) = order(&column(&[0.0, 2.0, 4.0, 6.0]), 4);
        assert_eq!((order, lengths), (vec![0, 1, 2, 3], vec![2, 2]));
    }

    #[test]
    fn nothing_one_thing_and_equal_things_are_fine() {
        assert_eq!(order(&column(&[]), 0), (vec![], vec![]));
        assert_eq!(order(&column(&[3.0]), 1), (vec![0], vec![1]));
        let (_, lengths) = order(&column(&[1.0, 1.0, f32::NAN]), 2);
        assert_eq!(lengths, [2]);
    }
}
