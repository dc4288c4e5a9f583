#!/usr/bin/env bash
# One run on several machines under Slurm. From the repository's folder, with whatever main.py takes:
#
#   sbatch docs/slurm.sh --config=exps/sdlora_inr.json
#
#SBATCH --job-name=gumbel-cl-lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4   # one process per GPU
#SBATCH --gpus-per-node=4     # not --gpus-per-task: every process sees its machine's GPUs and takes the one of its number
#SBATCH --cpus-per-task=8     # the process and those that read images for it
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@300     # five minutes before the end every process is told; the run saves and leaves with status 75
#SBATCH --requeue
#SBATCH --open-mode=append    # the requeued job goes on in the same output file
set -u
if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi

# Where the processes meet: the job's first machine, at a port that two jobs on one machine do not share.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}" SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# srun starts the processes itself: it hands them the signal, and their exit status back, which torchrun keeps to itself.
# --wait ends the others a minute after one has ended; --kill-on-bad-exit would replace status 75 by that of the killed.
status=0
srun --wait=60 bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID \
    LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE exec python main.py "$@"' main.py "$@" || status=$?

# 75: stopped by the warning, everything saved; the same command goes on from there.
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
