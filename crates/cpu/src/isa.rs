//! Which vector instructions the kernels use: detected once, fixed for the life of a backend.

use std::fmt;

use crate::CpuError;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512, Simd};
use crate::simd::{Kernel, Portable};

/// Vector instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 with BF16, VBMI and VNNI (Zen 4, Sapphire Rapids): as [`Avx512`](Self::Avx512), and BF16 inputs are multiplied in
    /// pairs, int8 ones in fours.
    Avx512Bf16,
    /// AVX-512 F, BW, DQ and VL: 16 lanes.
    Avx512,
    /// AVX2, FMA and F16C: 8 lanes.
    Avx2,
    /// Whatever the compiler makes of plain loops.
    Portable,
}

impl Isa {
    /// All, best first.
    pub const ALL: [Self; 4] = [Self::Avx512Bf16, Self::Avx512, Self::Avx2, Self::Portable];

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => {
                Self::Avx512.is_available()
                    && is_x86_feature_detected!("avx512bf16")
                    && is_x86_feature_detected!("avx512vbmi")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx512Bf16 | Self::Avx512 | Self::Avx2 => false,
            Self::Portable => true,
        }
    }

    fn best() -> Self {
        Self::ALL.into_iter().find(|isa| isa.is_available()).unwrap_or(Self::Portable)
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Avx512Bf16 => "AVX-512 with BF16",
            Self::Avx512 => "AVX-512",
            Self::Avx2 => "AVX2",
            Self::Portable => "portable",
        })
    }
}

/// An [`Isa`] that this machine is known to have.
#[derive(Clone, Copy)]
pub(crate) struct Available(Isa);

impl Available {
    /// The asked one, or the best.
    pub(crate) fn choose(asked: Option<Isa>) -> Result<Self, CpuError> {
        let isa = asked.unwrap_or_else(Isa::best);
        if isa.is_available() { Ok(Self(isa)) } else { Err(CpuError::IsaUnavailable { isa }) }
    }

    pub(crate) fn isa(self) -> Isa {
        self.0
    }

    /// Runs `kernel` compiled for these instructions.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        match self.0 {
            // SAFETY: `choose` found the instructions.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => unsafe { Avx512::<true>::new() }.call(kernel),
            // SAFETY: `choose` found the instructions.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { Avx512::<false>::new() }.call(kernel),
            // SAFETY: `choose` found the instructions.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { Avx2::new() }.call(kernel),
            _ => kernel.run(Portable),
        }
    }

    /// Whether inputs that are BF16 are multiplied in pairs, and int8 ones in fours.
    pub(crate) fn has_pairs(self) -> bool {
        self.0 == Isa::Avx512Bf16
    }
}
