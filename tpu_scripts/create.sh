#!/usr/bin/env bash
# Ask for a TPU slice as a queued resource and wait until it is there.
#
#   tpu_scripts/create.sh --name atlas --zone us-central2-b --type v4-8 [--spot]
#
#   --type TYPE        accelerator type: v4-8, v5litepod-8, v5p-8, v6e-8 ... (required)
#   --runtime VERSION  TPU software version (default: the one for the type)
#   --spot             cheaper, and may be taken away at any time

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TYPE=""
RUNTIME=""
SPOT=()

own_flag() {
    case "$1" in
    --type) TYPE="$2" && return 2 ;;
    --runtime) RUNTIME="$2" && return 2 ;;
    --spot) SPOT=(--spot) && return 1 ;;
    esac
    return 0
}

runtime_of() {
    case "$1" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
    esac
}

parse_flags "$@"
[[ -n "$TYPE" ]] || die "which accelerator? --type v4-8"

tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" --accelerator-type="$TYPE" \
    --runtime-version="${RUNTIME:-$(runtime_of "$TYPE")}" "${SPOT[@]}"

if [[ -n "$DRY_RUN" ]]; then
    state
    exit 0
fi
while true; do
    now="$(state)"
    echo "$(date +%H:%M:%S) $TPU_NAME: $now"
    case "$now" in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDED | SUSPENDING) die "the request ended as $now; delete.sh removes it" ;;
    esac
    sleep 30
done
