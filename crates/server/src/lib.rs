//! OpenAI-compatible HTTP: types, routes, SSE, auth, errors, health, drain.
