#!/bin/bash
# Train on several machines under Slurm: one torchrun on each, which starts one process per GPU.
#
#   sbatch deploy/slurm.sh --config recipes/mine.yaml --output_dir /shared/runs/mine
#
# What stands behind the file's name goes to `zero2hero pretrain`. The output directory must be seen by all machines.
# --resume is added when the run exists, so the same line continues it, and Slurm may requeue the job: ten minutes
# before its time is up it sends SIGTERM, at which the run saves and stops.

#SBATCH --job-name=zero2hero
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # which reads all: head would break the pipe
for ((i = 1; i < $#; i++)); do
  [[ ${!i} == --output_dir ]] && { next=$((i + 1)); output=${!next}; }
done
resume=()
[[ -e ${output:-runs/pretrain}/checkpoints/LATEST ]] && resume=(--resume)

export OMP_NUM_THREADS=8 # CPU threads of each process

srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" \
  --nproc-per-node 8 \
  --rdzv-id "$SLURM_JOB_ID" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$first:29500" \
  -m zero2hero pretrain "$@" "${resume[@]}"
