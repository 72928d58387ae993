//! The atomics on which CPUs meet. With the feature `explore` they are those of `shuttle`, which tries schedules;
//! nothing else in the core knows.

#[cfg(not(feature = "explore"))]
pub use core::{
    hint::spin_loop,
    sync::atomic::{AtomicU16, AtomicU64},
};
#[cfg(feature = "explore")]
pub use shuttle::{
    hint::spin_loop,
    sync::atomic::{AtomicU16, AtomicU64},
};
