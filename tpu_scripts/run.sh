#!/usr/bin/env bash
# Start one atlas-jax command on every host, detached from this terminal. Started again with
# the same MODEL_DIR, a training run goes on from its last checkpoint.
#
#   tpu_scripts/run.sh --name atlas --zone us-central2-b -- \
#       train --gin_file=models/xl.gin --gin_file=runs/nq_64shot.gin --gin_file=mesh/fsdp.gin \
#       --gin.MODEL_DIR=/mnt/disks/atlas/nq ...

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_flags "$@"
((${#ARGUMENTS[@]})) || die "what shall run? write it after --"

command_line="$(quoted "${ARGUMENTS[@]}")"
on_every_host "set -eu
cd ~/$REMOTE_DIR
if [ -f run.pid ] && kill -0 \"\$(cat run.pid)\" 2>/dev/null; then
    echo 'a run is already going (run.pid)' >&2
    exit 1
fi
nohup venv/bin/atlas-jax ${command_line}> run.log 2>&1 < /dev/null &
echo \$! > run.pid"
echo "started; tpu_scripts/logs.sh follows it" >&2
