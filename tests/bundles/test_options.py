"""Options out of range, of another type or misspelt are refused before anything is read, as the user types them."""

import copy
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from custom.checks import cause_of
from custom.runs.command_line import check_command_line
from custom.runs.options import RULES, check_options
from fire.parser import DefaultParseValue
from helpers import BUNDLE, SEG_BUNDLE, TINY, fails_with, template_of
from monai.bundle import ConfigParser

NAN = math.nan
CHAINS = {  # config files of a run, and the id of what is run
    "train": (BUNDLE, ["train.json"], "training"),
    "evaluate": (BUNDLE, ["train.json", "evaluate.json"], "evaluating"),
    "render": (BUNDLE, ["inference.json"], "run"),
    "generate": (BUNDLE, ["generate_masks.json"], "generating"),
    "synthesize": (BUNDLE, ["inference.json", "synthesize.json"], "synthesizing"),
    "report": (BUNDLE, ["inference.json", "synthesize.json"], "reporting"),
    "calibrate": (BUNDLE, ["inference.json", "synthesize.json", "calibrate.json"], "calibrating"),
    "measure": (BUNDLE, ["inference.json", "synthesize.json", "measure_set.json"], "measuring"),
    "seg_train": (SEG_BUNDLE, ["train.json"], "training"),
    "seg_pretrain": (SEG_BUNDLE, ["train.json", "pretrain.json"], "pretraining"),
    "seg_evaluate": (SEG_BUNDLE, ["train.json", "evaluate.json"], "evaluating"),
    "seg_infer": (SEG_BUNDLE, ["inference.json"], "run"),
}


@functools.cache
def default_parser(chain):
    """Of the configs as they are; not to be changed."""
    bundle, names, _ = CHAINS[chain]
    parser = ConfigParser()
    parser.read_config([str(bundle / "configs" / name) for name in names])
    parser.read_meta(str(bundle / "configs/metadata.json"))
    parser.update({"bundle_root": str(bundle), "device": "cpu"})
    return parser


def parser_of(chain, **overrides):
    parser = ConfigParser(copy.deepcopy(default_parser(chain).config))
    parser.update(overrides)
    return parser


def used_in(chain):
    """Options that the check of a chain is handed, as a user types them."""
    references = [used for used in default_parser(chain)["options"]["used"] if isinstance(used, str)]
    return [reference.removeprefix("@").replace("::", "#") for reference in references]


def default_of(chain, name):
    return default_parser(chain).get_parsed_content(name)


def wrong_values(default):
    """What no option of this kind may be: another sign, type, length; infinite, empty."""
    if isinstance(default, bool):
        return ["perhaps", 3, None]
    if isinstance(default, (int, float)):
        return [-1, "many", NAN, math.inf, [default, default], True, None]
    if isinstance(default, str):
        return ["", 7, ["a"], None]
    if isinstance(default, list):
        short = default[:-1] if len(default) != 1 else []
        return [7.5, short, [*default[:-1], "x"], [NAN] * len(default), None]
    return [7, "text", None]  # a block


FITTING = {  # of the above, what an option may be all the same
    "real_datalists": [[], ["x"]],
    "spacing_mm": [[1.5, 1.5]],  # finest and coarsest
    **dict.fromkeys(("training_datalists", "held_out_datalists", "synthetic_datalists", "datalists"), [["x"]]),
    **dict.fromkeys(("reference_datalist", "mask_datalist", "template_datalist"), [["a"]]),
    "label_shift_hu": [7.5],
    "painted_artefacts": [[]],
    "pretrained": ["text"],
    "strides": [[4, 6, 8]],
}


def fits(name, value):
    """Whether a value of `wrong_values` is not wrong for this option."""
    if name == "label_shift_hu":
        return isinstance(value, list) and value and all(isinstance(n, float) and math.isfinite(n) for n in value)
    return name == "device" or value in FITTING.get(name, [])


DEFAULTS = {name: default_of(chain, name) for chain in reversed(CHAINS) for name in used_in(chain)}
TABLE = [(name, value) for name in DEFAULTS for value in wrong_values(DEFAULTS[name]) if not fits(name, value)]
OWN = [
    ("train", "spacing_mm", [1.5, 0, 1.5]),
    ("train", "spacing_mm", [1.5, -1.5, 1.5]),
    ("train", "spacing_mm", [1.5, 0.7]),
    ("render", "window_size", [63, 64, 64]),
    ("render", "sampling_steps", 1000),
    ("render", "device", "gpu"),
    ("render", "device", "cuda:99"),
    ("render", "device", "meta"),
    ("render", "output_dir", "study ::1"),
    ("generate", "with_image", "maybe"),
    ("generate", "count", 0),
    ("train", "max_epochs", 0),
    ("train", "mode_prob", [0.5, 0.5, 0.5]),
    ("train", "mode_prob", [1.5, -0.5, 0]),
    ("train", "thin_weight", 0.5),
    ("train", "edge_weight", 0.5),
    ("train", "clip_norm", 0),
    ("train", "warmup_epochs", 1.5),
    ("train", "moments_epochs", 2.5),
    ("render", "sample_strength", 1.5),
    ("render", "grain", -0.1),
    ("render", "mode", "painting"),
    ("render", "painted_classes", 7),
    ("render", "painted_classes", 16),
    ("render", "painted_blur_mm", [0.8, 0.4]),
    ("render", "painted_blur_mm", [-0.1, 0.4]),
    ("render", "painted_grain", [0.5, 1.0, 1.5]),
    ("render", "painted_artefacts", ["plaque"]),
    ("render", "painted_artefacts", ["streaks", "streaks"]),
    ("render", "painted_artefacts", "streaks"),
    ("render", "save_structure", "yes"),
    ("synthesize", "sample_strength", -0.5),
    ("synthesize", "save_structure", 1),
    ("measure", "classifier_steps", 0),
    ("train", "label_mapping", {"from": [1], "to": [1, 2]}),
    ("train", "label_mapping", {"from": [1, 1], "to": [1, 2]}),
    ("train", "label_mapping", {"form": [1], "to": [1]}),
    ("synthesize", "method", "variance"),
    ("synthesize", "strides", [4, 4]),
    ("synthesize", "smallest_confidence", 2),
    ("calibrate", "quantile", 1),
    ("calibrate", "quantile", 0),
    ("measure", "grid", [32, 64, 64]),
    ("measure", "intensity_window_hu", [800, -200]),
    ("seg_train", "intensity_hu", [800, -200]),
    ("seg_train", "roi_size", [50, 64, 64]),
    ("seg_infer", "roi_size", [50, 64, 64]),
    ("seg_infer", "overlap", 1),
    ("seg_train", "cache_rate", 1.5),
    ("seg_pretrain", "real_share", 1),
    ("seg_pretrain", "real_share", 0),
]


def told(name, value, message):
    """The message names the option, the rule, the value and an example."""
    assert message.startswith(f"{name}: must be "), message
    assert f"got {value!r}; for example --{name} " in message, message


@pytest.mark.parametrize(("name", "value"), TABLE)
def test_an_option_of_another_kind_is_refused_by_name_rule_value_and_example(name, value):
    with pytest.raises(ValueError, match="must be") as caught:
        check_options([], resolved={name.replace("#", "::"): value})
    told(name, value, str(caught.value))


@pytest.mark.parametrize(("chain", "name", "value"), OWN)
def test_an_option_out_of_range_is_refused_by_the_config(chain, name, value):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        parser_of(chain, **{name: value}).get_parsed_content("options")
    told(name, value, cause_of(caught.value))


@pytest.mark.parametrize("chain", CHAINS)
def test_the_defaults_pass_and_the_check_comes_before_anything_is_read(chain):
    parser_of(chain).get_parsed_content("options")
    parser = parser_of(chain)
    steps = parser[CHAINS[chain][2]]
    steps = parser[steps[0].removeprefix("@")] if len(steps) == 1 else steps
    assert steps[:2] == ["@versions", "@options"]


@pytest.mark.parametrize("chain", CHAINS)
def test_every_option_has_a_rule_and_is_checked(chain):
    """As the reference of options lists them: ids at the top that are no parts and follow from nothing."""
    listed = set(used_in(chain))
    assert [name for name in listed if name not in RULES] == []
    bundle, names, _ = CHAINS[chain]
    tops = {key for name in names for key in json.loads((bundle / "configs" / name).read_text())}
    assert [name for name in RULES if name in tops and name not in listed] == []


@pytest.mark.parametrize("name", RULES)
def test_the_example_of_a_rule_keeps_it(name):
    assert RULES[name].holds(DefaultParseValue(RULES[name].example.strip('"')))


@pytest.mark.parametrize(
    ("chain", "name", "value", "message"),
    [
        ("render", "mode", "templates", "mode: must be one of"),
        ("network", "network_def#channels", [8, 12], "network_def#channels: must be multiples of norm_num_groups, 8"),
        ("network", "network_def#channels", "wide", "network_def#channels: must be a list of two or more"),
        (
            "network",
            "network_def#num_res_blocks",
            0,
            "network_def#num_res_blocks: must be a whole number of at least 1",
        ),
        ("network", "network_def#condition_channels", -4, "network_def#condition_channels: must be a whole number"),
        ("generate", "motion#coarse_mm", "far", "motion: coarse_mm must be a number"),
        ("generate", "motion#coarse_mm", NAN, "motion: coarse_mm must be a number"),
        ("generate", "motion#retries", 1.5, "motion: retries must be a whole number"),
        ("generate", "motion#shrink", 0, "motion: shrink must be in (0, 1]"),
        ("generate", "motion#coarse", 4, "motion: ['coarse'] do not exist"),
        ("generate", "edits#radius_range", 2, "edits: radius_range must be"),
        ("generate", "gate#volume_ratio", "ab", "gate: volume_ratio must be [lowest, highest]"),
        ("generate", "gate#max_dice", "high", "gate: max_dice must be a number or null"),
        ("generate", "gate#max_dice", NAN, "gate: max_dice must be a number or null"),
        ("generate", "anatomy#9#components", "two", "coronary arteries: components must be a whole number"),
        ("generate", "anatomy#9#components", 0, "coronary arteries: components must be at least 1"),
        ("generate", "anatomy#9#thin", "yes", "coronary arteries: thin must be true or false"),
        ("generate", "anatomy#9#plausible_hu", [3, "x"], "coronary arteries: plausible_hu must be [lowest, highest]"),
        ("generate", "anatomy#9#thick", True, "unknown columns ['thick']"),
    ],
)
def test_what_a_block_holds_is_refused_by_its_class(chain, name, value, message):
    parser = parser_of("render" if chain == "network" else chain, **{name: value})
    part = {"render": "appearance", "generate": "generate#transform", "network": "network_def"}[chain]
    with fails_with(message):
        parser.get_parsed_content(part)


ARGUMENTS = ["run", "training", "--bundle_root", "b", "--config_file"]
FILES = {name: str(BUNDLE / f"configs/{name}.json") for name in ("train", "evaluate", "generate_masks")}


@pytest.mark.parametrize(
    ("config", "argument", "message"),
    [
        ("train", "--max_epoch", "max_epoch: there is no such option in these configs; did you mean --max_epochs?"),
        ("train", "--train#max_epochs", "train#max_epochs: .* did you mean --max_epochs?"),
        ("train", "--train#trainr#max_epochs", "train#trainr#max_epochs: .* did you mean --train#trainer?"),
        ("train", "--spacing", "spacing: .* did you mean --spacing_mm?"),
        ("generate_masks", "--motion#corse_mm", "motion#corse_mm: .* did you mean --motion#coarse_mm?"),
        (
            "generate_masks",
            "--xyzzy",
            "xyzzy: there is no such option in these configs; there are .*reference_datalist",
        ),
    ],
)
def test_an_option_that_does_not_exist_is_refused_with_the_nearest(config, argument, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?").replace(".*", ".*")):
        check_command_line([*ARGUMENTS, FILES[config], argument, "3"])
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        check_command_line([*ARGUMENTS, FILES[config], f"{argument}=3"])
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        check_command_line([*ARGUMENTS, FILES[config], argument[1:], "3"])


@pytest.mark.parametrize(
    "more",
    [
        ["--max_epochs", "3", "--spacing_mm", "[1,1,1]"],
        [
            "--network_def#channels",
            "[8,8]",
            "--network_def#norm_num_groups",
            "4",
        ],  # arguments of a class: it knows them
        ["--anatomy#9#keep", "true"],
        ["--train#handlers#0#forget_when_done", "true", "--run_id", "training", "--logging_file", "x.conf"],
        ["--output_dir", "/somewhere/CT [2024] $5"],
        ["--loss", "$@train#trainer"],
        ["--loss", "-1", "-max_epochs", "3"],
    ],
)
def test_options_that_exist_pass(more):
    check_command_line([*ARGUMENTS, f"['{FILES['train']}','{FILES['evaluate']}']", *more])


def test_configs_are_read_from_any_folder(tmp_path):
    (tmp_path / "a, b").mkdir()
    config = tmp_path / "a, b/train.json"
    config.write_text(Path(FILES["train"]).read_text())
    for files in (str(config), f"['{config}']"):
        check_command_line([*ARGUMENTS, files, "--max_epochs", "3"])


@pytest.mark.parametrize("chain", ["seg_train", "seg_infer"])
def test_another_network_needs_no_option_of_the_usual_one(chain):
    other = {"_target_": "BasicUNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 11}
    parser_of(chain, network_def=other, roi_size=[50, 50, 50]).get_parsed_content("options")


def test_a_number_sign_in_a_path_is_refused_by_the_option(tmp_path):
    with pytest.raises(
        ValueError, match=r"output_dir: must be without #, .* got /study #1/out; rename the file or folder"
    ):
        check_command_line([*ARGUMENTS, FILES["train"], "--output_dir", "/study #1/out"])


def test_a_value_is_judged_as_it_is_typed():
    for value, message in (
        ("2024", r"output_dir: must be the name of a folder, .* got 2024; for example --output_dir ./name"),
        ("a,b", r"output_dir: must be the name of a folder, .* got \('a', 'b'\)"),
        (__file__, r"output_dir: must be the name of a folder, or of one that can be made, .*test_options.py"),
        (f"{__file__}/below", r"output_dir: must be the name of a folder, or of one that can be made, .*below"),
        ("x" * 300, r"output_dir: must be the name of a folder, or of one that can be made, .*xxx"),
        ("None", r"output_dir: must not be None here, which MONAI ignores; write null in a config file"),
    ):
        with pytest.raises(ValueError, match=message):
            check_command_line([*ARGUMENTS, FILES["train"], "--output_dir", value])


@pytest.mark.parametrize(
    ("config", "mine", "message"),
    [
        ("train", {"bundle_root": 7}, "bundle_root: must be the name of a folder, .* got 7"),
        ("train", {"dataset_dir": ["a"]}, r"dataset_dir: must be the name of a folder, .* got \['a'\]"),
        ("train", {"ckpt_dir": None}, "ckpt_dir: must be the name of a folder, .* got None"),
        ("train", {"network_def": {"condition_channels": "many"}}, "network_def#condition_channels: must be a whole"),
        ("seg_train", {"network_def#init_filters": 2.5}, "network_def#init_filters: must be a whole .* got 2.5"),
        ("seg_train", {"network_def": {"blocks_down": "deep"}}, "network_def#blocks_down: must be a list of one or"),
        (
            "seg_train",
            {"pretrained": "./nowhere.pt"},
            "pretrained: must be the name of a file of weights that is there",
        ),
    ],
)
def test_a_value_in_a_config_of_the_user_is_judged_before_anything_is_made_of_it(tmp_path, config, mine, message):
    file = SEG_BUNDLE / "configs/train.json" if config == "seg_train" else FILES[config]
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    with pytest.raises(ValueError, match=message):
        check_command_line(["run", "training", "--config_file", f"['{file}','{tmp_path}/mine.json']"])


@pytest.mark.parametrize("chain", CHAINS)
def test_what_configs_state_themselves_passes(chain):
    bundle, names, _ = CHAINS[chain]
    check_command_line([*ARGUMENTS, str([str(bundle / "configs" / name) for name in names])])


def test_a_misspelt_argument_of_a_network_is_refused_with_the_nearest():
    for name, meant in (
        ("network_def#conditon_channels", "condition_channels"),
        ("network_def#norm_num_group", "norm_num_groups"),
    ):
        with pytest.raises(ValueError, match=f"{name}: .* did you mean --network_def#{meant}"):
            check_command_line([*ARGUMENTS, FILES["train"], f"--{name}", "3"])


ODD = "CT [2024] $a_b$ {x} 'q' \"d\" é, & %s"
"""A name that the file system allows, with what globs, shells, formats, MONAI and matplotlib read in their own way."""


def test_any_folder_is_searched_for_the_files_of_a_user(tmp_path):
    for folder in ("masks", "images"):
        (tmp_path / ODD / folder).mkdir(parents=True)
        (tmp_path / ODD / folder / "one.nii.gz").touch()
    for chain, option in (("render", "target_masks"), ("seg_infer", "images")):
        found = parser_of(chain, dataset_dir=str(tmp_path / ODD)).get_parsed_content(option)
        assert [Path(file).name for file in found] == ["one.nii.gz"]


def test_a_mask_in_any_folder_and_of_any_name_is_rendered_and_pictured(workflow, cohort, weights, tmp_path):
    folder = tmp_path / ODD
    folder.mkdir()
    mask = folder / "mask $1_2$ [a].nii.gz"
    mask.write_bytes((cohort / "labels/subject_003.nii.gz").read_bytes())
    run = workflow(
        "inference.json",
        workflow_type="infer",
        target_masks=[str(mask)],
        templates=[template_of(cohort)],
        output_dir=str(folder / "out"),
        ckpt_dir=str(weights),
        device="cpu",
        sampling_steps=1,
        **TINY,
    )
    run.run()
    name = "mask $1_2$ [a]_from_subject_000"
    assert (folder / f"out/{name}.nii.gz").is_file()
    assert (folder / f"out/pictures/{name}.png").is_file()


def command(config, *more):
    bundle = BUNDLE if config != "inference" else SEG_BUNDLE
    config_file = str(bundle / f"configs/{config}.json")
    return [
        "run",
        {"train": "training", "inference": "run"}[config],
        "--bundle_root",
        str(bundle),
        "--config_file",
        config_file,
        *more,
    ]


def run_in(folder, launcher, arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BUNDLE.parents[1])}
    return subprocess.run(
        [sys.executable, "-m", *launcher, "monai.bundle", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_last_line_of_an_error_is_its_cause(tmp_path):
    out = ["--output_dir", str(tmp_path / "out"), "--dataset_dir", str(tmp_path)]
    done = run_in(tmp_path, [], command("train", *out))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"ERROR: {tmp_path}/datalist.json: datalist not found; set ")
    done = run_in(tmp_path, [], command("train", *out, "--max_epoch", "3"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("did you mean --max_epochs?")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_torchrun_quotes_the_cause(tmp_path):
    done = run_in(
        tmp_path,
        ["torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m"],
        command("train", "--output_dir", str(tmp_path / "out"), "--dataset_dir", str(tmp_path)),
    )
    assert done.returncode == 1
    summary = done.stderr.split("Root Cause")[1]
    assert f"ERROR: {tmp_path}/datalist.json: datalist not found" in summary


def test_weights_that_are_not_numbers_render_nothing(workflow, cohort, weights, tmp_path):
    state = torch.load(weights / "model.pt", weights_only=True)
    spoilt = {key: torch.full_like(value, NAN) if value.is_floating_point() else value for key, value in state.items()}
    torch.save(spoilt, tmp_path / "model.pt")
    run = workflow(
        "inference.json",
        workflow_type="infer",
        target_masks=[str(cohort / "labels/subject_003.nii.gz")],
        templates=[template_of(cohort)],
        output_dir=str(tmp_path / "out"),
        ckpt_dir=str(tmp_path),
        device="cpu",
        sampling_steps=1,
        **TINY,
    )
    with fails_with(f"{tmp_path}/model.pt: these weights are NaN or infinite"):
        run.run()
    left = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left <= {".shard_0.lock", "rendering.json"}
