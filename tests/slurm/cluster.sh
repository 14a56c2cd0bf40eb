#!/bin/bash
# cluster.sh N COMMAND...: runs COMMAND on the login node of a temporary Slurm cluster of N nodes, n1..nN: one real
# slurmctld, one real slurmd per node, each node with its own network, hostname and address. The cluster runs in the
# namespaces of this process tree and ends with COMMAND. Needs root or user namespaces, and slurmctld, slurmd,
# slurm-client, munge and iproute2. Exit code 70: the cluster did not start; its logs are printed.
set -eu
if [ -z "${CLUSTER_INSIDE:-}" ]; then
  [ "$(id -u)" = 0 ] && user=() || user=(--user --map-current-user --keep-caps)
  CLUSTER_INSIDE=1 exec unshare ${user[@]+"${user[@]}"} --net --mount --uts --ipc --pid --fork --kill-child --mount-proc \
    -- bash "$0" "$@"
fi
PATH=$PATH:/usr/sbin:/sbin
here=$(cd "$(dirname "$0")" && pwd)
num_nodes=$1 net=10.77.0
shift
dir=$(mktemp -d /tmp/slurm-test.XXXXXX)
trap 'rm -rf "$dir"' EXIT
mkdir "$dir/ctld" "$dir/dev"
export CLUSTER_DIR=$dir SLURM_CONF=$dir/slurm.conf

mount -t tmpfs tmpfs /run
mkdir /run/netns                          # so that the names of `ip netns` are private
{
  echo 127.0.0.1 localhost
  echo $net.254 head
  # the mapped address too: torch listens on both families and warns about each connection without a name
  for i in $(seq "$num_nodes"); do echo "$net.$i n$i"; echo "::ffff:$net.$i n$i"; done
} >"$dir/hosts"
mount --bind "$dir/hosts" /etc/hosts
hostname head
ip link set lo up
ip link add br0 type bridge
ip addr add $net.254/24 dev br0
ip link set br0 up

for i in {0..7}; do ln -s /dev/null "$dir/dev/nvidia$i"; done     # gres.conf needs files
sed "s#@DIR@#$dir#g; s#@N@#$num_nodes#g; s#@USER@#$(id -un)#g" "$here/slurm.conf" >"$SLURM_CONF"
echo "NodeName=n[1-$num_nodes] Name=gpu File=$dir/dev/nvidia[0-7]" >"$dir/gres.conf"
(umask 077; head -c 128 /dev/urandom >"$dir/munge.key")
munged --force --key-file="$dir/munge.key" --socket="$dir/munge.sock" --pid-file="$dir/munged.pid" \
  --log-file="$dir/munged.log" --seed-file="$dir/munge.seed" 2>"$dir/munged.err"
slurmctld -c
for i in $(seq "$num_nodes"); do bash "$here/node.sh" start "n$i"; done
for _ in $(seq 150); do
  [ "$(sinfo -h -p low -t idle -o %D 2>/dev/null)" = "$num_nodes" ] && break
  sleep .1
done
[ "$(sinfo -h -p low -t idle -o %D)" = "$num_nodes" ] || { sinfo; tail -n 20 "$dir"/*.log; exit 70; }
code=0
"$@" || code=$?
exit $code
