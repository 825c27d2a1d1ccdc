#!/usr/bin/env bash
# Copy the committed code to every host and install it there, with the TPU build of JAX.
#
#   tpu_scripts/setup.sh --name atlas --zone us-central2-b [--bucket NAME]
#
#   --bucket NAME         also mount this Cloud Storage bucket at /mnt/NAME, with Cloud Storage FUSE
#   --share SERVER:/NAME  also mount this NFS share, as of Filestore, at /mnt/NAME
#
# Run it again after a commit: the code is replaced, the environment brought up to date.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

BUCKET=""
SHARE=""

own_flag() {
    case "$1" in
    --bucket) BUCKET="$2" && return 2 ;;
    --share) SHARE="$2" && return 2 ;;
    esac
    return 0
}

parse_flags "$@"
check_share "$SHARE"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z "$DRY_RUN" && -n "$(git status --porcelain --untracked-files=no)" ]]; then
    echo "setup.sh: uncommitted changes are not copied" >&2
fi
archive="$(mktemp -u "${TMPDIR:-/tmp}/atlas-jax-XXXXXX").tar.gz"
trap 'rm -f "$archive"' EXIT

run git archive --format=tar.gz --output="$archive" HEAD
copy_to() {
    tpus tpu-vm scp "$archive" "$1:atlas-jax.tar.gz" --worker=all
}
on_every_slice copy_to
# The VM's own Python is older than 3.11: uv brings one.
on_every_host "set -eu
mkdir -p ~/$REMOTE_DIR/code && cd ~/$REMOTE_DIR
tar -xzf ~/atlas-jax.tar.gz -C code
python3 -m pip install --quiet --user uv
[ -d venv ] || python3 -m uv venv --python 3.11 venv
python3 -m uv pip install --quiet --python venv/bin/python \
    --constraint code/requirements.txt --editable 'code[tpu]'
venv/bin/python -c 'import jax; print(jax.__version__, \"local chips:\", jax.local_device_count())'"

if [[ -n "$SHARE" ]]; then
    folder="/mnt/${SHARE#*:/}"
    on_every_host "set -eu
mountpoint -q $folder && exit 0
sudo apt-get update -q && sudo apt-get install -q -y nfs-common
sudo mkdir -p $folder && sudo mount -t nfs $SHARE $folder
sudo chmod a+rwx $folder"
fi

[[ -n "$BUCKET" ]] || exit 0
apt=https://packages.cloud.google.com/apt
on_every_host "set -eu
mountpoint -q /mnt/$BUCKET && exit 0
if ! command -v gcsfuse > /dev/null; then
    key=/usr/share/keyrings/cloud.google.asc
    curl -fsS $apt/doc/apt-key.gpg | sudo tee \$key > /dev/null
    echo \"deb [signed-by=\$key] $apt gcsfuse-\$(lsb_release -cs) main\" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    sudo apt-get update -q && sudo apt-get install -q -y gcsfuse
fi
sudo mkdir -p /mnt/$BUCKET && sudo chown \"\$USER\" /mnt/$BUCKET
gcsfuse --implicit-dirs $BUCKET /mnt/$BUCKET"
