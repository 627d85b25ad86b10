#!/usr/bin/env bash
# From nothing to a synthetic data set on a CPU: phantoms, training, evaluation, rendering, new masks, and images of them
# with a confidence for every voxel, all under runs/demo.
# Started again it goes on where it stopped; what is finished is kept. Delete runs/demo to begin anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root="$PWD"
export OMP_WAIT_POLICY=passive
bash ci/setup.sh

python="$root/.venv/bin/python"
bundle="$root/bundles/structdiff_cardiac"
configs="$bundle/configs"
demo="$root/runs/demo"
phantoms="$demo/phantoms"

say() { printf '\n== %s\n' "$*"; }

bundle_run() { # bundle_run ENTRY CONFIG_LIST [--key value ...]
    local entry="$1" files="$2"
    shift 2
    "$python" -m monai.bundle run "$entry" --config_file "$files" --meta_file "$configs/metadata.json" \
        --logging_file "$configs/logging.conf" --bundle_root "$bundle" "$@"
}

case_of() { # case_of FOLDER SUBJECT
    printf '%s/%s/subject_%03d.nii.gz' "$phantoms" "$1" "$2"
}

say "1/6 twenty phantoms: $phantoms"
"$python" -m custom.phantom make --output_dir "$phantoms" --subjects 20 --seed 0 \
    --shape 64,64,64 --spacing_mm 2.25 --workers 2

say "2/6 training: $demo/training"
bundle_run training "['$configs/train.json','$configs/preset_demo.json']" \
    --dataset_dir "$phantoms" --output_dir "$demo/training" --ckpt_dir "$demo/models"

say "3/6 evaluation on the test cases: $demo/evaluation"
bundle_run evaluating "['$configs/train.json','$configs/preset_demo.json','$configs/evaluate.json']" \
    --dataset_dir "$phantoms" --output_dir "$demo/evaluation" --ckpt_dir "$demo/models"

say "4/6 three unseen masks in the appearance of two templates: $demo/rendered"
masks="['$(case_of labels 17)','$(case_of labels 18)','$(case_of labels 19)']"
templates="[{'image':'$(case_of images 0)','label':'$(case_of labels 0)'},{'image':'$(case_of images 1)','label':'$(case_of labels 1)'}]"
bundle_run run "['$configs/inference.json','$configs/preset_demo.json']" \
    --target_masks "$masks" --templates "$templates" --output_dir "$demo/rendered" --ckpt_dir "$demo/models"

say "5/6 eight new anatomies from four references: $demo/masks"
"$python" - "$phantoms/datalist.json" "$demo/references.json" <<'END'
import json, pathlib, sys

cohort, target = map(pathlib.Path, sys.argv[1:])
cases = json.loads(cohort.read_text())["training"][:4]
items = [{key: str(cohort.parent / case[key]) for key in ("image", "label")} for case in cases]
target.write_text(json.dumps({"training": items}, indent=1) + "\n")
END
bundle_run generating "$configs/generate_masks.json" \
    --reference_datalist "$demo/references.json" --count 8 --workers 2 --output_dir "$demo/masks"

say "6/6 an image of each with confidence: $demo/synthetic"
synthesis="'$configs/inference.json','$configs/preset_demo.json','$configs/synthesize.json'"
options=(--template_datalist "$phantoms/datalist.json" --ckpt_dir "$demo/models")
[ -f "$demo/models/confidence.json" ] ||
    bundle_run calibrating "[$synthesis,'$configs/calibrate.json']" "${options[@]}"
bundle_run synthesizing "[$synthesis]" "${options[@]}" --mask_datalist "$demo/masks/datalist.json" \
    --output_dir "$demo/synthetic"
bundle_run measuring "[$synthesis,'$configs/measure_set.json']" "${options[@]}" --output_dir "$demo/synthetic"

cat <<END

Done. Where to look:
  rendered volumes (NIfTI, HU)  $demo/rendered/subject_017_from_subject_000.nii.gz and five more
  their masks                   $phantoms/labels/subject_017.nii.gz ...
  pictures of the renderings    $demo/rendered/pictures
  true against rendered         $demo/evaluation/pictures
  measures on the test cases    $demo/evaluation/metrics.json
  training: measures, pictures  $demo/training/metrics.csv, $demo/training/previews
  new masks, their pictures     $demo/masks/masks, $demo/masks/pictures/masks.png, $demo/masks/summary.csv
  images, labels, confidence    $demo/synthetic/datalist.json; what the gate kept apart: $demo/synthetic/rejected
  report of that data set       $demo/synthetic/report.html
  the set against real ones     $demo/synthetic/set_metrics.json
END
