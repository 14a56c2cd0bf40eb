# shellcheck shell=bash disable=SC2034
# What is your cluster's own. Copy it to slurm/site.sh, which git ignores, keep what you need, and before you submit:
#
#     source slurm/site.sh
#
# Then `sbatch slurm/train.sh ...` takes account and partition from here (sbatch reads SBATCH_* variables; they go before
# the #SBATCH lines of a script, and options on the command line go before them). Each job reads the file again on
# its first node. SITE=FILE names another one.

export SBATCH_ACCOUNT=my-project
export SBATCH_PARTITION=gpu
# export SBATCH_QOS=long SBATCH_CONSTRAINT=a100 SBATCH_RESERVATION=course
# export SBATCH_SIGNAL=B:USR1@900          # a warning 900 s before the limit: the program knows it from here
# export SBATCH_GPUS_PER_NODE=4

if [ -n "${SLURM_JOB_ID:-}" ]; then        # inside a job only
  # module load python/3.11                # not needed with .venv on a file system that all nodes see
  # LOCAL_DISK=/local/scratch/$USER        # each node's own disk: shards are copied there, and the copy is verified
  # export HF_HOME=/scratch/$USER/hf TORCH_HOME=/scratch/$USER/torch
  # MAX_CRASHES=3                          # a job that crashed, or came to no step, is requeued so often

  # Apptainer: every step runs inside the image, with its Python; --nv brings the driver's libraries. One --bind for all
  # folders that are needed, with commas: "$PWD,/data,$LOCAL_DISK".
  # INSIDE=(apptainer exec --nv --bind "$PWD" /images/wasteddp.sif)

  # Pyxis (enroot): srun starts the container itself.
  # SRUN_OPTIONS=(--container-image=/images/wasteddp.sqsh --container-mounts="$PWD:$PWD" --container-workdir="$PWD")

  # export NCCL_SOCKET_IFNAME=ib0          # see "Networks" in README.md before you set any of these
  :
fi
