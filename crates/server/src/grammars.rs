//! The grammars of the served model, which may still be in the making when the port opens. Knows no request.

use std::fmt::Display;
use std::io;
use std::sync::Arc;
use std::thread;

use r1_text::Grammars;
use tokio::sync::watch;

/// Grammars, or why there will be none.
type Made = Result<Arc<Grammars>, Arc<str>>;

/// Grammars that are there, or will be. Requests that need none do not wait for them.
#[derive(Clone)]
pub struct ServedGrammars(watch::Receiver<Option<Made>>);

impl ServedGrammars {
    /// Makes them on a thread of its own.
    ///
    /// # Errors
    /// When the operating system cannot start a thread.
    pub fn prepare<E: Display>(
        make: impl FnOnce() -> Result<Grammars, E> + Send + 'static,
    ) -> io::Result<Self> {
        let (done, made) = watch::channel(None);
        let work = move || {
            let made = make().map(Arc::new).map_err(|error| error.to_string().into());
            done.send_replace(Some(made));
        };
        // Nobody waits for the thread itself: a panic of its drops the sender.
        thread::Builder::new().name("grammars".into()).spawn(work)?;
        Ok(Self(made))
    }

    /// Waits until they are made.
    ///
    /// # Errors
    /// Why they could not be made.
    pub async fn get(&self) -> Made {
        match self.0.clone().wait_for(Option::is_some).await.as_deref() {
            Ok(Some(made)) => made.clone(),
            _ => Err("the thread that prepares grammars has panicked".into()),
        }
    }
}

impl From<Arc<Grammars>> for ServedGrammars {
    fn from(grammars: Arc<Grammars>) -> Self {
        Self(watch::channel(Some(Ok(grammars))).1)
    }
}
