#!/bin/sh
# Compare dgm16, the papers' models that have a folder in WEIGHTS and the multi-atlas baseline on labelled datasets.
#
#     benchmarks/compare.sh WEIGHTS ATLASES OUT DATASET...
#
# Each dataset gets a folder of its name in OUT; open OUT/DATASET/compare.html. PYTHON chooses the interpreter,
# COMPARE_OPTIONS adds options of workflows/compare_models.py, such as "--threads 2".
set -eu

if [ "$#" -lt 4 ]; then
    sed -n '4s/^# *//p' "$0" >&2
    exit 2
fi
weights=$1 atlases=$2 out=$3
shift 3

models=dgm16
for model in nnunet2step dcnnet attunet25d deepqsmseg; do
    if [ -d "$weights/$model" ]; then
        models="$models $model=$weights/$model"
    fi
done

root=$(cd "$(dirname "$0")/.." && pwd)
status=0
for dataset in "$@"; do
    # The lists are meant to be split: names of folders here have no spaces.
    # shellcheck disable=SC2086
    "${PYTHON:-python}" "$root/workflows/compare_models.py" "$dataset" "$out/$(basename "$dataset")" \
        --models $models --atlases "$atlases" ${COMPARE_OPTIONS:-} || status=$?
done
exit "$status"
