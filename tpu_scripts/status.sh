#!/usr/bin/env bash
# Tell the state of the slice, and of the run on its first host: running, or its exit code
# (0 done, 2 wrong flags or files or a full disk, 75 stopped by a preemption, its last step saved).
#
#   tpu_scripts/status.sh --name atlas --zone us-central2-b

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_flags "$@"
state
run_state
