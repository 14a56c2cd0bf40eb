#!/bin/bash
# node.sh start|kill nX, inside cluster.sh. kill: every process of the node is killed, as by a power failure; start it
# again only when sinfo shows it as down.
set -eu
PATH=$PATH:/usr/sbin:/sbin
node=$2 i=${2#n}
case $1 in
  start)
    mkdir -p "$CLUSTER_DIR/$node"
    if [ ! -e "/run/netns/$node" ]; then
      ip netns add "$node"
      ip link add "v$i" type veth peer name eth0 netns "$node"
      ip link set "v$i" master br0 up
      ip -n "$node" link set lo up
      ip -n "$node" addr add "10.77.0.$i/24" dev eth0
      ip -n "$node" link set eth0 up
    fi
    nsenter --net="/run/netns/$node" unshare --uts sh -c "hostname $node; exec slurmd"
    ;;
  kill) ip netns pids "$node" | xargs -r kill -9 ;;
esac
