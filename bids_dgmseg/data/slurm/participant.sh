#!/bin/bash
# One task per participant. Submit both levels with:
#   job=$(sbatch --parsable @FOLDER@/participant.sh)
#   sbatch --dependency=afterany:$job @FOLDER@/group.sh
#SBATCH --job-name=bids_dgmseg
#SBATCH --array=1-@N_PARTICIPANTS@
#SBATCH --output=@FOLDER@/%a.log
#SBATCH --cpus-per-task=2
#SBATCH --mem=8G
#SBATCH --time=02:00:00

participant=$(sed -n "${SLURM_ARRAY_TASK_ID}p" @FOLDER@/participants.txt)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
@COMMAND@ participant \
    --participant-label "$participant" --skip-bids-validation \
    --nprocs 2 --mem-gb 7 --work-dir "$work"@OPTIONS@
