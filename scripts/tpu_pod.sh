#!/usr/bin/env bash
# A TPU pod slice: the same command on every host. Runs on the machine that you log in from.
#
#   scripts/tpu_pod.sh my-slice us-west4-a configs/rdn_1p5b.py /mnt/runs/rdn
#
# The slice exists (gcloud compute tpus tpu-vm create), and this repository lies in ~/rla_jax of each
# host with its environment: pip install -e '.[train,tpu]'. Working directory, text and cache lie where
# all hosts mount them: Filestore, or a bucket through Cloud Storage FUSE.
#
# Two copies of what fsdp splits: over a whole slice, the TPU compiler sums gradients on every chip
# instead of scattering them (docs/training.md). For fewer than 16 chips, take mesh.data=1.
set -euo pipefail
slice=$1 zone=$2 config=$3 workdir=$4
shift 4
overrides=''
[ $# -eq 0 ] || overrides=$(printf ' %q' "$@")
exec gcloud compute tpus tpu-vm ssh "$slice" --zone="$zone" --worker=all --command="
  cd ~/rla_jax && exec python experiments/train.py --distributed \
    --config='$config' --workdir='$workdir' --config.mesh.data=2 --config.mesh.fsdp=-1$overrides"
