//! What is asked and when: lengths, arrivals and prompts, all drawn from one seed. Must not know a server.

use std::time::Duration;

use super::DatasetName;

/// The most that a gap between arrivals is drawn to be.
const LONGEST_GAP: Duration = Duration::from_hours(1);

/// A seeded sequence (SplitMix64).
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = self.0;
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform, above 0 and at most 1.
    fn unit(&mut self) -> f64 {
        ((self.next_u64() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    /// Uniform in `low..=high`.
    fn between(&mut self, low: usize, high: usize) -> usize {
        low + (self.next_u64() % (high - low + 1) as u64) as usize
    }

    /// Normal, of mean 0 and deviation 1 (Box and Muller's).
    fn normal(&mut self) -> f64 {
        let (radius, angle) = ((-2.0 * self.unit().ln()).sqrt(), std::f64::consts::TAU * self.unit());
        radius * angle.cos()
    }
}

/// One request of the workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Planned {
    /// When it arrives, from the start.
    pub(super) arrival: Duration,
    /// Tokens of its prompt.
    pub(super) input_tokens: usize,
    /// Tokens to generate.
    pub(super) output_tokens: usize,
    /// Seed of its prompt.
    pub(super) prompt_seed: u64,
}

/// Lengths and arrivals of a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Workload {
    pub(super) dataset: DatasetName,
    pub(super) num_prompts: usize,
    pub(super) input_len: usize,
    pub(super) output_len: usize,
    pub(super) range_ratio: f64,
    /// Requests per second; infinite: all at once.
    pub(super) rate: f64,
    pub(super) seed: u64,
}

impl Workload {
    /// The requests in order of arrival.
    pub(super) fn plan(&self) -> Vec<Planned> {
        // Streams of their own: the same prompts come whatever the rate is.
        let [mut lengths, mut arrivals, mut prompts] =
            [1, 2, 3].map(|stream| Random::new(Random::new(self.seed).next_u64() ^ stream));
        let mut arrival = Duration::ZERO;
        (0..self.num_prompts)
            .map(|i| {
                if i > 0 && self.rate.is_finite() {
                    let gap = -arrivals.unit().ln() / self.rate;
                    arrival += Duration::try_from_secs_f64(gap).unwrap_or(LONGEST_GAP).min(LONGEST_GAP);
                }
                let (input_tokens, output_tokens) = self.lengths(&mut lengths);
                Planned { arrival, input_tokens, output_tokens, prompt_seed: prompts.next_u64() }
            })
            .collect()
    }

    fn lengths(&self, random: &mut Random) -> (usize, usize) {
        match self.dataset {
            DatasetName::Random => {
                let mut length = |longest: usize| {
                    let shortest = (longest as f64 * self.range_ratio) as usize;
                    random.between(shortest.clamp(1, longest), longest)
                };
                (length(self.input_len), length(self.output_len))
            }
            DatasetName::SharegptLike => {
                let mut length = |median: f64, deviation: f64| {
                    ((median * (deviation * random.normal()).exp()) as usize).clamp(4, 1024)
                };
                (length(80.0, 1.4), length(120.0, 1.0))
            }
        }
    }
}

/// Words that every tokenizer of English has in a token or two.
pub(super) const WORDS: [&str; 64] = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school",
    "state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week",
    "company", "system", "program", "question", "work", "number", "night", "point", "home", "water", "room",
    "mother", "area", "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job",
    "word", "business", "issue", "side", "kind", "head", "house", "service", "friend", "father", "power",
    "hour", "game", "line", "end", "member", "law", "car",
];

/// A prompt of `count` words.
pub(super) fn words(count: usize, seed: u64) -> String {
    let mut random = Random::new(seed);
    let words: Vec<&str> = (0..count).map(|_| WORDS[random.between(0, WORDS.len() - 1)]).collect();
    words.join(" ")
}

/// A prompt of every word, that many times.
pub(super) fn every_word(times: usize) -> String {
    WORDS.repeat(times).join(" ")
}

/// A prompt of `count` token ids, from the middle of the vocabulary: control tokens stand at its ends.
pub(super) fn token_ids(count: usize, vocab_size: usize, seed: u64) -> Vec<usize> {
    let mut random = Random::new(seed);
    let (low, high) = (vocab_size / 8, vocab_size - vocab_size / 8 - 1);
    (0..count).map(|_| random.between(low, high)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANDOM: Workload = Workload {
        dataset: DatasetName::Random,
        num_prompts: 2000,
        input_len: 100,
        output_len: 40,
        range_ratio: 1.0,
        rate: f64::INFINITY,
        seed: 1,
    };

    #[test]
    fn a_seed_gives_one_workload() {
        let with = |seed| Workload { range_ratio: 0.5, rate: 10.0, seed, ..RANDOM }.plan();
        assert_eq!(with(1), with(1));
        assert_ne!(with(1), with(2));
        // The rate moves arrivals and nothing else.
        let at_once = Workload { range_ratio: 0.5, ..RANDOM }.plan();
        let asked = |plan: &[Planned]| -> Vec<_> {
            plan.iter().map(|p| (p.input_tokens, p.output_tokens, p.prompt_seed)).collect()
        };
        assert_eq!(asked(&at_once), asked(&with(1)));
        assert!(at_once.iter().all(|planned| planned.arrival.is_zero()));
    }

    #[test]
    fn random_lengths_fill_their_range() {
        assert!(RANDOM.plan().iter().all(|p| (p.input_tokens, p.output_tokens) == (100, 40)));
        let plan = Workload { range_ratio: 0.5, ..RANDOM }.plan();
        let range = |length: fn(&Planned) -> usize| {
            (plan.iter().map(length).min().unwrap(), plan.iter().map(length).max().unwrap())
        };
        assert_eq!(range(|p| p.input_tokens), (50, 100));
        assert_eq!(range(|p| p.output_tokens), (20, 40));
        let plan = Workload { range_ratio: 0.0, ..RANDOM }.plan();
        assert_eq!(plan.iter().map(|p| p.output_tokens).min(), Some(1));
    }

    #[test]
    fn conversations_have_long_tails() {
        let plan = Workload { dataset: DatasetName::SharegptLike, ..RANDOM }.plan();
        let of = |length: fn(&Planned) -> usize| {
            let mut lengths: Vec<usize> = plan.iter().map(length).collect();
            lengths.sort_unstable();
            let mean = lengths.iter().sum::<usize>() / lengths.len();
            (lengths[0], lengths[lengths.len() / 2], mean, lengths[lengths.len() - 1])
        };
        let (least, median, mean, most) = of(|p| p.input_tokens);
        assert!(least == 4 && most == 1024, "{least} {most}");
        assert!((70..90).contains(&median) && (140..220).contains(&mean), "{median} {mean}");
        let (_, median, mean, _) = of(|p| p.output_tokens);
        assert!((108..132).contains(&median) && (160..220).contains(&mean), "{median} {mean}");
    }

    #[test]
    fn arrivals_are_a_poisson_process() {
        let plan = Workload { rate: 50.0, ..RANDOM }.plan();
        let arrivals: Vec<f64> = plan.iter().map(|p| p.arrival.as_secs_f64()).collect();
        let gaps: Vec<f64> = arrivals.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let deviation = (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        // Of exponential gaps both are 1 / rate.
        assert!(
            (mean * 50.0 - 1.0).abs() < 0.1 && (deviation * 50.0 - 1.0).abs() < 0.15,
            "{mean} {deviation}"
        );
        assert!(arrivals.is_sorted() && arrivals[0] == 0.0);
    }

    #[test]
    fn prompts_have_the_length_that_is_asked() {
        assert_eq!(words(7, 3).split(' ').count(), 7);
        assert_ne!(words(50, 3), words(50, 4));
        let ids = token_ids(500, 512, 9);
        assert!(ids.len() == 500 && ids.iter().all(|id| (64..448).contains(id)));
        assert_eq!(token_ids(3, 1, 0), [0; 3]);
    }
}
