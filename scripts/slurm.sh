#!/usr/bin/env bash
# One training run under Slurm, on as many nodes as are asked for; when its time is up it saves, queues itself again and resumes.
#
#   sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 scripts/slurm.sh --cfg configs/crossformer_b.yaml --data-path /data/imagenet
#
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@180
set -u
processes=${SLURM_GPUS_ON_NODE:-1}
head=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?start this with sbatch}" | head -n 1)

stopped=0
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$processes" --max-restarts 3 \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$head:$((20000 + SLURM_JOB_ID % 20000))" \
    main.py "$@" &
job=$!
# 180 seconds before the end, or when the job is preempted: torchrun passes the signal on, every rank saves after the same step.
trap 'stopped=1; kill -TERM "$job"' TERM
wait "$job"
status=$?
if [ "$stopped" = 1 ]; then
    wait "$job" # the first wait ended with the signal, this one with the job
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
