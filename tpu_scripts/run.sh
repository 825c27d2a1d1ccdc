#!/usr/bin/env bash
# Start one atlas-jax command on every host, detached from this terminal. The hosts find each
# other. Started again with the same MODEL_DIR, a training run goes on from its last checkpoint.
#
#   tpu_scripts/run.sh --name atlas --zone us-central2-b -- \
#       train --gin_file=models/xl.gin --gin_file=runs/nq_64shot.gin --gin_file=mesh/fsdp.gin \
#       --gin.MODEL_DIR=/mnt/atlas/nq ...
#
# MODEL_DIR has to be a place that all hosts see. status.sh tells how the run ended.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_flags "$@"
((${#ARGUMENTS[@]})) || die "what shall run? write it after --"

command_line="$(quoted "${ARGUMENTS[@]}")"
# On the host a shell waits for the command to note its exit code, and hands SIGTERM on to it.
# A wait that the signal ended is followed by another, for what the command makes of it.
inner="export LIBTPU_INIT_ARGS=$(quoted "${LIBTPU_INIT_ARGS-}")
trap 'kill -TERM \$child' TERM
venv/bin/atlas-jax ${command_line}&
child=\$!
wait \$child
code=\$?
if [ \$code = 143 ]; then
    wait \$child
    last=\$?
    [ \$last = 127 ] || code=\$last
fi
echo \$code > run.code"
on_every_host "set -eu
cd ~/$REMOTE_DIR
if [ -f run.pid ] && kill -0 \"\$(cat run.pid)\" 2>/dev/null; then
    echo 'a run is already going (run.pid)' >&2
    exit 1
fi
rm -f run.code
cat > run.sh <<'ATLAS_JAX_RUN'
$inner
ATLAS_JAX_RUN
nohup bash run.sh > run.log 2>&1 < /dev/null &
echo \$! > run.pid"
echo "started; tpu_scripts/logs.sh follows it" >&2
