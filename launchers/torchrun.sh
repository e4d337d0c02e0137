#!/usr/bin/env bash
# Train on one or several nodes: one process per NeuronCore or GPU, otherwise one per node. Run it once on every node.
#
#   launchers/torchrun.sh --config C --backend neuron ...                  train; the flags of `esm-neuron train`
#   launchers/torchrun.sh --compile-only --config C --backend neuron ...   compile its graphs beforehand, with the same flags
#   launchers/torchrun.sh --dry-run ...                                    print what would be run
#
# The number of nodes, this node's number and the first node's address come from Slurm, from MPI (Open MPI, MPICH, Intel
# MPI: one process per node), from a Kubernetes PyTorchJob, or by hand:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launchers/torchrun.sh ...    and NODE_RANK=1 on the other node
# These variables take precedence over what is found: NNODES NODE_RANK MASTER_ADDR MASTER_PORT NPROC_PER_NODE MAX_RESTARTS.
#
# If a worker dies, all are restarted from the newest checkpoint, up to MAX_RESTARTS times. On SIGTERM the step is finished
# and saved; torchrun waits 30 s for it. The output folder must be one that all nodes share.
# The library sets NEURON_CC_FLAGS and the other Neuron variables: docs/neuron-environment.md.
set -euo pipefail

die() {
  echo "torchrun.sh: error: $1" >&2
  exit 2
}

stage=train dry_run='' flags=()
for word in "$@"; do
  case $word in
    --compile-only) stage=compile ;;
    --dry-run) dry_run=1 ;;
    *) flags+=("$word") ;;
  esac
done

# Find the nodes. Slurm comes first: under srun, MPI's variables may be set as well.
nodes=1 node=0 address='' run_id=esm-neuron
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  nodes=${SLURM_NNODES:-1} node=${SLURM_NODEID:-0} run_id=$SLURM_JOB_ID
  [[ ${SLURM_NTASKS:-$nodes} == "$nodes" ]] ||
    die "$SLURM_NTASKS Slurm tasks on $nodes nodes; start one a node: srun --ntasks-per-node=1"
  if ((nodes > 1)); then
    [[ -n ${SLURM_PROCID:-} || -n ${NODE_RANK:-} ]] || # a shell of salloc is one node of the job
      die "$nodes nodes are allocated and this shell runs on one; start all: srun --ntasks-per-node=1 launchers/torchrun.sh"
    address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  fi
elif [[ -n ${OMPI_COMM_WORLD_SIZE:-} ]]; then
  nodes=$OMPI_COMM_WORLD_SIZE node=$OMPI_COMM_WORLD_RANK
  [[ ${OMPI_COMM_WORLD_LOCAL_SIZE:-1} == 1 ]] ||
    die "$OMPI_COMM_WORLD_LOCAL_SIZE MPI processes on this node; start one a node: mpirun --map-by ppr:1:node"
  hosts=${PRTE_MCA_prte_default_hostfile:-${OMPI_MCA_orte_default_hostfile:-}}
  if [[ -r $hosts ]]; then
    address=$(awk '!/^#/ && NF { print $1; exit }' "$hosts")
  fi
elif [[ -n ${PMI_SIZE:-} ]]; then
  nodes=$PMI_SIZE node=$PMI_RANK
  [[ ${MPI_LOCALNRANKS:-1} == 1 ]] || die "$MPI_LOCALNRANKS MPI processes on this node; start one a node: mpirun -ppn 1"
elif [[ -n ${PET_NNODES:-} ]]; then
  nodes=$PET_NNODES node=${PET_NODE_RANK:-0} run_id=${HOSTNAME%-*-*}
fi
nodes=${NNODES:-$nodes} node=${NODE_RANK:-$node} address=${MASTER_ADDR:-$address} port=${MASTER_PORT:-29500}
if ! [[ $nodes =~ ^[1-9][0-9]*$ && $node =~ ^[0-9]+$ && $node -lt $nodes ]]; then
  die "node $node of $nodes: must be two numbers, the first below the second; set NODE_RANK and NNODES"
fi
((nodes == 1)) || [[ -n $address ]] || die "$nodes nodes and no address of the first one; set MASTER_ADDR"

# Find the devices of this node.
python=${PYTHON:-python}
cores=0 processes=1
if command -v neuron-ls >/dev/null; then
  count='import json, sys; print(sum(device["nc_count"] for device in json.load(sys.stdin)))'
  cores=$(neuron-ls --json-output | "$python" -c "$count" 2>/dev/null) ||
    die "neuron-ls lists no NeuronCores; check the driver, or set NPROC_PER_NODE and take neuron-ls out of PATH"
  processes=$cores
elif [[ -e /dev/neuron0 && -z ${NPROC_PER_NODE:-} ]]; then
  die "/dev/neuron0 is here and neuron-ls is not in PATH, so the NeuronCores cannot be counted; add /opt/aws/neuron/bin"
elif [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
  processes=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .) # GPUs or MIG slices: what the processes will see
elif [[ -z ${NPROC_PER_NODE:-} ]] && command -v nvidia-smi >/dev/null; then
  gpus=$(nvidia-smi --list-gpus 2>&1) ||
    die "nvidia-smi fails: ${gpus%%$'\n'*}; check the driver, or set NPROC_PER_NODE"
  processes=$(grep -c '^GPU ' <<<"$gpus" || true) # lines of MIG slices begin with spaces
fi
processes=${NPROC_PER_NODE:-$processes}
[[ $processes =~ ^[1-9][0-9]*$ ]] || die "$processes devices found; check the driver, or set NPROC_PER_NODE"

if ((cores > 0)); then
  export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-64} # limits host memory: dozens of processes have dozens of threads each
fi
if ((nodes > 1)) && { ((cores > 0)) || fi_info -p efa >/dev/null 2>&1; }; then
  export FI_PROVIDER=${FI_PROVIDER:-efa}
  export FI_EFA_USE_DEVICE_RDMA=${FI_EFA_USE_DEVICE_RDMA:-1}
  export FI_EFA_FORK_SAFE=${FI_EFA_FORK_SAFE:-1}
fi
# Workers that share torchrun's store would find the addresses of killed peers in it after a restart, and wait for them.
# Without sharing, each start of the workers has a store of its own.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
ulimit -n "$(ulimit -Hn)" # a socket per peer

command=("$python" -m torch.distributed.run "--nnodes=$nodes" "--nproc_per_node=$processes")
if ((nodes == 1)); then
  command+=(--standalone)
else
  host=$([[ $node == 0 ]] && echo true || echo false)
  command+=(--rdzv_backend=c10d "--rdzv_endpoint=$address:$port" "--rdzv_id=$run_id"
    "--rdzv_conf=is_host=$host,read_timeout=600,join_timeout=1800")
fi
# A process that is killed while it compiles leaves a lock on its graph, and every later one waits for that lock.
cache=${NEURON_COMPILE_CACHE_URL:-/var/tmp/neuron-compile-cache}
if ((cores > 0)) && [[ -z $dry_run && -d $cache ]] && ! pgrep -x neuronx-cc >/dev/null; then
  neuron_parallel_compile --command clear-locks || echo "torchrun.sh: the locks in $cache were not cleared" >&2
fi

if [[ $stage == compile ]]; then
  command+=(--max_restarts=0 -m esm_neuron.cli compile "${flags[@]}")
  if ((cores > 0)); then
    command=(neuron_parallel_compile "${command[@]}")
  fi
else
  command+=("--max_restarts=${MAX_RESTARTS:-3}" -m esm_neuron.cli train "${flags[@]}")
  [[ " ${flags[*]} " =~ \ --(checkpoint\.)?resume[\ =] ]] || command+=(--resume auto)
fi

if [[ -n $dry_run ]]; then
  env | sed -n '/^FI_/p; /^MALLOC_ARENA_MAX=/p' | sort
  printf '%q ' "${command[@]}" | # passwords of URLs left out
    sed -E -e 's#(:/{1,2})[^/@[:space:]]+@#\1***@#g' -e 's#(:/{1,2})[^/:[:space:]]+:[^[:space:]]+@#\1***@#g'
  echo
  exit
fi
exec "${command[@]}" # this process becomes torchrun, so SIGTERM reaches it and, through it, every worker
