// SPDX-License-Identifier: GPL-2.0
/*
 * GNU make ends with status 2 whatever status the command that failed had, yet
 * `make vm` is to end with the command's own. Loaded into make, this hands the
 * recipe a file in memory, and make ends with the status that it finds there.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int plugin_is_GPL_compatible;
void gmk_eval(const char *text, const void *where);

static int fd;

static void leave(int status, void *unused)
{
	char text[16] = "";

	(void)status;
	(void)unused;
	if (pread(fd, text, sizeof(text) - 1, 0) <= 0)
		return;
	fflush(NULL);
	_exit(atoi(text));
}

int status_gmk_setup(void)
{
	char text[64];

	fd = memfd_create("status", 0);
	if (fd < 0)
		return 1;
	snprintf(text, sizeof(text), "export STATUS_FD := %d", fd);
	gmk_eval(text, NULL);
	on_exit(leave, NULL);
	return 1;
}
