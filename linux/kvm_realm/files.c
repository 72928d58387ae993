// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * File descriptors: the device node, VMs, vCPUs, devices, guest_memfd. Every operation goes to Rust with the opaque
 * pointer that Rust gave when the descriptor was made.
 *
 * Every open file holds a reference to the module (owner = THIS_MODULE), so that it cannot go away while one exists.
 */
#include <linux/anon_inodes.h>
#include <linux/file.h>
#include <linux/mm.h>
#include <linux/module.h>

#include "shim.h"

static long system_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	return kvmr_system_ioctl(cmd, arg);
}

const struct file_operations shim_system_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = system_ioctl,
	.llseek = noop_llseek,
};

static long object_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	return kvmr_ioctl(file->private_data, cmd, arg);
}

static int object_release(struct inode *inode, struct file *file)
{
	kvmr_release(file->private_data);
	return 0;
}

/*
 * The vCPU's shared pages: ordinary kernel pages, never delegated. The mapping holds the file, the file holds the
 * vCPU, and a page that user space has pinned outlives both by its reference count.
 */
static vm_fault_t vcpu_fault(struct vm_fault *vmf)
{
	u64 phys = kvmr_vcpu_page(vmf->vma->vm_file->private_data, vmf->pgoff);

	if (!phys)
		return VM_FAULT_SIGBUS;
	vmf->page = pfn_to_page(PHYS_PFN(phys));
	get_page(vmf->page);
	return 0;
}

static const struct vm_operations_struct vcpu_vm_ops = { .fault = vcpu_fault };

static int vcpu_mmap(struct file *file, struct vm_area_struct *vma)
{
	if (!(vma->vm_flags & VM_SHARED))
		return -EINVAL;
	if (vma->vm_flags & VM_EXEC)
		return -EINVAL;
	vm_flags_mod(vma, VM_DONTEXPAND | VM_DONTCOPY, VM_MAYEXEC);
	vma->vm_ops = &vcpu_vm_ops;
	return 0;
}

static long gmem_fallocate(struct file *file, int mode, loff_t offset, loff_t len)
{
	return kvmr_fallocate(file->private_data, mode, offset, len);
}

/* The size of a guest_memfd is fixed when it is made. */
static int gmem_setattr(struct mnt_idmap *idmap, struct dentry *dentry, struct iattr *attr)
{
	return -EINVAL;
}

static const struct inode_operations gmem_inode_ops = { .setattr = gmem_setattr };

static const struct file_operations fops[SHIM_KINDS] = {
	[SHIM_VM] = {
		.owner = THIS_MODULE,
		.unlocked_ioctl = object_ioctl,
		.release = object_release,
		.llseek = noop_llseek,
	},
	[SHIM_VCPU] = {
		.owner = THIS_MODULE,
		.unlocked_ioctl = object_ioctl,
		.release = object_release,
		.mmap = vcpu_mmap,
		.llseek = noop_llseek,
	},
	[SHIM_DEVICE] = {
		.owner = THIS_MODULE,
		.unlocked_ioctl = object_ioctl,
		.release = object_release,
		.llseek = noop_llseek,
	},
	/* No mmap, no read, no write: nothing but the Realm ever reaches these pages. */
	[SHIM_GMEM] = {
		.owner = THIS_MODULE,
		.unlocked_ioctl = object_ioctl,
		.release = object_release,
		.fallocate = gmem_fallocate,
		.llseek = noop_llseek,
	},
};

/*
 * Makes a descriptor for a Rust object. On success the descriptor owns the caller's reference to the object and gives
 * it back by kvmr_release; on failure the caller keeps it. size is that of a guest_memfd, otherwise unused.
 */
long shim_fd_new(u32 kind, const char *name, void *object, u64 size)
{
	struct file *file;
	int fd;

	if (kind >= SHIM_KINDS)
		return -EINVAL;
	fd = get_unused_fd_flags(O_CLOEXEC);
	if (fd < 0)
		return fd;
	if (kind == SHIM_GMEM)
		/* fallocate(2) wants a regular file, so this one gets an inode of its own. */
		file = anon_inode_create_getfile(name, &fops[kind], object, O_RDWR, NULL);
	else
		file = anon_inode_getfile(name, &fops[kind], object, O_RDWR);
	if (IS_ERR(file)) {
		put_unused_fd(fd);
		return PTR_ERR(file);
	}
	if (kind == SHIM_GMEM) {
		struct inode *inode = file_inode(file);

		inode->i_mode |= S_IFREG;
		inode->i_op = &gmem_inode_ops;
		inode->i_size = size;
		file->f_flags |= O_LARGEFILE;
	}
	fd_install(fd, file);
	return fd;
}

/* The object behind a descriptor of the caller, if it is ours. The reference keeps both alive. */
void *shim_file_get(int fd, void **object)
{
	struct file *file = fget(fd);

	if (!file)
		return NULL;
	/* Only the addresses matter: is it one of our tables? */
	if (file->f_op < fops || file->f_op >= fops + SHIM_KINDS) {
		fput(file);
		return NULL;
	}
	*object = file->private_data;
	return file;
}

void shim_file_put(void *file)
{
	fput(file);
}
