# shellcheck shell=bash disable=SC2034
# The settings of your cluster. Copy this file to slurm/site.sh, which git ignores, and keep what you need. Before you
# submit:
#
#     source slurm/site.sh
#
# Then `sbatch slurm/train.sh ...` uses the account and partition of this file (sbatch reads SBATCH_* variables; they
# override the #SBATCH lines of a script, and options on the command line override them). Each job reads the file again
# on its first node. SITE=FILE names another file.

export SBATCH_ACCOUNT=my-project
export SBATCH_PARTITION=gpu
# export SBATCH_QOS=long SBATCH_CONSTRAINT=a100 SBATCH_RESERVATION=course
# export SBATCH_SIGNAL=B:USR1@900          # a warning 900 s before the limit; the program reads it from here
# export SBATCH_GPUS_PER_NODE=4            # and `sbatch --cpus-per-task=32`, for which there is no variable

# Downloaded weights: outside the condition below, so that `wasteddp doctor` stores them where the jobs look for them.
# export HF_HOME=/scratch/$USER/hf TORCH_HOME=/scratch/$USER/torch

if [ -n "${SLURM_JOB_ID:-}" ]; then        # inside a job only
  # module load python/3.11                # not needed with .venv on a file system that all nodes share
  # LOCAL_DISK=/local/scratch/$USER        # each node's own disk: shards are copied there, and the copy is verified
  # MAX_CRASHES=3                          # a job that crashed, or finished no step, is requeued this often

  # Apptainer: every step runs inside the image, with its Python; --nv brings the driver's libraries. One --bind for all
  # needed folders, separated by commas: "$PWD,/data,$LOCAL_DISK".
  # INSIDE=(apptainer exec --nv --bind "$PWD" /images/wasteddp.sif)

  # Pyxis (enroot): srun starts the container itself.
  # SRUN_OPTIONS=(--container-image=/images/wasteddp.sqsh --container-mounts="$PWD:$PWD" --container-workdir="$PWD")

  # export NCCL_SOCKET_IFNAME=ib0          # see "Networks" in README.md before you set any of these
  :
fi
