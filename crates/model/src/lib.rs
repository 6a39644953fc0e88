//! Forward passes, written once, generic over the backend.
