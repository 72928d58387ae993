// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * Running a vCPU: the SMC itself, what the kernel must be told around it, sleeping, waking, signals.
 */
#include <linux/arm-smccc.h>
#include <linux/hrtimer.h>
#include <linux/interrupt.h>
#include <linux/irq.h>
#include <linux/kvm_host.h>
#include <linux/of.h>
#include <linux/of_irq.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/swait.h>
#include <linux/version.h>
#if __has_include(<linux/entry-virt.h>)
#include <linux/entry-virt.h>
#else
#include <linux/entry-kvm.h>
#define NEEDS_KVM_VCPU
#endif

#include "shim.h"
#define CREATE_TRACE_POINTS
#include "trace.h"

static_assert(sizeof(struct arm_smccc_1_2_regs) == 18 * sizeof(u64));

/* regs: x0 to x17, in and out. */
void shim_smc(u64 *regs)
{
	u64 function = regs[0], x1 = regs[1], x2 = regs[2], x3 = regs[3];

	arm_smccc_1_2_smc((const struct arm_smccc_1_2_regs *)regs, (struct arm_smccc_1_2_regs *)regs);
	trace_rmi(function, x1, x2, x3, regs[0]);
}

void shim_trace_exit(u32 vcpu, u32 reason, u64 esr, u64 ipa)
{
	trace_exit(vcpu, reason, esr, ipa);
}

void shim_trace_fault(u32 vcpu, u64 gpa, bool shared, u32 outcome)
{
	trace_fault(vcpu, gpa, shared, outcome);
}

/* One per vCPU: how to reach the thread that runs it or sleeps for it. */
struct thread {
	raw_spinlock_t lock;		/* guards task */
	struct task_struct *task;	/* the thread inside KVM_RUN, if any */
	struct swait_queue_head queue;
	struct hrtimer timer;
	bool timer_fired;
};

static enum hrtimer_restart timer_fires(struct hrtimer *timer)
{
	struct thread *t = container_of(timer, struct thread, timer);

	WRITE_ONCE(t->timer_fired, true);
	swake_up_one(&t->queue);
	return HRTIMER_NORESTART;
}

void *shim_thread_new(void)
{
	struct thread *t = kzalloc(sizeof(*t), GFP_KERNEL_ACCOUNT | __GFP_NOFAIL);

	raw_spin_lock_init(&t->lock);
	init_swait_queue_head(&t->queue);
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
	hrtimer_setup(&t->timer, timer_fires, CLOCK_MONOTONIC, HRTIMER_MODE_REL_HARD);
#else
	hrtimer_init(&t->timer, CLOCK_MONOTONIC, HRTIMER_MODE_REL_HARD);
	t->timer.function = timer_fires;
#endif
	return t;
}

void shim_thread_free(void *p)
{
	struct thread *t = p;

	hrtimer_cancel(&t->timer);
	kfree(t);
}

/* The calling thread is inside KVM_RUN from here to shim_run_end, and shim_kick reaches it. */
void shim_run_begin(void *p)
{
	struct thread *t = p;
	unsigned long flags;

	raw_spin_lock_irqsave(&t->lock, flags);
	t->task = current;
	raw_spin_unlock_irqrestore(&t->lock, flags);
}

void shim_run_end(void *p)
{
	struct thread *t = p;
	unsigned long flags;

	raw_spin_lock_irqsave(&t->lock, flags);
	t->task = NULL;
	raw_spin_unlock_irqrestore(&t->lock, flags);
}

#ifdef NEEDS_KVM_VCPU
/*
 * Older kernels note a signal in KVM's own structures: run->exit_reason and a statistic. Ours are dummies that all
 * vCPUs share and nobody reads.
 */
static struct kvm_run dummy_run;
static struct kvm_vcpu dummy_vcpu = { .run = &dummy_run };
#define handle_work() xfer_to_guest_mode_handle_work(&dummy_vcpu)
#else
#define handle_work() xfer_to_guest_mode_handle_work()
#endif

/* Rescheduling, signals and other work that must be done before going to the guest: 0 or -EINTR. */
int shim_run_prepare(void)
{
	cond_resched();
	return __xfer_to_guest_mode_work_pending() ? handle_work() : 0;
}

/*
 * The interrupt of the CPUs' PMU. A guest's counter that has overflown keeps its line high, so that with the interrupt
 * enabled each stay in the guest would end at once, before the guest could handle its virtual interrupt.
 */
static int pmu_irq;

void shim_find_pmu(void)
{
	struct device_node *node = of_find_compatible_node(NULL, NULL, "arm,armv8-pmuv3");
	int irq;

	if (!node)
		return;
	irq = of_irq_get(node, 0);
	/* One interrupt for all CPUs of one kind, private to each. */
	if (irq > 0 && irq_is_percpu_devid(irq) && of_irq_get(node, 1) <= 0)
		pmu_irq = irq;
	of_node_put(node);
}

bool shim_can_mask_pmu(void)
{
	return pmu_irq > 0;
}

/*
 * One entry into the guest by the SMC in regs. With interrupts off, last of all, go(ctx) is asked whether to go
 * on; if it says no, or the kernel has work, the SMC is not made and false is returned. A kick that comes
 * after that question is an interrupt that is pending when the SMC is made, which ends it at once: no kick is lost.
 */
bool shim_run_enter(u64 *regs, bool mask_pmu, bool (*go)(void *), void *ctx)
{
	preempt_disable();
	local_irq_disable();
	if (xfer_to_guest_mode_work_pending() || !go(ctx)) {
		local_irq_enable();
		preempt_enable();
		return false;
	}
	/* What the kernel's own use of the PMU has disabled stays so. */
	mask_pmu = mask_pmu && pmu_irq > 0 && irq_percpu_is_enabled(pmu_irq);
	if (mask_pmu)
		disable_percpu_irq(pmu_irq);
	trace_enter(regs[1]);
	guest_timing_enter_irqoff();
	guest_state_enter_irqoff();
	/* Nothing may be traced from here on: the kernel takes us for the guest. */
	arm_smccc_1_2_smc((const struct arm_smccc_1_2_regs *)regs, (struct arm_smccc_1_2_regs *)regs);
	guest_state_exit_irqoff();
	if (mask_pmu)
		enable_percpu_irq(pmu_irq, IRQ_TYPE_NONE);
	/* The interrupt that ended the run is taken here, still on the guest's account. */
	local_irq_enable();
	isb();
	local_irq_disable();
	guest_timing_exit_irqoff();
	local_irq_enable();
	preempt_enable();
	return true;
}

/*
 * Sleeps until wake(ctx) says true after a kick, the time has passed (U64_MAX: never), or a signal is there.
 * 0, or -EINTR for a signal.
 */
int shim_block(void *p, u64 timeout_ns, bool (*wake)(void *), void *ctx)
{
	struct thread *t = p;
	DECLARE_SWAITQUEUE(wait);
	int ret = 0;

	WRITE_ONCE(t->timer_fired, false);
	if (timeout_ns != U64_MAX)
		hrtimer_start(&t->timer, ns_to_ktime(min_t(u64, timeout_ns, KTIME_MAX)), HRTIMER_MODE_REL_HARD);
	for (;;) {
		prepare_to_swait_exclusive(&t->queue, &wait, TASK_INTERRUPTIBLE);
		if (READ_ONCE(t->timer_fired) || wake(ctx))
			break;
		if (signal_pending(current)) {
			ret = -EINTR;
			break;
		}
		schedule();
	}
	finish_swait(&t->queue, &wait);
	if (timeout_ns != U64_MAX)
		hrtimer_cancel(&t->timer);
	return ret;
}

/* Gets the vCPU's thread out of the guest or out of its sleep, so that it looks for news. Any context. */
void shim_kick(void *p)
{
	struct thread *t = p;
	unsigned long flags;

	swake_up_one(&t->queue);
	raw_spin_lock_irqsave(&t->lock, flags);
	if (t->task)
		kick_process(t->task);
	raw_spin_unlock_irqrestore(&t->lock, flags);
}

/* Replaces the calling thread's signal mask; the one before. */
u64 shim_sigmask(u64 mask)
{
	sigset_t set, before;

	BUILD_BUG_ON(_NSIG_WORDS != 1);
	siginitset(&set, mask & ~(sigmask(SIGKILL) | sigmask(SIGSTOP)));
	sigprocmask(SIG_SETMASK, &set, &before);
	return before.sig[0];
}
