#!/bin/sh
# Compare all models with the weights that ship, and the multi-atlas baseline, on labelled datasets.
#
#     benchmarks/compare.sh ATLASES OUT DATASET...
#
# Each dataset gets a folder of its name in OUT; open OUT/DATASET/evaluation/evaluate.html. PYTHON chooses the interpreter,
# COMPARE_OPTIONS adds options of workflows/compare_models.py, such as "--threads 2".
set -eu

if [ "$#" -lt 3 ]; then
    sed -n '4s/^# *//p' "$0" >&2
    exit 2
fi
atlases=$1 out=$2
shift 2

root=$(cd "$(dirname "$0")/.." && pwd)
status=0
for dataset in "$@"; do
    # The options are meant to be split.
    # shellcheck disable=SC2086
    "${PYTHON:-python}" "$root/workflows/compare_models.py" "$dataset" "$out/$(basename "$dataset")" \
        --models dgm16 dcnnet nnunet2step attunet25d deepqsmseg --atlases "$atlases" ${COMPARE_OPTIONS:-} || status=$?
done
exit "$status"
