/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * The phone line between the kernel and the Rust side of kvm_realm, both directions.
 *
 * kvmr_*: written in Rust, called by C. The build keeps exactly these symbols of the Rust object global; it finds
 *         them by the comment at the end of their line.
 * shim_*: written in C, called by Rust: kernel services that only C can reach, because they are macros, inline
 *         functions, or symbols with version checksums.
 *
 * C decides nothing: every answer to user space comes from Rust.
 */
#ifndef KVM_REALM_SHIM_H
#define KVM_REALM_SHIM_H

#include <linux/types.h>
#include <linux/fs.h>

/* What hangs behind a file descriptor. The numbers are shared with glue/src/kernel.rs. */
enum shim_kind {
	SHIM_VM = 0,
	SHIM_VCPU = 1,
	SHIM_DEVICE = 2,
	SHIM_GMEM = 3,
	SHIM_KINDS,
};

/* What Rust must know about the kernel before it can say whether it will work. */
struct shim_facts {
	u64 page_size;
	u64 smccc_version;	/* 0x10002 = 1.2 */
	u32 conduit;		/* 0 none, 1 SMC, 2 HVC */
	u32 vhe;		/* the kernel itself runs at EL2 */
	u64 cpus;		/* online now */
	u64 counter_hz;
	u64 pseudo_nmi;		/* interrupts are masked by priority, which would keep them from ending a guest's run */
	u32 abi;		/* module parameter: the version of the series whose ABI is wanted */
	u32 cap_arm_rme;	/* module parameter: another capability number, 0 for that version's own */
};

/* What kvmr_stat() answers. */
enum shim_stat {
	SHIM_STAT_ABI_GENERATION = 0,
	SHIM_STAT_RMI_VERSION = 1,	/* major << 16 | minor */
	SHIM_STAT_DELEGATED = 2,	/* granules now */
	SHIM_STAT_LEAKED = 3,		/* granules that the RMM did not give back */
	SHIM_STAT_VMS = 4,		/* now */
	SHIM_STAT_PINNED = 5,		/* pages of user space, now */
	SHIM_STAT_SMCS = 6,		/* since loading */
	SHIM_STAT_LAST_DATA = 7,	/* a page of some Realm's private memory: physical address, 0 for none */
};

/* ---- Rust, called by C. ---- */
int kvmr_init(const struct shim_facts *facts); /* rust */
void kvmr_exit(void); /* rust */
void kvmr_shutdown(void); /* rust */
long kvmr_system_ioctl(u32 cmd, u64 arg); /* rust */
long kvmr_ioctl(void *object, u32 cmd, u64 arg); /* rust */
long kvmr_fallocate(void *object, int mode, s64 offset, s64 len); /* rust */
void kvmr_release(void *object); /* rust */
u64 kvmr_vcpu_page(void *object, u64 index); /* rust */
u64 kvmr_stat(u32 which); /* rust */
size_t kvmr_stats(char *to, size_t len); /* rust */
void kvmr_event(void *fire); /* rust */
void kvmr_change_begins(void *hook, u64 start, u64 end, bool may_sleep); /* rust */
void kvmr_change_ends(void *hook); /* rust */

/* ---- files.c ---- */
extern const struct file_operations shim_system_fops;
long shim_fd_new(u32 kind, const char *name, void *object, u64 size);
void *shim_file_get(int fd, void **object);
void shim_file_put(void *file);

/* ---- services.c ---- */
#define SHIM_LOG_ALWAYS 4	/* not rate limited: start and end of the module. 0 to 3: error, warning, info, debug */
void shim_log(u32 level, const char *text, size_t len);
void __noreturn shim_bug(const char *text, size_t len);
void *shim_alloc(size_t size, size_t align);
void shim_free(void *p);
u64 shim_pages_alloc(u32 order, bool zero);
void shim_page_free(u64 phys);
void *shim_page_address(u64 phys);
int shim_copy_from_user(void *to, u64 from, size_t len);
int shim_copy_to_user(u64 to, const void *from, size_t len);
bool shim_is_user_range(u64 address, u64 size);
void *shim_mm_grab(void);
void shim_mm_drop(void *mm);
bool shim_mm_is_current(const void *mm);
long shim_pin_user_pages(u64 address, u32 count, bool shared, u64 *phys);
void shim_unpin_page(u64 phys, bool dirty);
long shim_memory_watch_new(void *hook, void **watch);
void shim_memory_watch_free(void *watch);
u32 shim_lock_kind(const char *what);
void *shim_mutex_new(u32 kind);
void shim_mutex_free(void *m);
void shim_mutex_lock(void *m);
bool shim_mutex_trylock(void *m);
void shim_mutex_unlock(void *m);
u64 shim_spin_lock(void *l);
bool shim_spin_trylock(void *l, u64 *flags);
void shim_spin_unlock(void *l, u64 flags);
void shim_cond_resched(void);
bool shim_is_killed(void);
u32 shim_online_cpus(void);
u64 shim_id_register(u32 encoding);
u64 shim_counter(void);

/* ---- events.c ---- */
long shim_event_get(int fd, void **event);
void shim_event_hold(void *event);
void shim_event_put(void *event);
void shim_event_signal(void *event);
bool shim_event_same(const void *a, const void *b);
bool shim_event_closed(const void *event);
long shim_watch_new(int fd, void *event, void *fire, void **watch);
void shim_watch_free(void *watch);

/* ---- run.c ---- */
void shim_find_pmu(void);
bool shim_can_mask_pmu(void);
void shim_smc(u64 *regs);
void shim_trace_exit(u32 vcpu, u32 reason, u64 esr, u64 ipa);
void shim_trace_fault(u32 vcpu, u64 gpa, bool shared, u32 outcome);
void *shim_thread_new(void);
void shim_thread_free(void *t);
void shim_run_begin(void *t);
void shim_run_end(void *t);
int shim_run_prepare(void);
bool shim_run_enter(u64 *regs, bool mask_pmu, bool (*go)(void *), void *ctx);
int shim_block(void *t, u64 timeout_ns, bool (*wake)(void *), void *ctx);
void shim_kick(void *t);
u64 shim_sigmask(u64 mask);

#endif
