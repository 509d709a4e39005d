#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Loads the HMM test device, runs hmm-tests on it, and unloads it again.
#
# The exit status is that of hmm-tests: 0 pass, 1 fail, 4 skip. It is 4, too,
# where there is nothing to test, and 1 for anything else that goes wrong.

KSFT_FAIL=1
KSFT_SKIP=4

MODULE=test_hmm
TESTS=$(dirname "$0")/hmm-tests

# Memory that a coherent device takes: 256 MiB, and aligned to that.
REGION=$((256 << 20))

usage()
{
	cat <<-END
	usage: $0 smoke [ADDRESS ADDRESS]

	Runs hmm-tests. The coherent devices take 256 MiB of physical memory each,
	at the two addresses. It has to be set aside on the kernel's command line:
	memmap=1G\$0x140000000, say. Without addresses, memory that was set aside
	in that way and that nobody uses is found; if there is none, the tests of
	the coherent devices skip.
	END
}

# quit STATUS REASON: ends all, with the reason why.
quit()
{
	echo "$0: $2" >&2
	exit "$1"
}

# The options of the command line, one a line, that set memory aside.
set_aside()
{
	tr ' ' '\n' </proc/cmdline | sed -n 's/^memmap=//p' | tr ',' '\n' |
		sed -n 's/^\(0*[1-9x][0-9A-Fa-fx]*[KMGTkmgt]*\)\\*\$/\1 /p'
}

# bytes NUMBER: the number without its suffix, in bytes.
bytes()
{
	digits=${1%[KMGTkmgt]}
	case $1 in
	*[Kk]) echo $((digits << 10)) ;;
	*[Mm]) echo $((digits << 20)) ;;
	*[Gg]) echo $((digits << 30)) ;;
	*[Tt]) echo $((digits << 40)) ;;
	*) echo $((digits)) ;;
	esac
}

# was_memory FIRST LAST: does the firmware say that all of this is memory?
was_memory()
{
	for entry in /sys/firmware/memmap/*; do
		[ "$(cat "$entry/type" 2>/dev/null)" = "System RAM" ] || continue
		[ $(($(cat "$entry/start"))) -le "$1" ] || continue
		[ $(($(cat "$entry/end"))) -ge "$2" ] && return
	done
	return 1
}

# is_unused FIRST LAST: is all of this reserved, and claimed by no driver?
is_unused()
{
	reserved=no
	while IFS= read -r line; do
		range=${line%% : *}
		range=${range##* }
		[ $((0x${range#*-})) -ge "$1" ] || continue
		[ $((0x${range%-*})) -le "$2" ] || continue
		# Whatever overlaps must be the one reserved range around it.
		case $line in [!\ ]*" : Reserved") ;; *) return 1 ;; esac
		[ $((0x${range%-*})) -le "$1" ] || return 1
		[ $((0x${range#*-})) -ge "$2" ] || return 1
		reserved=yes
	done </proc/iomem
	[ $reserved = yes ]
}

# The addresses of memory that can be given to the coherent devices.
find_regions()
{
	set_aside | while read -r size start; do
		at=$((($(bytes "$start") + REGION - 1) / REGION * REGION))
		end=$(($(bytes "$start") + $(bytes "$size")))
		while [ $((at + REGION)) -le "$end" ]; do
			was_memory $at $((at + REGION - 1)) &&
				is_unused $at $((at + REGION - 1)) &&
				printf '0x%x\n' $at
			at=$((at + REGION))
		done
	done
}

is_loaded()
{
	[ -d /sys/module/$MODULE ]
}

is_installed()
{
	[ -n "$(find "/lib/modules/$(uname -r)" -name "$MODULE.ko*" 2>/dev/null)" ]
}

# load [ADDRESS ADDRESS]
load()
{
	if is_loaded; then
		[ $# -eq 0 ] ||
			quit $KSFT_FAIL "$MODULE is loaded: unload it first, for addresses to count"
		return
	fi
	is_installed ||
		quit $KSFT_SKIP "no module $MODULE: build it by CONFIG_TEST_HMM=m, and install it"
	command -v modprobe >/dev/null || quit $KSFT_SKIP "no modprobe"

	if [ $# -eq 0 ]; then
		# shellcheck disable=SC2046 # as many words as there are regions
		set -- $(find_regions)
	fi
	if [ $# -ge 2 ]; then
		# As far apart as can be
		first=$1
		shift $(($# / 2))
		set -- "spm_addr_dev0=$first" "spm_addr_dev1=$1"
	else
		set --
	fi
	LOADED=yes
	modprobe $MODULE "$@" || quit $KSFT_FAIL "$MODULE cannot be loaded${*:+ with $*}"
}

# Only what this script has loaded, and whatever has become of the tests.
unload()
{
	[ "$LOADED" = yes ] && is_loaded || return 0
	modprobe -r $MODULE
}

# devtmpfs makes the nodes, where there is one.
make_nodes()
{
	[ -e /dev/hmm_dmirror0 ] && return
	for number in /sys/dev/char/*; do
		node=$(readlink "$number")
		node=/dev/${node##*/}
		number=${number##*/}
		case $node in
		/dev/hmm_dmirror[0-9]*)
			mknod -m 600 "$node" c "${number%:*}" "${number#*:}" ||
				quit $KSFT_FAIL "$node cannot be made"
			NODES="$NODES $node"
			;;
		esac
	done
}

finish()
{
	status=$?
	trap - EXIT
	# shellcheck disable=SC2086 # a list
	rm -f $NODES
	if ! unload; then
		echo "$0: $MODULE cannot be unloaded" >&2
		[ $status -ne 0 ] || status=$KSFT_FAIL
	fi
	exit $status
}

run()
{
	[ "$(id -u)" -eq 0 ] || quit $KSFT_SKIP "must be run as root"
	[ -x "$TESTS" ] || quit $KSFT_FAIL "no $TESTS: it has to be built first"

	LOADED=no
	NODES=
	trap finish EXIT
	trap 'exit 129' HUP
	trap 'exit 130' INT
	trap 'exit 143' TERM

	load "$@"
	make_nodes
	"$TESTS"
	exit
}

case $1:$# in
smoke:1 | smoke:3)
	shift
	run "$@"
	;;
:0 | -h:1 | --help:1)
	usage
	;;
*)
	usage >&2
	exit $KSFT_FAIL
	;;
esac
