#!/usr/bin/env bash
# Give the slice back, with everything on its disks. It costs money until this is done.
#
#   tpu_scripts/delete.sh --name atlas --zone us-central2-b

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_flags "$@"
tpus queued-resources delete "$TPU_NAME" --force --quiet
