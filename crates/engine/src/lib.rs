//! Runs the ranks: handle, step loop, batch inputs, statistics.
