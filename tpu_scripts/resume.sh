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
#   --bucket NAME, --share SERVER:/NAME   as in setup.sh
#   --every SECONDS  between two looks at the run (default 60)
#   --failures N     give up at the Nth end in a row that was no preemption, so after N starts, and
#                    at the Nth attempt in a row that gave no slice (default 3)
#
# A request that waits for its turn is waited for. A look at the slice or at the run that fails
# (network, login) is repeated: only what Cloud TPU says is taken for the slice's end.
# Ends with 0 when the run is done, and at once with 2 when it refuses its flags or files, or a disk
# is full.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TYPE=""
CREATE=()
SETUP=()
SHARE=""
EVERY=60
FAILURES=3

own_flag() {
    case "$1" in
    --type) TYPE="$2" && return 2 ;;
    --spot) CREATE+=(--spot) && return 1 ;;
    --bucket) SETUP+=(--bucket "$2") && return 2 ;;
    --share) SHARE="$2" && SETUP+=(--share "$2") && return 2 ;;
    --every) EVERY="$2" && return 2 ;;
    --failures) FAILURES="$2" && return 2 ;;
    esac
    return 0
}

parse_flags "$@"
[[ -n "$TYPE" ]] || die "which accelerator? --type v4-8"
# What setup.sh and create.sh would refuse: now, not after the first preemption.
accelerator_of "$TYPE" >/dev/null
check_share "$SHARE"
CREATE+=(--type "$TYPE")
[[ "$EVERY" =~ ^[0-9]+$ ]] || die "--every $EVERY: expected a number of seconds, as 60"
[[ "$FAILURES" =~ ^[1-9][0-9]*$ ]] || die "--failures $FAILURES: expected 1 or more, as 3"
((${#ARGUMENTS[@]})) || die "what shall run? write it after --"

export TPU_NAME TPU_ZONE TPU_PROJECT TPU_SLICES DRY_RUN
here="$(dirname "${BASH_SOURCE[0]}")"

say() {
    echo "$(date +%H:%M:%S) $TPU_NAME: $*" >&2
}

# What was tried came to nothing; after --failures times in a row this gives up.
in_vain() {
    vain=$((vain + 1))
    say "$* ($vain of $FAILURES)"
    ((vain < FAILURES)) || die "no slice after $vain attempts in a row"
}

seen=""
failed=0
# A slice that is there and set up, whatever became of the last one.
have_slice() {
    local now is_new="" asked="" vain=0
    while true; do
        now="$(slice_state "$EVERY")"
        if [[ -z "$seen" && "$now" == UNKNOWN ]]; then
            die "the slice's state cannot be read; is gcloud logged in?"
        fi
        seen=1
        case "$now" in
        ACTIVE)
            [[ -n "$is_new" ]] || break
            if [[ -n "$asked" ]]; then asked="" vain=0; fi
            # Just after ACTIVE a host may not let anyone in yet.
            if "$here/setup.sh" "${SETUP[@]}"; then break; fi
            in_vain "the slice could not be set up"
            ;;
        CREATING | ACCEPTED | PROVISIONING | WAITING_FOR_RESOURCES)
            is_new=1
            say "the request is $now; waiting"
            ;;
        SUSPENDING | DELETING) say "the slice is $now; waiting" ;;
        UNKNOWN) say "the slice's state cannot be read; looking again" ;;
        NONE)
            is_new=1
            if [[ -n "$asked" ]]; then
                asked=""
                in_vain "the request is gone"
            fi
            say "there is no slice; asking for one"
            if "$here/create.sh" --no-wait "${CREATE[@]}"; then
                asked=1
            else
                in_vain "the request was refused"
            fi
            ;;
        *) # FAILED, SUSPENDED: this request will give no slice any more
            if [[ -n "$asked" ]]; then in_vain "the request ended as $now"; fi
            asked=""
            say "the slice is $now; deleting it"
            "$here/delete.sh" || in_vain "it could not be deleted"
            ;;
        esac
        sleep "$EVERY"
    done
    # Losing the slice is a preemption, also where the run crashed before the slice was gone.
    if [[ -n "$is_new" ]]; then failed=0; fi
}

if [[ -n "$DRY_RUN" ]]; then
    state
    echo "# unless ACTIVE:"
    "$here/delete.sh"
    "$here/create.sh" --no-wait "${CREATE[@]}"
    "$here/setup.sh" "${SETUP[@]}"
    echo "# then, until it ends with 0:"
    "$here/run.sh" -- "${ARGUMENTS[@]}"
    echo "# every $EVERY seconds:"
    state
    run_state
    exit 0
fi

while true; do
    have_slice
    # Stop what a host may still be doing whose neighbours have ended, then start on all.
    "$here/stop.sh" >/dev/null 2>&1 || true
    if ! "$here/run.sh" -- "${ARGUMENTS[@]}"; then
        # A slice that an interrupted resume.sh asked for is there and was never set up.
        say "could not be started on every host; setting it up for the next start"
        "$here/stop.sh" >/dev/null 2>&1 || true
        "$here/setup.sh" "${SETUP[@]}" || say "the slice could not be set up"
    fi
    missed=0
    while true; do
        sleep "$EVERY"
        now="$(slice_state "$EVERY")"
        [[ "$now" != UNKNOWN ]] || continue # the run goes on without being looked at
        if [[ "$now" != ACTIVE ]]; then
            code="$PREEMPTED"
            break
        fi
        code="$(run_state 2>/dev/null || echo unreachable)"
        case "$code" in
        running) missed=0 ;;
        unreachable)
            missed=$((missed + 1))
            ((missed < 5)) || break
            ;;
        *) break ;;
        esac
    done
    case "$code" in
    0)
        say "done"
        exit 0
        ;;
    2) die "the run refused its flags or files, or a disk is full; logs.sh shows why" ;;
    "$PREEMPTED")
        say "preempted; going on from the last checkpoint"
        failed=0
        ;;
    *)
        failed=$((failed + 1))
        say "the run ended with $code ($failed of $FAILURES)"
        ((failed < FAILURES)) || die "$failed ends in a row that were no preemption"
        ;;
    esac
done
