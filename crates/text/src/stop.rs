//! Stop strings in a stream. Knows nothing of tags or tokens.

/// Finds one string byte by byte (Knuth, Morris, Pratt).
struct Matcher {
    pattern: Vec<u8>,
    /// Per matched length: the longest proper prefix of the pattern that ends there too.
    fallback: Vec<usize>,
    /// Bytes of the pattern that the text ends with.
    matched: usize,
}

impl Matcher {
    fn new(pattern: &str) -> Self {
        let pattern = pattern.as_bytes().to_vec();
        let mut fallback = vec![0; pattern.len() + 1];
        for i in 1..pattern.len() {
            let mut len = fallback[i];
            while len > 0 && pattern[len] != pattern[i] {
                len = fallback[len];
            }
            fallback[i + 1] = len + usize::from(pattern[len] == pattern[i]);
        }
        Self { pattern, fallback, matched: 0 }
    }

    /// Whether the pattern ends at this byte.
    fn feed(&mut self, byte: u8) -> bool {
        if self.matched == self.pattern.len() {
            self.matched = self.fallback[self.matched];
        }
        while self.matched > 0 && self.pattern[self.matched] != byte {
            self.matched = self.fallback[self.matched];
        }
        self.matched += usize::from(self.pattern[self.matched] == byte);
        self.matched == self.pattern.len()
    }

    /// Bytes at the end of the text that a stop string could yet begin with.
    fn may_take(&self) -> usize {
        if self.matched == self.pattern.len() { self.fallback[self.matched] } else { self.matched }
    }
}

/// What came of a piece of text.
pub(crate) struct Fed {
    /// Text that no stop string can take back any more.
    pub(crate) text: String,
    /// Index of the stop string that ended the text.
    pub(crate) stopped: Option<usize>,
}

/// Cuts a stream at the first stop string: the one that ends first, the longest of those that end together.
pub(crate) struct StopStrings {
    matchers: Vec<Matcher>,
    include: bool,
    /// Text, of which the bytes from `start` on are the beginning of a possible stop string.
    held: String,
    start: usize,
}

impl StopStrings {
    /// `stops` are not empty strings; `include` leaves the stop string in the text.
    pub(crate) fn new(stops: &[String], include: bool) -> Self {
        let matchers = stops.iter().map(|s| Matcher::new(s)).collect();
        Self { matchers, include, held: String::new(), start: 0 }
    }

    /// A stop string that ends in `text` acts only if it `may_stop`.
    pub(crate) fn push(&mut self, text: &str, may_stop: bool) -> Fed {
        let old_len = self.held.len();
        self.held.push_str(text);
        for at in old_len..self.held.len() {
            let byte = self.held.as_bytes()[at];
            let mut stop: Option<usize> = None;
            for i in 0..self.matchers.len() {
                let ends_here = self.matchers[i].feed(byte);
                let len = |i: usize| self.matchers[i].pattern.len();
                if ends_here && may_stop && stop.is_none_or(|best| len(i) > len(best)) {
                    stop = Some(i);
                }
            }
            if let Some(stop) = stop {
                let cut = if self.include { at + 1 } else { at + 1 - self.matchers[stop].pattern.len() };
                self.held.truncate(cut);
                return Fed { text: self.finish(), stopped: Some(stop) };
            }
        }
        let keep =
            if self.include { 0 } else { self.matchers.iter().map(Matcher::may_take).max().unwrap_or(0) };
        let certain = self.held.len() - keep;
        let text = self.held[self.start..certain].to_owned();
        self.start = certain;
        // Moving what is kept costs its length: only when as much was given out.
        if self.start >= keep {
            self.held.drain(..self.start);
            self.start = 0;
        }
        Fed { text, stopped: None }
    }

    /// What was held back, when no more text comes.
    pub(crate) fn finish(&mut self) -> String {
        let text = self.held.split_off(self.start);
        self.held.clear();
        self.start = 0;
        text
    }
}
