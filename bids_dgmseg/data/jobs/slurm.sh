#!/bin/bash
{% if job == "submit" -%}
# Submits the array over the participants and, to run after it, the group level.
set -euo pipefail
if [ -n "$(squeue --noheader --name={{ name }})" ]; then
    echo "submit.sh: job {{ name }} is in the queue already" >&2
    exit 1
fi
array=$(sbatch --parsable {{ folder }}/participant.sh)
array=${array%%;*}  # the name of the cluster may follow
group=$(sbatch --parsable --dependency="afterany:$array,singleton" {{ folder }}/group.sh)
echo "array job $array, group level in job ${group%%;*}"
{%- else -%}
{% if job == "participant" -%}
#SBATCH --job-name={{ name }}
#SBATCH --array=1-{{ n_tasks }}{% if at_once %}%{{ at_once }}{% endif %}
#SBATCH --output={{ folder | replace("%", "%%") }}/%a.log
{% else -%}
#SBATCH --job-name={{ group_name }}
#SBATCH --dependency=singleton
#SBATCH --output={{ folder | replace("%", "%%") }}/group.log
{% endif -%}
#SBATCH --cpus-per-task={{ cpus }}
#SBATCH --mem={{ mem_mb }}M
#SBATCH --time={{ time }}
{% if account %}#SBATCH --account={{ account }}
{% endif %}{% if partition %}#SBATCH --partition={{ partition }}
{% endif %}
task=${SLURM_ARRAY_TASK_ID:-}
{% include "task.sh" %}
{%- endif %}
