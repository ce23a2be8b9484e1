#!/usr/bin/env bash
#SBATCH --job-name=tsquant-calibrate
#SBATCH --array=0-15
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --requeue
#SBATCH --output=tsquant-%A-%a.log
#
# Calibrates in 16 shards, one for each task of the array; a second job, begun when all have ended well, merges them and quantizes:
#
#     job=$(sbatch --parsable docs/shards/slurm.sh EXPERIMENT.yaml)
#     sbatch --dependency="afterok:$job" --cpus-per-task=4 --wrap "tsquant merge parts/*.safetensors -o statistics.safetensors &&
#         tsquant quantize EXPERIMENT.yaml --statistics statistics.safetensors"
#
# Experiment, model, data and the working directory have to be on a file system that all nodes share. A task that is requeued,
# or sent again alone (--array=3), runs its shard again, which changes nothing. For another number of shards change it in both
# places.
set -euo pipefail
shard=$SLURM_ARRAY_TASK_ID/16
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
tsquant calibrate "$1" --quiet --shard "$shard" -o "parts/$SLURM_ARRAY_TASK_ID.safetensors"
