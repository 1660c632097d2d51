#!/usr/bin/env bash
#SBATCH --job-name=vssm-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
# An example of vssm train on several machines: sbatch tools/train_slurm.sh DATA --config FILE.yaml --output DIR
#
# torchrun starts one process per GPU on each machine, and they meet on the first one. Three minutes before the time is
# over SLURM sends SIGTERM to this script: the run saves its state between two steps and ends, the job goes back into the
# queue, and --resume auto goes on. SLURM itself queues a job again whose machine has failed (--requeue).
# DATA and DIR are on disks that all machines see; the Python environment is active where sbatch is called.
set -euo pipefail

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150 # seconds that torchrun gives the processes to end their step and save
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
asked_to_stop=false
trap 'asked_to_stop=true; kill -TERM "$step"' TERM

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node gpu \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 20000))" \
    -m vssm.cli train "$@" --resume auto &
step=$!

status=0
wait "$step" || status=$?
if $asked_to_stop; then
    wait "$step" || true # the first wait ended with the signal
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
