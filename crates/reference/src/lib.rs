//! The oracle: every backend operation in plain candle, readable, no tricks.
