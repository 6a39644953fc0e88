//! Element types of tensors, named as safetensors names them.

use std::fmt;
use std::str::FromStr;

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    BF16,
    /// IEEE half precision.
    F16,
    /// OCP FP8 with 4 exponent bits, bias 7, no infinities, NaN at 0x7f and 0xff.
    F8E4M3,
    /// Two's complement in a byte: codes of int8 weights, -127 to 127, so that a code's negative is one too.
    I8,
    /// Unsigned 32-bit: token ids, positions, slots.
    U32,
}

impl DType {
    /// Size of one element in bytes.
    #[inline]
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::BF16 | Self::F16 => 2,
            Self::F8E4M3 | Self::I8 => 1,
        }
    }

    /// The name safetensors gives this type.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::BF16 => "BF16",
            Self::F16 => "F16",
            Self::F8E4M3 => "F8_E4M3",
            Self::I8 => "I8",
            Self::U32 => "U32",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A dtype name that no operation here can read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("dtype {0} is not supported (F32, BF16, F16, F8_E4M3, I8 and U32 are)")]
pub struct UnknownDType(pub String);

impl FromStr for DType {
    type Err = UnknownDType;

    fn from_str(name: &str) -> Result<Self, UnknownDType> {
        [Self::F32, Self::BF16, Self::F16, Self::F8E4M3, Self::I8, Self::U32]
            .into_iter()
            .find(|d| d.name() == name)
            .ok_or_else(|| UnknownDType(name.to_owned()))
    }
}
