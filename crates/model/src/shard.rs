//! How many bytes of weights a rank holds, from names and shapes alone: known before a byte of them is read.

use std::ops::Range;

use r1_weights::{Checkpoint, ExpectedTensor, ModelConfig, QuantizedFormat, TensorKind, expected_tensors};

use crate::{ModelError, ModelOptions, WeightFormat};

/// Which part of a tensor a rank holds, as [`load`](crate::load) cuts it.
enum Cut {
    All,
    /// An equal range of rows.
    Rows,
    /// An equal range of columns.
    Columns,
}

fn cut(tensor: &ExpectedTensor) -> Cut {
    let is = |linear: &str| tensor.name.contains(linear);
    match tensor.kind {
        TensorKind::Norm | TensorKind::Router | TensorKind::CorrectionBias | TensorKind::MtpProjection => {
            Cut::All
        }
        TensorKind::Embedding | TensorKind::Head => Cut::Rows,
        TensorKind::Linear | TensorKind::ExpertLinear => {
            if is(".q_a_proj.") || is(".kv_a_proj_with_mqa.") {
                Cut::All
            } else if is(".o_proj.") || is(".down_proj.") {
                Cut::Columns
            } else {
                Cut::Rows
            }
        }
    }
}

/// Bytes of the weights that a rank of the stage holds once it is loaded: what
/// [`DeepSeek::weight_bytes`](crate::DeepSeek::weight_bytes) says then. The checkpoint was verified.
pub(crate) fn weight_bytes(checkpoint: &Checkpoint, config: &ModelConfig, options: &ModelOptions) -> usize {
    let stage = options.layers.clone().unwrap_or(0..config.num_hidden_layers);
    let (is_first, is_last) = (stage.start == 0, stage.end == config.num_hidden_layers);
    let is_held = |tensor: &ExpectedTensor| {
        let layer =
            tensor.name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
        match (layer, tensor.kind) {
            (Some(layer), _) => stage.contains(&layer),
            // A tied head on another stage than the table's needs the table as well.
            (None, TensorKind::Embedding) => is_first || is_last && config.tie_word_embeddings,
            (None, TensorKind::Head) => is_last && !config.tie_word_embeddings,
            (None, _) => is_last,
        }
    };
    expected_tensors(config)
        .filter(is_held)
        .map(|tensor| tensor_bytes(checkpoint, config, options, &tensor))
        .sum()
}

/// What a tensor is quantised to at load.
fn quantized(options: &ModelOptions, tensor: &ExpectedTensor) -> Option<QuantizedFormat> {
    match tensor.kind {
        TensorKind::Linear | TensorKind::ExpertLinear | TensorKind::Head => {
            options.weights.quantized(tensor.name.trim_end_matches(".weight"))
        }
        _ => None,
    }
}

/// Rows, and which columns, of a matrix a rank holds.
fn part(options: &ModelOptions, cut: &Cut, tensor: &ExpectedTensor) -> (usize, Range<usize>) {
    let (rank, world) = (options.rank.0, options.world_size);
    let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
    match cut {
        Cut::All => (rows, 0..columns),
        Cut::Rows => (rows / world, 0..columns),
        Cut::Columns => (rows, rank * (columns / world)..(rank + 1) * (columns / world)),
    }
}

/// Refuses a quantisation whose format a tensor of this model cannot have.
pub(crate) fn check_quantized(config: &ModelConfig, options: &ModelOptions) -> Result<(), ModelError> {
    if options.weights.needs().is_empty() {
        return Ok(());
    }
    for tensor in expected_tensors(config) {
        let Some(format) = quantized(options, &tensor) else { continue };
        let (_, columns) = part(options, &cut(&tensor), &tensor);
        if !format.takes(&columns) {
            let flag = options.weights.flag();
            return Err(ModelError::Unsupported {
                what: format!("--quantization {flag} of {}", tensor.name),
                why: format!(
                    "rank {} of {} holds its columns {columns:?}, and int4 rows are whole words of 8; take int8, or another --tp",
                    options.rank, options.world_size
                ),
            });
        }
    }
    Ok(())
}

fn tensor_bytes(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    options: &ModelOptions,
    tensor: &ExpectedTensor,
) -> usize {
    let (rank, world) = (options.rank.0, options.world_size);
    let values: usize = tensor.shape.iter().product();
    let cut = cut(tensor);
    let held = if matches!(cut, Cut::All) { values } else { values / world };
    if let Some(format) = quantized(options, tensor) {
        let (rows, columns) = part(options, &cut, tensor);
        return format.size_bytes(rows, &columns);
    }
    let stored = checkpoint.info(&tensor.name).expect("a verified checkpoint holds it");
    if tensor.kind == TensorKind::CorrectionBias {
        // Held as F32, whatever it is stored as.
        return 4 * held;
    }
    let fp8 = config.quantization.filter(|_| stored.dtype == "F8_E4M3");
    let Some(fp8) = fp8 else { return held * (stored.size_bytes / values.max(1)) };
    if options.weights == WeightFormat::WidenToBf16 {
        return 2 * held;
    }
    // Blocks that the range of rows and columns touches; their scales are F32.
    let blocks = |dim: usize, is_cut: bool| {
        let part = tensor.shape[dim] / world;
        let (start, end) = if is_cut { (rank * part, (rank + 1) * part) } else { (0, tensor.shape[dim]) };
        end.div_ceil(fp8.block[dim]) - start / fp8.block[dim]
    };
    held + 4 * blocks(0, matches!(cut, Cut::Rows)) * blocks(1, matches!(cut, Cut::Columns))
}
