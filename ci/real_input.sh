#!/usr/bin/env bash
# Makes a synthetic set from one annotated CT alone, without any training: its own mask deformed, rendered by the shipped
# weights in its own appearance. Then measures renderings of that mask, and of another anatomy, against the scan.
#
#   bash ci/real_input.sh DATA_DIR [OUTPUT_DIR]
#
# DATA_DIR must hold real_cta/image.nii.gz (CT in HU) and real_cta/label_derived.nii.gz (label map on its grid). The
# mask of another anatomy, visible_human_heart_F/label_1mm.nii.gz, is rendered as well where there is one.
# OUTPUT_DIR is runs/real_input when absent. Started again it goes on where it stopped.
# The shipped weights have seen phantoms only.
set -euo pipefail
usage="usage: bash ci/real_input.sh DATA_DIR [OUTPUT_DIR]"
if [ "$#" -lt 1 ] || [ "$#" -gt 2 ]; then
    echo "$usage" >&2
    exit 2
fi
if [ ! -d "$1" ]; then
    echo "ci/real_input.sh: DATA_DIR '$1' is not a folder; $usage" >&2
    exit 1
fi
data="$(cd "$1" && pwd)"
for file in real_cta/image.nii.gz real_cta/label_derived.nii.gz; do
    if [ ! -f "$data/$file" ]; then
        echo "ci/real_input.sh: $data/$file is missing; DATA_DIR must hold the image-mask pair in real_cta/" >&2
        exit 1
    fi
done
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
mkdir -p "${2:-$root/runs/real_input}"
output="$(cd "${2:-$root/runs/real_input}" && pwd)"
cd "$root"
export OMP_WAIT_POLICY=passive
bash ci/setup.sh

python="$root/.venv/bin/python"
bundle="$root/bundles/structdiff_cardiac"

"$python" - "$data" "$output/one_case.json" <<'END'
import json, pathlib, sys

data, target = map(pathlib.Path, sys.argv[1:])
pair = {"image": str(data / "real_cta/image.nii.gz"), "label": str(data / "real_cta/label_derived.nii.gz")}
target.write_text(json.dumps({"training": [pair]}, indent=1) + "\n")
END

"$python" -m monai.bundle run generating --config_file "$bundle/configs/generate_masks.json" \
    --logging_file "$bundle/configs/logging.conf" --bundle_root "$bundle" \
    --reference_datalist "$output/one_case.json" --output_dir "$output/masks" --count 4

"$python" -m monai.bundle run synthesizing --bundle_root "$bundle" --logging_file "$bundle/configs/logging.conf" \
    --config_file "['$bundle/configs/inference.json','$bundle/configs/synthesize.json']" \
    --mask_datalist "$output/masks/datalist.json" --template_datalist "$output/one_case.json" \
    --output_dir "$output/synthetic"

"$python" benchmarks/real_input.py --data_dir "$data" --ckpt_dir "$bundle/models" --work_dir "$output"
