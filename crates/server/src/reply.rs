//! One request's running choices, merged into one sequence of updates. Streams forward the updates and plain replies
//! collect them, so both say the same. Must not know OpenAI's JSON.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use axum::response::Response;
use futures_util::stream::{self, SelectAll, Stream, StreamExt};
use r1_core::TokenId;
use r1_engine::{EngineError, Event, Generation, Request};
use tracing::Span;

use crate::access::RequestLog;
use crate::app::App;
use crate::convert::Run;
use crate::decode::{Decoder, Delta, End};
use crate::drain::Active;
use crate::error::ApiError;
use crate::metrics::Ended;
use crate::render::{Gathered, Render};

/// What one choice gained.
#[derive(Debug)]
pub(crate) enum Update {
    /// More text.
    Delta(Delta),
    /// Nothing follows.
    End(End),
}

type Updates = Pin<Box<dyn Stream<Item = Result<(usize, Update), ApiError>> + Send>>;

/// A running reply. Dropping it aborts what still runs.
pub(crate) struct Reply {
    pub(crate) log: Arc<RequestLog>,
    /// How many of the choices, best first, a plain reply shows; `None` for all, in their order.
    keep_best: Option<usize>,
    updates: SelectAll<Updates>,
    /// Which prompt each choice continues.
    prompt_of: Vec<usize>,
    /// Per prompt: its tokens and how many of them its first choice found in the prefix cache.
    prompts: Vec<(u64, u64)>,
    completion_tokens: u64,
    reasoning_tokens: u64,
    active: Active,
}

impl Reply {
    /// Submits all choices or none; what is refused runs nothing and counts nowhere.
    pub(crate) fn start(
        app: &Arc<App>,
        log: Arc<RequestLog>,
        run: Run,
        active: Active,
    ) -> Result<Self, ApiError> {
        let prompts: Vec<(u64, u64)> = run.prompt_tokens.iter().map(|&tokens| (tokens as u64, 0)).collect();
        log.prompt_tokens.store(prompts.iter().map(|p| p.0).sum(), Ordering::Relaxed);
        let prompt_of: Vec<usize> = run.choices.iter().map(|choice| choice.prompt).collect();
        let (requests, waiting): (Vec<_>, Vec<_>) = run
            .choices
            .into_iter()
            .map(|mut choice| {
                choice.decoder.echo(&choice.echo);
                let scored = choice.request.prompt_logprobs.map(|_| choice.request.prompt.clone());
                (choice.request, (choice.prompt, choice.decoder, choice.echo, scored))
            })
            .unzip();
        let of_prompts = requests.iter().map(|request: &Request| &request.prompt[..]);
        log.note_prompts(&app.model.tokenizer, prompt_of.iter().copied().zip(of_prompts));
        let generations = app.engine.submit_all(requests)?;
        let submitted = Instant::now();
        let mut updates = SelectAll::new();
        for (index, (generation, waiting)) in generations.into_iter().zip(waiting).enumerate() {
            let (prompt, decoder, echo, scored) = waiting;
            let running = Choice {
                app: app.clone(),
                log: log.clone(),
                generation: Some(generation),
                decoder: Some(decoder),
                prompt_tokens: prompts[prompt].0,
                submitted,
                last_token: None,
                ended: None,
                phase: tracing::debug_span!(parent: &log.span, "queue", choice = index),
                index,
                echo,
                scored,
            };
            updates.push(running.updates());
        }
        Ok(Self {
            log,
            keep_best: run.keep_best,
            updates,
            prompt_of,
            prompts,
            completion_tokens: 0,
            reasoning_tokens: 0,
            active,
        })
    }

    pub(crate) fn choices(&self) -> usize {
        self.prompt_of.len()
    }

    /// The next update of any choice; `None` when all have ended. After an error nothing follows.
    pub(crate) async fn next(&mut self) -> Option<Result<(usize, Update), ApiError>> {
        let next = tokio::select! {
            biased;
            next = self.updates.next() => next?,
            () = self.active.cut() => {
                self.log.broken_off.store(true, Ordering::Relaxed);
                Err(ApiError::draining())
            }
        };
        match &next {
            Ok((index, Update::End(end))) => {
                let prompt = self.prompt_of[*index];
                // A prompt's further choices find its first one's blocks, which says nothing about the request.
                if self.prompt_of.iter().position(|p| *p == prompt) == Some(*index) {
                    self.prompts[prompt].1 = end.cached_tokens;
                }
                self.completion_tokens += end.completion_tokens;
                self.reasoning_tokens += end.reasoning_tokens;
            }
            Ok((_, Update::Delta(_))) => {}
            Err(_) => self.updates.clear(),
        }
        Some(next)
    }

    /// Tokens read and written so far.
    pub(crate) fn counts(&self) -> Counts {
        let (prompt, cached) = self.prompts.iter().fold((0, 0), |sum, p| (sum.0 + p.0, sum.1 + p.1));
        let (completion, reasoning) = (self.completion_tokens, self.reasoning_tokens);
        Counts { prompt, cached, completion, reasoning }
    }
}

/// Tokens of a request, all choices together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counts {
    pub(crate) prompt: u64,
    /// Of the prompt's, those found in the prefix cache.
    pub(crate) cached: u64,
    pub(crate) completion: u64,
    /// Of the completion's, those of the reasoning.
    pub(crate) reasoning: u64,
}

/// Waits for the whole reply.
pub(crate) async fn collect(mut reply: Reply, mut render: Box<dyn Render>) -> Result<Response, ApiError> {
    let mut choices: Vec<(Delta, Option<End>)> =
        (0..reply.choices()).map(|_| (Delta::default(), None)).collect();
    while let Some(next) = reply.next().await {
        let (index, update) = next?;
        match update {
            Update::Delta(delta) => choices[index].0.append(delta),
            Update::End(end) => choices[index].1 = Some(end),
        }
    }
    let counts = reply.counts();
    let ended = |(delta, end): (Delta, Option<End>)| Gathered {
        delta,
        end: end.expect("every choice ends or fails"),
    };
    let mut choices: Vec<Gathered> = choices.into_iter().map(ended).collect();
    if let Some(best) = reply.keep_best {
        choices = keep_best(choices, &reply.prompt_of, best);
    }
    Ok(render.whole(choices, counts))
}

/// Of each prompt's choices the `best` ones, the likeliest per token first.
fn keep_best(choices: Vec<Gathered>, prompt_of: &[usize], best: usize) -> Vec<Gathered> {
    let mut by_prompt: Vec<(usize, Gathered)> = prompt_of.iter().copied().zip(choices).collect();
    // Stable: equally likely choices stay in their order.
    by_prompt.sort_by(|(a, x), (b, y)| a.cmp(b).then(y.end.mean_logprob.total_cmp(&x.end.mean_logprob)));
    let mut kept = Vec::new();
    let mut of_prompt = (usize::MAX, 0);
    for (prompt, choice) in by_prompt {
        of_prompt = if of_prompt.0 == prompt { (prompt, of_prompt.1 + 1) } else { (prompt, 0) };
        if of_prompt.1 < best {
            kept.push(choice);
        }
    }
    kept
}

/// One running choice.
struct Choice {
    app: Arc<App>,
    log: Arc<RequestLog>,
    /// Dropped as soon as the choice has ended, which aborts it where the engine does not know that yet.
    generation: Option<Generation>,
    decoder: Option<Decoder>,
    prompt_tokens: u64,
    submitted: Instant,
    last_token: Option<Instant>,
    ended: Option<Ended>,
    /// What it is doing: in the queue, in its prefill, or decoding. Lives as long as that lasts. Phases are for traces, which
    /// take spans of every level; at the log's own level each would be written down for lines that nobody logs in it.
    phase: Span,
    index: usize,
    /// Text that stands before what is generated; taken once it was shown.
    echo: String,
    /// The prompt's tokens, where their log-probabilities come before the first token.
    scored: Option<Vec<TokenId>>,
}

impl Choice {
    fn updates(mut self) -> Updates {
        let index = self.index;
        let at_once = !self.echo.is_empty() && self.scored.is_none();
        let echo = at_once.then(|| std::mem::take(&mut self.echo));
        let echo = echo.map(|echo| Ok((index, Update::Delta(Delta::of_content(echo)))));
        let tokens = stream::unfold(self, |mut choice| async move {
            let updates = choice.next().await?;
            Some((stream::iter(updates), choice))
        });
        let numbered = tokens.flatten().map(move |update| update.map(|update| (index, update)));
        Box::pin(stream::iter(echo).chain(numbered))
    }

    /// What the next event brings, at least one update; `None` after the end.
    async fn next(&mut self) -> Option<Vec<Result<Update, ApiError>>> {
        loop {
            let event = self.generation.as_mut()?.next().await?;
            let updates = self.take(event);
            if !updates.is_empty() {
                return Some(updates);
            }
        }
    }

    fn take(&mut self, event: Event) -> Vec<Result<Update, ApiError>> {
        let Some(decoder) = &mut self.decoder else { return Vec::new() };
        match event {
            Event::Scheduled { cached_tokens } => {
                decoder.scheduled(u64::from(cached_tokens));
                self.app.metrics.scheduled(self.submitted.elapsed());
                let (parent, choice) = (&self.log.span, self.index);
                let prompt_tokens = self.prompt_tokens;
                self.phase =
                    tracing::debug_span!(parent: parent, "prefill", choice, prompt_tokens, cached_tokens);
                Vec::new()
            }
            Event::PromptLogprobs(logprobs) => {
                let Some(prompt) = self.scored.take() else { return Vec::new() };
                let echo = std::mem::take(&mut self.echo);
                let mut delta = if echo.is_empty() { Delta::default() } else { Delta::of_content(echo) };
                delta.prompt = Some(decoder.prompt_scores(&prompt, &logprobs));
                vec![Ok(Update::Delta(delta))]
            }
            Event::Token { token, logprobs } => {
                self.log.note_token(self.index, self.app.model.tokenizer.token_bytes(token));
                let stopped = decoder.push(token, logprobs);
                self.count_token();
                if stopped { self.end(None) } else { self.delta() }
            }
            Event::Finished(reason) => self.end(Some(reason)),
            Event::Failed(error) => {
                if matches!(error, EngineError::SlowReader { .. }) {
                    tracing::warn!(parent: &self.log.span, %error, "generation aborted");
                } else {
                    tracing::error!(parent: &self.log.span, %error, "generation failed");
                }
                self.ended = Some(Ended::Failed);
                self.generation = None;
                vec![Err(error.into())]
            }
        }
    }

    fn count_token(&mut self) {
        let now = Instant::now();
        match self.last_token.replace(now) {
            None => {
                self.app.metrics.first_token(now - self.log.received);
                self.phase = tracing::debug_span!(parent: &self.log.span, "decode", choice = self.index);
            }
            Some(last) => self.app.metrics.next_token(now - last),
        }
        self.log.completion_tokens.fetch_add(1, Ordering::Relaxed);
    }

    fn delta(&mut self) -> Vec<Result<Update, ApiError>> {
        let delta = self.decoder.as_mut().and_then(Decoder::take_delta);
        delta.map(|delta| Ok(Update::Delta(delta))).into_iter().collect()
    }

    /// The rest of the text and the end; `reason` is the engine's, `None` where the text itself ended the choice.
    fn end(&mut self, reason: Option<r1_core::FinishReason>) -> Vec<Result<Update, ApiError>> {
        self.generation = None;
        self.phase = Span::none();
        let Some(decoder) = self.decoder.take() else { return Vec::new() };
        let (rest, end) = decoder.finish(reason);
        self.ended = Some(end.ended());
        rest.map(Update::Delta).into_iter().chain([Update::End(end)]).map(Ok).collect()
    }
}

impl Drop for Choice {
    fn drop(&mut self) {
        // Dropped before its end: broken off by the server, whose time for it is over, or given up because its client has
        // left or does not read, or because another choice of the request has failed.
        let broken_off = self.log.broken_off.load(Ordering::Relaxed);
        let unended = if broken_off { Ended::Failed } else { Ended::Abort };
        self.app.metrics.ended(self.ended.unwrap_or(unended), self.log.received.elapsed());
    }
}
