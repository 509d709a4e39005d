# SPDX-License-Identifier: GPL-2.0
#: HMM for Linux 7.3
#:
#:   make run      build the kernel with this HMM, boot it, run its kselftests
#:   make test     all tests: checks, KUnit (User Mode Linux and VM), kselftests,
#:                 rdma; in the VM on a kernel that checks itself, too (see DEBUG)
#:   make check    checkpatch, W=1, sparse and kernel-doc over the patch, and the
#:                 compilers of other architectures, which vm/arches lists
#:   make coverage   which lines and branches of mm/hmm*.c the KUnit suites run
#:   make bench    measure this HMM and the base tree's own in one kernel: natively
#:                 under User Mode Linux, and in instructions in the VM; a table,
#:                 and what it misses of its aims. ENGINES='um vm', TURNS=n
#:   make mutate   put each fault that vm/mutants lists into a kernel, and see the
#:                 KUnit suites fail; MUTANTS='a b*' takes those alone
#:   make arm64    the KUnit suites on arm64, with base pages of 4 and of 64 KiB;
#:                 PAGES=64 takes those alone
#:   make drivers  compile what uses HMM in the base tree against this one, and see
#:                 that all it calls is there; CC=clang-19 takes that compiler
#:   make rdma     the client that needs no hardware: RDMA in software on memory that
#:                 is paged on demand, with rdma-core's tests and some of our own;
#:                 TESTS='a b' takes those of our own alone whose names have these
#:   make shell    an interactive shell in the virtual machine
#:   make vm CMD='…' [FILES='a b']
#:                 run CMD in the virtual machine, where copies of FILES are,
#:                 and exit with its status (123: the kernel complained,
#:                 124: TIMEOUT seconds were over, 125: the machine died)
#:   make apply TREE=dir
#:                 put the patch into a Linux 7.3 tree of yours
#:   make clean    remove the build folder; downloads and ccache stay
#:
#: BUILD=dir       the build folder (build)
#: BASE=dir|file   a Linux 7.3 tree or tarball instead of Debian's
#: MIRROR=uri      the Debian archive to fetch that from
#: DEPS=skip       install no packages on this host
#: JOBS=n          run n compilers at a time (one a CPU)
#: DEBUG=1         a kernel that checks its memory and its locking; slow
#: DEBUG=races     a kernel that looks for data races of HMM; slow
#: TIMEOUT=s       end what runs longer than this in the virtual machine
#: V=1             show all that long steps print

# Variables reach the scripts as they were given, quotes, dollars and all.
$(foreach v,BASE BUILD CMD DEBUG DEPS ENGINES FILES JOBS MIRROR MUTANTS OVERLAY \
	PAGES TESTS TIMEOUT TREE TURNS V, \
	$(if $(filter-out undefined,$(origin $v)), \
		$(eval override export $v := $$(value $v))))

# The one compiler that can be chosen is that of `make drivers`, and not by the shell.
ifneq ($(origin CC),command line)
unexport CC
endif

# Make's own status for all failures is 2; vm/status.c gives it the command's.
STATUS := $(or $(BUILD),build)/status.so
ifeq ($(MAKECMDGOALS)$(filter load,$(.FEATURES)),vmload)
-load $(STATUS)
endif

$(STATUS): vm/status.c
	@vm/deps && mkdir -p $(@D) && gcc -Wall -Wextra -shared -fPIC -o $@ $<

.PHONY: run test check coverage bench mutate arm64 drivers rdma shell vm apply clean help
.NOTPARALLEL:

run test check coverage bench mutate arm64 drivers rdma shell vm apply clean:
	@vm/$@

help:
	@sed -n 's/^#: \{0,1\}//p' Makefile
