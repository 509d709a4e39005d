. vm/common.sh
export CCACHE_DIR="$CACHE/ccache" CCACHE_BASEDIR="$BUILD" CCACHE_NOHASHDIR=1 CCACHE_DEPEND=1
make -C build/tree ARCH=um O=$BUILD/um_bench CC="ccache gcc" HOSTCC="ccache gcc" HMM_PEER=$BUILD/base/mm/hmm.c -j2 2>&1 | grep -v "^  \|Entering\|Leaving" | tail
