#!/usr/bin/env bash
# Stop the current run on every host; the slice and its checkpoints stay. A training run saves its
# last step before it ends, so this waits for it (up to 5 minutes).
#
#   tpu_scripts/stop.sh --name atlas --zone us-central2-b

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_flags "$@"
on_every_host "cd ~/$REMOTE_DIR && [ -f run.pid ] || exit 0
pid=\"\$(cat run.pid)\"
kill \"\$pid\" 2>/dev/null || exit 0
for _ in \$(seq 300); do
    kill -0 \"\$pid\" 2>/dev/null || exit 0
    sleep 1
done
pkill -KILL -P \"\$pid\"; kill -KILL \"\$pid\""
