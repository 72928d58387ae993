// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * Kernel services for Rust: log, memory, user space, locks.
 */
#define pr_fmt(fmt) "kvm-realm: " fmt

#include <linux/cpumask.h>
#include <linux/lockdep.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/mutex.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/uaccess.h>
#include <asm/cputype.h>
#include <asm/cpufeature.h>
#include <clocksource/arm_arch_timer.h>

#include "shim.h"

/* ---- Log. What guests and user space can cause, Rust limits per VM. ---- */

void shim_log(u32 level, const char *text, size_t len)
{
	int n = min_t(size_t, len, 400);

	if (level == SHIM_LOG_ALWAYS) {
		pr_info("%.*s\n", n, text);
		return;
	}
	if (level == 3) {
		pr_debug("%.*s\n", n, text);
		return;
	}
	switch (level) {
	case 0:
		pr_err("%.*s\n", n, text);
		break;
	case 1:
		pr_warn("%.*s\n", n, text);
		break;
	default:
		pr_info("%.*s\n", n, text);
		break;
	}
}

/* A Rust panic. No input can cause one; if it happens the module is wrong and must not go on. */
void __noreturn shim_bug(const char *text, size_t len)
{
	pr_emerg("module: Rust panic: %.*s\n", (int)min_t(size_t, len, 400), text);
	BUG();
	for (;;)
		cpu_relax();
}

/* ---- Memory ---- */

/* Process context only. Small requests never fail; large ones may, and Rust asks for those with try_reserve. */
void *shim_alloc(size_t size, size_t align)
{
	if (align > ARCH_KMALLOC_MINALIGN)
		size = roundup_pow_of_two(max(size, align));
	if (size <= PAGE_SIZE)
		return kmalloc(size, GFP_KERNEL_ACCOUNT | __GFP_NOFAIL);
	return kvmalloc(size, GFP_KERNEL_ACCOUNT | __GFP_NOWARN);
}

void shim_free(void *p)
{
	kvfree(p);
}

/*
 * 1 << order contiguous, naturally aligned, unmovable pages, each freed on its own with shim_page_free
 * (one of them may have to be leaked when the RMM does not give it back). 0 when there is no memory.
 */
u64 shim_pages_alloc(u32 order, bool zero)
{
	struct page *page;

	gfp_t gfp = GFP_KERNEL_ACCOUNT | (zero ? __GFP_ZERO : 0);

	/* More than the few start-level tables: nice to have, and not worth the effort of compaction. */
	if (order > 4)
		gfp = (gfp & ~__GFP_RECLAIM) | __GFP_KSWAPD_RECLAIM | __GFP_NOWARN;
	page = alloc_pages(gfp, order);
	if (!page)
		return 0;
	if (order)
		split_page(page, order);
	return page_to_phys(page);
}

void shim_page_free(u64 phys)
{
	__free_page(pfn_to_page(PHYS_PFN(phys)));
}

void *shim_page_address(u64 phys)
{
	return __va(phys);
}

/* ---- User space ---- */

int shim_copy_from_user(void *to, u64 from, size_t len)
{
	return copy_from_user(to, (const void __user *)from, len) ? -EFAULT : 0;
}

int shim_copy_to_user(u64 to, const void *from, size_t len)
{
	return copy_to_user((void __user *)to, from, len) ? -EFAULT : 0;
}

/* Memory slots name addresses of the process that made the VM; its mm is kept as an identity, not kept alive. */
void *shim_mm_grab(void)
{
	mmgrab(current->mm);
	return current->mm;
}

void shim_mm_drop(void *mm)
{
	mmdrop(mm);
}

bool shim_mm_is_current(const void *mm)
{
	return current->mm == mm;
}

bool shim_is_user_range(u64 address, u64 size)
{
	return access_ok((void __user *)address, size);
}

/*
 * Pins pages of the calling process: shared = a Realm is about to be given them to write to (breaking any copy on
 * write), otherwise they are read. Both until they have been used, which is soon.
 * Device memory is refused: I/O mappings by the pin itself, memory that belongs to a device here.
 * The number of pages pinned (at least 1), or an error.
 */
long shim_pin_user_pages(u64 address, u32 count, bool shared, u64 *phys)
{
	struct page **pages = (struct page **)phys;	/* each entry is replaced by its address below */
	long n, i;

	n = pin_user_pages_fast(address & PAGE_MASK, count, shared ? FOLL_WRITE : 0, pages);
	if (n <= 0)
		return n < 0 ? n : -EFAULT;
	for (i = 0; i < n; i++) {
		if (!is_zone_device_page(pages[i]))
			continue;
		unpin_user_pages(pages + i, n - i);
		n = i;
		break;
	}
	for (i = 0; i < n; i++)
		phys[i] = page_to_phys(pages[i]);
	return n ? n : -EINVAL;
}

void shim_unpin_page(u64 phys, bool dirty)
{
	struct page *page = pfn_to_page(PHYS_PFN(phys));

	unpin_user_pages_dirty_lock(&page, 1, dirty);
}

/* ---- Changes of user space's mappings ---- */

struct memory_watch {
	struct mmu_notifier notifier;
	void *hook;
};

static int change_begins(struct mmu_notifier *mn, const struct mmu_notifier_range *range)
{
	struct memory_watch *w = container_of(mn, struct memory_watch, notifier);

	kvmr_change_begins(w->hook, range->start, range->end, mmu_notifier_range_blockable(range));
	return 0;
}

static void change_ends(struct mmu_notifier *mn, const struct mmu_notifier_range *range)
{
	kvmr_change_ends(container_of(mn, struct memory_watch, notifier)->hook);
}

/* The process ends: a change of everything that does not end. */
static void space_ends(struct mmu_notifier *mn, struct mm_struct *mm)
{
	kvmr_change_begins(container_of(mn, struct memory_watch, notifier)->hook, 0, U64_MAX, true);
}

static const struct mmu_notifier_ops memory_ops = {
	.release = space_ends,
	.invalidate_range_start = change_begins,
	.invalidate_range_end = change_ends,
};

/*
 * Tells Rust of all changes of the calling process's mappings. On success the watch owns the hook until
 * shim_memory_watch_free; on failure the caller keeps it.
 */
long shim_memory_watch_new(void *hook, void **watch)
{
	struct memory_watch *w = kzalloc(sizeof(*w), GFP_KERNEL_ACCOUNT);
	int err;

	if (!w)
		return -ENOMEM;
	w->hook = hook;
	w->notifier.ops = &memory_ops;
	err = mmu_notifier_register(&w->notifier, current->mm);
	if (err) {
		kfree(w);
		return err;
	}
	*watch = w;
	return 0;
}

/* No call is under way when this returns; the hook is the caller's again. */
void shim_memory_watch_free(void *watch)
{
	struct memory_watch *w = watch;

	mmu_notifier_unregister(&w->notifier, w->notifier.mm);
	kfree(w);
}

/* ---- Locks ---- */

/*
 * Kernels that check the order of locks (lockdep) think of all locks of a kind as of one. The kinds have names, which Rust
 * gives, and numbers. In other kernels there are none.
 */
#ifdef CONFIG_LOCKDEP
static struct lock_kind {
	const char *what;
	struct lock_class_key key;
	struct lockdep_map map;	/* for spin locks, which have no room for one of their own */
} lock_kinds[32] = {
	/* Of those that have no name. */
	[0] = { .what = "kvm-realm", .map = STATIC_LOCKDEP_MAP_INIT("kvm-realm", &lock_kinds[0].key) },
};
static DEFINE_RAW_SPINLOCK(lock_kinds_lock);

static struct lockdep_map *spin_map(void *l)
{
	return &lock_kinds[((u32 *)l)[1]].map;
}
#endif

/* what: stays as long as the module. */
u32 shim_lock_kind(const char *what)
{
	u32 i = 0;
#ifdef CONFIG_LOCKDEP
	unsigned long flags;

	raw_spin_lock_irqsave(&lock_kinds_lock, flags);
	while (lock_kinds[i].what && strcmp(lock_kinds[i].what, what))
		if (WARN_ON(++i == ARRAY_SIZE(lock_kinds)))
			i = 0, what = lock_kinds[0].what;
	if (!lock_kinds[i].what) {
		lockdep_init_map_wait(&lock_kinds[i].map, what, &lock_kinds[i].key, 0, LD_WAIT_SPIN);
		lock_kinds[i].what = what;
	}
	raw_spin_unlock_irqrestore(&lock_kinds_lock, flags);
#endif
	return i;
}

void *shim_mutex_new(u32 kind)
{
	struct mutex *m = kmalloc(sizeof(*m), GFP_KERNEL_ACCOUNT | __GFP_NOFAIL);

#ifdef CONFIG_LOCKDEP
	__mutex_init(m, lock_kinds[kind].what, &lock_kinds[kind].key);
#else
	mutex_init(m);
#endif
	return m;
}

void shim_mutex_free(void *m)
{
	mutex_destroy(m);
	kfree(m);
}

/*
 * Whoever waits for a vCPU waits as long as the guest runs, and user space decides how long: killable, so that this
 * is no hung task. One that is killed still needs the lock; the holder is of the same process and will be gone soon.
 */
void shim_mutex_lock(void *m)
{
	if (mutex_lock_killable(m))
		mutex_lock(m);
}

void shim_mutex_unlock(void *m)
{
	mutex_unlock(m);
}

bool shim_mutex_trylock(void *m)
{
	return mutex_trylock(m);
}

/*
 * Rust holds the lock in eight zeroed bytes of its own, so that locks can be made without allocating: the architecture's
 * lock, which is four bytes on every kernel, and its kind. This is what raw_spin_lock_irqsave does.
 */
static_assert(sizeof(arch_spinlock_t) == sizeof(u32));

u64 shim_spin_lock(void *l)
{
	unsigned long flags;

	local_irq_save(flags);
	preempt_disable();
	spin_acquire(spin_map(l), 0, 0, _RET_IP_);
	arch_spin_lock((arch_spinlock_t *)l);
	return flags;
}

bool shim_spin_trylock(void *l, u64 *flags)
{
	unsigned long f;

	local_irq_save(f);
	preempt_disable();
	if (!arch_spin_trylock((arch_spinlock_t *)l)) {
		local_irq_restore(f);
		preempt_enable();
		return false;
	}
	spin_acquire(spin_map(l), 0, 1, _RET_IP_);
	*flags = f;
	return true;
}

void shim_spin_unlock(void *l, u64 flags)
{
	spin_release(spin_map(l), _RET_IP_);
	arch_spin_unlock((arch_spinlock_t *)l);
	local_irq_restore((unsigned long)flags);
	preempt_enable();
}

/* ---- Odds and ends ---- */

void shim_cond_resched(void)
{
	cond_resched();
}

bool shim_is_killed(void)
{
	return fatal_signal_pending(current);
}

u32 shim_online_cpus(void)
{
	return num_online_cpus();
}

/*
 * The features that all CPUs share, as the kernel knows them. The kernel warns about registers that it does not track,
 * so user space must not be able to ask for others than these.
 */
u64 shim_id_register(u32 id)
{
	switch (id) {
	case SYS_ID_AA64PFR0_EL1:
	case SYS_ID_AA64PFR1_EL1:
	case SYS_ID_AA64ZFR0_EL1:
	case SYS_ID_AA64SMFR0_EL1:
	case SYS_ID_AA64DFR0_EL1:
	case SYS_ID_AA64DFR1_EL1:
	case SYS_ID_AA64ISAR0_EL1:
	case SYS_ID_AA64ISAR1_EL1:
	case SYS_ID_AA64ISAR2_EL1:
	case SYS_ID_AA64MMFR0_EL1:
	case SYS_ID_AA64MMFR1_EL1:
	case SYS_ID_AA64MMFR2_EL1:
	case SYS_ID_AA64MMFR3_EL1:
	case SYS_CTR_EL0:
		return read_sanitised_ftr_reg(id);
	case SYS_MIDR_EL1:
		return read_cpuid_id();
	case SYS_DCZID_EL0:
		return read_sysreg(dczid_el0);
	default:
		return 0;
	}
}

u64 shim_counter(void)
{
	return arch_timer_read_counter();
}
