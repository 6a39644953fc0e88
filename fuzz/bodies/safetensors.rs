//! Whatever a weights file's bytes are: an error that names the file, or tensors that can all be read. Shared by the fuzz
//! target and the replay of its corpus.

use std::sync::{Arc, OnceLock};

use r1_core::DType;
use r1_weights::{Checkpoint, Fp8BlockConfig, ModelConfig, Partition, ScaleFmt, WeightsError, widen_to_f32};

const FILE: &str = "fuzzed.safetensors";

pub(crate) fn run(data: &[u8]) {
    let checkpoint = match Checkpoint::from_bytes(FILE, Arc::new(data.to_vec())) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return names_the_file(&error),
    };
    assert!(checkpoint.size_bytes() <= data.len() as u64);
    let names: Vec<&str> = checkpoint.names().collect();
    for name in &names {
        let info = checkpoint.info(name).expect("listed");
        let shape = info.shape.to_vec();
        let dtype = match checkpoint.tensor(name) {
            Ok(tensor) => {
                assert_eq!((tensor.bytes().len(), tensor.shape()), (info.size_bytes, &shape[..]));
                if tensor.dtype() != DType::U32 {
                    assert_eq!(widen_to_f32(&tensor).len(), shape.iter().product::<usize>());
                }
                tensor.dtype()
            }
            Err(error) => {
                names_the_file(&error);
                continue;
            }
        };
        if let (Some(prefix), &[n, k]) = (name.strip_suffix(".weight"), &shape[..]) {
            read_linear(&checkpoint, prefix, n, k, dtype);
        }
    }
    if let Err(error) = checkpoint.verify(config()) {
        names_the_file(&error);
    }
}

/// Reads a linear whole and in halves. Empty ones are no weights: a config has no size of 0.
fn read_linear(checkpoint: &Checkpoint, prefix: &str, n: usize, k: usize, dtype: DType) {
    if n == 0 || k == 0 {
        return;
    }
    let quant = Fp8BlockConfig { block: [2, 2], scale_fmt: ScaleFmt::F32 };
    for partition in [
        Partition::Replicated,
        Partition::Column { rank: 1, world: 2 },
        Partition::Row { rank: 1, world: 2 },
        Partition::Rows { start: n - 1, len: 1 },
        Partition::Columns { start: k - 1, len: 1 },
    ] {
        match checkpoint.linear(prefix, n, k, Some(&quant), partition) {
            Ok(shard) => {
                let [rows, columns] = shard.shape();
                let values = shard.to_f32();
                assert_eq!(values.len(), rows * columns);
                if dtype == DType::F8E4M3 {
                    // The largest code is 448; NaN comes of the two NaN codes alone.
                    assert!(values.iter().all(|v| v.is_nan() || v.abs() <= f32::MAX));
                }
            }
            Err(WeightsError::NotDivisible { .. }) => {}
            Err(error) => names_the_file(&error),
        }
    }
}

fn names_the_file(error: &WeightsError) {
    let text = error.to_string();
    assert!(text.contains(FILE), "{text}");
}

fn config() -> &'static ModelConfig {
    static CONFIG: OnceLock<ModelConfig> = OnceLock::new();
    CONFIG.get_or_init(|| {
        ModelConfig::from_json(include_bytes!("../../crates/cli/model/config.json")).expect("it is served")
    })
}
