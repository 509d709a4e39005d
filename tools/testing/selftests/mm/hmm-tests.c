// SPDX-License-Identifier: GPL-2.0
/*
 * What a device sees of a process's memory through HMM.
 *
 * The test device (lib/test_hmm.c) mirrors the address space of the process
 * that opens it. READ and WRITE access memory as a device would, by its own
 * page table, and have HMM fault in what is missing there. SNAPSHOT tells what
 * HMM makes of each page without faulting anything in. Each test brings some
 * kind of page-table entry about, and then judges by the data that the device
 * read or wrote and by the bytes of a snapshot, not just by an exit status.
 *
 * Who wrote a page is written in it: every word holds its writer and its own
 * address, so that a page that is stale, or of another address, shows.
 *
 * Each test ends in test_close(): every device that it has opened compares its
 * page table with what is found without HMM, and has no memory left when it is
 * closed.
 *
 * What the tests change of the system is put back when all have run, whatever
 * has become of a test: one that hangs is killed along with its parent.
 */
#include "kselftest_harness.h"

#include <asm-generic/mman.h> /* the tools' version: libc's may be older */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <mntent.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>
#include <linux/magic.h>
#include <linux/memfd.h>
#include <linux/userfaultfd.h>

#include "hugepage_settings.h"
#include "vm_util.h"

#ifdef __GLIBC_PREREQ
#if __GLIBC_PREREQ(2, 35)
#include <sys/rseq.h>
#endif
#endif

#include <lib/test_hmm_uapi.h>
#include <mm/gup_test.h>

/* A kernel that checks itself, on a processor that is emulated, takes its time. */
#undef TEST_TIMEOUT_DEFAULT
#define TEST_TIMEOUT_DEFAULT 300

/* Bits of a pagemap entry: is anything there? */
#define POPULATED (PM_PRESENT | PM_SWAP)

/* Pages of an ordinary mapping: several of the device's steps, and no power of two. */
#define NPAGES ((size_t)100)

/* Pages that the driver itself offers to map. */
#define IO_PAGES ((size_t)8)

/* What a snapshot tells of a page. */
enum {
	SEES_ERROR = HMM_DMIRROR_PROT_ERROR,
	SEES_NONE = HMM_DMIRROR_PROT_NONE,
	SEES_READ = HMM_DMIRROR_PROT_READ,
	SEES_WRITE = HMM_DMIRROR_PROT_WRITE,
	SEES_ZERO = HMM_DMIRROR_PROT_ZERO | HMM_DMIRROR_PROT_READ,
	SEES_PMD = HMM_DMIRROR_PROT_PMD,
	SEES_PUD = HMM_DMIRROR_PROT_PUD,
};

/* Who wrote a page last. NOBODY leaves zeroes. */
enum writer { NOBODY, CPU, DEVICE, CHILD, UFFD };

/* The page-table level at which a populated mapping has its entries. */
enum level { PTE, PMD, PUD };

struct backing {
	enum { ANON, SHMEM, DISK, HUGETLB } kind;
	int share;
	enum level level;
	/* One fault brings 1 << order pages, where it brings no larger entry. */
	unsigned int order;
};

/* The backings. */
#define B_ANON			{ .kind = ANON, .share = MAP_PRIVATE }
#define B_MTHP			{ .kind = ANON, .share = MAP_PRIVATE, .order = 4 }
#define B_THP			{ .kind = ANON, .share = MAP_PRIVATE, .level = PMD }
#define B_SHMEM			{ .kind = SHMEM, .share = MAP_SHARED }
#define B_SHMEM_PRIVATE		{ .kind = SHMEM, .share = MAP_PRIVATE }
#define B_SHMEM_THP		{ .kind = SHMEM, .share = MAP_SHARED, .level = PMD }
#define B_FILE			{ .kind = DISK, .share = MAP_SHARED }
#define B_FILE_PRIVATE		{ .kind = DISK, .share = MAP_PRIVATE }
#define B_HUGETLB		{ .kind = HUGETLB, .share = MAP_PRIVATE, .level = PMD }
#define B_HUGETLB_SHARED	{ .kind = HUGETLB, .share = MAP_SHARED, .level = PMD }
#define B_HUGETLB_PUD		{ .kind = HUGETLB, .share = MAP_SHARED, .level = PUD }

static const struct backing anon = B_ANON;
static const struct backing thp = B_THP;
static const struct backing shmem = B_SHMEM;
static const struct backing shmem_private = B_SHMEM_PRIVATE;
static const struct backing hugetlb = B_HUGETLB;

/*
 * The process's side of the device: what it read, what it is to write, or the
 * bytes of a snapshot; and its last answer. Each thread has its own.
 */
static __thread char *mirror;
static __thread struct hmm_dmirror_cmd answer;

/*
 * A gigantic page takes seconds to clear, so all tests have the same one: it
 * stays in this file, and only what a test works on is cleared for it.
 */
static int gigantic = -1;

/*
 * Sizes
 */

static size_t pmd_size(void)
{
	static size_t size;

	if (!size)
		size = read_pmd_pagesize();
	if (!size)
		size = default_huge_page_size();
	return size;
}

static unsigned int pmd_order(void)
{
	return sz2ord(pmd_size(), psize());
}

static size_t level_size(enum level level)
{
	switch (level) {
	case PMD:
		return pmd_size();
	case PUD:
		/* A table is a page of entries. */
		return pmd_size() * (psize() / sizeof(__u64));
	default:
		return psize();
	}
}

static size_t pages(size_t size)
{
	return size / psize();
}

static void *at(void *base, size_t page)
{
	return (char *)base + page * psize();
}

/*
 * Data
 */

static __u64 word_of(enum writer who, const void *addr)
{
	if (who == NOBODY)
		return 0;
	return (__u64)who << 56 | (uintptr_t)addr;
}

/* What @who writes to @npages pages at @addr goes to @buf. */
static void fill(void *buf, void *addr, size_t npages, enum writer who)
{
	size_t n = npages * psize() / sizeof(__u64);
	__u64 *word = buf, *where = addr;

	for (size_t i = 0; i < n; i++)
		word[i] = word_of(who, where + i);
}

/* Does @buf hold what @who wrote to @npages pages at @addr? */
static bool holds(const void *buf, void *addr, size_t npages, enum writer who)
{
	size_t n = npages * psize() / sizeof(__u64);
	const __u64 *word = buf;
	__u64 *where = addr;

	for (size_t i = 0; i < n; i++) {
		if (word[i] == word_of(who, where + i))
			continue;
		ksft_print_msg("page %zu of %zu: %#llx, not %#llx\n",
			       i * sizeof(*word) / psize(), npages,
			       (unsigned long long)word[i],
			       (unsigned long long)word_of(who, where + i));
		return false;
	}
	return true;
}

static void cpu_writes(void *addr, size_t npages, enum writer who)
{
	fill(addr, addr, npages, who);
}

static bool cpu_sees(void *addr, size_t npages, enum writer who)
{
	return holds(addr, addr, npages, who);
}

static void cpu_touches(void *addr, size_t npages)
{
	force_read_pages(addr, npages, psize());
}

static bool file_holds_at(int file, off_t offset, void *addr, size_t npages,
			  enum writer who)
{
	size_t size = npages * psize();
	char *buf = malloc(size);
	bool good = buf && pread(file, buf, size, offset) == (ssize_t)size &&
		    holds(buf, addr, npages, who);

	free(buf);
	return good;
}

static bool file_holds(int file, void *addr, size_t npages, enum writer who)
{
	return file_holds_at(file, 0, addr, npages, who);
}

/*
 * The CPU's page table, as /proc/self/pagemap has it
 */

static size_t count_entries(int pagemap, void *addr, size_t npages, __u64 bits)
{
	off_t at = (uintptr_t)addr / psize() * sizeof(__u64);
	size_t size = npages * sizeof(__u64), n = 0;
	__u64 *entries = malloc(size);

	if (!entries || pread(pagemap, entries, size, at) != (ssize_t)size)
		ksft_exit_fail_perror("reading pagemap failed");
	for (size_t i = 0; i < npages; i++)
		n += !!(entries[i] & bits);
	free(entries);
	return n;
}

/*
 * Each CPU puts pages aside for a while before reclaim can find them, and each
 * looks through its own alone.
 */
static bool stay_on_this_cpu(void)
{
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(sched_getcpu(), &cpus);
	return !sched_setaffinity(0, sizeof(cpus), &cpus);
}

static bool page_out(int pagemap, void *addr, size_t npages)
{
	for (int tries = 0; tries < 10; tries++) {
		if (madvise(addr, npages * psize(), MADV_PAGEOUT))
			return false;
		if (count_entries(pagemap, addr, npages, PM_SWAP) == npages)
			return true;
	}
	return false;
}

/*
 * What MADV_COLLAPSE brings back by itself it drains from the LRU batches of
 * just the processor it is on at the end. It asks for another try if the thread
 * was on another one as well.
 */
static int collapse(void *addr, size_t npages)
{
	for (int tries = 0; tries < 10; tries++) {
		if (!madvise(addr, npages * psize(), MADV_COLLAPSE))
			return 0;
		if (errno != EAGAIN)
			break;
	}
	return -errno;
}

/* As page_out(), for pages of a file in memory, whose entries are just dropped. */
static bool evict(int pagemap, void *addr, size_t npages)
{
	for (int tries = 0; tries < 10; tries++) {
		if (madvise(addr, npages * psize(), MADV_PAGEOUT))
			return false;
		if (!count_entries(pagemap, addr, npages, PM_PRESENT))
			return true;
	}
	return false;
}

/*
 * The device's commands
 */

/* However much of it is done. */
static int _test_cmd_some(int dev, unsigned long command, void *addr, size_t npages,
			  void *ptr)
{
	answer = (struct hmm_dmirror_cmd) {
		.addr = (uintptr_t)addr,
		.ptr = (uintptr_t)ptr,
		.npages = npages,
	};
	return ioctl(dev, command, &answer);
}

static int _test_cmd(int dev, unsigned long command, void *addr, size_t npages, void *ptr)
{
	int ret = _test_cmd_some(dev, command, addr, npages, ptr);

	if (ret == 0 && answer.cpages != npages) {
		ksft_print_msg("%llu of %zu pages done\n", answer.cpages, npages);
		errno = EREMOTEIO;
		ret = -1;
	}
	return ret;
}

/* None of what the mirror held before may pass for what the device reads. */
static int _test_cmd_fetch(int dev, unsigned long command, void *addr, size_t npages)
{
	memset(mirror, 0x5a, npages * psize());
	return _test_cmd(dev, command, addr, npages, mirror);
}

static int _test_cmd_read(int dev, void *addr, size_t npages)
{
	return _test_cmd_fetch(dev, HMM_DMIRROR_READ, addr, npages);
}

static int _test_cmd_read_unlocked(int dev, void *addr, size_t npages)
{
	return _test_cmd_fetch(dev, HMM_DMIRROR_READ_UNLOCKED, addr, npages);
}

static int _test_cmd_write(int dev, void *addr, size_t npages, enum writer who)
{
	fill(mirror, addr, npages, who);
	return _test_cmd(dev, HMM_DMIRROR_WRITE, addr, npages, mirror);
}

static int _test_cmd_snapshot(int dev, void *addr, size_t npages)
{
	memset(mirror, 0x5a, npages);
	return _test_cmd(dev, HMM_DMIRROR_SNAPSHOT, addr, npages, mirror);
}

static int _test_cmd_to_dev(int dev, void *addr, size_t npages)
{
	return _test_cmd_fetch(dev, HMM_DMIRROR_MIGRATE_TO_DEV, addr, npages);
}

static int _test_cmd_to_sys(int dev, void *addr, size_t npages)
{
	return _test_cmd_some(dev, HMM_DMIRROR_MIGRATE_TO_SYS, addr, npages, mirror);
}

static int _test_cmd_exclusive(int dev, void *addr, size_t npages)
{
	return _test_cmd_fetch(dev, HMM_DMIRROR_EXCLUSIVE, addr, npages);
}

/* Commands without a range have one, too: the base tree's device insists. */
static int _test_cmd_flags(int dev, __u64 flags)
{
	return _test_cmd_some(dev, HMM_DMIRROR_FLAGS, NULL, flags, NULL);
}

static int _test_cmd_release(int dev)
{
	return _test_cmd_some(dev, HMM_DMIRROR_RELEASE, NULL, 1, NULL);
}

/* Does the last snapshot tell @sight of each of @npages pages from @page on? */
static bool saw(size_t page, size_t npages, unsigned char sight)
{
	for (size_t i = page; i < page + npages; i++) {
		unsigned char seen = mirror[i];

		if (seen == sight)
			continue;
		ksft_print_msg("page %zu: %#x, not %#x\n", i, seen, sight);
		return false;
	}
	return true;
}

static bool done(int ret)
{
	if (ret)
		ksft_print_msg("device: %s\n", strerror(errno));
	return !ret;
}

/* The device reads @npages pages at @addr, and finds there what @who wrote. */
static bool reads(int dev, void *addr, size_t npages, enum writer who)
{
	return done(_test_cmd_read(dev, addr, npages)) && holds(mirror, addr, npages, who);
}

static bool reads_unlocked(int dev, void *addr, size_t npages, enum writer who)
{
	return done(_test_cmd_read_unlocked(dev, addr, npages)) &&
	       holds(mirror, addr, npages, who);
}

/* A snapshot tells @sight of each of @npages pages at @addr. */
static bool sees(int dev, void *addr, size_t npages, unsigned char sight)
{
	return done(_test_cmd_snapshot(dev, addr, npages)) && saw(0, npages, sight);
}

/* All of it moves to the device, which finds there what @who wrote. */
static bool moves(int dev, void *addr, size_t npages, enum writer who)
{
	return done(_test_cmd_to_dev(dev, addr, npages)) && holds(mirror, addr, npages, who);
}

/* @due of @npages pages at @addr move back to the system. */
static bool moves_back(int dev, void *addr, size_t npages, size_t due)
{
	if (!done(_test_cmd_to_sys(dev, addr, npages)))
		return false;
	if (answer.cpages != due)
		ksft_print_msg("%llu pages moved, not %zu\n", answer.cpages, due);
	return answer.cpages == due;
}

/* The device gets all of it for itself, and finds there what @who wrote. */
static bool seizes(int dev, void *addr, size_t npages, enum writer who)
{
	return done(_test_cmd_exclusive(dev, addr, npages)) &&
	       holds(mirror, addr, npages, who);
}

static bool is_exclusive(int dev, void *page)
{
	if (!_test_cmd_some(dev, HMM_DMIRROR_CHECK_EXCLUSIVE, page, 1, mirror))
		return false;
	if (errno != EPERM)
		ksft_exit_fail_perror("asking for exclusive pages failed");
	return true;
}

static size_t count_exclusive(int dev, void *addr, size_t npages)
{
	size_t n = 0;

	for (size_t i = 0; i < npages; i++)
		n += is_exclusive(dev, at(addr, i));
	return n;
}

/* The error of all these commands; none if they do not agree. */
static int common_error(int dev, const unsigned long *commands, size_t n,
			void *addr, size_t npages, void *ptr)
{
	int first = 0;

	for (size_t i = 0; i < n; i++) {
		int err = _test_cmd(dev, commands[i], addr, npages, ptr) ? errno : 0;

		if (i && err != first) {
			ksft_print_msg("command %#lx: error %d, not %d\n",
				       commands[i], err, first);
			return 0;
		}
		first = err;
	}
	return first;
}

/* The error of any access to a range in which some page allows none. */
static int access_error(int dev, void *addr, size_t npages)
{
	static const unsigned long commands[] = {
		HMM_DMIRROR_READ, HMM_DMIRROR_READ_UNLOCKED, HMM_DMIRROR_WRITE,
	};

	/* A write may get as far as to the first such page. */
	fill(mirror, addr, npages, DEVICE);
	return common_error(dev, commands, ARRAY_SIZE(commands), addr, npages, mirror);
}

/* Commands that have a range. The last two have no buffer. */
static const unsigned long ranged_commands[] = {
	HMM_DMIRROR_READ, HMM_DMIRROR_READ_UNLOCKED, HMM_DMIRROR_WRITE, HMM_DMIRROR_SNAPSHOT,
	HMM_DMIRROR_MIGRATE_TO_DEV, HMM_DMIRROR_EXCLUSIVE,
	HMM_DMIRROR_MIGRATE_TO_SYS, HMM_DMIRROR_CHECK_EXCLUSIVE,
};

/* The error of all of these, for a range that none can take. */
static int range_error(int dev, void *addr, size_t npages)
{
	return common_error(dev, ranged_commands, ARRAY_SIZE(ranged_commands),
			    addr, npages, mirror);
}

/* And for a buffer that none can take. */
static int buffer_error(int dev, void *addr, size_t npages, void *ptr)
{
	return common_error(dev, ranged_commands, ARRAY_SIZE(ranged_commands) - 2,
			    addr, npages, ptr);
}

/*
 * The device's inside
 */

/* What the device told last of its inside. */
static struct hmm_dmirror_test inside;

static int _test_inside(int dev, unsigned int op, unsigned int flags)
{
	inside.size = sizeof(inside);
	inside.op = op;
	inside.flags = flags;
	return ioctl(dev, HMM_DMIRROR_TEST, &inside);
}

static int _test_stats(int dev)
{
	memset(&inside, 0, sizeof(inside));
	return _test_inside(dev, HMM_DMIRROR_OP_STATS, 0);
}

static bool has_inside(int dev)
{
	return !_test_stats(dev);
}

/* Does the device see in these pages what the CPU does? */
static bool agrees_on(int dev, void *addr, size_t npages)
{
	memset(&inside, 0, sizeof(inside));
	inside.check.addr = (uintptr_t)addr;
	inside.check.npages = npages;
	if (!_test_inside(dev, HMM_DMIRROR_OP_CHECK, 0))
		return true;
	if (errno != EUCLEAN)
		return done(-1);
	ksft_print_msg("CHECK: %s at %#llx has %#llx, not %#llx\n",
		       inside.check.wrong == HMM_DMIRROR_WRONG_WALK ? "walk" : "table",
		       (unsigned long long)inside.check.addr,
		       (unsigned long long)inside.check.found,
		       (unsigned long long)inside.check.due);
	return false;
}

/* The same for all that its page table has. Not every device can tell. */
static bool agrees(int dev)
{
	return !has_inside(dev) || agrees_on(dev, NULL, 0);
}

#define test_err(_errno, cmd)							\
({										\
	errno = 0;								\
	EXPECT_EQ(-1, cmd);							\
	EXPECT_EQ(_errno, errno);						\
})

#define test_cmd_read(addr, npages, who)					\
	ASSERT_TRUE(reads(self->fd, addr, npages, who))
#define test_err_read(_errno, addr, npages)					\
	test_err(_errno, _test_cmd_read(self->fd, addr, npages))

#define test_cmd_read_unlocked(addr, npages, who)				\
	ASSERT_TRUE(reads_unlocked(self->fd, addr, npages, who))

#define test_cmd_write(addr, npages, who)					\
	ASSERT_TRUE(done(_test_cmd_write(self->fd, addr, npages, who)))
#define test_err_write(_errno, addr, npages)					\
	test_err(_errno, _test_cmd_write(self->fd, addr, npages, DEVICE))

#define test_cmd_snapshot(addr, npages, sight)					\
	ASSERT_TRUE(sees(self->fd, addr, npages, sight))

#define test_cmd_to_dev(addr, npages, who)					\
	ASSERT_TRUE(moves(self->fd, addr, npages, who))
#define test_err_to_dev(_errno, addr, npages)					\
	test_err(_errno, _test_cmd_to_dev(self->fd, addr, npages))

#define test_cmd_to_sys(addr, npages, due)					\
	ASSERT_TRUE(moves_back(self->fd, addr, npages, due))
#define test_err_to_sys(_errno, addr, npages)					\
	test_err(_errno, _test_cmd_to_sys(self->fd, addr, npages))

#define test_cmd_exclusive(addr, npages, who)					\
	ASSERT_TRUE(seizes(self->fd, addr, npages, who))
#define test_err_exclusive(_errno, addr, npages)				\
	test_err(_errno, _test_cmd_exclusive(self->fd, addr, npages))

/* The device has @due of @npages pages at @addr for itself. */
#define test_exclusive(addr, npages, due)					\
({										\
	size_t __due = due;							\
										\
	ASSERT_EQ(__due, count_exclusive(self->fd, addr, npages));		\
})

#define test_cmd_release()							\
	ASSERT_TRUE(done(_test_cmd_release(self->fd)))

/* The next large folio cannot be had. */
#define test_fail_alloc()							\
	ASSERT_TRUE(done(_test_cmd_flags(self->fd, HMM_DMIRROR_FLAG_FAIL_ALLOC)))

#define test_err_access(_errno, addr, npages)					\
	EXPECT_EQ(_errno, access_error(self->fd, addr, npages))
#define test_err_range(_errno, addr, npages)					\
	ASSERT_EQ(_errno, range_error(self->fd, addr, npages))
#define test_err_buffer(_errno, addr, npages, ptr)				\
	ASSERT_EQ(_errno, buffer_error(self->fd, addr, npages, ptr))

/* So many of the device's accesses found a page missing from its page table. */
#define test_faults(due)							\
	EXPECT_EQ((__u64)(due), answer.faults)

/*
 * Mappings
 */

static int disk_file_in(const char *dir)
{
	struct statfs fs;

	if (!dir || statfs(dir, &fs))
		return -1;
	if (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC ||
	    fs.f_type == HUGETLBFS_MAGIC)
		return -1;
	return open(dir, O_TMPFILE | O_RDWR, 0600);
}

/* A file without a name, on any file system that is not in memory alone. */
static int disk_file(void)
{
	int fd = disk_file_in(getenv("TMPDIR"));
	FILE *mounts = setmntent("/proc/self/mounts", "r");
	struct mntent *mount;

	if (fd < 0)
		fd = disk_file_in(".");
	while (fd < 0 && mounts && (mount = getmntent(mounts)))
		fd = disk_file_in(mount->mnt_dir);
	if (mounts)
		endmntent(mounts);
	return fd;
}

static int hugetlb_file(enum level level)
{
	int shift = __builtin_ctzl(level_size(level));

	return memfd_create("hmm-tests", MFD_HUGETLB | shift << MFD_HUGE_SHIFT);
}

static int backing_file(const struct backing *b)
{
	switch (b->kind) {
	case SHMEM:
		return memfd_create("hmm-tests", 0);
	case HUGETLB:
		return b->level == PUD ? dup(gigantic) : hugetlb_file(b->level);
	case DISK:
		return disk_file();
	default:
		return -1;
	}
}

/*
 * @size bytes at an address that is a multiple of @align, amid memory that
 * nobody can access.
 */
static void *map_aligned(size_t size, size_t align, int prot, int flags, int file)
{
	char *space = mmap(NULL, size + 3 * align, PROT_NONE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uintptr_t addr = ((uintptr_t)space + 2 * align - 1) & ~(align - 1);

	if (space == MAP_FAILED)
		return space;
	return mmap((void *)addr, size, prot, flags | MAP_FIXED, file, 0);
}

/* The file behind the mapping, -1 if there is none, goes to @file unless that is NULL. */
static void *map_backing(const struct backing *b, size_t size, int *file)
{
	size_t align = level_size(b->level > PMD ? PUD : PMD);
	int flags = b->share, fd = backing_file(b);
	void *addr;

	if (fd < 0)
		flags |= MAP_ANONYMOUS;
	if (b->kind != ANON && (fd < 0 || ftruncate(fd, size)))
		return MAP_FAILED;
	addr = map_aligned(size, align, PROT_READ | PROT_WRITE, flags, fd);
	if (addr != MAP_FAILED && b->kind != HUGETLB)
		madvise(addr, size, b->level || b->order ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	if (file)
		*file = fd;
	return addr;
}

#define test_mmap(b, npages)							\
({										\
	void *__addr = map_backing(b, (npages) * psize(), NULL);		\
										\
	ASSERT_NE(MAP_FAILED, __addr);						\
	__addr;									\
})

/* @due of @npages pages at @addr have any of @bits in /proc/self/pagemap. */
#define test_entries(addr, npages, bits, due)					\
({										\
	size_t __due = due;							\
										\
	ASSERT_EQ(__due, count_entries(self->pagemap, addr, npages, bits));	\
})

#define test_mprotect(addr, npages, prot)					\
	ASSERT_EQ(0, mprotect(addr, (npages) * psize(), prot))
#define test_munmap(addr, npages)						\
	ASSERT_EQ(0, munmap(addr, (npages) * psize()))
#define test_madvise(addr, npages, advice)					\
	ASSERT_EQ(0, madvise(addr, (npages) * psize(), advice))

/*
 * Forks
 */

/* As fork(), but the child goes on only when it is let go. */
static pid_t fork_held(int *hold)
{
	int ends[2];
	pid_t pid;
	char c;

	if (pipe(ends))
		return -1;
	pid = fork();
	if (pid) {
		close(ends[0]);
		*hold = ends[1];
		return pid;
	}
	close(ends[1]);
	if (read(ends[0], &c, 1))
		_exit(KSFT_FAIL);
	return 0;
}

/* Lets the child go, and tells whether it was content. */
static bool child_agrees(pid_t pid, int hold)
{
	int status;

	close(hold);
	return waitpid(pid, &status, 0) == pid && WIFEXITED(status) &&
	       WEXITSTATUS(status) == KSFT_PASS;
}

#define test_fork_held(hold)							\
({										\
	pid_t __pid = fork_held(hold);						\
										\
	ASSERT_GE(__pid, 0);							\
	__pid;									\
})

/* A child that does nothing but look, when all is done, whether it sees what @who wrote. */
static pid_t witness;
static int witness_hold;

#define test_fork_witness(addr, npages, who)					\
({										\
	witness = test_fork_held(&witness_hold);				\
	if (!witness)								\
		_exit(!cpu_sees(addr, npages, who));				\
})

#define test_witness_agrees()							\
	ASSERT_TRUE(child_agrees(witness, witness_hold))

/*
 * Devices
 */

enum { PRIVATE_ONE, PRIVATE_TWO, COHERENT_ONE, COHERENT_TWO };

static int open_device(int unit)
{
	char path[32];

	snprintf(path, sizeof(path), "/dev/hmm_dmirror%d", unit);
	return open(path, O_RDWR | O_CLOEXEC);
}

static bool make_mirror(size_t npages)
{
	mirror = mmap(NULL, npages * psize(), PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return mirror != MAP_FAILED;
}

/* The coherent devices are there only if the driver was given memory for them. */
static bool is_absent(int unit)
{
	char path[32];

	snprintf(path, sizeof(path), "/dev/hmm_dmirror%d", unit);
	return unit >= COHERENT_ONE && access(path, F_OK);
}

/* What a test has opened is closed, and looked at, after its last step. */
static struct {
	int fd, unit;
} opened[4];

static size_t nr_opened;

static int will_close(int fd, int unit)
{
	size_t i = 0;

	if (fd < 0)
		return fd;
	/* The test has closed the one that had this number before. */
	while (i < nr_opened && opened[i].fd != fd)
		i++;
	if (i == ARRAY_SIZE(opened))
		ksft_exit_fail_msg("too many devices\n");
	nr_opened += i == nr_opened;
	opened[i].fd = fd;
	opened[i].unit = unit;
	return fd;
}

#define test_open(unit)								\
({										\
	int __unit = unit, __fd = will_close(open_device(__unit), __unit);	\
										\
	ASSERT_GE(__fd, 0)							\
		TH_LOG("no test device: %s", strerror(errno));			\
	__fd;									\
})

/*
 * With all files closed, has the device its memory back? Not every device can tell,
 * and none can while somebody else uses it: one hmm-tests at a time, please.
 */
static bool has_all_back(int unit)
{
	int dev = open_device(unit);
	__u64 bytes = _test_stats(dev) ? 0 : inside.stats.device_bytes;

	close(dev);
	if (bytes)
		ksft_print_msg("device %d: %llu bytes not free\n", unit,
			       (unsigned long long)bytes);
	return !bytes;
}

/* The test may have closed some of them itself. */
static bool all_agree(void)
{
	bool good = true;

	for (size_t i = 0; i < nr_opened; i++)
		good &= fcntl(opened[i].fd, F_GETFD) < 0 || agrees(opened[i].fd);
	return good;
}

static bool all_closed(void)
{
	bool good = true;

	for (size_t i = 0; i < nr_opened; i++)
		close(opened[i].fd);
	for (size_t i = 0; i < nr_opened; i++)
		good &= has_all_back(opened[i].unit);
	return good;
}

/* After a test's last step. */
#define test_close()								\
({										\
	EXPECT_TRUE(all_agree());						\
	EXPECT_TRUE(all_closed());						\
})

#define test_open_pagemap()							\
({										\
	int __fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);		\
										\
	ASSERT_GE(__fd, 0);							\
	__fd;									\
})

/* What most fixtures begin with. */
#define test_setup(unit, npages)						\
({										\
	self->fd = test_open(unit);						\
	self->pagemap = test_open_pagemap();					\
	ASSERT_TRUE(make_mirror(npages));					\
})

/*
 * Huge pages
 */

/* Of the pages of two entries, and of their copies on write. */
#define HUGETLB_PAGES 6

/* Sees to it that @nr huge pages are free, if the kernel has that size. */
static bool hugetlb_grow(size_t size, size_t nr)
{
	unsigned long sizes[10];
	int n = detect_hugetlb_page_sizes(sizes, ARRAY_SIZE(sizes));
	size_t free;

	while (n-- && sizes[n] != size)
		;
	if (n < 0)
		return false;

	free = hugetlb_free_pages(size);
	if (free < nr)
		hugetlb_set_nr_pages(size, hugetlb_nr_pages(size) + nr - free);
	return hugetlb_free_pages(size) >= nr;
}

/* Once for all tests. */
static void huge_pages_setup(void)
{
	hugepage_save_settings(/* thp = */ true, /* hugetlb = */ true);
	if (!hugetlb_available())
		return;
	hugetlb_grow(level_size(PMD), HUGETLB_PAGES);
	if (hugetlb_grow(level_size(PUD), 1))
		gigantic = hugetlb_file(PUD);
}

static bool wants_thp(const struct backing *b)
{
	return b->kind != HUGETLB && (b->level || b->order);
}

static bool has_hugetlb(enum level level)
{
	return level == PUD ? gigantic >= 0 : hugetlb_grow(level_size(level), HUGETLB_PAGES);
}

static bool has_disk(void)
{
	int file = disk_file();

	return file >= 0 && !close(file);
}

/* What this machine lacks for a backing, or NULL. */
static const char *lacks(const struct backing *b)
{
	if (b->kind == HUGETLB && !has_hugetlb(b->level))
		return b->level == PUD ? "no free huge page of a PUD's size" :
					 "too few free huge pages of a PMD's size";
	if (b->kind == DISK && !has_disk())
		return "no file system that is not in memory alone: set TMPDIR";
	if (wants_thp(b) && !thp_available())
		return "no transparent huge pages in this kernel";
	return NULL;
}

/* Folios of @order, and of no other, for whoever asks by MADV_HUGEPAGE. */
static void thp_only(unsigned int order)
{
	struct thp_settings settings;

	thp_read_settings(&settings);
	settings.thp_enabled = THP_MADVISE;
	settings.thp_defrag = THP_DEFRAG_ALWAYS;
	settings.shmem_enabled = SHMEM_NEVER;
	settings.use_zero_page = true;
	/* What is in pieces stays so: khugepaged is slow, and not easily pleased. */
	settings.khugepaged = (struct khugepaged_settings) {
		.scan_sleep_millisecs = 60 * 60 * 1000,
		.pages_to_scan = 1,
	};
	for (unsigned int i = 0; i < NR_ORDERS; i++) {
		settings.hugepages[i].enabled = i == order ? THP_MADVISE : THP_NEVER;
		settings.shmem_hugepages[i].enabled = i == order ? SHMEM_ADVISE : SHMEM_NEVER;
	}
	thp_write_settings(&settings);
}

/*
 * What else tests change of the system
 */

#define NUMA_BALANCING	"/proc/sys/kernel/numa_balancing"
#define KSM_RUN		"/sys/kernel/mm/ksm/run"
#define KSM_ZERO_PAGES	"/sys/kernel/mm/ksm/use_zero_pages"

static struct setting {
	const char *path;
	unsigned long was;
	bool known;
} settings[] = { { NUMA_BALANCING }, { KSM_RUN }, { KSM_ZERO_PAGES } };

/* Page frames that tests have sacrificed. All processes share the list. */
#define MAX_BAD_PAGES	8

static struct {
	size_t n;
	unsigned long pfn[MAX_BAD_PAGES];
} *bad_pages;

static void put_back(void)
{
	for (size_t i = 0; i < ARRAY_SIZE(settings); i++)
		if (settings[i].known)
			write_num(settings[i].path, settings[i].was);
	while (bad_pages->n)
		unpoison_memory(bad_pages->pfn[--bad_pages->n]);
}

/* What was there before comes back when the last test has run, huge pages last. */
static void __attribute__((constructor)) system_setup(void)
{
	huge_pages_setup();
	bad_pages = mmap(NULL, psize(), PROT_READ | PROT_WRITE,
			 MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (bad_pages == MAP_FAILED)
		ksft_exit_fail_perror("no memory");
	for (struct setting *s = settings; s < settings + ARRAY_SIZE(settings); s++) {
		s->known = !access(s->path, W_OK);
		if (s->known)
			s->was = read_num(s->path);
	}
	atexit(put_back);
}

/*
 * What is true of memory whatever is behind it.
 */
FIXTURE(backing)
{
	int fd, pagemap, file;
	char *map;		/* the mapping */
	size_t size;		/* its size in bytes */
	size_t npages;		/* as many pages of it are worked on */
	size_t granule;		/* as many pages one fault brings */
	unsigned char size_bits; /* what a snapshot tells of a populated page's size */
};

FIXTURE_VARIANT(backing)
{
	struct backing b;
};

FIXTURE_VARIANT_ADD(backing, anon) { .b = B_ANON };
FIXTURE_VARIANT_ADD(backing, mthp) { .b = B_MTHP };
FIXTURE_VARIANT_ADD(backing, thp) { .b = B_THP };
FIXTURE_VARIANT_ADD(backing, shmem) { .b = B_SHMEM };
FIXTURE_VARIANT_ADD(backing, shmem_private) { .b = B_SHMEM_PRIVATE };
FIXTURE_VARIANT_ADD(backing, shmem_thp) { .b = B_SHMEM_THP };
FIXTURE_VARIANT_ADD(backing, file) { .b = B_FILE };
FIXTURE_VARIANT_ADD(backing, file_private) { .b = B_FILE_PRIVATE };
FIXTURE_VARIANT_ADD(backing, hugetlb_pmd) { .b = B_HUGETLB };
FIXTURE_VARIANT_ADD(backing, hugetlb_pmd_shared) { .b = B_HUGETLB_SHARED };
FIXTURE_VARIANT_ADD(backing, hugetlb_pud) { .b = B_HUGETLB_PUD };

FIXTURE_SETUP(backing)
{
	static const unsigned char size_bits[] = { 0, SEES_PMD, SEES_PUD };
	const struct backing *b = &variant->b;
	size_t leaf = level_size(b->level);

	if (lacks(b))
		SKIP(return, "%s", lacks(b));
	if (wants_thp(b))
		thp_only(b->order ? b->order : pmd_order());

	self->npages = b->level ? 2 * pages(pmd_size()) : NPAGES;
	self->size = b->level == PUD ? leaf : self->npages * psize();
	self->granule = b->level ? pages(leaf) : 1UL << b->order;
	self->size_bits = size_bits[b->level];
	test_setup(PRIVATE_ONE, self->npages);

	self->map = map_backing(b, self->size, &self->file);
	ASSERT_NE(MAP_FAILED, self->map);
	if (b->level == PUD) {
		/* Leave no trace of the test before, nor of this. */
		memset(self->map, 0, self->npages * psize());
		ASSERT_EQ(0, madvise(self->map, self->size, MADV_DONTNEED));
	}
}

FIXTURE_TEARDOWN(backing) { test_close(); }

TEST_F(backing, read)
{
	cpu_writes(self->map, self->npages, CPU);
	test_cmd_read(self->map, self->npages, CPU);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

TEST_F(backing, read_unlocked)
{
	cpu_writes(self->map, self->npages, CPU);
	test_cmd_read_unlocked(self->map, self->npages, CPU);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

TEST_F(backing, write)
{
	cpu_writes(self->map, self->npages, CPU);
	test_cmd_write(self->map, self->npages, DEVICE);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, DEVICE));
}

TEST_F(backing, read_untouched)
{
	test_cmd_read(self->map, self->npages, NOBODY);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, NOBODY));
}

TEST_F(backing, write_untouched)
{
	test_cmd_write(self->map, self->npages, DEVICE);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, DEVICE));
}

/* One page written is one fault: its neighbours stay as they were. */
TEST_F(backing, write_is_exact)
{
	size_t middle = self->npages / 2 + 3;
	size_t due = self->granule < self->npages ? self->granule : self->npages;

	test_cmd_write(at(self->map, middle), 1, DEVICE);
	test_entries(self->map, self->npages, PM_PRESENT, due);
	ASSERT_TRUE(cpu_sees(self->map, middle, NOBODY));
	ASSERT_TRUE(cpu_sees(at(self->map, middle), 1, DEVICE));
	ASSERT_TRUE(cpu_sees(at(self->map, middle + 1), self->npages - middle - 1, NOBODY));
}

TEST_F(backing, snapshot)
{
	cpu_writes(self->map, self->npages, CPU);
	test_cmd_snapshot(self->map, self->npages, SEES_WRITE | self->size_bits);
}

TEST_F(backing, snapshot_untouched)
{
	test_cmd_snapshot(self->map, self->npages, SEES_NONE);
	test_entries(self->map, self->npages, POPULATED, 0);
}

/* An entry's size is told whole, wherever in it the range begins and ends. */
TEST_F(backing, edges)
{
	size_t step = self->npages / 4 - 1;

	cpu_writes(self->map, self->npages, CPU);
	for (size_t begin = 1; begin < self->npages; begin += step) {
		for (size_t end = begin + 1; end < self->npages; end += step) {
			test_cmd_snapshot(at(self->map, begin), end - begin,
					  SEES_WRITE | self->size_bits);
			test_cmd_read(at(self->map, begin), end - begin, CPU);
		}
	}
}

TEST_F(backing, read_only)
{
	cpu_writes(self->map, self->npages, CPU);
	ASSERT_EQ(0, mprotect(self->map, self->size, PROT_READ));
	test_cmd_snapshot(self->map, self->npages, SEES_READ | self->size_bits);
	test_cmd_read(self->map, self->npages, CPU);
	test_err_write(EPERM, self->map, self->npages);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

TEST_F(backing, read_only_untouched)
{
	ASSERT_EQ(0, mprotect(self->map, self->size, PROT_READ));
	test_err_write(EPERM, self->map, self->npages);
	test_entries(self->map, self->npages, PM_PRESENT, 0);
	test_cmd_read(self->map, self->npages, NOBODY);
	test_err_write(EPERM, self->map, self->npages);
}

TEST_F(backing, no_access)
{
	cpu_writes(self->map, self->npages, CPU);
	ASSERT_EQ(0, mprotect(self->map, self->size, PROT_NONE));
	test_cmd_snapshot(self->map, self->npages, SEES_ERROR);
	test_err_access(EFAULT, self->map, self->npages);
}

/* The device asks HMM once, then uses its own page table. */
TEST_F(backing, remembered)
{
	cpu_writes(self->map, self->npages, CPU);
	test_cmd_write(self->map, self->npages, DEVICE);
	test_faults(1);
	cpu_writes(self->map, self->npages, CPU);
	test_cmd_read(self->map, self->npages, CPU);
	test_faults(0);
	test_cmd_write(self->map, self->npages, DEVICE);
	test_faults(0);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, DEVICE));
}

/*
 * Invalidation: the device had all of it mapped for writing, and has to see
 * what became of it.
 */

TEST_F(backing, unmapped)
{
	test_cmd_write(self->map, self->npages, DEVICE);
	ASSERT_EQ(0, munmap(self->map, self->size));
	test_cmd_snapshot(self->map, self->npages, SEES_ERROR);
	test_err_access(EFAULT, self->map, self->npages);
}

TEST_F(backing, replaced)
{
	test_cmd_write(self->map, self->npages, DEVICE);
	ASSERT_EQ(self->map, mmap(self->map, self->size, PROT_READ | PROT_WRITE,
				  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
	cpu_writes(self->map, self->npages, CPU);
	test_cmd_read(self->map, self->npages, CPU);
}

/* Not every file system can punch holes. */
static bool discard(void *map, size_t size, int file, int share)
{
	if (share == MAP_PRIVATE)
		return !madvise(map, size, MADV_DONTNEED);
	return !madvise(map, size, MADV_REMOVE) ||
	       (!ftruncate(file, 0) && !ftruncate(file, size));
}

TEST_F(backing, discarded)
{
	test_cmd_write(self->map, self->npages, DEVICE);
	ASSERT_TRUE(discard(self->map, self->size, self->file, variant->b.share));
	test_cmd_snapshot(self->map, self->npages, SEES_NONE);
	test_cmd_read(self->map, self->npages, NOBODY);
}

/* Without its entries, shared memory still has its content. */
TEST_F(backing, zapped)
{
	bool private = variant->b.share == MAP_PRIVATE;

	test_cmd_write(self->map, self->npages, DEVICE);
	ASSERT_EQ(0, madvise(self->map, self->size, MADV_DONTNEED));
	test_cmd_read(self->map, self->npages, private ? NOBODY : DEVICE);
	test_faults(1);
}

TEST_F(backing, moved)
{
	char *to = map_aligned(self->size, level_size(variant->b.level ?: PMD),
			       PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);

	ASSERT_NE(MAP_FAILED, to);
	test_cmd_write(self->map, self->npages, DEVICE);
	ASSERT_EQ(to, mremap(self->map, self->size, self->size,
			     MREMAP_MAYMOVE | MREMAP_FIXED, to));
	test_err_access(EFAULT, self->map, self->npages);
	ASSERT_EQ(0, _test_cmd_read(self->fd, to, self->npages));
	ASSERT_TRUE(holds(mirror, self->map, self->npages, DEVICE));
	test_cmd_snapshot(to, self->npages, SEES_WRITE | self->size_bits);
}

TEST_F(backing, write_protected)
{
	test_cmd_write(self->map, self->npages, DEVICE);
	ASSERT_EQ(0, mprotect(self->map, self->size, PROT_READ));
	test_err_write(EPERM, self->map, self->npages);
	test_cmd_read(self->map, self->npages, DEVICE);
	ASSERT_EQ(0, mprotect(self->map, self->size, PROT_READ | PROT_WRITE));
	test_cmd_write(self->map, self->npages, CHILD);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CHILD));
}

TEST_F(backing, access_taken)
{
	test_cmd_write(self->map, self->npages, DEVICE);
	ASSERT_EQ(0, mprotect(self->map, self->size, PROT_NONE));
	test_err_access(EFAULT, self->map, self->npages);
	ASSERT_EQ(0, mprotect(self->map, self->size, PROT_READ | PROT_WRITE));
	test_cmd_read(self->map, self->npages, DEVICE);
}

/* What the device writes after a fork reaches the child only if they share. */
TEST_F(backing, forked)
{
	bool private = variant->b.share == MAP_PRIVATE;

	cpu_writes(self->map, self->npages, CPU);
	test_cmd_write(self->map, self->npages, CPU);
	test_fork_witness(self->map, self->npages, private ? CPU : DEVICE);

	test_cmd_write(self->map, self->npages, DEVICE);
	test_faults(private);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, DEVICE));
	test_witness_agrees();
}

/* The same, with the child's device; it has a page table of its own. */
TEST_F(backing, written_by_child)
{
	bool private = variant->b.share == MAP_PRIVATE;
	pid_t pid;
	int hold;

	cpu_writes(self->map, self->npages, CPU);
	test_cmd_write(self->map, self->npages, CPU);
	pid = test_fork_held(&hold);
	if (!pid) {
		int dev = open_device(PRIVATE_ONE);

		_exit(_test_cmd_write(dev, self->map, self->npages, CHILD) ||
		      !cpu_sees(self->map, self->npages, CHILD));
	}

	ASSERT_TRUE(child_agrees(pid, hold));
	test_cmd_read(self->map, self->npages, private ? CPU : CHILD);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, private ? CPU : CHILD));
}

/*
 * Only a process's own memory moves to a device: not what is a file's, and not
 * huge pages from the pool.
 */
static int to_dev_error(const struct backing *b)
{
	int file_error = b->share == MAP_SHARED ? ENOENT : 0;

	return b->kind == HUGETLB ? EINVAL : file_error;
}

TEST_F(backing, to_dev)
{
	int due = to_dev_error(&variant->b);

	cpu_writes(self->map, self->npages, CPU);
	if (due)
		test_err_to_dev(due, self->map, self->npages);
	else
		test_cmd_to_dev(self->map, self->npages, CPU);
	test_cmd_read(self->map, self->npages, CPU);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

/* Nor does a device get for itself what is a file's. */
static int exclusive_error(const struct backing *b)
{
	return b->kind == HUGETLB || b->share == MAP_SHARED ? EOPNOTSUPP : 0;
}

TEST_F(backing, exclusive)
{
	int due = exclusive_error(&variant->b);

	cpu_writes(self->map, self->npages, CPU);
	if (due)
		test_err_exclusive(due, self->map, NPAGES);
	else
		test_cmd_exclusive(self->map, NPAGES, CPU);
	test_exclusive(self->map, NPAGES, due ? 0 : NPAGES);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

/* A device's write to a file's page that is mapped privately makes it the process's own. */
TEST_F(backing, exclusive_untouched)
{
	int due = exclusive_error(&variant->b);

	if (due)
		test_err_exclusive(due, self->map, NPAGES);
	else
		test_cmd_exclusive(self->map, NPAGES, NOBODY);
	test_exclusive(self->map, NPAGES, due ? 0 : NPAGES);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, NOBODY));
}

/*
 * Files: what the device writes is the file's, and what becomes of the file
 * the device sees.
 */
FIXTURE(file)
{
	int fd, pagemap, file;
	char *map;
};

FIXTURE_VARIANT(file)
{
	struct backing b;
};

FIXTURE_VARIANT_ADD(file, shmem) { .b = B_SHMEM };
FIXTURE_VARIANT_ADD(file, disk) { .b = B_FILE };

FIXTURE_SETUP(file)
{
	if (lacks(&variant->b))
		SKIP(return, "%s", lacks(&variant->b));
	test_setup(PRIVATE_ONE, NPAGES);
	self->map = map_backing(&variant->b, NPAGES * psize(), &self->file);
	ASSERT_NE(MAP_FAILED, self->map);
}

FIXTURE_TEARDOWN(file) { test_close(); }

TEST_F(file, written_through)
{
	test_cmd_write(self->map, NPAGES, DEVICE);
	ASSERT_TRUE(file_holds(self->file, self->map, NPAGES, DEVICE));
	ASSERT_EQ(0, fsync(self->file));
	test_cmd_write(self->map, NPAGES, CHILD);
	ASSERT_TRUE(file_holds(self->file, self->map, NPAGES, CHILD));
}

TEST_F(file, not_written_through_private)
{
	void *map = mmap(NULL, NPAGES * psize(), PROT_READ | PROT_WRITE,
			 MAP_PRIVATE, self->file, 0);

	ASSERT_NE(MAP_FAILED, map);
	cpu_touches(map, NPAGES);
	test_cmd_snapshot(map, NPAGES, SEES_READ);
	test_cmd_write(map, NPAGES, DEVICE);
	ASSERT_TRUE(cpu_sees(map, NPAGES, DEVICE));
	ASSERT_TRUE(file_holds(self->file, map, NPAGES, NOBODY));
}

TEST_F(file, truncated)
{
	size_t half = NPAGES / 2;

	test_cmd_write(self->map, NPAGES, DEVICE);
	ASSERT_EQ(0, ftruncate(self->file, half * psize()));
	test_cmd_snapshot(at(self->map, half), NPAGES - half, SEES_NONE);
	test_err_access(EFAULT, at(self->map, half), 1);
	test_err_access(EFAULT, self->map, NPAGES);
	test_cmd_read(self->map, half, DEVICE);
}

/* A page that the file wrote back is read-only, for the next write to be noticed. */
TEST_F(file, write_notified)
{
	unsigned char clean = variant->b.kind == DISK ? SEES_READ : SEES_WRITE;

	test_cmd_write(self->map, NPAGES, DEVICE);
	test_cmd_snapshot(self->map, NPAGES, SEES_WRITE);
	ASSERT_EQ(0, fsync(self->file));
	test_cmd_snapshot(self->map, NPAGES, clean);
	test_cmd_write(at(self->map, 7), 1, CHILD);
	test_faults(clean == SEES_READ);
	test_cmd_snapshot(at(self->map, 7), 1, SEES_WRITE);
	test_cmd_snapshot(at(self->map, 8), NPAGES - 8, clean);
}

/*
 * The kinds of page-table entry one by one, with a device of each type.
 */
FIXTURE(hmm)
{
	int fd, pagemap;
};

FIXTURE_VARIANT(hmm)
{
	int unit;
};

FIXTURE_VARIANT_ADD(hmm, private) { .unit = PRIVATE_ONE };
FIXTURE_VARIANT_ADD(hmm, coherent) { .unit = COHERENT_ONE };

FIXTURE_SETUP(hmm)
{
	if (is_absent(variant->unit))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	test_setup(variant->unit, NPAGES);
}

FIXTURE_TEARDOWN(hmm) { test_close(); }

/* A read request for a page leaves exactly that page populated. */
TEST_F(hmm, read_is_exact)
{
	char *map = test_mmap(&anon, NPAGES);

	for (size_t i = 0; i < NPAGES; i += 2)
		test_cmd_read(at(map, i), 1, NOBODY);
	for (size_t i = 0; i < NPAGES; i++)
		test_entries(at(map, i), 1, PM_PRESENT, !(i & 1));
}

/* A write request for a page leaves exactly that page writable. */
TEST_F(hmm, write_is_exact)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_touches(map, NPAGES);
	for (size_t i = 0; i < NPAGES; i += 2)
		test_cmd_write(at(map, i), 1, DEVICE);
	for (size_t i = 0; i < NPAGES; i++)
		test_cmd_snapshot(at(map, i), 1, i & 1 ? SEES_ZERO : SEES_WRITE);
}

TEST_F(hmm, zero_page)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_touches(map, NPAGES);
	test_cmd_snapshot(map, NPAGES, SEES_ZERO);
	test_cmd_read(map, NPAGES, NOBODY);
	test_cmd_snapshot(map, NPAGES, SEES_ZERO);
	test_cmd_write(map, 5, DEVICE);
	test_cmd_read(map, 5, DEVICE);
	test_cmd_read(at(map, 5), NPAGES - 5, NOBODY);
	ASSERT_TRUE(cpu_sees(at(map, 5), NPAGES - 5, NOBODY));
}

/* A device's read of untouched memory takes no memory. */
TEST_F(hmm, zero_page_by_device)
{
	char *map = test_mmap(&anon, NPAGES);

	test_cmd_read(map, NPAGES, NOBODY);
	test_cmd_snapshot(map, NPAGES, SEES_ZERO);
}

TEST_F(hmm, swapped_out)
{
	char *map = test_mmap(&anon, NPAGES);

	ASSERT_TRUE(stay_on_this_cpu());
	cpu_writes(map, NPAGES, CPU);
	if (!page_out(self->pagemap, map, NPAGES))
		SKIP(return, "no swap, or not enough of it");
	test_cmd_snapshot(map, NPAGES, SEES_NONE);
	test_entries(map, NPAGES, PM_SWAP, NPAGES);
	test_cmd_read(map, NPAGES, CPU);
	test_entries(map, NPAGES, PM_PRESENT, NPAGES);
}

TEST_F(hmm, swapped_out_then_written)
{
	char *map = test_mmap(&anon, NPAGES);

	ASSERT_TRUE(stay_on_this_cpu());
	cpu_writes(map, NPAGES, CPU);
	if (!page_out(self->pagemap, map, NPAGES))
		SKIP(return, "no swap, or not enough of it");
	test_cmd_write(at(map, 10), 1, DEVICE);
	ASSERT_TRUE(cpu_sees(map, 10, CPU));
	ASSERT_TRUE(cpu_sees(at(map, 10), 1, DEVICE));
	ASSERT_TRUE(cpu_sees(at(map, 11), NPAGES - 11, CPU));
}

/* The device had the pages mapped when they went. */
TEST_F(hmm, swapped_out_under_the_device)
{
	char *map = test_mmap(&anon, NPAGES);

	ASSERT_TRUE(stay_on_this_cpu());
	test_cmd_write(map, NPAGES, DEVICE);
	if (!page_out(self->pagemap, map, NPAGES))
		SKIP(return, "no swap, or not enough of it");
	test_cmd_read_unlocked(map, NPAGES, DEVICE);
	test_faults(1);
	cpu_writes(map, NPAGES, CPU);
	test_cmd_read(map, NPAGES, CPU);
}

/*
 * The process gave up what is in a page, and then the device wrote to it. That
 * is no less of a write than a CPU's: the page may not be dropped any more.
 */
TEST_F(hmm, freed_lazily_then_written)
{
	char *map = test_mmap(&anon, NPAGES);
	size_t half = NPAGES / 2;

	ASSERT_TRUE(stay_on_this_cpu());
	cpu_writes(map, NPAGES, CPU);
	test_madvise(map, NPAGES, MADV_FREE);
	test_cmd_write(map, half, DEVICE);
	page_out(self->pagemap, map, NPAGES);
	test_entries(at(map, half), NPAGES - half, POPULATED, 0);
	ASSERT_TRUE(cpu_sees(map, half, DEVICE));
}

/* Such a page's entry is writable and clean: that it is dirty only the device knows. */
TEST_F(hmm, swapped_out_after_write)
{
	char *map = test_mmap(&shmem, NPAGES);

	ASSERT_TRUE(stay_on_this_cpu());
	test_cmd_read(map, NPAGES, NOBODY);
	test_cmd_write(map, NPAGES, DEVICE);
	test_faults(0);
	if (!evict(self->pagemap, map, NPAGES))
		SKIP(return, "no swap, or not enough of it");
	ASSERT_TRUE(cpu_sees(map, NPAGES, DEVICE));
}

/* A parent that writes gets a copy; the device follows it there. */
TEST_F(hmm, copied_on_write)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_writes(map, NPAGES, CPU);
	test_cmd_read(map, NPAGES, CPU);
	test_fork_witness(map, NPAGES, CPU);

	test_cmd_snapshot(map, NPAGES, SEES_READ);
	cpu_writes(map, NPAGES, CHILD);
	test_cmd_read(map, NPAGES, CHILD);
	test_cmd_snapshot(map, NPAGES, SEES_WRITE);
	test_witness_agrees();
}

/* One page written breaks the sharing of one page. */
TEST_F(hmm, copy_on_write_is_exact)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_writes(map, NPAGES, CPU);
	test_fork_witness(map, NPAGES, CPU);

	test_cmd_write(at(map, 33), 1, DEVICE);
	test_cmd_snapshot(map, 33, SEES_READ);
	test_cmd_snapshot(at(map, 33), 1, SEES_WRITE);
	test_cmd_snapshot(at(map, 34), NPAGES - 34, SEES_READ);
	test_witness_agrees();
}

/* One page written is one page dirty, and a page read is not. */
TEST_F(hmm, dirtying_is_exact)
{
	char *map = test_mmap(&anon, NPAGES);

	if (!softdirty_supported())
		SKIP(return, "no soft-dirty bits in this kernel");
	test_cmd_write(map, NPAGES, DEVICE);
	test_entries(map, NPAGES, PM_SOFT_DIRTY, NPAGES);
	clear_softdirty();
	test_cmd_read(map, NPAGES, DEVICE);
	test_entries(map, NPAGES, PM_SOFT_DIRTY, 0);
	test_cmd_write(at(map, 33), 1, DEVICE);
	test_entries(map, NPAGES, PM_SOFT_DIRTY, 1);
	test_entries(at(map, 33), 1, PM_SOFT_DIRTY, 1);
}

/* Each kind of VMA in one range, as a snapshot tells it. */
TEST_F(hmm, several_vmas)
{
	static const unsigned char sights[] = {
		SEES_WRITE, SEES_READ, SEES_ERROR, SEES_ERROR, SEES_WRITE,
		SEES_ZERO, SEES_NONE, SEES_NONE, SEES_NONE, SEES_NONE,
	};
	char *map = test_mmap(&anon, NPAGES);

	cpu_writes(map, 50, CPU);
	test_mprotect(at(map, 10), 10, PROT_READ);
	test_munmap(at(map, 20), 10);
	test_mprotect(at(map, 30), 10, PROT_NONE);
	cpu_touches(at(map, 50), 10);
	test_mprotect(at(map, 70), 10, PROT_READ);

	ASSERT_EQ(0, _test_cmd_snapshot(self->fd, map, NPAGES));
	for (size_t i = 0; i < ARRAY_SIZE(sights); i++)
		EXPECT_TRUE(saw(10 * i, 10, sights[i]));
}

TEST_F(hmm, read_across_vmas)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_writes(map, NPAGES, CPU);
	for (size_t i = 0; i < NPAGES; i += 2)
		test_mprotect(at(map, i), 1, PROT_READ);
	test_cmd_read(map, NPAGES, CPU);
	test_cmd_read_unlocked(map, NPAGES, CPU);
}

TEST_F(hmm, write_across_vmas)
{
	char *map = test_mmap(&anon, NPAGES);
	int file = backing_file(&shmem);

	ASSERT_EQ(0, ftruncate(file, 30 * psize()));
	ASSERT_EQ(at(map, 30), mmap(at(map, 30), 30 * psize(), PROT_READ | PROT_WRITE,
				    MAP_SHARED | MAP_FIXED, file, 0));
	test_cmd_write(map, NPAGES, DEVICE);
	ASSERT_TRUE(cpu_sees(map, NPAGES, DEVICE));
	ASSERT_TRUE(file_holds(file, at(map, 30), 30, DEVICE));
}

/* Nothing is faulted in beyond the page that cannot be. */
TEST_F(hmm, hole_in_range)
{
	char *map = test_mmap(&anon, NPAGES);

	test_munmap(at(map, 40), 1);
	test_err_access(EFAULT, map, NPAGES);
	test_entries(at(map, 41), NPAGES - 41, PM_PRESENT, 0);
	test_cmd_write(map, 40, DEVICE);
	test_cmd_write(at(map, 41), NPAGES - 41, DEVICE);
	test_cmd_snapshot(at(map, 40), 1, SEES_ERROR);
}

TEST_F(hmm, range_past_the_last_vma)
{
	char *map = test_mmap(&anon, NPAGES);

	test_munmap(at(map, 60), NPAGES - 60);
	cpu_writes(map, 60, CPU);
	test_err_read(EFAULT, map, NPAGES);
	test_cmd_read(map, 60, CPU);
	test_err_access(EFAULT, map, NPAGES);
}

/* The device may not write where the process may not, and nowhere near it. */
TEST_F(hmm, read_only_page_in_range)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_writes(map, NPAGES, CPU);
	test_mprotect(at(map, 40), 1, PROT_READ);
	test_err_write(EPERM, map, NPAGES);
	ASSERT_TRUE(cpu_sees(at(map, 40), NPAGES - 40, CPU));
	test_err_write(EPERM, at(map, 40), 1);
	test_cmd_write(at(map, 41), NPAGES - 41, DEVICE);
}

/* Without VM_READ there is no access at all, whatever else is allowed. */
TEST_F(hmm, write_only)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_writes(map, NPAGES, CPU);
	test_mprotect(map, NPAGES, PROT_WRITE);
	test_cmd_snapshot(map, NPAGES, SEES_ERROR);
	test_err_access(EFAULT, map, NPAGES);
	test_mprotect(map, NPAGES, PROT_READ);
	test_cmd_read(map, NPAGES, CPU);
}

TEST_F(hmm, guard_region)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_writes(map, NPAGES, CPU);
	test_cmd_read(map, NPAGES, CPU);
	if (madvise(at(map, 40), 10 * psize(), MADV_GUARD_INSTALL))
		SKIP(return, "no guard regions in this kernel");
	test_cmd_snapshot(map, 40, SEES_WRITE);
	test_cmd_snapshot(at(map, 50), NPAGES - 50, SEES_WRITE);
	test_err_access(EFAULT, map, NPAGES);
	test_err_access(EFAULT, at(map, 49), 1);
	test_cmd_read(at(map, 50), NPAGES - 50, CPU);
	test_madvise(at(map, 40), 10, MADV_GUARD_REMOVE);
	test_cmd_read(at(map, 40), 10, NOBODY);
}

TEST_F(hmm, guard_region_snapshot)
{
	char *map = test_mmap(&anon, NPAGES);

	if (madvise(map, NPAGES * psize(), MADV_GUARD_INSTALL))
		SKIP(return, "no guard regions in this kernel");
	test_cmd_snapshot(map, NPAGES, SEES_ERROR);
	test_madvise(map, NPAGES, MADV_GUARD_REMOVE);
	test_cmd_snapshot(map, NPAGES, SEES_NONE);
}

TEST_F(hmm, guard_region_in_file)
{
	char *map = test_mmap(&shmem, NPAGES);

	cpu_writes(map, NPAGES, CPU);
	if (madvise(at(map, 40), 10 * psize(), MADV_GUARD_INSTALL))
		SKIP(return, "no guard regions of files in this kernel");
	test_err_read(EFAULT, map, NPAGES);
	test_err_access(EFAULT, at(map, 40), 10);
	test_cmd_snapshot(at(map, 40), 10, SEES_ERROR);
	test_madvise(at(map, 40), 10, MADV_GUARD_REMOVE);
	test_cmd_read(map, NPAGES, CPU);
}

/* What the driver itself maps: pages that are in no file's cache, in a VM_MIXEDMAP VMA. */
TEST_F(hmm, mixed_map_private)
{
	char *map = mmap(NULL, IO_PAGES * psize(), PROT_READ | PROT_WRITE,
			 MAP_PRIVATE, self->fd, 0);

	ASSERT_NE(MAP_FAILED, map);
	test_cmd_snapshot(map, IO_PAGES, SEES_READ);
	test_cmd_read(map, IO_PAGES, NOBODY);
	test_cmd_write(map, IO_PAGES, DEVICE);
	test_cmd_snapshot(map, IO_PAGES, SEES_WRITE);
	ASSERT_TRUE(cpu_sees(map, IO_PAGES, DEVICE));
}

TEST_F(hmm, mixed_map_shared)
{
	char *map = mmap(NULL, IO_PAGES * psize(), PROT_READ | PROT_WRITE,
			 MAP_SHARED, self->fd, 0);

	ASSERT_NE(MAP_FAILED, map);
	test_cmd_snapshot(map, IO_PAGES, SEES_WRITE);
	test_cmd_write(map, IO_PAGES, DEVICE);
	ASSERT_TRUE(cpu_sees(map, IO_PAGES, DEVICE));
	cpu_writes(map, IO_PAGES, CPU);
	test_cmd_read(map, IO_PAGES, CPU);
}

/* The driver offers so many pages and no others. */
TEST_F(hmm, mixed_map_bounds)
{
	size_t many = 1 << 20;

	errno = 0;
	EXPECT_EQ(MAP_FAILED, mmap(NULL, many * psize(), PROT_READ, MAP_SHARED, self->fd, 0));
	EXPECT_EQ(ENXIO, errno);
	errno = 0;
	EXPECT_EQ(MAP_FAILED, mmap(NULL, psize(), PROT_READ, MAP_SHARED, self->fd,
				   many * psize()));
	EXPECT_EQ(ENXIO, errno);
}

/* Something that /dev/mem lets be mapped. */
static void *map_physical_memory(void)
{
	int mem = open("/dev/mem", O_RDONLY | O_CLOEXEC);
	FILE *ranges = fopen("/proc/iomem", "r");
	void *map = MAP_FAILED;
	char line[128];

	while (map == MAP_FAILED && ranges && fgets(line, sizeof(line), ranges))
		map = mmap(NULL, psize(), PROT_READ, MAP_SHARED, mem,
			   strtoull(line, NULL, 16) & -(off_t)psize());
	if (ranges)
		fclose(ranges);
	if (mem >= 0)
		close(mem);
	return map;
}

/* Something that the kernel itself maps into every process, such as clocks. */
static void *find_pfn_map(void)
{
	FILE *maps = fopen("/proc/self/maps", "r");
	void *map = MAP_FAILED;
	char line[512];

	while (map == MAP_FAILED && maps && fgets(line, sizeof(line), maps)) {
		void *start = (void *)strtoul(line, NULL, 16);

		if (check_vmflag_pfnmap(start))
			map = start;
	}
	if (maps)
		fclose(maps);
	return map;
}

TEST_F(hmm, pfn_map)
{
	void *map = map_physical_memory();

	if (map == MAP_FAILED)
		map = find_pfn_map();
	if (map == MAP_FAILED)
		SKIP(return, "nothing that /dev/mem lets be mapped, and no VM_PFNMAP mapping");
	ASSERT_TRUE(check_vmflag_pfnmap(map));
	test_cmd_snapshot(map, 1, SEES_ERROR);
	test_err_access(EFAULT, map, 1);
}

/* The device of a process that is no more. */
static int device_of_the_dead(int unit)
{
	int ends[2], pidfd, theirs = -1, fd;
	pid_t pid;

	if (pipe(ends))
		return -1;
	pid = fork();
	if (!pid) {
		theirs = open_device(unit);
		if (write(ends[1], &theirs, sizeof(theirs)) == sizeof(theirs))
			pause();
		_exit(KSFT_FAIL);
	}
	if (read(ends[0], &theirs, sizeof(theirs)) != sizeof(theirs))
		return -1;
	pidfd = syscall(__NR_pidfd_open, pid, 0);
	fd = syscall(__NR_pidfd_getfd, pidfd, theirs, 0);
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	return fd;
}

TEST_F(hmm, process_gone)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_writes(map, NPAGES, CPU);
	close(self->fd);
	self->fd = will_close(device_of_the_dead(variant->unit), variant->unit);
	ASSERT_GE(self->fd, 0);
	test_err_access(EFAULT, map, NPAGES);
}

/*
 * Memory comes and goes while the device works on it. What it reads of a page
 * is that page as it once was, never anything else.
 */
static atomic_bool storm_over;

/*
 * Time for the device to get all pages in. Where that is not enough it gives up
 * with EBUSY, as it has every right to, and gets twice as much for the next try.
 */
static atomic_uint storm_pause;

static bool storm_goes_on(void)
{
	usleep(storm_pause);
	return !storm_over;
}

static bool storm_was_too_strong(int ret)
{
	if (!ret || errno != EBUSY || storm_pause > 1000000)
		return false;
	storm_pause *= 2;
	return true;
}

/* What a command returns once it has had the time to. */
#define in_storm(command)							\
({										\
	int __ret;								\
										\
	do {									\
		__ret = command;						\
	} while (storm_was_too_strong(__ret));					\
	__ret;									\
})

static bool storm_begins(pthread_t *thread, void *(*storm)(void *map), void *map,
			 unsigned int pause)
{
	storm_pause = pause;
	return !pthread_create(thread, NULL, storm, map);
}

static void *discard_storm(void *map)
{
	while (storm_goes_on())
		madvise(map, NPAGES * psize(), MADV_DONTNEED);
	return NULL;
}

static void *unmap_storm(void *map)
{
	while (storm_goes_on()) {
		munmap(map, NPAGES * psize());
		mmap(map, NPAGES * psize(), PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	}
	return NULL;
}

static bool pages_are_whole(char *map, size_t npages)
{
	for (size_t i = 0; i < npages; i++) {
		enum writer who = *(__u64 *)at(mirror, i) ? DEVICE : NOBODY;

		if (!holds(at(mirror, i), at(map, i), 1, who))
			return false;
	}
	return true;
}

TEST_F(hmm, discarded_meanwhile)
{
	char *map = test_mmap(&anon, NPAGES);
	pthread_t storm;

	ASSERT_TRUE(storm_begins(&storm, discard_storm, map, 10000));
	for (int i = 0; i < 20; i++) {
		ASSERT_EQ(0, in_storm(_test_cmd_write(self->fd, map, NPAGES, DEVICE)));
		ASSERT_EQ(0, in_storm(_test_cmd_read(self->fd, map, NPAGES)));
		ASSERT_TRUE(pages_are_whole(map, NPAGES));
		ASSERT_EQ(0, in_storm(_test_cmd_read_unlocked(self->fd, map, NPAGES)));
		ASSERT_TRUE(pages_are_whole(map, NPAGES));
	}
	storm_over = true;
	ASSERT_EQ(0, pthread_join(storm, NULL));
}

TEST_F(hmm, unmapped_meanwhile)
{
	char *map = test_mmap(&anon, NPAGES);
	pthread_t storm;
	int ret;

	ASSERT_TRUE(storm_begins(&storm, unmap_storm, map, 10000));
	for (int i = 0; i < 20; i++) {
		ret = in_storm(_test_cmd_write(self->fd, map, NPAGES, DEVICE));
		ASSERT_EQ(ret ? EFAULT : 0, ret ? errno : 0);
		ret = in_storm(_test_cmd_read(self->fd, map, NPAGES));
		ASSERT_EQ(ret ? EFAULT : 0, ret ? errno : 0);
		ASSERT_TRUE(ret || pages_are_whole(map, NPAGES));
	}
	storm_over = true;
	ASSERT_EQ(0, pthread_join(storm, NULL));
}

/*
 * What user space hands in wrong
 */

TEST_F(hmm, bad_range)
{
	char *map = test_mmap(&anon, NPAGES);
	void *last = (void *)-(uintptr_t)psize();

	test_err_range(EINVAL, map + 1, 1);
	test_err_range(EINVAL, map + psize() / 2, 1);
	test_err_range(EINVAL, map, 0);
	test_err_range(EINVAL, last, 1);
	test_err_range(EINVAL, last, 2);
	test_err_range(EINVAL, map, SIZE_MAX >> pshift());
	test_entries(map, NPAGES, POPULATED, 0);

	/* Nor where the device would find the page without asking HMM. */
	test_cmd_write(map, 2, DEVICE);
	test_err_range(EINVAL, map + 1, 1);
	ASSERT_TRUE(cpu_sees(map, 2, DEVICE));
}

/* So many pages that their size in bytes is none, or that of one; or just too many. */
TEST_F(hmm, too_many_pages)
{
	char *map = test_mmap(&anon, NPAGES);
	size_t none = SIZE_MAX / psize() + 1;

	test_err_range(EINVAL, map, none);
	test_err_range(EINVAL, map, none + 1);
	test_err_range(EINVAL, map, SIZE_MAX);
	test_err_range(E2BIG, map, none >> 12);
	test_entries(map, NPAGES, POPULATED, 0);
}

TEST_F(hmm, bad_buffer)
{
	char *map = test_mmap(&anon, NPAGES), *hole = test_mmap(&anon, 2);

	cpu_writes(map, NPAGES, CPU);
	test_munmap(at(hole, 1), 1);
	test_err_buffer(EFAULT, map, 1, at(hole, 1));
	test_err(EFAULT, _test_cmd(self->fd, HMM_DMIRROR_READ, map, 2, hole));
	test_err(EFAULT, _test_cmd(self->fd, HMM_DMIRROR_WRITE, map, 2, hole));
	test_mprotect(hole, 1, PROT_READ);
	test_err(EFAULT, _test_cmd(self->fd, HMM_DMIRROR_READ, map, 1, hole));
	test_err(EFAULT, _test_cmd(self->fd, HMM_DMIRROR_SNAPSHOT, map, 1, hole));
	test_cmd_read(at(map, 2), NPAGES - 2, CPU);
}

TEST_F(hmm, bad_command)
{
	static const unsigned long commands[] = {
		_IOWR('H', 0x7f, struct hmm_dmirror_cmd),
		_IOWR('I', 0x00, struct hmm_dmirror_cmd),
		_IOR('H', 0x00, struct hmm_dmirror_cmd),
		_IOWR('H', 0x00, __u64),
		_IO('H', 0x00),
	};
	char *map = test_mmap(&anon, 1);

	for (size_t i = 0; i < ARRAY_SIZE(commands); i++)
		test_err(ENOTTY, _test_cmd(self->fd, commands[i], map, 1, mirror));
}

TEST_F(hmm, bad_argument)
{
	test_err(EFAULT, ioctl(self->fd, HMM_DMIRROR_READ, NULL));
	test_err(EFAULT, ioctl(self->fd, HMM_DMIRROR_READ, -(uintptr_t)psize()));
	test_err(EINVAL, _test_cmd_flags(self->fd, ~HMM_DMIRROR_FLAG_FAIL_ALLOC));
}

/* What the device has done before it failed is told. */
TEST_F(hmm, failed_half_way)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_writes(map, NPAGES, CPU);
	test_cmd_read(map, 40, CPU);
	test_munmap(at(map, 40), 1);
	test_err_read(EFAULT, map, NPAGES);
	EXPECT_EQ(40ULL, answer.cpages);
	test_faults(1);
	ASSERT_TRUE(holds(mirror, map, 40, CPU));
}

/* The device forgets, the process does not. */
TEST_F(hmm, release)
{
	char *map = test_mmap(&anon, NPAGES);

	test_cmd_write(map, NPAGES, DEVICE);
	test_cmd_release();
	test_cmd_read(map, NPAGES, DEVICE);
	test_faults(1);
	ASSERT_TRUE(cpu_sees(map, NPAGES, DEVICE));
}

/*
 * Two devices of a kind mirror one process.
 */
FIXTURE(hmm2)
{
	int fd, other;
};

FIXTURE_VARIANT(hmm2)
{
	int unit, other;
};

FIXTURE_VARIANT_ADD(hmm2, private) { .unit = PRIVATE_ONE, .other = PRIVATE_TWO };
FIXTURE_VARIANT_ADD(hmm2, coherent) { .unit = COHERENT_ONE, .other = COHERENT_TWO };
FIXTURE_VARIANT_ADD(hmm2, twice) { .unit = PRIVATE_ONE, .other = PRIVATE_ONE };

FIXTURE_SETUP(hmm2)
{
	if (is_absent(variant->unit))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	self->fd = test_open(variant->unit);
	self->other = test_open(variant->other);
	ASSERT_TRUE(make_mirror(NPAGES));
}

FIXTURE_TEARDOWN(hmm2) { test_close(); }

#define test_other_reads(addr, npages, who)					\
	ASSERT_TRUE(reads(self->other, addr, npages, who))
#define test_other_writes(addr, npages, who)					\
	ASSERT_EQ(0, _test_cmd_write(self->other, addr, npages, who))

TEST_F(hmm2, share_memory)
{
	char *map = test_mmap(&anon, NPAGES);

	test_cmd_write(map, NPAGES, DEVICE);
	test_other_reads(map, NPAGES, DEVICE);
	test_other_writes(map, NPAGES, CHILD);
	test_cmd_read(map, NPAGES, CHILD);
	test_faults(0);
	ASSERT_TRUE(cpu_sees(map, NPAGES, CHILD));
}

TEST_F(hmm2, both_invalidated)
{
	char *map = test_mmap(&anon, NPAGES);

	test_cmd_write(map, NPAGES, DEVICE);
	test_other_writes(map, NPAGES, DEVICE);
	test_madvise(map, NPAGES, MADV_DONTNEED);
	test_cmd_read(map, NPAGES, NOBODY);
	test_other_reads(map, NPAGES, NOBODY);
}

/* One device's write takes the zero page away from under the other. */
TEST_F(hmm2, zero_page_replaced)
{
	char *map = test_mmap(&anon, NPAGES);

	test_other_reads(map, NPAGES, NOBODY);
	test_cmd_write(at(map, 3), 1, DEVICE);
	test_other_reads(map, 3, NOBODY);
	test_other_reads(at(map, 3), 1, DEVICE);
	test_other_reads(at(map, 4), NPAGES - 4, NOBODY);
}

/*
 * Transparent huge pages: what no other backing has.
 */
FIXTURE(thp)
{
	int fd, pagemap;
	char *map;		/* two huge pages */
	size_t npages;		/* in one of them */
};

FIXTURE_SETUP(thp)
{
	if (lacks(&thp))
		SKIP(return, "%s", lacks(&thp));
	thp_only(pmd_order());
	self->npages = pages(pmd_size());
	test_setup(PRIVATE_ONE, 2 * self->npages);
	self->map = test_mmap(&thp, 2 * self->npages);
}

FIXTURE_TEARDOWN(thp) { test_close(); }

TEST_F(thp, huge_zero_page)
{
	cpu_touches(self->map, 1);
	test_cmd_snapshot(self->map, self->npages, SEES_READ | SEES_PMD);
	test_cmd_read(self->map, self->npages, NOBODY);
	test_cmd_snapshot(self->map, self->npages, SEES_READ | SEES_PMD);
	test_cmd_snapshot(at(self->map, self->npages), self->npages, SEES_NONE);
}

TEST_F(thp, huge_zero_page_written)
{
	cpu_touches(self->map, 1);
	test_cmd_read(self->map, self->npages, NOBODY);
	test_cmd_write(at(self->map, 7), 1, DEVICE);
	test_cmd_read(self->map, 7, NOBODY);
	test_cmd_read(at(self->map, 7), 1, DEVICE);
	test_cmd_read(at(self->map, 8), self->npages - 8, NOBODY);
}

TEST_F(thp, split_by_mprotect)
{
	cpu_writes(self->map, self->npages, CPU);
	test_cmd_write(self->map, self->npages, DEVICE);
	test_cmd_snapshot(self->map, self->npages, SEES_WRITE | SEES_PMD);
	test_mprotect(at(self->map, 7), 1, PROT_READ);
	test_cmd_snapshot(self->map, 7, SEES_WRITE);
	test_cmd_snapshot(at(self->map, 7), 1, SEES_READ);
	test_cmd_snapshot(at(self->map, 8), self->npages - 8, SEES_WRITE);
	test_err_write(EPERM, self->map, self->npages);
	test_cmd_read(at(self->map, 7), self->npages - 7, DEVICE);
}

TEST_F(thp, split_by_munmap)
{
	test_cmd_write(self->map, 2 * self->npages, DEVICE);
	test_munmap(at(self->map, self->npages - 1), 1);
	test_cmd_snapshot(self->map, self->npages - 1, SEES_WRITE);
	test_cmd_snapshot(at(self->map, self->npages - 1), 1, SEES_ERROR);
	test_cmd_snapshot(at(self->map, self->npages), self->npages, SEES_WRITE | SEES_PMD);
	test_err_access(EFAULT, self->map, self->npages);
	test_cmd_read(self->map, self->npages - 1, DEVICE);
}

TEST_F(thp, collapsed)
{
	test_madvise(self->map, self->npages, MADV_NOHUGEPAGE);
	test_cmd_write(self->map, self->npages, DEVICE);
	test_cmd_snapshot(self->map, self->npages, SEES_WRITE);
	test_madvise(self->map, self->npages, MADV_HUGEPAGE);
	ASSERT_EQ(0, collapse(self->map, self->npages));
	test_cmd_snapshot(self->map, self->npages, SEES_WRITE | SEES_PMD);
	test_cmd_read(self->map, self->npages, DEVICE);
	test_faults(1);
}

TEST_F(thp, swapped_out)
{
	ASSERT_TRUE(stay_on_this_cpu());
	cpu_writes(self->map, self->npages, CPU);
	if (!page_out(self->pagemap, self->map, self->npages))
		SKIP(return, "no swap, or not enough of it");
	test_cmd_snapshot(self->map, self->npages, SEES_NONE);
	test_cmd_read(self->map, self->npages, CPU);
}

/* One range over an entry of each size, and none. */
TEST_F(thp, next_to_base_pages)
{
	size_t half = self->npages / 2;

	cpu_writes(self->map, self->npages, CPU);
	test_madvise(at(self->map, self->npages), self->npages, MADV_NOHUGEPAGE);
	cpu_writes(at(self->map, self->npages), half, CPU);
	ASSERT_EQ(0, _test_cmd_snapshot(self->fd, at(self->map, half), self->npages + 1));
	ASSERT_TRUE(saw(0, half, SEES_WRITE | SEES_PMD));
	ASSERT_TRUE(saw(half, half, SEES_WRITE));
	ASSERT_TRUE(saw(2 * half, 1, SEES_NONE));
	test_cmd_read(at(self->map, half), self->npages, CPU);
}

/* The device has one page of it for itself, the CPU all others. */
TEST_F(thp, exclusive_in_part)
{
	cpu_writes(self->map, self->npages, CPU);
	test_cmd_exclusive(at(self->map, 7), 1, CPU);
	test_exclusive(self->map, self->npages, 1);
	test_cmd_write(at(self->map, 7), 1, DEVICE);
	test_faults(0);
	test_cmd_snapshot(self->map, 7, SEES_WRITE);
	test_cmd_snapshot(at(self->map, 7), 1, SEES_NONE);
	test_cmd_snapshot(at(self->map, 8), self->npages - 8, SEES_WRITE);
	test_exclusive(self->map, self->npages, 1);
	ASSERT_TRUE(cpu_sees(self->map, 7, CPU));
	ASSERT_TRUE(cpu_sees(at(self->map, 7), 1, DEVICE));
	ASSERT_TRUE(cpu_sees(at(self->map, 8), self->npages - 8, CPU));
}

TEST_F(thp, exclusive)
{
	cpu_writes(self->map, 2 * self->npages, CPU);
	test_cmd_exclusive(self->map, 2 * self->npages, CPU);
	test_cmd_write(self->map, 2 * self->npages, DEVICE);
	test_faults(0);
	test_exclusive(self->map, 2 * self->npages, 2 * self->npages);
	ASSERT_TRUE(cpu_sees(self->map, 2 * self->npages, DEVICE));
	test_exclusive(self->map, 2 * self->npages, 0);
}

/*
 * userfaultfd: user space handles the faults, or forbids or fails them.
 */
FIXTURE(uffd)
{
	int fd, pagemap, uffd;
	char *map;
	size_t leaf;		/* pages that an entry maps */
	size_t npages;		/* in the mapping */
	size_t part;		/* a quarter of them */
	unsigned char size_bits;
};

FIXTURE_VARIANT(uffd)
{
	struct backing b;
};

FIXTURE_VARIANT_ADD(uffd, anon) { .b = B_ANON };
FIXTURE_VARIANT_ADD(uffd, shmem) { .b = B_SHMEM };
FIXTURE_VARIANT_ADD(uffd, hugetlb_pmd) { .b = B_HUGETLB_SHARED };

static int uffd_open(void)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_UNPOPULATED |
			    UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_MINOR_SHMEM |
			    UFFD_FEATURE_MINOR_HUGETLBFS | UFFD_FEATURE_POISON,
	};
	int uffd = syscall(__NR_userfaultfd, O_CLOEXEC);

	if (uffd < 0 || !ioctl(uffd, UFFDIO_API, &api))
		return uffd;
	close(uffd);
	return -1;
}

static const char *uffd_lacks(int uffd, const struct backing *b)
{
	if (uffd < 0)
		return "no userfaultfd with write protection, minor faults and poison";
	return lacks(b);
}

FIXTURE_SETUP(uffd)
{
	const struct backing *b = &variant->b;

	self->uffd = uffd_open();
	if (uffd_lacks(self->uffd, b))
		SKIP(return, "%s", uffd_lacks(self->uffd, b));
	self->leaf = pages(level_size(b->level));
	self->npages = b->level ? 4 * self->leaf : NPAGES;
	self->part = self->npages / 4;
	self->size_bits = b->level ? SEES_PMD : 0;
	test_setup(PRIVATE_ONE, self->npages);
	self->map = test_mmap(b, self->npages);
}

FIXTURE_TEARDOWN(uffd)
{
	close(self->uffd);
	test_close();
}

#define test_uffd_missing(addr, npages)						\
	ASSERT_EQ(0, uffd_register(self->uffd, addr, (npages) * psize(), true, false, false))
#define test_uffd_wp(addr, npages)						\
	ASSERT_EQ(0, uffd_register(self->uffd, addr, (npages) * psize(), false, true, false))
#define test_uffd_minor(addr, npages)						\
	ASSERT_EQ(0, uffd_register(self->uffd, addr, (npages) * psize(), false, false, true))

static int uffd_protect(int uffd, void *addr, size_t npages, bool on)
{
	struct uffdio_writeprotect wp = {
		.range = { (uintptr_t)addr, npages * psize() },
		.mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
	};

	return ioctl(uffd, UFFDIO_WRITEPROTECT, &wp);
}

static int uffd_poison(int uffd, void *addr, size_t npages)
{
	struct uffdio_poison poison = {
		.range = { (uintptr_t)addr, npages * psize() },
	};

	return ioctl(uffd, UFFDIO_POISON, &poison);
}

#define test_uffd_protect(addr, npages)						\
	ASSERT_EQ(0, uffd_protect(self->uffd, addr, npages, true))
#define test_uffd_unprotect(addr, npages)					\
	ASSERT_EQ(0, uffd_protect(self->uffd, addr, npages, false))

/* How many faults the thread below has served. */
static atomic_size_t served;

struct server {
	int uffd;
	size_t npages;
	void *data;
};

static int serve(struct server *server, const struct uffd_msg *msg)
{
	size_t size = server->npages * psize();
	uintptr_t addr = msg->arg.pagefault.address & ~(size - 1);
	struct uffdio_continue keep = { .range = { addr, size } };
	struct uffdio_copy copy = {
		.dst = addr,
		.src = (uintptr_t)server->data,
		.len = size,
	};

	served++;
	if (msg->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR)
		return ioctl(server->uffd, UFFDIO_CONTINUE, &keep);
	fill(server->data, (void *)addr, server->npages, UFFD);
	return ioctl(server->uffd, UFFDIO_COPY, &copy);
}

/* Until the test ends, and with it this process. */
static void *serve_all(void *arg)
{
	struct server *server = arg;
	struct uffd_msg msg;

	while (read(server->uffd, &msg, sizeof(msg)) == sizeof(msg))
		if (serve(server, &msg))
			break;
	return NULL;
}

static bool serve_faults(int uffd, size_t npages)
{
	static struct server server;
	pthread_t thread;

	server.uffd = uffd;
	server.npages = npages;
	server.data = malloc(npages * psize());
	return server.data && !pthread_create(&thread, NULL, serve_all, &server);
}

/* Serving a fault takes the mmap lock, which READ_UNLOCKED lets go. */
TEST_F(uffd, missing)
{
	size_t part = self->part;

	cpu_writes(at(self->map, part), part, CPU);
	test_uffd_missing(self->map, self->npages);
	ASSERT_TRUE(serve_faults(self->uffd, self->leaf));
	ASSERT_EQ(0, _test_cmd_read_unlocked(self->fd, self->map, self->npages));
	ASSERT_TRUE(holds(mirror, self->map, part, UFFD));
	ASSERT_TRUE(holds(at(mirror, part), at(self->map, part), part, CPU));
	ASSERT_TRUE(holds(at(mirror, 2 * part), at(self->map, 2 * part), 2 * part, UFFD));
	EXPECT_EQ(3 * part / self->leaf, served);
}

/* With the lock held nobody can serve the fault, and nobody is asked to. */
TEST_F(uffd, missing_with_lock_held)
{
	size_t part = self->part;

	cpu_writes(self->map, part, CPU);
	test_uffd_missing(self->map, self->npages);
	ASSERT_TRUE(serve_faults(self->uffd, self->leaf));
	test_cmd_snapshot(at(self->map, part), 3 * part, SEES_NONE);
	test_err_read(EFAULT, self->map, self->npages);
	test_err_write(EFAULT, at(self->map, part), 3 * part);
	EXPECT_EQ(0UL, served);
	test_entries(self->map, self->npages, POPULATED, part);
	test_cmd_read(self->map, part, CPU);
}

/* Who waits for a fault that nobody serves can still be killed. */
TEST_F(uffd, killed_in_fault)
{
	struct uffd_msg msg;
	int status;
	pid_t pid;

	test_uffd_missing(self->map, self->npages);
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid)
		_exit(!_test_cmd_read_unlocked(self->fd, self->map, self->npages));

	ASSERT_EQ(sizeof(msg), read(self->uffd, &msg, sizeof(msg)));
	ASSERT_EQ(0, kill(pid, SIGKILL));
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	ASSERT_TRUE(WIFSIGNALED(status));
	test_entries(self->map, self->npages, POPULATED, 0);
}

TEST_F(uffd, write_protected)
{
	size_t part = self->part;

	test_cmd_write(self->map, self->npages, CPU);
	test_uffd_wp(self->map, self->npages);
	test_uffd_protect(self->map, part);
	test_cmd_snapshot(self->map, part, SEES_READ | self->size_bits);
	test_cmd_snapshot(at(self->map, part), 3 * part, SEES_WRITE | self->size_bits);
	test_cmd_read(self->map, self->npages, CPU);
	test_err_write(EFAULT, at(self->map, part - 1), 1);
	test_cmd_write(at(self->map, part), 3 * part, DEVICE);
	ASSERT_TRUE(cpu_sees(self->map, part, CPU));
	test_uffd_unprotect(self->map, part);
	test_cmd_write(self->map, part, DEVICE);
}

/* Markers where nothing ever was. */
TEST_F(uffd, write_protect_untouched)
{
	unsigned char sight = variant->b.kind == ANON ? SEES_ZERO : SEES_READ;

	test_uffd_wp(self->map, self->npages);
	test_uffd_protect(self->map, self->npages);
	test_cmd_snapshot(self->map, self->npages, SEES_NONE);
	test_cmd_read(self->map, self->npages, NOBODY);
	test_cmd_snapshot(self->map, self->npages, sight | self->size_bits);
	test_err_write(EFAULT, self->map, self->npages);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, NOBODY));
}

TEST_F(uffd, poisoned)
{
	char *bad = at(self->map, self->part);

	cpu_writes(self->map, self->part, CPU);
	test_uffd_missing(self->map, self->npages);
	ASSERT_EQ(0, uffd_poison(self->uffd, bad, 3 * self->part));
	test_err_read(EFAULT, self->map, self->npages);
	test_err_access(EFAULT, bad, 1);
	test_cmd_read(self->map, self->part, CPU);
	test_cmd_snapshot(self->map, self->part, SEES_WRITE | self->size_bits);
	test_cmd_snapshot(bad, 3 * self->part, SEES_ERROR);
}

/*
 * The same where there is a file, which has what the page table has not.
 */
FIXTURE(uffd_file)
{
	int fd, pagemap, uffd;
	char *map;
	size_t leaf;		/* pages that an entry maps */
	size_t npages;		/* in the mapping */
	unsigned char size_bits;
};

FIXTURE_VARIANT(uffd_file)
{
	struct backing b;
};

FIXTURE_VARIANT_ADD(uffd_file, shmem) { .b = B_SHMEM };
FIXTURE_VARIANT_ADD(uffd_file, hugetlb_pmd) { .b = B_HUGETLB_SHARED };

FIXTURE_SETUP(uffd_file)
{
	const struct backing *b = &variant->b;

	self->uffd = uffd_open();
	if (uffd_lacks(self->uffd, b))
		SKIP(return, "%s", uffd_lacks(self->uffd, b));
	self->leaf = pages(level_size(b->level));
	self->npages = b->level ? 2 * self->leaf : NPAGES;
	self->size_bits = b->level ? SEES_PMD : 0;
	test_setup(PRIVATE_ONE, self->npages);
	self->map = test_mmap(b, self->npages);
}

FIXTURE_TEARDOWN(uffd_file)
{
	close(self->uffd);
	test_close();
}

/* The page is in the file but not in the page table. */
TEST_F(uffd_file, minor)
{
	cpu_writes(self->map, self->npages, CPU);
	test_madvise(self->map, self->npages, MADV_DONTNEED);
	test_uffd_minor(self->map, self->npages);
	ASSERT_TRUE(serve_faults(self->uffd, self->leaf));
	test_cmd_snapshot(self->map, self->npages, SEES_NONE);
	test_err_read(EFAULT, self->map, self->npages);
	test_cmd_read_unlocked(self->map, self->npages, CPU);
	EXPECT_EQ(self->npages / self->leaf, served);
}

/* A file's pages leave a marker behind when they go, and are still protected. */
TEST_F(uffd_file, write_protect_marker)
{
	test_cmd_write(self->map, self->npages, CPU);
	test_uffd_wp(self->map, self->npages);
	test_uffd_protect(self->map, self->npages);
	test_madvise(self->map, self->npages, MADV_DONTNEED);
	test_entries(self->map, self->npages, PM_UFFD_WP, self->npages);
	test_cmd_snapshot(self->map, self->npages, SEES_NONE);
	test_err_write(EFAULT, self->map, 1);
	test_cmd_read(self->map, self->npages, CPU);
	test_cmd_snapshot(self->map, self->npages, SEES_READ | self->size_bits);
	test_err_write(EFAULT, self->map, 1);
	test_uffd_unprotect(self->map, self->npages);
	test_cmd_write(self->map, self->npages, DEVICE);
}

/*
 * Pages that have gone bad
 */
FIXTURE(hwpoison)
{
	int fd, pagemap;
};

FIXTURE_VARIANT(hwpoison)
{
	struct backing b;
};

FIXTURE_VARIANT_ADD(hwpoison, anon) { .b = B_ANON };
FIXTURE_VARIANT_ADD(hwpoison, shmem) { .b = B_SHMEM };
FIXTURE_VARIANT_ADD(hwpoison, hugetlb_pmd) { .b = B_HUGETLB };

FIXTURE_SETUP(hwpoison)
{
	if (access("/sys/kernel/debug/hwpoison/unpoison-pfn", W_OK))
		SKIP(return, "no hwpoison_inject, or no debugfs, to make the page good again");
	if (lacks(&variant->b))
		SKIP(return, "%s", lacks(&variant->b));
	test_setup(PRIVATE_ONE, 3 * pages(pmd_size()));
}

FIXTURE_TEARDOWN(hwpoison) { test_close(); }

static void ignore(int sig)
{
}

/* The process is told by a signal, which would end it if it were just ignored. */
static int poison(int pagemap, void *addr)
{
	int ret;

	if (bad_pages->n == MAX_BAD_PAGES)
		return -1;
	bad_pages->pfn[bad_pages->n++] = pagemap_get_pfn(pagemap, addr);
	signal(SIGBUS, ignore);
	ret = madvise(addr, psize(), MADV_HWPOISON);
	signal(SIGBUS, SIG_DFL);
	return ret;
}

/* The middle one of three entries goes bad, with the device having all mapped. */
TEST_F(hwpoison, poisoned)
{
	size_t leaf = pages(level_size(variant->b.level));
	char *map = test_mmap(&variant->b, 3 * leaf), *bad = at(map, leaf);
	unsigned char size_bits = variant->b.level ? SEES_PMD : 0;

	test_cmd_write(map, 3 * leaf, DEVICE);
	ASSERT_EQ(0, poison(self->pagemap, bad));
	test_err_access(EFAULT, map, 3 * leaf);
	test_err_access(EFAULT, at(bad, leaf - 1), 1);
	test_cmd_read(map, leaf, DEVICE);
	test_cmd_read(at(bad, leaf), leaf, DEVICE);
	test_cmd_snapshot(map, leaf, SEES_WRITE | size_bits);
	test_cmd_snapshot(bad, leaf, SEES_ERROR);
}

/*
 * No access for NUMA hinting: the scheduler takes access away, to see who
 * comes for it.
 */
FIXTURE(numa)
{
	int fd, pagemap;
};

FIXTURE_VARIANT(numa)
{
	struct backing b;
};

FIXTURE_VARIANT_ADD(numa, anon) { .b = B_ANON };
FIXTURE_VARIANT_ADD(numa, thp) { .b = B_THP };

FIXTURE_SETUP(numa)
{
	if (access(NUMA_BALANCING, W_OK))
		SKIP(return, "no NUMA balancing in this kernel");
	if (access("/sys/devices/system/node/node1", F_OK))
		SKIP(return, "only one NUMA node");
	if (lacks(&variant->b))
		SKIP(return, "%s", lacks(&variant->b));
	if (variant->b.level)
		thp_only(pmd_order());
	test_setup(PRIVATE_ONE, pages(pmd_size()));
	write_num(NUMA_BALANCING, 1);
}

FIXTURE_TEARDOWN(numa)
{
	write_num(NUMA_BALANCING, 0);
	test_close();
}

/* Memory of a process with one thread stays as it is if it is on the node. */
static void *idle(void *arg)
{
	pause();
	return arg;
}

/* The scan takes its turn when the process has had some time on the CPU. */
static void spin(unsigned int ms)
{
	clock_t end = clock() + ms * (CLOCKS_PER_SEC / 1000);

	while (clock() < end)
		;
}

TEST_F(numa, hinted)
{
	size_t npages = variant->b.level ? pages(pmd_size()) : NPAGES;
	char *map = test_mmap(&variant->b, npages);
	pthread_t thread;
	int tries = 0;

	ASSERT_EQ(0, pthread_create(&thread, NULL, idle, NULL));
	cpu_writes(map, npages, CPU);
	test_cmd_read(map, npages, CPU);
	do {
		spin(10);
		ASSERT_EQ(0, _test_cmd_snapshot(self->fd, map, npages));
	} while (mirror[0] != SEES_NONE && ++tries < 500);
	ASSERT_TRUE(saw(0, npages, SEES_NONE));
	test_entries(map, npages, PM_PRESENT, npages);
	test_cmd_read(map, npages, CPU);
	test_cmd_write(map, npages, DEVICE);
	ASSERT_TRUE(cpu_sees(map, npages, DEVICE));
}

/*
 * Pages merged for having the same content
 */
FIXTURE(ksm)
{
	int fd;
};

FIXTURE_SETUP(ksm)
{
	if (access(KSM_RUN, W_OK))
		SKIP(return, "no KSM in this kernel");
	self->fd = test_open(PRIVATE_ONE);
	ASSERT_TRUE(make_mirror(NPAGES));
}

FIXTURE_TEARDOWN(ksm)
{
	test_close();
	ksm_stop();
}

/* A device's write to a merged page reaches none of the others. */
TEST_F(ksm, merged)
{
	char *map = test_mmap(&anon, NPAGES);

	for (size_t i = 0; i < NPAGES; i++)
		fill(at(map, i), map, 1, CPU);
	test_cmd_write(map, 1, CPU);
	test_madvise(map, NPAGES, MADV_MERGEABLE);
	ASSERT_EQ(0, ksm_start());
	ASSERT_EQ((long)NPAGES, ksm_get_self_merging_pages());
	test_cmd_snapshot(map, NPAGES, SEES_READ);
	test_cmd_write(map, 1, DEVICE);
	test_cmd_snapshot(map, 1, SEES_WRITE);
	test_cmd_snapshot(at(map, 1), NPAGES - 1, SEES_READ);
	for (size_t i = 1; i < NPAGES; i++)
		ASSERT_TRUE(holds(at(map, i), map, 1, CPU));
}

/*
 * Device memory. A device has memory of one kind: private, which the CPU cannot
 * access, so that a page that it touches comes back; or coherent, which the CPU
 * uses like any. A huge page moves to private memory and back in one piece.
 */

static bool is_coherent(int unit)
{
	return unit >= COHERENT_ONE;
}

/* What a snapshot tells of a writable page in the device's own memory. */
static unsigned char local_memory(int unit)
{
	return SEES_WRITE | (is_coherent(unit) ? HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL :
						 HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL);
}

/* And what another device's snapshot tells of it, without asking for it. */
static unsigned char remote_memory(int unit)
{
	return is_coherent(unit) ? SEES_WRITE | HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE :
				   SEES_NONE;
}

static unsigned char read_only(unsigned char sight)
{
	return (sight & ~SEES_WRITE) | SEES_READ;
}

static unsigned char size_at_device(int unit, const struct backing *b)
{
	return b->level == PMD && !is_coherent(unit) ? SEES_PMD : 0;
}

/*
 * What is true of memory that moves, whatever it was and wherever it goes.
 */
FIXTURE(migration)
{
	int fd, pagemap, file;
	char *map;
	size_t size, npages;
	size_t granule;		/* as many pages the CPU has when it has touched one */
	/* What a snapshot tells of a page: */
	unsigned char here;	/* at the device */
	unsigned char lone;	/* at the device, without its neighbours */
	unsigned char back;	/* that has come back */
	unsigned char touched;	/* that the CPU touched at the device */
};

FIXTURE_VARIANT(migration)
{
	int unit;
	struct backing b;
};

FIXTURE_VARIANT_ADD(migration, private_anon) { .unit = PRIVATE_ONE, .b = B_ANON };
FIXTURE_VARIANT_ADD(migration, private_mthp) { .unit = PRIVATE_ONE, .b = B_MTHP };
FIXTURE_VARIANT_ADD(migration, private_thp) { .unit = PRIVATE_ONE, .b = B_THP };
FIXTURE_VARIANT_ADD(migration, private_file) { .unit = PRIVATE_ONE, .b = B_FILE_PRIVATE };
FIXTURE_VARIANT_ADD(migration, coherent_anon) { .unit = COHERENT_ONE, .b = B_ANON };
FIXTURE_VARIANT_ADD(migration, coherent_mthp) { .unit = COHERENT_ONE, .b = B_MTHP };
FIXTURE_VARIANT_ADD(migration, coherent_thp) { .unit = COHERENT_ONE, .b = B_THP };
FIXTURE_VARIANT_ADD(migration, coherent_file) { .unit = COHERENT_ONE, .b = B_FILE_PRIVATE };

FIXTURE_SETUP(migration)
{
	const struct backing *b = &variant->b;
	bool coherent = is_coherent(variant->unit);

	if (is_absent(variant->unit))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	if (lacks(b))
		SKIP(return, "%s", lacks(b));
	if (wants_thp(b))
		thp_only(b->order ? b->order : pmd_order());

	self->npages = b->level ? 2 * pages(pmd_size()) : NPAGES;
	self->size = self->npages * psize();
	self->granule = coherent ? self->npages : pages(level_size(b->level));
	self->lone = local_memory(variant->unit);
	self->here = self->lone | size_at_device(variant->unit, b);
	self->back = SEES_WRITE | size_at_device(variant->unit, b);
	self->touched = coherent ? self->here : self->back;
	test_setup(variant->unit, self->npages);

	self->map = map_backing(b, self->size, &self->file);
	ASSERT_NE(MAP_FAILED, self->map);
	cpu_writes(self->map, self->npages, CPU);
}

FIXTURE_TEARDOWN(migration) { test_close(); }

TEST_F(migration, to_dev)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_faults(0);
	test_cmd_snapshot(self->map, self->npages, self->here);
}

TEST_F(migration, to_dev_again)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_faults(0);
	test_cmd_snapshot(self->map, self->npages, self->here);
}

TEST_F(migration, to_sys)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_cmd_to_sys(self->map, self->npages, self->npages);
	test_entries(self->map, self->npages, PM_PRESENT, self->npages);
	test_cmd_snapshot(self->map, self->npages, self->back);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

TEST_F(migration, to_sys_for_nothing)
{
	test_cmd_to_sys(self->map, self->npages, 0);
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_cmd_to_sys(self->map, self->npages, self->npages);
	test_cmd_to_sys(self->map, self->npages, 0);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

TEST_F(migration, to_and_fro)
{
	for (int i = 0; i < 5; i++) {
		test_cmd_to_dev(self->map, self->npages, CPU);
		test_cmd_write(self->map, self->npages, DEVICE);
		test_cmd_to_sys(self->map, self->npages, self->npages);
		ASSERT_TRUE(cpu_sees(self->map, self->npages, DEVICE));
		cpu_writes(self->map, self->npages, CPU);
	}
}

TEST_F(migration, read_by_device)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_cmd_read(self->map, self->npages, CPU);
	test_faults(0);
	test_cmd_read_unlocked(self->map, self->npages, CPU);
	test_cmd_snapshot(self->map, self->npages, self->here);
}

TEST_F(migration, written_by_device)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_cmd_write(self->map, self->npages, DEVICE);
	test_faults(0);
	test_cmd_snapshot(self->map, self->npages, self->here);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, DEVICE));
}

TEST_F(migration, read_by_cpu)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
	test_cmd_snapshot(self->map, self->npages, self->touched);
	test_cmd_read(self->map, self->npages, CPU);
}

TEST_F(migration, written_by_cpu)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	cpu_writes(self->map, self->npages, CHILD);
	test_cmd_snapshot(self->map, self->npages, self->touched);
	test_cmd_read(self->map, self->npages, CHILD);
	test_cmd_to_dev(self->map, self->npages, CHILD);
}

/* The CPU gets back what the entry maps that it came across, and no more. */
TEST_F(migration, one_page_touched)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	cpu_touches(at(self->map, 7), 1);
	test_entries(self->map, self->npages, PM_PRESENT, self->granule);
	test_entries(self->map, self->npages, POPULATED, self->npages);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

/* The kernel accesses memory for the process, too. */
TEST_F(migration, touched_by_kernel)
{
	int mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC);

	ASSERT_GE(mem, 0);
	test_cmd_to_dev(self->map, self->npages, CPU);
	ASSERT_TRUE(file_holds_at(mem, (uintptr_t)self->map, self->map, self->npages, CPU));
	test_cmd_to_dev(self->map, self->npages, CPU);
	fill(mirror, self->map, self->npages, CHILD);
	ASSERT_EQ((ssize_t)self->size,
		  pwrite(mem, mirror, self->size, (uintptr_t)self->map));
	test_cmd_read(self->map, self->npages, CHILD);
}

/* A range that begins and ends amid what belongs together. */
TEST_F(migration, part_to_dev)
{
	size_t begin = self->npages / 4 + 1, n = self->npages / 2, end = begin + n;

	test_cmd_to_dev(at(self->map, begin), n, CPU);
	test_cmd_snapshot(self->map, begin, SEES_WRITE);
	test_cmd_snapshot(at(self->map, begin), n, self->lone);
	test_cmd_snapshot(at(self->map, end), self->npages - end, SEES_WRITE);
	test_cmd_read(self->map, self->npages, CPU);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

TEST_F(migration, part_to_sys)
{
	size_t begin = self->npages / 4 + 1, n = self->npages / 2, end = begin + n;

	test_cmd_to_dev(self->map, self->npages, CPU);
	test_cmd_to_sys(at(self->map, begin), n, n);
	test_cmd_snapshot(self->map, begin, self->lone);
	test_cmd_snapshot(at(self->map, begin), n, SEES_WRITE);
	test_cmd_snapshot(at(self->map, end), self->npages - end, self->lone);
	test_cmd_read(self->map, self->npages, CPU);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

/* One page here, the next ones there, and all of it a single range. */
TEST_F(migration, here_and_there)
{
	for (size_t i = 0; i < self->npages; i += 7)
		test_cmd_to_dev(at(self->map, i), 1, CPU);
	test_cmd_read(self->map, self->npages, CPU);
	test_cmd_write(self->map, self->npages, DEVICE);
	test_cmd_to_dev(self->map, self->npages, DEVICE);
	test_cmd_snapshot(self->map, self->npages, self->lone);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, DEVICE));
}

TEST_F(migration, release)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_cmd_release();
	test_entries(self->map, self->npages, PM_PRESENT, self->npages);
	test_cmd_snapshot(self->map, self->npages, self->back);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

TEST_F(migration, close)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_cmd_write(self->map, self->npages, DEVICE);
	ASSERT_EQ(0, close(self->fd));
	test_entries(self->map, self->npages, PM_PRESENT, self->npages);
	self->fd = test_open(variant->unit);
	test_cmd_snapshot(self->map, self->npages, self->back);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, DEVICE));
}

/* What may not be written moves, and may still not be written. */
TEST_F(migration, read_only)
{
	test_mprotect(self->map, self->npages, PROT_READ);
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_cmd_snapshot(self->map, self->npages, read_only(self->here));
	test_err_write(EPERM, self->map, self->npages);
	test_cmd_to_sys(self->map, self->npages, self->npages);
	test_cmd_snapshot(self->map, self->npages, read_only(self->back));
	test_err_write(EPERM, self->map, self->npages);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

TEST_F(migration, made_read_only)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_mprotect(self->map, self->npages, PROT_READ);
	test_cmd_snapshot(self->map, self->npages, read_only(self->here));
	test_err_write(EPERM, self->map, self->npages);
	test_cmd_read(self->map, self->npages, CPU);
	test_mprotect(self->map, self->npages, PROT_READ | PROT_WRITE);
	test_cmd_write(self->map, self->npages, DEVICE);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, DEVICE));
}

TEST_F(migration, made_read_only_in_part)
{
	size_t begin = self->npages / 4 + 1, n = self->npages / 2, end = begin + n;

	test_cmd_to_dev(self->map, self->npages, CPU);
	test_mprotect(at(self->map, begin), n, PROT_READ);
	test_cmd_snapshot(self->map, begin, self->lone);
	test_cmd_snapshot(at(self->map, begin), n, read_only(self->lone));
	test_cmd_snapshot(at(self->map, end), self->npages - end, self->lone);
	test_err_write(EPERM, at(self->map, begin), n);
	test_cmd_write(at(self->map, end), self->npages - end, DEVICE);
	ASSERT_TRUE(cpu_sees(self->map, end, CPU));
	ASSERT_TRUE(cpu_sees(at(self->map, end), self->npages - end, DEVICE));
}

TEST_F(migration, access_taken)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_mprotect(self->map, self->npages, PROT_NONE);
	test_cmd_snapshot(self->map, self->npages, SEES_ERROR);
	test_err_access(EFAULT, self->map, self->npages);
	test_err_to_sys(EINVAL, self->map, self->npages);
	test_err_to_dev(EINVAL, self->map, self->npages);
	test_mprotect(self->map, self->npages, PROT_READ | PROT_WRITE);
	test_cmd_read(self->map, self->npages, CPU);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

TEST_F(migration, unmapped)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_munmap(self->map, self->npages);
	test_cmd_snapshot(self->map, self->npages, SEES_ERROR);
	test_err_access(EFAULT, self->map, self->npages);
	test_err_to_sys(EINVAL, self->map, self->npages);
}

TEST_F(migration, replaced)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	ASSERT_EQ(self->map, mmap(self->map, self->size, PROT_READ | PROT_WRITE,
				  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
	test_cmd_read(self->map, self->npages, NOBODY);
	test_cmd_to_dev(self->map, self->npages, NOBODY);
}

TEST_F(migration, discarded)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_madvise(self->map, self->npages, MADV_DONTNEED);
	test_cmd_snapshot(self->map, self->npages, SEES_NONE);
	test_cmd_read(self->map, self->npages, NOBODY);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, NOBODY));
}

/* Parts that do not fit: the head, the tail, and something in between. */
#define NPARTS 3

struct part {
	size_t begin, npages, end;
};

static struct part part_of(size_t whole, int which)
{
	size_t begins[NPARTS] = { 0, whole / 4 - 1, whole - 3 };
	size_t sizes[NPARTS] = { 1, whole / 3, 3 };

	return (struct part) {
		.begin = begins[which],
		.npages = sizes[which],
		.end = begins[which] + sizes[which],
	};
}

TEST_F(migration, unmapped_in_part)
{
	for (int i = 0; i < NPARTS; i++) {
		struct part part = part_of(self->npages, i);
		char *map = test_mmap(&variant->b, self->npages);
		char *hole = at(map, part.begin), *rest = at(map, part.end);

		cpu_writes(map, self->npages, CPU);
		test_cmd_to_dev(map, self->npages, CPU);
		test_munmap(hole, part.npages);
		test_err_access(EFAULT, hole, part.npages);
		ASSERT_TRUE(!part.begin || reads(self->fd, map, part.begin, CPU));
		ASSERT_TRUE(cpu_sees(map, part.begin, CPU));
		ASSERT_TRUE(cpu_sees(rest, self->npages - part.end, CPU));
	}
}

TEST_F(migration, discarded_in_part)
{
	for (int i = 0; i < NPARTS; i++) {
		struct part part = part_of(self->npages, i);
		char *map = test_mmap(&variant->b, self->npages);
		char *hole = at(map, part.begin), *rest = at(map, part.end);

		cpu_writes(map, self->npages, CPU);
		test_cmd_to_dev(map, self->npages, CPU);
		test_madvise(hole, part.npages, MADV_DONTNEED);
		test_cmd_snapshot(hole, part.npages, SEES_NONE);
		test_cmd_read(hole, part.npages, NOBODY);
		ASSERT_TRUE(cpu_sees(map, part.begin, CPU));
		ASSERT_TRUE(cpu_sees(rest, self->npages - part.end, CPU));
	}
}

/* A place of @size bytes to move to, @offset pages from where a huge page could be. */
static void *another_place(size_t size, size_t offset)
{
	char *place = map_aligned(size + offset * psize(), pmd_size(), PROT_NONE,
				  MAP_PRIVATE | MAP_ANONYMOUS, -1);

	return place == MAP_FAILED ? place : at(place, offset);
}

static bool remaps(void *from, size_t npages, void *to, int flags)
{
	size_t size = npages * psize();

	return mremap(from, size, size, MREMAP_MAYMOVE | MREMAP_FIXED | flags, to) == to;
}

#define test_mremap(from, npages, to, flags)					\
	ASSERT_TRUE(remaps(from, npages, to, flags))

TEST_F(migration, moved)
{
	char *to = another_place(self->size, 0);

	test_cmd_to_dev(self->map, self->npages, CPU);
	test_mremap(self->map, self->npages, to, 0);
	test_cmd_snapshot(to, self->npages, self->here);
	test_err_access(EFAULT, self->map, self->npages);
	ASSERT_EQ(0, _test_cmd_read(self->fd, to, self->npages));
	ASSERT_TRUE(holds(mirror, self->map, self->npages, CPU));
	ASSERT_TRUE(holds(to, self->map, self->npages, CPU));
}

/* To where no huge page can be. */
TEST_F(migration, moved_out_of_step)
{
	char *to = another_place(self->size, 3);

	test_cmd_to_dev(self->map, self->npages, CPU);
	test_mremap(self->map, self->npages, to, 0);
	test_cmd_snapshot(to, self->npages, self->lone);
	test_err_access(EFAULT, self->map, self->npages);
	ASSERT_EQ(0, _test_cmd_read(self->fd, to, self->npages));
	ASSERT_TRUE(holds(mirror, self->map, self->npages, CPU));
	test_cmd_to_sys(to, self->npages, self->npages);
	ASSERT_TRUE(holds(to, self->map, self->npages, CPU));
}

TEST_F(migration, moved_in_part)
{
	size_t begin = self->npages / 4 + 1, n = self->npages / 2, end = begin + n;
	char *to = another_place(n * psize(), 0);

	test_cmd_to_dev(self->map, self->npages, CPU);
	test_mremap(at(self->map, begin), n, to, 0);
	test_cmd_snapshot(self->map, begin, self->lone);
	test_cmd_snapshot(to, n, self->lone);
	ASSERT_TRUE(cpu_sees(self->map, begin, CPU));
	ASSERT_TRUE(holds(to, at(self->map, begin), n, CPU));
	ASSERT_TRUE(cpu_sees(at(self->map, end), self->npages - end, CPU));
}

/* The old mapping stays, empty. */
TEST_F(migration, moved_out)
{
	char *to = another_place(self->size, 0);

	test_cmd_to_dev(self->map, self->npages, CPU);
	test_mremap(self->map, self->npages, to, MREMAP_DONTUNMAP);
	test_cmd_snapshot(to, self->npages, self->here);
	test_cmd_read(self->map, self->npages, NOBODY);
	test_cmd_write(self->map, self->npages, DEVICE);
	ASSERT_TRUE(holds(to, self->map, self->npages, CPU));
	ASSERT_TRUE(cpu_sees(self->map, self->npages, DEVICE));
}

/* Reclaim has no business at the device. */
TEST_F(migration, not_paged_out)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_madvise(self->map, self->npages, MADV_COLD);
	test_madvise(self->map, self->npages, MADV_PAGEOUT);
	test_cmd_snapshot(self->map, self->npages, self->here);
	test_cmd_read(self->map, self->npages, CPU);
	test_faults(0);
}

TEST_F(migration, locked_in_memory)
{
	ASSERT_EQ(0, mlock(self->map, self->size));
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_cmd_snapshot(self->map, self->npages, self->here);
	ASSERT_EQ(0, munlock(self->map, self->size));
	ASSERT_EQ(0, mlock(self->map, self->size));
	test_entries(self->map, self->npages, PM_PRESENT, self->npages);
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_munmap(self->map, self->npages);
}

/*
 * Parent and child share what is at the device. Whoever writes gets a copy.
 */

TEST_F(migration, forked)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_fork_witness(self->map, self->npages, CPU);

	test_cmd_snapshot(self->map, self->npages, read_only(self->here));
	test_cmd_read(self->map, self->npages, CPU);
	test_witness_agrees();
	test_cmd_read(self->map, self->npages, CPU);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

TEST_F(migration, forked_then_written_by_cpu)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_fork_witness(self->map, self->npages, CPU);

	cpu_writes(self->map, self->npages, DEVICE);
	test_witness_agrees();
	test_cmd_read(self->map, self->npages, DEVICE);
}

TEST_F(migration, forked_then_written_by_device)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_fork_witness(self->map, self->npages, CPU);

	test_cmd_read(self->map, self->npages, CPU);
	test_cmd_write(self->map, self->npages, DEVICE);
	test_faults(1);
	test_witness_agrees();
	ASSERT_TRUE(cpu_sees(self->map, self->npages, DEVICE));
}

TEST_F(migration, forked_then_written_by_child)
{
	pid_t pid;
	int hold;

	test_cmd_to_dev(self->map, self->npages, CPU);
	pid = test_fork_held(&hold);
	if (!pid) {
		cpu_writes(self->map, self->npages, CHILD);
		_exit(!cpu_sees(self->map, self->npages, CHILD));
	}

	ASSERT_TRUE(child_agrees(pid, hold));
	test_cmd_read(self->map, self->npages, CPU);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

TEST_F(migration, forked_then_written_by_childs_device)
{
	pid_t pid;
	int hold;

	test_cmd_to_dev(self->map, self->npages, CPU);
	pid = test_fork_held(&hold);
	if (!pid) {
		int dev = open_device(variant->unit);

		_exit(!sees(dev, self->map, self->npages, read_only(self->here)) ||
		      !reads(dev, self->map, self->npages, CPU) ||
		      _test_cmd_write(dev, self->map, self->npages, CHILD) ||
		      !cpu_sees(self->map, self->npages, CHILD));
	}

	ASSERT_TRUE(child_agrees(pid, hold));
	test_cmd_read(self->map, self->npages, CPU);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

/* What parent and child share already moves for both. */
TEST_F(migration, forked_before)
{
	test_fork_witness(self->map, self->npages, CPU);

	test_cmd_to_dev(self->map, self->npages, CPU);
	test_cmd_snapshot(self->map, self->npages, read_only(self->here));
	test_cmd_write(self->map, self->npages, DEVICE);
	test_witness_agrees();
	ASSERT_TRUE(cpu_sees(self->map, self->npages, DEVICE));
}

TEST_F(migration, forked_then_to_sys)
{
	pid_t pid;
	int hold;

	test_cmd_to_dev(self->map, self->npages, CPU);
	pid = test_fork_held(&hold);
	if (!pid) {
		int map = open("/proc/self/pagemap", O_RDONLY);

		_exit(count_entries(map, self->map, self->npages, PM_PRESENT) != self->npages ||
		      !cpu_sees(self->map, self->npages, CPU));
	}

	test_cmd_to_sys(self->map, self->npages, self->npages);
	test_cmd_snapshot(self->map, self->npages, read_only(self->back));
	test_cmd_write(self->map, self->npages, DEVICE);
	ASSERT_TRUE(child_agrees(pid, hold));
}

/* The child alone is left with it. */
TEST_F(migration, forked_then_unmapped)
{
	pid_t pid;
	int hold;

	test_cmd_to_dev(self->map, self->npages, CPU);
	pid = test_fork_held(&hold);
	if (!pid) {
		int dev = open_device(variant->unit);

		_exit(!reads(dev, self->map, self->npages, CPU) ||
		      _test_cmd_write(dev, self->map, self->npages, CHILD) ||
		      !cpu_sees(self->map, self->npages, CHILD));
	}

	test_munmap(self->map, self->npages);
	ASSERT_TRUE(child_agrees(pid, hold));
}

TEST_F(migration, forked_then_closed)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_fork_witness(self->map, self->npages, CPU);

	ASSERT_EQ(0, close(self->fd));
	cpu_writes(self->map, self->npages, DEVICE);
	test_witness_agrees();
	ASSERT_TRUE(cpu_sees(self->map, self->npages, DEVICE));
}

/* The child becomes another program, and what it shared is its parent's again. */
TEST_F(migration, forked_then_executed)
{
	pid_t pid;
	int hold;

	test_cmd_to_dev(self->map, self->npages, CPU);
	pid = test_fork_held(&hold);
	if (!pid) {
		execl("/bin/true", "true", NULL);
		_exit(KSFT_FAIL);
	}

	ASSERT_TRUE(child_agrees(pid, hold));
	test_cmd_read(self->map, self->npages, CPU);
	test_cmd_write(self->map, self->npages, DEVICE);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, DEVICE));
}

/* A process that leaves its memory at the device when it becomes another program. */
TEST_F(migration, executed)
{
	pid_t pid;
	int hold;

	pid = test_fork_held(&hold);
	if (!pid) {
		int dev = open_device(variant->unit);

		cpu_writes(self->map, self->npages, CHILD);
		if (moves(dev, self->map, self->npages, CHILD))
			execl("/bin/true", "true", NULL);
		_exit(KSFT_FAIL);
	}

	ASSERT_TRUE(child_agrees(pid, hold));
	test_cmd_to_dev(self->map, self->npages, CPU);
}

/* A child that sends its memory to and fro until it is killed. Starts when it says so. */
static pid_t fork_restless(int unit, char *map, size_t npages)
{
	int ends[2];
	pid_t pid;
	char c = 0;

	if (pipe(ends))
		return -1;
	pid = fork();
	if (pid) {
		close(ends[1]);
		pid = read(ends[0], &c, 1) == 1 ? pid : -1;
		close(ends[0]);
		return pid;
	}
	for (int dev = open_device(unit); ; ) {
		if (!moves(dev, map, npages, CPU) || write(ends[1], &c, 1) < 0)
			_exit(KSFT_FAIL);
		cpu_writes(map, npages / 2, CPU);
		if (_test_cmd_to_sys(dev, map, npages))
			_exit(KSFT_FAIL);
	}
}

static int death_of(pid_t pid)
{
	int status;

	if (waitpid(pid, &status, 0) != pid || !WIFSIGNALED(status))
		return 0;
	return WTERMSIG(status);
}

/* Later and later, to meet it at every step. */
TEST_F(migration, killed)
{
	signal(SIGPIPE, SIG_IGN);
	for (int i = 0; i < 10; i++) {
		pid_t pid = fork_restless(variant->unit, self->map, self->npages);

		ASSERT_GE(pid, 0);
		usleep(i * 2000);
		ASSERT_EQ(0, kill(pid, SIGKILL));
		ASSERT_EQ(SIGKILL, death_of(pid));
	}
	test_cmd_to_dev(self->map, self->npages, CPU);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

/*
 * A core file has the memory that was at the device.
 */

static bool has_core_files(void)
{
	char pattern[4] = "";
	int file = open("/proc/sys/kernel/core_pattern", O_RDONLY);
	bool good = file >= 0 && read(file, pattern, sizeof(pattern)) == sizeof(pattern) &&
		    !memcmp(pattern, "core", sizeof(pattern));

	close(file);
	return good;
}

/* Opens the file in @dir, the only one, and removes it. */
static int take_file(const char *dir)
{
	DIR *files = opendir(dir);
	struct dirent *entry;
	int fd = -1;

	while (files && fd < 0 && (entry = readdir(files))) {
		fd = openat(dirfd(files), entry->d_name, O_RDWR);
		if (fd >= 0)
			unlinkat(dirfd(files), entry->d_name, 0);
	}
	if (files)
		closedir(files);
	return fd;
}

/* The core file of a child that has but crashed, or -1. */
static int core_of_child(void)
{
	struct rlimit unlimited = { RLIM_INFINITY, RLIM_INFINITY };
	char dir[] = "/tmp/hmm-tests.XXXXXX";
	int core, death;
	pid_t pid;

	if (!mkdtemp(dir))
		return -1;
	pid = fork();
	if (!pid) {
		if (!chdir(dir) && !setrlimit(RLIMIT_CORE, &unlimited))
			abort();
		_exit(KSFT_FAIL);
	}
	death = death_of(pid);
	core = take_file(dir);
	rmdir(dir);
	return death == SIGABRT ? core : -1;
}

/* Does the core file have what @who wrote to @npages pages at @addr? */
static bool core_holds(int core, void *addr, size_t npages, enum writer who)
{
	off_t size = lseek(core, 0, SEEK_END);
	__u64 word;

	for (off_t offset = 0; offset < size; offset += psize())
		if (pread(core, &word, sizeof(word), offset) == sizeof(word) &&
		    word == word_of(who, addr))
			return file_holds_at(core, offset, addr, npages, who);
	return false;
}

TEST_F(migration, dumped)
{
	int core;

	if (!has_core_files())
		SKIP(return, "no core dumps in this kernel, or to other places: core_pattern");
	test_cmd_to_dev(self->map, self->npages, CPU);
	memset(mirror, 0, self->size);
	core = core_of_child();
	ASSERT_GE(core, 0);
	ASSERT_TRUE(core_holds(core, self->map, self->npages, CPU));
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

/*
 * Several threads at once
 */

#define NTHREADS 4
#define ROUNDS 10

struct worker {
	bool (*work)(struct worker *worker);
	int dev;
	char *map;
	size_t npages;
	size_t first, step;	/* the pages that are this one's to write */
	enum writer who;
};

static pthread_barrier_t all_ready;

static void *set_to_work(void *arg)
{
	struct worker *worker = arg;
	bool content = make_mirror(worker->npages);

	pthread_barrier_wait(&all_ready);
	return content && worker->work(worker) ? NULL : worker;
}

/* Are all content? */
static bool work_at_once(struct worker *workers, size_t n)
{
	pthread_t threads[NTHREADS];
	bool content = true;
	void *malcontent;

	pthread_barrier_init(&all_ready, NULL, n);
	for (size_t i = 0; i < n; i++)
		if (pthread_create(&threads[i], NULL, set_to_work, &workers[i]))
			ksft_exit_fail_msg("no thread\n");
	for (size_t i = 0; i < n; i++) {
		pthread_join(threads[i], &malcontent);
		content = content && !malcontent;
	}
	return content;
}

static bool all_at_once(const struct worker *worker)
{
	struct worker workers[NTHREADS];

	for (size_t i = 0; i < NTHREADS; i++)
		workers[i] = *worker;
	return work_at_once(workers, NTHREADS);
}

static bool touches_all(struct worker *worker)
{
	return cpu_sees(worker->map, worker->npages, CPU);
}

TEST_F(migration, touched_at_once)
{
	struct worker all = { touches_all, self->fd, self->map, self->npages };

	for (int i = 0; i < 5; i++) {
		test_cmd_to_dev(self->map, self->npages, CPU);
		ASSERT_TRUE(all_at_once(&all));
	}
	test_cmd_snapshot(self->map, self->npages, self->touched);
}

/*
 * With others at it, what a command wants to move may be busy or gone again, and
 * it may even give up asking where it is.
 */
static bool sends(struct worker *worker)
{
	return !_test_cmd_to_dev(worker->dev, worker->map, worker->npages) ||
	       errno == ENOENT || errno == EBUSY;
}

static bool sends_to_and_fro(struct worker *worker)
{
	for (int i = 0; i < ROUNDS; i++) {
		if (!sends(worker))
			return done(-1);
		if (_test_cmd_to_sys(worker->dev, worker->map, worker->npages))
			return done(-1);
	}
	return true;
}

TEST_F(migration, sent_to_and_fro_at_once)
{
	struct worker all = { sends_to_and_fro, self->fd, self->map, self->npages };

	ASSERT_TRUE(all_at_once(&all));
	test_cmd_read(self->map, self->npages, CPU);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

static bool touches_again_and_again(struct worker *worker)
{
	for (int i = 0; i < ROUNDS; i++)
		if (!cpu_sees(worker->map, worker->npages, CPU))
			return false;
	return true;
}

TEST_F(migration, sent_and_touched_at_once)
{
	struct worker workers[] = {
		{ sends_to_and_fro, self->fd, self->map, self->npages },
		{ touches_again_and_again, self->fd, self->map, self->npages },
	};

	ASSERT_TRUE(work_at_once(workers, ARRAY_SIZE(workers)));
	test_cmd_read(self->map, self->npages, CPU);
}

/*
 * Page by page: what moves and what does not, with a device of each kind.
 */
FIXTURE(devmem)
{
	int fd, pagemap;
	unsigned char here;	/* what a snapshot tells of a page at the device */
};

FIXTURE_VARIANT(devmem)
{
	int unit;
};

FIXTURE_VARIANT_ADD(devmem, private) { .unit = PRIVATE_ONE };
FIXTURE_VARIANT_ADD(devmem, coherent) { .unit = COHERENT_ONE };

FIXTURE_SETUP(devmem)
{
	if (is_absent(variant->unit))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	self->here = local_memory(variant->unit);
	test_setup(variant->unit, NPAGES);
}

FIXTURE_TEARDOWN(devmem) { test_close(); }

/* Memory that is not there yet comes into being at the device. */
TEST_F(devmem, hole)
{
	char *map = test_mmap(&anon, NPAGES);

	test_cmd_to_dev(map, NPAGES, NOBODY);
	test_faults(0);
	test_cmd_snapshot(map, NPAGES, self->here);
	test_cmd_write(map, 5, DEVICE);
	test_faults(0);
	ASSERT_TRUE(cpu_sees(map, 5, DEVICE));
	ASSERT_TRUE(cpu_sees(at(map, 5), NPAGES - 5, NOBODY));
}

TEST_F(devmem, zero_page)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_touches(map, NPAGES);
	test_cmd_to_dev(map, NPAGES, NOBODY);
	test_cmd_snapshot(map, NPAGES, self->here);
	test_cmd_write(map, 5, DEVICE);
	test_cmd_to_sys(map, NPAGES, NPAGES);
	ASSERT_TRUE(cpu_sees(map, 5, DEVICE));
	ASSERT_TRUE(cpu_sees(at(map, 5), NPAGES - 5, NOBODY));
}

TEST_F(devmem, hole_and_zero_page_and_data)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_writes(at(map, 20), 20, CPU);
	cpu_touches(at(map, 60), 20);
	ASSERT_EQ(0, _test_cmd_to_dev(self->fd, map, NPAGES));
	ASSERT_TRUE(holds(mirror, map, 20, NOBODY));
	ASSERT_TRUE(holds(at(mirror, 20), at(map, 20), 20, CPU));
	ASSERT_TRUE(holds(at(mirror, 40), at(map, 40), NPAGES - 40, NOBODY));
	test_cmd_snapshot(map, NPAGES, self->here);
	ASSERT_TRUE(cpu_sees(at(map, 20), 20, CPU));
}

TEST_F(devmem, read_only_hole)
{
	char *map = test_mmap(&anon, NPAGES);

	test_mprotect(map, NPAGES, PROT_READ);
	cpu_touches(map, 10);
	test_cmd_to_dev(map, NPAGES, NOBODY);
	test_cmd_snapshot(map, NPAGES, read_only(self->here));
	test_err_write(EPERM, map, NPAGES);
	ASSERT_TRUE(cpu_sees(map, NPAGES, NOBODY));
}

TEST_F(devmem, several_vmas)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_writes(map, NPAGES, CPU);
	for (size_t i = 0; i < NPAGES; i += 20)
		test_mprotect(at(map, i), 10, PROT_READ);
	test_cmd_to_dev(map, NPAGES, CPU);
	for (size_t i = 0; i < NPAGES; i += 20) {
		test_cmd_snapshot(at(map, i), 10, read_only(self->here));
		test_cmd_snapshot(at(map, i + 10), 10, self->here);
	}
	test_cmd_to_sys(map, NPAGES, NPAGES);
	ASSERT_TRUE(cpu_sees(map, NPAGES, CPU));
}

/* Where there is no VMA, a range cannot be meant. */
TEST_F(devmem, no_vma_in_range)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_writes(map, NPAGES, CPU);
	test_munmap(at(map, 40), 1);
	test_err_to_dev(EINVAL, map, NPAGES);
	test_err_to_dev(EINVAL, at(map, 40), 1);
	test_cmd_to_dev(map, 40, CPU);
	test_cmd_to_dev(at(map, 41), NPAGES - 41, CPU);
	test_err_to_sys(EINVAL, map, NPAGES);
	test_err_to_sys(EINVAL, at(map, 40), 1);
	ASSERT_TRUE(cpu_sees(map, 40, CPU));
	ASSERT_TRUE(cpu_sees(at(map, 41), NPAGES - 41, CPU));
}

/* A range that begins before the only mapping, or ends after it. */
TEST_F(devmem, range_past_the_vma)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_writes(map, NPAGES, CPU);
	test_munmap(map, 10);
	test_munmap(at(map, NPAGES - 10), 10);
	test_err_to_dev(EINVAL, map, NPAGES - 10);
	test_err_to_dev(EINVAL, at(map, 10), NPAGES - 10);
	test_cmd_to_dev(at(map, 10), NPAGES - 20, CPU);
	test_err_to_sys(EINVAL, at(map, 10), NPAGES - 10);
	ASSERT_TRUE(cpu_sees(at(map, 10), NPAGES - 20, CPU));
}

TEST_F(devmem, no_access)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_writes(map, NPAGES, CPU);
	test_mprotect(at(map, 40), 1, PROT_NONE);
	test_err_to_dev(EINVAL, map, NPAGES);
	test_err_to_sys(EINVAL, map, NPAGES);
	test_mprotect(at(map, 40), 1, PROT_WRITE);
	test_err_to_dev(EINVAL, at(map, 40), 1);
	test_mprotect(at(map, 40), 1, PROT_READ);
	test_cmd_to_dev(map, NPAGES, CPU);
}

/* What cannot move is passed by. Data are told of what comes before it. */
TEST_F(devmem, stuck_half_way)
{
	char *map = test_mmap(&anon, NPAGES);
	int file = backing_file(&shmem);

	ASSERT_EQ(0, ftruncate(file, psize()));
	ASSERT_EQ(at(map, 40), mmap(at(map, 40), psize(), PROT_READ | PROT_WRITE,
				    MAP_SHARED | MAP_FIXED, file, 0));
	cpu_writes(map, NPAGES, CPU);
	test_err_to_dev(ENOENT, map, NPAGES);
	EXPECT_EQ(40ULL, answer.cpages);
	ASSERT_TRUE(holds(mirror, map, 40, CPU));
	test_cmd_snapshot(map, 40, self->here);
	test_cmd_snapshot(at(map, 40), 1, SEES_WRITE);
	test_cmd_snapshot(at(map, 41), NPAGES - 41, self->here);
	test_cmd_to_sys(map, NPAGES, NPAGES - 1);
	ASSERT_TRUE(cpu_sees(map, NPAGES, CPU));
}

/* A private mapping has its own pages where it was written, the file's elsewhere. */
TEST_F(devmem, page_of_a_file)
{
	char *map = test_mmap(&shmem_private, NPAGES);

	cpu_touches(map, NPAGES);
	cpu_writes(map, 40, CPU);
	test_err_to_dev(ENOENT, map, NPAGES);
	EXPECT_EQ(40ULL, answer.cpages);
	test_cmd_snapshot(map, 40, self->here);
	test_cmd_snapshot(at(map, 40), NPAGES - 40, SEES_READ);
	test_cmd_write(map, NPAGES, DEVICE);
	test_cmd_to_dev(map, NPAGES, DEVICE);
}

/* A page of a file that is not even in the page table is nobody's to move. */
TEST_F(devmem, hole_of_a_file)
{
	char *map = test_mmap(&shmem, NPAGES);

	test_err_to_dev(ENOENT, map, NPAGES);
	EXPECT_EQ(0ULL, answer.cpages);
	test_cmd_snapshot(map, NPAGES, SEES_NONE);
	test_cmd_to_sys(map, NPAGES, 0);
}

TEST_F(devmem, page_of_the_driver)
{
	char *map = mmap(NULL, IO_PAGES * psize(), PROT_READ | PROT_WRITE,
			 MAP_SHARED, self->fd, 0);

	ASSERT_NE(MAP_FAILED, map);
	test_err_to_dev(EINVAL, map, IO_PAGES);
	test_err_to_sys(EINVAL, map, IO_PAGES);
}

TEST_F(devmem, swapped_out)
{
	char *map = test_mmap(&anon, NPAGES);

	ASSERT_TRUE(stay_on_this_cpu());
	cpu_writes(map, NPAGES, CPU);
	if (!page_out(self->pagemap, map, NPAGES))
		SKIP(return, "no swap, or not enough of it");
	test_err_to_dev(ENOENT, map, NPAGES);
	test_entries(map, NPAGES, PM_SWAP, NPAGES);
	test_cmd_read(map, NPAGES, CPU);
	test_cmd_to_dev(map, NPAGES, CPU);
	test_cmd_to_sys(map, NPAGES, NPAGES);
	ASSERT_TRUE(page_out(self->pagemap, map, NPAGES));
	ASSERT_TRUE(cpu_sees(map, NPAGES, CPU));
}

TEST_F(devmem, guard_region)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_writes(map, NPAGES, CPU);
	test_cmd_to_dev(map, NPAGES, CPU);
	if (madvise(at(map, 40), 10 * psize(), MADV_GUARD_INSTALL))
		SKIP(return, "no guard regions in this kernel");
	test_cmd_snapshot(at(map, 40), 10, SEES_ERROR);
	test_err_to_dev(ENOENT, map, NPAGES);
	test_err_access(EFAULT, at(map, 40), 10);
	test_madvise(at(map, 40), 10, MADV_GUARD_REMOVE);
	test_cmd_to_dev(at(map, 40), 10, NOBODY);
	ASSERT_TRUE(cpu_sees(map, 40, CPU));
	ASSERT_TRUE(cpu_sees(at(map, 50), NPAGES - 50, CPU));
}

/* What MADV_FREE spares at the device it spares for good. */
TEST_F(devmem, freed_lazily)
{
	char *map = test_mmap(&anon, NPAGES);

	ASSERT_TRUE(stay_on_this_cpu());
	cpu_writes(map, NPAGES, CPU);
	test_cmd_to_dev(map, NPAGES, CPU);
	test_madvise(map, NPAGES, MADV_FREE);
	test_cmd_read(map, NPAGES, CPU);
	test_cmd_to_sys(map, NPAGES, NPAGES);
	page_out(self->pagemap, map, NPAGES);
	ASSERT_TRUE(cpu_sees(map, NPAGES, CPU));
}

/* What was given up may be dropped when it is back, unless the device wrote to it. */
TEST_F(devmem, freed_lazily_before)
{
	char *map = test_mmap(&anon, NPAGES);
	size_t half = NPAGES / 2;

	ASSERT_TRUE(stay_on_this_cpu());
	cpu_writes(map, NPAGES, CPU);
	test_madvise(map, NPAGES, MADV_FREE);
	test_cmd_to_dev(map, NPAGES, CPU);
	test_cmd_write(map, half, DEVICE);
	test_cmd_to_sys(map, NPAGES, NPAGES);
	page_out(self->pagemap, map, NPAGES);
	ASSERT_TRUE(cpu_sees(map, half, DEVICE));
}

/* Pages that others hold on to stay where they are; a pipe will do. */
#define PIPE_PAGES ((size_t)8)

static bool hold_in_pipe(int pipe, void *addr, size_t npages)
{
	struct iovec vec = { addr, npages * psize() };

	return vmsplice(pipe, &vec, 1, 0) == (ssize_t)vec.iov_len;
}

static bool pipe_holds(int pipe, void *addr, size_t npages, enum writer who)
{
	for (size_t i = 0; i < npages; i++)
		if (read(pipe, mirror, psize()) != psize() ||
		    !holds(mirror, at(addr, i), 1, who))
			return false;
	return true;
}

TEST_F(devmem, held_in_system)
{
	char *map = test_mmap(&anon, NPAGES), *held = at(map, 40);
	int ends[2];

	ASSERT_EQ(0, pipe(ends));
	cpu_writes(map, NPAGES, CPU);
	ASSERT_TRUE(hold_in_pipe(ends[1], held, PIPE_PAGES));
	test_err_to_dev(ENOENT, map, NPAGES);
	EXPECT_EQ(40ULL, answer.cpages);
	test_cmd_snapshot(held, PIPE_PAGES, SEES_WRITE);
	ASSERT_TRUE(pipe_holds(ends[0], held, PIPE_PAGES, CPU));
	test_cmd_to_dev(map, NPAGES, CPU);
}

/* Private memory cannot be held, it comes back for that; coherent memory can. */
TEST_F(devmem, held_at_device)
{
	size_t stuck = is_coherent(variant->unit) ? PIPE_PAGES : 0;
	char *map = test_mmap(&anon, NPAGES), *held = at(map, 40);
	int ends[2];

	ASSERT_EQ(0, pipe(ends));
	cpu_writes(map, NPAGES, CPU);
	test_cmd_to_dev(map, NPAGES, CPU);
	ASSERT_TRUE(hold_in_pipe(ends[1], held, PIPE_PAGES));
	test_cmd_snapshot(held, PIPE_PAGES, stuck ? self->here : SEES_WRITE);
	test_cmd_to_sys(map, NPAGES, NPAGES - PIPE_PAGES);
	ASSERT_TRUE(pipe_holds(ends[0], held, PIPE_PAGES, CPU));
	test_cmd_to_sys(map, NPAGES, stuck);
	ASSERT_TRUE(cpu_sees(map, NPAGES, CPU));
}

/* What is pinned for long may not be the device's: it comes back for that. */
TEST_F(devmem, pinned_for_long)
{
	char *map = test_mmap(&anon, NPAGES);
	struct pin_longterm_test pin = {
		.addr = (uintptr_t)at(map, 40),
		.size = 10 * psize(),
		.flags = PIN_LONGTERM_TEST_FLAG_USE_WRITE,
	};
	int gup = open("/sys/kernel/debug/gup_test", O_RDWR | O_CLOEXEC);

	if (gup < 0)
		SKIP(return, "no gup_test in this kernel, or no debugfs");
	cpu_writes(map, NPAGES, CPU);
	test_cmd_to_dev(map, NPAGES, CPU);
	ASSERT_EQ(0, ioctl(gup, PIN_LONGTERM_TEST_START, &pin));
	test_cmd_snapshot(at(map, 40), 10, SEES_WRITE);
	test_err_to_dev(ENOENT, map, NPAGES);
	EXPECT_EQ(40ULL, answer.cpages);
	ASSERT_EQ(0, ioctl(gup, PIN_LONGTERM_TEST_STOP));
	test_cmd_to_dev(map, NPAGES, CPU);
}

/*
 * Coherent memory is what the driver was given and no more.
 */
#define MORE_THAN_THERE_IS ((size_t)1024 * 1024 * 1024)

FIXTURE(scarce)
{
	int fd;
	char *map;
	size_t npages;
	unsigned char here;
};

FIXTURE_SETUP(scarce)
{
	if (is_absent(COHERENT_ONE))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	self->fd = test_open(COHERENT_ONE);
	self->npages = pages(MORE_THAN_THERE_IS);
	self->here = local_memory(COHERENT_ONE);
	ASSERT_TRUE(make_mirror(self->npages));
	self->map = test_mmap(&anon, self->npages);
}

FIXTURE_TEARDOWN(scarce) { test_close(); }

static int _test_cmd_to_dev_as_far_as_it_goes(int dev, void *addr, size_t npages)
{
	return _test_cmd_some(dev, HMM_DMIRROR_MIGRATE_TO_DEV, addr, npages, mirror);
}

TEST_F(scarce, used_up)
{
	size_t there;

	test_err(ENOMEM, _test_cmd_to_dev_as_far_as_it_goes(self->fd, self->map, self->npages));
	there = answer.cpages;
	ASSERT_GT(there, NPAGES);
	ASSERT_LT(there + NPAGES, self->npages);
	ASSERT_TRUE(holds(mirror, self->map, there, NOBODY));
	test_cmd_snapshot(self->map, there, self->here);
	test_cmd_snapshot(at(self->map, there), NPAGES, SEES_NONE);

	/* What did not move is none the worse for it. */
	test_cmd_write(at(self->map, there - 3), 6, DEVICE);
	test_err(ENOMEM, _test_cmd_to_dev(self->fd, at(self->map, there - 3), 6));
	test_cmd_to_sys(self->map, 3, 3);
	test_cmd_to_dev(at(self->map, there - 3), 6, DEVICE);
	ASSERT_TRUE(cpu_sees(at(self->map, there - 3), 6, DEVICE));
}

/*
 * Huge pages and private memory: in one piece, and in pieces when there is no
 * large folio to be had.
 */
FIXTURE(large)
{
	int fd, pagemap;
	char *map;		/* two huge pages */
	size_t npages;		/* in one of them */
	unsigned char here;	/* what a snapshot tells of a page at the device */
	unsigned char lone;	/* the same, without its neighbours */
};

FIXTURE_SETUP(large)
{
	if (lacks(&thp))
		SKIP(return, "%s", lacks(&thp));
	thp_only(pmd_order());
	self->npages = pages(pmd_size());
	self->lone = local_memory(PRIVATE_ONE);
	self->here = self->lone | SEES_PMD;
	test_setup(PRIVATE_ONE, 2 * self->npages);
	self->map = test_mmap(&thp, 2 * self->npages);
}

FIXTURE_TEARDOWN(large) { test_close(); }

/* The first of the two is in pieces, the second is not. */
#define test_in_pieces(in_pieces, in_one)					\
({										\
	test_cmd_snapshot(self->map, self->npages, in_pieces);			\
	test_cmd_snapshot(at(self->map, self->npages), self->npages, in_one);	\
})

TEST_F(large, to_dev_in_pieces)
{
	cpu_writes(self->map, 2 * self->npages, CPU);
	test_fail_alloc();
	test_cmd_to_dev(self->map, 2 * self->npages, CPU);
	test_in_pieces(self->lone, self->here);
	test_cmd_write(self->map, 2 * self->npages, DEVICE);
	test_faults(0);
	ASSERT_TRUE(cpu_sees(self->map, 2 * self->npages, DEVICE));
}

TEST_F(large, to_sys_in_pieces)
{
	cpu_writes(self->map, 2 * self->npages, CPU);
	test_cmd_to_dev(self->map, 2 * self->npages, CPU);
	test_fail_alloc();
	test_cmd_to_sys(self->map, 2 * self->npages, 2 * self->npages);
	test_in_pieces(SEES_WRITE, SEES_WRITE | SEES_PMD);
	ASSERT_TRUE(cpu_sees(self->map, 2 * self->npages, CPU));
}

TEST_F(large, to_and_fro_in_pieces)
{
	cpu_writes(self->map, 2 * self->npages, CPU);
	test_fail_alloc();
	test_cmd_to_dev(self->map, 2 * self->npages, CPU);
	test_fail_alloc();
	test_cmd_to_sys(self->map, 2 * self->npages, 2 * self->npages);
	test_cmd_snapshot(self->map, 2 * self->npages, SEES_WRITE);
	ASSERT_TRUE(cpu_sees(self->map, 2 * self->npages, CPU));
}

/* Short of a huge page, the CPU has the page that it touched at the least. */
TEST_F(large, touched_in_pieces)
{
	cpu_writes(self->map, 2 * self->npages, CPU);
	test_cmd_to_dev(self->map, 2 * self->npages, CPU);
	test_fail_alloc();
	cpu_touches(at(self->map, 7), 1);
	test_cmd_snapshot(at(self->map, 7), 1, SEES_WRITE);
	test_cmd_snapshot(at(self->map, self->npages), self->npages, self->here);
	ASSERT_TRUE(cpu_sees(self->map, 2 * self->npages, CPU));
	test_in_pieces(SEES_WRITE, SEES_WRITE | SEES_PMD);
}

TEST_F(large, released_in_pieces)
{
	cpu_writes(self->map, 2 * self->npages, CPU);
	test_cmd_to_dev(self->map, 2 * self->npages, CPU);
	test_fail_alloc();
	test_cmd_release();
	test_entries(self->map, 2 * self->npages, PM_PRESENT, 2 * self->npages);
	ASSERT_TRUE(cpu_sees(self->map, 2 * self->npages, CPU));
}

/* What went in pieces comes back page by page. */
TEST_F(large, one_piece_touched)
{
	cpu_writes(self->map, 2 * self->npages, CPU);
	test_fail_alloc();
	test_cmd_to_dev(self->map, 2 * self->npages, CPU);
	cpu_touches(at(self->map, 7), 1);
	test_entries(self->map, 2 * self->npages, PM_PRESENT, 1);
	test_entries(at(self->map, 7), 1, PM_PRESENT, 1);
	ASSERT_TRUE(cpu_sees(self->map, 2 * self->npages, CPU));
}

TEST_F(large, hole)
{
	test_cmd_to_dev(self->map, 2 * self->npages, NOBODY);
	test_cmd_snapshot(self->map, 2 * self->npages, self->here);
	test_cmd_write(at(self->map, 7), 1, DEVICE);
	test_faults(0);
	ASSERT_TRUE(cpu_sees(self->map, 7, NOBODY));
	ASSERT_TRUE(cpu_sees(at(self->map, 7), 1, DEVICE));
	ASSERT_TRUE(cpu_sees(at(self->map, 8), 2 * self->npages - 8, NOBODY));
}

TEST_F(large, hole_in_pieces)
{
	test_fail_alloc();
	test_cmd_to_dev(self->map, 2 * self->npages, NOBODY);
	test_in_pieces(self->lone, self->here);
	test_fail_alloc();
	test_cmd_to_sys(self->map, 2 * self->npages, 2 * self->npages);
	test_cmd_snapshot(self->map, 2 * self->npages, SEES_WRITE);
	ASSERT_TRUE(cpu_sees(self->map, 2 * self->npages, NOBODY));
}

TEST_F(large, huge_zero_page)
{
	cpu_touches(self->map, 1);
	cpu_touches(at(self->map, self->npages), 1);
	test_cmd_to_dev(self->map, 2 * self->npages, NOBODY);
	test_cmd_snapshot(self->map, 2 * self->npages, self->here);
	test_cmd_write(self->map, 2 * self->npages, DEVICE);
	test_faults(0);
	ASSERT_TRUE(cpu_sees(self->map, 2 * self->npages, DEVICE));
}

TEST_F(large, huge_zero_page_in_pieces)
{
	cpu_touches(self->map, 1);
	cpu_touches(at(self->map, self->npages), 1);
	test_fail_alloc();
	test_cmd_to_dev(self->map, 2 * self->npages, NOBODY);
	test_in_pieces(self->lone, self->here);
	test_fail_alloc();
	ASSERT_TRUE(cpu_sees(self->map, 2 * self->npages, NOBODY));
	test_cmd_snapshot(self->map, 2 * self->npages, SEES_WRITE);
}

/* A part of the huge zero page moves, and the rest stays zero. */
TEST_F(large, part_of_huge_zero_page)
{
	cpu_touches(self->map, 1);
	test_cmd_to_dev(at(self->map, 7), 9, NOBODY);
	test_cmd_snapshot(self->map, 7, SEES_ZERO);
	test_cmd_snapshot(at(self->map, 7), 9, self->lone);
	test_cmd_snapshot(at(self->map, 16), self->npages - 16, SEES_ZERO);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, NOBODY));
}

TEST_F(large, read_only_in_pieces)
{
	cpu_writes(self->map, 2 * self->npages, CPU);
	test_mprotect(self->map, 2 * self->npages, PROT_READ);
	test_fail_alloc();
	test_cmd_to_dev(self->map, 2 * self->npages, CPU);
	test_in_pieces(read_only(self->lone), read_only(self->here));
	test_err_write(EPERM, self->map, 2 * self->npages);
	test_fail_alloc();
	ASSERT_TRUE(cpu_sees(self->map, 2 * self->npages, CPU));
	test_cmd_snapshot(self->map, 2 * self->npages, SEES_READ);
}

/*
 * Parent and child share both, and nobody can have one of them back in pieces:
 * whoever wants it has to get it in one piece after all.
 */
TEST_F(large, forked_in_pieces)
{
	cpu_writes(self->map, 2 * self->npages, CPU);
	test_cmd_to_dev(self->map, 2 * self->npages, CPU);
	test_fork_witness(self->map, 2 * self->npages, CPU);

	test_fail_alloc();
	test_cmd_write(self->map, self->npages, DEVICE);
	test_fail_alloc();
	cpu_writes(at(self->map, self->npages), self->npages, DEVICE);
	test_witness_agrees();
	test_cmd_read(self->map, 2 * self->npages, DEVICE);
	ASSERT_TRUE(cpu_sees(self->map, 2 * self->npages, DEVICE));
}

TEST_F(large, forked_before_in_pieces)
{
	cpu_writes(self->map, 2 * self->npages, CPU);
	test_fork_witness(self->map, 2 * self->npages, CPU);

	test_fail_alloc();
	test_cmd_to_dev(self->map, 2 * self->npages, CPU);
	test_in_pieces(read_only(self->lone), read_only(self->here));
	test_cmd_write(self->map, 2 * self->npages, DEVICE);
	test_witness_agrees();
	ASSERT_TRUE(cpu_sees(self->map, 2 * self->npages, DEVICE));
}

TEST_F(large, forked_then_to_sys_in_pieces)
{
	cpu_writes(self->map, 2 * self->npages, CPU);
	test_cmd_to_dev(self->map, 2 * self->npages, CPU);
	test_fork_witness(self->map, 2 * self->npages, CPU);

	test_fail_alloc();
	test_cmd_to_sys(self->map, 2 * self->npages, 2 * self->npages);
	test_in_pieces(SEES_READ, SEES_READ | SEES_PMD);
	test_cmd_read(self->map, 2 * self->npages, CPU);
	test_cmd_write(self->map, 2 * self->npages, DEVICE);
	test_witness_agrees();
	ASSERT_TRUE(cpu_sees(self->map, 2 * self->npages, DEVICE));
}

/* Pieces are a huge page again when the CPU has put them together. */
TEST_F(large, collapsed)
{
	cpu_writes(self->map, self->npages, CPU);
	test_fail_alloc();
	test_cmd_to_dev(self->map, self->npages, CPU);
	ASSERT_EQ(0, collapse(self->map, self->npages));
	test_cmd_snapshot(self->map, self->npages, SEES_WRITE | SEES_PMD);
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_cmd_snapshot(self->map, self->npages, self->here);
}

TEST_F(large, freed_lazily)
{
	cpu_writes(self->map, 2 * self->npages, CPU);
	test_cmd_to_dev(self->map, 2 * self->npages, CPU);
	test_madvise(self->map, 2 * self->npages, MADV_FREE);
	test_madvise(at(self->map, 7), self->npages, MADV_FREE);
	test_cmd_snapshot(self->map, 2 * self->npages, self->here);
	ASSERT_TRUE(cpu_sees(self->map, 2 * self->npages, CPU));
}

/* One range over a huge page, base pages, and none. */
TEST_F(large, next_to_base_pages)
{
	size_t half = self->npages / 2;

	cpu_writes(self->map, self->npages, CPU);
	test_madvise(at(self->map, self->npages), self->npages, MADV_NOHUGEPAGE);
	cpu_writes(at(self->map, self->npages), half, CPU);
	ASSERT_EQ(0, _test_cmd_to_dev(self->fd, self->map, 2 * self->npages));
	ASSERT_TRUE(holds(mirror, self->map, self->npages + half, CPU));
	test_in_pieces(self->here, self->lone);
	test_cmd_to_sys(self->map, 2 * self->npages, 2 * self->npages);
	ASSERT_TRUE(cpu_sees(self->map, self->npages + half, CPU));
	ASSERT_TRUE(cpu_sees(at(self->map, self->npages + half), half, NOBODY));
}

/*
 * Two devices want the same memory.
 */
FIXTURE(pair)
{
	int fd, other, pagemap;
	char *map;
	size_t npages;
	/* What a snapshot of a page at the device tells: */
	unsigned char here;	/* its own */
	unsigned char remote;	/* the other's */
	unsigned char others;	/* the other's, of a page that is at the other */
};

FIXTURE_VARIANT(pair)
{
	int unit, other;
	struct backing b;
};

FIXTURE_VARIANT_ADD(pair, private_anon) { PRIVATE_ONE, PRIVATE_TWO, B_ANON };
FIXTURE_VARIANT_ADD(pair, private_thp) { PRIVATE_ONE, PRIVATE_TWO, B_THP };
FIXTURE_VARIANT_ADD(pair, coherent_anon) { COHERENT_ONE, COHERENT_TWO, B_ANON };
FIXTURE_VARIANT_ADD(pair, coherent_thp) { COHERENT_ONE, COHERENT_TWO, B_THP };
FIXTURE_VARIANT_ADD(pair, private_coherent_anon) { PRIVATE_ONE, COHERENT_ONE, B_ANON };
FIXTURE_VARIANT_ADD(pair, private_coherent_thp) { PRIVATE_ONE, COHERENT_ONE, B_THP };
FIXTURE_VARIANT_ADD(pair, coherent_private_anon) { COHERENT_ONE, PRIVATE_ONE, B_ANON };
FIXTURE_VARIANT_ADD(pair, coherent_private_thp) { COHERENT_ONE, PRIVATE_ONE, B_THP };

FIXTURE_SETUP(pair)
{
	const struct backing *b = &variant->b;

	if (is_absent(variant->unit) || is_absent(variant->other))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	if (lacks(b))
		SKIP(return, "%s", lacks(b));
	if (wants_thp(b))
		thp_only(pmd_order());

	self->other = test_open(variant->other);
	self->npages = b->level ? 2 * pages(pmd_size()) : NPAGES;
	self->here = local_memory(variant->unit) | size_at_device(variant->unit, b);
	self->remote = remote_memory(variant->unit);
	self->others = local_memory(variant->other) | size_at_device(variant->other, b);
	test_setup(variant->unit, self->npages);
	self->map = test_mmap(b, self->npages);
	cpu_writes(self->map, self->npages, CPU);
}

FIXTURE_TEARDOWN(pair) { test_close(); }

#define test_other_moves(addr, npages, who)					\
	ASSERT_TRUE(moves(self->other, addr, npages, who))
#define test_other_sees(addr, npages, sight)					\
	ASSERT_TRUE(sees(self->other, addr, npages, sight))

TEST_F(pair, snapshot)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_cmd_snapshot(self->map, self->npages, self->here);
	test_other_sees(self->map, self->npages, self->remote);
	test_cmd_snapshot(self->map, self->npages, self->here);
}

/* A request for private memory of another device's has it back from there. */
TEST_F(pair, other_reads)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_other_reads(self->map, self->npages, CPU);
	test_entries(self->map, self->npages, PM_PRESENT, self->npages);
	test_cmd_read(self->map, self->npages, CPU);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

TEST_F(pair, other_writes)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_other_writes(self->map, self->npages, CHILD);
	test_cmd_read(self->map, self->npages, CHILD);
	test_cmd_write(self->map, self->npages, DEVICE);
	test_other_reads(self->map, self->npages, DEVICE);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, DEVICE));
}

/* One page asked for is no reason to have all back. */
TEST_F(pair, other_reads_one_page)
{
	size_t granule = self->here & SEES_PMD ? self->npages / 2 : 1;
	size_t due = is_coherent(variant->unit) ? self->npages : granule;

	test_cmd_to_dev(self->map, self->npages, CPU);
	test_other_reads(at(self->map, 7), 1, CPU);
	test_entries(self->map, self->npages, PM_PRESENT, due);
	test_cmd_read(self->map, self->npages, CPU);
}

/* What one device has, the other does not take. */
TEST_F(pair, other_wants_it)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_err(ENOENT, _test_cmd_to_dev(self->other, self->map, self->npages));
	EXPECT_EQ(0ULL, answer.cpages);
	ASSERT_TRUE(moves_back(self->other, self->map, self->npages, 0));
	test_cmd_snapshot(self->map, self->npages, self->here);
	test_cmd_read(self->map, self->npages, CPU);
}

TEST_F(pair, handed_over)
{
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_cmd_write(self->map, self->npages, DEVICE);
	test_cmd_to_sys(self->map, self->npages, self->npages);
	test_other_moves(self->map, self->npages, DEVICE);
	test_other_writes(self->map, self->npages, CHILD);
	ASSERT_TRUE(moves_back(self->other, self->map, self->npages, self->npages));
	test_cmd_to_dev(self->map, self->npages, CHILD);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CHILD));
}

TEST_F(pair, half_each)
{
	size_t half = self->npages / 2;
	char *second = at(self->map, half);

	test_cmd_to_dev(self->map, half, CPU);
	test_other_moves(second, half, CPU);
	test_cmd_snapshot(self->map, half, self->here);
	test_other_sees(second, half, self->others);
	test_cmd_snapshot(second, half, remote_memory(variant->other));
	test_other_sees(self->map, half, self->remote);
	test_cmd_read(self->map, self->npages, CPU);
	test_other_reads(self->map, self->npages, CPU);
	test_other_writes(self->map, self->npages, CHILD);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CHILD));
}

/* Every page the neighbour of one at the other device. */
TEST_F(pair, turn_about)
{
	size_t n = self->npages / 10;

	for (size_t i = 0; i < 10; i += 2) {
		test_cmd_to_dev(at(self->map, i * n), n, CPU);
		test_other_moves(at(self->map, (i + 1) * n), n, CPU);
	}
	test_err_to_dev(ENOENT, self->map, self->npages);
	EXPECT_EQ((__u64)n, answer.cpages);
	test_cmd_to_sys(self->map, 10 * n, 5 * n);
	test_cmd_read(self->map, self->npages, CPU);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

TEST_F(pair, one_closes)
{
	size_t half = self->npages / 2;

	test_cmd_to_dev(self->map, half, CPU);
	test_other_moves(at(self->map, half), half, CPU);
	ASSERT_EQ(0, close(self->fd));
	test_other_sees(self->map, half, SEES_WRITE | (self->here & SEES_PMD));
	test_other_sees(at(self->map, half), half, self->others);
	test_other_reads(self->map, self->npages, CPU);
}

/* The other may be at it, for as long as it takes: then it is tried again. */
static bool writes_own(struct worker *worker, size_t page)
{
	int ret;

	do {
		ret = _test_cmd_write(worker->dev, at(worker->map, page), 1, worker->who);
	} while (ret && errno == EBUSY);
	return done(ret);
}

static bool reads_own(struct worker *worker, size_t page)
{
	int ret;

	do {
		ret = _test_cmd_read(worker->dev, at(worker->map, page), 1);
	} while (ret && errno == EBUSY);
	return done(ret) && holds(mirror, at(worker->map, page), 1, worker->who);
}

/* Wants all of the memory, and writes to every other page. */
static bool contends(struct worker *worker)
{
	for (int i = 0; i < ROUNDS; i++) {
		if (!sends(worker))
			return done(-1);
		for (size_t j = worker->first; j < worker->npages; j += worker->step)
			if (!writes_own(worker, j) || !reads_own(worker, j))
				return false;
	}
	return true;
}

static bool page_is_of(char *map, size_t page, enum writer who)
{
	return cpu_sees(at(map, page), 1, who);
}

TEST_F(pair, contend)
{
	size_t n = variant->b.level ? 20 : self->npages;
	struct worker workers[] = {
		{ contends, self->fd, self->map, n, 0, 2, DEVICE },
		{ contends, self->other, self->map, n, 1, 2, CHILD },
	};

	ASSERT_TRUE(work_at_once(workers, ARRAY_SIZE(workers)));
	for (size_t i = 0; i < n; i++)
		ASSERT_TRUE(page_is_of(self->map, i, i & 1 ? CHILD : DEVICE));
	ASSERT_TRUE(cpu_sees(at(self->map, n), self->npages - n, CPU));
}

/*
 * Two files of one device: what moved through one of them is at the device for
 * both, and comes back with that one.
 */
FIXTURE(files)
{
	int fd, other, pagemap;
	char *map;
	unsigned char here;
};

FIXTURE_VARIANT(files)
{
	int unit;
};

FIXTURE_VARIANT_ADD(files, private) { .unit = PRIVATE_ONE };
FIXTURE_VARIANT_ADD(files, coherent) { .unit = COHERENT_ONE };

FIXTURE_SETUP(files)
{
	if (is_absent(variant->unit))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	self->other = test_open(variant->unit);
	self->here = local_memory(variant->unit);
	test_setup(variant->unit, NPAGES);
	self->map = test_mmap(&anon, NPAGES);
	cpu_writes(self->map, NPAGES, CPU);
}

FIXTURE_TEARDOWN(files) { test_close(); }

TEST_F(files, share_device_memory)
{
	test_cmd_to_dev(self->map, NPAGES, CPU);
	test_other_sees(self->map, NPAGES, self->here);
	test_other_writes(self->map, NPAGES, CHILD);
	test_other_sees(self->map, NPAGES, self->here);
	test_cmd_read(self->map, NPAGES, CHILD);
	test_faults(0);
	ASSERT_TRUE(moves_back(self->other, self->map, NPAGES, NPAGES));
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, CHILD));
}

TEST_F(files, one_closes)
{
	test_cmd_to_dev(self->map, 40, CPU);
	test_other_moves(at(self->map, 40), NPAGES - 40, CPU);
	ASSERT_EQ(0, close(self->fd));
	test_other_sees(self->map, 40, SEES_WRITE);
	test_other_sees(at(self->map, 40), NPAGES - 40, self->here);
	test_other_reads(self->map, NPAGES, CPU);
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, CPU));
}

TEST_F(files, one_releases)
{
	test_cmd_to_dev(self->map, 40, CPU);
	test_other_moves(at(self->map, 40), NPAGES - 40, CPU);
	test_cmd_release();
	test_cmd_snapshot(self->map, 40, SEES_WRITE);
	test_cmd_snapshot(at(self->map, 40), NPAGES - 40, self->here);
	ASSERT_EQ(0, close(self->fd));
	test_other_sees(at(self->map, 40), NPAGES - 40, self->here);
}

/* A child's file is another one still, and goes with the child. */
TEST_F(files, child_closes)
{
	pid_t pid;
	int hold;

	test_cmd_to_dev(self->map, 40, CPU);
	pid = test_fork_held(&hold);
	if (!pid) {
		int dev = open_device(variant->unit);

		_exit(!moves(dev, at(self->map, 40), NPAGES - 40, CPU) || close(dev) ||
		      !sees(self->other, self->map, 40, read_only(self->here)));
	}

	ASSERT_TRUE(child_agrees(pid, hold));
	test_cmd_snapshot(self->map, 40, read_only(self->here));
	test_cmd_snapshot(at(self->map, 40), NPAGES - 40, SEES_READ);
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, CPU));
}

/*
 * Exclusive access: the device has the page for itself, until somebody else
 * comes for it.
 */
FIXTURE(exclusive)
{
	int fd, other, pagemap;
	char *map;
};

FIXTURE_VARIANT(exclusive)
{
	int unit, other;
};

FIXTURE_VARIANT_ADD(exclusive, private) { .unit = PRIVATE_ONE, .other = PRIVATE_TWO };
FIXTURE_VARIANT_ADD(exclusive, coherent) { .unit = COHERENT_ONE, .other = COHERENT_TWO };
FIXTURE_VARIANT_ADD(exclusive, private_twice) { .unit = PRIVATE_ONE, .other = PRIVATE_ONE };

FIXTURE_SETUP(exclusive)
{
	if (is_absent(variant->unit))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	self->other = test_open(variant->other);
	test_setup(variant->unit, NPAGES);
	self->map = test_mmap(&anon, NPAGES);
	cpu_writes(self->map, NPAGES, CPU);
}

FIXTURE_TEARDOWN(exclusive) { test_close(); }

/* The CPU has no access, and a snapshot leaves that as it is. */
TEST_F(exclusive, gained)
{
	test_exclusive(self->map, NPAGES, 0);
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_exclusive(self->map, NPAGES, NPAGES);
	test_entries(self->map, NPAGES, PM_PRESENT, 0);
	test_cmd_snapshot(self->map, NPAGES, SEES_NONE);
	test_exclusive(self->map, NPAGES, NPAGES);
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, CPU));
}

TEST_F(exclusive, gained_again)
{
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_exclusive(self->map, NPAGES, NPAGES);
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, CPU));
	test_exclusive(self->map, NPAGES, 0);
}

TEST_F(exclusive, gained_in_part)
{
	test_cmd_exclusive(at(self->map, 40), 10, CPU);
	test_exclusive(self->map, NPAGES, 10);
	test_exclusive(at(self->map, 40), 10, 10);
	test_cmd_snapshot(self->map, 40, SEES_WRITE);
	test_cmd_snapshot(at(self->map, 50), NPAGES - 50, SEES_WRITE);
	test_cmd_read(self->map, NPAGES, CPU);
}

TEST_F(exclusive, read_by_device)
{
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_cmd_read(self->map, NPAGES, CPU);
	test_faults(0);
	test_exclusive(self->map, NPAGES, NPAGES);
}

TEST_F(exclusive, written_by_device)
{
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_cmd_write(self->map, NPAGES, DEVICE);
	test_faults(0);
	test_exclusive(self->map, NPAGES, NPAGES);
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, DEVICE));
}

/* One page touched is one page lost. */
TEST_F(exclusive, read_by_cpu)
{
	test_cmd_exclusive(self->map, NPAGES, CPU);
	ASSERT_TRUE(cpu_sees(at(self->map, 33), 1, CPU));
	test_exclusive(self->map, NPAGES, NPAGES - 1);
	test_exclusive(at(self->map, 33), 1, 0);
	test_cmd_snapshot(at(self->map, 33), 1, SEES_WRITE);
	test_cmd_read(self->map, NPAGES, CPU);
	test_exclusive(self->map, 33, 33);
}

TEST_F(exclusive, written_by_cpu)
{
	test_cmd_exclusive(self->map, NPAGES, CPU);
	cpu_writes(at(self->map, 33), 1, CHILD);
	test_exclusive(self->map, NPAGES, NPAGES - 1);
	test_cmd_read(at(self->map, 33), 1, CHILD);
	test_cmd_write(at(self->map, 33), 1, DEVICE);
	ASSERT_TRUE(cpu_sees(at(self->map, 33), 1, DEVICE));
}

TEST_F(exclusive, touched_by_kernel)
{
	int mem = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);

	ASSERT_GE(mem, 0);
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_cmd_write(self->map, NPAGES, DEVICE);
	ASSERT_TRUE(file_holds_at(mem, (uintptr_t)self->map, self->map, NPAGES, DEVICE));
	test_exclusive(self->map, NPAGES, 0);
}

TEST_F(exclusive, read_by_other)
{
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_cmd_write(self->map, NPAGES, DEVICE);
	test_other_reads(at(self->map, 33), 1, DEVICE);
	test_exclusive(self->map, NPAGES, NPAGES - 1);
	test_other_writes(self->map, NPAGES, CHILD);
	test_exclusive(self->map, NPAGES, 0);
	test_cmd_read(self->map, NPAGES, CHILD);
}

TEST_F(exclusive, gained_by_other)
{
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_cmd_write(self->map, NPAGES, DEVICE);
	ASSERT_TRUE(seizes(self->other, self->map, NPAGES, DEVICE));
	test_exclusive(self->map, NPAGES, 0);
	ASSERT_EQ(NPAGES, count_exclusive(self->other, self->map, NPAGES));
	test_cmd_read(self->map, NPAGES, DEVICE);
	ASSERT_EQ(0UL, count_exclusive(self->other, self->map, NPAGES));
}

/* A device that merely had the memory mapped has to learn of it, too. */
TEST_F(exclusive, taken_by_other)
{
	test_cmd_write(self->map, NPAGES, DEVICE);
	ASSERT_TRUE(seizes(self->other, self->map, NPAGES, DEVICE));
	test_other_writes(self->map, NPAGES, CHILD);
	ASSERT_EQ(NPAGES, count_exclusive(self->other, self->map, NPAGES));
	test_cmd_read(self->map, NPAGES, CHILD);
	test_faults(1);
	ASSERT_EQ(0UL, count_exclusive(self->other, self->map, NPAGES));
}

/* The child gets what the device wrote before, and nothing of what it writes after. */
TEST_F(exclusive, forked)
{
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_cmd_write(self->map, NPAGES, CHILD);
	test_fork_witness(self->map, NPAGES, CHILD);

	test_exclusive(self->map, NPAGES, 0);
	test_cmd_write(self->map, NPAGES, DEVICE);
	test_witness_agrees();
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, DEVICE));
}

/* What is shared with a child is copied before anybody has it for himself. */
TEST_F(exclusive, forked_before)
{
	test_fork_witness(self->map, NPAGES, CPU);

	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_cmd_write(self->map, NPAGES, DEVICE);
	test_faults(0);
	test_exclusive(self->map, NPAGES, NPAGES);
	test_witness_agrees();
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, DEVICE));
}

TEST_F(exclusive, made_read_only)
{
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_mprotect(self->map, NPAGES, PROT_READ);
	test_exclusive(self->map, NPAGES, 0);
	test_err_write(EPERM, self->map, NPAGES);
	test_cmd_read(self->map, NPAGES, CPU);
	test_err_exclusive(EPERM, self->map, NPAGES);
	test_mprotect(self->map, NPAGES, PROT_READ | PROT_WRITE);
	test_cmd_exclusive(self->map, NPAGES, CPU);
}

TEST_F(exclusive, access_taken)
{
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_mprotect(self->map, NPAGES, PROT_NONE);
	test_exclusive(self->map, NPAGES, 0);
	test_err_access(EFAULT, self->map, NPAGES);
	test_err_exclusive(EFAULT, self->map, NPAGES);
	test_mprotect(self->map, NPAGES, PROT_READ | PROT_WRITE);
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, CPU));
}

TEST_F(exclusive, unmapped)
{
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_munmap(at(self->map, 40), NPAGES - 40);
	test_exclusive(self->map, NPAGES, 40);
	test_err_access(EFAULT, self->map, NPAGES);
	test_err_exclusive(EFAULT, self->map, NPAGES);
	test_exclusive(self->map, 40, 40);
	ASSERT_TRUE(cpu_sees(self->map, 40, CPU));
}

TEST_F(exclusive, discarded)
{
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_madvise(self->map, NPAGES, MADV_DONTNEED);
	test_exclusive(self->map, NPAGES, 0);
	test_cmd_read(self->map, NPAGES, NOBODY);
	test_cmd_exclusive(self->map, NPAGES, NOBODY);
}

TEST_F(exclusive, moved)
{
	char *to = another_place(NPAGES * psize(), 3);

	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_mremap(self->map, NPAGES, to, 0);
	test_exclusive(self->map, NPAGES, 0);
	test_exclusive(to, NPAGES, 0);
	test_err_access(EFAULT, self->map, NPAGES);
	ASSERT_TRUE(holds(to, self->map, NPAGES, CPU));
}

TEST_F(exclusive, not_paged_out)
{
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_cmd_write(self->map, NPAGES, DEVICE);
	test_madvise(self->map, NPAGES, MADV_PAGEOUT);
	test_exclusive(self->map, NPAGES, NPAGES);
	test_cmd_read(self->map, NPAGES, DEVICE);
	test_faults(0);
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, DEVICE));
}

TEST_F(exclusive, swapped_out_before)
{
	ASSERT_TRUE(stay_on_this_cpu());
	if (!page_out(self->pagemap, self->map, NPAGES))
		SKIP(return, "no swap, or not enough of it");
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_cmd_write(self->map, NPAGES, DEVICE);
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, DEVICE));
	ASSERT_TRUE(page_out(self->pagemap, self->map, NPAGES));
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, DEVICE));
}

/* A page that the CPU has no access to does not move. */
TEST_F(exclusive, then_to_dev)
{
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_cmd_write(self->map, NPAGES, DEVICE);
	test_err_to_dev(ENOENT, self->map, NPAGES);
	test_cmd_read(self->map, NPAGES, DEVICE);
	test_cmd_to_dev(self->map, NPAGES, DEVICE);
	test_cmd_snapshot(self->map, NPAGES, local_memory(variant->unit));
	test_exclusive(self->map, NPAGES, 0);
}

TEST_F(exclusive, at_device_before)
{
	test_cmd_to_dev(self->map, NPAGES, CPU);
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_exclusive(self->map, NPAGES, NPAGES);
	test_cmd_snapshot(self->map, NPAGES, SEES_NONE);
	test_cmd_write(self->map, NPAGES, DEVICE);
	test_faults(0);
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, DEVICE));
}

TEST_F(exclusive, release)
{
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_cmd_write(self->map, NPAGES, DEVICE);
	test_cmd_release();
	test_exclusive(self->map, NPAGES, 0);
	test_cmd_read(self->map, NPAGES, DEVICE);
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, DEVICE));
}

TEST_F(exclusive, close)
{
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_cmd_write(self->map, NPAGES, DEVICE);
	ASSERT_EQ(0, close(self->fd));
	test_other_reads(self->map, NPAGES, DEVICE);
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, DEVICE));
}

TEST_F(exclusive, read_only_page_in_range)
{
	test_mprotect(at(self->map, 40), 1, PROT_READ);
	test_err_exclusive(EPERM, self->map, NPAGES);
	test_exclusive(at(self->map, 40), NPAGES - 40, 0);
	test_cmd_exclusive(at(self->map, 41), NPAGES - 41, CPU);
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, CPU));
}

/* Takes all of the memory again and again, and writes to every other page. */
static bool contends_for_all(struct worker *worker)
{
	for (int i = 0; i < ROUNDS; i++) {
		if (_test_cmd_exclusive(worker->dev, worker->map, worker->npages) &&
		    errno != EBUSY && errno != ENOENT)
			return done(-1);
		for (size_t j = worker->first; j < worker->npages; j += worker->step)
			if (!writes_own(worker, j) || !reads_own(worker, j))
				return false;
	}
	return true;
}

TEST_F(exclusive, contend)
{
	struct worker workers[] = {
		{ contends_for_all, self->fd, self->map, 20, 0, 2, DEVICE },
		{ contends_for_all, self->other, self->map, 20, 1, 2, CHILD },
	};

	ASSERT_TRUE(work_at_once(workers, ARRAY_SIZE(workers)));
	for (size_t i = 0; i < 20; i++)
		ASSERT_TRUE(page_is_of(self->map, i, i & 1 ? CHILD : DEVICE));
	ASSERT_TRUE(cpu_sees(at(self->map, 20), NPAGES - 20, CPU));
}

/*
 * userfaultfd and device memory: what user space forbids the CPU it forbids the
 * device.
 */
FIXTURE(uffd_devmem)
{
	int fd, pagemap, uffd;
	char *map;
	unsigned char here;
};

FIXTURE_VARIANT(uffd_devmem)
{
	int unit;
};

FIXTURE_VARIANT_ADD(uffd_devmem, private) { .unit = PRIVATE_ONE };
FIXTURE_VARIANT_ADD(uffd_devmem, coherent) { .unit = COHERENT_ONE };

FIXTURE_SETUP(uffd_devmem)
{
	if (is_absent(variant->unit))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	self->uffd = uffd_open();
	if (uffd_lacks(self->uffd, &anon))
		SKIP(return, "%s", uffd_lacks(self->uffd, &anon));
	self->here = local_memory(variant->unit);
	test_setup(variant->unit, NPAGES);
	self->map = test_mmap(&anon, NPAGES);
}

FIXTURE_TEARDOWN(uffd_devmem)
{
	close(self->uffd);
	test_close();
}

/* Where user space has to bring the page, the device does not. */
TEST_F(uffd_devmem, missing)
{
	test_uffd_missing(self->map, NPAGES);
	ASSERT_TRUE(serve_faults(self->uffd, 1));
	test_err_to_dev(ENOENT, self->map, NPAGES);
	test_entries(self->map, NPAGES, POPULATED, 0);
	EXPECT_EQ(0UL, served);
	test_cmd_read_unlocked(self->map, NPAGES, UFFD);
	test_cmd_to_dev(self->map, NPAGES, UFFD);
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, UFFD));
}

TEST_F(uffd_devmem, write_protected)
{
	cpu_writes(self->map, NPAGES, CPU);
	test_cmd_to_dev(self->map, NPAGES, CPU);
	test_uffd_wp(self->map, NPAGES);
	test_uffd_protect(self->map, 40);
	test_cmd_snapshot(self->map, 40, read_only(self->here));
	test_cmd_snapshot(at(self->map, 40), NPAGES - 40, self->here);
	test_cmd_read(self->map, NPAGES, CPU);
	test_err_write(EFAULT, self->map, 40);
	test_cmd_write(at(self->map, 40), NPAGES - 40, DEVICE);
	test_faults(0);
	ASSERT_TRUE(cpu_sees(self->map, 40, CPU));
	test_uffd_unprotect(self->map, 40);
	test_cmd_write(self->map, 40, DEVICE);
}

TEST_F(uffd_devmem, write_protected_before)
{
	cpu_writes(self->map, NPAGES, CPU);
	test_uffd_wp(self->map, NPAGES);
	test_uffd_protect(self->map, NPAGES);
	test_cmd_to_dev(self->map, NPAGES, CPU);
	test_cmd_snapshot(self->map, NPAGES, read_only(self->here));
	test_entries(self->map, NPAGES, PM_UFFD_WP, NPAGES);
	test_cmd_to_sys(self->map, NPAGES, NPAGES);
	test_entries(self->map, NPAGES, PM_UFFD_WP, NPAGES);
	test_err_write(EFAULT, self->map, NPAGES);
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, CPU));
}

TEST_F(uffd_devmem, write_protected_while_exclusive)
{
	cpu_writes(self->map, NPAGES, CPU);
	test_cmd_exclusive(self->map, NPAGES, CPU);
	test_uffd_wp(self->map, NPAGES);
	test_uffd_protect(self->map, NPAGES);
	test_exclusive(self->map, NPAGES, 0);
	test_err_write(EFAULT, self->map, NPAGES);
	test_err_exclusive(EFAULT, self->map, NPAGES);
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, CPU));
	test_uffd_unprotect(self->map, NPAGES);
	test_cmd_exclusive(self->map, NPAGES, CPU);
}

/*
 * Merged pages and device memory. Which of them move is up to the kernel; that
 * all of them can be used afterwards, while ksmd goes on, is not.
 */
FIXTURE(ksm_devmem)
{
	int fd;
};

FIXTURE_VARIANT(ksm_devmem)
{
	int unit;
};

FIXTURE_VARIANT_ADD(ksm_devmem, private) { .unit = PRIVATE_ONE };
FIXTURE_VARIANT_ADD(ksm_devmem, coherent) { .unit = COHERENT_ONE };

FIXTURE_SETUP(ksm_devmem)
{
	if (access(KSM_RUN, W_OK))
		SKIP(return, "no KSM in this kernel");
	if (is_absent(variant->unit))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	self->fd = test_open(variant->unit);
	ASSERT_TRUE(make_mirror(NPAGES));
}

FIXTURE_TEARDOWN(ksm_devmem)
{
	test_close();
	ksm_stop();
}

/*
 * ksmd forgets the addresses of pages that have moved. A kernel that moves such a
 * page back does not find all of its entries, and a task that touches it hangs.
 */
TEST_F_TIMEOUT(ksm_devmem, ksmd_goes_on, 60)
{
	char *map = test_mmap(&anon, NPAGES);

	for (size_t i = 0; i < NPAGES; i++)
		fill(at(map, i), map, 1, CPU);
	test_madvise(map, NPAGES, MADV_MERGEABLE);
	ASSERT_EQ(0, ksm_start());
	ASSERT_EQ((long)NPAGES, ksm_get_self_merging_pages());
	_test_cmd_some(self->fd, HMM_DMIRROR_MIGRATE_TO_DEV, map, NPAGES, mirror);
	ASSERT_EQ(0, ksm_start());

	cpu_writes(at(map, 1), 1, CPU);
	test_cmd_write(at(map, 2), 1, DEVICE);
	_test_cmd_some(self->fd, HMM_DMIRROR_MIGRATE_TO_SYS, map, NPAGES, mirror);
	ASSERT_EQ(0, ksm_start());
	ASSERT_TRUE(cpu_sees(at(map, 1), 1, CPU));
	ASSERT_TRUE(cpu_sees(at(map, 2), 1, DEVICE));
	for (size_t i = 3; i < NPAGES; i++)
		ASSERT_TRUE(holds(at(map, i), map, 1, CPU));
	test_madvise(map, NPAGES, MADV_UNMERGEABLE);
	test_cmd_write(map, NPAGES, DEVICE);
	test_cmd_to_dev(map, NPAGES, DEVICE);
	ASSERT_TRUE(cpu_sees(map, NPAGES, DEVICE));
}

/* KSM counts the zero pages that it has placed, and those alone. */
TEST_F_TIMEOUT(ksm_devmem, zero_pages_counted, 60)
{
	char *map = test_mmap(&anon, NPAGES);

	memset(map, 0, NPAGES * psize());
	ASSERT_EQ(0, ksm_use_zero_pages());
	test_madvise(map, NPAGES, MADV_MERGEABLE);
	ASSERT_EQ(0, ksm_start());
	ASSERT_EQ((long)NPAGES, ksm_get_self_zero_pages());
	test_cmd_to_dev(map, NPAGES, NOBODY);
	ASSERT_EQ(0, ksm_get_self_zero_pages());
	ASSERT_TRUE(cpu_sees(map, NPAGES, NOBODY));
}

/*
 * PAGEMAP_SCAN and device memory: a scan that write-protects the written pages is
 * followed by one that has every page written since, and no other.
 */
FIXTURE(wp_scan)
{
	int fd, pagemap, uffd;
	char *map;
	size_t npages;
	unsigned char here;
};

FIXTURE_VARIANT(wp_scan)
{
	int unit;
	struct backing b;
};

FIXTURE_VARIANT_ADD(wp_scan, private) { .unit = PRIVATE_ONE, .b = B_ANON };
FIXTURE_VARIANT_ADD(wp_scan, private_thp) { .unit = PRIVATE_ONE, .b = B_THP };
FIXTURE_VARIANT_ADD(wp_scan, coherent) { .unit = COHERENT_ONE, .b = B_ANON };

static int uffd_open_for(__u64 features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	int uffd = syscall(__NR_userfaultfd, O_CLOEXEC);

	if (uffd < 0 || !ioctl(uffd, UFFDIO_API, &api))
		return uffd;
	close(uffd);
	return -1;
}

/*
 * How many of @npages pages PAGEMAP_SCAN takes for written. With PM_SCAN_WP_MATCHING
 * it write-protects those.
 */
static long scan_written(int pagemap, void *addr, size_t npages, __u64 flags)
{
	struct page_region *regions = calloc(npages, sizeof(*regions));
	struct pm_scan_arg arg = {
		.size = sizeof(arg),
		.flags = flags,
		.start = (uintptr_t)addr,
		.end = (uintptr_t)addr + npages * psize(),
		.vec = (uintptr_t)regions,
		.vec_len = npages,
		.category_mask = PAGE_IS_WRITTEN,
		.return_mask = PAGE_IS_WRITTEN | PAGE_IS_PRESENT,
	};
	int n = regions ? ioctl(pagemap, PAGEMAP_SCAN, &arg) : -1;
	long found = n < 0 ? -1 : 0;

	for (int i = 0; i < n; i++)
		found += (regions[i].end - regions[i].start) / psize();
	free(regions);
	return found;
}

#define test_scan(addr, npages, flags, due)					\
	ASSERT_EQ((long)(due), scan_written(self->pagemap, addr, npages, flags))

FIXTURE_SETUP(wp_scan)
{
	const struct backing *b = &variant->b;

	if (is_absent(variant->unit))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	if (lacks(b))
		SKIP(return, "%s", lacks(b));
	self->uffd = uffd_open_for(UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED);
	if (self->uffd < 0)
		SKIP(return, "no userfaultfd with asynchronous write protection");
	if (wants_thp(b))
		thp_only(pmd_order());
	self->npages = b->level ? 2 * pages(level_size(b->level)) : NPAGES;
	self->here = local_memory(variant->unit) | size_at_device(variant->unit, b);
	test_setup(variant->unit, self->npages);
	self->map = test_mmap(b, self->npages);
	test_uffd_wp(self->map, self->npages);
	cpu_writes(self->map, self->npages, CPU);
	test_cmd_to_dev(self->map, self->npages, CPU);
}

FIXTURE_TEARDOWN(wp_scan)
{
	close(self->uffd);
	test_close();
}

TEST_F(wp_scan, at_device)
{
	test_cmd_snapshot(self->map, self->npages, self->here);
	test_scan(self->map, self->npages, PM_SCAN_WP_MATCHING, self->npages);
	test_scan(self->map, self->npages, 0, 0);
	test_entries(self->map, self->npages, PM_UFFD_WP, self->npages);
	test_cmd_snapshot(self->map, self->npages, read_only(self->here));
	test_cmd_read(self->map, self->npages, CPU);
	test_scan(self->map, self->npages, 0, 0);
}

/* What the CPU reads has come back, and is protected all the same. */
TEST_F(wp_scan, cpu_reads)
{
	test_scan(self->map, self->npages, PM_SCAN_WP_MATCHING, self->npages);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
	test_scan(self->map, self->npages, 0, 0);
	test_entries(self->map, self->npages, PM_UFFD_WP, self->npages);
	cpu_writes(self->map, 1, CPU);
	test_scan(self->map, self->npages, 0, 1);
}

TEST_F(wp_scan, moved_back)
{
	test_scan(self->map, self->npages, PM_SCAN_WP_MATCHING, self->npages);
	test_cmd_to_sys(self->map, self->npages, self->npages);
	test_scan(self->map, self->npages, 0, 0);
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_scan(self->map, self->npages, 0, 0);
	test_cmd_snapshot(self->map, self->npages, read_only(self->here));
}

TEST_F(wp_scan, device_writes)
{
	test_scan(self->map, self->npages, PM_SCAN_WP_MATCHING, self->npages);
	test_cmd_write(self->map, 1, DEVICE);
	test_scan(self->map, self->npages, PM_SCAN_WP_MATCHING, 1);
	test_scan(self->map, self->npages, 0, 0);
	test_cmd_write(self->map, self->npages, DEVICE);
	test_scan(self->map, self->npages, 0, self->npages);
}

/* Of a huge page as of any other. */
TEST_F(wp_scan, in_part)
{
	size_t part = self->npages / 4;

	test_scan(self->map, part, PM_SCAN_WP_MATCHING, part);
	test_scan(self->map, self->npages, 0, self->npages - part);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
	test_scan(self->map, part, 0, 0);
	test_entries(self->map, self->npages, PM_UFFD_WP, part);
}

/*
 * A zero page that is write-protected stays: a device's new page in its place would
 * not be.
 */
FIXTURE(wp_zero)
{
	int fd, pagemap, uffd;
	char *map;
	size_t npages;
};

FIXTURE_VARIANT(wp_zero)
{
	int unit;
	struct backing b;
};

FIXTURE_VARIANT_ADD(wp_zero, private) { .unit = PRIVATE_ONE, .b = B_ANON };
FIXTURE_VARIANT_ADD(wp_zero, private_thp) { .unit = PRIVATE_ONE, .b = B_THP };
FIXTURE_VARIANT_ADD(wp_zero, coherent) { .unit = COHERENT_ONE, .b = B_ANON };

FIXTURE_SETUP(wp_zero)
{
	const struct backing *b = &variant->b;

	if (is_absent(variant->unit))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	self->uffd = uffd_open();
	if (uffd_lacks(self->uffd, b))
		SKIP(return, "%s", uffd_lacks(self->uffd, b));
	if (wants_thp(b))
		thp_only(pmd_order());
	self->npages = b->level ? 2 * pages(level_size(b->level)) : NPAGES;
	test_setup(variant->unit, self->npages);
	self->map = test_mmap(b, self->npages);
}

FIXTURE_TEARDOWN(wp_zero)
{
	close(self->uffd);
	test_close();
}

TEST_F(wp_zero, stays)
{
	cpu_touches(self->map, self->npages);
	test_uffd_wp(self->map, self->npages);
	test_uffd_protect(self->map, self->npages);
	test_err_to_dev(ENOENT, self->map, self->npages);
	test_entries(self->map, self->npages, PM_UFFD_WP, self->npages);
	test_err_write(EFAULT, self->map, 1);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, NOBODY));
	test_uffd_unprotect(self->map, self->npages);
	test_cmd_to_dev(self->map, self->npages, NOBODY);
	test_cmd_write(self->map, self->npages, DEVICE);
}

/*
 * Read-write protection and device memory: an access of the CPU or of a device,
 * of whatever kind, has to wait for who protects the page, wherever that is.
 */
FIXTURE(rwp_devmem)
{
	int fd, pagemap, uffd;
	char *map;
	size_t npages;
	size_t leaf;		/* pages that an entry maps */
	bool is_private;
};

FIXTURE_VARIANT(rwp_devmem)
{
	int unit;
	struct backing b;
};

FIXTURE_VARIANT_ADD(rwp_devmem, private) { .unit = PRIVATE_ONE, .b = B_ANON };
FIXTURE_VARIANT_ADD(rwp_devmem, private_thp) { .unit = PRIVATE_ONE, .b = B_THP };
FIXTURE_VARIANT_ADD(rwp_devmem, coherent) { .unit = COHERENT_ONE, .b = B_ANON };

static int uffd_register_rwp(int uffd, void *addr, size_t npages)
{
	struct uffdio_register range = {
		.range = { (uintptr_t)addr, npages * psize() },
		.mode = UFFDIO_REGISTER_MODE_RWP,
	};

	return ioctl(uffd, UFFDIO_REGISTER, &range);
}

static int uffd_rwprotect(int uffd, void *addr, size_t npages, bool on)
{
	struct uffdio_rwprotect rwp = {
		.range = { (uintptr_t)addr, npages * psize() },
		.mode = on ? UFFDIO_RWPROTECT_MODE_RWP : 0,
	};

	return ioctl(uffd, UFFDIO_RWPROTECT, &rwp);
}

#define test_uffd_rwp(addr, npages)						\
	ASSERT_EQ(0, uffd_register_rwp(self->uffd, addr, npages))
#define test_uffd_rwprotect(addr, npages)					\
	ASSERT_EQ(0, uffd_rwprotect(self->uffd, addr, npages, true))

/* Lifts the protection of what is accessed, and counts. */
static void *lift_all(void *arg)
{
	struct server *server = arg;
	size_t size = server->npages * psize();
	struct uffd_msg msg;

	while (read(server->uffd, &msg, sizeof(msg)) == sizeof(msg)) {
		uintptr_t addr = msg.arg.pagefault.address & ~(size - 1);

		served++;
		if (!(msg.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_RWP) ||
		    uffd_rwprotect(server->uffd, (void *)addr, server->npages, false))
			break;
	}
	return NULL;
}

static bool lift_on_access(int uffd, size_t npages)
{
	static struct server server;
	pthread_t thread;

	server.uffd = uffd;
	server.npages = npages;
	return !pthread_create(&thread, NULL, lift_all, &server);
}

FIXTURE_SETUP(rwp_devmem)
{
	const struct backing *b = &variant->b;

	if (is_absent(variant->unit))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	if (lacks(b))
		SKIP(return, "%s", lacks(b));
	self->uffd = uffd_open_for(UFFD_FEATURE_RWP);
	if (self->uffd < 0)
		SKIP(return, "no userfaultfd with read-write protection");
	if (wants_thp(b))
		thp_only(pmd_order());
	self->is_private = !is_coherent(variant->unit);
	self->leaf = pages(level_size(b->level));
	self->npages = b->level ? 2 * self->leaf : NPAGES;
	test_setup(variant->unit, self->npages);
	self->map = test_mmap(b, self->npages);
	test_uffd_rwp(self->map, self->npages);
}

FIXTURE_TEARDOWN(rwp_devmem)
{
	close(self->uffd);
	test_close();
}

/* The CPU's access brings the page back, and is told to wait then. */
TEST_F(rwp_devmem, cpu_reads)
{
	cpu_writes(self->map, self->npages, CPU);
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_uffd_rwprotect(self->map, self->npages);
	test_entries(self->map, self->npages, PM_UFFD_WP, self->npages);
	ASSERT_TRUE(lift_on_access(self->uffd, self->leaf));
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
	EXPECT_EQ(self->npages / self->leaf, served);
	test_entries(self->map, self->npages, PM_UFFD_WP, 0);
}

TEST_F(rwp_devmem, moved_back)
{
	cpu_writes(self->map, self->npages, CPU);
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_uffd_rwprotect(self->map, self->npages);
	test_cmd_to_sys(self->map, self->npages, self->npages);
	test_entries(self->map, self->npages, PM_UFFD_WP, self->npages);
	test_cmd_snapshot(self->map, self->npages, SEES_NONE);
	ASSERT_TRUE(lift_on_access(self->uffd, self->leaf));
	cpu_writes(self->map, self->npages, CPU);
	EXPECT_EQ(self->npages / self->leaf, served);
}

/* Whether what is protected moves is up to the driver: it does, and stays protected. */
TEST_F(rwp_devmem, protected_before)
{
	cpu_writes(self->map, self->npages, CPU);
	test_uffd_rwprotect(self->map, self->npages);
	_test_cmd_some(self->fd, HMM_DMIRROR_MIGRATE_TO_DEV, self->map, self->npages, mirror);
	test_entries(self->map, self->npages, PM_SWAP, self->is_private ? self->npages : 0);
	test_entries(self->map, self->npages, PM_UFFD_WP, self->npages);
	ASSERT_TRUE(lift_on_access(self->uffd, self->leaf));
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
	EXPECT_EQ(self->npages / self->leaf, served);
}

TEST_F(rwp_devmem, zero_page)
{
	cpu_touches(self->map, self->npages);
	test_uffd_rwprotect(self->map, self->npages);
	_test_cmd_some(self->fd, HMM_DMIRROR_MIGRATE_TO_DEV, self->map, self->npages, mirror);
	test_entries(self->map, self->npages, PM_UFFD_WP, self->npages);
	test_cmd_snapshot(self->map, self->npages, SEES_NONE);
	ASSERT_TRUE(lift_on_access(self->uffd, self->leaf));
	ASSERT_TRUE(cpu_sees(self->map, self->npages, NOBODY));
	EXPECT_EQ(self->npages / self->leaf, served);
}

/* A device that is let wait reads what is there; one that holds the lock does not. */
TEST_F(rwp_devmem, device_reads)
{
	cpu_writes(self->map, self->npages, CPU);
	test_cmd_to_dev(self->map, self->npages, CPU);
	test_uffd_rwprotect(self->map, self->npages);
	test_cmd_snapshot(self->map, self->npages, SEES_NONE);
	test_err_read(EFAULT, self->map, 1);
	test_err_write(EFAULT, self->map, 1);
	ASSERT_TRUE(lift_on_access(self->uffd, self->leaf));
	test_cmd_read_unlocked(self->map, self->npages, CPU);
	EXPECT_EQ(self->npages / self->leaf, served);
	test_cmd_write(self->map, self->npages, DEVICE);
}

/*
 * HMM's own calls: raw requests go in, raw outputs come out.
 */
FIXTURE(raw)
{
	int fd, pagemap;
	__u64 *pfns;
	unsigned int flags;
};

FIXTURE_VARIANT(raw)
{
	unsigned int flags;
};

FIXTURE_VARIANT_ADD(raw, locked) { .flags = 0 };
FIXTURE_VARIANT_ADD(raw, unlocked) { .flags = HMM_DMIRROR_FAULT_UNLOCKED };
FIXTURE_VARIANT_ADD(raw, each) { .flags = HMM_DMIRROR_FAULT_EACH };

#define TIMEOUT_MS	1000

/* One call of HMM for bytes from @start to @end, exclusive. */
/* How long invalidations may keep a call. Each test is a process of its own. */
static unsigned int fault_timeout = TIMEOUT_MS;

static int _test_fault_bytes(int dev, uintptr_t start, uintptr_t end, __u64 *pfns,
			     unsigned int flags, __u64 requests, __u64 mask)
{
	memset(&inside, 0, sizeof(inside));
	inside.fault.start = start;
	inside.fault.end = end;
	inside.fault.pfns = (uintptr_t)pfns;
	inside.fault.default_flags = requests;
	inside.fault.pfn_flags_mask = mask;
	inside.fault.timeout = fault_timeout;
	return _test_inside(dev, HMM_DMIRROR_OP_FAULT, flags);
}

static int _test_fault(int dev, void *addr, size_t npages, __u64 *pfns,
		       unsigned int flags, __u64 requests, __u64 mask)
{
	uintptr_t start = (uintptr_t)addr;

	return _test_fault_bytes(dev, start, start + npages * psize(), pfns, flags,
				 requests, mask);
}

/* Not by the answer that all share: somebody else's command may be under way. */
static int _test_inject(int dev, unsigned int point, unsigned int action, __u64 count)
{
	struct hmm_dmirror_test test = {
		.size = sizeof(test),
		.op = HMM_DMIRROR_OP_INJECT,
		.inject.point = point,
		.inject.action = action,
		.inject.count = count,
	};

	return ioctl(dev, HMM_DMIRROR_TEST, &test);
}

static int _test_await(int dev, unsigned int point)
{
	struct hmm_dmirror_test test = {
		.size = sizeof(test),
		.op = HMM_DMIRROR_OP_AWAIT,
		.await.point = point,
		.await.timeout = 10000,
	};

	return ioctl(dev, HMM_DMIRROR_TEST, &test);
}

static int _test_resume(int dev, unsigned int point)
{
	struct hmm_dmirror_test test = {
		.size = sizeof(test),
		.op = HMM_DMIRROR_OP_RESUME,
		.resume.point = point,
	};

	return ioctl(dev, HMM_DMIRROR_TEST, &test);
}

static void request(__u64 *pfns, size_t first, size_t n, size_t step, __u64 requests)
{
	for (size_t i = first; i < n; i += step)
		pfns[i] = requests;
}

/* Of @npages elements from @first on, are the flags in @mask just @flags? */
static bool flagged(const __u64 *pfns, size_t first, size_t npages, __u64 mask, __u64 flags)
{
	for (size_t i = first; i < first + npages; i++) {
		if ((pfns[i] & mask) == flags)
			continue;
		ksft_print_msg("element %zu: %#llx, not %#llx\n", i,
			       (unsigned long long)(pfns[i] & mask),
			       (unsigned long long)flags);
		return false;
	}
	return true;
}

static unsigned int order_of(__u64 pfn)
{
	return (pfn & HMM_DMIRROR_PFN_ORDER_MASK) >> HMM_DMIRROR_PFN_ORDER_SHIFT;
}

/*
 * Have pages [@first, @end) the orders of blocks of as many as 1 << @max pages,
 * as large as fit in there aligned? Page 0 is aligned, and @pfns is its element.
 */
static unsigned int block_order(size_t page, size_t first, size_t end, unsigned int max)
{
	for (unsigned int order = max; order > 1; order--) {
		size_t begin = page >> order << order;

		if (begin >= first && begin + (1UL << order) <= end)
			return order;
	}
	return 0;
}

static bool in_blocks(const __u64 *pfns, size_t first, size_t end, unsigned int max)
{
	for (size_t i = first; i < end; i++) {
		unsigned int order = block_order(i, first, end, max);

		if (pfns[i] & HMM_DMIRROR_PFN_VALID && order_of(pfns[i]) == order)
			continue;
		ksft_print_msg("page %zu: %#llx, not of order %u\n", i,
			       (unsigned long long)pfns[i], order);
		return false;
	}
	return true;
}

/* One mapping of @order, each of whose pages follows the one before. */
static bool in_one_piece(const __u64 *pfns, size_t npages, unsigned int order)
{
	for (size_t i = 0; i < npages; i++)
		if (order_of(pfns[i]) != order || pfns[i] != pfns[0] + i)
			return false;
	return true;
}

#define REQ_READ	HMM_DMIRROR_PFN_REQ_FAULT
#define REQ_WRITE	(HMM_DMIRROR_PFN_REQ_FAULT | HMM_DMIRROR_PFN_REQ_WRITE)
#define OUT_READ	HMM_DMIRROR_PFN_VALID
#define OUT_WRITE	(HMM_DMIRROR_PFN_VALID | HMM_DMIRROR_PFN_WRITE)
#define OUT_ERROR	HMM_DMIRROR_PFN_ERROR
#define OUT_FLAGS	(OUT_WRITE | OUT_ERROR)
#define STICKY		(HMM_DMIRROR_PFN_DMA_MAPPED | HMM_DMIRROR_PFN_P2PDMA |		\
			 HMM_DMIRROR_PFN_P2PDMA_BUS)
#define ALL_BITS	(~0ULL)

/* @fail is 0 or the errno due. */
#define test_fault(fail, addr, npages, requests, mask)				\
({										\
	int __ret = _test_fault(self->fd, addr, npages, self->pfns, self->flags,	\
				requests, mask);				\
										\
	ASSERT_EQ(fail, __ret ? errno : 0);					\
})

#define test_inject(point, action, count)					\
	ASSERT_EQ(0, _test_inject(self->fd, HMM_DMIRROR_POINT_##point,		\
				  HMM_DMIRROR_INJECT_##action, count))
#define test_await(point)							\
	ASSERT_EQ(0, _test_await(self->fd, HMM_DMIRROR_POINT_##point))
#define test_resume(point)							\
	ASSERT_EQ(0, _test_resume(self->fd, HMM_DMIRROR_POINT_##point))
#define test_stats()								\
	ASSERT_EQ(0, _test_stats(self->fd))

FIXTURE_SETUP(raw)
{
	self->fd = test_open(PRIVATE_ONE);
	if (!has_inside(self->fd))
		SKIP(return, "this device does not let anybody look inside");
	self->pagemap = test_open_pagemap();
	self->flags = variant->flags;
	ASSERT_TRUE(make_mirror(2 * pages(pmd_size())));
	self->pfns = calloc(2 * pages(pmd_size()), sizeof(*self->pfns));
	ASSERT_NE(NULL, self->pfns);
}

FIXTURE_TEARDOWN(raw) { test_close(); }

/* Each page is faulted as its own element asks: half of them not at all. */
TEST_F(raw, read_requests_by_page)
{
	char *map = test_mmap(&anon, NPAGES);

	request(self->pfns, 0, NPAGES, 2, REQ_READ);
	test_fault(0, map, NPAGES, 0, ALL_BITS);
	EXPECT_EQ(NPAGES / 2, inside.fault.faults);
	test_entries(map, NPAGES, PM_PRESENT, NPAGES / 2);
	for (size_t i = 0; i < NPAGES; i++)
		EXPECT_EQ(i & 1 ? 0 : OUT_READ, self->pfns[i] & OUT_FLAGS);
}

/* Of pages that can all be read, those are made writable that are to be. */
TEST_F(raw, write_requests_by_page)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_touches(map, NPAGES);
	request(self->pfns, 0, NPAGES, 1, REQ_READ);
	request(self->pfns, 0, NPAGES, 5, REQ_WRITE);
	test_fault(0, map, NPAGES, 0, ALL_BITS);
	EXPECT_EQ(NPAGES / 5, inside.fault.faults);
	for (size_t i = 0; i < NPAGES; i++)
		EXPECT_EQ(i % 5 ? OUT_READ : OUT_WRITE, self->pfns[i] & OUT_FLAGS);
}

TEST_F(raw, requests_for_all)
{
	char *map = test_mmap(&anon, NPAGES);

	test_fault(0, map, NPAGES, REQ_READ, 0);
	ASSERT_TRUE(flagged(self->pfns, 0, NPAGES, OUT_FLAGS, OUT_READ));
	test_fault(0, map, NPAGES, REQ_WRITE, 0);
	ASSERT_TRUE(flagged(self->pfns, 0, NPAGES, OUT_FLAGS, OUT_WRITE));
}

/* What all pages are to have, and some more than that. */
TEST_F(raw, requests_for_all_and_by_page)
{
	char *map = test_mmap(&anon, NPAGES);

	request(self->pfns, 3, NPAGES, 4, HMM_DMIRROR_PFN_REQ_WRITE);
	test_fault(0, map, NPAGES, REQ_READ, HMM_DMIRROR_PFN_REQ_WRITE);
	for (size_t i = 0; i < NPAGES; i++)
		EXPECT_EQ(i % 4 == 3 ? OUT_WRITE : OUT_READ, self->pfns[i] & OUT_FLAGS);
}

/* The mask says which bits of an element count. */
TEST_F(raw, requests_masked_out)
{
	char *map = test_mmap(&anon, NPAGES);

	request(self->pfns, 0, NPAGES, 1, REQ_WRITE);
	test_fault(0, map, NPAGES, 0, 0);
	ASSERT_TRUE(flagged(self->pfns, 0, NPAGES, ALL_BITS, 0));
	test_entries(map, NPAGES, POPULATED, 0);

	request(self->pfns, 0, NPAGES, 1, REQ_WRITE);
	test_fault(0, map, NPAGES, 0, REQ_READ);
	ASSERT_TRUE(flagged(self->pfns, 0, NPAGES, OUT_FLAGS, OUT_READ));
}

/* To write is no request if to be there is not. */
TEST_F(raw, write_alone_requests_nothing)
{
	char *map = test_mmap(&anon, NPAGES);

	request(self->pfns, 0, NPAGES, 1, HMM_DMIRROR_PFN_REQ_WRITE);
	test_fault(0, map, NPAGES, HMM_DMIRROR_PFN_REQ_WRITE, ALL_BITS);
	ASSERT_TRUE(flagged(self->pfns, 0, NPAGES, ALL_BITS, 0));
	test_entries(map, NPAGES, POPULATED, 0);
}

TEST_F(raw, arguments)
{
	uintptr_t map = (uintptr_t)test_mmap(&anon, NPAGES), page = psize();
	const uintptr_t ranges[][2] = {
		{ map, map }, { map + page, map }, { map + 1, map + page },
		{ map, map + page - 1 }, { map + 8, map + 8 + page },
		{ 0 - 2 * page, 0 - page + 1 }, { 0 - page, 0 },
	};

	for (size_t i = 0; i < ARRAY_SIZE(ranges); i++) {
		self->pfns[0] = ALL_BITS;
		errno = 0;
		EXPECT_EQ(-1, _test_fault_bytes(self->fd, ranges[i][0], ranges[i][1],
						self->pfns, self->flags, REQ_READ, 0));
		EXPECT_EQ(EINVAL, errno);
		EXPECT_EQ(ALL_BITS, self->pfns[0]);
	}
}

/* What HMM shall keep for the driver, in every pattern there is. */
static __u64 sticky(size_t page)
{
	return (__u64)(page % 8) << __builtin_ctzll(HMM_DMIRROR_PFN_P2PDMA_BUS);
}

static bool kept(const __u64 *pfns, size_t npages)
{
	for (size_t i = 0; i < npages; i++)
		if ((pfns[i] & STICKY) != sticky(i))
			return false;
	return true;
}

static void stick(__u64 *pfns, size_t npages, __u64 requests)
{
	for (size_t i = 0; i < npages; i++)
		pfns[i] = sticky(i) | requests;
}

TEST_F(raw, sticky_bits)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_writes(map, NPAGES / 2, CPU);
	stick(self->pfns, NPAGES, 0);
	test_fault(0, map, NPAGES, 0, 0);
	ASSERT_TRUE(kept(self->pfns, NPAGES));
	stick(self->pfns, NPAGES, REQ_WRITE);
	test_fault(0, map, NPAGES, 0, ALL_BITS);
	ASSERT_TRUE(kept(self->pfns, NPAGES));
	ASSERT_TRUE(flagged(self->pfns, 0, NPAGES, OUT_FLAGS, OUT_WRITE));
}

/* A failure leaves what comes after it as it was. */
TEST_F(raw, fault_fails)
{
	char *map = test_mmap(&anon, NPAGES);

	test_munmap(at(map, 60), 1);
	stick(self->pfns, NPAGES, REQ_READ);
	test_fault(EFAULT, map, NPAGES, 0, ALL_BITS);
	ASSERT_TRUE(kept(self->pfns, NPAGES));
	ASSERT_TRUE(flagged(self->pfns, 60, NPAGES - 60, OUT_FLAGS, REQ_READ));
	test_entries(map, 60, PM_PRESENT, 60);
	test_entries(at(map, 61), NPAGES - 61, POPULATED, 0);
}

TEST_F(raw, write_not_permitted)
{
	char *map = test_mmap(&anon, NPAGES);

	test_mprotect(map, NPAGES, PROT_READ);
	stick(self->pfns, NPAGES, REQ_READ);
	self->pfns[40] |= HMM_DMIRROR_PFN_REQ_WRITE;
	test_fault(EPERM, map, NPAGES, 0, ALL_BITS);
	ASSERT_TRUE(kept(self->pfns, NPAGES));
	test_entries(map, NPAGES, PM_PRESENT, 40);
}

/* Nobody's request needs what cannot be had. */
TEST_F(raw, errors_without_request)
{
	char *map = test_mmap(&anon, NPAGES);

	test_munmap(at(map, 10), 10);
	test_mprotect(at(map, 50), 10, PROT_NONE);
	request(self->pfns, 0, 10, 1, REQ_READ);
	test_fault(0, map, NPAGES, 0, ALL_BITS);
	ASSERT_TRUE(flagged(self->pfns, 0, 10, OUT_FLAGS, OUT_READ));
	ASSERT_TRUE(flagged(self->pfns, 10, 10, ALL_BITS, OUT_ERROR));
	ASSERT_TRUE(flagged(self->pfns, 20, 30, ALL_BITS, 0));
	ASSERT_TRUE(flagged(self->pfns, 50, 10, ALL_BITS, OUT_ERROR));
	ASSERT_TRUE(flagged(self->pfns, 60, 40, ALL_BITS, 0));
}

/* A huge entry is told whole, whatever part of it the range has. */
TEST_F(raw, order_at_edges)
{
	size_t huge = pages(pmd_size());
	char *map;

	if (lacks(&hugetlb))
		SKIP(return, "%s", lacks(&hugetlb));
	map = test_mmap(&hugetlb, 2 * huge);
	cpu_writes(map, 2 * huge, CPU);
	for (size_t first = 0; first < huge; first = first * 3 + 1) {
		test_fault(0, at(map, first), huge - first, 0, 0);
		ASSERT_TRUE(in_one_piece(self->pfns, huge - first, pmd_order()));
		test_fault(0, at(map, first), huge, 0, 0);
		ASSERT_TRUE(in_one_piece(self->pfns, huge - first, pmd_order()));
		ASSERT_TRUE(in_one_piece(self->pfns + huge - first, first, pmd_order()));
	}
}

/* An entry needs what any of its pages asks for, be it the last. */
TEST_F(raw, entry_answers_for_each_page)
{
	size_t huge = pages(pmd_size());
	char *map;

	if (lacks(&hugetlb))
		SKIP(return, "%s", lacks(&hugetlb));
	map = test_mmap(&hugetlb, huge);
	cpu_writes(map, huge, CPU);
	test_fork_witness(map, huge, CPU);

	request(self->pfns, 0, huge, 1, REQ_READ);
	test_fault(0, map, huge, 0, ALL_BITS);
	ASSERT_TRUE(flagged(self->pfns, 0, huge, OUT_FLAGS, OUT_READ));
	request(self->pfns, 0, huge, 1, 0);
	self->pfns[huge - 1] = REQ_WRITE;
	test_fault(0, map, huge, 0, ALL_BITS);
	ASSERT_TRUE(flagged(self->pfns, 0, huge, OUT_FLAGS, OUT_WRITE));
	test_witness_agrees();
}

/* Who owns no device memory has it brought back. */
TEST_F(raw, device_memory_of_nobody)
{
	char *map = test_mmap(&anon, NPAGES);

	cpu_writes(map, NPAGES, CPU);
	ASSERT_EQ(0, _test_cmd(self->fd, HMM_DMIRROR_MIGRATE_TO_DEV, map, NPAGES, mirror));
	test_fault(0, map, NPAGES, 0, 0);
	ASSERT_TRUE(flagged(self->pfns, 0, NPAGES, OUT_FLAGS, OUT_WRITE));

	self->flags |= HMM_DMIRROR_FAULT_NO_OWNER;
	test_fault(0, map, NPAGES, 0, 0);
	ASSERT_TRUE(flagged(self->pfns, 0, NPAGES, ALL_BITS, 0));
	test_fault(0, map, NPAGES, REQ_READ, 0);
	ASSERT_TRUE(flagged(self->pfns, 0, NPAGES, OUT_FLAGS, OUT_WRITE));
	test_entries(map, NPAGES, PM_PRESENT, NPAGES);
	test_stats();
	EXPECT_EQ(NPAGES, inside.stats.pages_in);
	EXPECT_EQ(NPAGES, inside.stats.pages_out);
	EXPECT_EQ(0, inside.stats.bytes);
}

/*
 * A gate in the midst of memory: whoever faults there meets what the test has
 * in mind for him.
 */
#define GATE		((size_t)50)

static bool put_gate(int dev, void *gate, size_t npages)
{
	return mmap(gate, npages * psize(), PROT_READ | PROT_WRITE,
		    MAP_SHARED | MAP_FIXED, dev, HMM_DMIRROR_GATE_OFFSET) == gate;
}

static char *map_with_gate(int dev, size_t npages)
{
	char *map = map_backing(&anon, NPAGES * psize(), NULL);

	if (map != MAP_FAILED && !put_gate(dev, at(map, GATE), npages))
		return MAP_FAILED;
	return map;
}

#define test_mmap_with_gate(npages)						\
({										\
	char *__map = map_with_gate(self->fd, npages);				\
										\
	ASSERT_NE(MAP_FAILED, __map);						\
	__map;									\
})

TEST_F(raw, fault_handler_fails)
{
	char *map = test_mmap_with_gate(1);

	stick(self->pfns, NPAGES, REQ_READ);
	test_inject(GATE, SIGBUS, 1);
	test_fault(EFAULT, map, NPAGES, 0, ALL_BITS);
	test_inject(GATE, HWPOISON, 1);
	test_fault(EFAULT, map, NPAGES, REQ_READ, 0);
	test_inject(GATE, OOM, 1);
	test_fault(ENOMEM, map, NPAGES, REQ_READ, 0);
	ASSERT_TRUE(kept(self->pfns, NPAGES));
	test_entries(map, NPAGES, PM_PRESENT, GATE);
	test_fault(0, map, NPAGES, REQ_READ, 0);
}

/* The lock that a fault drops is the caller's only if he lets HMM have it. */
TEST_F(raw, lock_dropped)
{
	char *map = test_mmap_with_gate(1);

	stick(self->pfns, NPAGES, REQ_WRITE);
	test_inject(GATE, DROP, 1);
	test_fault(self->flags ? 0 : EFAULT, map, NPAGES, 0, ALL_BITS);
	ASSERT_TRUE(kept(self->pfns, NPAGES));
	test_entries(map, NPAGES, PM_PRESENT, self->flags ? NPAGES : GATE);
}

TEST_F(raw, invalidated_once)
{
	char *map = test_mmap_with_gate(1);

	request(self->pfns, 0, NPAGES, 3, REQ_WRITE);
	test_inject(GATE, INVALIDATE, 1);
	request(self->pfns, GATE, GATE + 1, 1, REQ_READ);
	test_fault(0, map, NPAGES, 0, ALL_BITS);
	EXPECT_EQ(self->flags ? 1 : 2, inside.fault.tries);
	for (size_t i = 0; i < NPAGES; i++)
		if (i != GATE)
			EXPECT_EQ(i % 3 ? 0 : OUT_WRITE, self->pfns[i] & OUT_FLAGS);
	test_entries(map, NPAGES, PM_PRESENT, NPAGES / 3 + 2);
}

static long us_since(const struct timespec *began)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (now.tv_sec - began->tv_sec) * 1000000 +
	       (now.tv_nsec - began->tv_nsec) / 1000;
}

static long ms_since(const struct timespec *began)
{
	return us_since(began) / 1000;
}

/* Whoever waits for a test goes on by himself after a minute: not at once. */
static bool was_at_once(const struct timespec *began)
{
	return ms_since(began) < 30000;
}

static bool killed_at_once(pid_t pid)
{
	struct timespec began;
	int status;

	clock_gettime(CLOCK_MONOTONIC, &began);
	return !kill(pid, SIGKILL) && waitpid(pid, &status, 0) == pid &&
	       WIFSIGNALED(status) && was_at_once(&began);
}

/* Each of the gate's two pages goes when the other one comes. */
TEST_F(raw, invalidated_for_too_long)
{
	char *map = test_mmap_with_gate(2);
	struct timespec began;

	test_inject(GATE, INVALIDATE, ~0ULL);
	stick(self->pfns, NPAGES, REQ_READ);
	clock_gettime(CLOCK_MONOTONIC, &began);
	/* Steps become so short that one page does not take away the other. */
	if (self->flags & HMM_DMIRROR_FAULT_EACH) {
		test_fault(0, map, NPAGES, 0, ALL_BITS);
	} else {
		test_fault(EBUSY, map, NPAGES, 0, ALL_BITS);
		/* It is counted in jiffies. */
		EXPECT_LE(TIMEOUT_MS - 20, ms_since(&began));
	}
	EXPECT_GT(10 * TIMEOUT_MS, ms_since(&began));
	ASSERT_TRUE(kept(self->pfns, NPAGES));
}

/*
 * Races: a thread's call waits in the gate, with half of its range done, while
 * the test does something to that range.
 */
FIXTURE(race)
{
	int fd, pagemap;
	char *map;
	__u64 *pfns;
	unsigned int flags;
	__u64 requests;
	int fail;
	pthread_t thread;
};

FIXTURE_VARIANT(race)
{
	unsigned int flags;
};

FIXTURE_VARIANT_ADD(race, unlocked) { .flags = HMM_DMIRROR_FAULT_UNLOCKED };
FIXTURE_VARIANT_ADD(race, each) { .flags = HMM_DMIRROR_FAULT_EACH };

FIXTURE_SETUP(race)
{
	self->flags = variant->flags;
	self->fd = test_open(PRIVATE_ONE);
	if (!has_inside(self->fd))
		SKIP(return, "this device does not let anybody look inside");
	self->pagemap = test_open_pagemap();
	self->pfns = calloc(NPAGES, sizeof(*self->pfns));
	ASSERT_NE(NULL, self->pfns);
	ASSERT_TRUE(make_mirror(NPAGES));
	self->map = map_with_gate(self->fd, 1);
	ASSERT_NE(MAP_FAILED, self->map);
}

FIXTURE_TEARDOWN(race)
{
	test_close();
}

static void *run_race(void *arg)
{
	FIXTURE_DATA(race) * self = arg;
	int ret = _test_fault(self->fd, self->map, NPAGES, self->pfns,
			      self->flags, self->requests, ALL_BITS);

	self->fail = ret ? errno : 0;
	return NULL;
}

/* Somebody has got half way through the range, and holds no lock. */
#define test_race_begin(req)							\
({										\
	self->requests = req;							\
	test_inject(GATE, DROP_AND_WAIT, 1);					\
	ASSERT_EQ(0, pthread_create(&self->thread, NULL, run_race, self));	\
	test_await(GATE);							\
})

/* He goes on, and fails with @error unless that is 0. */
#define test_race_end(error)							\
({										\
	test_resume(GATE);							\
	ASSERT_EQ(0, pthread_join(self->thread, NULL));				\
	ASSERT_EQ(error, self->fail);						\
})

/* All is as the CPU has it now: the pages say so themselves. */
#define test_race_agrees()							\
({										\
	char __sights[NPAGES];							\
										\
	ASSERT_EQ(0, _test_cmd_snapshot(self->fd, self->map, NPAGES));		\
	memcpy(__sights, mirror, NPAGES);					\
	for (size_t i = 0; i < NPAGES; i++)					\
		EXPECT_EQ(sight_of(self->pfns[i]), __sights[i] & OUT_SIGHTS);	\
})

#define OUT_SIGHTS	(SEES_READ | SEES_WRITE)

static char sight_of(__u64 pfn)
{
	if (!(pfn & HMM_DMIRROR_PFN_VALID))
		return SEES_NONE;
	return pfn & HMM_DMIRROR_PFN_WRITE ? SEES_WRITE : SEES_READ;
}

TEST_F(race, nothing)
{
	test_race_begin(REQ_READ);
	test_race_end(0);
	EXPECT_EQ(NPAGES, inside.fault.faults);
	EXPECT_EQ(0, inside.fault.invalidations);
	test_race_agrees();
}

/* Work done before a lock was dropped is not done again. */
TEST_F(race, lock_dropped_often)
{
	test_inject(GATE, DROP, 20);
	test_fault(0, self->map, NPAGES, REQ_READ, 0);
	EXPECT_EQ(NPAGES, inside.fault.faults);
	EXPECT_EQ(1, inside.fault.tries);
}

/* The one who holds the lock hears of it at once. */
TEST_F(race, invalidated_and_told)
{
	self->flags = HMM_DMIRROR_FAULT_ONCE;
	stick(self->pfns, NPAGES, REQ_READ);
	test_inject(GATE, INVALIDATE, 1);
	test_fault(EBUSY, self->map, NPAGES, 0, ALL_BITS);
	EXPECT_EQ(1, inside.fault.tries);
	EXPECT_LE(1, inside.fault.invalidations);
	ASSERT_TRUE(kept(self->pfns, NPAGES));
}

/* Pages that nobody asked for come and go, and are not fetched back. */
TEST_F(race, discard_unrequested)
{
	cpu_writes(self->map, GATE, CPU);
	request(self->pfns, GATE, NPAGES, 1, REQ_READ);
	test_race_begin(0);
	test_madvise(self->map, GATE, MADV_DONTNEED);
	test_race_end(0);
	test_entries(self->map, GATE, POPULATED, 0);
	ASSERT_TRUE(flagged(self->pfns, 0, GATE, ALL_BITS, 0));
	test_race_agrees();
}

TEST_F(race, discard)
{
	cpu_writes(self->map, GATE, CPU);
	test_race_begin(REQ_READ);
	test_madvise(self->map, GATE, MADV_DONTNEED);
	test_race_end(0);
	ASSERT_TRUE(flagged(self->pfns, 0, GATE, OUT_FLAGS, OUT_READ));
	test_race_agrees();
}

TEST_F(race, unmap)
{
	cpu_writes(self->map, GATE, CPU);
	test_race_begin(REQ_READ);
	test_munmap(at(self->map, 10), 10);
	test_race_end(EFAULT);
}

TEST_F(race, unmap_unrequested)
{
	cpu_writes(self->map, GATE, CPU);
	request(self->pfns, GATE, NPAGES, 1, REQ_READ);
	test_race_begin(0);
	test_munmap(at(self->map, 10), 10);
	test_race_end(0);
	ASSERT_TRUE(flagged(self->pfns, 10, 10, ALL_BITS, OUT_ERROR));
}

/* What is still ahead goes, and so does what it is a part of. */
TEST_F(race, unmap_ahead)
{
	test_race_begin(REQ_READ);
	test_munmap(at(self->map, GATE + 1), 10);
	test_race_end(EFAULT);
	test_entries(self->map, GATE, PM_PRESENT, GATE);
}

/* The very place where the walk is. */
TEST_F(race, unmap_gate)
{
	test_race_begin(REQ_READ);
	test_munmap(at(self->map, GATE), 1);
	test_race_end(EFAULT);
}

TEST_F(race, replace)
{
	void *middle = at(self->map, 10);

	cpu_writes(self->map, GATE, CPU);
	test_race_begin(REQ_WRITE);
	ASSERT_EQ(middle, mmap(middle, 10 * psize(), PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
	test_race_end(0);
	test_entries(self->map, NPAGES, PM_PRESENT, NPAGES);
	test_race_agrees();
}

TEST_F(race, move)
{
	cpu_writes(self->map, GATE, CPU);
	test_race_begin(REQ_READ);
	ASSERT_NE(MAP_FAILED, mremap(self->map, 10 * psize(), 10 * psize(),
				     MREMAP_MAYMOVE | MREMAP_FIXED,
				     map_aligned(10 * psize(), psize(), PROT_NONE,
						 MAP_PRIVATE | MAP_ANONYMOUS, -1)));
	test_race_end(EFAULT);
}

TEST_F(race, write_protect)
{
	cpu_writes(self->map, GATE, CPU);
	test_race_begin(REQ_WRITE);
	test_mprotect(self->map, 10, PROT_READ);
	test_race_end(EPERM);
}

TEST_F(race, write_protect_read)
{
	cpu_writes(self->map, GATE, CPU);
	test_race_begin(REQ_READ);
	test_mprotect(self->map, 10, PROT_READ);
	test_race_end(0);
	ASSERT_TRUE(flagged(self->pfns, 0, 10, OUT_FLAGS, OUT_READ));
	ASSERT_TRUE(flagged(self->pfns, 10, GATE - 10, OUT_FLAGS, OUT_WRITE));
	test_race_agrees();
}

TEST_F(race, take_access)
{
	cpu_writes(self->map, GATE, CPU);
	test_race_begin(REQ_READ);
	test_mprotect(self->map, 10, PROT_NONE);
	test_race_end(EFAULT);
}

TEST_F(race, fork)
{
	pid_t pid;
	int hold;

	cpu_writes(self->map, GATE, CPU);
	test_race_begin(REQ_WRITE);
	pid = test_fork_held(&hold);
	if (!pid)
		_exit(!cpu_sees(self->map, GATE, CPU));
	test_race_end(0);
	ASSERT_TRUE(flagged(self->pfns, 0, GATE, OUT_FLAGS, OUT_WRITE));
	test_race_agrees();
	cpu_writes(self->map, GATE, DEVICE);
	ASSERT_TRUE(child_agrees(pid, hold));
}

TEST_F(race, swap_out)
{
	ASSERT_TRUE(stay_on_this_cpu());
	cpu_writes(self->map, GATE, CPU);
	test_race_begin(REQ_READ);
	if (!page_out(self->pagemap, self->map, GATE))
		SKIP(return, "no swap, or not enough of it");
	test_race_end(0);
	test_entries(self->map, NPAGES, PM_PRESENT, NPAGES);
	test_race_agrees();
}

TEST_F(race, migrate)
{
	cpu_writes(self->map, GATE, CPU);
	test_race_begin(REQ_WRITE);
	ASSERT_EQ(0, _test_cmd(self->fd, HMM_DMIRROR_MIGRATE_TO_DEV, self->map, GATE, mirror));
	test_race_end(0);
	test_entries(self->map, GATE, PM_SWAP, GATE);
	ASSERT_TRUE(flagged(self->pfns, 0, GATE, OUT_FLAGS, OUT_WRITE));
	ASSERT_TRUE(cpu_sees(self->map, GATE, CPU));
}

/* Whoever is killed while he waits is gone at once, and leaves no lock behind. */
TEST_F(race, kill)
{
	pid_t pid;

	test_inject(GATE, DROP_AND_WAIT, 1);
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		self->requests = REQ_READ;
		run_race(self);
		_exit(KSFT_FAIL);
	}
	test_await(GATE);
	ASSERT_TRUE(killed_at_once(pid));
	test_cmd_write(self->map, GATE, DEVICE);
	test_munmap(self->map, NPAGES);
}

/* A signal that does not kill is none of the walk's business. */
static atomic_int signals;

static void count_signal(int signal)
{
	signals++;
}

TEST_F(race, signal)
{
	struct sigaction action = { .sa_handler = count_signal };

	ASSERT_EQ(0, sigaction(SIGUSR1, &action, NULL));
	test_race_begin(REQ_READ);
	ASSERT_EQ(0, pthread_kill(self->thread, SIGUSR1));
	test_race_end(0);
	EXPECT_EQ(1, signals);
	EXPECT_EQ(NPAGES, inside.fault.faults);
	test_race_agrees();
}

/*
 * The fault took longer than the timeout, and then somebody takes away what was there:
 * the time was for nothing, and there is none left.
 */
TEST_F(race, discard_after_the_timeout)
{
	cpu_writes(self->map, GATE, CPU);
	test_race_begin(REQ_READ);
	usleep((TIMEOUT_MS + 100) * 1000);
	test_madvise(self->map, GATE, MADV_DONTNEED);
	test_race_end(EBUSY);
}

/* As run_race(), with the mmap lock held from beginning to end. */
static void *run_locked_race(void *arg)
{
	FIXTURE_DATA(race) * self = arg;

	self->flags = 0;
	return run_race(self);
}

/* The mmap lock keeps no pages in their place. */
TEST_F(race, discard_with_lock_held)
{
	cpu_writes(self->map, GATE, CPU);
	self->requests = REQ_READ;
	test_inject(GATE, WAIT, 1);
	ASSERT_EQ(0, pthread_create(&self->thread, NULL, run_locked_race, self));
	test_await(GATE);
	test_madvise(self->map, GATE, MADV_DONTNEED);
	test_race_end(0);
	EXPECT_EQ(2, inside.fault.tries);
	ASSERT_TRUE(flagged(self->pfns, 0, GATE, OUT_FLAGS, OUT_READ));
	test_race_agrees();
}

/* What somebody does to some pages, in a thread of its own, when he is let. */
struct change {
	bool (*make)(void *addr, size_t npages);
	void *addr;
	size_t npages;
	atomic_bool may_go, made;
	bool good;
	pthread_t thread;
};

static void *run_change(void *arg)
{
	struct change *change = arg;

	while (!change->may_go)
		sched_yield();
	change->good = change->make(change->addr, change->npages);
	change->made = true;
	return NULL;
}

static bool change_begins(struct change *change)
{
	return !pthread_create(&change->thread, NULL, run_change, change);
}

/* It has to wait, and is let go when the rest has come to an end. */
static bool change_waits(struct change *change)
{
	change->may_go = true;
	usleep(20000);
	return !change->made;
}

static bool change_is_good(struct change *change)
{
	return !pthread_join(change->thread, NULL) && change->good;
}

#define test_change_begin(change)						\
	ASSERT_TRUE(change_begins(change))
#define test_change_waits(change)						\
	ASSERT_TRUE(change_waits(change))
#define test_change_end(change)							\
	ASSERT_TRUE(change_is_good(change))

static bool zap(void *addr, size_t npages)
{
	return !madvise(addr, npages * psize(), MADV_DONTNEED);
}

/* Pages stay what they are until the device is done with the outputs it has. */
TEST_F(race, discard_in_use)
{
	struct change change = { .make = zap, .addr = self->map, .npages = GATE };

	cpu_writes(self->map, GATE, CPU);
	test_change_begin(&change);
	test_inject(USE, WAIT, 1);
	self->requests = REQ_READ;
	ASSERT_EQ(0, pthread_create(&self->thread, NULL, run_race, self));
	test_await(USE);
	test_change_waits(&change);
	test_resume(USE);
	ASSERT_EQ(0, pthread_join(self->thread, NULL));
	EXPECT_EQ(0, self->fail);
	EXPECT_EQ(1, inside.fault.tries);
	test_change_end(&change);
	ASSERT_TRUE(cpu_sees(self->map, GATE, NOBODY));
}

/* Whoever holds the mmap lock when he is killed does not take it with him. */
TEST_F(race, kill_with_lock_held)
{
	pid_t pid;

	test_inject(GATE, WAIT, 1);
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		self->requests = REQ_READ;
		run_locked_race(self);
		_exit(KSFT_FAIL);
	}
	test_await(GATE);
	ASSERT_TRUE(killed_at_once(pid));
	test_cmd_write(self->map, GATE, DEVICE);
	test_munmap(self->map, NPAGES);
}

/* A process can exit while a thread of it is on its way. */
TEST_F(race, exit)
{
	struct timespec began;
	int status;
	pid_t pid;

	clock_gettime(CLOCK_MONOTONIC, &began);
	test_inject(GATE, DROP_AND_WAIT, 1);
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		self->requests = REQ_READ;
		pthread_create(&self->thread, NULL, run_race, self);
		_exit(_test_await(self->fd, HMM_DMIRROR_POINT_GATE));
	}
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_TRUE(WIFEXITED(status) && !WEXITSTATUS(status));
	EXPECT_TRUE(was_at_once(&began));
	test_cmd_write(self->map, GATE, DEVICE);
	test_munmap(self->map, NPAGES);
}

/*
 * The same by what is behind the memory, and by what holds the walk up. The
 * range has three parts of a size. Of the first and the last one all pages are
 * requested, and in between just one, where the walk waits: before it is what
 * has its outputs already, behind it what has none yet. The device has all of
 * it in its page table before.
 */
enum meeting { AT_GATE, IN_UFFD };

struct midwalk {
	int fd, file, uffd;
	size_t part;		/* pages of each part */
	char *map;		/* the first part */
	char *stop;		/* where the walk waits */
	char *behind;		/* the last part */
	size_t npages;		/* of all parts */
	__u64 *pfns;
	int fail;
	__u64 tries, invalidations;
	pthread_t thread;
};

/* Whoever faults there meets the test. */
static bool midwalk_stop(struct midwalk *w, enum meeting meeting)
{
	char *middle = at(w->map, w->part);

	if (mmap(middle, w->part * psize(), PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != middle)
		return false;
	madvise(middle, w->part * psize(), MADV_NOHUGEPAGE);
	w->stop = at(middle, w->part / 2);
	if (meeting == IN_UFFD) {
		w->uffd = uffd_open();
		return !uffd_register(w->uffd, w->stop, psize(), true, false, false);
	}
	return put_gate(w->fd, w->stop, 1);
}

static bool midwalk_map(struct midwalk *w, const struct backing *b, enum meeting meeting)
{
	w->part = b->level ? pages(level_size(b->level)) : 64;
	w->npages = 3 * w->part;
	w->pfns = calloc(w->npages, sizeof(*w->pfns));
	if (!w->pfns || !make_mirror(w->npages))
		return false;
	w->map = map_backing(b, w->npages * psize(), &w->file);
	w->behind = at(w->map, 2 * w->part);
	return w->map != MAP_FAILED && midwalk_stop(w, meeting);
}

static bool midwalk_fill(struct midwalk *w)
{
	return done(_test_cmd_write(w->fd, w->map, w->part, CPU)) &&
	       done(_test_cmd_write(w->fd, w->behind, w->part, CPU));
}

static void *run_midwalk(void *arg)
{
	struct midwalk *w = arg;
	int ret = _test_fault(w->fd, w->map, w->npages, w->pfns,
			      HMM_DMIRROR_FAULT_UNLOCKED, 0, ALL_BITS);

	w->fail = ret ? errno : 0;
	w->tries = inside.fault.tries;
	w->invalidations = inside.fault.invalidations;
	return NULL;
}

static bool midwalk_meet(struct midwalk *w)
{
	struct uffd_msg msg;

	if (w->uffd)
		return read(w->uffd, &msg, sizeof(msg)) == sizeof(msg);
	return !_test_await(w->fd, HMM_DMIRROR_POINT_GATE);
}

/* @before and @behind are requested of the pages there. */
static void midwalk_request(struct midwalk *w, __u64 before, __u64 behind)
{
	request(w->pfns, 0, w->part, 1, before);
	request(w->pfns, 2 * w->part, w->npages, 1, behind);
	w->pfns[(w->stop - w->map) / psize()] = REQ_READ;
}

static bool midwalk_start(struct midwalk *w)
{
	if (!w->uffd && _test_inject(w->fd, HMM_DMIRROR_POINT_GATE,
				     HMM_DMIRROR_INJECT_DROP_AND_WAIT, 1))
		return false;
	return !pthread_create(&w->thread, NULL, run_midwalk, w) && midwalk_meet(w);
}

/* If nothing can be put there any more, the one who waits has to see that. */
static bool midwalk_serve(struct midwalk *w)
{
	struct uffdio_zeropage zero = { .range = { (uintptr_t)w->stop, psize() } };

	return !ioctl(w->uffd, UFFDIO_ZEROPAGE, &zero) ||
	       !ioctl(w->uffd, UFFDIO_WAKE, &zero.range);
}

static bool midwalk_end(struct midwalk *w)
{
	if (w->uffd ? !midwalk_serve(w) : _test_resume(w->fd, HMM_DMIRROR_POINT_GATE))
		return false;
	return !pthread_join(w->thread, NULL);
}

static bool midwalk_check(struct midwalk *w)
{
	return agrees_on(w->fd, w->map, w->npages);
}

/*
 * The outputs are what HMM finds now that nothing happens, to the last bit, and
 * what is found without HMM.
 */
static bool midwalk_agrees(struct midwalk *w)
{
	__u64 *now = calloc(w->npages, sizeof(*now));
	bool good = now && midwalk_check(w) &&
		    done(_test_fault(w->fd, w->map, w->npages, now, 0, 0, 0));

	for (size_t i = 0; good && i < w->npages; i++) {
		if (w->pfns[i] == now[i])
			continue;
		ksft_print_msg("page %zu: %#llx, not %#llx\n", i,
			       (unsigned long long)w->pfns[i], (unsigned long long)now[i]);
		good = false;
	}
	free(now);
	return good;
}

/* Are @npages pages from @addr on mapped by entries of @order? */
static bool midwalk_order(struct midwalk *w, char *addr, size_t npages, unsigned int order)
{
	const __u64 *pfns = w->pfns + (addr - w->map) / psize();

	for (size_t i = 0; i < npages; i++) {
		if (pfns[i] & OUT_READ && order_of(pfns[i]) == order)
			continue;
		ksft_print_msg("page %zu: %#llx, not of order %u\n", i,
			       (unsigned long long)pfns[i], order);
		return false;
	}
	return true;
}

static bool midwalk_blocks(struct midwalk *w, char *addr, size_t npages)
{
	size_t first = (addr - w->map) / psize();

	return in_blocks(w->pfns, first, first + npages, pmd_order());
}

static bool midwalk_flags(struct midwalk *w, char *addr, size_t npages, __u64 flags)
{
	return flagged(w->pfns, (addr - w->map) / psize(), npages, OUT_FLAGS, flags);
}

#define test_midwalk_begin(before, behind)					\
({										\
	midwalk_request(&self->w, before, behind);				\
	ASSERT_TRUE(midwalk_start(&self->w));					\
})

/* The walk goes on, fails with @error unless that is 0, and breaks nothing. */
#define test_midwalk_end(error)							\
({										\
	ASSERT_TRUE(midwalk_end(&self->w));					\
	ASSERT_EQ(error, self->w.fail);						\
	ASSERT_TRUE(midwalk_check(&self->w));					\
})
#define test_midwalk_agrees()							\
	ASSERT_TRUE(midwalk_agrees(&self->w))

/* Are outputs of @npages pages at @addr just @flags? */
#define test_midwalk_flags(addr, npages, flags)					\
	ASSERT_TRUE(midwalk_flags(&self->w, addr, npages, flags))
#define test_midwalk_order(addr, npages, order)					\
	ASSERT_TRUE(midwalk_order(&self->w, addr, npages, order))
/* Are they what is left in one piece of a huge page that PTEs map? */
#define test_midwalk_blocks(addr, npages)					\
	ASSERT_TRUE(midwalk_blocks(&self->w, addr, npages))

FIXTURE(midwalk)
{
	int fd;
	struct midwalk w;
	char *map, *behind;
	size_t part;
};

FIXTURE_VARIANT(midwalk)
{
	struct backing b;
	enum meeting meeting;
};

FIXTURE_VARIANT_ADD(midwalk, anon)
{
	.b = { .kind = ANON, .share = MAP_PRIVATE },
};

FIXTURE_VARIANT_ADD(midwalk, mthp_16k)
{
	.b = { .kind = ANON, .share = MAP_PRIVATE, .order = 2 },
};

FIXTURE_VARIANT_ADD(midwalk, mthp_64k)
{
	.b = { .kind = ANON, .share = MAP_PRIVATE, .order = 4 },
};

FIXTURE_VARIANT_ADD(midwalk, thp)
{
	.b = { .kind = ANON, .share = MAP_PRIVATE, .level = PMD },
};

FIXTURE_VARIANT_ADD(midwalk, shmem)
{
	.b = { .kind = SHMEM, .share = MAP_SHARED },
};

FIXTURE_VARIANT_ADD(midwalk, shmem_thp)
{
	.b = { .kind = SHMEM, .share = MAP_SHARED, .level = PMD },
};

FIXTURE_VARIANT_ADD(midwalk, hugetlb_pmd)
{
	.b = { .kind = HUGETLB, .share = MAP_PRIVATE, .level = PMD },
};

FIXTURE_VARIANT_ADD(midwalk, hugetlb_pmd_shared)
{
	.b = { .kind = HUGETLB, .share = MAP_SHARED, .level = PMD },
};

FIXTURE_VARIANT_ADD(midwalk, anon_uffd)
{
	.b = { .kind = ANON, .share = MAP_PRIVATE }, .meeting = IN_UFFD,
};

FIXTURE_VARIANT_ADD(midwalk, thp_uffd)
{
	.b = { .kind = ANON, .share = MAP_PRIVATE, .level = PMD }, .meeting = IN_UFFD,
};

FIXTURE_VARIANT_ADD(midwalk, shmem_uffd)
{
	.b = { .kind = SHMEM, .share = MAP_SHARED }, .meeting = IN_UFFD,
};

FIXTURE_SETUP(midwalk)
{
	const struct backing *b = &variant->b;

	if (lacks(b))
		SKIP(return, "%s", lacks(b));
	if (wants_thp(b))
		thp_only(b->order ? b->order : pmd_order());
	self->fd = test_open(PRIVATE_ONE);
	if (!has_inside(self->fd))
		SKIP(return, "this device does not let anybody look inside");
	self->w.fd = self->fd;
	ASSERT_TRUE(midwalk_map(&self->w, b, variant->meeting));
	self->map = self->w.map;
	self->behind = self->w.behind;
	self->part = self->w.part;
}

FIXTURE_TEARDOWN(midwalk)
{
	test_close();
	if (wants_thp(&variant->b))
		thp_restore_settings();
}

TEST_F(midwalk, nothing)
{
	unsigned int order = variant->b.level ? pmd_order() : variant->b.order;

	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_WRITE, REQ_WRITE);
	test_midwalk_end(0);
	EXPECT_EQ(0, self->w.invalidations);
	EXPECT_EQ(1, self->w.tries);
	test_midwalk_order(self->map, self->part, order);
	test_midwalk_order(self->behind, self->part, order);
	test_midwalk_agrees();
}

/*
 * Nothing is there when the walk begins, and what it brings is changed by a CPU.
 * A page of the pool is the process's own from the start, so it is just made
 * writable, and nobody has to be told.
 */
TEST_F(midwalk, write)
{
	bool told = variant->b.kind != HUGETLB || variant->b.share == MAP_SHARED;

	test_midwalk_begin(REQ_READ, REQ_READ);
	cpu_writes(self->map, self->part, CPU);
	cpu_writes(self->behind, self->part, CPU);
	test_midwalk_end(0);
	test_cmd_read(self->map, self->part, CPU);
	test_midwalk_flags(self->map, self->part, told ? OUT_WRITE : OUT_READ);
	test_midwalk_flags(self->behind, self->part, OUT_WRITE);
	ASSERT_TRUE(!told || midwalk_agrees(&self->w));
}

/* Content goes: private memory's with the entries, shared memory's with the file's. */
TEST_F(midwalk, discard)
{
	size_t size = self->part * psize();

	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_READ, REQ_READ);
	ASSERT_TRUE(discard(self->map, size, self->w.file, variant->b.share));
	ASSERT_TRUE(discard(self->behind, size, self->w.file, variant->b.share));
	test_midwalk_end(0);
	EXPECT_EQ(1, self->w.tries);
	test_midwalk_agrees();
	test_cmd_read(self->map, self->part, NOBODY);
	test_cmd_read(self->behind, self->part, NOBODY);
	test_midwalk_agrees();
}

/* Entries go, and shared memory is found where it was. */
TEST_F(midwalk, zap)
{
	enum writer who = variant->b.share == MAP_PRIVATE ? NOBODY : CPU;

	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_WRITE, REQ_WRITE);
	test_madvise(self->map, self->part, MADV_DONTNEED);
	test_madvise(self->behind, self->part, MADV_DONTNEED);
	test_midwalk_end(0);
	test_cmd_read(self->map, self->part, who);
	test_cmd_read(self->behind, self->part, who);
	test_midwalk_agrees();
}

/* What nobody requested does not come back. */
TEST_F(midwalk, zap_unrequested)
{
	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(0, 0);
	test_madvise(self->map, self->part, MADV_DONTNEED);
	test_madvise(self->behind, self->part, MADV_DONTNEED);
	test_midwalk_end(0);
	test_midwalk_flags(self->map, self->part, 0);
	test_midwalk_flags(self->behind, self->part, 0);
	test_midwalk_agrees();
}

/* He who waits is in nobody's way. */
TEST_F(midwalk, unmap_elsewhere)
{
	char *other;

	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_READ, REQ_READ);
	other = test_mmap(&anon, NPAGES);
	cpu_writes(other, NPAGES, CPU);
	test_munmap(other, NPAGES);
	test_midwalk_end(0);
	EXPECT_EQ(1, self->w.tries);
	test_midwalk_agrees();
}

TEST_F(midwalk, unmap_before)
{
	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_READ, REQ_READ);
	test_munmap(self->map, self->part);
	test_midwalk_end(EFAULT);
}

TEST_F(midwalk, unmap_behind)
{
	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_READ, REQ_READ);
	test_munmap(self->behind, self->part);
	test_midwalk_end(EFAULT);
}

TEST_F(midwalk, unmap_unrequested)
{
	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(0, 0);
	test_munmap(self->map, self->part);
	test_munmap(self->behind, self->part);
	test_midwalk_end(0);
	test_midwalk_flags(self->map, self->part, OUT_ERROR);
	test_midwalk_flags(self->behind, self->part, OUT_ERROR);
	test_midwalk_agrees();
}

/* The page that is being waited for. */
TEST_F(midwalk, unmap_here)
{
	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_READ, REQ_READ);
	test_munmap(self->w.stop, 1);
	test_midwalk_end(EFAULT);
}

TEST_F(midwalk, discard_here)
{
	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_READ, REQ_READ);
	test_madvise(self->w.stop, 1, MADV_DONTNEED);
	test_midwalk_end(0);
	test_midwalk_agrees();
}

TEST_F(midwalk, take_access_here)
{
	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_READ, REQ_READ);
	test_mprotect(self->w.stop, 1, PROT_NONE);
	test_midwalk_end(EFAULT);
}

/* To where nobody asks for it. */
static void *move_away(void *addr, size_t npages)
{
	void *to = map_aligned(npages * psize(), pmd_size(), PROT_NONE,
			       MAP_PRIVATE | MAP_ANONYMOUS, -1);

	return mremap(addr, npages * psize(), npages * psize(),
		      MREMAP_MAYMOVE | MREMAP_FIXED, to);
}

#define test_move_away(addr, npages)						\
({										\
	void *__to = move_away(addr, npages);					\
										\
	ASSERT_NE(MAP_FAILED, __to);						\
	__to;									\
})

TEST_F(midwalk, move_here)
{
	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_READ, REQ_READ);
	test_move_away(self->w.stop, 1);
	test_midwalk_end(EFAULT);
}

TEST_F(midwalk, move)
{
	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_READ, REQ_READ);
	test_move_away(self->map, self->part);
	test_midwalk_end(EFAULT);
}

TEST_F(midwalk, move_unrequested)
{
	void *to;

	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(0, 0);
	to = test_move_away(self->map, self->part);
	test_midwalk_end(0);
	test_midwalk_flags(self->map, self->part, OUT_ERROR);
	ASSERT_TRUE(holds(to, self->map, self->part, CPU));
	test_midwalk_agrees();
}

/* Other memory comes in the place of what the walk has looked up. */
TEST_F(midwalk, move_in)
{
	size_t size = self->part * psize();
	char *other = test_mmap(&variant->b, self->part);

	ASSERT_TRUE(midwalk_fill(&self->w));
	cpu_writes(other, self->part, CHILD);
	test_midwalk_begin(REQ_WRITE, REQ_WRITE);
	ASSERT_EQ(self->map, mremap(other, size, size, MREMAP_MAYMOVE | MREMAP_FIXED,
				    self->map));
	test_midwalk_end(0);
	ASSERT_EQ(0, _test_cmd_read(self->fd, self->map, self->part));
	ASSERT_TRUE(holds(mirror, other, self->part, CHILD));
	test_midwalk_agrees();
}

TEST_F(midwalk, replace)
{
	size_t size = self->part * psize();

	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_WRITE, REQ_WRITE);
	ASSERT_EQ(self->map, mmap(self->map, size, PROT_READ | PROT_WRITE,
				  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
	test_midwalk_end(0);
	test_cmd_read(self->map, self->part, NOBODY);
	test_midwalk_agrees();
}

TEST_F(midwalk, write_protect)
{
	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_WRITE, REQ_WRITE);
	test_mprotect(self->map, self->part, PROT_READ);
	test_midwalk_end(EPERM);
}

TEST_F(midwalk, write_protect_read)
{
	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_READ, REQ_READ);
	test_mprotect(self->map, self->part, PROT_READ);
	test_mprotect(self->behind, self->part, PROT_READ);
	test_midwalk_end(0);
	test_midwalk_flags(self->map, self->part, OUT_READ);
	test_midwalk_flags(self->behind, self->part, OUT_READ);
	test_midwalk_agrees();
}

TEST_F(midwalk, take_access)
{
	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_READ, REQ_READ);
	test_mprotect(self->map, self->part, PROT_NONE);
	test_midwalk_end(EFAULT);
}

/* What is written by these outputs reaches the child only if the two share. */
TEST_F(midwalk, fork)
{
	enum writer who = variant->b.share == MAP_PRIVATE ? CPU : DEVICE;
	pid_t pid;
	int hold;

	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_WRITE, REQ_WRITE);
	pid = test_fork_held(&hold);
	if (!pid)
		_exit(!cpu_sees(self->map, self->part, who) ||
		      !cpu_sees(self->behind, self->part, who));
	test_midwalk_end(0);
	test_midwalk_flags(self->map, self->part, OUT_WRITE);
	cpu_writes(self->map, self->part, DEVICE);
	cpu_writes(self->behind, self->part, DEVICE);
	ASSERT_TRUE(child_agrees(pid, hold));
	test_midwalk_agrees();
}

/*
 * Files end where somebody wants them to, whatever maps them.
 */
FIXTURE(midwalk_file)
{
	int fd;
	struct midwalk w;
};

FIXTURE_VARIANT(midwalk_file)
{
	struct backing b;
};

FIXTURE_VARIANT_ADD(midwalk_file, shmem)
{
	.b = { .kind = SHMEM, .share = MAP_SHARED },
};

FIXTURE_VARIANT_ADD(midwalk_file, shmem_private)
{
	.b = { .kind = SHMEM, .share = MAP_PRIVATE },
};

FIXTURE_VARIANT_ADD(midwalk_file, shmem_thp)
{
	.b = { .kind = SHMEM, .share = MAP_SHARED, .level = PMD },
};

FIXTURE_VARIANT_ADD(midwalk_file, hugetlb_pmd_shared)
{
	.b = { .kind = HUGETLB, .share = MAP_SHARED, .level = PMD },
};

FIXTURE_SETUP(midwalk_file)
{
	const struct backing *b = &variant->b;

	if (lacks(b))
		SKIP(return, "%s", lacks(b));
	if (wants_thp(b))
		thp_only(pmd_order());
	self->fd = test_open(PRIVATE_ONE);
	if (!has_inside(self->fd))
		SKIP(return, "this device does not let anybody look inside");
	self->w.fd = self->fd;
	ASSERT_TRUE(midwalk_map(&self->w, b, AT_GATE));
	ASSERT_TRUE(midwalk_fill(&self->w));
}

FIXTURE_TEARDOWN(midwalk_file)
{
	test_close();
	if (wants_thp(&variant->b))
		thp_restore_settings();
}

/* There is no page any more, and no fault brings one. */
TEST_F(midwalk_file, truncate)
{
	test_midwalk_begin(REQ_READ, REQ_READ);
	ASSERT_EQ(0, ftruncate(self->w.file, 0));
	test_midwalk_end(EFAULT);
}

TEST_F(midwalk_file, truncate_behind)
{
	test_midwalk_begin(REQ_READ, REQ_READ);
	ASSERT_EQ(0, ftruncate(self->w.file, 2 * self->w.part * psize()));
	test_midwalk_end(EFAULT);
}

TEST_F(midwalk_file, truncate_unrequested)
{
	test_midwalk_begin(0, 0);
	ASSERT_EQ(0, ftruncate(self->w.file, 0));
	test_midwalk_end(0);
	test_midwalk_flags(self->w.map, self->w.part, 0);
	test_midwalk_flags(self->w.behind, self->w.part, 0);
	test_midwalk_agrees();
}

TEST_F(midwalk_file, truncate_and_extend)
{
	test_midwalk_begin(REQ_WRITE, REQ_WRITE);
	ASSERT_EQ(0, ftruncate(self->w.file, 0));
	ASSERT_EQ(0, ftruncate(self->w.file, self->w.npages * psize()));
	test_midwalk_end(0);
	test_cmd_read(self->w.map, self->w.part, NOBODY);
	test_cmd_read(self->w.behind, self->w.part, NOBODY);
	test_midwalk_agrees();
}

/* Somebody who has the file, and not the memory, makes a hole in it. */
TEST_F(midwalk_file, punch_hole)
{
	size_t size = self->w.part * psize();
	bool whole = variant->b.level;

	test_midwalk_begin(REQ_READ, REQ_READ);
	ASSERT_EQ(0, fallocate(self->w.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			       0, whole ? size : size / 2));
	test_midwalk_end(0);
	test_midwalk_agrees();
	test_cmd_read(self->w.map, self->w.part / 2,
		      variant->b.share == MAP_PRIVATE ? CPU : NOBODY);
	test_midwalk_agrees();
}

/*
 * Transparent huge pages, split and collapsed: one that has its outputs already,
 * and one that has none yet.
 */
FIXTURE(midwalk_thp)
{
	int fd;
	struct midwalk w;
	char *map, *behind;
	size_t part;
};

FIXTURE_VARIANT(midwalk_thp)
{
	struct backing b;
};

FIXTURE_VARIANT_ADD(midwalk_thp, anon)
{
	.b = { .kind = ANON, .share = MAP_PRIVATE, .level = PMD },
};

FIXTURE_VARIANT_ADD(midwalk_thp, shmem)
{
	.b = { .kind = SHMEM, .share = MAP_SHARED, .level = PMD },
};

FIXTURE_SETUP(midwalk_thp)
{
	const struct backing *b = &variant->b;

	if (lacks(b))
		SKIP(return, "%s", lacks(b));
	thp_only(pmd_order());
	self->fd = test_open(PRIVATE_ONE);
	if (!has_inside(self->fd))
		SKIP(return, "this device does not let anybody look inside");
	self->w.fd = self->fd;
	ASSERT_TRUE(midwalk_map(&self->w, b, AT_GATE));
	self->map = self->w.map;
	self->behind = self->w.behind;
	self->part = self->w.part;
}

FIXTURE_TEARDOWN(midwalk_thp)
{
	test_close();
	thp_restore_settings();
}

/* The pages in the midst of a huge one to which something happens. */
#define PIECE		((size_t)100)
#define PIECE_PAGES	((size_t)20)

static void midwalk_request_around(struct midwalk *w, __u64 requests)
{
	midwalk_request(w, requests, requests);
	request(w->pfns, PIECE, PIECE + PIECE_PAGES, 1, 0);
}

/* The zero page comes in its place, each by itself, and a file's page is still there. */
static bool midwalk_piece_order(struct midwalk *w, char *part, bool own)
{
	size_t rest = PIECE + PIECE_PAGES;

	if (!own)
		return midwalk_order(w, part, w->part, pmd_order());
	return midwalk_blocks(w, part, PIECE) &&
	       midwalk_order(w, at(part, PIECE), PIECE_PAGES, 0) &&
	       midwalk_blocks(w, at(part, rest), w->part - rest);
}

/* What is left of a huge page that was a process's own is mapped by the page. */
TEST_F(midwalk_thp, discard_piece)
{
	char *piece = at(self->map, PIECE), *ahead = at(self->behind, PIECE);
	bool own = variant->b.kind == ANON;

	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_READ, REQ_READ);
	test_madvise(piece, PIECE_PAGES, MADV_DONTNEED);
	test_madvise(ahead, PIECE_PAGES, MADV_DONTNEED);
	test_midwalk_end(0);
	ASSERT_TRUE(midwalk_piece_order(&self->w, self->map, own));
	ASSERT_TRUE(midwalk_piece_order(&self->w, self->behind, own));
	test_cmd_read(piece, PIECE_PAGES, own ? NOBODY : CPU);
	test_cmd_read(self->map, PIECE, CPU);
	test_midwalk_agrees();
}

TEST_F(midwalk_thp, unmap_piece)
{
	size_t rest = PIECE + PIECE_PAGES;

	ASSERT_TRUE(midwalk_fill(&self->w));
	midwalk_request_around(&self->w, REQ_READ);
	ASSERT_TRUE(midwalk_start(&self->w));
	test_munmap(at(self->map, PIECE), PIECE_PAGES);
	test_midwalk_end(0);
	test_midwalk_blocks(self->map, PIECE);
	test_midwalk_flags(at(self->map, PIECE), PIECE_PAGES, OUT_ERROR);
	test_midwalk_blocks(at(self->map, rest), self->part - rest);
	test_midwalk_order(self->behind, self->part, pmd_order());
	test_midwalk_agrees();
}

TEST_F(midwalk_thp, unmap_piece_behind)
{
	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_READ, 0);
	test_munmap(at(self->behind, PIECE), PIECE_PAGES);
	test_midwalk_end(0);
	test_midwalk_order(self->map, self->part, pmd_order());
	test_midwalk_flags(at(self->behind, PIECE), PIECE_PAGES, OUT_ERROR);
	test_midwalk_agrees();
}

TEST_F(midwalk_thp, unmap_piece_requested)
{
	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_READ, REQ_READ);
	test_munmap(at(self->behind, PIECE), PIECE_PAGES);
	test_midwalk_end(EFAULT);
}

TEST_F(midwalk_thp, move_piece)
{
	size_t rest = PIECE + PIECE_PAGES;
	char *piece = at(self->map, PIECE);
	void *to;

	ASSERT_TRUE(midwalk_fill(&self->w));
	midwalk_request_around(&self->w, REQ_WRITE);
	ASSERT_TRUE(midwalk_start(&self->w));
	to = test_move_away(piece, PIECE_PAGES);
	test_midwalk_end(0);
	test_midwalk_blocks(self->map, PIECE);
	test_midwalk_blocks(at(self->map, rest), self->part - rest);
	ASSERT_TRUE(holds(to, piece, PIECE_PAGES, CPU));
	test_midwalk_agrees();
}

TEST_F(midwalk_thp, write_protect_piece)
{
	char *piece = at(self->map, PIECE), *ahead = at(self->behind, PIECE);
	size_t rest = PIECE + PIECE_PAGES;

	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_READ, REQ_READ);
	test_mprotect(piece, PIECE_PAGES, PROT_READ);
	test_mprotect(ahead, PIECE_PAGES, PROT_READ);
	test_midwalk_end(0);
	test_midwalk_blocks(self->map, PIECE);
	test_midwalk_blocks(piece, PIECE_PAGES);
	test_midwalk_blocks(ahead, PIECE_PAGES);
	test_midwalk_blocks(at(self->behind, rest), self->part - rest);
	test_midwalk_flags(self->map, PIECE, OUT_WRITE);
	test_midwalk_flags(piece, PIECE_PAGES, OUT_READ);
	test_midwalk_flags(ahead, PIECE_PAGES, OUT_READ);
	test_midwalk_agrees();
}

TEST_F(midwalk_thp, write_protect_piece_to_write)
{
	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_WRITE, REQ_WRITE);
	test_mprotect(at(self->map, PIECE), PIECE_PAGES, PROT_READ);
	test_midwalk_end(EPERM);
}

/* Reclaim takes a huge page apart, and each page comes back by itself. */
TEST_F(midwalk_thp, page_out_piece)
{
	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_READ, REQ_READ);
	test_madvise(at(self->map, PIECE), PIECE_PAGES, MADV_PAGEOUT);
	test_madvise(at(self->behind, PIECE), PIECE_PAGES, MADV_PAGEOUT);
	test_midwalk_end(0);
	test_cmd_read(self->map, self->part, CPU);
	test_cmd_read(self->behind, self->part, CPU);
	test_midwalk_agrees();
}

/* Pages that the walk had one by one are in one piece when it comes again. */
TEST_F(midwalk_thp, collapse)
{
	test_madvise(self->map, self->part, MADV_NOHUGEPAGE);
	test_madvise(self->behind, self->part, MADV_NOHUGEPAGE);
	ASSERT_TRUE(midwalk_fill(&self->w));
	test_madvise(self->map, self->part, MADV_HUGEPAGE);
	test_madvise(self->behind, self->part, MADV_HUGEPAGE);

	test_midwalk_begin(REQ_WRITE, REQ_WRITE);
	ASSERT_EQ(0, collapse(self->map, self->part));
	ASSERT_EQ(0, collapse(self->behind, self->part));
	test_midwalk_end(0);
	test_midwalk_order(self->map, self->part, pmd_order());
	test_midwalk_order(self->behind, self->part, pmd_order());
	test_cmd_read(self->map, self->part, CPU);
	test_midwalk_agrees();
}

/* Holes, which nobody requested, are filled as a huge page comes about. */
TEST_F(midwalk_thp, collapse_with_holes)
{
	test_madvise(self->map, self->part, MADV_NOHUGEPAGE);
	test_cmd_write(self->map, PIECE, CPU);
	test_madvise(self->map, self->part, MADV_HUGEPAGE);

	test_midwalk_begin(0, 0);
	ASSERT_EQ(0, collapse(self->map, self->part));
	test_midwalk_end(0);
	test_midwalk_order(self->map, self->part, pmd_order());
	test_cmd_read(self->map, PIECE, CPU);
	test_midwalk_agrees();
}

/* There and back again before the walk has seen any of it. */
TEST_F(midwalk_thp, split_and_collapse)
{
	ASSERT_TRUE(midwalk_fill(&self->w));
	test_midwalk_begin(REQ_WRITE, REQ_WRITE);
	test_madvise(at(self->map, PIECE), PIECE_PAGES, MADV_DONTNEED);
	ASSERT_EQ(0, collapse(self->map, self->part));
	test_midwalk_end(0);
	test_midwalk_order(self->map, self->part, pmd_order());
	test_midwalk_agrees();
}

/*
 * A range in steps. Each is handed over when it is found, and stays done.
 */
#define STEP		((size_t)512)
#define EACH_PAGES	(5 * STEP - 60)

FIXTURE(each)
{
	int fd, pagemap;
	char *map;
	__u64 *pfns, *others;
	unsigned int flags;
	int fail;
	pthread_t thread;
};

FIXTURE_SETUP(each)
{
	self->fd = test_open(PRIVATE_ONE);
	if (!has_inside(self->fd))
		SKIP(return, "this device does not let anybody look inside");
	self->pagemap = test_open_pagemap();
	self->flags = HMM_DMIRROR_FAULT_EACH;
	self->pfns = calloc(EACH_PAGES, sizeof(*self->pfns));
	self->others = calloc(EACH_PAGES, sizeof(*self->others));
	ASSERT_TRUE(self->pfns && self->others);
	self->map = test_mmap(&anon, EACH_PAGES);
}

FIXTURE_TEARDOWN(each) { test_close(); }

/* Steps end where their size is aligned. */
static size_t steps_of(void *addr, size_t npages)
{
	size_t first = (uintptr_t)addr / psize();

	return (first + npages - 1) / STEP - first / STEP + 1;
}

/* Several VMAs in place of @map, that allow this and that, and some pages. */
static bool patch(char *map)
{
	size_t size = EACH_PAGES * psize();

	if (mmap(map, size, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != map ||
	    madvise(map, size, MADV_NOHUGEPAGE))
		return false;
	cpu_writes(at(map, 100), 500, CPU);
	cpu_touches(at(map, 1700), 300);
	return !munmap(at(map, 700), 30 * psize()) &&
	       !mprotect(at(map, 1000), 100 * psize(), PROT_READ) &&
	       !mprotect(at(map, 1500), 100 * psize(), PROT_NONE);
}

/* As much as such pages allow. */
static void patch_request(__u64 *pfns)
{
	memset(pfns, 0, EACH_PAGES * sizeof(*pfns));
	request(pfns, 0, 700, 3, REQ_READ);
	request(pfns, 50, 700, 4, REQ_WRITE);
	request(pfns, 1000, 1100, 1, REQ_READ);
	request(pfns, 1300, 1500, 1, REQ_WRITE);
	request(pfns, 1600, EACH_PAGES, 7, REQ_WRITE);
}

static bool patch_fault(FIXTURE_DATA(each) * self, size_t first, size_t npages,
			__u64 *pfns, unsigned int flags)
{
	patch_request(pfns);
	return done(_test_fault(self->fd, at(self->map, first), npages, pfns + first,
				flags, 0, ALL_BITS));
}

/* All in one, over the same memory, to the last bit; and over memory that is like it. */
static bool each_is_alike(FIXTURE_DATA(each) * self, size_t first, size_t npages)
{
	__u64 faults;

	if (!patch(self->map) ||
	    !patch_fault(self, first, npages, self->others, HMM_DMIRROR_FAULT_UNLOCKED))
		return false;
	faults = inside.fault.faults;
	if (!patch(self->map) ||
	    !patch_fault(self, first, npages, self->pfns, HMM_DMIRROR_FAULT_EACH) ||
	    inside.fault.faults != faults ||
	    inside.fault.tries != steps_of(at(self->map, first), npages))
		return false;
	for (size_t i = first; i < first + npages; i++)
		if ((self->pfns[i] ^ self->others[i]) & OUT_FLAGS)
			return false;
	return patch_fault(self, first, npages, self->others, HMM_DMIRROR_FAULT_UNLOCKED) &&
	       !memcmp(self->pfns, self->others, EACH_PAGES * sizeof(*self->pfns)) &&
	       agrees_on(self->fd, at(self->map, first), npages);
}

/* Wherever the range begins and ends. */
TEST_F(each, as_in_one)
{
	static const size_t begins[] = { 0, 1, 511, 512, 650, 1024 };
	static const size_t ends[] = { 1025, 1536, 1999, EACH_PAGES };

	for (size_t i = 0; i < ARRAY_SIZE(begins); i++) {
		for (size_t k = 0; k < ARRAY_SIZE(ends); k++) {
			ASSERT_TRUE(each_is_alike(self, begins[i], ends[k] - begins[i]))
				TH_LOG("pages %zu to %zu", begins[i], ends[k]);
		}
	}
}

/* It leaves to HMM what these leave to HMM or to nobody. */
TEST_F(each, flags)
{
	self->flags = HMM_DMIRROR_FAULT_EACH | HMM_DMIRROR_FAULT_UNLOCKED;
	test_fault(EINVAL, self->map, EACH_PAGES, REQ_READ, 0);
	self->flags = HMM_DMIRROR_FAULT_EACH | HMM_DMIRROR_FAULT_ONCE;
	test_fault(EINVAL, self->map, EACH_PAGES, REQ_READ, 0);
	test_entries(self->map, EACH_PAGES, POPULATED, 0);
}

/* What comes before a failure is done, and what comes after it is left alone. */
#define test_each_fails(error, at_page)						\
({										\
	size_t __page = at_page, __done = __page / STEP;			\
										\
	test_fault(error, self->map, EACH_PAGES, 0, ALL_BITS);			\
	EXPECT_EQ(__done, inside.fault.tries);					\
	ASSERT_TRUE(kept(self->pfns, EACH_PAGES));				\
	ASSERT_TRUE(flagged(self->pfns, 0, __done * STEP, OUT_FLAGS, OUT_READ));	\
	test_entries(self->map, __page, PM_PRESENT, __page);			\
	test_entries(at(self->map, __page + 1), EACH_PAGES - __page - 1, POPULATED, 0);	\
})

TEST_F(each, hole)
{
	test_munmap(at(self->map, 1100), 1);
	stick(self->pfns, EACH_PAGES, REQ_READ);
	test_each_fails(EFAULT, 1100);
}

TEST_F(each, write_not_permitted)
{
	test_mprotect(self->map, EACH_PAGES, PROT_READ);
	stick(self->pfns, EACH_PAGES, REQ_READ);
	self->pfns[1600] |= HMM_DMIRROR_PFN_REQ_WRITE;
	test_each_fails(EPERM, 1600);
}

/* A step whose pages take each other away gets through when it is short enough. */
TEST_F(each, invalidated_by_its_faults)
{
	size_t gate = 2 * STEP + GATE;

	ASSERT_TRUE(put_gate(self->fd, at(self->map, gate), 2));
	test_inject(GATE, INVALIDATE, ~0ULL);
	stick(self->pfns, EACH_PAGES, REQ_READ);
	test_fault(0, self->map, EACH_PAGES, 0, ALL_BITS);
	EXPECT_LT(steps_of(self->map, EACH_PAGES), inside.fault.tries);
	ASSERT_TRUE(kept(self->pfns, EACH_PAGES));
	ASSERT_TRUE(flagged(self->pfns, 0, gate, OUT_FLAGS, OUT_READ));
	ASSERT_TRUE(flagged(self->pfns, gate, 2, OUT_FLAGS, OUT_WRITE));
	ASSERT_TRUE(flagged(self->pfns, gate + 2, EACH_PAGES - gate - 2, OUT_FLAGS, OUT_READ));
}

TEST_F(each, sticky_bits)
{
	stick(self->pfns, EACH_PAGES, REQ_WRITE);
	test_fault(0, self->map, EACH_PAGES, 0, ALL_BITS);
	EXPECT_EQ(steps_of(self->map, EACH_PAGES), inside.fault.tries);
	ASSERT_TRUE(kept(self->pfns, EACH_PAGES));
	ASSERT_TRUE(flagged(self->pfns, 0, EACH_PAGES, OUT_FLAGS, OUT_WRITE));
	test_fault(0, self->map, EACH_PAGES, 0, 0);
	ASSERT_TRUE(kept(self->pfns, EACH_PAGES));
}

static void *run_each(void *arg)
{
	FIXTURE_DATA(each) * self = arg;
	int ret = _test_fault(self->fd, self->map, EACH_PAGES, self->pfns, self->flags,
			      0, ALL_BITS);

	self->fail = ret ? errno : 0;
	return NULL;
}

/* An invalidation has that step done again that is under way, and no other. */
TEST_F(each, discard)
{
	size_t gate = 2 * STEP + GATE;

	ASSERT_TRUE(put_gate(self->fd, at(self->map, gate), 1));
	cpu_writes(self->map, gate, CPU);
	stick(self->pfns, EACH_PAGES, REQ_READ);
	test_inject(GATE, DROP_AND_WAIT, 1);
	ASSERT_EQ(0, pthread_create(&self->thread, NULL, run_each, self));
	test_await(GATE);
	test_madvise(self->map, 100, MADV_DONTNEED);
	test_madvise(at(self->map, 2 * STEP), GATE, MADV_DONTNEED);
	test_resume(GATE);
	ASSERT_EQ(0, pthread_join(self->thread, NULL));
	ASSERT_EQ(0, self->fail);
	EXPECT_EQ(steps_of(self->map, EACH_PAGES), inside.fault.tries);
	EXPECT_EQ(EACH_PAGES - gate + GATE, inside.fault.faults);
	test_entries(self->map, 100, POPULATED, 0);
	ASSERT_TRUE(kept(self->pfns, EACH_PAGES));
	ASSERT_TRUE(flagged(self->pfns, 0, EACH_PAGES, OUT_READ, OUT_READ));
	ASSERT_TRUE(agrees_on(self->fd, self->map, EACH_PAGES));
}

/*
 * A range so large that it never sits still: now and again a page of it goes. As
 * a storm is no storm when its thread does not get to run, there is a gate, too.
 * Each of its two pages goes when the other one comes, so there is no time at
 * which all of the range is there. They are in two steps.
 */
#define LARGE_PAGES	((size_t)262144)

FIXTURE(progress)
{
	int fd;
	char *map;
	size_t npages;
	__u64 *pfns;
	pthread_t storm;
};

static size_t stormy_pages;

/* How many pages have gone so far. */
static atomic_ulong stormed;

/* Stays on the first CPU there is, or on the second. False if there is none. */
static bool stay_on_cpu(int nr)
{
	cpu_set_t all, one;

	if (sched_getaffinity(0, sizeof(all), &all))
		return false;
	CPU_ZERO(&one);
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		if (!CPU_ISSET(cpu, &all) || nr--)
			continue;
		CPU_SET(cpu, &one);
		return !sched_setaffinity(0, sizeof(one), &one);
	}
	return false;
}

/*
 * On a CPU of its own, awake: a thread that slept for so short a time would be woken
 * late, and no storm at all where all of them share one CPU.
 */
static void *page_storm(void *map)
{
	bool alone = stay_on_cpu(1);
	unsigned int seed = 1;
	struct timespec began;

	while (!storm_over) {
		zap(at(map, rand_r(&seed) % stormy_pages), 1);
		stormed++;
		clock_gettime(CLOCK_MONOTONIC, &began);
		if (!alone)
			usleep(storm_pause);
		while (alone && us_since(&began) < storm_pause)
			;
	}
	return NULL;
}

/* All of it, or a quarter at least where that takes too long. */
static size_t populate(char *map)
{
	size_t npages = 0, part = LARGE_PAGES / 4;
	struct timespec began;

	clock_gettime(CLOCK_MONOTONIC, &began);
	do {
		if (madvise(at(map, npages), part * psize(), MADV_POPULATE_WRITE))
			return 0;
		npages += part;
	} while (npages < LARGE_PAGES && ms_since(&began) < 10000);
	return npages;
}

static int fault_large(FIXTURE_DATA(progress) * self, size_t npages, unsigned int flags)
{
	return _test_fault(self->fd, self->map, npages, self->pfns, flags, REQ_READ, 0);
}

/* Microseconds: as long as a call for a few pages takes some times over. */
static unsigned int storm_pace(FIXTURE_DATA(progress) * self)
{
	struct timespec began;
	unsigned int pace;

	clock_gettime(CLOCK_MONOTONIC, &began);
	for (int i = 0; i < 1000; i++)
		fault_large(self, 8, HMM_DMIRROR_FAULT_EACH);
	pace = 4 * ms_since(&began);
	return pace > 100 ? pace : 100;
}

FIXTURE_SETUP(progress)
{
	self->fd = test_open(PRIVATE_ONE);
	if (!has_inside(self->fd))
		SKIP(return, "this device does not let anybody look inside");
	ASSERT_TRUE(make_mirror(2 * STEP));
	self->pfns = calloc(LARGE_PAGES, sizeof(*self->pfns));
	ASSERT_NE(NULL, self->pfns);
	self->map = test_mmap(&anon, LARGE_PAGES);
	self->npages = populate(self->map);
	if (!self->npages)
		SKIP(return, "not enough memory");
	stormy_pages = self->npages;
	ASSERT_TRUE(put_gate(self->fd, at(self->map, STEP - 1), 2));
	test_inject(GATE, INVALIDATE, ~0ULL);
}

FIXTURE_TEARDOWN(progress) { test_close(); }

#define test_storm_begin()							\
({										\
	unsigned int __pace = storm_pace(self);					\
										\
	TH_LOG("%zu pages, one goes after each %u us", stormy_pages, __pace);	\
	ASSERT_TRUE(storm_begins(&self->storm, page_storm, self->map, __pace));	\
	ASSERT_TRUE(stay_on_cpu(0));						\
})
#define test_storm_end()							\
({										\
	storm_over = true;							\
	ASSERT_EQ(0, pthread_join(self->storm, NULL));				\
})

/*
 * Not a single step has to wait for longer than a second, which TIMEOUT_MS is, and
 * all of them get through, until it has stormed long enough to call it a storm.
 */
TEST_F(progress, each)
{
	unsigned long before, during = 0;
	struct timespec began;
	long us = 0;
	int calls;

	test_storm_begin();
	for (calls = 0; during < 100 && us < 30000000; calls++) {
		before = stormed;
		clock_gettime(CLOCK_MONOTONIC, &began);
		ASSERT_TRUE(done(fault_large(self, self->npages, HMM_DMIRROR_FAULT_EACH)));
		us += us_since(&began);
		during += stormed - before;
	}
	ASSERT_LE(100, during);
	EXPECT_GT(30000000, us);
	EXPECT_LT(0, inside.fault.invalidations);
	TH_LOG("%d calls, %ld us each, a page gone every %ld us, %llu tries in the last",
	       calls, us / calls, us / (long)during, inside.fault.tries);
	test_storm_end();
	ASSERT_TRUE(flagged(self->pfns, 0, self->npages, OUT_READ, OUT_READ));
	ASSERT_TRUE(agrees_on(self->fd, self->map, self->npages));
}

/*
 * The device's page table has nothing that has gone before it was entered. Reading
 * goes from page to page, which the gate would let nobody do.
 */
TEST_F(progress, read_unlocked)
{
	test_inject(GATE, NOTHING, 1);
	stormy_pages = 2 * STEP;
	cpu_writes(self->map, stormy_pages, DEVICE);
	test_storm_begin();
	for (int i = 0; i < 100; i++) {
		test_cmd_release();
		ASSERT_TRUE(done(_test_cmd_read_unlocked(self->fd, self->map, stormy_pages)));
		ASSERT_TRUE(pages_are_whole(self->map, stormy_pages));
		ASSERT_TRUE(agrees(self->fd));
	}
	test_storm_end();
}

/* Whoever wants all of it at one time tries in vain, and lets others wait meanwhile. */
TEST_F(progress, all_at_one_time)
{
	test_storm_begin();
	ASSERT_EQ(-1, fault_large(self, self->npages, 0));
	ASSERT_EQ(EBUSY, errno);
	EXPECT_LT(1, inside.fault.tries);
	test_storm_end();
}

/* A call that faults a large VMA in, and who wants to change another part of that. */

FIXTURE(bystander)
{
	int fd;
	char *map;
	__u64 *pfns;
};

FIXTURE_VARIANT(bystander)
{
	size_t npages;
	unsigned int flags;
};

FIXTURE_VARIANT_ADD(bystander, unlocked) {
	.npages = 32768, .flags = HMM_DMIRROR_FAULT_UNLOCKED,
};

FIXTURE_VARIANT_ADD(bystander, each) {
	.npages = 32768, .flags = HMM_DMIRROR_FAULT_EACH,
};

/* What the call under test has as its arguments. */
static struct {
	int fd;
	char *map;
	size_t npages;
	__u64 *pfns;
	unsigned int flags;
	atomic_int began;
	long us;
	int ret;
} large_call;

static void *fault_large_vma(void *unused)
{
	struct timespec began;

	clock_gettime(CLOCK_MONOTONIC, &began);
	large_call.began = 1;
	large_call.ret = done(_test_fault(large_call.fd, large_call.map, large_call.npages,
					  large_call.pfns, large_call.flags, REQ_WRITE, 0));
	large_call.us = us_since(&began);
	return unused;
}

FIXTURE_SETUP(bystander)
{
	self->fd = test_open(PRIVATE_ONE);
	if (!has_inside(self->fd))
		SKIP(return, "this device does not let anybody look inside");
	ASSERT_TRUE(make_mirror(2 * STEP));
	self->pfns = calloc(variant->npages, sizeof(*self->pfns));
	ASSERT_NE(NULL, self->pfns);
	self->map = test_mmap(&anon, variant->npages);
	ASSERT_EQ(0, madvise(self->map, variant->npages * psize(), MADV_NOHUGEPAGE));
	/* The first fault of all needs the mmap lock. */
	*self->map = 1;
}

FIXTURE_TEARDOWN(bystander) { test_close(); }

/*
 * The call goes on for some seconds without anybody else. Whoever protects the last
 * page of the VMA gets in after what a page table covers, and the call gets done.
 */
TEST_F(bystander, protects_last_page)
{
	char *last = at(self->map, variant->npages - 1);
	struct timespec began;
	pthread_t thread;
	long us;

	large_call.fd = self->fd;
	large_call.map = self->map;
	large_call.npages = variant->npages - 1;
	large_call.pfns = self->pfns;
	large_call.flags = variant->flags;
	large_call.began = 0;
	/* The mprotect() makes a walk void, which took its time. */
	fault_timeout = 60 * TIMEOUT_MS;
	ASSERT_EQ(0, pthread_create(&thread, NULL, fault_large_vma, NULL));
	while (!large_call.began)
		usleep(100);
	usleep(20000);
	clock_gettime(CLOCK_MONOTONIC, &began);
	ASSERT_EQ(0, mprotect(last, psize(), PROT_READ));
	us = us_since(&began);
	ASSERT_EQ(0, pthread_join(thread, NULL));
	TH_LOG("mprotect() took %ld us of the call's %ld us", us, large_call.us);
	EXPECT_TRUE(large_call.ret);
	EXPECT_LT(us, large_call.us / 4);
}

/*
 * The device is not in the way of whoever changes the address space elsewhere,
 * nor are they in its. One half of its memory is there, the other is not.
 */
FIXTURE(aside)
{
	int fd, pagemap;
	char *map;
	__u64 *pfns;
	unsigned int flags;
	struct change change;
};

FIXTURE_VARIANT(aside)
{
	unsigned int flags;
};

FIXTURE_VARIANT_ADD(aside, unlocked) { .flags = HMM_DMIRROR_FAULT_UNLOCKED };
FIXTURE_VARIANT_ADD(aside, each) { .flags = HMM_DMIRROR_FAULT_EACH };

static bool map_device(void *fd, size_t npages)
{
	return mmap(NULL, npages * psize(), PROT_READ, MAP_SHARED, *(int *)fd, 0) !=
	       MAP_FAILED;
}

/* The very first fault of memory takes the mmap lock, so the test makes that. */
FIXTURE_SETUP(aside)
{
	self->fd = test_open(PRIVATE_ONE);
	if (!has_inside(self->fd))
		SKIP(return, "this device does not let anybody look inside");
	self->pagemap = test_open_pagemap();
	self->flags = variant->flags;
	self->pfns = calloc(NPAGES, sizeof(*self->pfns));
	ASSERT_NE(NULL, self->pfns);
	ASSERT_TRUE(make_mirror(NPAGES));
	fill(mirror, mirror, NPAGES, NOBODY);
	self->map = test_mmap(&anon, NPAGES);
	cpu_writes(self->map, NPAGES / 2, CPU);
	self->change.make = map_device;
	self->change.addr = &self->fd;
	self->change.npages = 1;
}

FIXTURE_TEARDOWN(aside) { test_close(); }

/* Somebody maps the device, and has the address space locked. */
#define test_aside_begin()							\
({										\
	test_inject(MMAP, WAIT, 1);						\
	test_change_begin(&self->change);					\
	self->change.may_go = true;						\
	test_await(MMAP);							\
})

/* He has not got anywhere meanwhile. */
#define test_aside_end()							\
({										\
	EXPECT_FALSE(self->change.made);					\
	test_resume(MMAP);							\
	test_change_end(&self->change);						\
})

TEST_F(aside, read)
{
	char *cold = at(self->map, NPAGES / 2);

	test_aside_begin();
	test_cmd_read_unlocked(self->map, NPAGES / 2, CPU);
	test_cmd_read_unlocked(cold, NPAGES / 2, NOBODY);
	test_aside_end();
}

TEST_F(aside, fault)
{
	test_aside_begin();
	test_fault(0, self->map, NPAGES, 0, 0);
	ASSERT_TRUE(flagged(self->pfns, 0, NPAGES / 2, OUT_FLAGS, OUT_WRITE));
	test_fault(0, self->map, NPAGES, REQ_READ, 0);
	ASSERT_TRUE(flagged(self->pfns, NPAGES / 2, NPAGES / 2, OUT_FLAGS, OUT_READ));
	test_fault(0, self->map, NPAGES, REQ_WRITE, 0);
	ASSERT_TRUE(flagged(self->pfns, 0, NPAGES, OUT_FLAGS, OUT_WRITE));
	test_aside_end();
	ASSERT_TRUE(agrees_on(self->fd, self->map, NPAGES));
}

/*
 * Large folios that PTEs map. Page 0 is aligned, in memory, too.
 */
FIXTURE(folios)
{
	int fd, uffd;
	char *map;
	size_t npages, nr;	/* nr: of a folio */
	unsigned int order, flags;
	__u64 *pfns, faults;
};

FIXTURE_VARIANT(folios)
{
	struct backing b;
};

FIXTURE_VARIANT_ADD(folios, anon_16k)
{
	.b = { .kind = ANON, .share = MAP_PRIVATE, .order = 2 },
};

FIXTURE_VARIANT_ADD(folios, anon_64k) { .b = B_MTHP };
FIXTURE_VARIANT_ADD(folios, thp) { .b = B_THP };

FIXTURE_SETUP(folios)
{
	const struct backing *b = &variant->b;

	if (lacks(b))
		SKIP(return, "%s", lacks(b));
	self->order = b->level ? pmd_order() : b->order;
	thp_only(self->order);
	self->nr = 1UL << self->order;
	self->npages = b->level ? 2 * self->nr : 128;
	self->fd = test_open(PRIVATE_ONE);
	if (!has_inside(self->fd))
		SKIP(return, "this device does not let anybody look inside");
	ASSERT_TRUE(make_mirror(self->npages));
	self->pfns = calloc(self->npages, sizeof(*self->pfns));
	ASSERT_NE(NULL, self->pfns);
	self->map = test_mmap(b, self->npages);
	cpu_writes(self->map, self->npages, CPU);
	/*
	 * A huge page that is not all alike has PTEs, and keeps them as long as
	 * khugepaged, which each change of the settings wakes, lets it.
	 */
	test_madvise(self->map, self->npages, MADV_NOHUGEPAGE);
	for (size_t i = 0; i < self->npages; i += self->nr) {
		test_mprotect(at(self->map, i), 1, PROT_READ);
		test_mprotect(at(self->map, i), 1, PROT_READ | PROT_WRITE);
	}
}

FIXTURE_TEARDOWN(folios)
{
	test_close();
	thp_restore_settings();
}

/* The outputs of pages [@first, @end), with @requests, go where theirs are. */
#define test_folios_fault(first, end, requests)					\
({										\
	size_t __first = first, __n = (end) - __first;				\
										\
	ASSERT_TRUE(done(_test_fault(self->fd, at(self->map, __first), __n,	\
				     self->pfns + __first, self->flags, requests, 0)));	\
	self->faults = inside.fault.faults;					\
	ASSERT_TRUE(agrees_on(self->fd, at(self->map, __first), __n));		\
})
/* Each has the order of the largest block that there is in [@first, @end). */
#define test_folios_blocks(first, end)						\
	ASSERT_TRUE(in_blocks(self->pfns, first, end, self->order))

TEST_F(folios, whole)
{
	const unsigned int flags[] = {
		0, HMM_DMIRROR_FAULT_UNLOCKED, HMM_DMIRROR_FAULT_EACH,
	};

	for (size_t i = 0; i < ARRAY_SIZE(flags); i++) {
		self->flags = flags[i];
		test_folios_fault(0, self->npages, 0);
		test_folios_blocks(0, self->npages);
		EXPECT_EQ(self->order, order_of(self->pfns[self->npages - 1]));
		test_folios_fault(0, self->npages, REQ_READ);
		test_folios_blocks(0, self->npages);
	}
}

/* One fault brings all that a folio has. */
TEST_F(folios, untouched)
{
	test_madvise(self->map, self->npages, MADV_HUGEPAGE);
	test_madvise(self->map, self->npages, MADV_DONTNEED);
	test_folios_fault(0, self->npages, REQ_WRITE);
	EXPECT_EQ(self->npages / self->nr, self->faults);
	test_folios_blocks(0, self->npages);
}

/* A range has the blocks that lie in it, and none of those that it cuts. */
TEST_F(folios, parts)
{
	size_t step = self->nr / 16 ?: 1;

	for (size_t first = 0; first < self->nr; first += step) {
		for (size_t n = 1; n < 2 * self->nr; n += 5 * step) {
			size_t end = first + n < self->npages ? first + n : self->npages;

			test_folios_fault(first, end, 0);
			test_folios_blocks(first, end);
		}
	}
}

/* A page in the midst of the second folio is no longer like its neighbours. */
#define ODD_ONE	(self->nr + self->nr / 4 * 3)

#define test_folios_odd_one(flags)						\
({										\
	test_folios_fault(0, self->npages, 0);					\
	test_folios_blocks(0, ODD_ONE);						\
	test_folios_blocks(ODD_ONE + 1, self->npages);				\
	ASSERT_TRUE(flagged(self->pfns, ODD_ONE, 1, OUT_FLAGS, flags));		\
	EXPECT_EQ(0, order_of(self->pfns[ODD_ONE]));				\
})

TEST_F(folios, written_after_fork)
{
	test_fork_witness(self->map, self->npages, CPU);
	cpu_writes(at(self->map, ODD_ONE), 1, DEVICE);
	test_folios_odd_one(OUT_WRITE);
	ASSERT_TRUE(flagged(self->pfns, 0, ODD_ONE, OUT_FLAGS, OUT_READ));
	test_witness_agrees();
}

TEST_F(folios, write_protected)
{
	test_mprotect(at(self->map, ODD_ONE), 1, PROT_READ);
	test_folios_odd_one(OUT_READ);
}

TEST_F(folios, write_protected_by_uffd)
{
	self->uffd = uffd_open();
	if (self->uffd < 0)
		SKIP(return, "no userfaultfd with write protection");
	test_uffd_wp(self->map, self->npages);
	test_uffd_protect(at(self->map, ODD_ONE), 1);
	test_folios_odd_one(OUT_READ);
	close(self->uffd);
}

TEST_F(folios, discarded)
{
	test_madvise(at(self->map, ODD_ONE), 1, MADV_DONTNEED);
	test_folios_odd_one(0);
}

TEST_F(folios, unmapped)
{
	test_munmap(at(self->map, ODD_ONE), 1);
	test_folios_odd_one(OUT_ERROR);
}

/* Blocks are aligned where they are mapped, too. */
TEST_F(folios, moved)
{
	for (size_t shift = 1; shift <= self->nr; shift *= 2) {
		unsigned int order = __builtin_ctzl(shift);
		char *to = another_place(self->npages * psize(), shift);

		test_mremap(self->map, self->npages, to, 0);
		self->map = to;
		test_folios_fault(0, self->npages, 0);
		for (size_t i = 0; i < self->npages; i++)
			ASSERT_EQ(order > 1 ? order : 0, order_of(self->pfns[i]));
	}
}

/*
 * The end of a process while somebody else, who has its device, is on his way
 * through its memory. The child has a gate in its memory, and waits for its end
 * to come.
 */
FIXTURE(dying)
{
	int fd;			/* the child's */
	char *map;		/* in the child */
	pid_t pid;
	int pidfd, hold;
	__u64 *pfns;
	int fail;
	pthread_t thread;
};

/* What the child tells of itself. */
struct will {
	int fd;
	char *map;
};

static void *run_own_walk(void *arg)
{
	struct will *will = arg;
	__u64 *pfns = calloc(NPAGES, sizeof(*pfns));

	_test_fault(will->fd, will->map, NPAGES, pfns, HMM_DMIRROR_FAULT_UNLOCKED,
		    REQ_READ, 0);
	return NULL;
}

/* Goes on its way itself when it is told to, and exits when its parent hangs up. */
static void live(int from, int to)
{
	struct will will = { .fd = open_device(PRIVATE_ONE) };
	pthread_t thread;
	char c;

	will.map = map_with_gate(will.fd, 1);
	cpu_writes(will.map, GATE, CPU);
	if (write(to, &will, sizeof(will)) != sizeof(will))
		_exit(KSFT_FAIL);
	while (read(from, &c, 1) == 1)
		if (pthread_create(&thread, NULL, run_own_walk, &will))
			break;
	_exit(KSFT_PASS);
}

static pid_t fork_living(int *hold, struct will *will)
{
	int down[2], up[2];
	pid_t pid;

	if (pipe(down) || pipe(up))
		return -1;
	pid = fork();
	if (!pid) {
		close(down[1]);
		live(down[0], up[1]);
	}
	close(down[0]);
	close(up[1]);
	*hold = down[1];
	if (read(up[0], will, sizeof(*will)) != sizeof(*will))
		return -1;
	return pid;
}

FIXTURE_SETUP(dying)
{
	struct will will;
	int probe = test_open(PRIVATE_ONE);

	if (!has_inside(probe))
		SKIP(return, "this device does not let anybody look inside");
	close(probe);
	self->pid = fork_living(&self->hold, &will);
	ASSERT_GT(self->pid, 0);
	self->pidfd = syscall(__NR_pidfd_open, self->pid, 0);
	self->fd = syscall(__NR_pidfd_getfd, self->pidfd, will.fd, 0);
	ASSERT_GE(self->fd, 0);
	self->map = will.map;
	self->pfns = calloc(NPAGES, sizeof(*self->pfns));
	ASSERT_NE(NULL, self->pfns);
	ASSERT_TRUE(make_mirror(NPAGES));
	test_cmd_read(self->map, GATE, CPU);
}

FIXTURE_TEARDOWN(dying)
{
	test_close();
}

static int _test_visit(FIXTURE_DATA(dying) * self, unsigned int flags)
{
	return _test_fault(self->fd, self->map, NPAGES, self->pfns, flags, REQ_READ, 0);
}

static void *run_visit(void *arg)
{
	FIXTURE_DATA(dying) * self = arg;
	int ret = _test_visit(self, HMM_DMIRROR_FAULT_UNLOCKED);

	self->fail = ret ? errno : 0;
	return NULL;
}

static void *run_locked_visit(void *arg)
{
	FIXTURE_DATA(dying) * self = arg;
	int ret = _test_visit(self, 0);

	self->fail = ret ? errno : 0;
	return NULL;
}

/* Somebody has got as far as to @point. */
#define test_visit_begin(point, action, run)					\
({										\
	ASSERT_EQ(0, _test_inject(self->fd, HMM_DMIRROR_POINT_##point,		\
				  HMM_DMIRROR_INJECT_##action, 1));		\
	ASSERT_EQ(0, pthread_create(&self->thread, NULL, run, self));		\
	ASSERT_EQ(0, _test_await(self->fd, HMM_DMIRROR_POINT_##point));		\
})

#define test_visit_end(point, error)						\
({										\
	ASSERT_EQ(0, _test_resume(self->fd, HMM_DMIRROR_POINT_##point));	\
	ASSERT_EQ(0, pthread_join(self->thread, NULL));				\
	ASSERT_EQ(error, self->fail);						\
})

/* Nobody gets anything of it any more. */
#define test_dead()								\
({										\
	test_err(EFAULT, _test_visit(self, HMM_DMIRROR_FAULT_UNLOCKED));	\
	test_err(EFAULT, _test_visit(self, 0));					\
	test_err_access(EFAULT, self->map, 1);					\
})

/* The memory stays as long as somebody is in it. */
TEST_F(dying, exits)
{
	test_visit_begin(GATE, DROP_AND_WAIT, run_visit);
	ASSERT_TRUE(child_agrees(self->pid, self->hold));
	test_visit_end(GATE, 0);
	ASSERT_TRUE(flagged(self->pfns, 0, GATE, OUT_FLAGS, OUT_WRITE));
	ASSERT_TRUE(flagged(self->pfns, GATE + 1, NPAGES - GATE - 1, OUT_FLAGS, OUT_READ));
	test_dead();
}

TEST_F(dying, killed)
{
	test_visit_begin(GATE, DROP_AND_WAIT, run_visit);
	ASSERT_TRUE(killed_at_once(self->pid));
	test_visit_end(GATE, 0);
	ASSERT_TRUE(flagged(self->pfns, 0, GATE, OUT_FLAGS, OUT_WRITE));
	test_dead();
}

/* Its own thread is on the way, and goes with it. */
#define test_own_visit_begin()							\
({										\
	test_inject(GATE, DROP_AND_WAIT, 1);					\
	ASSERT_EQ(1, write(self->hold, "", 1));					\
	test_await(GATE);							\
})

TEST_F(dying, exits_on_its_way)
{
	test_own_visit_begin();
	ASSERT_TRUE(child_agrees(self->pid, self->hold));
	test_dead();
}

TEST_F(dying, killed_on_its_way)
{
	test_own_visit_begin();
	ASSERT_TRUE(killed_at_once(self->pid));
	test_dead();
}

/*
 * The OOM reaper takes the memory of a process that was killed and has not got
 * rid of it yet. This one can't, because its tracer holds it when it begins to
 * exit.
 */
static bool trace(pid_t pid)
{
	return !ptrace(PTRACE_SEIZE, pid, NULL, PTRACE_O_TRACEEXIT | PTRACE_O_EXITKILL);
}

static bool is_exiting(pid_t pid)
{
	int status;

	return waitpid(pid, &status, 0) == pid && WIFSTOPPED(status) &&
	       status >> 8 == (SIGTRAP | PTRACE_EVENT_EXIT << 8);
}

static bool is_let_go(pid_t pid)
{
	int status;

	return !ptrace(PTRACE_CONT, pid, NULL, NULL) && waitpid(pid, &status, 0) == pid &&
	       WIFSIGNALED(status);
}

static int reap(int pidfd)
{
	return syscall(__NR_process_mrelease, pidfd, 0);
}

#define test_kill_and_hold()							\
({										\
	ASSERT_TRUE(trace(self->pid));						\
	ASSERT_EQ(0, kill(self->pid, SIGKILL));					\
	ASSERT_TRUE(is_exiting(self->pid));					\
})
#define test_reap()								\
	ASSERT_EQ(0, reap(self->pidfd))
#define test_let_go()								\
	ASSERT_TRUE(is_let_go(self->pid))

/* What is gone does not come back as zeroes. */
TEST_F(dying, reaped)
{
	test_visit_begin(GATE, DROP_AND_WAIT, run_visit);
	test_kill_and_hold();
	test_reap();
	test_visit_end(GATE, EFAULT);
	test_dead();
	test_let_go();
	test_dead();
}

/* The reaper does not wait for who has the mmap lock, and is not waited for. */
TEST_F(dying, reaped_with_lock_held)
{
	test_visit_begin(GATE, WAIT, run_locked_visit);
	test_kill_and_hold();
	test_reap();
	test_visit_end(GATE, EFAULT);
	test_dead();
	test_let_go();
	test_dead();
}

TEST_F(dying, reaped_before)
{
	test_kill_and_hold();
	test_reap();
	test_dead();
	test_let_go();
	test_dead();
}

/* The reaper must not wait for the device, so it leaves it alone while it is busy. */
TEST_F(dying, reaped_in_use)
{
	test_visit_begin(USE, WAIT, run_visit);
	test_kill_and_hold();
	test_err(EAGAIN, reap(self->pidfd));
	test_visit_end(USE, 0);
	EXPECT_EQ(1, inside.fault.tries);
	test_reap();
	test_dead();
	test_let_go();
}

/* Has the OOM killer look for somebody to kill. */
static bool run_out_of_memory(void)
{
	int trigger = open("/proc/sysrq-trigger", O_WRONLY | O_CLOEXEC);
	bool good = trigger >= 0 && write(trigger, "f", 1) == 1;

	close(trigger);
	return good;
}

/* The one whom it kills before all others. */
static bool volunteer(pid_t pid)
{
	char path[64];
	int file, n;

	snprintf(path, sizeof(path), "/proc/%d/oom_score_adj", pid);
	file = open(path, O_WRONLY | O_CLOEXEC);
	n = write(file, "1000", 4);
	close(file);
	return n == 4;
}

static __u64 invalidations(int dev)
{
	return _test_stats(dev) ? 0 : inside.stats.invalidations;
}

/* They are all that tells of the reaper, which gives a process two seconds. */
static bool reaper_comes(int dev, __u64 before)
{
	for (int tries = 0; tries < 100; tries++) {
		if (invalidations(dev) > before)
			return true;
		usleep(100000);
	}
	return false;
}

TEST_F(dying, out_of_memory)
{
	__u64 before;

	if (access("/proc/sysrq-trigger", W_OK))
		SKIP(return, "the OOM killer does not come when it is called");
	ASSERT_TRUE(volunteer(self->pid));
	ASSERT_TRUE(trace(self->pid));
	test_visit_begin(GATE, DROP_AND_WAIT, run_visit);
	ASSERT_TRUE(run_out_of_memory());
	ASSERT_TRUE(is_exiting(self->pid));
	before = invalidations(self->fd);
	ASSERT_TRUE(reaper_comes(self->fd, before));
	test_visit_end(GATE, EFAULT);
	test_dead();
	test_let_go();
}

/*
 * Migration, step by step: a thread's migration waits at a point of its way,
 * with the pages locked, while the test does something to them.
 */
FIXTURE(steps)
{
	int fd, pagemap;
	char *map;
	size_t npages;
	unsigned long command;
	int fail;
	pthread_t thread;
	struct change change;
};

FIXTURE_VARIANT(steps)
{
	int unit;
	unsigned int point;
	bool huge;
};

FIXTURE_VARIANT_ADD(steps, private_collected) { PRIVATE_ONE, HMM_DMIRROR_POINT_COLLECTED };
FIXTURE_VARIANT_ADD(steps, private_thp_collected) { PRIVATE_ONE, HMM_DMIRROR_POINT_COLLECTED, 1 };
FIXTURE_VARIANT_ADD(steps, private_copied) { PRIVATE_ONE, HMM_DMIRROR_POINT_COPIED };
FIXTURE_VARIANT_ADD(steps, private_thp_copied) { PRIVATE_ONE, HMM_DMIRROR_POINT_COPIED, 1 };
FIXTURE_VARIANT_ADD(steps, private_migrated) { PRIVATE_ONE, HMM_DMIRROR_POINT_MIGRATED };
FIXTURE_VARIANT_ADD(steps, private_thp_migrated) { PRIVATE_ONE, HMM_DMIRROR_POINT_MIGRATED, 1 };
FIXTURE_VARIANT_ADD(steps, coherent_collected) { COHERENT_ONE, HMM_DMIRROR_POINT_COLLECTED };
FIXTURE_VARIANT_ADD(steps, coherent_copied) { COHERENT_ONE, HMM_DMIRROR_POINT_COPIED };
FIXTURE_VARIANT_ADD(steps, coherent_migrated) { COHERENT_ONE, HMM_DMIRROR_POINT_MIGRATED };

FIXTURE_SETUP(steps)
{
	const struct backing *b = variant->huge ? &thp : &anon;

	if (is_absent(variant->unit))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	self->fd = test_open(variant->unit);
	if (!has_inside(self->fd))
		SKIP(return, "this device does not let anybody look inside");
	self->pagemap = test_open_pagemap();
	if (lacks(b))
		SKIP(return, "%s", lacks(b));
	if (variant->huge)
		thp_only(pmd_order());
	self->npages = variant->huge ? pages(pmd_size()) : NPAGES;
	ASSERT_TRUE(make_mirror(self->npages));
	self->map = test_mmap(b, self->npages);
	self->command = HMM_DMIRROR_MIGRATE_TO_DEV;
	cpu_writes(self->map, self->npages, CPU);
}

FIXTURE_TEARDOWN(steps)
{
	test_close();
	if (variant->huge)
		thp_restore_settings();
}

/* To a buffer of its own: the mirror is the test's. */
static void *run_steps(void *arg)
{
	FIXTURE_DATA(steps) * self = arg;
	struct hmm_dmirror_cmd cmd = {
		.addr = (uintptr_t)self->map,
		.ptr = (uintptr_t)malloc(self->npages * psize()),
		.npages = self->npages,
	};
	int ret = ioctl(self->fd, self->command, &cmd);

	self->fail = ret ? errno : 0;
	return NULL;
}

#define test_steps_begin()							\
({										\
	ASSERT_EQ(0, _test_inject(self->fd, variant->point,			\
				  HMM_DMIRROR_INJECT_WAIT, 1));			\
	ASSERT_EQ(0, pthread_create(&self->thread, NULL, run_steps, self));	\
	ASSERT_EQ(0, _test_await(self->fd, variant->point));			\
})

#define test_steps_end(error)							\
({										\
	ASSERT_EQ(0, _test_resume(self->fd, variant->point));			\
	ASSERT_EQ(0, pthread_join(self->thread, NULL));				\
	ASSERT_EQ(error, self->fail);						\
})

/* Whether it still found what it had moved depends on who was first then. */
#define test_steps_change_end()							\
({										\
	ASSERT_EQ(0, _test_resume(self->fd, variant->point));			\
	ASSERT_EQ(0, pthread_join(self->thread, NULL));				\
	test_change_end(&self->change);						\
})

/* Nobody has the pages meanwhile, and nobody has to wait to be told so. */
TEST_F(steps, snapshot)
{
	test_steps_begin();
	test_cmd_snapshot(self->map, self->npages, SEES_NONE);
	test_steps_end(0);
	test_cmd_read(self->map, self->npages, CPU);
}

/* Its device waits for memory, and not with the address space locked. */
static bool waits_aside(FIXTURE_DATA(steps) * self, int unit)
{
	char *other;

	self->fd = open_device(unit);
	self->command = HMM_DMIRROR_READ_UNLOCKED;
	if (pthread_create(&self->thread, NULL, run_steps, self))
		return false;
	usleep(20000);
	other = map_backing(&anon, psize(), NULL);
	cpu_writes(other, 1, CPU);
	return !munmap(other, psize());
}

/* What moves is a child's, too. */
TEST_F(steps, waited_for)
{
	struct timespec began;
	int hold, told[2];
	pid_t pid;
	char good;

	ASSERT_EQ(0, pipe(told));
	pid = test_fork_held(&hold);
	if (!pid) {
		good = waits_aside(self, variant->unit);
		_exit(write(told[1], &good, 1) != 1 ||
		      pthread_join(self->thread, NULL) || self->fail);
	}
	test_steps_begin();
	clock_gettime(CLOCK_MONOTONIC, &began);
	ASSERT_EQ(0, close(hold));
	ASSERT_EQ(1, read(told[0], &good, 1));
	EXPECT_TRUE(good && was_at_once(&began));
	ASSERT_EQ(0, _test_resume(self->fd, variant->point));
	ASSERT_EQ(0, pthread_join(self->thread, NULL));
	ASSERT_TRUE(child_agrees(pid, -1));
}

/* Memory that goes while it moves is gone, on the device, too. */
TEST_F(steps, discard)
{
	test_steps_begin();
	test_madvise(self->map, self->npages, MADV_DONTNEED);
	test_steps_end(ENOENT);
	test_cmd_read(self->map, self->npages, NOBODY);
	test_stats();
	EXPECT_EQ(0, inside.stats.bytes);
}

/* A large folio stays whole at the device even if only a half of it is mapped. */
TEST_F(steps, discard_half)
{
	size_t held = variant->huge ? self->npages : self->npages / 2;

	test_steps_begin();
	test_madvise(self->map, self->npages / 2, MADV_DONTNEED);
	test_steps_end(ENOENT);
	test_cmd_read(at(self->map, self->npages / 2), self->npages / 2, CPU);
	test_stats();
	EXPECT_EQ(held * psize(), inside.stats.bytes);
	ASSERT_TRUE(cpu_sees(self->map, self->npages / 2, NOBODY));
	ASSERT_TRUE(cpu_sees(at(self->map, self->npages / 2), self->npages / 2, CPU));
}

#define test_steps_change(_make)						\
({										\
	self->change = (struct change) {					\
		.make = _make, .addr = self->map, .npages = self->npages,	\
	};									\
	test_change_begin(&self->change);					\
	test_steps_begin();							\
	test_change_waits(&self->change);					\
})

static bool cpu_finds(void *addr, size_t npages)
{
	return cpu_sees(addr, npages, CPU);
}

/*
 * A CPU that wants the pages waits, and gets them with their data. Its thread is
 * there before: nobody can map a stack while a migration waits.
 */
TEST_F(steps, cpu_reads)
{
	test_steps_change(cpu_finds);
	test_steps_change_end();
	test_cmd_read(self->map, self->npages, CPU);
}

static bool unmap(void *addr, size_t npages)
{
	return !munmap(addr, npages * psize());
}

/* So does whoever changes the address space, and finds all of it at the device. */
TEST_F(steps, unmap)
{
	test_steps_change(unmap);
	test_steps_change_end();
	test_err_access(EFAULT, self->map, self->npages);
	test_stats();
	EXPECT_EQ(self->npages, inside.stats.pages_in);
	EXPECT_EQ(0, inside.stats.bytes);
}

static void *moved_to;

static bool move(void *addr, size_t npages)
{
	moved_to = move_away(addr, npages);
	return moved_to != MAP_FAILED;
}

TEST_F(steps, move)
{
	test_steps_change(move);
	test_steps_change_end();
	test_err_access(EFAULT, self->map, self->npages);
	ASSERT_EQ(0, _test_cmd_read(self->fd, moved_to, self->npages));
	ASSERT_TRUE(holds(mirror, self->map, self->npages, CPU));
	ASSERT_TRUE(holds(moved_to, self->map, self->npages, CPU));
}

static bool write_protect(void *addr, size_t npages)
{
	return !mprotect(addr, npages * psize(), PROT_READ);
}

TEST_F(steps, write_protect)
{
	test_steps_change(write_protect);
	test_steps_change_end();
	test_err_write(EPERM, self->map, self->npages);
	test_cmd_read(self->map, self->npages, CPU);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

static bool split_protection(void *addr, size_t npages)
{
	return !mprotect(at(addr, npages / 2), psize(), PROT_READ);
}

/* A huge page comes apart as soon as it has arrived. */
TEST_F(steps, write_protect_one)
{
	test_steps_change(split_protection);
	test_steps_change_end();
	test_err_write(EPERM, self->map, self->npages);
	test_cmd_read(at(self->map, self->npages / 2), self->npages / 2, CPU);
	ASSERT_TRUE(cpu_sees(at(self->map, self->npages / 2), self->npages / 2, CPU));
}

/* The child, which has all of it, writes some, and that stays its own. */
static bool fork_and_write(void *addr, size_t npages)
{
	pid_t pid = fork();
	int status;

	if (!pid) {
		bool good = cpu_sees(addr, npages, CPU);

		cpu_writes(addr, npages / 2, CHILD);
		_exit(!good || !cpu_sees(addr, npages / 2, CHILD));
	}
	return pid > 0 && waitpid(pid, &status, 0) == pid && !status;
}

TEST_F(steps, fork)
{
	test_steps_change(fork_and_write);
	test_steps_change_end();
	test_cmd_read(self->map, self->npages, CPU);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
}

/* Another device gets none of it now, and all of it when it is back. */
TEST_F(steps, other_device)
{
	int other = test_open(variant->unit + 1);

	test_steps_begin();
	test_err(ENOENT, _test_cmd_to_dev(other, self->map, self->npages));
	EXPECT_EQ(0, answer.cpages);
	test_steps_end(0);
	test_cmd_to_sys(self->map, self->npages, self->npages);
	ASSERT_TRUE(moves(other, self->map, self->npages, CPU));
	test_cmd_read(self->map, self->npages, CPU);
	ASSERT_TRUE(agrees(other));
}

/*
 * The file is closed by all who have it but the migration itself. A child is the
 * last, so that somebody can let the migration go on.
 */
TEST_F(steps, close)
{
	pid_t pid;
	int hold;

	pid = test_fork_held(&hold);
	if (!pid)
		_exit(_test_resume(self->fd, variant->point));
	test_steps_begin();
	ASSERT_EQ(0, close(self->fd));
	ASSERT_TRUE(child_agrees(pid, hold));
	ASSERT_EQ(0, pthread_join(self->thread, NULL));
	test_entries(self->map, self->npages, PM_PRESENT, self->npages);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
	self->fd = test_open(variant->unit);
	test_stats();
	EXPECT_EQ(0, inside.stats.device_bytes);
}

/* A migration that is killed leaves everything in its place. */
TEST_F(steps, kill)
{
	pid_t pid;

	ASSERT_EQ(0, _test_inject(self->fd, variant->point, HMM_DMIRROR_INJECT_WAIT, 1));
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		run_steps(self);
		_exit(KSFT_FAIL);
	}
	ASSERT_EQ(0, _test_await(self->fd, variant->point));
	ASSERT_TRUE(killed_at_once(pid));
	test_cmd_read(self->map, self->npages, CPU);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, CPU));
	test_munmap(self->map, self->npages);
	test_stats();
	EXPECT_EQ(0, inside.stats.bytes);
}

/*
 * Pages that are busy while they are to move, and others that are not: a thread's
 * command waits on its way for the test to do something.
 */
FIXTURE(busy)
{
	int fd, other;
	char *map, *mine;
	unsigned long command;
	struct hmm_dmirror_cmd cmd;
	int fail;
	pthread_t thread;
};

FIXTURE_VARIANT(busy)
{
	int unit;
};

FIXTURE_VARIANT_ADD(busy, private)
{
	.unit = PRIVATE_ONE,
};

FIXTURE_VARIANT_ADD(busy, coherent)
{
	.unit = COHERENT_ONE,
};

FIXTURE_SETUP(busy)
{
	if (is_absent(variant->unit))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	self->fd = test_open(variant->unit);
	self->other = test_open(variant->unit);
	if (!has_inside(self->fd))
		SKIP(return, "this device does not let anybody look inside");
	ASSERT_TRUE(make_mirror(NPAGES));
	self->map = test_mmap(&anon, NPAGES);
	self->mine = test_mmap(&anon, NPAGES);
	cpu_writes(self->map, NPAGES, CPU);
	cpu_writes(self->mine, NPAGES, CPU);
	self->cmd.addr = (uintptr_t)self->map;
	self->cmd.ptr = (uintptr_t)malloc(NPAGES * psize());
	self->cmd.npages = NPAGES;
}

FIXTURE_TEARDOWN(busy)
{
	test_close();
	close(self->other);
}

static void *run_command(void *arg)
{
	FIXTURE_DATA(busy) * self = arg;

	self->fail = ioctl(self->fd, self->command, &self->cmd) ? errno : 0;
	return NULL;
}

#define test_command_begins(which)						\
({										\
	self->command = HMM_DMIRROR_##which;					\
	test_inject(MIGRATED, WAIT, 1);						\
	ASSERT_EQ(0, pthread_create(&self->thread, NULL, run_command, self));	\
	test_await(MIGRATED);							\
})

#define test_command_ends()							\
({										\
	test_resume(MIGRATED);							\
	ASSERT_EQ(0, pthread_join(self->thread, NULL));				\
	ASSERT_EQ(0, self->fail);						\
})

/* What has missed the first try for somebody who is done by now makes the next. */
TEST_F(busy, held_then_to_dev)
{
	char *held = at(self->map, 40);
	int ends[2];

	ASSERT_EQ(0, pipe(ends));
	ASSERT_TRUE(hold_in_pipe(ends[1], held, PIPE_PAGES));
	test_command_begins(MIGRATE_TO_DEV);
	ASSERT_TRUE(pipe_holds(ends[0], held, PIPE_PAGES, CPU));
	test_command_ends();
	EXPECT_EQ(NPAGES, self->cmd.cpages);
	test_cmd_snapshot(self->map, NPAGES, local_memory(variant->unit));
}

/* Private memory comes back to be held. */
TEST_F(busy, held_then_to_sys)
{
	size_t due = is_coherent(variant->unit) ? NPAGES : NPAGES - PIPE_PAGES;
	char *held = at(self->map, 40);
	int ends[2];

	ASSERT_EQ(0, pipe(ends));
	test_cmd_to_dev(self->map, NPAGES, CPU);
	ASSERT_TRUE(hold_in_pipe(ends[1], held, PIPE_PAGES));
	test_command_begins(MIGRATE_TO_SYS);
	ASSERT_TRUE(pipe_holds(ends[0], held, PIPE_PAGES, CPU));
	test_command_ends();
	EXPECT_EQ(due, self->cmd.cpages);
	test_cmd_snapshot(self->map, NPAGES, SEES_WRITE);
}

static atomic_bool forker_may_stop;

static void *fork_often(void *arg)
{
	while (!forker_may_stop) {
		pid_t pid = fork();

		if (!pid)
			_exit(0);
		waitpid(pid, NULL, 0);
	}
	return NULL;
}

/* A fork takes the pages from the device's page table, and leaves them at the device. */
TEST_F(busy, forked_meanwhile)
{
	ASSERT_EQ(0, pthread_create(&self->thread, NULL, fork_often, NULL));
	for (int i = 0; i < 100; i++) {
		test_cmd_to_dev(self->map, NPAGES, CPU);
		cpu_writes(self->map, NPAGES, CPU);
	}
	forker_may_stop = true;
	ASSERT_EQ(0, pthread_join(self->thread, NULL));
}

/* One file's memory waits on its way back. That is nothing to others. */
TEST_F(busy, released)
{
	test_cmd_to_dev(self->map, NPAGES, CPU);
	test_command_begins(RELEASE);
	ASSERT_TRUE(moves(self->other, self->mine, NPAGES, CPU));
	ASSERT_EQ(0, _test_cmd_release(self->other));
	test_command_ends();
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, CPU));
	ASSERT_TRUE(cpu_sees(self->mine, NPAGES, CPU));
	test_stats();
	EXPECT_EQ(0, inside.stats.device_bytes);
}

/*
 * A private device takes more memory when it needs it, and has enough at last.
 */
FIXTURE(used_up)
{
	int fd, other;
	char *map, *mine;
	size_t npages;
};

FIXTURE_SETUP(used_up)
{
	if (lacks(&thp))
		SKIP(return, "%s", lacks(&thp));
	self->fd = test_open(PRIVATE_ONE);
	self->other = test_open(PRIVATE_ONE);
	if (!has_inside(self->fd))
		SKIP(return, "this device has more than can be used up");
	thp_only(pmd_order());
	self->npages = pages(MORE_THAN_THERE_IS);
	ASSERT_TRUE(make_mirror(self->npages));
	self->map = test_mmap(&thp, self->npages);
	self->mine = test_mmap(&anon, 1);
	cpu_writes(self->mine, 1, CPU);
}

FIXTURE_TEARDOWN_PARENT(used_up)
{
	if (thp_available())
		thp_restore_settings();
}

/* Down to the last page, for other files, too, until somebody gives some back. */
TEST_F(used_up, private)
{
	test_err(ENOMEM, _test_cmd_to_dev_as_far_as_it_goes(self->fd, self->map, self->npages));
	test_stats();
	EXPECT_EQ(answer.cpages * psize(), inside.stats.device_bytes);
	ASSERT_LT(answer.cpages, self->npages);
	test_err(ENOMEM, _test_cmd_to_dev(self->other, self->mine, 1));
	test_munmap(self->map, self->npages);
	ASSERT_TRUE(moves(self->other, self->mine, 1, CPU));
	ASSERT_TRUE(cpu_sees(self->mine, 1, CPU));
}

/*
 * Memory runs out: each allocation that a step makes fails in turn, by
 * /proc/thread-self/fail-nth, until it makes no more. It either manages without or
 * says that there is no memory, and what was in memory is there in any case.
 */

/*
 * Everything can fail, without a word in the kernel's log. It does for a task that
 * was made to fail, and none is, so that has to be said first.
 */
static const struct {
	const char *path;
	const char *value;
} failures[] = {
	{ "/sys/kernel/debug/failslab/task-filter", "Y" },
	{ "/sys/kernel/debug/failslab/times", "-1" },
	{ "/sys/kernel/debug/failslab/probability", "100" },
	{ "/sys/kernel/debug/fail_page_alloc/task-filter", "Y" },
	{ "/sys/kernel/debug/fail_page_alloc/times", "-1" },
	{ "/sys/kernel/debug/fail_page_alloc/probability", "100" },
	{ "/sys/kernel/debug/failslab/ignore-gfp-wait", "N" },
	{ "/sys/kernel/debug/failslab/verbose", "0" },
	{ "/sys/kernel/debug/fail_page_alloc/ignore-gfp-wait", "N" },
	{ "/sys/kernel/debug/fail_page_alloc/ignore-gfp-highmem", "N" },
	{ "/sys/kernel/debug/fail_page_alloc/min-order", "0" },
	{ "/sys/kernel/debug/fail_page_alloc/verbose", "0" },
};

#define FAIL_NTH "/proc/thread-self/fail-nth"
#define FAIL_ALL "/proc/thread-self/make-it-fail"

struct failing {
	char before[ARRAY_SIZE(failures)][16];
	bool changed;
	int nth_file;
	unsigned int nth;	/* the allocation that fails; none if 0 */
	bool failed;		/* it was made */
};

/* What this kernel lacks for it, or NULL. */
static const char *lacks_failures(void)
{
	if (access(FAIL_NTH, W_OK) || access(FAIL_ALL, W_OK))
		return "no fault injection in this kernel";
	for (size_t i = 0; i < ARRAY_SIZE(failures); i++)
		if (access(failures[i].path, W_OK))
			return "no failslab or fail_page_alloc in this kernel, or no debugfs";
	if (!access("/sys/kernel/debug/fail_usercopy", F_OK))
		return "not only allocations fail in this kernel";
	return NULL;
}

static void failures_setup(struct failing *f)
{
	f->nth_file = open(FAIL_NTH, O_RDWR | O_CLOEXEC);
	for (size_t i = 0; i < ARRAY_SIZE(failures); i++)
		if (!read_file(failures[i].path, f->before[i], sizeof(f->before[i])))
			ksft_exit_fail_perror(failures[i].path);
	f->changed = true;
	for (size_t i = 0; i < ARRAY_SIZE(failures); i++)
		write_file(failures[i].path, failures[i].value,
			   strlen(failures[i].value) + 1);
}

static void failures_restore(struct failing *f)
{
	for (size_t i = ARRAY_SIZE(failures); f->changed && i--; )
		write_file(failures[i].path, f->before[i], strlen(f->before[i]) + 1);
}

/* Closes a file without any memory for that: what is at the device stays there. */
static void close_without_memory(int fd)
{
	int file = open(FAIL_ALL, O_WRONLY | O_CLOEXEC);

	if (file < 0 || pwrite(file, "1", 1, 0) != 1)
		ksft_exit_fail_perror(FAIL_ALL);
	close(fd);
	if (pwrite(file, "0", 1, 0) != 1)
		ksft_exit_fail_perror(FAIL_ALL);
	close(file);
}

static void fail_nth(struct failing *f, unsigned int nth)
{
	char text[16];
	int n = snprintf(text, sizeof(text), "%u", nth);

	if (pwrite(f->nth_file, text, n, 0) != n)
		ksft_exit_fail_perror(FAIL_NTH);
}

static void fail_begin(struct failing *f)
{
	fail_nth(f, f->nth);
}

/* It counts down, to 0 when it has come true. */
static void fail_end(struct failing *f)
{
	int err = errno;
	char left[16];

	f->failed = pread(f->nth_file, left, sizeof(left), 0) > 0 && !atoi(left);
	fail_nth(f, 0);
	errno = err;
}

/* More of them, and something goes round in circles. */
#define FAIL_NTH_MAX 5000

/*
 * The first sixteen in turn, then ever fewer of them: the long rows are of a kind,
 * such as the storage of a huge page.
 */
#define for_each_failure()							\
	for (self->failing.nth = 1, self->failing.failed = true; self->failing.failed;	\
	     self->failing.nth += 1 + self->failing.nth / 16)

/* 0 or ENOMEM, by which @step fails if an allocation did. Only then may it fail. */
#define test_failing(step)							\
({										\
	int __fail;								\
										\
	fail_begin(&self->failing);						\
	__fail = (step) ? errno : 0;						\
	fail_end(&self->failing);						\
	ASSERT_TRUE(!__fail || (self->failing.failed && __fail == ENOMEM))	\
		TH_LOG("allocation %u: %s", self->failing.nth, strerror(__fail)); \
	ASSERT_GT(FAIL_NTH_MAX, self->failing.nth);				\
	__fail;									\
})

/*
 * Some memory stays at the device throughout, so that it never has to get more:
 * this kernel's memory hotplug does not clean up when it fails, and warns.
 */
FIXTURE(fail_nth)
{
	int fd;
	char *map, *kept;
	size_t npages;
	__u64 *pfns;
	struct failing failing;
};

FIXTURE_VARIANT(fail_nth)
{
	int unit;
	struct backing b;
};

FIXTURE_VARIANT_ADD(fail_nth, private_anon)
{
	.unit = PRIVATE_ONE,
	.b = { .kind = ANON, .share = MAP_PRIVATE },
};

FIXTURE_VARIANT_ADD(fail_nth, private_thp)
{
	.unit = PRIVATE_ONE,
	.b = { .kind = ANON, .share = MAP_PRIVATE, .level = PMD },
};

FIXTURE_VARIANT_ADD(fail_nth, coherent_anon)
{
	.unit = COHERENT_ONE,
	.b = { .kind = ANON, .share = MAP_PRIVATE },
};

FIXTURE_SETUP(fail_nth)
{
	const struct backing *b = &variant->b;
	const char *lack = lacks_failures() ?: lacks(b);

	if (is_absent(variant->unit))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	if (lack)
		SKIP(return, "%s", lack);
	self->fd = test_open(variant->unit);
	if (!has_inside(self->fd))
		SKIP(return, "this device may not stand it");
	if (b->level)
		thp_only(pmd_order());
	self->npages = b->level ? pages(pmd_size()) : 16;
	ASSERT_TRUE(make_mirror(self->npages));
	self->pfns = calloc(self->npages, sizeof(*self->pfns));
	ASSERT_NE(NULL, self->pfns);
	self->map = test_mmap(b, self->npages);
	cpu_writes(self->map, self->npages, CPU);
	self->kept = test_mmap(&anon, 1);
	ASSERT_TRUE(moves(test_open(variant->unit), self->kept, 1, NOBODY));

	/* Buffers are there: a system call does not tell why it cannot reach them. */
	memset(mirror, 0x5a, self->npages * psize());
	memset(self->pfns, 0x5a, self->npages * sizeof(*self->pfns));
	failures_setup(&self->failing);
}

FIXTURE_TEARDOWN(fail_nth)
{
	failures_restore(&self->failing);
	test_close();
	if (wants_thp(&variant->b) && thp_available())
		thp_restore_settings();
}

/* What @who wrote is in memory, and the device sees what the CPU does. */
#define test_intact(who)							\
({										\
	ASSERT_TRUE(agrees(self->fd));						\
	ASSERT_TRUE(cpu_sees(self->map, self->npages, who));			\
})

/* Nothing is left behind at the device but what is to stay. */
#define test_nothing_left()							\
({										\
	test_munmap(self->map, self->npages);					\
	test_cmd_release();							\
	test_stats();								\
	ASSERT_EQ(0, inside.stats.bytes);					\
	ASSERT_EQ(psize(), inside.stats.device_bytes);				\
})

TEST_F(fail_nth, open)
{
	for_each_failure() {
		int fd = -1;

		test_failing((fd = open_device(variant->unit)) < 0);
		if (fd >= 0)
			close(fd);
	}
}

TEST_F(fail_nth, close)
{
	for_each_failure() {
		int fd = test_open(variant->unit);

		ASSERT_TRUE(moves(fd, self->map, self->npages, CPU));
		test_failing(close(fd));
		test_intact(CPU);
	}
	test_nothing_left();
}

TEST_F(fail_nth, close_without_memory)
{
	int fd = test_open(variant->unit);

	ASSERT_TRUE(moves(fd, self->map, self->npages, CPU));
	close_without_memory(fd);
	test_stats();
	ASSERT_EQ((self->npages + 1) * psize(), inside.stats.device_bytes);
	test_intact(CPU);
	test_nothing_left();
}

TEST_F(fail_nth, mmap)
{
	for_each_failure() {
		void *io = MAP_FAILED;

		test_failing((io = mmap(NULL, IO_PAGES * psize(), PROT_READ, MAP_SHARED,
					self->fd, 0)) == MAP_FAILED);
		if (io != MAP_FAILED)
			test_munmap(io, IO_PAGES);
	}
}

TEST_F(fail_nth, read)
{
	for_each_failure() {
		test_madvise(self->map, self->npages, MADV_DONTNEED);
		test_failing(_test_cmd_read(self->fd, self->map, self->npages));
		test_intact(NOBODY);
	}
}

TEST_F(fail_nth, read_unlocked)
{
	for_each_failure() {
		test_madvise(self->map, self->npages, MADV_DONTNEED);
		test_failing(_test_cmd_read_unlocked(self->fd, self->map, self->npages));
		test_intact(NOBODY);
	}
}

/* As much is written as it says, and no more. */
TEST_F(fail_nth, write)
{
	for_each_failure() {
		size_t written;

		test_madvise(self->map, self->npages, MADV_DONTNEED);
		test_failing(_test_cmd_write(self->fd, self->map, self->npages, DEVICE));
		written = answer.cpages;
		ASSERT_TRUE(agrees(self->fd));
		ASSERT_TRUE(cpu_sees(self->map, written, DEVICE));
		ASSERT_TRUE(cpu_sees(at(self->map, written), self->npages - written, NOBODY));
	}
}

TEST_F(fail_nth, snapshot)
{
	for_each_failure()
		if (!test_failing(_test_cmd_snapshot(self->fd, self->map, self->npages)))
			ASSERT_TRUE(saw(0, self->npages, SEES_WRITE |
					(variant->b.level ? SEES_PMD : 0)));
}

TEST_F(fail_nth, to_dev)
{
	for_each_failure() {
		if (!test_failing(_test_cmd_to_dev(self->fd, self->map, self->npages)))
			ASSERT_TRUE(holds(mirror, self->map, self->npages, CPU));
		test_intact(CPU);
	}
	test_nothing_left();
}

TEST_F(fail_nth, hole_to_dev)
{
	for_each_failure() {
		test_madvise(self->map, self->npages, MADV_DONTNEED);
		test_failing(_test_cmd_to_dev(self->fd, self->map, self->npages));
		test_intact(NOBODY);
	}
	test_nothing_left();
}

TEST_F(fail_nth, to_sys)
{
	for_each_failure() {
		test_cmd_to_dev(self->map, self->npages, CPU);
		test_failing(_test_cmd_to_sys(self->fd, self->map, self->npages));
		test_intact(CPU);
	}
	test_nothing_left();
}

/* The CPU has no error to return: it tries again. */
TEST_F(fail_nth, touched)
{
	for_each_failure() {
		test_cmd_to_dev(self->map, self->npages, CPU);
		test_failing(!cpu_sees(self->map, self->npages, CPU));
		test_intact(CPU);
	}
	test_nothing_left();
}

/* A few pages, as each is got by itself. */
TEST_F(fail_nth, exclusive)
{
	for_each_failure() {
		test_failing(_test_cmd_exclusive(self->fd, self->map, 4));
		test_intact(CPU);
	}
}

TEST_F(fail_nth, release)
{
	for_each_failure() {
		test_cmd_to_dev(self->map, self->npages, CPU);
		test_failing(_test_cmd_release(self->fd));
		test_intact(CPU);
	}
	test_nothing_left();
}

/*
 * What libc has the kernel keep up to date is in a page that a fork write-protects.
 * A process is killed if there is no memory for a copy, just when it is preempted.
 */
static void unregister_rseq(void)
{
#ifdef RSEQ_SIG
	char *rseq = (char *)__builtin_thread_pointer() + __rseq_offset;

	syscall(__NR_rseq, rseq, 32, RSEQ_FLAG_UNREGISTER, RSEQ_SIG);
#endif
}

static pid_t fork_reader(char *map, size_t npages)
{
	pid_t pid = fork();

	if (!pid)
		_exit(!cpu_sees(map, npages, CPU));
	return pid;
}

TEST_F(fail_nth, fork)
{
	unregister_rseq();
	for_each_failure() {
		pid_t pid = -1;
		int status = 0;

		test_cmd_to_dev(self->map, self->npages, CPU);
		test_failing((pid = fork_reader(self->map, self->npages)) < 0);
		if (pid > 0)
			ASSERT_EQ(pid, waitpid(pid, &status, 0));
		ASSERT_EQ(0, status);
		test_intact(CPU);
	}
	test_nothing_left();
}

TEST_F(fail_nth, raw_fault)
{
	for_each_failure() {
		test_madvise(self->map, self->npages, MADV_DONTNEED);
		test_failing(_test_fault(self->fd, self->map, self->npages, self->pfns, 0,
					 REQ_WRITE, 0));
		test_intact(NOBODY);
	}
}

TEST_F(fail_nth, check)
{
	test_cmd_write(self->map, self->npages, DEVICE);
	for_each_failure() {
		memset(&inside, 0, sizeof(inside));
		test_failing(_test_inside(self->fd, HMM_DMIRROR_OP_CHECK, 0));
	}
}

TEST_F(fail_nth, stats)
{
	for_each_failure()
		test_failing(_test_stats(self->fd));
}

TEST_F(fail_nth, inject)
{
	for_each_failure()
		test_failing(_test_inject(self->fd, HMM_DMIRROR_POINT_GATE,
					  HMM_DMIRROR_INJECT_NOTHING, 1));
}

/*
 * The driver goes while processes have memory at its devices whose files are
 * closed. It comes back, with the options it had, whatever becomes of the test.
 */
FIXTURE(unload)
{
	char *map;
	char options[128];
	struct failing failing;
};

FIXTURE_VARIANT(unload)
{
	int unit;
};

FIXTURE_VARIANT_ADD(unload, private)
{
	.unit = PRIVATE_ONE,
};

FIXTURE_VARIANT_ADD(unload, coherent)
{
	.unit = COHERENT_ONE,
};

#define DRIVER "/sys/module/test_hmm"

static void driver_options(char *options, size_t size)
{
	static const char * const names[] = { "spm_addr_dev0", "spm_addr_dev1" };

	*options = 0;
	for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
		char path[64], option[64];

		snprintf(path, sizeof(path), DRIVER "/parameters/%s", names[i]);
		snprintf(option, sizeof(option), " %s=%lu", names[i], read_num(path));
		strncat(options, option, size - strlen(options) - 1);
	}
}

/* The node of a device, where nothing else makes it. */
static bool make_node(int unit)
{
	char path[64], number[32] = "";
	unsigned int major, minor;
	struct stat node;

	snprintf(path, sizeof(path), "/sys/class/hmm_dmirror/hmm_dmirror%d/dev", unit);
	read_file(path, number, sizeof(number));
	if (sscanf(number, "%u:%u", &major, &minor) != 2)
		return unit >= COHERENT_ONE;
	snprintf(path, sizeof(path), "/dev/hmm_dmirror%d", unit);
	if (!stat(path, &node) && node.st_rdev == makedev(major, minor))
		return true;
	unlink(path);
	return !mknod(path, S_IFCHR | 0600, makedev(major, minor));
}

static bool load_driver(const char *options)
{
	char command[256];

	snprintf(command, sizeof(command), "modprobe test_hmm %s", options);
	return !system(command) && make_node(PRIVATE_ONE) && make_node(PRIVATE_TWO) &&
	       make_node(COHERENT_ONE) && make_node(COHERENT_TWO);
}

static bool unload_driver(void)
{
	return !syscall(SYS_delete_module, "test_hmm", O_NONBLOCK);
}

FIXTURE_SETUP(unload)
{
	int fd;

	if (is_absent(variant->unit))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	if (access(DRIVER "/refcnt", F_OK))
		SKIP(return, "the driver is no module, or one that stays");
	if (system("command -v modprobe >/dev/null"))
		SKIP(return, "no modprobe");
	fd = test_open(variant->unit);
	if (!has_inside(fd))
		SKIP(return, "this device may not stand it");
	close(fd);
	driver_options(self->options, sizeof(self->options));
	ASSERT_TRUE(make_mirror(NPAGES));
	self->map = test_mmap(&anon, NPAGES);
	if (!lacks_failures())
		failures_setup(&self->failing);
}

FIXTURE_TEARDOWN(unload)
{
	failures_restore(&self->failing);
	if (access(DRIVER, F_OK) && *self->options)
		EXPECT_TRUE(load_driver(self->options));
	test_close();
}

/* Memory goes to the device and stays there, as far as this kernel can do that. */
#define test_leave_at_device()							\
({										\
	int __fd = test_open(variant->unit);					\
										\
	ASSERT_TRUE(moves(__fd, self->map, NPAGES, CPU));			\
	if (self->failing.changed)						\
		close_without_memory(__fd);					\
	else									\
		close(__fd);							\
})

/* The driver is back, and works. */
#define test_reload()								\
({										\
	int __fd;								\
										\
	ASSERT_TRUE(load_driver(self->options));				\
	__fd = test_open(variant->unit);					\
	ASSERT_TRUE(moves(__fd, self->map, NPAGES, CPU));			\
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, CPU));				\
	close(__fd);								\
})

/* The file is not open in the child, so it is forked before. */
TEST_F(unload, memory_at_device)
{
	pid_t pid;
	int hold;

	cpu_writes(self->map, NPAGES, CPU);
	pid = test_fork_held(&hold);
	if (!pid)
		_exit(!cpu_sees(self->map, NPAGES, CPU));

	test_leave_at_device();
	ASSERT_TRUE(unload_driver());
	ASSERT_TRUE(child_agrees(pid, hold));
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, CPU));
	test_reload();
}

#define UNLOADS 5

TEST_F(unload, child_exits_meanwhile)
{
	for (int i = 0; i < UNLOADS; i++) {
		int hold, status;
		pid_t pid;

		cpu_writes(self->map, NPAGES, CPU);
		pid = test_fork_held(&hold);
		if (!pid)
			_exit(KSFT_PASS);

		test_leave_at_device();
		close(hold);
		usleep(i * 200);
		ASSERT_TRUE(unload_driver());
		ASSERT_EQ(pid, waitpid(pid, &status, 0));
		ASSERT_TRUE(cpu_sees(self->map, NPAGES, CPU));
		test_reload();
	}
}

TEST_F(unload, child_reads_meanwhile)
{
	for (int i = 0; i < UNLOADS; i++) {
		int hold, status;
		pid_t pid;

		cpu_writes(self->map, NPAGES, CPU);
		pid = test_fork_held(&hold);
		if (!pid)
			_exit(!cpu_sees(self->map, NPAGES, CPU));

		test_leave_at_device();
		close(hold);
		usleep(i * 200);
		ASSERT_TRUE(unload_driver());
		ASSERT_EQ(pid, waitpid(pid, &status, 0));
		ASSERT_EQ(0, status);
		ASSERT_TRUE(cpu_sees(self->map, NPAGES, CPU));
		test_reload();
	}
}

/* A file that is open keeps the driver. */
TEST_F(unload, file_open)
{
	int fd = test_open(variant->unit);

	ASSERT_FALSE(unload_driver());
	cpu_writes(self->map, NPAGES, CPU);
	ASSERT_TRUE(moves(fd, self->map, NPAGES, CPU));
	close(fd);
	ASSERT_TRUE(unload_driver());
	test_reload();
}

/*
 * Anything at all: commands, known and not, with arguments that make sense and
 * such that don't, on memory that changes. Nothing may come of it.
 *
 * In the environment, WILD_CALLS asks for more, and WILD_SEED for the same again.
 */
#define WILD_CALLS	2000
#define WILD_WARM_UP	1000

/* The memory: some pieces of every kind, which come and go. */
#define WILD_PIECES	16
#define WILD_PAGES	((size_t)64)

/* Behind it, what no command gets past; and the size of what a command may store. */
#define WILD_GUARD	((size_t)4096)

/* Free memory that may be missing afterwards, for caches that cannot be dropped. */
#define WILD_SLACK	((size_t)1 << 20)

struct wild {
	__u64 seed;
	int fd;
	size_t size;		/* of a piece, in bytes */
	char *space;		/* of them all */
	pthread_t caller, helper;
	atomic_bool over;
};

FIXTURE(wild)
{
	int fd;
	struct wild w;
};

FIXTURE_VARIANT(wild)
{
	int unit;
};

FIXTURE_VARIANT_ADD(wild, private) { .unit = PRIVATE_ONE };
FIXTURE_VARIANT_ADD(wild, coherent) { .unit = COHERENT_ONE };

static __u64 wild_number(const char *name, __u64 otherwise)
{
	const char *value = getenv(name);

	return value ? strtoull(value, NULL, 0) : otherwise;
}

/* Where nothing can be: the process starts anew with all of it. */
static bool wild_clear(struct wild *w)
{
	size_t size = WILD_PIECES * w->size + WILD_GUARD * psize();
	int fixed = w->space ? MAP_FIXED : 0;

	w->space = mmap(w->space, size, PROT_NONE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, -1, 0);
	return w->space != MAP_FAILED;
}

/*
 * Whatever a call has been told, it does not wait for long, and is not kept from
 * its way for ever.
 */
static void *wild_help(void *arg)
{
	struct wild *w = arg;

	for (unsigned int round = 0; !w->over; round++) {
		for (unsigned int point = 0; point < HMM_DMIRROR_NR_POINTS; point++) {
			_test_resume(w->fd, point);
			if (round % 64 == 0)
				_test_inject(w->fd, point, HMM_DMIRROR_INJECT_NOTHING, 1);
		}
		if (round % 8 == 0)
			pthread_kill(w->caller, SIGALRM);
		usleep(1000);
	}
	return NULL;
}

FIXTURE_SETUP(wild)
{
	struct sigaction interrupt = { .sa_handler = ignore };
	struct wild *w = &self->w;

	if (is_absent(variant->unit))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	self->fd = test_open(variant->unit);
	if (!has_inside(self->fd))
		SKIP(return, "this device may not stand it");
	w->fd = self->fd;
	w->size = WILD_PAGES * psize();
	w->seed = wild_number("WILD_SEED", (__u64)getpid() << 32 ^ time(NULL));
	TH_LOG("WILD_SEED=%llu", (unsigned long long)w->seed);
	ASSERT_TRUE(make_mirror(WILD_GUARD));
	ASSERT_TRUE(wild_clear(w));
	w->caller = pthread_self();
	ASSERT_EQ(0, sigaction(SIGALRM, &interrupt, NULL));
	ASSERT_EQ(0, pthread_create(&w->helper, NULL, wild_help, w));
}

FIXTURE_TEARDOWN(wild) { test_close(); }

/* Marsaglia's xorshift: good enough, and the same everywhere. */
static __u64 wild(struct wild *w)
{
	w->seed ^= w->seed << 13;
	w->seed ^= w->seed >> 7;
	w->seed ^= w->seed << 17;
	return w->seed;
}

static __u64 wild_below(struct wild *w, __u64 limit)
{
	return wild(w) % limit;
}

static bool wild_chance(struct wild *w, __u64 one_in)
{
	return !wild_below(w, one_in);
}

/* Of any size, small ones no less often than large ones. */
static __u64 wild_any(struct wild *w)
{
	return wild(w) >> wild_below(w, 64);
}

static void *wild_piece(struct wild *w)
{
	return w->space + wild_below(w, WILD_PIECES) * w->size;
}

/* Within the memory, most of the time, or where no process has any. */
static __u64 wild_addr(struct wild *w)
{
	const __u64 nowhere[] = {
		0, psize(), 0 - psize(), ~0ULL, 1ULL << 63, 1ULL << 63 | wild(w),
	};
	__u64 addr = (uintptr_t)w->space +
		     wild_below(w, WILD_PIECES * WILD_PAGES) * psize();

	if (wild_chance(w, 30))
		return nowhere[wild_below(w, ARRAY_SIZE(nowhere))];
	if (wild_chance(w, 30))
		return addr + wild_below(w, psize());
	return addr;
}

/* A place that the kernel may write to: nothing else of the process's own. */
static __u64 wild_buffer(struct wild *w)
{
	return wild_chance(w, 20) ? wild_addr(w) : (uintptr_t)mirror;
}

static __u64 wild_npages(struct wild *w)
{
	return wild_chance(w, 50) ? wild_any(w) : wild_below(w, 2 * WILD_PAGES);
}

static void wild_mmap(struct wild *w, void *piece)
{
	static const int prots[] = {
		PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE, PROT_READ, PROT_NONE,
	};
	int prot = prots[wild_below(w, ARRAY_SIZE(prots))];
	size_t npages = 1 + wild_below(w, IO_PAGES);
	off_t offset = wild_below(w, IO_PAGES) * psize();

	switch (wild_below(w, 4)) {
	case 0:
		mmap(piece, w->size, prot, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		break;
	case 1:
		if (wild_chance(w, 2))
			offset += HMM_DMIRROR_GATE_OFFSET;
		mmap(piece, npages * psize(), prot, MAP_SHARED | MAP_FIXED, w->fd, offset);
		break;
	default:
		mmap(piece, w->size, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	}
}

/* By another process, as some of the memory may kill whoever touches it. */
static void wild_touch(struct wild *w, void *piece)
{
	pid_t pid = fork();

	if (!pid) {
		signal(SIGSEGV, _exit);
		signal(SIGBUS, _exit);
		cpu_writes(piece, wild_below(w, WILD_PAGES) + 1, CHILD);
		_exit(0);
	}
	while (pid > 0 && waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
}

static void wild_change(struct wild *w)
{
	static const int advices[] = {
		MADV_DONTNEED, MADV_FREE, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_PAGEOUT,
		MADV_COLD, MADV_POPULATE_READ, MADV_POPULATE_WRITE,
	};
	size_t size = (1 + wild_below(w, WILD_PAGES)) * psize();
	void *piece = wild_piece(w);

	switch (wild_below(w, 8)) {
	case 0:
		munmap(piece, size);
		break;
	case 1:
		wild_mmap(w, piece);
		break;
	case 2:
		mprotect(piece, size, wild_below(w, 4));
		break;
	case 3:
		mremap(piece, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, wild_piece(w));
		break;
	case 4:
		if (wild_chance(w, 20))
			wild_touch(w, piece);
		break;
	default:
		madvise(piece, size, advices[wild_below(w, ARRAY_SIZE(advices))]);
	}
}

/* The number may have a bit wrong, or all of them, and so may the argument's address. */
static void wild_ioctl(struct wild *w, unsigned long command, void *arg)
{
	if (wild_chance(w, 50))
		command ^= 1UL << wild_below(w, 32);
	if (wild_chance(w, 100))
		command = wild_any(w);
	if (wild_chance(w, 50))
		arg = (void *)wild_addr(w);
	ioctl(w->fd, command, arg);
}

static void wild_cmd(struct wild *w)
{
	static const unsigned long commands[] = {
		HMM_DMIRROR_READ, HMM_DMIRROR_READ_UNLOCKED, HMM_DMIRROR_WRITE,
		HMM_DMIRROR_SNAPSHOT, HMM_DMIRROR_MIGRATE_TO_DEV,
		HMM_DMIRROR_MIGRATE_TO_SYS, HMM_DMIRROR_EXCLUSIVE,
		HMM_DMIRROR_CHECK_EXCLUSIVE, HMM_DMIRROR_FLAGS, HMM_DMIRROR_RELEASE,
	};
	unsigned long command = commands[wild_below(w, ARRAY_SIZE(commands))];
	struct hmm_dmirror_cmd cmd = {
		.addr = wild_addr(w),
		.ptr = wild_buffer(w),
		.npages = wild_npages(w),
		.cpages = wild_any(w),
		.faults = wild_any(w),
	};

	/* These flags are few: half of the time, no other is set. */
	if (command == HMM_DMIRROR_FLAGS)
		cmd.npages = wild_chance(w, 2) ? wild_any(w) : wild_below(w, 2);
	wild_ioctl(w, command, &cmd);
}

/* As an operation wants it. */
static void wild_arguments(struct wild *w, struct hmm_dmirror_test *test)
{
	switch (test->op) {
	case HMM_DMIRROR_OP_FAULT:
		test->flags = wild_below(w, 16);
		test->fault.start = wild_addr(w);
		test->fault.end = test->fault.start + wild_npages(w) * psize();
		test->fault.default_flags = wild(w) & wild(w);
		test->fault.pfn_flags_mask = wild(w) & wild(w);
		test->fault.timeout = 1 + wild_below(w, 5);
		break;
	case HMM_DMIRROR_OP_INJECT:
		test->inject.point = wild_below(w, HMM_DMIRROR_NR_POINTS);
		test->inject.action = wild_below(w, HMM_DMIRROR_NR_INJECTIONS);
		test->inject.skip = wild_below(w, 3);
		test->inject.count = 1 + wild_below(w, 3);
		break;
	case HMM_DMIRROR_OP_AWAIT:
		test->await.point = wild_below(w, HMM_DMIRROR_NR_POINTS);
		test->await.timeout = wild_below(w, 3);
		break;
	case HMM_DMIRROR_OP_RESUME:
		test->resume.point = wild_below(w, HMM_DMIRROR_NR_POINTS);
		break;
	case HMM_DMIRROR_OP_CHECK:
		test->check.addr = wild_addr(w);
		test->check.npages = wild_npages(w);
		break;
	}
}

/* With some words wrong, in what the kernel knows or just behind it, and of any size. */
static void wild_test(struct wild *w)
{
	union {
		struct hmm_dmirror_test test;
		__u32 words[1024];
	} u = { .words = { 0 } };
	size_t known = sizeof(u.test) / sizeof(*u.words);

	u.test.size = sizeof(u.test);
	u.test.op = wild_below(w, HMM_DMIRROR_OP_CHECK + 2);
	wild_arguments(w, &u.test);
	if (wild_chance(w, 20))
		u.test.size = wild_below(w, sizeof(u));
	while (wild_chance(w, 3))
		u.words[wild_below(w, known + 2)] = wild_any(w);
	if (u.test.op == HMM_DMIRROR_OP_FAULT)
		u.test.fault.pfns = wild_buffer(w);
	wild_ioctl(w, HMM_DMIRROR_TEST, &u);
}

/* Ends as it has begun, with nothing there. */
static bool wild_run(struct wild *w, __u64 calls)
{
	while (calls--) {
		if (wild_chance(w, 4))
			wild_change(w);
		if (wild_chance(w, 3))
			wild_test(w);
		else
			wild_cmd(w);
	}
	for (unsigned int point = 0; point < HMM_DMIRROR_NR_POINTS; point++)
		_test_inject(w->fd, point, HMM_DMIRROR_INJECT_NOTHING, 1);
	madvise(mirror, WILD_GUARD * psize(), MADV_DONTNEED);
	return agrees(w->fd) && !_test_cmd_release(w->fd) && wild_clear(w);
}

/*
 * Slabs give back pages of which nothing is in use. KASAN, too, which keeps what was
 * freed for as long as it is little beside all memory, lets go of it for this.
 */
static void shrink_slabs(void)
{
	int slabs = open("/sys/kernel/slab", O_RDONLY | O_DIRECTORY), slab, shrink;
	DIR *dir = slabs < 0 ? NULL : fdopendir(slabs);
	struct dirent *entry;

	while (dir && (entry = readdir(dir))) {
		/* The rest are other names for the same. */
		if (entry->d_type != DT_DIR)
			continue;
		slab = openat(slabs, entry->d_name, O_PATH);
		shrink = openat(slab, "shrink", O_WRONLY);
		if (shrink >= 0 && write(shrink, "1", 1) < 0)
			perror(entry->d_name);
		close(shrink);
		close(slab);
	}
	if (dir)
		closedir(dir);
}

/* In bytes: what zones have, and what each CPU has put aside of them. */
static size_t free_memory(void)
{
	unsigned long n, npages = 0;
	FILE *zones;
	char line[128];

	/* The kernel gives back what it has no need of. */
	shrink_slabs();
	write_num("/proc/sys/vm/drop_caches", 3);
	if (!access("/proc/sys/vm/compact_memory", W_OK))
		write_num("/proc/sys/vm/compact_memory", 1);

	zones = fopen("/proc/zoneinfo", "r");
	while (zones && fgets(line, sizeof(line), zones))
		if (sscanf(line, " nr_free_pages %lu", &n) == 1 ||
		    sscanf(line, " count: %lu", &n) == 1)
			npages += n;
	if (zones)
		fclose(zones);
	return npages * psize();
}

/* What is freed later than asked for is, some time. A leak never is. */
static size_t missing_memory(size_t before)
{
	size_t now = free_memory();

	for (int tries = 0; now + WILD_SLACK < before && tries < 50; tries++) {
		usleep(100000);
		now = free_memory();
	}
	return now < before ? before - now : 0;
}

/* Nothing is left of it, once the device has got what memory it needs at all. */
TEST_F_TIMEOUT(wild, calls, 3600)
{
	__u64 calls = wild_number("WILD_CALLS", WILD_CALLS);
	struct wild *w = &self->w;
	size_t before, missing;

	ASSERT_TRUE(wild_run(w, WILD_WARM_UP));
	before = free_memory();
	ASSERT_TRUE(wild_run(w, calls));
	missing = missing_memory(before);
	w->over = true;
	ASSERT_EQ(0, pthread_join(w->helper, NULL));
	TH_LOG("%llu calls, %zu bytes less", (unsigned long long)calls, missing);
	EXPECT_GE(WILD_SLACK, missing);
	test_stats();
	EXPECT_EQ(0, inside.stats.bytes);
}

/*
 * Secret memory, last: a kernel that lets the device at it may not survive.
 */
FIXTURE(secretmem)
{
	int fd;
	char *map;
};

FIXTURE_SETUP(secretmem)
{
	int file = syscall(__NR_memfd_secret, 0);

	if (file < 0)
		SKIP(return, "no secret memory: %s", strerror(errno));
	self->fd = test_open(PRIVATE_ONE);
	ASSERT_TRUE(make_mirror(NPAGES));
	ASSERT_EQ(0, ftruncate(file, NPAGES * psize()));
	self->map = mmap(NULL, NPAGES * psize(), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	ASSERT_NE(MAP_FAILED, self->map);
}

FIXTURE_TEARDOWN(secretmem) { test_close(); }

TEST_F(secretmem, snapshot)
{
	cpu_writes(self->map, NPAGES / 2, CPU);
	test_cmd_snapshot(self->map, NPAGES, SEES_ERROR);
}

TEST_F(secretmem, read)
{
	cpu_writes(self->map, NPAGES, CPU);
	test_err_read(EFAULT, self->map, NPAGES);
	test_err(EFAULT, _test_cmd_read_unlocked(self->fd, self->map, NPAGES));
}

TEST_F(secretmem, write)
{
	cpu_writes(self->map, NPAGES, CPU);
	test_err_write(EFAULT, self->map, NPAGES);
	ASSERT_TRUE(cpu_sees(self->map, NPAGES, CPU));
}

TEST_HARNESS_MAIN
