#!/bin/bash
# The group level, after all tasks; add its options to the last line.
#SBATCH --job-name=bids_dgmseg
#SBATCH --output=@FOLDER@/group.log
#SBATCH --cpus-per-task=2
#SBATCH --mem=8G
#SBATCH --time=02:00:00

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
@COMMAND@ group --work-dir "$work"
