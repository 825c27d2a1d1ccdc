#!/usr/bin/env bash
# Bring a run back: make the slice again if it was taken away, then start the command, which
# goes on from the last checkpoint in its MODEL_DIR (a mounted disk or bucket that outlives
# the slice).
#
#   tpu_scripts/resume.sh --name atlas --zone us-central2-b --type v4-8 [--spot] -- train ...
#
#   --type TYPE   as in create.sh, used if the slice has to be made again (required)
#   --spot        as in create.sh

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CREATE=()

own_flag() {
    case "$1" in
    --type) CREATE+=(--type "$2") && return 2 ;;
    --spot) CREATE+=(--spot) && return 1 ;;
    esac
    return 0
}

parse_flags "$@"
((${#CREATE[@]})) || die "which accelerator? --type v4-8"
((${#ARGUMENTS[@]})) || die "what shall run? write it after --"

export TPU_NAME TPU_ZONE TPU_PROJECT DRY_RUN
here="$(dirname "${BASH_SOURCE[0]}")"
now="$(state || echo NONE)"
if [[ -n "$DRY_RUN" ]]; then
    echo "$now"
    echo "# unless ACTIVE:"
fi
if [[ "$now" != ACTIVE ]]; then
    if [[ "$now" != NONE ]]; then "$here/delete.sh"; fi
    "$here/create.sh" "${CREATE[@]}"
    "$here/setup.sh"
fi
"$here/run.sh" -- "${ARGUMENTS[@]}"
