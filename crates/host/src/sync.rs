//! The atomics on which threads meet. With the feature `explore` they are those of `shuttle`, which tries schedules;
//! nothing else in the core knows. Counters ([`crate::stats`]) are not among them: nothing depends on their order.

#[cfg(not(feature = "explore"))]
pub(crate) use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
#[cfg(feature = "explore")]
pub(crate) use shuttle::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
