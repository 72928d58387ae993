// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * Module entry and exit, the device node, and what an administrator can see of the module.
 * See shim.h for the division between C and Rust.
 */
#define pr_fmt(fmt) "kvm-realm: " fmt

#include <linux/arm-smccc.h>
#include <linux/cpumask.h>
#include <linux/debugfs.h>
#include <linux/kthread.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/reboot.h>
#include <linux/suspend.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <asm/arch_timer.h>
#include <asm/cpufeature.h>
#include <asm/virt.h>

#include "shim.h"

static bool unsafe_tests;
module_param(unsafe_tests, bool, 0400);
MODULE_PARM_DESC(unsafe_tests, "offer debugfs kvm-realm/read_page, which makes the kernel read a page on purpose");

static unsigned int abi = 2;
module_param(abi, uint, 0444);
MODULE_PARM_DESC(abi, "the version of the KVM/CCA series whose user ABI is served: 2 to 11 (default 2)");

static unsigned int cap_arm_rme;
module_param(cap_arm_rme, uint, 0444);
MODULE_PARM_DESC(cap_arm_rme, "serve KVM_CAP_ARM_RME by this number instead of the version's own");

static u64 stat_of(u32 which)
{
	return kvmr_stat(which);
}

/* ---- What can be seen: /sys/module/kvm_realm/parameters, /sys/kernel/debug/kvm-realm ---- */

static int stat_get(char *buffer, const struct kernel_param *kp)
{
	return sysfs_emit(buffer, "%llu\n", stat_of((u32)(uintptr_t)kp->arg));
}

static int version_get(char *buffer, const struct kernel_param *kp)
{
	u64 v = stat_of((u32)(uintptr_t)kp->arg);

	return sysfs_emit(buffer, "%llu.%llu\n", v >> 16, v & 0xffff);
}

static const struct kernel_param_ops stat_ops = { .get = stat_get };
static const struct kernel_param_ops version_ops = { .get = version_get };

module_param_cb(abi_generation, &stat_ops, (void *)SHIM_STAT_ABI_GENERATION, 0444);
MODULE_PARM_DESC(abi_generation, "the version of the KVM/CCA series whose user ABI is served (read only)");
module_param_cb(rmi_version, &version_ops, (void *)SHIM_STAT_RMI_VERSION, 0444);
MODULE_PARM_DESC(rmi_version, "the RMM's interface version (read only)");

static int stat_show(void *data, u64 *value)
{
	*value = stat_of((u32)(uintptr_t)data);
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(stat_fops, stat_show, NULL, "%llu\n");

/* stats: the core's own counters, one "name value" a line. */
static ssize_t stats_read(struct file *file, char __user *buf, size_t len, loff_t *pos)
{
	char *text = kzalloc(PAGE_SIZE, GFP_KERNEL);
	ssize_t n;

	if (!text)
		return -ENOMEM;
	n = kvmr_stats(text, PAGE_SIZE);
	n = simple_read_from_buffer(buf, len, pos, text, n);
	kfree(text);
	return n;
}

static const struct file_operations stats_fops = {
	.owner = THIS_MODULE,
	.read = stats_read,
};

static struct dentry *debug_dir;

/*
 * read_page: reads the first word of the physical page whose address is written to the file (meant for the one in
 * last_private_page), to show that granule protection stops the kernel as well. Stock kernels do not know a granule
 * protection fault and treat it as fatal for kernel accesses, exception tables or not, so a thread is sacrificed: it
 * dies with an oops, the log says why, and the writer gets EFAULT. A page that can be read gives success.
 */
struct sacrifice {
	u64 phys;
	u64 word;
	bool survived;
};

static int read_page_thread(void *data)
{
	struct sacrifice *s = data;

	s->word = READ_ONCE(*(u64 *)__va(s->phys));
	WRITE_ONCE(s->survived, true);
	while (!kthread_should_stop())
		schedule_timeout_interruptible(1);
	return 0;
}

static ssize_t read_page_write(struct file *file, const char __user *buf, size_t len, loff_t *pos)
{
	struct sacrifice *s;
	struct task_struct *task;
	ssize_t ret = -ENOMEM;
	u64 phys;
	int err;

	err = kstrtou64_from_user(buf, len, 0, &phys);
	if (err)
		return err;
	if (!pfn_is_map_memory(PHYS_PFN(phys)))
		return -ENXIO;
	s = kzalloc(sizeof(*s), GFP_KERNEL);
	if (!s)
		return -ENOMEM;
	s->phys = phys & PAGE_MASK;
	task = kthread_create(read_page_thread, s, "kvm-realm-read");
	if (IS_ERR(task))
		goto out;
	get_task_struct(task);
	wake_up_process(task);
	/* Until it has read, or has died of it: both show soon. */
	while (!READ_ONCE(s->survived) && !READ_ONCE(task->exit_state))
		schedule_timeout_uninterruptible(1);
	kthread_stop(task);
	put_task_struct(task);
	ret = s->survived ? len : -EFAULT;
	if (s->survived)
		pr_err("unsafe_tests: the kernel could read page %#llx: %#llx\n", s->phys, s->word);
out:
	kfree(s);
	return ret;
}

static const struct file_operations read_page_fops = {
	.owner = THIS_MODULE,
	.write = read_page_write,
};

static void debugfs_start(void)
{
	static const struct { const char *name; u32 which; } stats[] = {
		{ "granules_delegated", SHIM_STAT_DELEGATED },
		{ "granules_leaked", SHIM_STAT_LEAKED },
		{ "vms", SHIM_STAT_VMS },
		{ "pages_pinned", SHIM_STAT_PINNED },
		{ "smcs", SHIM_STAT_SMCS },
		{ "last_private_page", SHIM_STAT_LAST_DATA },
	};
	size_t i;

	debug_dir = debugfs_create_dir("kvm-realm", NULL);
	for (i = 0; i < ARRAY_SIZE(stats); i++)
		debugfs_create_file_unsafe(stats[i].name, 0400, debug_dir, (void *)(uintptr_t)stats[i].which,
					   &stat_fops);
	debugfs_create_file("stats", 0400, debug_dir, NULL, &stats_fops);
	if (unsafe_tests)
		debugfs_create_file("read_page", 0200, debug_dir, NULL, &read_page_fops);
}

/* ---- Sleep and restart of the machine ---- */

/* Neither memory that belongs to Realms nor what the RMM holds for them outlives the machine's sleep. */
static int power_event(struct notifier_block *nb, unsigned long event, void *data)
{
	if (event != PM_HIBERNATION_PREPARE && event != PM_SUSPEND_PREPARE)
		return NOTIFY_DONE;
	if (!stat_of(SHIM_STAT_DELEGATED))
		return NOTIFY_DONE;
	pr_warn("module: the machine cannot sleep while Realms exist\n");
	return notifier_from_errno(-EBUSY);
}

/* The next kernel (kexec) must find all memory its own: Realms end here, whoever has them open. */
static int restart_event(struct notifier_block *nb, unsigned long event, void *data)
{
	kvmr_shutdown();
	return NOTIFY_DONE;
}

static struct notifier_block power_notifier = { .notifier_call = power_event };
static struct notifier_block restart_notifier = { .notifier_call = restart_event };

/* ---- Start and end ---- */

static struct miscdevice device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "kvm-realm",
	.fops = &shim_system_fops,
	.mode = 0600,
};

static int __init shim_start(void)
{
	struct shim_facts facts = {
		.page_size = PAGE_SIZE,
		.smccc_version = arm_smccc_get_version(),
		.vhe = is_kernel_in_hyp_mode(),
		.cpus = num_online_cpus(),
		.counter_hz = arch_timer_get_cntfrq(),
		.pseudo_nmi = system_uses_irq_prio_masking(),
		.abi = abi,
		.cap_arm_rme = cap_arm_rme,
	};
	int err;

	switch (arm_smccc_1_1_get_conduit()) {
	case SMCCC_CONDUIT_SMC:
		facts.conduit = 1;
		break;
	case SMCCC_CONDUIT_HVC:
		facts.conduit = 2;
		break;
	default:
		break;
	}

	shim_find_pmu();
	err = kvmr_init(&facts);
	if (err)
		return err;
	err = misc_register(&device);
	if (err) {
		pr_err("module: cannot register /dev/kvm-realm: %d\n", err);
		kvmr_exit();
		return err;
	}
	register_pm_notifier(&power_notifier);
	register_reboot_notifier(&restart_notifier);
	debugfs_start();
	return 0;
}

static void __exit shim_end(void)
{
	unregister_reboot_notifier(&restart_notifier);
	unregister_pm_notifier(&power_notifier);
	debugfs_remove(debug_dir);
	misc_deregister(&device);
	kvmr_exit();
}

module_init(shim_start);
module_exit(shim_end);
MODULE_DESCRIPTION("KVM-style virtual machines that the host cannot read: Arm CCA Realms");
MODULE_AUTHOR("The kvm-realm authors");
MODULE_LICENSE("Dual MIT/GPL");
