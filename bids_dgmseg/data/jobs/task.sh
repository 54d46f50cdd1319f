set -euo pipefail
cd /
{% if job == "participant" -%}
# The participants of this task are a line of participants.txt.
read -ra labels < <(sed -n "${task}p" {{ folder }}/participants.txt) || true
: "${labels[0]:?no participants in line $task of participants.txt}"
{% endif -%}
scratch={% if work_dir %}{{ work_dir }}{% else %}${TMPDIR:-/tmp}{% endif %}
mkdir -p "$scratch"
work=$(mktemp -d "$scratch/bids_dgmseg.XXXXXX")
# Cancelling a job signals all its processes. This one waits for the program to end before it removes its files.
trap : HUP INT TERM
status=0
{% if container -%}
{{ runtime }} exec --cleanenv --no-home{% if device == "cuda" %} --nv{% endif %} \
{%- for mount in mounts %}
    --mount {{ mount }} \
{%- endfor %}
    --mount "type=bind,src=$work,dst=$work" \
    {{ container }} bids_dgmseg \
{%- else -%}
{{ python }} -P -m bids_dgmseg \
{%- endif %}
{%- if job == "participant" %}
    {{ bids_dir }} {{ output_dir }} participant --participant-label "${labels[@]}" --skip-bids-validation \
{%- else %}
    {{ bids_dir }} {{ output_dir }} group \
{%- endif %}
    -w "$work" --nprocs {{ cpus }} --mem-gb {{ mem_gb }}{% for option in options %} \
    {{ option }}{% endfor %} || status=$?
rm -rf -- "$work"
exit "$status"
