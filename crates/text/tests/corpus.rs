//! What fuzzing found stays fixed: the committed corpora, through the bodies of the fuzz targets (see `fuzz/`).

#[path = "../../../fuzz/bodies/detokenizer.rs"]
mod detokenizer;
#[path = "../../../fuzz/bodies/replay.rs"]
mod replay;
#[path = "../../../fuzz/bodies/template.rs"]
mod template;

#[test]
fn template_corpus() {
    replay::replay("template", template::run);
}

#[test]
fn detokenizer_corpus() {
    replay::replay("detokenizer", detokenizer::run);
}
