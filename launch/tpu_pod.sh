#!/usr/bin/env bash
# Runs one `moejax` command on every host of a TPU slice at once:
#
#   launch/tpu_pod.sh TPU ZONE FOLDER train configs/quickstart.py --workdir /mnt/runs/a
#
# TPU and ZONE are what gcloud calls them. FOLDER is a clone of moejax on each host, after
# `make setup ACCELERATOR=tpu`. The workdir is on a file system that all hosts share. Each host finds
# the others by its metadata server. On each, `moejax supervise` starts a training again where it fails.
set -euo pipefail
if [ $# -lt 4 ]; then
  echo "usage: launch/tpu_pod.sh TPU ZONE FOLDER VERB [WORDS]; for example" \
    "launch/tpu_pod.sh my-pod us-east5-a moejax train configs/quickstart.py --workdir /mnt/runs/a" >&2
  exit 2
fi
tpu=$1 zone=$2 folder=$3
shift 3
[ "$1" = train ] && set -- supervise --end_when_preempted -- "$@"
if ! command -v gcloud >/dev/null; then
  echo "launch/tpu_pod.sh: there is no gcloud here; install the Google Cloud CLI and log in" >&2
  exit 2
fi
# Quoted twice: here, and by the shell at the other end.
exec gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all \
  --command="cd $(printf %q "$folder") && exec .venv/bin/moejax$(printf ' %q' "$@")"
