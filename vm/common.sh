# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=sh disable=SC2034
# Sourced by the scripts beside it: where things are, and how they speak.
#
# BUILD   the build folder (default: build/ in the project)
# CACHE   downloads and ccache, kept by `make clean`
# V=1     show everything that a long step prints

TOP=$(cd "$(dirname "$0")/.." && pwd)
VM=$TOP/vm
BUILD=${BUILD:-build}
case $BUILD in /*) ;; *) BUILD=$TOP/$BUILD ;; esac
CACHE=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/hmm
LOGS=$BUILD/logs
SERIES=7.3
JOBS=${JOBS:-$(nproc)}

# The kernels that check themselves, the one that counts which of its lines run,
# and the one to measure have folders of their own beside the plain one's. CHECKS
# is what the first check: vm/$CHECKS.config has the options for that.
DEBUG=${DEBUG:-}
COVERAGE=${COVERAGE:-}
BENCH=${BENCH:-}
case $DEBUG in
races) CHECKS=races ;;
*) CHECKS=${DEBUG:+debug} ;;
esac
KIND=${CHECKS:+_$CHECKS}${COVERAGE:+_coverage}${BENCH:+_bench}
IMAGE=$BUILD/vm$KIND
# The plain kernel alone has RDMA: what takes longest to build and to run has not.
RDMA=
[ -n "$KIND" ] || RDMA=1

# The folders of the project that are part of the kernel patch. Fewer of them
# make a tree to compare with: OVERLAY="include mm" keeps the base tree's own
# test module, and OVERLAY= its own everything.
WHOLE_OVERLAY="include lib mm tools Documentation"
OVERLAY=${OVERLAY-$WHOLE_OVERLAY}

export BUILD IMAGE OVERLAY DEBUG COVERAGE BENCH V=${V:-}
export LC_ALL=C.UTF-8

# Runs the KUnit suites in the virtual machine, those in modules, too, and says
# KTAP. Allocations that may sleep can fail there, for the tests that ask for it.
KUNIT_SUITES='
	echo N >/sys/kernel/debug/failslab/ignore-gfp-wait
	echo KTAP version 1
	for module in $(cd /lib/modules/* && ls | sed -n "s/^\(hmm_.*\)\.ko$/\1/p"); do
		modprobe "$module" || exit
	done
	set -- /sys/kernel/debug/kunit/hmm*
	echo 1..$#
	for suite; do
		echo 1 >"$suite/run"
		grep -v -e "^KTAP version" -e "^1\.\.1$" "$suite/results"
	done'

# The kernel's make is to know nothing of the make that called, or of settings
# that the caller's shell has for other builds.
unset MAKEFLAGS MFLAGS MAKEOVERRIDES MAKELEVEL ARCH SUBARCH CROSS_COMPILE LLVM \
	KBUILD_OUTPUT KCFLAGS KCPPFLAGS KAFLAGS KCONFIG_CONFIG O

say()
{
	printf '%s\n' "hmm: $*" >&2
}

die()
{
	printf '%s\n' "hmm: error: $*" | fold -s -w 78 >&2
	exit 1
}

have()
{
	command -v "$1" >/dev/null 2>&1
}

# tree_version DIR: the kernel version that DIR's Makefile states.
tree_version()
{
	[ -f "$1/Makefile" ] || return 0
	awk -F ' *= *' '$1 == "VERSION" { v = $2 } $1 == "PATCHLEVEL" { p = $2 }
		$1 == "SUBLEVEL" { s = $2 } $1 == "EXTRAVERSION" { e = $2 }
		/^# \*DOCUMENTATION\*/ { exit }
		END { printf "%s.%s.%s%s\n", v, p, s, e }' "$1/Makefile"
}

# check_version DIR NAME: refuse a tree of another series.
check_version()
{
	version=$(tree_version "$1")
	case $version in
	$SERIES.*) ;;
	*) die "$2 is not a Linux $SERIES tree (its Makefile says \
'${version:-nothing}'). This patch is made for $SERIES; name a $SERIES.y tree \
instead. Without BASE, the one from Debian is taken." ;;
	esac
}

# One command at a time works in a build folder; the scripts that one calls
# inherit its lock.
lock()
{
	[ -n "${HMM_LOCK:-}" ] && return
	mkdir -p "$LOGS" || die "The build folder $BUILD cannot be made. \
Name one that can be written with BUILD=dir."
	exec 9>"$BUILD/.lock"
	if ! flock -n 9; then
		say "another command works in $BUILD; waiting for it"
		flock 9
	fi
	export HMM_LOCK=held
}

# need_space DIR MIB WHAT: refuse early what would fill the disk.
need_space()
{
	free=$(df -Pm "$1" | awk 'NR == 2 { print $4 }')
	[ "$free" -ge "$2" ] || die "$3 needs $2 MiB, and the disk that holds \
$1 has $free MiB free. Make room, or choose another disk with BUILD=dir \
(the tree and the builds) or XDG_CACHE_HOME=dir (downloads and ccache), \
and run the same command again."
}

# step NAME TITLE COMMAND…: a long command with progress, logged to NAME.log.
step()
{
	step_log=$LOGS/$1.log
	shift
	python3 "$VM/step.py" "$step_log" "$@"
}
