#!/usr/bin/env bash
# Follow the log of the current run on one host. Ctrl-C stops the following, not the run.
#
#   tpu_scripts/logs.sh --name atlas --zone us-central2-b [--worker 0]
#
#   --worker N   which host (default 0, the one that writes metrics and checkpoints)

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

WORKER=0

own_flag() {
    [[ "$1" == --worker ]] || return 0
    WORKER="$2"
    return 2
}

parse_flags "$@"
tpus tpu-vm ssh "$TPU_NAME" --worker="$WORKER" --command="tail -n 50 -F ~/$REMOTE_DIR/run.log"
