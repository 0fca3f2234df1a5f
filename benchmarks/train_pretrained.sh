#!/bin/sh
# Trains one pretrained release, in calls that each end within ten minutes; the same call goes on until all is done.
#
#     DATA=path/to/mnist sh benchmarks/train_pretrained.sh mnist_eps_1.0 path/to/state
#
# The config is the published one (configs/mnist_28/train_eps_1.0.yaml) under configs/pretrained/recipe.yaml and, if there
# is one, configs/pretrained/NAME.yaml. STATE, the folder, holds between calls:
#
#   parts/     the unfinished run (weights, average, Adam's moments, ledger, key), cut into files of at most 15 MiB with
#              their SHA-256: as private as the images. In its place, once training is done:
#   release/   the release in half precision, for src/dpdm/pretrained/NAME/
#   statement.txt  what dpdm verify prints of it
#   figures/   NAME.json by benchmarks/quality.py, for docs/results/; what it holds is not measured again
#
# Exit status: 0 all is done, 75 call again, anything else a failure; then STATE is as it was, and no part of what was
# trained in that call may be looked at, because the state that goes on does not know of it.
#
# DATA     the real images: a folder of idx files, an archive, or anything that dpdm prepare takes.
# TEST     archive of real test images, if DATA is an archive.
# OUT      folder for the new state (default STATE).
# LIMIT    seconds that a call may take (default 560); a step, saving and packing need some 40 of them.
# KEYS     further keys for training, such as "train.num_iterations=2 setup.device=cpu".
# QUALITY  further arguments of benchmarks/quality.py, such as "--num-images 100 --epochs 1".
# PART     size of a part (default 15m), for split.
# CONFIG   in place of the published config.
# PYTHON   with torch and dpdm (default python3).
set -u
started=$(date +%s)
fail() { echo "$1" >&2 && exit "${2:-1}"; }
[ $# -eq 2 ] || fail "Expected NAME and STATE, got $# words: see the head of $0." 2
name=$1
mkdir -p "$2" "${OUT:-$2}" || exit 1
state=$(cd "$2" && pwd) out=$(cd "${OUT:-$2}" && pwd) data=${DATA:-} test=${TEST:-}
[ -e "$data" ] || [ "$data" = digits ] || fail "Expected DATA to be real images, got '$data': set it to their path." 2
[ "$data" = digits ] || data=$(cd "$(dirname "$data")" && pwd)/$(basename "$data")
[ -z "$test" ] || test=$(cd "$(dirname "$test")" && pwd)/$(basename "$test")
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-560} KEYS=${KEYS:-} QUALITY=${QUALITY:-} PART=${PART:-15m}
CONFIG=${CONFIG:-configs/${name%%_*}_28/train_eps_${name##*_}.yaml}
[ -f "$CONFIG" ] || fail "Expected a config at $CONFIG, found none: check NAME, or set CONFIG." 2
PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
left() { echo $((started + LIMIT - $(date +%s) - $1)); }

# Puts a folder in the place of another, whose name then never stands for a part of either.
replace() {
    rm -rf "$2.old"
    [ ! -e "$2" ] || mv "$2" "$2.old" || exit 1
    mv "$1" "$2" && rm -rf "$2.old"
}

pack() { # the run, all but its images, which are prepared anew
    rm -rf "$out/parts.new"
    mkdir "$out/parts.new" || exit 1
    chmod 700 "$out/parts.new"
    tar -C "$work" -cf "$work/run.tar" --exclude 'private/*.zip' --exclude private/lock run || exit 1
    split -b "$PART" -a 3 "$work/run.tar" "$out/parts.new/part." || exit 1
    (cd "$out/parts.new" && sha256sum part.* >sha256) || exit 1
    replace "$out/parts.new" "$out/parts"
}

unpack() {
    [ -e "$state/parts" ] || [ ! -e "$state/parts.old" ] || mv "$state/parts.old" "$state/parts" || exit 1
    [ -e "$state/parts" ] || return 1
    (cd "$state/parts" && sha256sum --check --quiet sha256 >&2) ||
        fail "Expected whole parts in $state/parts, found others: bring them back, or remove the folder to begin anew."
    cat "$state"/parts/part.* >"$work/run.tar" && tar -C "$work" -xf "$work/run.tar" || exit 1
}

train() {
    resume=
    unpack && resume=--resume
    set -- --config "$CONFIG" configs/pretrained/recipe.yaml
    [ ! -f "configs/pretrained/$name.yaml" ] || set -- "$@" "configs/pretrained/$name.yaml"
    [ "$(left 40)" -gt 0 ] || fail "Expected more than 40 seconds to train in, got LIMIT=$LIMIT: raise it." 2
    # shellcheck disable=SC2086 # KEYS are words
    timeout --preserve-status --signal INT --kill-after 30 "$(left 40)" \
        "$PYTHON" -m dpdm train "$@" --workdir "$work/run" $resume -- "data.path=$data" $KEYS
    status=$?
    if [ $status -eq 130 ]; then
        [ -e "$work/run/private/checkpoint.safetensors" ] || fail "Nothing was trained yet: call again, with more LIMIT." 75
        pack
        fail "Not done: call again." 75
    fi
    [ $status -eq 0 ] || exit $status
    "$PYTHON" -m dpdm release --workdir "$work/run" --half || exit 1
    rm -rf "$out/release.new"
    cp -r "$work/run/release" "$out/release.new" && replace "$out/release.new" "$out/release" && rm -rf "$out/parts"
}

if [ -e "$state/release" ]; then
    [ "$state" = "$out" ] || cp -r "$state/release" "$out/" || exit 1
else
    train
fi
if [ "$state" != "$out" ] && [ -e "$state/figures" ]; then
    cp -r "$state/figures" "$out/" || exit 1
fi
"$PYTHON" -m dpdm verify "$out/release" >"$out/statement.txt" || exit 1
[ "$(left 20)" -gt 0 ] || fail "Trained, not measured: call again." 75
set -- --release "$out/release" --name "$name" --data "$data" --keep "$out/figures"
[ -z "$test" ] || set -- "$@" --test "$test"
# shellcheck disable=SC2086 # QUALITY is words
timeout --kill-after 10 "$(left 10)" "$PYTHON" benchmarks/quality.py "$@" $QUALITY
status=$?
[ $status -ne 124 ] && [ $status -ne 137 ] || fail "Not all is measured: call again." 75
exit $status
