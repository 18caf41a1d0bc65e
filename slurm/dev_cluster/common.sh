# Shared by up.sh, down.sh and node.sh: where the development cluster lives, and processes by pid and birth.
DIR=${HPC_NEURO_SLURM_DIR:-/run/hpc_neuro_slurm}
PORT=${HPC_NEURO_SLURM_PORT:-16817}
HOSTS_MARK='# hpc_neuro development cluster'
export SLURM_CONF=$DIR/slurm.conf

birth() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

# alive PID BIRTH: a pid counts only while its start time is the recorded one, so a stale file never names another process
alive() { [ -n "$2" ] && [ "$(birth "$1")" = "$2" ] && ! grep -q '^State:.Z' "/proc/$1/status" 2>/dev/null; }

# start NAME COMMAND...: in a session of its own, without a terminal; pid, birth and name are recorded
start() {
  local name=$1
  shift
  setsid "$@" </dev/null >>"$DIR/log/$name.out" 2>&1 3>&- 9>&- &
  local pid=$!
  echo "$pid $(birth "$pid") $name" >>"$DIR/pids"
}

# end PID BIRTH NAME: TERM, and KILL after ten seconds
end() {
  alive "$1" "$2" || return 0
  kill -TERM "$1" 2>/dev/null
  for _ in $(seq 100); do
    alive "$1" "$2" || return 0
    sleep 0.1
  done
  echo "$3 ($1) did not end and was killed" >&2
  kill -KILL "$1" 2>/dev/null
}

# wait_for SECONDS WHAT COMMAND...
wait_for() {
  local until=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    if [ $SECONDS -ge $until ]; then
      echo "$what did not come up in time; the last lines of the daemons' logs:" >&2
      tail -n 5 "$DIR"/log/* >&2
      return 1
    fi
    sleep 0.1
  done
}

idle() { [ "$(sinfo -h -N -p main -t idle,mix,alloc -o %N 2>/dev/null | sort -u | wc -l)" -ge "$1" ]; }

# start_node NAME: its own hostname (UTS namespace), and its own folder for PMIx, which names it by job and step alone
start_node() {
  mkdir -p "$DIR/spool.$1" "$DIR/pmix" "$DIR/pmix.$1"
  start "slurmd-$1" unshare --uts --mount sh -c \
    "hostname $1 && mount --bind $DIR/pmix.$1 $DIR/pmix && exec /usr/sbin/slurmd -D -N $1"
}
