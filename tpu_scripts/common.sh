# shellcheck shell=bash disable=SC2034
# What the scripts share: flags, the gcloud calls, and --dry-run. Sourced, not run.
#
# Flags, each with an environment variable behind it:
#   --name NAME      TPU_NAME      name of the slice (required)
#   --zone ZONE      TPU_ZONE      e.g. us-central2-b (required)
#   --project ID     TPU_PROJECT   Cloud project (default: gcloud's own)
#   --slices N       TPU_SLICES    slices of one request, called NAME-0, NAME-1 ... (default: 1)
#   --dry-run        DRY_RUN=1     print every command, run none
# What follows `--` is what run.sh and resume.sh start.

TPU_NAME="${TPU_NAME:-}"
TPU_ZONE="${TPU_ZONE:-}"
TPU_PROJECT="${TPU_PROJECT:-}"
TPU_SLICES="${TPU_SLICES:-1}"
DRY_RUN="${DRY_RUN:-}"
ARGUMENTS=() # used by the scripts that source this file

# The directory on every host that holds code, environment and log.
readonly REMOTE_DIR='atlas-jax'

die() {
    echo "$(basename "$0"): error: $*" >&2
    exit 2
}

# The comment at the top of the calling script is its help text.
usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    echo
    sed -n '/^# Flags/,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

need_value() {
    [[ $# -gt 1 && -n "$2" && "$2" != --* ]] || die "$1 needs a value"
}

# parse_flags "$@": the common flags; an unknown one is given to own_flag NAME VALUE of the
# calling script, which answers with the number of words it took (1 or 2).
parse_flags() {
    local taken
    while (($#)); do
        case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        --dry-run)
            DRY_RUN=1
            shift
            ;;
        --name | --zone | --project | --slices)
            need_value "$@"
            case "$1" in
            --name) TPU_NAME="$2" ;;
            --zone) TPU_ZONE="$2" ;;
            --project) TPU_PROJECT="$2" ;;
            --slices) TPU_SLICES="$2" ;;
            esac
            shift 2
            ;;
        --)
            shift
            ARGUMENTS=("$@")
            break
            ;;
        *)
            taken=0
            if declare -F own_flag >/dev/null; then
                own_flag "$1" "${2:-}" || taken=$?
            fi
            ((taken)) || die "unknown flag $1; see --help"
            if ((taken == 2)); then need_value "$@"; fi
            shift "$taken"
            ;;
        esac
    done
    [[ -n "$TPU_NAME" ]] || die "which slice? --name NAME or TPU_NAME"
    [[ -n "$TPU_ZONE" ]] || die "which zone? --zone ZONE or TPU_ZONE"
    [[ "$TPU_SLICES" =~ ^[1-9][0-9]*$ ]] || die "--slices $TPU_SLICES: expected 1 or more, as 2"
}

# quoted WORD...: the words as a shell takes them back, quoted only where needed.
quoted() {
    local word quote="'\\''"
    for word in "$@"; do
        if [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
            printf '%s ' "$word"
        else
            printf "'%s' " "${word//\'/$quote}"
        fi
    done
}

# run COMMAND...: run it, or print it so that it can be pasted into a shell.
run() {
    if [[ -n "$DRY_RUN" ]]; then
        quoted "$@"
        printf '\n'
    else
        "$@"
    fi
}

# tpus GROUP VERB ARGUMENTS...: gcloud compute tpus ... in our zone and project.
tpus() {
    local place=("--zone=$TPU_ZONE")
    if [[ -n "$TPU_PROJECT" ]]; then place+=("--project=$TPU_PROJECT"); fi
    run gcloud compute tpus "$@" "${place[@]}"
}

# accelerator_of TYPE: what Cloud TPU calls a slice that the project calls v4-8, v5e-8, v5p-8 ...
accelerator_of() {
    case "$1" in
    v5e-[1-9]*) echo "v5litepod-${1#v5e-}" ;;
    v4-[1-9]* | v5litepod-[1-9]* | v5p-[1-9]* | v6e-[1-9]*) echo "$1" ;;
    *) die "unknown accelerator $1; expected v4, v5e, v5p or v6e with a size, as v4-8 or v5e-8" ;;
    esac
}

# check_share SHARE: refuse what setup.sh could not mount.
check_share() {
    [[ -z "$1" || "$1" =~ ^[A-Za-z0-9.-]+:/[A-Za-z0-9_-]+$ ]] ||
        die "--share $1: expected SERVER:/NAME, as 10.0.0.2:/atlas"
}

# The state of the queued resource: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED ...
state() {
    tpus queued-resources describe "$TPU_NAME" --format='value(state.state)'
}

# slice_state SECONDS: the state, or NONE where Cloud TPU says that there is no such request. A
# look that fails otherwise (network, login) says nothing of the slice: it is tried five times,
# SECONDS apart, and then the state is UNKNOWN.
slice_state() {
    local found="" try errors
    errors="$(mktemp "${TMPDIR:-/tmp}/atlas-jax-XXXXXX")"
    for try in 1 2 3 4 5; do
        found="$(state 2>"$errors")" || found=""
        if [[ -z "$found" ]] && grep -q NOT_FOUND "$errors"; then found=NONE; fi
        if [[ -n "$found" || $try == 5 ]]; then break; fi
        sleep "$1"
    done
    if [[ -z "$found" ]]; then cat "$errors" >&2; fi
    rm -f "$errors"
    echo "${found:-UNKNOWN}"
}

# The exit code of a run that saved its last step because the host is being taken away
# (atlas_jax/core/preemption.py).
readonly PREEMPTED=75

# nodes: the names of the slices, a line each; Cloud TPU numbers them if there are several.
nodes() {
    local number
    if [[ "$TPU_SLICES" == 1 ]]; then
        echo "$TPU_NAME"
    else
        for ((number = 0; number < TPU_SLICES; number++)); do echo "$TPU_NAME-$number"; done
    fi
}

# on_every_slice COMMAND WORDS...: `COMMAND NODE WORDS...` for all slices at the same time (in a
# dry run one after the other); fails if one of them does.
on_every_slice() {
    local command="$1" node failed=0 started=()
    shift
    while read -r node; do
        if [[ -n "$DRY_RUN" || "$TPU_SLICES" == 1 ]]; then
            "$command" "$node" "$@" </dev/null || failed=$?
        else
            "$command" "$node" "$@" </dev/null &
            started+=($!)
        fi
    done < <(nodes)
    for node in "${started[@]}"; do wait "$node" || failed=$?; done
    return "$failed"
}

# run_state: `running`, the exit code of the last run, or `none`, as the first host has it.
run_state() {
    tpus tpu-vm ssh "$(nodes | head -n 1)" --worker=0 --command="cd ~/$REMOTE_DIR
if [ -f run.code ]; then cat run.code
elif [ -f run.pid ] && kill -0 \"\$(cat run.pid)\" 2>/dev/null; then echo running
else echo none
fi"
}

# on_every_host COMMAND: one shell command on all hosts of all slices, at the same time.
on_every_host() {
    on_every_slice on_hosts_of "$1"
}

# on_hosts_of NODE COMMAND
on_hosts_of() {
    tpus tpu-vm ssh "$1" --worker=all --command="$2"
}
