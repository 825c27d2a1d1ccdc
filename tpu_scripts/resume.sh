#!/usr/bin/env bash
# Keep a run going until it is done: start it, make the slice again when it was taken away,
# start the command again, which goes on from the last checkpoint in its MODEL_DIR (a bucket or
# a mounted disk that outlives the slice). Leave it running in a terminal; Ctrl-C stops the
# keeping, not the run.
#
#   tpu_scripts/resume.sh --name atlas --zone us-central2-b --type v4-8 [--spot] -- train ...
#
#   --type TYPE      as in create.sh, used if the slice has to be made again (required)
#   --spot           as in create.sh
#   --bucket NAME    as in setup.sh
#   --every SECONDS  between two looks at the run (default 60)
#   --failures N     give up after so many ends in a row that were no preemption (default 3)
#
# Ends with 0 when the run is done, and at once with 2 when it refuses its flags or files.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CREATE=()
SETUP=()
EVERY=60
FAILURES=3

own_flag() {
    case "$1" in
    --type) CREATE+=(--type "$2") && return 2 ;;
    --spot) CREATE+=(--spot) && return 1 ;;
    --bucket) SETUP+=(--bucket "$2") && return 2 ;;
    --every) EVERY="$2" && return 2 ;;
    --failures) FAILURES="$2" && return 2 ;;
    esac
    return 0
}

parse_flags "$@"
[[ " ${CREATE[*]:-} " == *" --type "* ]] || die "which accelerator? --type v4-8"
((${#ARGUMENTS[@]})) || die "what shall run? write it after --"

export TPU_NAME TPU_ZONE TPU_PROJECT DRY_RUN
here="$(dirname "${BASH_SOURCE[0]}")"

say() {
    echo "$(date +%H:%M:%S) $TPU_NAME: $*" >&2
}

# A slice that is there and set up, whatever became of the last one.
have_slice() {
    local now
    now="$(state 2>/dev/null || echo NONE)"
    [[ "$now" == ACTIVE ]] && return
    say "the slice is $now; making it again"
    if [[ "$now" != NONE ]]; then "$here/delete.sh"; fi
    "$here/create.sh" "${CREATE[@]}"
    "$here/setup.sh" "${SETUP[@]}"
}

if [[ -n "$DRY_RUN" ]]; then
    state
    echo "# unless ACTIVE:"
    "$here/delete.sh"
    "$here/create.sh" "${CREATE[@]}"
    "$here/setup.sh" "${SETUP[@]}"
    echo "# then, until it ends with 0:"
    "$here/run.sh" -- "${ARGUMENTS[@]}"
    echo "# every $EVERY seconds:"
    state
    run_state
    exit 0
fi

failed=0
while true; do
    have_slice
    # Stop what a host may still be doing whose neighbours have ended, then start on all.
    "$here/stop.sh" >/dev/null 2>&1 || true
    "$here/run.sh" -- "${ARGUMENTS[@]}" || say "could not be started on every host"
    while true; do
        sleep "$EVERY"
        [[ "$(state 2>/dev/null || echo NONE)" == ACTIVE ]] || break
        code="$(run_state 2>/dev/null || echo unreachable)"
        [[ "$code" == running ]] || break
    done
    case "${code:-}" in
    0)
        say "done"
        exit 0
        ;;
    2) die "the run refused its flags or files; logs.sh shows why" ;;
    "$PREEMPTED" | running | unreachable | "")
        say "preempted; going on from the last checkpoint"
        failed=0
        ;;
    *)
        failed=$((failed + 1))
        say "the run ended with $code ($failed of $FAILURES)"
        ((failed < FAILURES)) || die "$failed ends in a row that were no preemption"
        ;;
    esac
    code=""
done
