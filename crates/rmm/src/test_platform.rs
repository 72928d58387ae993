//! A machine for unit tests.
