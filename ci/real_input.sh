#!/usr/bin/env bash
# Trains on phantoms plus one real image-mask pair, then measures renderings of that pair.
#
#   bash ci/real_input.sh DATA_DIR [OUTPUT_DIR]
#
# DATA_DIR must hold real_cta/image.nii.gz (CT in HU) and real_cta/label_derived.nii.gz (label map on its grid). The
# mask of another anatomy, visible_human_heart_F/label_1mm.nii.gz, is rendered as well where there is one.
# OUTPUT_DIR is runs/real_input when absent. Started again it goes on where it stopped.
# The pair is trained on: what is measured is how well one known case is rendered, not how well a new one would be.
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

"$python" -m custom.phantom make --output_dir "$output/phantoms" --subjects 44 --seed 7 \
    --shape 96,96,96 --spacing_mm 1.5 --workers 2

"$python" - "$data" "$output/real.json" <<'END'
import json, pathlib, sys

data, target = map(pathlib.Path, sys.argv[1:])
pair = {"image": str(data / "real_cta/image.nii.gz"), "label": str(data / "real_cta/label_derived.nii.gz")}
target.write_text(json.dumps({"training": [pair | {"weight": 30}], "validation": [pair]}, indent=1) + "\n")
END

"$python" -m monai.bundle run training --config_file "$bundle/configs/train.json" \
    --meta_file "$bundle/configs/metadata.json" --logging_file "$bundle/configs/logging.conf" --bundle_root "$bundle" \
    --datalists "['$output/phantoms/datalist.json','$output/real.json']" \
    --output_dir "$output/training" --ckpt_dir "$output/models" \
    --max_epochs 120 --val_interval 12 --val_cases 3 --seed 1

"$python" benchmarks/real_input.py --data_dir "$data" --ckpt_dir "$output/models" --work_dir "$output"
