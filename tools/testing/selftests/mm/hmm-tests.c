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
 * What the tests change of the system is put back, whatever becomes of a test:
 * the settings of huge pages by the helpers of hugepage_settings.h, all else by
 * fixtures that are torn down in the test's parent.
 */
#include "kselftest_harness.h"

#include <asm-generic/mman.h> /* the tools' version: libc's may be older */
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
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>
#include <linux/magic.h>
#include <linux/memfd.h>
#include <linux/userfaultfd.h>

#include "hugepage_settings.h"
#include "vm_util.h"

#include <lib/test_hmm_uapi.h>

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

static const struct backing anon = { .kind = ANON, .share = MAP_PRIVATE };
static const struct backing thp = { .kind = ANON, .share = MAP_PRIVATE, .level = PMD };
static const struct backing shmem = { .kind = SHMEM, .share = MAP_SHARED };

/*
 * The process's side of the device: what it read, what it is to write, or the
 * bytes of a snapshot; and its last answer.
 */
static char *mirror;
static struct hmm_dmirror_cmd answer;

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

static bool file_holds(int file, void *addr, size_t npages, enum writer who)
{
	size_t size = npages * psize();
	char *buf = malloc(size);
	bool good = buf && pread(file, buf, size, 0) == (ssize_t)size &&
		    holds(buf, addr, npages, who);

	free(buf);
	return good;
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
 * The device's commands
 */

static int _test_cmd(int dev, unsigned long command, void *addr, size_t npages, void *ptr)
{
	int ret;

	answer = (struct hmm_dmirror_cmd) {
		.addr = (uintptr_t)addr,
		.ptr = (uintptr_t)ptr,
		.npages = npages,
	};
	ret = ioctl(dev, command, &answer);
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

/* The error of any command that has a range, for arguments that none can take. */
static int argument_error(int dev, void *addr, size_t npages, void *ptr)
{
	static const unsigned long commands[] = {
		HMM_DMIRROR_READ, HMM_DMIRROR_READ_UNLOCKED, HMM_DMIRROR_WRITE,
		HMM_DMIRROR_SNAPSHOT,
	};

	return common_error(dev, commands, ARRAY_SIZE(commands), addr, npages, ptr);
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

#define test_err_access(_errno, addr, npages)					\
	EXPECT_EQ(_errno, access_error(self->fd, addr, npages))
#define test_err_arguments(_errno, addr, npages, ptr)				\
	ASSERT_EQ(_errno, argument_error(self->fd, addr, npages, ptr))

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

#define test_open(unit)								\
({										\
	int __fd = open_device(unit);						\
										\
	ASSERT_GE(__fd, 0)							\
		TH_LOG("no test device: %s", strerror(errno));			\
	__fd;									\
})

#define test_open_pagemap()							\
({										\
	int __fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);		\
										\
	ASSERT_GE(__fd, 0);							\
	__fd;									\
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

/* Once for all tests. What was there before comes back when the last has run. */
static void __attribute__((constructor)) huge_pages_setup(void)
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
	settings.khugepaged.defrag = false;
	for (unsigned int i = 0; i < NR_ORDERS; i++) {
		settings.hugepages[i].enabled = i == order ? THP_MADVISE : THP_NEVER;
		settings.shmem_hugepages[i].enabled = i == order ? SHMEM_ADVISE : SHMEM_NEVER;
	}
	thp_write_settings(&settings);
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

FIXTURE_VARIANT_ADD(backing, anon)
{
	.b = { .kind = ANON, .share = MAP_PRIVATE },
};

FIXTURE_VARIANT_ADD(backing, mthp)
{
	.b = { .kind = ANON, .share = MAP_PRIVATE, .order = 4 },
};

FIXTURE_VARIANT_ADD(backing, thp)
{
	.b = { .kind = ANON, .share = MAP_PRIVATE, .level = PMD },
};

FIXTURE_VARIANT_ADD(backing, shmem)
{
	.b = { .kind = SHMEM, .share = MAP_SHARED },
};

FIXTURE_VARIANT_ADD(backing, shmem_private)
{
	.b = { .kind = SHMEM, .share = MAP_PRIVATE },
};

FIXTURE_VARIANT_ADD(backing, shmem_thp)
{
	.b = { .kind = SHMEM, .share = MAP_SHARED, .level = PMD },
};

FIXTURE_VARIANT_ADD(backing, file)
{
	.b = { .kind = DISK, .share = MAP_SHARED },
};

FIXTURE_VARIANT_ADD(backing, file_private)
{
	.b = { .kind = DISK, .share = MAP_PRIVATE },
};

FIXTURE_VARIANT_ADD(backing, hugetlb_pmd)
{
	.b = { .kind = HUGETLB, .share = MAP_PRIVATE, .level = PMD },
};

FIXTURE_VARIANT_ADD(backing, hugetlb_pmd_shared)
{
	.b = { .kind = HUGETLB, .share = MAP_SHARED, .level = PMD },
};

FIXTURE_VARIANT_ADD(backing, hugetlb_pud)
{
	.b = { .kind = HUGETLB, .share = MAP_SHARED, .level = PUD },
};

FIXTURE_SETUP(backing)
{
	static const unsigned char size_bits[] = { 0, SEES_PMD, SEES_PUD };
	const struct backing *b = &variant->b;
	size_t leaf = level_size(b->level);

	if (lacks(b))
		SKIP(return, "%s", lacks(b));
	if (wants_thp(b))
		thp_only(b->order ? b->order : pmd_order());

	self->fd = test_open(PRIVATE_ONE);
	self->pagemap = test_open_pagemap();
	self->npages = b->level ? 2 * pages(pmd_size()) : NPAGES;
	self->size = b->level == PUD ? leaf : self->npages * psize();
	self->granule = b->level ? pages(leaf) : 1UL << b->order;
	self->size_bits = size_bits[b->level];
	ASSERT_TRUE(make_mirror(self->npages));

	self->map = map_backing(b, self->size, &self->file);
	ASSERT_NE(MAP_FAILED, self->map);
	if (b->level == PUD) {
		/* Leave no trace of the test before, nor of this. */
		memset(self->map, 0, self->npages * psize());
		ASSERT_EQ(0, madvise(self->map, self->size, MADV_DONTNEED));
	}
}

FIXTURE_TEARDOWN_PARENT(backing)
{
	if (wants_thp(&variant->b) && thp_available())
		thp_restore_settings();
}

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
	pid_t pid;
	int hold;

	cpu_writes(self->map, self->npages, CPU);
	test_cmd_write(self->map, self->npages, CPU);
	pid = test_fork_held(&hold);
	if (!pid)
		_exit(!cpu_sees(self->map, self->npages, private ? CPU : DEVICE));

	test_cmd_write(self->map, self->npages, DEVICE);
	test_faults(private);
	ASSERT_TRUE(cpu_sees(self->map, self->npages, DEVICE));
	ASSERT_TRUE(child_agrees(pid, hold));
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

FIXTURE_VARIANT_ADD(file, shmem)
{
	.b = { .kind = SHMEM, .share = MAP_SHARED },
};

FIXTURE_VARIANT_ADD(file, disk)
{
	.b = { .kind = DISK, .share = MAP_SHARED },
};

FIXTURE_SETUP(file)
{
	if (lacks(&variant->b))
		SKIP(return, "%s", lacks(&variant->b));
	self->fd = test_open(PRIVATE_ONE);
	self->pagemap = test_open_pagemap();
	ASSERT_TRUE(make_mirror(NPAGES));
	self->map = map_backing(&variant->b, NPAGES * psize(), &self->file);
	ASSERT_NE(MAP_FAILED, self->map);
}

FIXTURE_TEARDOWN(file)
{
	close(self->fd);
}

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

FIXTURE_VARIANT_ADD(hmm, private)
{
	.unit = PRIVATE_ONE,
};

FIXTURE_VARIANT_ADD(hmm, coherent)
{
	.unit = COHERENT_ONE,
};

FIXTURE_SETUP(hmm)
{
	if (is_absent(variant->unit))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	self->fd = test_open(variant->unit);
	self->pagemap = test_open_pagemap();
	ASSERT_TRUE(make_mirror(NPAGES));
}

FIXTURE_TEARDOWN(hmm)
{
	close(self->fd);
}

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

	test_cmd_write(map, NPAGES, DEVICE);
	if (!page_out(self->pagemap, map, NPAGES))
		SKIP(return, "no swap, or not enough of it");
	test_cmd_read_unlocked(map, NPAGES, DEVICE);
	test_faults(1);
	cpu_writes(map, NPAGES, CPU);
	test_cmd_read(map, NPAGES, CPU);
}

/* A parent that writes gets a copy; the device follows it there. */
TEST_F(hmm, copied_on_write)
{
	char *map = test_mmap(&anon, NPAGES);
	pid_t pid;
	int hold;

	cpu_writes(map, NPAGES, CPU);
	test_cmd_read(map, NPAGES, CPU);
	pid = test_fork_held(&hold);
	if (!pid)
		_exit(!cpu_sees(map, NPAGES, CPU));

	test_cmd_snapshot(map, NPAGES, SEES_READ);
	cpu_writes(map, NPAGES, CHILD);
	test_cmd_read(map, NPAGES, CHILD);
	test_cmd_snapshot(map, NPAGES, SEES_WRITE);
	ASSERT_TRUE(child_agrees(pid, hold));
}

/* One page written breaks the sharing of one page. */
TEST_F(hmm, copy_on_write_is_exact)
{
	char *map = test_mmap(&anon, NPAGES);
	pid_t pid;
	int hold;

	cpu_writes(map, NPAGES, CPU);
	pid = test_fork_held(&hold);
	if (!pid)
		_exit(!cpu_sees(map, NPAGES, CPU));

	test_cmd_write(at(map, 33), 1, DEVICE);
	test_cmd_snapshot(map, 33, SEES_READ);
	test_cmd_snapshot(at(map, 33), 1, SEES_WRITE);
	test_cmd_snapshot(at(map, 34), NPAGES - 34, SEES_READ);
	ASSERT_TRUE(child_agrees(pid, hold));
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
	self->fd = device_of_the_dead(variant->unit);
	ASSERT_GE(self->fd, 0);
	test_err_access(EFAULT, map, NPAGES);
}

/*
 * Memory comes and goes while the device works on it. What it reads of a page
 * is that page as it once was, never anything else.
 */
static atomic_bool storm_over;

/*
 * Time for the device to get all pages in, on a slow machine, too: without any
 * it may try until it gives up, as it has every right to.
 */
static bool storm_goes_on(void)
{
	usleep(10000);
	return !storm_over;
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

static bool pages_are_whole(char *map)
{
	for (size_t i = 0; i < NPAGES; i++) {
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

	ASSERT_EQ(0, pthread_create(&storm, NULL, discard_storm, map));
	for (int i = 0; i < 20; i++) {
		test_cmd_write(map, NPAGES, DEVICE);
		ASSERT_EQ(0, _test_cmd_read(self->fd, map, NPAGES));
		ASSERT_TRUE(pages_are_whole(map));
		ASSERT_EQ(0, _test_cmd_read_unlocked(self->fd, map, NPAGES));
		ASSERT_TRUE(pages_are_whole(map));
	}
	storm_over = true;
	ASSERT_EQ(0, pthread_join(storm, NULL));
}

TEST_F(hmm, unmapped_meanwhile)
{
	char *map = test_mmap(&anon, NPAGES);
	pthread_t storm;
	int ret;

	ASSERT_EQ(0, pthread_create(&storm, NULL, unmap_storm, map));
	for (int i = 0; i < 20; i++) {
		ret = _test_cmd_write(self->fd, map, NPAGES, DEVICE);
		ASSERT_EQ(ret ? EFAULT : 0, ret ? errno : 0);
		ret = _test_cmd_read(self->fd, map, NPAGES);
		ASSERT_EQ(ret ? EFAULT : 0, ret ? errno : 0);
		ASSERT_TRUE(ret || pages_are_whole(map));
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

	test_err_arguments(EINVAL, map + 1, 1, mirror);
	test_err_arguments(EINVAL, map + psize() / 2, 1, mirror);
	test_err_arguments(EINVAL, map, 0, mirror);
	test_err_arguments(EINVAL, last, 1, mirror);
	test_err_arguments(EINVAL, last, 2, mirror);
	test_err_arguments(EINVAL, map, SIZE_MAX >> pshift(), mirror);
	test_entries(map, NPAGES, POPULATED, 0);
}

/* So many pages that their size in bytes is none, or that of one; or just too many. */
TEST_F(hmm, too_many_pages)
{
	char *map = test_mmap(&anon, NPAGES);
	size_t none = SIZE_MAX / psize() + 1;

	test_err_arguments(EINVAL, map, none, mirror);
	test_err_arguments(EINVAL, map, none + 1, mirror);
	test_err_arguments(EINVAL, map, SIZE_MAX, mirror);
	test_err_arguments(E2BIG, map, none >> 12, mirror);
	test_entries(map, NPAGES, POPULATED, 0);
}

TEST_F(hmm, bad_buffer)
{
	char *map = test_mmap(&anon, NPAGES), *hole = test_mmap(&anon, 2);

	cpu_writes(map, NPAGES, CPU);
	test_munmap(at(hole, 1), 1);
	test_err_arguments(EFAULT, map, 1, at(hole, 1));
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
	test_err(EINVAL, _test_cmd(self->fd, HMM_DMIRROR_FLAGS, NULL,
				   ~HMM_DMIRROR_FLAG_FAIL_ALLOC, NULL));
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
	answer.npages = NPAGES;
	ASSERT_EQ(0, ioctl(self->fd, HMM_DMIRROR_RELEASE, &answer));
	test_cmd_read(map, NPAGES, DEVICE);
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

FIXTURE_VARIANT_ADD(hmm2, private)
{
	.unit = PRIVATE_ONE,
	.other = PRIVATE_TWO,
};

FIXTURE_VARIANT_ADD(hmm2, coherent)
{
	.unit = COHERENT_ONE,
	.other = COHERENT_TWO,
};

FIXTURE_VARIANT_ADD(hmm2, twice)
{
	.unit = PRIVATE_ONE,
	.other = PRIVATE_ONE,
};

FIXTURE_SETUP(hmm2)
{
	if (is_absent(variant->unit))
		SKIP(return, "no coherent devices: the driver has no memory for them");
	self->fd = test_open(variant->unit);
	self->other = test_open(variant->other);
	ASSERT_TRUE(make_mirror(NPAGES));
}

FIXTURE_TEARDOWN(hmm2)
{
	close(self->fd);
	close(self->other);
}

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
	self->fd = test_open(PRIVATE_ONE);
	self->pagemap = test_open_pagemap();
	self->npages = pages(pmd_size());
	ASSERT_TRUE(make_mirror(2 * self->npages));
	self->map = test_mmap(&thp, 2 * self->npages);
}

FIXTURE_TEARDOWN_PARENT(thp)
{
	if (thp_available())
		thp_restore_settings();
}

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
	test_madvise(self->map, self->npages, MADV_COLLAPSE);
	test_cmd_snapshot(self->map, self->npages, SEES_WRITE | SEES_PMD);
	test_cmd_read(self->map, self->npages, DEVICE);
	test_faults(1);
}

TEST_F(thp, swapped_out)
{
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

FIXTURE_VARIANT_ADD(uffd, anon)
{
	.b = { .kind = ANON, .share = MAP_PRIVATE },
};

FIXTURE_VARIANT_ADD(uffd, shmem)
{
	.b = { .kind = SHMEM, .share = MAP_SHARED },
};

FIXTURE_VARIANT_ADD(uffd, hugetlb_pmd)
{
	.b = { .kind = HUGETLB, .share = MAP_SHARED, .level = PMD },
};

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
	self->fd = test_open(PRIVATE_ONE);
	self->pagemap = test_open_pagemap();
	self->leaf = pages(level_size(b->level));
	self->npages = b->level ? 4 * self->leaf : NPAGES;
	self->part = self->npages / 4;
	self->size_bits = b->level ? SEES_PMD : 0;
	ASSERT_TRUE(make_mirror(self->npages));
	self->map = test_mmap(b, self->npages);
}

FIXTURE_TEARDOWN(uffd)
{
	close(self->uffd);
	close(self->fd);
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

FIXTURE_VARIANT_ADD(uffd_file, shmem)
{
	.b = { .kind = SHMEM, .share = MAP_SHARED },
};

FIXTURE_VARIANT_ADD(uffd_file, hugetlb_pmd)
{
	.b = { .kind = HUGETLB, .share = MAP_SHARED, .level = PMD },
};

FIXTURE_SETUP(uffd_file)
{
	const struct backing *b = &variant->b;

	self->uffd = uffd_open();
	if (uffd_lacks(self->uffd, b))
		SKIP(return, "%s", uffd_lacks(self->uffd, b));
	self->fd = test_open(PRIVATE_ONE);
	self->pagemap = test_open_pagemap();
	self->leaf = pages(level_size(b->level));
	self->npages = b->level ? 2 * self->leaf : NPAGES;
	self->size_bits = b->level ? SEES_PMD : 0;
	ASSERT_TRUE(make_mirror(self->npages));
	self->map = test_mmap(b, self->npages);
}

FIXTURE_TEARDOWN(uffd_file)
{
	close(self->uffd);
	close(self->fd);
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
 * Pages that have gone bad. The page that a test sacrifices is made good when
 * the test is over, however it ended.
 */
FIXTURE(hwpoison)
{
	int fd, pagemap;
	unsigned long pfn;
};

FIXTURE_VARIANT(hwpoison)
{
	struct backing b;
};

FIXTURE_VARIANT_ADD(hwpoison, anon)
{
	.b = { .kind = ANON, .share = MAP_PRIVATE },
};

FIXTURE_VARIANT_ADD(hwpoison, shmem)
{
	.b = { .kind = SHMEM, .share = MAP_SHARED },
};

FIXTURE_VARIANT_ADD(hwpoison, hugetlb_pmd)
{
	.b = { .kind = HUGETLB, .share = MAP_PRIVATE, .level = PMD },
};

FIXTURE_SETUP(hwpoison)
{
	if (access("/sys/kernel/debug/hwpoison/unpoison-pfn", W_OK))
		SKIP(return, "no hwpoison_inject, or no debugfs, to make the page good again");
	if (lacks(&variant->b))
		SKIP(return, "%s", lacks(&variant->b));
	self->fd = test_open(PRIVATE_ONE);
	self->pagemap = test_open_pagemap();
	ASSERT_TRUE(make_mirror(3 * pages(pmd_size())));
}

FIXTURE_TEARDOWN_PARENT(hwpoison)
{
	if (self->pfn)
		EXPECT_EQ(0, unpoison_memory(self->pfn));
}

static void ignore(int sig)
{
}

/* The process is told by a signal, which would end it if it were just ignored. */
static int poison(void *addr)
{
	int ret;

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
	self->pfn = pagemap_get_pfn(self->pagemap, bad);
	ASSERT_EQ(0, poison(bad));
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
#define NUMA_BALANCING "/proc/sys/kernel/numa_balancing"

FIXTURE(numa)
{
	int fd, pagemap;
	unsigned long balancing;
	bool changed;
};

FIXTURE_VARIANT(numa)
{
	struct backing b;
};

FIXTURE_VARIANT_ADD(numa, anon)
{
	.b = { .kind = ANON, .share = MAP_PRIVATE },
};

FIXTURE_VARIANT_ADD(numa, thp)
{
	.b = { .kind = ANON, .share = MAP_PRIVATE, .level = PMD },
};

FIXTURE_SETUP(numa)
{
	if (access(NUMA_BALANCING, W_OK))
		SKIP(return, "no NUMA balancing in this kernel");
	if (access("/sys/devices/system/node/node1", F_OK))
		SKIP(return, "only one NUMA node");
	if (lacks(&variant->b))
		SKIP(return, "%s", lacks(&variant->b));
	self->fd = test_open(PRIVATE_ONE);
	self->pagemap = test_open_pagemap();
	self->balancing = read_num(NUMA_BALANCING);
	self->changed = true;
	if (variant->b.level)
		thp_only(pmd_order());
	ASSERT_TRUE(make_mirror(pages(pmd_size())));
	write_num(NUMA_BALANCING, 1);
}

FIXTURE_TEARDOWN_PARENT(numa)
{
	if (!self->changed)
		return;
	write_num(NUMA_BALANCING, self->balancing);
	if (variant->b.level)
		thp_restore_settings();
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
#define KSM_RUN "/sys/kernel/mm/ksm/run"

FIXTURE(ksm)
{
	int fd;
	unsigned long run;
	bool changed;
};

FIXTURE_SETUP(ksm)
{
	if (access(KSM_RUN, W_OK))
		SKIP(return, "no KSM in this kernel");
	self->fd = test_open(PRIVATE_ONE);
	ASSERT_TRUE(make_mirror(NPAGES));
	self->run = read_num(KSM_RUN);
	self->changed = true;
}

FIXTURE_TEARDOWN_PARENT(ksm)
{
	if (self->changed) {
		ksm_stop();
		write_num(KSM_RUN, self->run);
	}
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

FIXTURE_TEARDOWN(secretmem)
{
	close(self->fd);
}

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
