#!/usr/bin/env bash
# Ask for a TPU slice as a queued resource and wait until it is there.
#
#   tpu_scripts/create.sh --name atlas --zone us-central2-b --type v4-8 [--spot]
#
#   --type TYPE        v4-8, v5e-8 (which Cloud calls v5litepod-8), v5p-8, v6e-8 ... (required)
#   --runtime VERSION  TPU software version (default: the one for the type)
#   --spot             cheaper, and may be taken away at any time
#   --no-wait          ask, and do not wait for it; status.sh tells how it stands

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TYPE=""
RUNTIME=""
SPOT=()
WAIT=1

own_flag() {
    case "$1" in
    --type) TYPE="$2" && return 2 ;;
    --runtime) RUNTIME="$2" && return 2 ;;
    --spot) SPOT=(--spot) && return 1 ;;
    --no-wait) WAIT="" && return 1 ;;
    esac
    return 0
}

# What Cloud TPU's page "TPU software versions" names for JAX.
runtime_of() {
    case "$1" in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    esac
}

parse_flags "$@"
[[ -n "$TYPE" ]] || die "which accelerator? --type v4-8"
accelerator="$(accelerator_of "$TYPE")"

nodes=(--node-id="$TPU_NAME")
if ((TPU_SLICES > 1)); then nodes=(--node-count="$TPU_SLICES" --node-prefix="$TPU_NAME"); fi
tpus queued-resources create "$TPU_NAME" "${nodes[@]}" --accelerator-type="$accelerator" \
    --runtime-version="${RUNTIME:-$(runtime_of "$accelerator")}" "${SPOT[@]}"

[[ -n "$WAIT" ]] || exit 0
if [[ -n "$DRY_RUN" ]]; then
    state
    exit 0
fi
while true; do
    now="$(slice_state 30)"
    echo "$(date +%H:%M:%S) $TPU_NAME: $now"
    case "$now" in
    ACTIVE) exit 0 ;;
    NONE) die "the request is gone" ;;
    FAILED | SUSPENDED | SUSPENDING) die "the request ended as $now; delete.sh removes it" ;;
    esac
    sleep 30
done
