#!/usr/bin/env bash
# Follow the log of the current run on one host. Ctrl-C stops the following, not the run.
#
#   tpu_scripts/logs.sh --name atlas --zone us-central2-b [--worker 0] [--slice 0]
#
#   --worker N   which host (default 0, the one that writes metrics and checkpoints)
#   --slice N    of which slice, if there are several (default 0)

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

WORKER=0
SLICE=0

own_flag() {
    case "$1" in
    --worker) WORKER="$2" && return 2 ;;
    --slice) SLICE="$2" && return 2 ;;
    esac
    return 0
}

parse_flags "$@"
if [[ ! "$SLICE" =~ ^[0-9]+$ ]] || ((SLICE >= TPU_SLICES)); then
    die "--slice $SLICE: expected less than --slices $TPU_SLICES"
fi
node="$(nodes | sed -n "$((SLICE + 1))p")"
tpus tpu-vm ssh "$node" --worker="$WORKER" --command="tail -n 50 -F ~/$REMOTE_DIR/run.log"
