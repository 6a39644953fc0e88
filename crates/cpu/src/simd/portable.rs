//! Plain loops over arrays: every machine, and what the vector instructions are compared with.

use half::{bf16, f16};

use super::{Kernel, Simd, e4m3_to_f32};

const LANES: usize = 8;

/// Values of the E4M3 codes times 2^-8.
static F8_TABLE: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = e4m3_to_f32(code as u8) / 256.0;
        code += 1;
    }
    table
};

/// No vector instructions needed.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

type V = [f32; LANES];

#[inline(always)]
fn zip(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type V = V;
    const LANES: usize = LANES;
    const TILE_TOKENS: usize = 2;
    const STREAMED_TOKENS: usize = 2;

    #[inline(never)]
    fn call<K: Kernel>(self, kernel: K) {
        kernel.run(self);
    }

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; LANES]
    }

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a / b)
    }

    // Not `mul_add`: without the instruction that is a call into libm.
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn round(self, v: V) -> V {
        // Adding 1.5 * 2^23 leaves no bits for a fraction; enough for the small numbers of `exp`.
        v.map(|x| if x.abs() < 4_194_304.0 { (x + 12_582_912.0) - 12_582_912.0 } else { x })
    }

    #[inline(always)]
    fn ldexp(self, v: V, n: V) -> V {
        // Two steps, since 2^n itself need not be a normal number.
        let pow2 = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
        zip(v, n, |v, n| {
            let n = n as i32;
            v * pow2(n >> 1) * pow2(n - (n >> 1))
        })
    }

    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> V {
        // SAFETY: the caller allows `LANES` reads.
        unsafe { p.cast::<V>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> V {
        // SAFETY: the caller allows `LANES` reads.
        unsafe { p.cast::<[u16; LANES]>().read_unaligned() }.map(|x| bf16::from_bits(x).to_f32())
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> V {
        // SAFETY: the caller allows `LANES` reads.
        unsafe { p.cast::<[u16; LANES]>().read_unaligned() }.map(|x| f16::from_bits(x).to_f32())
    }

    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> V {
        // SAFETY: the caller allows `LANES` reads.
        unsafe { p.cast::<[i8; LANES]>().read_unaligned() }.map(f32::from)
    }

    #[inline(always)]
    unsafe fn load_f8(self, p: *const u8) -> V {
        // SAFETY: the caller allows `LANES` reads.
        unsafe { p.cast::<[u8; LANES]>().read_unaligned() }.map(|code| F8_TABLE[code as usize])
    }

    #[inline(always)]
    unsafe fn load_f8_exact(self, p: *const u8) -> V {
        // SAFETY: the same contract.
        unsafe { self.load_f8(p) }
    }

    #[inline(always)]
    unsafe fn has_f8_nan(self, _p: *const u8, _n: usize) -> bool {
        false
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: V) {
        // SAFETY: the caller allows `LANES` writes.
        unsafe { p.cast::<V>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, v: V) {
        // SAFETY: the caller allows `LANES` writes.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(v.map(|x| bf16::from_f32(x).to_bits())) }
    }

    #[inline(always)]
    fn prefetch(self, _p: *const u8) {}
}
