//! Loops over whole slices that several operations share.

use half::{bf16, f16};
use r1_core::DType;

use super::{Elem, MAX_LANES, Simd, e4m3_to_f32, f32_to_e4m3};

/// Sum of squares.
#[inline(always)]
pub(crate) fn sum_of_squares<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut acc = s.zero();
    let mut chunks = x.chunks_exact(S::LANES);
    for chunk in &mut chunks {
        // SAFETY: a chunk has `LANES` floats.
        let v = unsafe { s.load(chunk.as_ptr()) };
        acc = s.fma(v, v, acc);
    }
    let tail = chunks.remainder();
    // SAFETY: the remainder is shorter than a vector.
    let v = unsafe { s.load_n(tail.as_ptr(), tail.len(), 0.0) };
    s.sum(s.fma(v, v, acc))
}

/// Largest value, NaN ignored; -inf of nothing.
#[inline(always)]
pub(crate) fn max<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut acc = s.splat(f32::NEG_INFINITY);
    let mut chunks = x.chunks_exact(S::LANES);
    for chunk in &mut chunks {
        // SAFETY: a chunk has `LANES` floats.
        acc = s.max(unsafe { s.load(chunk.as_ptr()) }, acc);
    }
    let mut lanes = [f32::NEG_INFINITY; MAX_LANES];
    // SAFETY: `LANES <= MAX_LANES`.
    unsafe { s.store(lanes.as_mut_ptr(), acc) };
    lanes.iter().chain(chunks.remainder()).fold(f32::NEG_INFINITY, |a, &b| a.max(b))
}

/// `LANES` as a function of the value: macros have no name for its type.
#[inline(always)]
pub(crate) fn width<S: Simd>(_: S) -> usize {
    S::LANES
}

/// `x = f(x)` lane by lane, the ragged end padded with `$fill`; gives the sum of the results, padding included.
///
/// A macro, since a closure is not part of the function around it: it would be compiled without its target features.
macro_rules! map_sum {
    ($s:expr, $x:expr, $fill:expr, |$v:ident| $f:expr) => {{
        let (s, x): (_, &mut [f32]) = ($s, $x);
        let lanes = $crate::simd::slice::width(s);
        let mut acc = s.zero();
        let mut chunks = x.chunks_exact_mut(lanes);
        for chunk in &mut chunks {
            // SAFETY: a chunk has `LANES` floats.
            let $v = unsafe { s.load(chunk.as_ptr()) };
            let result = $f;
            // SAFETY: as above.
            unsafe { s.store(chunk.as_mut_ptr(), result) };
            acc = s.add(acc, result);
        }
        let tail = chunks.into_remainder();
        if !tail.is_empty() {
            // SAFETY: the remainder is shorter than a vector.
            let $v = unsafe { s.load_n(tail.as_ptr(), tail.len(), $fill) };
            let result = $f;
            // SAFETY: as above.
            unsafe { s.store_n(tail.as_mut_ptr(), tail.len(), result) };
            acc = s.add(acc, result);
        }
        s.sum(acc)
    }};
}
pub(crate) use map_sum;

/// `out = f(a, b)` lane by lane. The three have one length. A macro for the reason of `map_sum`.
macro_rules! zip {
    ($s:expr, $a:expr, $b:expr, $out:expr, |$va:ident, $vb:ident| $f:expr) => {{
        let (s, a, b, out): (_, &[f32], &[f32], &mut [f32]) = ($s, $a, $b, $out);
        assert!(a.len() == b.len() && b.len() == out.len(), "zip of unequal slices");
        let lanes = $crate::simd::slice::width(s);
        let whole = out.len() / lanes * lanes;
        let mut i = 0;
        while i < whole {
            // SAFETY: `i + LANES <= len` of all three.
            let ($va, $vb) = unsafe { (s.load(a.as_ptr().add(i)), s.load(b.as_ptr().add(i))) };
            let result = $f;
            // SAFETY: as above.
            unsafe { s.store(out.as_mut_ptr().add(i), result) };
            i += lanes;
        }
        let n = out.len() - whole;
        if n > 0 {
            let (a, b, out) = (&a[whole..], &b[whole..], &mut out[whole..]);
            // SAFETY: `n < LANES` floats are left of all three.
            let ($va, $vb) = unsafe { (s.load_n(a.as_ptr(), n, 0.0), s.load_n(b.as_ptr(), n, 0.0)) };
            let result = $f;
            // SAFETY: as above.
            unsafe { s.store_n(out.as_mut_ptr(), n, result) };
        }
    }};
}
pub(crate) use zip;

/// `b = f(a, b)` lane by lane. Both have one length. A macro for the reason of `map_sum`.
macro_rules! update {
    ($s:expr, $a:expr, $b:expr, |$va:ident, $vb:ident| $f:expr) => {{
        let (s, a, b): (_, &[f32], &mut [f32]) = ($s, $a, $b);
        assert_eq!(a.len(), b.len(), "update of unequal slices");
        let lanes = $crate::simd::slice::width(s);
        let whole = b.len() / lanes * lanes;
        let mut i = 0;
        while i < whole {
            // SAFETY: `i + LANES <= len` of both.
            let ($va, $vb) = unsafe { (s.load(a.as_ptr().add(i)), s.load(b.as_ptr().add(i))) };
            let result = $f;
            // SAFETY: as above.
            unsafe { s.store(b.as_mut_ptr().add(i), result) };
            i += lanes;
        }
        let n = b.len() - whole;
        if n > 0 {
            let (a, b) = (&a[whole..], &mut b[whole..]);
            // SAFETY: `n < LANES` floats are left of both.
            let ($va, $vb) = unsafe { (s.load_n(a.as_ptr(), n, 0.0), s.load_n(b.as_ptr(), n, 0.0)) };
            let result = $f;
            // SAFETY: as above.
            unsafe { s.store_n(b.as_mut_ptr(), n, result) };
        }
    }};
}
pub(crate) use update;

/// `x = e^(x * scale - shift)`; returns the sum. The softmax of scores, not yet divided.
#[inline(always)]
pub(crate) fn exp_sum<S: Simd>(s: S, x: &mut [f32], scale: f32, shift: f32) -> f32 {
    let (scale, shift) = (s.splat(scale), s.splat(-shift));
    // The padding adds e^-inf = 0.
    map_sum!(s, x, f32::NEG_INFINITY, |v| s.exp(s.fma(v, scale, shift)))
}

/// `y = a * x + b * y`.
#[inline(always)]
pub(crate) fn axpby<S: Simd>(s: S, a: f32, x: &[f32], b: f32, y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "axpby of unequal slices");
    let (a, b) = (s.splat(a), s.splat(b));
    let whole = y.len() / S::LANES * S::LANES;
    let mut i = 0;
    while i < whole {
        // SAFETY: `i + LANES <= len` of both.
        unsafe {
            let p = y.as_mut_ptr().add(i);
            s.store(p, s.fma(a, s.load(x.as_ptr().add(i)), s.mul(b, s.load(p))));
        }
        i += S::LANES;
    }
    let n = y.len() - whole;
    if n > 0 {
        // SAFETY: `n < LANES` floats are left of both.
        unsafe {
            let p = y.as_mut_ptr().add(whole);
            let v = s.fma(a, s.load_n(x.as_ptr().add(whole), n, 0.0), s.mul(b, s.load_n(p, n, 0.0)));
            s.store_n(p, n, v);
        }
    }
}

/// `x = x * factor`.
#[inline(always)]
pub(crate) fn scale<S: Simd>(s: S, x: &mut [f32], factor: f32) {
    let factor = s.splat(factor);
    map_sum!(s, x, 0.0, |v| s.mul(v, factor));
}

/// `v / (1 + e^-v)`.
#[inline(always)]
pub(crate) fn silu<S: Simd>(s: S, v: S::V) -> S::V {
    s.div(v, s.add(s.splat(1.0), s.exp(s.sub(s.zero(), v))))
}

/// Widens `dst.len()` elements by `E::load_exact`: F8 comes out divided by its `FACTOR`.
///
/// # Safety
/// They can be read at `src`.
#[inline(always)]
pub(crate) unsafe fn widen<S: Simd, E: Elem>(s: S, src: *const E, dst: &mut [f32]) {
    let whole = dst.len() / S::LANES * S::LANES;
    let mut i = 0;
    while i < whole {
        // SAFETY: `i + LANES <= len` of both.
        unsafe { s.store(dst.as_mut_ptr().add(i), E::load_exact(s, src.add(i))) };
        i += S::LANES;
    }
    let n = dst.len() - whole;
    if n > 0 {
        // SAFETY: `n < LANES` elements are left of both.
        unsafe { s.store_n(dst.as_mut_ptr().add(whole), n, E::load_n(s, src.add(whole), n)) };
    }
}

/// Widens `dst.len()` elements times `scale`, each product rounded once.
///
/// # Safety
/// They can be read at `src`.
#[inline(always)]
pub(crate) unsafe fn widen_scaled<S: Simd, E: Elem>(s: S, src: *const E, scale: f32, dst: &mut [f32]) {
    let scale = s.splat(scale * E::FACTOR);
    let whole = dst.len() / S::LANES * S::LANES;
    let mut i = 0;
    while i < whole {
        // SAFETY: `i + LANES <= len` of both.
        unsafe { s.store(dst.as_mut_ptr().add(i), s.mul(E::load_exact(s, src.add(i)), scale)) };
        i += S::LANES;
    }
    let n = dst.len() - whole;
    if n > 0 {
        // SAFETY: `n < LANES` elements are left of both.
        unsafe {
            let v = s.mul(E::load_n(s, src.add(whole), n), scale);
            s.store_n(dst.as_mut_ptr().add(whole), n, v);
        }
    }
}

/// Reads `dst.len()` elements of any float type.
///
/// # Safety
/// They can be read at `src`, which is aligned for them.
#[inline(always)]
pub(crate) unsafe fn read<S: Simd>(s: S, src: *const u8, dtype: DType, dst: &mut [f32]) {
    // SAFETY: the caller allows the reads.
    unsafe {
        match dtype {
            DType::F32 => widen(s, src.cast::<f32>(), dst),
            DType::BF16 => widen(s, src.cast::<bf16>(), dst),
            DType::F16 => widen(s, src.cast::<f16>(), dst),
            DType::F8E4M3 => {
                for (i, value) in dst.iter_mut().enumerate() {
                    *value = e4m3_to_f32(*src.add(i));
                }
            }
            DType::I8 => widen(s, src.cast::<i8>(), dst),
            DType::U32 => panic!("a U32 tensor where floats are expected"),
        }
    }
}

/// Writes floats as any float type, rounded to nearest even; F8 saturates.
///
/// # Safety
/// They can be written at `dst`, which is aligned for them.
#[inline(always)]
pub(crate) unsafe fn write<S: Simd>(s: S, src: &[f32], dst: *mut u8, dtype: DType) {
    // SAFETY: the caller allows the writes; every index stays below `src.len()`.
    unsafe {
        match dtype {
            DType::F32 => std::ptr::copy_nonoverlapping(src.as_ptr(), dst.cast(), src.len()),
            DType::BF16 => {
                let dst = dst.cast::<u16>();
                let whole = src.len() / S::LANES * S::LANES;
                let mut i = 0;
                while i < whole {
                    s.store_bf16(dst.add(i), s.load(src.as_ptr().add(i)));
                    i += S::LANES;
                }
                for (i, &value) in src.iter().enumerate().skip(whole) {
                    *dst.add(i) = bf16::from_f32(value).to_bits();
                }
            }
            DType::F16 => {
                for (i, &value) in src.iter().enumerate() {
                    *dst.cast::<u16>().add(i) = f16::from_f32(value).to_bits();
                }
            }
            DType::F8E4M3 => {
                for (i, &value) in src.iter().enumerate() {
                    *dst.add(i) = f32_to_e4m3(value);
                }
            }
            DType::I8 | DType::U32 => panic!("floats for a tensor of {dtype}"),
        }
    }
}
