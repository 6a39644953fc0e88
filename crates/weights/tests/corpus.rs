//! What fuzzing found stays fixed: the committed corpora, through the bodies of the fuzz targets (see `fuzz/`).

#[path = "../../../fuzz/bodies/config.rs"]
mod config;
#[path = "../../../fuzz/bodies/replay.rs"]
mod replay;
#[path = "../../../fuzz/bodies/safetensors.rs"]
mod safetensors;

#[test]
fn safetensors_corpus() {
    replay::replay("safetensors", safetensors::run);
}

#[test]
fn config_corpus() {
    replay::replay("config", config::run);
}
