#!/usr/bin/env bash
# Segment a BIDS dataset on a Slurm cluster: a job array over the participants, then the group level.
#
#     workflows/slurm.sh BIDS_DIR OUTPUT_DIR [OPTION...]
#
# Options are passed to the participant level. Run the script on the login node; copy and adapt it if your cluster
# needs other options of sbatch.
# Running the same command again submits only participants with scans that are missing, failed or have changed.
# Participants with invalid files are submitted too, so that their log and page report the problem.
#
# Environment variables (default):
#     BIDS_DGMSEG   command of the app                (bids_dgmseg)
#                   such as "apptainer run --cleanenv -B /data bids_dgmseg.sif"
#     PARTICIPANTS  participants, such as "01 02"     (all)
#     CPUS, MEM_GB, TIME   resources per task         (2, 8, 02:00:00)
#     SBATCH        command to submit jobs            (sbatch)
#                   such as "sbatch --partition=short --account=lab"
#     MAX_TASKS     maximum number of tasks           (1000; with more participants, a task processes several)
#     AT_ONCE       tasks that run at the same time   (50)
#     SCRATCH_DIR   folder for intermediate files     ($TMPDIR of the node, otherwise /tmp)
set -euo pipefail
shopt -s inherit_errexit  # a failed dry run must end the script

read -ra app <<<"${BIDS_DGMSEG:-bids_dgmseg}"
read -ra submit <<<"${SBATCH:-sbatch}"
read -ra participants <<<"${PARTICIPANTS:-}"
export MEM_GB=${MEM_GB:-8}

run_task() {  # BIDS_DIR OUTPUT_DIR LIST [OPTION...]: every n-th participant of the list
    local bids_dir=$1 output_dir=$2 list=$3 labels
    shift 3
    mapfile -t labels < <(awk -v n="$SLURM_ARRAY_TASK_COUNT" -v i="$SLURM_ARRAY_TASK_ID" '(NR - i) % n == 0' "$list")
    work=$(mktemp -d "${SCRATCH_DIR:-${TMPDIR:-/tmp}}/bids_dgmseg.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    "${app[@]}" "$bids_dir" "$output_dir" participant --participant-label "${labels[@]}" --skip-bids-validation \
        --nprocs "${SLURM_CPUS_PER_TASK:-1}" --mem-gb "$(awk "BEGIN { print 0.9 * $MEM_GB }")" -w "$work" "$@"
}

run_group() {  # BIDS_DIR OUTPUT_DIR
    "${app[@]}" "$1" "$2" group
}

plural() {  # NUMBER: s unless it is one
    [ "$1" = 1 ] || echo s
}

plan() {  # BIDS_DIR OUTPUT_DIR [OPTION...]: labels of participants that need processing
    local planned
    if [ "${#participants[@]}" -gt 0 ]; then set -- "$@" --participant-label "${participants[@]}"; fi
    planned=$("${app[@]}" "$1" "$2" participant --dry-run "${@:3}")
    sed -nE 's/^sub-([0-9A-Za-z+]+)[^:]*: would (segment|reconstruct|fail)[: ].*/\1/p' <<<"$planned" | sort -u
}

reject_selection() {
    local option
    for option in "$@"; do
        case $option in
            --participant[-_]label*)
                echo "slurm.sh: $option: not available, since each task sets it; list participants in PARTICIPANTS=\"01 02\"" >&2
                exit 2 ;;
        esac
    done
}

submit_all() {
    if [ "$#" -lt 2 ]; then
        echo "slurm.sh: usage: workflows/slurm.sh BIDS_DIR OUTPUT_DIR [OPTION...]" >&2
        exit 2
    fi
    local bids_dir output_dir to_do logs count tasks array group
    bids_dir=$(realpath -m "$1") output_dir=$(realpath -m "$2")
    shift 2
    reject_selection "$@"
    to_do=$(plan "$bids_dir" "$output_dir" "$@")
    if [ -z "$to_do" ]; then
        echo "all scans are up to date; for the group tables: ${app[*]} $bids_dir $output_dir group"
        exit
    fi
    logs=$output_dir/logs/slurm-$(date +%Y%m%d-%H%M%S)-$$
    mkdir -p "$logs"
    echo "$to_do" >"$logs/participants.txt"
    count=$(wc -l <"$logs/participants.txt")
    tasks=$((count < ${MAX_TASKS:-1000} ? count : ${MAX_TASKS:-1000}))
    array=$("${submit[@]}" --parsable --job-name=bids_dgmseg --array="1-$tasks%${AT_ONCE:-50}" \
        --cpus-per-task="${CPUS:-2}" --mem="${MEM_GB}G" --time="${TIME:-02:00:00}" --output="$logs/%a.log" \
        "${BASH_SOURCE[0]}" --task "$bids_dir" "$output_dir" "$logs/participants.txt" "$@")
    group=$("${submit[@]}" --parsable --job-name=bids_dgmseg_group --dependency="afterany:${array%%;*}" \
        --cpus-per-task=1 --mem=2G --time=00:30:00 --output="$logs/group.log" \
        "${BASH_SOURCE[0]}" --group "$bids_dir" "$output_dir")
    echo "$count participant$(plural "$count") in array ${array%%;*} ($tasks task$(plural "$tasks")), group level in job ${group%%;*}; logs in $logs"
}

case ${1:-} in
    --task) shift && run_task "$@" ;;
    --group) shift && run_group "$@" ;;
    *) submit_all "$@" ;;
esac
