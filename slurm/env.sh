# For the plain batch scripts beside it: `. slurm/env.sh` in a script, then `run_ranks COMMAND...` and
# `exit_or_requeue $?`.
# The environment of your site belongs here: modules, the virtual environment, the interface.
#   module load cuda/12.4
#   export NCCL_SOCKET_IFNAME=ib0
. "${HPC_NEURO_VENV:-.venv}/bin/activate"
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# Since Slurm 22.05 srun does not inherit --cpus-per-task of sbatch: without this every rank gets one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
MAX_REQUEUE=${MAX_REQUEUE:-10}

# run_ranks COMMAND...: every rank of the job runs it, with the variables that torch.distributed and DeepSpeed read. One
# address (the first node) and one port (from the job's number, so that two jobs on a node do not collide) for all.
run_ranks() {
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
  export MASTER_ADDR MASTER_PORT
  srun --unbuffered --wait=120 --kill-on-bad-exit=0 "$@"
}

# with_rank COMMAND...: sets the variables of one rank, then runs its command
with_rank='export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec "$@"'

# exit_or_requeue CODE: 75 means saved and stopped, and the job is requeued, at most MAX_REQUEUE times; other codes end
# the job. bash must outlive a SIGTERM to get here.
trap : TERM USR1 USR2
exit_or_requeue() {
  if [ "$1" = 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_REQUEUE" ]; then
    echo "saved and stopped; requeued (restart ${SLURM_RESTART_COUNT:-0} of $MAX_REQUEUE)"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$1"
}
