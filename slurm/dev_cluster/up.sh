#!/usr/bin/env bash
# Bring up a real Slurm cluster of several nodes on this one machine (Debian or Ubuntu, root, no systemd needed).
#   make slurm-up           then: export SLURM_CONF=/run/hpc_neuro_slurm/slurm.conf
#   make slurm-down
# Takes the packages from apt where they are absent. A cluster that is up stays as it is. Every daemon listens on
# 127.0.0.1 alone. Changed by the environment:
#   HPC_NEURO_SLURM_DIR (/run/hpc_neuro_slurm)  HPC_NEURO_SLURM_PORT (16817 and the next)
#   HPC_NEURO_SLURM_NODES (2)  HPC_NEURO_SLURM_CPUS (4 per node)  HPC_NEURO_SLURM_GPUS (2 pretended ones per node)
#   HPC_NEURO_SLURM_ARRAY (33: small on purpose, so that arrays must be cut)
#   HPC_NEURO_SLURM_ACCT (0; 1: with accounts, in a MariaDB of its own: see accounting.sh)
# Without it there is no accounting (sacct), as on many small sites; and there are no cgroups: memory limits are not enforced.
set -euo pipefail
. "$(dirname "$0")/common.sh"
HERE=$(cd "$(dirname "$0")" && pwd)
NODES=${HPC_NEURO_SLURM_NODES:-2}
CPUS=${HPC_NEURO_SLURM_CPUS:-4}
GPUS=${HPC_NEURO_SLURM_GPUS:-2}
ARRAY=${HPC_NEURO_SLURM_ARRAY:-33}
ACCT=${HPC_NEURO_SLURM_ACCT:-0}
HOST=$(hostname -s)

[ "$(id -u)" = 0 ] || { echo "a development cluster needs root: munge, slurmctld and slurmd are started here" >&2; exit 1; }
mkdir -p "$DIR"
exec 9>"$DIR.lock"
flock 9 # two test workers may ask at once
exec 3>&1 >&2 # standard output is for the export line alone

if [ -s "$DIR/pids" ] && timeout 5 scontrol ping >/dev/null 2>&1 && idle "$NODES"; then
  echo "export SLURM_CONF=$SLURM_CONF" >&3
  exit 0
fi
wanted="slurmctld slurmd munged srun"
packages="slurm-wlm munge"
[ "$ACCT" = 0 ] || wanted="$wanted slurmdbd mariadbd" packages="$packages slurmdbd mariadb-server"
if ! command -v $wanted >/dev/null; then
  command -v apt-get >/dev/null || { echo "Slurm is not installed and there is no apt-get to take it from" >&2; exit 1; }
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y -qq --no-install-recommends $packages >/dev/null 2>&1 ||
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends $packages >/dev/null; }
fi
"$HERE/down.sh" # what an earlier one left behind
rm -rf "$DIR"
mkdir -p "$DIR"/{log,state,munge}
chmod 755 "$DIR"
trap 'code=$?; [ $code = 0 ] || { echo "the cluster did not come up; ending what was started" >&2; "$HERE/down.sh"; }' EXIT

# munge, with a key and a socket of its own
dd if=/dev/urandom of="$DIR/munge/key" bs=1024 count=1 status=none
chown -R munge:munge "$DIR/munge"
chmod 711 "$DIR/munge"
chmod 400 "$DIR/munge/key"
start munged setpriv --reuid=munge --regid=munge --clear-groups /usr/sbin/munged --foreground \
  --key-file="$DIR/munge/key" --socket="$DIR/munge/sock" --pid-file="$DIR/munge/pid" --log-file="$DIR/munge/log" \
  --seed-file="$DIR/munge/seed"
wait_for 10 munged munge -n -S "$DIR/munge/sock"

# pretended GPUs: character devices that are /dev/null
: >"$DIR/gres.conf"
gres=
if [ "$GPUS" -gt 0 ]; then
  gres="Gres=gpu:pretended:$GPUS"
  for n in $(seq "$NODES"); do
    for g in $(seq 0 $((GPUS - 1))); do mknod "$DIR/node$n-gpu$g" c 1 3; done
    echo "NodeName=node$n Name=gpu Type=pretended File=$DIR/node$n-gpu[0-$((GPUS - 1))]" >>"$DIR/gres.conf"
  done
fi

accounting=AccountingStorageType=accounting_storage/none
[ "$ACCT" = 0 ] || . "$HERE/accounting.sh"

memory=$(($(awk '/MemTotal/{print int($2/1024)}' /proc/meminfo) / NODES))
cat >"$SLURM_CONF" <<CONF
ClusterName=hpc_neuro
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
SlurmctldPort=$PORT
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdPidFile=$DIR/slurmd.%n.pid
SlurmdLogFile=$DIR/log/slurmd.%n.log
SlurmdSpoolDir=$DIR/spool.%n
StateSaveLocation=$DIR/state
AuthType=auth/munge
# cred_expire is also how long a job that was put back waits before it may start again (120 s by default; 5 is the least)
AuthInfo=socket=$DIR/munge/sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
CryptoType=crypto/munge
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=5
OverTimeLimit=0
MinJobAge=3600
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=10
MessageTimeout=30
MaxArraySize=$ARRAY
MaxJobCount=5000
$([ -z "$gres" ] || echo GresTypes=gpu)
$accounting
$(for n in $(seq "$NODES"); do
  echo "NodeName=node$n NodeHostname=node$n NodeAddr=127.0.0.1 Port=$((PORT + 10 + n)) CPUs=$CPUS RealMemory=$memory $gres State=UNKNOWN"
done)
PartitionName=main Nodes=ALL Default=YES MaxTime=01:00:00 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=01:00:00 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
CONF
: >"$DIR/cgroup.conf"
echo "PMIxCliTmpDirBase=$DIR/pmix" >"$DIR/mpi.conf"

[ "$ACCT" = 0 ] || add_accounts
start slurmctld /usr/sbin/slurmctld -D -c
# Each node has its name in /etc/hosts (an address to meet at must resolve) and all share 127.0.0.1: with an address each,
# an srun inside a job listens on its node's address but is called back on 127.0.0.1, and hangs.
grep -v "$HOSTS_MARK" /etc/hosts >"$DIR/hosts" || true
for n in $(seq "$NODES"); do echo "127.0.0.1 node$n $HOSTS_MARK" >>"$DIR/hosts"; done
cat "$DIR/hosts" >/etc/hosts # in place: in a container the file is a mount and cannot be replaced
for n in $(seq "$NODES"); do start_node "node$n"; done
wait_for 30 "the nodes" idle "$NODES"
echo "export SLURM_CONF=$SLURM_CONF" >&3
