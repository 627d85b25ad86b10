#!/usr/bin/env bash
# The whole pipeline on a CPU: phantoms, the shipped generator trained on with them, its evaluation, rendering, new masks,
# images of them with a confidence for every voxel, a segmenter pre-trained on these and fine-tuned on two cases beside
# one without pre-training, and one report. All under runs/demo.
# Started again it goes on where it stopped; what is finished is kept. Delete runs/demo to begin anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root="$PWD"
export OMP_WAIT_POLICY=passive
bash ci/setup.sh

python="$root/.venv/bin/python"
configs="$root/bundles/structdiff_cardiac/configs"
segmenter="$root/bundles/structdiff_seg_cal/configs"
demo="$root/runs/demo"
phantoms="$demo/phantoms"

say() { printf '\n== %s\n' "$*"; }

generator_run() { bundle_run "$@" --bundle_root "$root/bundles/structdiff_cardiac"; }

segmenter_run() { bundle_run "$@" --bundle_root "$root/bundles/structdiff_seg_cal"; }

bundle_run() { # bundle_run ENTRY CONFIG_LIST [--key value ...]
    local entry="$1" files="$2"
    shift 2
    "$python" -m monai.bundle run "$entry" --config_file "$files" --logging_file "$configs/logging.conf" "$@"
}

case_of() { # case_of FOLDER SUBJECT
    printf '%s/%s/subject_%03d.nii.gz' "$phantoms" "$1" "$2"
}

say "1/9 twenty phantoms: $phantoms"
"$python" -m custom.phantom make --output_dir "$phantoms" --subjects 20 --seed 0 \
    --shape 64,64,64 --spacing_mm 2.25 --workers 2

say "2/9 training on from the shipped weights: $demo/training"
generator_run training "['$configs/train.json','$configs/preset_demo.json']" \
    --pretrained "$root/bundles/structdiff_cardiac/models/model.pt" --moments_epochs 0 --learning_rate 0.0005 \
    --max_epochs 6 --val_interval 6 \
    --dataset_dir "$phantoms" --output_dir "$demo/training" --ckpt_dir "$demo/models"

say "3/9 evaluation on the test cases: $demo/evaluation"
generator_run evaluating "['$configs/train.json','$configs/preset_demo.json','$configs/evaluate.json']" \
    --dataset_dir "$phantoms" --output_dir "$demo/evaluation" --ckpt_dir "$demo/models"

say "4/9 three unseen masks in the appearance of two templates: $demo/rendered"
masks="['$(case_of labels 17)','$(case_of labels 18)','$(case_of labels 19)']"
templates="[{'image':'$(case_of images 0)','label':'$(case_of labels 0)'},{'image':'$(case_of images 1)','label':'$(case_of labels 1)'}]"
generator_run run "['$configs/inference.json','$configs/preset_demo.json']" \
    --target_masks "$masks" --templates "$templates" --output_dir "$demo/rendered" --ckpt_dir "$demo/models"

say "5/9 eight new anatomies from four references: $demo/masks"
"$python" - "$phantoms/datalist.json" "$demo" <<'END'
import json, pathlib, sys

cohort, target = map(pathlib.Path, sys.argv[1:])
content = json.loads(cohort.read_text())
items = {
    section: [{key: str(cohort.parent / case[key]) for key in ("image", "label")} for case in content[section]]
    for section in ("training", "validation", "test")
}
for name, count in (("references.json", 4), ("few.json", 2)):
    (target / name).write_text(json.dumps({**items, "training": items["training"][:count]}, indent=1) + "\n")
END
generator_run generating "$configs/generate_masks.json" \
    --reference_datalist "$demo/references.json" --count 8 --workers 2 --output_dir "$demo/masks"

say "6/9 an image of each with confidence: $demo/synthetic"
synthesis="'$configs/inference.json','$configs/preset_demo.json','$configs/synthesize.json'"
options=(--template_datalist "$phantoms/datalist.json" --ckpt_dir "$demo/models")
[ -f "$demo/models/confidence.json" ] ||
    generator_run calibrating "[$synthesis,'$configs/calibrate.json']" "${options[@]}"
generator_run synthesizing "[$synthesis]" "${options[@]}" --mask_datalist "$demo/masks/datalist.json" \
    --output_dir "$demo/synthetic"
generator_run measuring "[$synthesis,'$configs/measure_set.json']" "${options[@]}" --output_dir "$demo/synthetic"

# Both segmenters take the same number of steps. The generator has seen more phantoms than the two: what this shows is that
# everything works; benchmarks/downstream.py is the fair comparison.
train="'$segmenter/train.json','$segmenter/preset_demo.json'"
few="['$demo/few.json']"
finished() { [ -f "$demo/$1/models/$2" ] && [ ! -f "$demo/$1/$3/resume.pt" ]; }

say "7/9 a segmenter pre-trained on the synthetic set, weighted by confidence: $demo/cal"
finished cal pretrained.pt pretraining ||
    segmenter_run pretraining "[$train,'$segmenter/pretrain.json']" \
        --synthetic_datalists "['$demo/synthetic/datalist.json']" --real_datalists "$few" --datalists "$few" \
        --max_epochs 20 --warmup_epochs 4 --ramp_epochs 6 --val_interval 10 \
        --output_dir "$demo/cal/pretraining" --ckpt_dir "$demo/cal/models"

say "8/9 fine-tuning on two cases, and the same network without pre-training: $demo/cal, $demo/real_only"
finished cal model.pt training ||
    segmenter_run training "[$train]" --datalists "$few" --max_epochs 10 --val_interval 5 --learning_rate 0.002 \
        --output_dir "$demo/cal/training" --ckpt_dir "$demo/cal/models"
finished real_only model.pt training ||
    segmenter_run training "[$train]" --datalists "$few" --max_epochs 30 --val_interval 10 \
        --output_dir "$demo/real_only/training" --ckpt_dir "$demo/real_only/models"

say "9/9 both on the test cases, and the report: $demo/synthetic/report.html"
for name in real_only cal; do
    segmenter_run evaluating "[$train,'$segmenter/evaluate.json']" --datalists "$few" \
        --output_dir "$demo/$name/evaluation" --ckpt_dir "$demo/$name/models"
done
generator_run reporting "[$synthesis]" --output_dir "$demo/synthetic" \
    --evaluations "{'two real cases only':'$demo/real_only/evaluation','CAL, then two real cases':'$demo/cal/evaluation'}"

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
  segmenters on the test cases  $demo/cal/evaluation, $demo/real_only/evaluation: labels.csv, pictures
  report of set and segmenters  $demo/synthetic/report.html
  the set against real ones     $demo/synthetic/set_metrics.json
END
