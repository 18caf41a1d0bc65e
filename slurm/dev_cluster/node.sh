#!/usr/bin/env bash
# Let a node of the development cluster die as in a power cut, or come back.
#   node.sh kill node2      slurmd and everything that runs on the node, with SIGKILL
#   node.sh start node2
. "$(dirname "$0")/common.sh"
[ $# = 2 ] || { echo "usage: node.sh kill|start NODE" >&2; exit 2; }
line=$(grep " slurmd-$2\$" "$DIR/pids" | tail -n 1)
read -r pid born name <<<"$line"
case $1 in
kill)
  alive "$pid" "$born" || { echo "$2 is not up" >&2; exit 1; }
  world=$(readlink "/proc/$pid/ns/uts") # a node is what shares its hostname
  for entry in /proc/[0-9]*; do
    [ "$(readlink "$entry/ns/uts" 2>/dev/null)" = "$world" ] && kill -KILL "${entry#/proc/}" 2>/dev/null
  done
  ;;
start)
  alive "$pid" "$born" && exit 0
  start_node "$2"
  wait_for 30 "$2" sh -c "sinfo -h -n $2 -t idle -o %N | grep -q ."
  ;;
*)
  echo "usage: node.sh kill|start NODE" >&2
  exit 2
  ;;
esac
exit 0
