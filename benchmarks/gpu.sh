#!/bin/sh
# The CUDA figures of docs/performance.md, on a machine with one GPU, in less than ten minutes.
#
#     sh benchmarks/gpu.sh && python benchmarks/gpu_report.py benchmarks/results --docs
#
# OUT      folder for the figures (default benchmarks/results): dp_step.jsonl, logical_step.jsonl, sampling.jsonl,
#          gpu_tests.txt, gpu_layers.txt, environment.txt, report.md, errors.txt. What is measured is written at once, so that a run that is cut short
#          leaves what it has.
# WHEELS   folder of wheels of what the machine lacks, installed into a temporary folder without their dependencies.
#          For a bare torch: dpdm itself (its version is asked for), omegaconf, antlr4-python3-runtime, cryptography, cffi, pycparser, dp-accounting, dm-tree,
#          immutabledict; for the peers: opacus, diffusers, importlib-metadata, zipp. Without the peers their columns
#          stay empty.
# PYTHON   with torch (default python3).
# DEVICE   cuda, or cpu to try the script.
# LIMIT    seconds after which nothing is measured any more (default 580).
# ROUNDS, IMAGES, NETWORKS, LARGE, FULL, LOGICAL   less of everything, for a trial. LARGE: shapes for MNIST alone, beside
#          Opacus. FULL: one that fills a GPU, beside the plain step as torch.compile makes it. LOGICAL: shape of a whole
#          step of training, with images and noise made ready beside it and without.
set -u
started=$(date +%s)
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} ROUNDS=${ROUNDS:-7} IMAGES=${IMAGES:-256} LIMIT=${LIMIT:-580}
NETWORKS=${NETWORKS:-mnist_28 cifar10_32 celeba_64} LARGE=${LARGE:-64x32} FULL=${FULL:-256x32} LOGICAL=${LOGICAL:-1024x32}
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT" || exit 1
rm -f "$OUT/dp_step.jsonl" "$OUT/logical_step.jsonl" "$OUT/sampling.jsonl" "$OUT/errors.txt" # lines are appended below
site=$(mktemp -d) || exit 1
trap 'rm -rf "$site"' EXIT
PYTHONPATH=$PWD/src:$site${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit 1
fi
"$PYTHON" -c '
import importlib.util, sys
names = "torch numpy scipy omegaconf yaml cryptography dp_accounting safetensors click PIL tqdm jinja2 sklearn".split()
missing = [name for name in names if importlib.util.find_spec(name) is None]
if missing:
    sys.exit("Expected all that dpdm needs, missing: " + ", ".join(missing) + ": give their wheels by WHEELS.")
import torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("Expected a usable GPU, torch sees none: set DEVICE=cpu to try the script.")
print("python", sys.version.split()[0], "torch", torch.__version__)
print(torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "cpu")
' "$DEVICE" >"$OUT/environment.txt" || exit 1
cat "$OUT/environment.txt"

# Runs a command for at most $1 seconds, and not beyond LIMIT. What fails is named on standard error, and the rest goes on.
try() {
    left=$((started + LIMIT - $(date +%s)))
    [ "$left" -gt 5 ] || { echo "No time left for: $*" >&2 && return; }
    limit=$(($1 < left ? $1 : left))
    shift
    timeout "$limit" "$@" 2>>"$OUT/errors.txt" || echo "Status $? of: $*; see $OUT/errors.txt" >&2
    echo "$(($(date +%s) - started)) s: $*" >&2
}

# Kernels are compiled once for a machine: here, in several processes, and in nobody's time below. The tests run beside them,
# those first that tell most: of the CUDA graph, of waiting, of copies.
if [ "$DEVICE" = cuda ]; then
    for network in $NETWORKS; do
        try 100 "$PYTHON" benchmarks/dp_step.py --network "$network" --device "$DEVICE" --rounds 1 --peers --no-peak \
            --no-error --json >/dev/null &
    done
    first="tests/test_recorded.py tests/test_train.py tests/test_transfer.py"
    others=$(grep -rlE 'mark\.gpu' tests | grep -vE 'test_(recorded|train|transfer|gpu_layers)\.py' | sort)
    # shellcheck disable=SC2086 # files are words
    try 100 "$PYTHON" -m pytest -v -m gpu -p no:cacheprovider $first $others >"$OUT/gpu_tests.txt" &
    try 100 "$PYTHON" -m pytest -v tests/privacy/test_gpu_layers.py -p no:cacheprovider >"$OUT/gpu_layers.txt" &
    wait
fi
try 60 "$PYTHON" benchmarks/dp_step.py --network mnist_28 --examples "${FULL%x*}" --draws "${FULL#*x}" \
    --device "$DEVICE" --rounds "$ROUNDS" --peers --no-error --json >>"$OUT/dp_step.jsonl"
for shape in $LARGE; do
    try 45 "$PYTHON" benchmarks/dp_step.py --network mnist_28 --examples "${shape%x*}" --draws "${shape#*x}" \
        --device "$DEVICE" --rounds "$ROUNDS" --peers opacus_hooks --no-error --json >>"$OUT/dp_step.jsonl"
done
try 45 "$PYTHON" benchmarks/logical_step.py --network mnist_28 --examples "${LOGICAL%x*}" --draws "${LOGICAL#*x}" \
    --device "$DEVICE" --rounds "$ROUNDS" --json >>"$OUT/logical_step.jsonl"
for network in $NETWORKS; do
    try 60 "$PYTHON" benchmarks/dp_step.py --network "$network" --device "$DEVICE" --rounds "$ROUNDS" --json \
        >>"$OUT/dp_step.jsonl"
done
for network in $NETWORKS; do
    try 45 "$PYTHON" benchmarks/sampling.py --network "$network" --device "$DEVICE" --images "$IMAGES" \
        --rounds "$ROUNDS" --json >>"$OUT/sampling.jsonl"
done
# Last, as compiling may take all the time that is left.
try 200 "$PYTHON" benchmarks/dp_step.py --network mnist_28 --examples "${FULL%x*}" --draws "${FULL#*x}" \
    --device "$DEVICE" --rounds "$ROUNDS" --peers plain_compiled --no-error --json >>"$OUT/dp_step.jsonl"
LIMIT=$((LIMIT + 20)) # whatever was measured is told
try 15 "$PYTHON" benchmarks/gpu_report.py "$OUT" >"$OUT/report.md"
for file in gpu_tests.txt gpu_layers.txt report.md; do
    [ ! -e "$OUT/$file" ] || cat "$OUT/$file"
done
