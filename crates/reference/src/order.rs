//! The one order of everything that is ranked: larger first, the lower index among equals, NaN last.

use std::cmp::Ordering;

/// A value to rank by.
fn key(x: f32) -> f32 {
    if x.is_nan() { f32::NEG_INFINITY } else { x }
}

/// Indices of the `count` best of `values`, best first.
pub(crate) fn best_first(values: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    let compare = |a: &usize, b: &usize| key(values[*b]).partial_cmp(&key(values[*a]));
    // The sort is stable, which keeps the lower index first.
    order.sort_by(|a, b| compare(a, b).unwrap_or(Ordering::Equal));
    order.truncate(count);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_keep_the_lower_index_and_nan_comes_last() {
        assert_eq!(best_first(&[1.0, 3.0, f32::NAN, 3.0, -0.0, 0.0], 6), [1, 3, 0, 4, 5, 2]);
        assert_eq!(best_first(&[f32::NEG_INFINITY, f32::INFINITY, 0.0], 2), [1, 2]);
    }
}
