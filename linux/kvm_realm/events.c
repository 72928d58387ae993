// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * eventfds: signalling them, and being told when somebody else does.
 */
#include <linux/eventfd.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/wait.h>

#include "shim.h"

/*
 * An eventfd. Its file is not kept open: once nobody else has it open, nobody can signal it any more. The context
 * outlives the file, so a hook stays valid in any case.
 */
struct event {
	struct eventfd_ctx *ctx;
	refcount_t users;
	bool closed;
};

/* The eventfd behind a descriptor of the calling process. */
long shim_event_get(int fd, void **event)
{
	struct event *e;
	struct eventfd_ctx *ctx = eventfd_ctx_fdget(fd);

	if (IS_ERR(ctx))
		return PTR_ERR(ctx);
	e = kzalloc(sizeof(*e), GFP_KERNEL_ACCOUNT);
	if (!e) {
		eventfd_ctx_put(ctx);
		return -ENOMEM;
	}
	e->ctx = ctx;
	refcount_set(&e->users, 1);
	*event = e;
	return 0;
}

void shim_event_hold(void *event)
{
	refcount_inc(&((struct event *)event)->users);
}

void shim_event_put(void *event)
{
	struct event *e = event;

	if (!refcount_dec_and_test(&e->users))
		return;
	eventfd_ctx_put(e->ctx);
	kfree(e);
}

void shim_event_signal(void *event)
{
	eventfd_signal(((struct event *)event)->ctx);
}

bool shim_event_same(const void *a, const void *b)
{
	return ((const struct event *)a)->ctx == ((const struct event *)b)->ctx;
}

bool shim_event_closed(const void *event)
{
	return READ_ONCE(((const struct event *)event)->closed);
}

struct watch {
	wait_queue_entry_t wait;
	poll_table table;
	wait_queue_head_t *queue;
	struct event *event;
	void *fire;
};

/* In the waker's context, with the queue's lock held. */
static int watch_wakes(wait_queue_entry_t *wait, unsigned int mode, int sync, void *key)
{
	struct watch *w = container_of(wait, struct watch, wait);
	__poll_t flags = key_to_poll(key);
	u64 count;

	if (flags & EPOLLIN) {
		eventfd_ctx_do_read(w->event->ctx, &count);
		kvmr_event(w->fire);
	}
	if (flags & EPOLLHUP)
		WRITE_ONCE(w->event->closed, true);
	return 0;
}

static void watch_queues(struct file *file, wait_queue_head_t *queue, poll_table *table)
{
	struct watch *w = container_of(table, struct watch, table);

	w->queue = queue;
	add_wait_queue_priority(queue, &w->wait);
}

/*
 * Calls kvmr_event(fire) whenever the event is signalled. fd is the descriptor that the event came from. On success
 * the hook owns fire until shim_watch_free; on failure the caller keeps it.
 */
long shim_watch_new(int fd, void *event, void *fire, void **watch)
{
	struct event *e = event;
	struct eventfd_ctx *ctx;
	struct watch *w;
	struct file *file;
	unsigned long irq;
	u64 count;

	file = eventfd_fget(fd);
	if (IS_ERR(file))
		return PTR_ERR(file);
	/* The descriptor may have become another eventfd meanwhile. */
	ctx = eventfd_ctx_fileget(file);
	if (IS_ERR(ctx) || ctx != e->ctx) {
		if (!IS_ERR(ctx))
			eventfd_ctx_put(ctx);
		fput(file);
		return -EBADF;
	}
	eventfd_ctx_put(ctx);
	w = kzalloc(sizeof(*w), GFP_KERNEL_ACCOUNT);
	if (!w) {
		fput(file);
		return -ENOMEM;
	}
	w->event = e;
	w->fire = fire;
	shim_event_hold(e);
	init_waitqueue_func_entry(&w->wait, watch_wakes);
	init_poll_funcptr(&w->table, watch_queues);
	if (vfs_poll(file, &w->table) & EPOLLIN) {
		/* It was signalled before. */
		spin_lock_irqsave(&w->queue->lock, irq);
		eventfd_ctx_do_read(e->ctx, &count);
		if (count)
			kvmr_event(w->fire);
		spin_unlock_irqrestore(&w->queue->lock, irq);
	}
	fput(file);
	*watch = w;
	return 0;
}

/* Unhooks; fire is the caller's again, and is not called any more. */
void shim_watch_free(void *watch)
{
	struct watch *w = watch;
	u64 count;

	eventfd_ctx_remove_wait_queue(w->event->ctx, &w->wait, &count);
	shim_event_put(w->event);
	kfree(w);
}
