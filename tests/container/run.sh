#!/usr/bin/env bash
# Build the image, and check it in Docker or Podman and in Apptainer as users run it. Ends at the first failure.
# Exit code 77: skipped because there is no container engine or no base image; the reason is printed.
#
# Environment variables (default):
#     ENGINE               docker, podman or buildah   (the first one that works)
#     IMAGE                an existing image           (build one)
#     BASE_IMAGE           of the build                (that of the Dockerfile)
#     BUILD_OPTIONS        further options of `ENGINE build`, such as --network host
#     APPTAINER            command                     (apptainer or singularity, if installed)
#     APPTAINER_OPTIONS    of `apptainer build`, such as --userns
#     TESTS                arguments of pytest         (the quick part)
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' bids_dgmseg/__init__.py)
uid=$((20000 + RANDOM))
read -ra build_options <<<"${BUILD_OPTIONS:-}"
read -ra apptainer_options <<<"${APPTAINER_OPTIONS:-}"
tests=(-m "not slow" tests/test_packaging.py tests/test_api.py tests/test_shipped_model.py tests/io tests/models tests/segmentation)
if [ -n "${TESTS:-}" ]; then read -ra tests <<<"$TESTS"; fi

step() { printf '\n## %s (%d s)\n' "$*" "$SECONDS"; }
fail() { echo "tests/container/run.sh: $*" >&2; exit 1; }
skip() { echo "tests/container/run.sh: skipped, $*"; exit 77; }
equal() { [ "$1" = "$2" ] || fail "$3: expected '$2', found '$1'"; }

find_engine() {
    local name
    for name in ${ENGINE:-docker podman buildah}; do
        if command -v "$name" >/dev/null && "$name" info >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
}

find_apptainer() {
    if [ -n "${APPTAINER:-}" ]; then echo "$APPTAINER"; else command -v apptainer || command -v singularity || true; fi
}

build() {
    local base=${BASE_IMAGE:-$(sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile)} found
    found=$("$engine" image inspect "$base" 2>&1 || "$engine" pull -q "$base" 2>&1 || "$engine" inspect "$base" 2>&1) ||
        skip "the base image $base is not available: $(tail -n 1 <<<"$found")"
    step "build $image from $base with $engine"
    "$engine" build "${build_options[@]}" --build-arg BASE_IMAGE="$base" --build-arg VERSION="$version" -t "$image" .
}

in_image() {  # USER ENTRYPOINT [ARGUMENT...]: no network, only /out and /work can be written
    local user=$1 entrypoint=$2 options=(--rm --network none --read-only)
    shift 2
    if [ "$engine" = podman ]; then options+=(--read-only-tmpfs=false); fi
    "$engine" run "${options[@]}" -u "$user:$user" -v "$PWD/tests/container:/check:ro" -v "$data:/data:ro" \
        -v "$out:/out" -v "$tmp/mine/work:/work" --entrypoint "$entrypoint" "$image" "$@"
}

app() {  # as a user without account and HOME, whose files are private
    in_image "$uid" sh -c 'umask 077; unset HOME; exec entrypoint "$@"' sh "$@"
}

run_levels() {
    app /data /out participant -w /work --nprocs 2
    app /data /out group -w /work
    in_image "$uid" python /check/check_output.py /data /out
}

expect() {  # EXIT_CODE WORD COMMAND...: the command must end with this code and print the word
    local code=0 said
    said=$("${@:3}" 2>&1) || code=$?
    tail -n 2 <<<"$said"
    equal "$code" "$1" "exit code of ${*:3}"
    [[ $said == *"$2"* ]] || fail "${*:3}: did not print '$2'"
}

make_folders() {
    mkdir -p "$tmp/mine/out" "$tmp/mine/other" "$tmp/mine/work"
    "$engine" run --rm -u 0:0 -v "$tmp:/all" --entrypoint chown "$image" -R "$uid:$uid" /all/mine
    "$engine" run --rm --network none -u "$uid:$uid" -v "$tmp/mine:/mine" --entrypoint sh "$image" -euc '
        dgmseg demo /mine/data
        cp -r /mine/data /mine/broken
        rm -r /mine/broken/sub-01/ses-2 /mine/broken/sub-02 /mine/broken/sub-0[456]
        truncate -s 20000 /mine/broken/sub-03/anat/sub-03_Chimap.nii.gz'
    data=$tmp/mine/data out=$tmp/mine/out
}

check_image() {
    step "metadata and commands"
    equal "$("$engine" image inspect -f '{{index .Config.Labels "org.opencontainers.image.version"}}' "$image")" "$version" "label"
    [[ $("$engine" image inspect -f '{{.Config.User}}' "$image") =~ ^(|0|root)(:.*)?$ ]] && fail "the image runs as root"
    echo "size: $("$engine" image inspect -f '{{.Size}}' "$image") bytes"
    equal "$(app --version)" "bids_dgmseg $version" "--version"
    equal "$(app dgmseg --version)" "dgmseg $version" "dgmseg --version"
    expect 0 "usage: bids_dgmseg" app --help
    in_image "$uid" sh -c 'ls /opt/venv/lib/python3*/site-packages/bids_dgmseg/cli/__pycache__/bids_app.*.pyc'
}

check_tests() {
    step "quick part of the tests"
    local pytest=$image-pytest
    "$engine" build "${build_options[@]}" -t "$pytest" - <<EOF
FROM $image
USER root
RUN pip --python /opt/venv/bin/python install --no-cache-dir pytest pytest-timeout pytest-xdist hypothesis
EOF
    # The package is that of the image: its folder comes before the source tree on the path.
    "$engine" run --rm --network none --read-only --tmpfs /tmp:exec -u "$uid:$uid" -v "$PWD:/src:ro" -w /src -e COLUMNS=120 \
        --entrypoint sh "$pytest" -c 'exec python -m pytest -q -p no:cacheprovider -o "pythonpath=$(echo /opt/venv/lib/python3*/site-packages) . docs" "$@"' sh "${tests[@]}"
}

check_runs() {
    step "demo: as user $uid, umask 077, no network, no HOME, only /out and /work can be written"
    run_levels
    equal "$(in_image "$uid" find /out -mindepth 1 -perm /077)" "" "files that others can read"

    step "rerun after deleting a part of the results and the work folder"
    local sums='cd /out && find . -name "*_stats.tsv" | sort | xargs sha256sum'
    local before
    before=$(in_image "$uid" sh -c "$sums")
    in_image "$uid" sh -c 'rm -r /out/sub-03/anat/*_dseg.nii.gz /out/sub-03/anat/*_stats.tsv /out/sub-01.html /out/group* /out/figures /work/..?* /work/.[!.]* /work/* 2>/dev/null || true'
    run_levels
    equal "$(in_image "$uid" sh -c "$sums")" "$before" "tables after the rerun"

    step "runs that must fail"
    expect 2 "dataset_description.json not found" app /work /out participant -w /work
    data=$tmp/mine/broken out=$tmp/mine/other
    expect 1 "1 of 2 scan(s) failed: sub-03" app /data "/out/two scans" participant -w /work --no-viewer
    in_image "$uid" sh -c 'ls /out/*/sub-01/ses-1/anat/sub-01_ses-1_seg-dgm16_dseg.nii.gz'
}

check_apptainer() {
    local apptainer archive=$tmp/image.tar sif=$tmp/sif controls=HC
    read -ra apptainer <<<"$(find_apptainer)"
    if [ "${#apptainer[@]}" -eq 0 ]; then
        step "Apptainer: not checked, neither apptainer nor singularity is installed"
        return
    fi
    step "build an image for Apptainer with ${apptainer[*]}"
    case $engine in
        buildah) buildah push -q "$image" "docker-archive:$archive:$image" ;;
        podman) podman save -q --format docker-archive -o "$archive" "$image" ;;
        *) docker save -o "$archive" "$image" ;;
    esac
    mkdir -p "$sif/out folder" "$sif/work" "$sif/data"
    "${apptainer[@]}" build "${apptainer_options[@]}" --build-arg bootstrap=docker-archive --build-arg from="$archive" \
        "$sif/bids_dgmseg.sif" Apptainer.def
    rm "$archive"
    run=("${apptainer[@]}" run --containall --no-home -B "$sif/data:/data,$sif/out folder:/out,$sif/work:/work" "$sif/bids_dgmseg.sif")

    step "Apptainer: participant and group level"
    equal "$("${run[@]}" --version)" "bids_dgmseg $version" "--version"
    "${run[@]}" dgmseg demo /data/demo
    "${run[@]}" /data/demo "/out/first \"study\"" participant -w /work --no-viewer
    "${run[@]}" /data/demo "/out/first \"study\"" group --controls "$controls"
    grep -F 'the group of --controls' "$sif/out folder/first \"study\"/group/group_stats.json"

    step "Apptainer: arguments are never evaluated"
    # shellcheck disable=SC2016  # not to be expanded here, nor anywhere else
    expect 2 '$(touch /out/executed)' "${run[@]}" /data/demo '/out/first "study"' participant -w /work \
        --participant-label '$(touch /out/executed)' '`touch /out/executed`'
    if [ -e "$sif/out folder/executed" ]; then fail "an argument was executed"; fi
}

engine=$(find_engine)
if [ -z "$engine" ]; then skip "no container engine works (tried ${ENGINE:-docker, podman, buildah})"; fi
image=${IMAGE:-localhost/bids_dgmseg:$version}
tmp=$(mktemp -d)
clean() {  # the files of other users only root can remove, which the container is
    if [ -n "${image_ready:-}" ] && [ "$engine" != buildah ]; then
        "$engine" run --rm -u 0:0 -v "$tmp:/all" --entrypoint sh "$image" -c 'rm -rf /all/*' || true
    fi
    rm -rf "$tmp"
}
trap clean EXIT

if [ -z "${IMAGE:-}" ]; then build; fi
image_ready=yes
if [ "$engine" = buildah ]; then
    step "buildah cannot run images with a read-only root: only Apptainer is checked"
    if [ -z "$(find_apptainer)" ]; then skip "the image was built, but there is nothing to run it with"; fi
else
    make_folders
    check_image
    check_tests
    check_runs
fi
check_apptainer
step "all checks passed"
