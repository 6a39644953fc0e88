//! The default backend: hand-vectorised CPU kernels and a persistent thread pool.
