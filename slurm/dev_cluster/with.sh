#!/usr/bin/env bash
# Run a command beside the development cluster: `with.sh pytest`. Brought up for it, the cluster ends with it; one that was
# up before stays. Where it cannot be brought up the command runs all the same, and HPC_NEURO_NO_SLURM says why.
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/common.sh"
before=$([ -s "$DIR/pids" ] && timeout 5 scontrol ping >/dev/null 2>&1 && echo up)
if message=$("$HERE/up.sh" 2>&1 >/dev/null); then
  "$@"
  code=$?
  [ "$before" = up ] || "$HERE/down.sh"
else
  echo "no Slurm here, its tests are skipped: $message" >&2
  HPC_NEURO_NO_SLURM=$(head -n 1 <<<"$message") "$@"
  code=$?
fi
exit $code
