#!/bin/bash
{% if job == "submit" -%}
set -euo pipefail
array=$(bsub <{{ folder }}/participant.sh)
array=${array#*<}  # Job <123> is submitted to queue <normal>.
array=${array%%>*}
group=$(bsub -w "ended($array)" <{{ folder }}/group.sh)
echo "array job $array, group level: $group"
{%- else -%}
{% if job == "participant" -%}
#BSUB -J "{{ name }}[1-{{ n_tasks }}]{% if at_once %}%{{ at_once }}{% endif %}"
#BSUB -o {{ folder }}/%I.log
{% else -%}
#BSUB -J {{ group_name }}
#BSUB -o {{ folder }}/group.log
{% endif -%}
#BSUB -n {{ cpus }}
#BSUB -R "span[hosts=1]"
# In MB if LSF_UNIT_FOR_LIMITS of the cluster is MB.
#BSUB -M {{ mem_mb }}
#BSUB -W {{ time[:-3] }}
{% if account %}#BSUB -P {{ account }}
{% endif %}{% if partition %}#BSUB -q {{ partition }}
{% endif %}
task=${LSB_JOBINDEX:-}
{% include "task.sh" %}
{%- endif %}
