#!/bin/bash
{% if job == "submit" -%}
set -euo pipefail
array=$(qsub -terse {{ folder }}/participant.sh)
array=${array%%.*}  # the range of tasks follows
group=$(qsub -terse -hold_jid "$array" {{ folder }}/group.sh)
echo "array job $array, group level in job $group"
{%- else -%}
{% if job == "participant" -%}
#$ -N {{ name }}
#$ -t 1-{{ n_tasks }}
{% if at_once %}#$ -tc {{ at_once }}
{% endif -%}
#$ -o {{ folder }}/$TASK_ID.log
{% else -%}
#$ -N {{ group_name }}
#$ -o {{ folder }}/group.log
{% endif -%}
#$ -j y
#$ -S /bin/bash
# The name of the parallel environment and of the memory limit differ between clusters; the limit is per CPU.
#$ -pe smp {{ cpus }}
#$ -l h_vmem={{ mem_mb // cpus }}M
#$ -l h_rt={{ time }}
{% if account %}#$ -A {{ account }}
{% endif %}{% if partition %}#$ -q {{ partition }}
{% endif %}
task=${SGE_TASK_ID:-}
{% include "task.sh" %}
{%- endif %}
