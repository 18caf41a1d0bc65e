# For the plain batch scripts beside it: `. slurm/env.sh` in a script, then `ranks COMMAND...` and `end_or_go_on $?`.
# The environment of your site belongs here: modules, the virtual environment, the interface.
#   module load cuda/12.4
#   export NCCL_SOCKET_IFNAME=ib0
. "${HPC_NEURO_VENV:-.venv}/bin/activate"
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# Since Slurm 22.05 srun does not inherit --cpus-per-task of sbatch.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
MAX_REQUEUE=${MAX_REQUEUE:-10}

# ranks COMMAND...: every rank of the job runs it, with what torch.distributed and DeepSpeed ask for. One address (the
# first node) and one port (from the job's number, so that two jobs on a node do not meet) for all.
ranks() {
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
  export MASTER_ADDR MASTER_PORT
  srun --unbuffered --wait=120 --kill-on-bad-exit=0 "$@"
}

# with_rank COMMAND...: what each rank of `ranks` starts with
with_rank='export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec "$@"'

# end_or_go_on CODE: 75 says saved and stopped: back to the queue, at most MAX_REQUEUE times; anything else is the end.
# bash must outlive a SIGTERM to get here.
trap : TERM USR1 USR2
end_or_go_on() {
  if [ "$1" = 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_REQUEUE" ]; then
    echo "saved and stopped; back to the queue (time ${SLURM_RESTART_COUNT:-0} of $MAX_REQUEUE)"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$1"
}
