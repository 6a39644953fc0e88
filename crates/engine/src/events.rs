//! The way of one generation's events from the engine thread to its reader: a bounded queue that never blocks the sender.
//! A reader that falls too far behind loses its generation, not the engine's memory. Knows nothing of requests.
//!
//! Sending allocates only while the reader is behind by more than ever before.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::{EngineError, Event};

/// Room made at the start; a reader that keeps up never needs more.
const INITIAL_EVENTS: usize = 256;

struct State {
    unread: VecDeque<Event>,
    /// How it ended; given once `unread` is empty.
    end: Option<Event>,
    waker: Option<Waker>,
    /// The reader is gone.
    abandoned: bool,
}

struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    max_unread_tokens: usize,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every holder leaves the state whole: pushes and pops are single statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, mut state: MutexGuard<'_, State>) {
        let waker = state.waker.take();
        drop(state);
        self.changed.notify_one();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The reader will see it.
    Delivered,
    /// Nobody reads any more.
    Abandoned,
    /// The reader was too far behind; it will see [`EngineError::SlowReader`] after what it has not read yet.
    Overflowed,
}

/// The engine's end. Dropped without an end, it tells the reader that the engine has stopped.
pub struct EventSender(Arc<Queue>);

/// The reader's end.
pub(crate) struct EventReceiver(Arc<Queue>);

/// A queue of at most `max_unread_tokens` tokens, and of the event before them; a second one takes a token's place.
pub(crate) fn queue(max_unread_tokens: usize) -> (EventSender, EventReceiver) {
    let state = State {
        unread: VecDeque::with_capacity(max_unread_tokens.saturating_add(1).min(INITIAL_EVENTS)),
        end: None,
        waker: None,
        abandoned: false,
    };
    let queue = Arc::new(Queue { state: Mutex::new(state), changed: Condvar::new(), max_unread_tokens });
    (EventSender(queue.clone()), EventReceiver(queue))
}

impl EventSender {
    /// Hands over an event that is not the last one.
    pub fn send(&self, event: Event) -> Sent {
        let mut state = self.0.lock();
        if state.abandoned {
            return Sent::Abandoned;
        }
        if state.end.is_some() {
            return Sent::Overflowed;
        }
        let sent = if state.unread.len() <= self.0.max_unread_tokens {
            state.unread.push_back(event);
            Sent::Delivered
        } else {
            state.end = Some(Event::Failed(EngineError::SlowReader { max_unread: self.0.max_unread_tokens }));
            Sent::Overflowed
        };
        self.0.wake(state);
        sent
    }

    /// Hands over the last event, for which there is always room.
    pub fn end(self, event: Event) {
        self.0.lock().end.get_or_insert(event);
    }
}

impl Drop for EventSender {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.end.get_or_insert(Event::Failed(EngineError::Stopped));
        self.0.wake(state);
    }
}

impl EventReceiver {
    /// The next event; the last one for ever after it was reached.
    pub(crate) fn poll(&self, context: &mut Context<'_>) -> Poll<Event> {
        let mut state = self.0.lock();
        if let Some(event) = state.unread.pop_front() {
            return Poll::Ready(event);
        }
        if let Some(event) = &state.end {
            return Poll::Ready(event.clone());
        }
        match &mut state.waker {
            Some(waker) => waker.clone_from(context.waker()),
            waker => *waker = Some(context.waker().clone()),
        }
        Poll::Pending
    }

    /// As [`poll`](Self::poll), for a thread that may block.
    pub(crate) fn wait(&self) -> Event {
        let mut state = self.0.lock();
        loop {
            if let Some(event) = state.unread.pop_front() {
                return event;
            }
            if let Some(event) = &state.end {
                return event.clone();
            }
            state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for EventReceiver {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.abandoned = true;
        state.unread = VecDeque::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use r1_core::{FinishReason, TokenId};

    fn token(id: u32) -> Event {
        Event::Token { token: TokenId(id), logprobs: None }
    }

    fn id(event: &Event) -> u32 {
        match event {
            Event::Token { token, .. } => token.0,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn events_come_in_order_and_the_end_comes_last() {
        let (sender, receiver) = queue(3);
        assert_eq!(sender.send(token(1)), Sent::Delivered);
        assert_eq!(sender.send(token(2)), Sent::Delivered);
        sender.end(Event::Finished(FinishReason::Length));
        assert_eq!((id(&receiver.wait()), id(&receiver.wait())), (1, 2));
        assert!(matches!(receiver.wait(), Event::Finished(FinishReason::Length)));
    }

    #[test]
    fn a_reader_that_falls_behind_keeps_what_was_sent_and_then_fails() {
        let (sender, receiver) = queue(1);
        let sent: Vec<_> = (0..4).map(|i| sender.send(token(i))).collect();
        assert_eq!(sent, [Sent::Delivered, Sent::Delivered, Sent::Overflowed, Sent::Overflowed]);
        sender.end(Event::Finished(FinishReason::Length));
        assert_eq!((id(&receiver.wait()), id(&receiver.wait())), (0, 1));
        let slow = EngineError::SlowReader { max_unread: 1 };
        assert!(matches!(receiver.wait(), Event::Failed(error) if error == slow));
    }

    #[test]
    fn each_end_notices_that_the_other_is_gone() {
        let (sender, receiver) = queue(2);
        drop(receiver);
        assert_eq!(sender.send(token(1)), Sent::Abandoned);

        let (sender, receiver) = queue(2);
        let reader = std::thread::spawn(move || receiver.wait());
        drop(sender);
        assert!(matches!(reader.join().unwrap(), Event::Failed(EngineError::Stopped)));
    }
}
