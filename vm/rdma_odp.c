// SPDX-License-Identifier: GPL-2.0
/*
 * rdma_odp: RDMA into and out of memory that is paged on demand, while that memory
 * changes under it. Says KTAP.
 *
 * One memory region is shared by several pairs of RC queue pairs. Each pair, a lane,
 * has a thread and blocks of pages of its own, which lie between those of the other
 * lanes in the same page tables and huge pages. A lane writes and reads its pages by
 * RDMA in all directions and compares every byte with what the last writer put there.
 * At the same time one more thread does to the memory what the scenario says.
 *
 * The "shared" scenarios are of elements that several faults work on at a time. The
 * lanes use the first half of the region, which nobody disturbs, and other threads
 * prefetch all of that half, over and over. Pages of the other half are taken away.
 * That restarts the prefetches, and must not do anything to the first half.
 *
 * Every transfer is of whole pages, with a path MTU of a page: rxe copies to and from
 * on-demand memory from the start of a page, whatever the offset in it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <infiniband/verbs.h>
#include <rdma/ib_user_ioctl_cmds.h>
#include <rdma/ib_user_ioctl_verbs.h>
#include <rdma/ib_user_verbs.h>
#include <rdma/rdma_user_ioctl_cmds.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define PAGE		4096UL
#define WORDS		(PAGE / sizeof(unsigned long))
#define HUGE		(2UL << 20)
#define BLOCK		4UL		/* pages that one transfer may have */
#define LANES		3
#define PREFETCHERS	2		/* threads that prefetch */
#define REGION		(4 * HUGE)
#define PAGES		(REGION / PAGE)
#define REMOTE		(IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | \
			 IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC)
#define PATIENCE	5000		/* ms that a transfer may take */

enum memory { SMALL, THP, HUGETLB };

static const char *const memory_names[] = { "4k", "thp", "hugetlb" };

enum disturbance {
	QUIET, DONTNEED, FORK, MPROTECT, MREMAP, COLLAPSE, KSM, SWAP, STORM, SHARED,
};

static const char *const disturbance_names[] = {
	"quiet", "dontneed", "fork", "mprotect", "mremap", "collapse", "ksm", "swap",
	"storm", "shared",
};

struct lane {
	struct run *run;
	unsigned int number;
	unsigned int seed;
	struct ibv_comp_channel *channel;
	struct ibv_cq *cq;
	struct ibv_qp *near, *far;	/* near's memory is the buffer, or the region */
	struct ibv_mr *mr;		/* of the buffer, which is pinned */
	unsigned long *buffer;
	unsigned long count, refused;
	pthread_t thread;
};

struct run {
	enum memory memory;
	enum disturbance disturbance;
	char *region;
	struct ibv_mr *mr;
	unsigned int writer[PAGES];		/* who wrote a page last; 0: it is zeroes */
	atomic_uint writers;
	atomic_bool over;
	atomic_ulong wrong, lost, prefetched, disturbed, collapsed;
	char *elsewhere;		/* where pages may move to */
	struct lane lanes[LANES + 1];	/* the last is the disturbing thread's */
};

static struct ibv_context *context;
static struct ibv_pd *pd;
static union ibv_gid gid;
static int gid_index;
static unsigned int milliseconds;

static void say(const char *format, ...)
{
	char text[256];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	printf("# %s\n", text);
	fflush(stdout);
}

static void die(const char *what)
{
	printf("Bail out! %s: %s\n", what, strerror(errno));
	exit(1);
}

static unsigned long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

static unsigned int any(struct lane *lane, unsigned int below)
{
	return rand_r(&lane->seed) % below;
}

/* What is in the pages */

static unsigned long word(unsigned int writer, unsigned long i)
{
	return writer ? ((unsigned long)writer << 32) + i * 0x9e3779b9 : 0;
}

static void fill(unsigned long *to, unsigned int writer)
{
	for (unsigned long i = 0; i < WORDS; i++)
		to[i] = word(writer, i);
}

static bool has_pattern(const unsigned long *from, unsigned int writer)
{
	for (unsigned long i = 0; i < WORDS; i++)
		if (from[i] != word(writer, i))
			return false;
	return true;
}

/* KSM merges pages that are alike, so there have to be some. */
static unsigned int new_writer(struct run *run)
{
	unsigned int writer = atomic_fetch_add(&run->writers, 1) + 1;

	if (run->disturbance == KSM || run->disturbance == STORM)
		return writer % 4 + 1;
	return writer;
}

static unsigned long *page(struct run *run, unsigned long number)
{
	return (unsigned long *)(run->region + number * PAGE);
}

static void check(struct lane *lane, const char *how, const unsigned long *from,
		  unsigned long number)
{
	struct run *run = lane->run;
	unsigned long i = 0;

	if (has_pattern(from, run->writer[number]))
		return;
	if (atomic_fetch_add(&run->wrong, 1) >= 4)
		return;
	while (from[i] == word(run->writer[number], i))
		i++;
	say("%s: page %lu has %#lx at word %lu, not %#lx", how, number, from[i], i,
	    word(run->writer[number], i));
}

/* Queue pairs */

static struct ibv_qp *create_qp(struct lane *lane)
{
	struct ibv_qp_init_attr attr = {
		.send_cq = lane->cq,
		.recv_cq = lane->cq,
		.qp_type = IBV_QPT_RC,
		.cap = {
			.max_send_wr = 4,
			.max_recv_wr = 4,
			.max_send_sge = 1,
			.max_recv_sge = 1,
		},
	};
	struct ibv_qp *qp = ibv_create_qp(pd, &attr);

	if (!qp)
		die("ibv_create_qp");
	return qp;
}

static void connect_qp(struct ibv_qp *qp, struct ibv_qp *peer)
{
	struct ibv_qp_attr attr = {
		.qp_state = IBV_QPS_INIT,
		.port_num = 1,
		.qp_access_flags = REMOTE,
		.path_mtu = IBV_MTU_4096,
		.dest_qp_num = peer->qp_num,
		.max_dest_rd_atomic = 4,
		.min_rnr_timer = 1,
		.ah_attr = {
			.is_global = 1,
			.port_num = 1,
			.grh = { .dgid = gid, .sgid_index = gid_index, .hop_limit = 1 },
		},
		.timeout = 17,
		.retry_cnt = 7,
		.rnr_retry = 7,
		.max_rd_atomic = 4,
	};

	if (ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT |
			  IBV_QP_ACCESS_FLAGS))
		die("ibv_modify_qp to INIT");
	attr.qp_state = IBV_QPS_RTR;
	if (ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU |
			  IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
			  IBV_QP_MIN_RNR_TIMER))
		die("ibv_modify_qp to RTR");
	attr.qp_state = IBV_QPS_RTS;
	if (ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
			  IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC))
		die("ibv_modify_qp to RTS");
}

static void connect_lane(struct lane *lane)
{
	lane->near = create_qp(lane);
	lane->far = create_qp(lane);
	connect_qp(lane->near, lane->far);
	connect_qp(lane->far, lane->near);
}

static void disconnect_lane(struct lane *lane)
{
	struct ibv_wc wc;

	ibv_destroy_qp(lane->near);
	ibv_destroy_qp(lane->far);
	while (ibv_poll_cq(lane->cq, 1, &wc) > 0)
		;
}

static void open_lane(struct run *run, unsigned int number)
{
	struct lane *lane = &run->lanes[number];

	lane->run = run;
	lane->number = number;
	lane->seed = number + 1;
	lane->buffer = mmap(NULL, BLOCK * PAGE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (lane->buffer == MAP_FAILED)
		die("mmap of a buffer");
	/* A child is not to share what is pinned. */
	if (madvise(lane->buffer, BLOCK * PAGE, MADV_DONTFORK))
		die("MADV_DONTFORK");
	lane->mr = ibv_reg_mr(pd, lane->buffer, BLOCK * PAGE, REMOTE);
	lane->channel = ibv_create_comp_channel(context);
	if (!lane->mr || !lane->channel)
		die("setting up a lane");
	lane->cq = ibv_create_cq(context, 16, NULL, lane->channel, 0);
	if (!lane->cq)
		die("ibv_create_cq");
	connect_lane(lane);
}

static void close_lane(struct lane *lane)
{
	disconnect_lane(lane);
	ibv_destroy_cq(lane->cq);
	ibv_destroy_comp_channel(lane->channel);
	ibv_dereg_mr(lane->mr);
	munmap(lane->buffer, BLOCK * PAGE);
}

/* Transfers */

enum transfer {
	WRITE_TO,	/* an RDMA write into the region */
	READ_FROM,	/* an RDMA read of the region */
	SEND_TO,	/* a message that the region receives */
	SEND_FROM,	/* a message from the region */
	WRITE_FROM,	/* an RDMA write of what the region has */
	READ_TO,	/* an RDMA read that ends in the region */
	TRANSFERS,
	ADD_TO = TRANSFERS,	/* an atomic addition of nothing, to a word alone */
};

static const char *const transfer_names[] = {
	"write into", "read from", "receive in", "send from", "write from", "read into",
	"add to",
};

static bool is_into_region(enum transfer transfer)
{
	return transfer == WRITE_TO || transfer == SEND_TO || transfer == READ_TO;
}

static bool wait_event(struct lane *lane)
{
	struct pollfd fd = { .fd = lane->channel->fd, .events = POLLIN };
	struct ibv_cq *cq;
	void *unused;

	if (poll(&fd, 1, PATIENCE) != 1)
		return false;
	if (ibv_get_cq_event(lane->channel, &cq, &unused))
		die("ibv_get_cq_event");
	ibv_ack_cq_events(cq, 1);
	return true;
}

/* The first bad status of so many completions, or -1 if they do not come. */
static int complete(struct lane *lane, int wanted)
{
	struct ibv_wc wc;
	int got;

	while (wanted) {
		got = ibv_poll_cq(lane->cq, 1, &wc);
		if (got < 0)
			die("ibv_poll_cq");
		if (got && wc.status != IBV_WC_SUCCESS)
			return wc.status;
		if (got) {
			wanted--;
			continue;
		}
		if (ibv_req_notify_cq(lane->cq, 0))
			die("ibv_req_notify_cq");
		got = ibv_poll_cq(lane->cq, 1, &wc);
		if (got && wc.status != IBV_WC_SUCCESS)
			return wc.status;
		if (got)
			wanted--;
		else if (!wait_event(lane))
			return -1;
	}
	return 0;
}

static void post_receive(struct ibv_qp *qp, struct ibv_sge *sge)
{
	struct ibv_recv_wr wr = { .sg_list = sge, .num_sge = 1 }, *bad;

	if (ibv_post_recv(qp, &wr, &bad))
		die("ibv_post_recv");
}

static int transfer(struct lane *lane, enum transfer transfer, unsigned long number,
		    unsigned long pages)
{
	struct ibv_sge region = {
		.addr = (uintptr_t)page(lane->run, number),
		.length = pages * PAGE,
		.lkey = lane->run->mr->lkey,
	};
	struct ibv_sge buffer = {
		.addr = (uintptr_t)lane->buffer,
		.length = pages * PAGE,
		.lkey = lane->mr->lkey,
	};
	struct ibv_send_wr wr = {
		.num_sge = 1,
		.sg_list = &buffer,
		.send_flags = IBV_SEND_SIGNALED,
		.wr.rdma = { .remote_addr = region.addr, .rkey = lane->run->mr->rkey },
	}, *bad;
	int wanted = 1;

	switch (transfer) {
	case WRITE_TO:
		wr.opcode = IBV_WR_RDMA_WRITE;
		break;
	case READ_FROM:
		wr.opcode = IBV_WR_RDMA_READ;
		break;
	case SEND_TO:
		wr.opcode = IBV_WR_SEND;
		post_receive(lane->far, &region);
		wanted = 2;
		break;
	case SEND_FROM:
		wr.opcode = IBV_WR_SEND;
		wr.sg_list = &region;
		post_receive(lane->far, &buffer);
		wanted = 2;
		break;
	case WRITE_FROM:
	case READ_TO:
		wr.opcode = transfer == READ_TO ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE;
		wr.sg_list = &region;
		wr.wr.rdma.remote_addr = buffer.addr;
		wr.wr.rdma.rkey = lane->mr->rkey;
		break;
	case ADD_TO:
		wr.opcode = IBV_WR_ATOMIC_FETCH_AND_ADD;
		wr.wr.atomic.remote_addr = region.addr;
		wr.wr.atomic.rkey = lane->run->mr->rkey;
		wr.wr.atomic.compare_add = 0;
		buffer.length = sizeof(unsigned long);
		break;
	}
	if (ibv_post_send(lane->near, &wr, &bad))
		die("ibv_post_send");
	return complete(lane, wanted);
}

/* A transfer that has to succeed. After one that did not, the queue pairs are new. */
static bool do_transfer(struct lane *lane, enum transfer how, unsigned long number,
			unsigned long pages)
{
	int status = transfer(lane, how, number, pages);

	lane->count++;
	if (!status)
		return true;
	if (atomic_fetch_add(&lane->run->lost, 1) < 4)
		say("lane %u: %s pages %lu to %lu: %s", lane->number, transfer_names[how],
		    number, number + pages - 1,
		    status < 0 ? "does not end" : ibv_wc_status_str(status));
	disconnect_lane(lane);
	connect_lane(lane);
	return false;
}

/* A transfer that must not succeed, as the CPU may not do that either. */
static void refuse_transfer(struct lane *lane, enum transfer how, unsigned long number)
{
	if (!transfer(lane, how, number, 1)) {
		if (atomic_fetch_add(&lane->run->wrong, 1) < 4)
			say("%s page %lu succeeds, and the CPU must not do that",
			    transfer_names[how], number);
		return;
	}
	lane->refused++;
	disconnect_lane(lane);
	connect_lane(lane);
}

static void device_writes(struct lane *lane, enum transfer how, unsigned long number,
			  unsigned long pages)
{
	unsigned int writers[BLOCK];

	for (unsigned long i = 0; i < pages; i++) {
		writers[i] = new_writer(lane->run);
		fill(lane->buffer + i * WORDS, writers[i]);
	}
	if (!do_transfer(lane, how, number, pages)) {
		/* Nobody knows how far it got. */
		for (unsigned long i = 0; i < pages; i++) {
			writers[i] = new_writer(lane->run);
			fill(page(lane->run, number + i), writers[i]);
		}
	}
	memcpy(&lane->run->writer[number], writers, pages * sizeof(*writers));
}

static void device_reads(struct lane *lane, enum transfer how, unsigned long number,
			 unsigned long pages)
{
	memset(lane->buffer, 0xa5, pages * PAGE);
	if (!do_transfer(lane, how, number, pages))
		return;
	for (unsigned long i = 0; i < pages; i++)
		check(lane, transfer_names[how], lane->buffer + i * WORDS, number + i);
}

static void cpu_writes(struct lane *lane, unsigned long number, unsigned long pages)
{
	for (unsigned long i = number; i < number + pages; i++) {
		lane->run->writer[i] = new_writer(lane->run);
		fill(page(lane->run, i), lane->run->writer[i]);
	}
}

static void cpu_reads(struct lane *lane, unsigned long number, unsigned long pages)
{
	for (unsigned long i = number; i < number + pages; i++)
		check(lane, "CPU", page(lane->run, i), i);
}

/* The first word comes back as it was before, and stays that. */
static void device_adds(struct lane *lane, unsigned long number)
{
	unsigned long first = word(lane->run->writer[number], 0);

	lane->buffer[0] = ~first;
	if (!do_transfer(lane, ADD_TO, number, 1) || lane->buffer[0] == first)
		return;
	if (atomic_fetch_add(&lane->run->wrong, 1) < 4)
		say("%s: page %lu begins with %#lx, not %#lx", transfer_names[ADD_TO], number,
		    lane->buffer[0], first);
}

static void transfer_once(struct lane *lane, unsigned long number, unsigned long pages)
{
	enum transfer how = any(lane, TRANSFERS);

	if (is_into_region(how)) {
		device_writes(lane, how, number, pages);
		if (any(lane, 2))
			cpu_reads(lane, number, pages);
		else
			device_reads(lane, READ_FROM, number, pages);
		return;
	}
	if (any(lane, 2))
		cpu_writes(lane, number, pages);
	if (!any(lane, 4))
		device_adds(lane, number);
	device_reads(lane, how, number, pages);
}

/* Whose pages are whose */

static bool is_shared(struct run *run)
{
	return run->disturbance == SHARED;
}

/* Hugetlb pages are taken away and moved whole, so one belongs to the disturber. */
static unsigned long lane_pages(struct run *run)
{
	if (is_shared(run))
		return PAGES / 2;
	return run->memory == HUGETLB ? PAGES - HUGE / PAGE : PAGES;
}

static bool is_interleaved(struct run *run)
{
	return !is_shared(run) && run->memory != HUGETLB;
}

static unsigned long own_block(struct lane *lane)
{
	unsigned int owners = is_interleaved(lane->run) ? LANES + 1 : LANES;
	unsigned long blocks = lane_pages(lane->run) / BLOCK / owners;

	if (lane->number >= owners)	/* its pages are those after the lanes' */
		return PAGES - BLOCK;

	return (any(lane, blocks) * owners + lane->number) * BLOCK;
}

/* The disturber's: a first page, and how many bytes it takes. */
static unsigned long disturbers(struct lane *lane, size_t *size)
{
	struct run *run = lane->run;

	*size = BLOCK * PAGE;
	if (is_interleaved(run))
		return own_block(lane);
	if (run->memory != HUGETLB)
		return PAGES / 2 + any(lane, PAGES / 2 / BLOCK) * BLOCK;
	*size = HUGE;
	if (is_shared(run))
		return PAGES / 2 + any(lane, REGION / HUGE / 2) * (HUGE / PAGE);
	return PAGES - HUGE / PAGE;
}

static void *run_lane(void *data)
{
	struct lane *lane = data;

	while (!atomic_load(&lane->run->over))
		transfer_once(lane, own_block(lane), 1 + any(lane, BLOCK));
	return NULL;
}

/* ibv_advise_mr(), which the library for rxe had not before version 57. */
static int prefetch(struct run *run, unsigned int length)
{
	struct ib_uverbs_sge sge = {
		.addr = (uintptr_t)run->region,
		.length = length,
		.lkey = run->mr->lkey,
	};
	struct {
		struct ib_uverbs_ioctl_hdr head;
		struct ib_uverbs_attr attrs[4];
	} command = {
		.head = {
			.length = sizeof(command),
			.object_id = UVERBS_OBJECT_MR,
			.method_id = UVERBS_METHOD_ADVISE_MR,
			.num_attrs = 4,
			.driver_id = RDMA_DRIVER_RXE,
		},
		.attrs = {
			{
				.attr_id = UVERBS_ATTR_ADVISE_MR_PD_HANDLE,
				.data = pd->handle,
			}, {
				.attr_id = UVERBS_ATTR_ADVISE_MR_ADVICE,
				.len = sizeof(__u64),
				.data = IB_UVERBS_ADVISE_MR_ADVICE_PREFETCH_WRITE,
			}, {
				.attr_id = UVERBS_ATTR_ADVISE_MR_FLAGS,
				.len = sizeof(__u32),
				.data = IB_UVERBS_ADVISE_MR_FLAG_FLUSH,
			}, {
				.attr_id = UVERBS_ATTR_ADVISE_MR_SGE_LIST,
				.len = sizeof(sge),
				.data = (uintptr_t)&sge,
			},
		},
	};

	return ioctl(context->cmd_fd, RDMA_VERBS_IOCTL, &command);
}

static void *run_prefetcher(void *data)
{
	struct run *run = data;

	while (!atomic_load(&run->over)) {
		if (!prefetch(run, REGION / 2)) {
			atomic_fetch_add(&run->prefetched, 1);
			continue;
		}
		if (atomic_fetch_add(&run->lost, 1) < 4)
			say("prefetch: %s", strerror(errno));
		usleep(1000);
	}
	return NULL;
}

/* What is done to the memory */

/* The disturber's own pages work, and have what they had. */
static void try_own(struct lane *lane, unsigned long number)
{
	cpu_reads(lane, number, BLOCK);
	transfer_once(lane, number, BLOCK);
}

static void take_away(struct lane *lane)
{
	struct run *run = lane->run;
	unsigned long number, pages;
	size_t size;

	number = disturbers(lane, &size);
	pages = size / PAGE;
	if (madvise(page(run, number), size, MADV_DONTNEED))
		die("MADV_DONTNEED");
	memset(&run->writer[number], 0, pages * sizeof(run->writer[0]));
	if (is_shared(run)) {	/* it is the restarts that count */
		usleep(1000);
		return;
	}
	number += any(lane, pages / BLOCK) * BLOCK;
	device_reads(lane, READ_FROM, number, BLOCK);
	transfer_once(lane, number, BLOCK);
}

/* The child writes to pages that it shares, and the parent does so at the same time. */
static void fork_child(struct lane *lane)
{
	struct run *run = lane->run;
	int status;
	pid_t pid = fork();

	if (pid < 0)
		die("fork");
	if (!pid) {
		for (unsigned int i = 0; i < 64; i++)
			memset(page(run, any(lane, PAGES)), 0x77, PAGE);
		_exit(0);
	}
	try_own(lane, own_block(lane));
	if (waitpid(pid, &status, 0) != pid || status)
		die("the child");
}

static void protect(struct lane *lane)
{
	struct run *run = lane->run;
	unsigned long number;
	size_t size;

	number = disturbers(lane, &size);
	cpu_writes(lane, number, 1);
	if (mprotect(page(run, number), size, PROT_READ))
		die("mprotect");
	device_reads(lane, READ_FROM, number, BLOCK);
	if (!any(lane, 4)) {
		fill(lane->buffer, 0x1234567);
		refuse_transfer(lane, any(lane, 2) ? WRITE_TO : READ_TO, number);
		cpu_reads(lane, number, BLOCK);
	}
	if (mprotect(page(run, number), size, PROT_READ | PROT_WRITE))
		die("mprotect");
	try_own(lane, number);
}

/* Takes the address range, so that nobody else's memory comes to be there. */
static void reserve(void *start, size_t size)
{
	if (mmap(start, size, PROT_NONE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE,
		 -1, 0) != start)
		die("reserving what pages have left");
}

static void move_pages_to(void *to, void *from, size_t size)
{
	if (mremap(from, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		die("mremap");
	reserve(from, size);
}

/* Pages go elsewhere and come back. In between the device must not reach them. */
static void move(struct lane *lane)
{
	struct run *run = lane->run;
	unsigned long number;
	size_t size;

	number = disturbers(lane, &size);
	cpu_writes(lane, number, 1);
	device_reads(lane, READ_FROM, number, BLOCK);
	move_pages_to(run->elsewhere, page(run, number), size);
	if (!any(lane, 4))
		refuse_transfer(lane, any(lane, 2) ? READ_FROM : WRITE_TO, number);
	check(lane, "CPU elsewhere", (unsigned long *)run->elsewhere, number);
	move_pages_to(page(run, number), run->elsewhere, size);
	try_own(lane, number);
}

static void collapse(struct lane *lane)
{
	/* It fails where a page is in use, or swapped out. */
	if (!madvise(lane->run->region + any(lane, REGION / HUGE) * HUGE, HUGE, MADV_COLLAPSE))
		atomic_fetch_add(&lane->run->collapsed, 1);
	if (any(lane, 2))
		take_away(lane);
	else
		protect(lane);
}

static void swap_out(struct lane *lane)
{
	unsigned long number = any(lane, PAGES / 64) * 64;

	if (madvise(page(lane->run, number), 64 * PAGE, MADV_PAGEOUT))
		die("MADV_PAGEOUT");
	try_own(lane, own_block(lane));
}

static void put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);

	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		die(path);
	close(fd);
}

static void run_ksm(bool on)
{
	put("/sys/kernel/mm/ksm/pages_to_scan", "2000");
	put("/sys/kernel/mm/ksm/sleep_millisecs", "5");
	put("/sys/kernel/mm/ksm/run", on ? "1" : "2");
	if (!on)
		put("/sys/kernel/mm/ksm/run", "0");
}

static unsigned long vm_event(const char *name)
{
	FILE *file = fopen("/proc/vmstat", "r");
	unsigned long value, found = 0;
	char key[64];

	if (!file)
		die("/proc/vmstat");
	while (fscanf(file, "%63s %lu", key, &value) == 2)
		if (!strcmp(key, name))
			found = value;
	fclose(file);
	return found;
}

static bool uses_ksm(struct run *run)
{
	return run->disturbance == KSM || (run->disturbance == STORM && run->memory != HUGETLB);
}

static void disturb(struct lane *lane, enum disturbance how)
{
	switch (how) {
	case QUIET:
	case KSM:
		try_own(lane, own_block(lane));
		break;
	case DONTNEED:
	case SHARED:
		take_away(lane);
		break;
	case FORK:
		fork_child(lane);
		break;
	case MPROTECT:
		protect(lane);
		break;
	case MREMAP:
		move(lane);
		break;
	case COLLAPSE:
		collapse(lane);
		break;
	case SWAP:
		swap_out(lane);
		break;
	case STORM:
		disturb(lane, DONTNEED + any(lane, STORM - DONTNEED));
		break;
	}
	atomic_fetch_add(&lane->run->disturbed, 1);
}

/* One test */

/* map_aligned SIZE: fresh memory that starts where a huge page may. */
static char *map_aligned(size_t size, int prot)
{
	char *start = mmap(NULL, size + HUGE, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	size_t skip;

	if (start == MAP_FAILED)
		die("mmap");
	skip = -(uintptr_t)start & (HUGE - 1);
	if (skip)
		munmap(start, skip);
	munmap(start + skip + size, HUGE - skip);
	return start + skip;
}

static void map_region(struct run *run)
{
	run->region = map_aligned(REGION, PROT_READ | PROT_WRITE);
	run->elsewhere = map_aligned(HUGE, PROT_NONE);
	if (run->memory == HUGETLB) {
		if (mmap(run->region, REGION, PROT_READ | PROT_WRITE, MAP_PRIVATE |
			 MAP_ANONYMOUS | MAP_HUGETLB | MAP_FIXED, -1, 0) == MAP_FAILED)
			die("mmap of hugetlb pages");
		return;
	}
	if (madvise(run->region, REGION, run->memory == THP ? MADV_HUGEPAGE : MADV_NOHUGEPAGE))
		die("MADV_HUGEPAGE");
	if (uses_ksm(run) && madvise(run->region, REGION, MADV_MERGEABLE))
		die("MADV_MERGEABLE");
}

/* The pages that the lanes share with prefetches are there from the beginning. */
static void set_up(struct run *run)
{
	map_region(run);
	if (is_shared(run) || run->memory == THP)
		cpu_writes(&run->lanes[0], 0, PAGES);
	run->mr = ibv_reg_mr(pd, run->region, REGION, REMOTE | IBV_ACCESS_ON_DEMAND);
	if (!run->mr)
		die("ibv_reg_mr on demand");
	for (unsigned int i = 0; i <= LANES; i++)
		open_lane(run, i);
	if (uses_ksm(run))
		run_ksm(true);
}

static void tear_down(struct run *run)
{
	if (uses_ksm(run))
		run_ksm(false);
	for (unsigned int i = 0; i <= LANES; i++)
		close_lane(&run->lanes[i]);
	if (ibv_dereg_mr(run->mr))
		die("ibv_dereg_mr");
	munmap(run->region, REGION);
	munmap(run->elsewhere, HUGE);
}

static void start(pthread_t *thread, void *(*function)(void *), void *data)
{
	errno = pthread_create(thread, NULL, function, data);
	if (errno)
		die("pthread_create");
}

static void run_all(struct run *run)
{
	unsigned int prefetchers = is_shared(run) ? PREFETCHERS : 0;
	struct lane *disturber = &run->lanes[LANES];
	pthread_t threads[PREFETCHERS];
	unsigned long end;

	for (unsigned int i = 0; i < LANES; i++)
		start(&run->lanes[i].thread, run_lane, &run->lanes[i]);
	for (unsigned int i = 0; i < prefetchers; i++)
		start(&threads[i], run_prefetcher, run);
	for (end = now() + milliseconds; now() < end; )
		disturb(disturber, run->disturbance);
	atomic_store(&run->over, true);
	for (unsigned int i = 0; i < LANES; i++)
		pthread_join(run->lanes[i].thread, NULL);
	for (unsigned int i = 0; i < prefetchers; i++)
		pthread_join(threads[i], NULL);
	for (unsigned long i = 0; i < PAGES; i += BLOCK)
		cpu_reads(disturber, i, BLOCK);
}

/* Has what the scenario is about happened at all? */
static bool has_happened(struct run *run, unsigned long swapped, unsigned long copied)
{
	if (run->disturbance == SWAP || run->disturbance == STORM)
		say("%lu pages swapped out", swapped);
	if (uses_ksm(run))
		say("%lu merged pages copied", copied);
	if (run->disturbance == COLLAPSE || run->disturbance == STORM)
		say("%lu huge pages collapsed", run->collapsed);
	if (is_shared(run))
		return run->prefetched;
	if (run->disturbance == SWAP)
		return swapped;
	if (run->disturbance == KSM)
		return copied;
	return run->disturbance != COLLAPSE || run->collapsed;
}

static bool test(enum memory memory, enum disturbance disturbance)
{
	unsigned long swapped = vm_event("pswpout"), copied = vm_event("cow_ksm");
	struct run *run = calloc(1, sizeof(*run));
	unsigned long count = 0, refused = 0;
	bool good;

	if (!run)
		die("calloc");
	run->memory = memory;
	run->disturbance = disturbance;
	run->lanes[0].run = run;
	set_up(run);
	run_all(run);
	for (unsigned int i = 0; i <= LANES; i++) {
		count += run->lanes[i].count;
		refused += run->lanes[i].refused;
	}
	tear_down(run);
	say("%lu transfers, %lu refused as they must, %lu prefetches, %lu disturbances",
	    count, refused, run->prefetched, run->disturbed);
	say("%lu wrong pages, %lu failures", run->wrong, run->lost);
	good = has_happened(run, vm_event("pswpout") - swapped, vm_event("cow_ksm") - copied) &&
	       !run->wrong && !run->lost && count;
	free(run);
	return good;
}

static bool makes_sense(enum memory memory, enum disturbance disturbance)
{
	switch (disturbance) {
	case COLLAPSE:
	case STORM:
		return memory == THP;
	case KSM:
	case SWAP:
		return memory != HUGETLB;
	default:
		return true;
	}
}

static void open_device(const char *name)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	struct ibv_device_attr_ex attr;

	for (; list && *list; list++)
		if (!strcmp(ibv_get_device_name(*list), name))
			break;
	context = list && *list ? ibv_open_device(*list) : NULL;
	if (!context)
		die(name);
	if (ibv_query_device_ex(context, NULL, &attr) ||
	    !(attr.odp_caps.general_caps & IBV_ODP_SUPPORT))
		die("on-demand paging");
	pd = ibv_alloc_pd(context);
	if (!pd || ibv_query_gid(context, 1, gid_index, &gid))
		die("the device");
}

static bool is_chosen(const char *name, char **patterns)
{
	bool chosen = !*patterns;

	for (; *patterns; patterns++)
		chosen |= !!strstr(name, *patterns);
	return chosen;
}

/* rdma_odp DEVICE GID MILLISECONDS [PART-OF-A-NAME...] */
int main(int argc, char **argv)
{
	unsigned int number = 0, failed = 0;
	char name[64];

	if (argc < 4) {
		fprintf(stderr, "usage: rdma_odp DEVICE GID MILLISECONDS [NAME...]\n");
		return 2;
	}
	gid_index = atoi(argv[2]);
	milliseconds = strtoul(argv[3], NULL, 10);
	open_device(argv[1]);
	for (enum memory memory = SMALL; memory <= HUGETLB; memory++) {
		for (enum disturbance how = QUIET; how <= SHARED; how++) {
			bool good;

			snprintf(name, sizeof(name), "%s_%s", memory_names[memory],
				 disturbance_names[how]);
			if (!makes_sense(memory, how) || !is_chosen(name, argv + 4))
				continue;
			good = test(memory, how);
			failed += !good;
			printf("%sok %u %s\n", good ? "" : "not ", ++number, name);
			fflush(stdout);
		}
	}
	printf("1..%u\n", number);
	return failed ? 1 : 0;
}
