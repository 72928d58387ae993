//! What the host kernel complains about on its console. A kernel that complains has found a mistake, most likely ours: tests
//! fail of it, and users are told.

/// What begins or names a complaint, where it is not the end of a longer word.
const SIGNS: &[&str] = &[
    "WARNING:",
    "BUG:",
    "kernel BUG at",
    "Internal error:",
    "Unable to handle kernel",
    "Call trace:",
    "INFO: task ",
    "INFO: trying to register non-static key",
    "stall on CPU",
    "detected stall",
    "detected expedited stall",
    "kthread starved",
    "scheduling while atomic",
    "sleeping function called from invalid context",
    "possible circular locking",
    "possible recursive locking",
    "possible irq lock inversion",
    "inconsistent lock state",
    "suspicious RCU usage",
    "bad unlock balance",
    "lock held when returning to user space",
    "held lock freed",
    "KASAN:",
    "UBSAN:",
    "KFENCE:",
    "KCSAN:",
    "ODEBUG:",
    "DEBUG_LOCKS_WARN_ON",
    "list_add corruption",
    "list_del corruption",
    "refcount_t:",
    "page dumped because",
    "pagealloc: memory corruption",
    "Object already free",
    "Poison overwritten",
    "Redzone overwritten",
    "Objects remaining in",
    "nobody cared",
    "page allocation failure",
    "workqueue lockup",
    "SError Interrupt",
    "new suspected memory leaks",
];

/// The report of a process that is killed for want of memory has a trace, but is one complaint.
const OUT_OF_MEMORY: &str = "invoked oom-killer";
/// Such a report ends with who was killed.
const OUT_OF_MEMORY_ENDS: &str = "oom-kill:constraint";

/// Looks at a console line by line.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    out_of_memory: bool,
}

impl Watch {
    /// Whether this line complains.
    pub(crate) fn sees(&mut self, line: &str) -> bool {
        if self.out_of_memory {
            self.out_of_memory = !line.contains(OUT_OF_MEMORY_ENDS);
            return false;
        }
        if line.contains(OUT_OF_MEMORY) {
            self.out_of_memory = true;
            return true;
        }
        SIGNS.iter().any(|sign| begins(line, sign))
    }
}

/// Whether `line` has `sign` where a word begins.
fn begins(line: &str, sign: &str) -> bool {
    line.match_indices(sign)
        .any(|(at, _)| !line[..at].ends_with(|before: char| before.is_ascii_alphanumeric() || before == '_'))
}

/// Whether that complaint is of a control group, or a machine, whose memory is used up.
pub(crate) fn is_out_of_memory(line: &str) -> bool {
    line.contains(OUT_OF_MEMORY)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints(text: &str) -> Vec<&str> {
        let mut watch = Watch::default();
        text.lines().filter(|line| watch.sees(line)).collect()
    }

    #[test]
    fn what_a_kernel_says_in_peace_is_no_complaint() {
        let boot = "[    0.000000] rcu: Hierarchical RCU implementation.\n\
                    [    0.000000] rcu: \tRCU calculated value of scheduler-enlistment delay is 25 jiffies.\n\
                    [    0.000000] kasan: KernelAddressSanitizer initialized (generic)\n\
                    [    0.000000] Dynamic Preempt: voluntary\n\
                    [    0.012345] rcu: srcu_init: Setting srcu_struct sizes based on contention.\n\
                    [    0.5] Lock dependency validator: Copyright (c) 2006 Red Hat, Inc., Ingo Molnar\n\
                    [    1.5] kvm_realm: loading out-of-tree module taints kernel.\n\
                    [    1.6] kvm-realm: module: ABI v2, RMI 1.0\n\
                    [    1.7] DEBUG: unmapping init memory\n\
                    RMM: ready";
        assert_eq!(complaints(boot), Vec::<&str>::new());
    }

    #[test]
    fn each_kind_of_complaint_is_seen() {
        for line in [
            "[  9.1] WARNING: CPU: 0 PID: 77 at kernel/rcu/tree.c:1 x+0x1/0x2",
            "[  9.1] WARNING: possible circular locking dependency detected",
            "[  9.1] WARNING: possible recursive locking detected",
            "[  9.1] WARNING: suspicious RCU usage",
            "[  9.1] BUG: scheduling while atomic: realm/77/0x00000002",
            "[  9.1] BUG: sleeping function called from invalid context at mm/slab.h:1",
            "[  9.1] BUG: KASAN: slab-use-after-free in kvmr_ioctl+0x1/0x2",
            "[  9.1] BUG: Bad page state in process realm  pfn:41234",
            "[  9.1] kernel BUG at /tmp/services.c:57!",
            "[  9.1] Internal error: synchronous external abort: 0000000096000028 [#1] SMP",
            "[  9.1] Unable to handle kernel NULL pointer dereference at virtual address 0",
            "[  9.1] Call trace:",
            "[  9.1] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "[  9.1] rcu: INFO: rcu_sched self-detected stall on CPU",
            "[  9.1] INFO: task realm:77 blocked for more than 120 seconds.",
            "[  9.1] watchdog: BUG: soft lockup - CPU#1 stuck for 23s! [realm:77]",
            "[  9.1] UBSAN: shift-out-of-bounds in run.c:1:2",
            "[  9.1] ODEBUG: free active (active state 0) object: 1 object type: hrtimer",
            "[  9.1] list_add corruption. next->prev should be prev",
            "[  9.1] refcount_t: underflow; use-after-free.",
            "[  9.1] irq 11: nobody cared (try booting with the \"irqpoll\" option)",
            "[  9.1] realm: page allocation failure: order:9, mode:0x1",
            "[  9.1] BUG kmalloc-64 (Tainted: G O): Objects remaining in kmalloc-64 on __kmem_cache_shutdown()",
            "[  9.1] kmemleak: 1 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
        ] {
            assert_eq!(complaints(line), [line]);
        }
    }

    #[test]
    fn the_report_of_a_killed_process_is_one_complaint() {
        let text = "[ 9.1] realm invoked oom-killer: gfp_mask=0x400cc0, order=0, oom_score_adj=0\n\
                    [ 9.1] CPU: 0 PID: 77 Comm: realm\n[ 9.1] Call trace:\n[ 9.1]  dump_backtrace\n\
                    [ 9.1] oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),task=realm\n\
                    [ 9.1] Memory cgroup out of memory: Killed process 77 (realm)\n\
                    [ 9.2] WARNING: CPU: 0 PID: 1";
        let found = complaints(text);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(is_out_of_memory(found[0]) && !is_out_of_memory(found[1]));
    }
}
