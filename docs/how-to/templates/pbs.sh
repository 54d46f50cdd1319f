#!/bin/bash
{% if job == "submit" -%}
set -euo pipefail
array=$(qsub {{ folder }}/participant.sh)
group=$(qsub -W depend=afterany:"$array" {{ folder }}/group.sh)
echo "array job $array, group level in job $group"
{%- else -%}
{% if job == "participant" -%}
#PBS -N {{ name }}
#PBS -J 1-{{ n_tasks }}{% if at_once %}%{{ at_once }}{% endif %}
#PBS -o {{ folder }}/^array_index^.log
{% else -%}
#PBS -N {{ group_name }}
#PBS -o {{ folder }}/group.log
{% endif -%}
#PBS -j oe
#PBS -l select=1:ncpus={{ cpus }}:mem={{ mem_mb }}mb
#PBS -l walltime={{ time }}
{% if account %}#PBS -A {{ account }}
{% endif %}{% if partition %}#PBS -q {{ partition }}
{% endif %}
task=${PBS_ARRAY_INDEX:-}
{% include "task.sh" %}
{%- endif %}
