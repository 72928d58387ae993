//! The performance monitors of a REC, as far as the host has to know of them.

use crate::context::{RecContext, word};

/// PMCR_EL0.E: counters and their interrupt are enabled.
pub(crate) const PMCR_E: u64 = 1;

/// Whether the saved monitors assert their interrupt.
pub(crate) fn is_overflow_pending(ctx: &RecContext<'_>) -> bool {
    let overflowed = ctx.get(word::PMOVS) & ctx.get(word::PMINTEN) & ctx.get(word::PMCNTEN);
    overflowed != 0 && ctx.get(word::PMCR) & PMCR_E != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_platform::new_page;

    #[test]
    fn an_overflow_is_pending_if_everything_is_enabled() {
        let words = [word::PMOVS, word::PMINTEN, word::PMCNTEN];
        for missing in 0..=words.len() {
            let page = new_page();
            let ctx = RecContext::new(&page);
            ctx.set(word::PMCR, if missing == words.len() { !PMCR_E } else { PMCR_E });
            for (n, &word) in words.iter().enumerate() {
                // Another counter's bit does not help.
                ctx.set(word, if n == missing { 1 } else { 1 << 31 | 2 });
            }
            assert!(!is_overflow_pending(&ctx), "{missing}");
        }
        let page = new_page();
        let ctx = RecContext::new(&page);
        for word in words {
            ctx.set(word, 1 << 31);
        }
        ctx.set(word::PMCR, PMCR_E);
        assert!(is_overflow_pending(&ctx));
    }
}
