#!/usr/bin/env bash
# Stop the current run on every host; the slice and its checkpoints stay.
#
#   tpu_scripts/stop.sh --name atlas --zone us-central2-b

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_flags "$@"
on_every_host "cd ~/$REMOTE_DIR && [ -f run.pid ] && kill \"\$(cat run.pid)\" && rm run.pid"
