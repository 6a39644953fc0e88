//! Host-side communicators: ranks as threads of one process.
