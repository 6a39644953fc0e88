//! Continuous batching as a pure state machine: plan, begin, commit, blocks, simulator.
