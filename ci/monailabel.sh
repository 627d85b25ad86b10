#!/usr/bin/env bash
# MONAI Label with the segmentation bundle in it, asked over HTTP on 127.0.0.1: label names, segmentation on every kind of
# grid, refusal of images that training refuses, a label of another scan, one epoch of training from it as 3D Slicer asks
# for it. Installs MONAI Label into .venv-monailabel. Needs no GPU.
#
#   bash ci/monailabel.sh [MODEL_PT]
#
# MODEL_PT are weights to start with, instead of those that the bundle ships. All files are under runs/monailabel;
# server.log is what the server said.
set -euo pipefail
if [ "$#" -gt 1 ] || { [ "$#" -eq 1 ] && [ ! -f "$1" ]; }; then
    echo "usage: bash ci/monailabel.sh [MODEL_PT], a file with weights of the segmentation bundle; got: $*" >&2
    exit 2
fi
weights="${1:+$(cd "$(dirname "$1")" && pwd)/$(basename "$1")}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
export OMP_WAIT_POLICY=passive
unset PYTHONPATH

venv="$root/.venv-monailabel"
python="$venv/bin/python"
work="$root/runs/monailabel"
bundle="$work/apps/monaibundle/model/structdiff_seg_cal"
configs="$bundle/configs"

say() { printf '\n== %s\n' "$*"; }

install_monailabel() {
    local stamp
    stamp="$venv/structdiff-$(sha256sum "$root/ci/monailabel.sh" | cut -c1-16)"
    if [ -f "$stamp" ]; then return; fi
    "${PYTHON:-python3}" -m venv "$venv"
    # In this order: resolved together, or in sam2's own build environment, pip would take CUDA packages of gigabytes.
    "$venv/bin/pip" install --quiet torch==2.13.0
    "$venv/bin/pip" install --quiet monai==1.6.1
    "$venv/bin/pip" install --quiet --no-deps torchvision==0.28.0
    SAM2_BUILD_CUDA=0 "$venv/bin/pip" install --quiet --no-deps --no-build-isolation sam2==1.1.0
    "$venv/bin/pip" install --quiet monailabel==0.8.5 'pydicom<3' 'pynetdicom<3'
    if ! "$python" -c 'import torchvision' 2>/dev/null; then declare_operators; fi
    touch "$stamp"
}

# torchvision comes built for CUDA. Beside CPU torch its compiled operators do not load, and importing it fails where it
# describes two of them. Declaring these lets it be imported; MONAI Label calls neither.
declare_operators() {
    local site
    site="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    cat >"$site/torchvision_operators.py" <<'END'
import torch

library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
END
    echo 'import torchvision_operators' >"$site/torchvision_operators.pth"
    "$python" -c 'import torchvision'
}

server=""
stop_server() { # the whole process group: a training that the server started ends with it
    if [ -n "$server" ]; then kill -- "-$server" 2>/dev/null && wait "$server" 2>/dev/null || true; fi
}
trap stop_server EXIT

start_server() { # start_server PORT
    set -m # a process group of its own
    "$python" -m monailabel.main start_server --app "$work/apps/monaibundle" --studies "$work/studies" \
        --host 127.0.0.1 --port "$1" --conf models structdiff_seg_cal --conf zoo_source local --conf sam2 false \
        >"$work/server.log" 2>&1 &
    server=$!
    set +m
    for _ in $(seq 180); do
        if "$python" -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$1/info/')" 2>/dev/null; then return; fi
        kill -0 "$server" 2>/dev/null || break
        sleep 1
    done
    tail -n 30 "$work/server.log" >&2
    echo "ci/monailabel.sh: the server does not answer; its last words are above, all of them in $work/server.log" >&2
    exit 1
}

say "1/4 MONAI Label: $venv"
install_monailabel

say "2/4 the bundle in the monaibundle app: $bundle"
rm -rf "$work/apps" "$work/studies"
mkdir -p "$work/studies"
cd "$work" # away from the repository, so that the bundle's own custom/ is used
"$python" -m monailabel.main apps --download --name monaibundle --output "$work/apps"
mkdir -p "$(dirname "$bundle")"
cp -r "$root/bundles/structdiff_seg_cal" "$bundle"
cp -r "$root/custom" "$bundle/custom"

say "3/4 phantoms"
PYTHONPATH="$bundle" "$python" -m custom.phantom make --output_dir "$work/phantoms" --subjects 4 --seed 3 \
    --shape 64,64,64 --spacing_mm 2.25 --validation_fraction 0.25 --test_fraction 0.25
[ -z "$weights" ] || cp "$weights" "$bundle/models/model.pt"

port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
say "4/4 server: http://127.0.0.1:$port, log in $work/server.log"
start_server "$port"
if ! "$python" "$root/ci/monailabel_check.py" "http://127.0.0.1:$port" "$work/phantoms" "$bundle/models/model.pt" \
    "$configs/metadata.json" "$work/server.log"; then
    tail -n 15 "$work/server.log" >&2
    echo "ci/monailabel.sh: a check failed, it stands above the server's last words; all of them in $work/server.log" >&2
    exit 1
fi
