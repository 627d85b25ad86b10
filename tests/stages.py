"""Every stage of both bundles as a user starts it, on the smallest phantoms: whole, killed, or on a disk that fails.

Commands run in processes forked from one that has imported everything: a kill then falls into the work itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import BUNDLE, ROOT, SEG_BUNDLE, TINY, TINY_TRAINING

_STARTER = '''
import builtins, contextlib, ctypes, errno, io, json, os, re, resource, runpy, select, signal, sys, time
import custom.confidence, custom.diffusion, custom.evaluation, custom.masks, custom.runs, custom.segmentation
import custom.synthesis, custom.volumes, matplotlib.figure, mlflow.store.tracking.sqlalchemy_store, monai.bundle
import monai.networks.nets, torch._dynamo
sys.path.append("tests")
from stages import saved_files
torch.set_num_threads(1)


def fail(folder, number, code):
    """Fails from the `number`-th file on that is opened to be written below a folder; 0 fails nothing. The count."""
    opened, real = [], builtins.open

    def open_or_fail(file, mode="r", *more, **named):
        name = os.fspath(file) if not isinstance(file, int) else ""
        if set(mode) & set("wxa") and isinstance(name, str) and os.path.abspath(name).startswith(folder):
            opened.append(name)
            if 0 < number <= len(opened):
                if code == errno.ENOSPC and "w" in mode:
                    with real(name, "w") as half:
                        half.write("half")
                raise OSError(code, os.strerror(code), name)
        return real(file, mode, *more, **named)

    builtins.open = io.open = open_or_fail
    return opened


def child(job):
    if "most_bytes" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["most_bytes"], resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    if job.get("bound_by_modes"):  # root without capabilities is: _LINUX_CAPABILITY_VERSION_3, and no sets
        assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0
    opened = fail(job["folder"], job.get("failing_write", 0), job.get("code", 0))
    sys.argv = ["", *job["arguments"]]
    try:
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, f"\\nwrites {len(opened)}".encode())
    os._exit(code)


def used_s(process):
    """Processor time so far, without that of its children."""
    with open(f"/proc/{process}/stat") as file:
        ticks = file.read().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def watch(process, job, output):
    """What a process says until it has ended, and how often it saved a file; it is killed when the job says so."""
    said, saves = b"", set()
    while True:
        if select.select([output], [], [], 0.005)[0]:
            part = os.read(output, 1 << 16)
            if not part:
                return said.decode(errors="replace"), len(saves)
            said += part
        with contextlib.suppress(FileNotFoundError):  # of what is removed meanwhile
            saves.update((path, path.stat().st_mtime_ns) for path in saved_files(job["folder"]))
        if len(saves) >= job.get("kill_after_saves", 1e9) or used_s(process) >= job.get("kill_after_s", 1e9):
            os.kill(process, signal.SIGKILL)


print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
        child(job)
    os.close(write)
    text, saves = watch(process, job, read)
    os.close(read)
    _, status, used = os.wait4(process, 0)
    writes = re.search(r"\\nwrites (\\d+)$", text)
    print(json.dumps({
        "code": os.waitstatus_to_exitcode(status),
        "said": text[: writes.start()] if writes else text,
        "writes": int(writes[1]) if writes else 0,
        "saves": saves,
        "cpu_s": used.ru_utime + used.ru_stime,
    }), flush=True)
'''


@dataclass
class Result:
    """What a process came to.

    Exit code (negative: the signal), output, files it opened to write, how often it saved a file, processor time.
    """

    code: int
    said: str
    writes: int
    saves: int
    cpu_s: float


@dataclass
class Stage:
    """One command: its configs and options; `{whole}` and `{out}` in texts: the folders of all stages and of this."""

    bundle: Path
    configs: Sequence[str]
    run_id: str
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self, places: dict[str, str]) -> list[str]:
        """Of `python -m monai.bundle`."""
        files = [name if "/" in name else str(self.bundle / "configs" / name) for name in self.configs]
        options = {"config_file": [file.format(**places) for file in files], "bundle_root": str(self.bundle)}
        given = {**options, "output_dir": "{out}", **self.options}
        meta = ["--meta_file", str(self.bundle / "configs/metadata.json")]
        return ["run", self.run_id, *meta, *(f"--{k}={_filled(v, places)}" for k, v in given.items())]


def _filled(value: Any, places: dict[str, str]) -> Any:
    if isinstance(value, str):
        return value.format(**places)
    if isinstance(value, list):
        return [_filled(v, places) for v in value]
    return {k: _filled(v, places) for k, v in value.items()} if isinstance(value, dict) else value


_SYNTHESIS = ("inference.json", "synthesize.json")
_SAMPLING = {**TINY, "sampling_steps": 2, "ckpt_dir": "{whole}/generator/models", "dataset_dir": "{cohort}"}
_OF_SET = {**_SAMPLING, "mask_datalist": "{whole}/masks/datalist.json"}
_SEGMENTER = {
    "spacing_mm": [4.0, 4.0, 4.0],
    "network_def#blocks_down": [1, 1],
    "network_def#blocks_up": [1],
    "roi_size": [16, 16, 16],
}
_SEGMENTER_TRAINING = {
    **_SEGMENTER,
    "roi_margin": 8,
    "samples_per_epoch": 4,
    "max_epochs": 4,
    "val_interval": 1,
    "dataset_dir": "{cohort}",
}
STAGES = {
    "masks": Stage(
        BUNDLE, ["generate_masks.json"], "generating", {"dataset_dir": "{cohort}", "count": 3, "with_image": "true"}
    ),
    "generator": Stage(
        BUNDLE,
        ["train.json"],
        "training",
        {**TINY_TRAINING, "max_epochs": 4, "dataset_dir": "{cohort}", "ckpt_dir": "{out}/models"},
    ),
    "generator_evaluation": Stage(BUNDLE, ["train.json", "evaluate.json"], "evaluating", _SAMPLING),
    "rendering": Stage(
        BUNDLE,
        ["inference.json"],
        "run",
        {
            **_SAMPLING,
            "target_masks": ["{cohort}/labels/subject_002.nii.gz", "{cohort}/labels/subject_003.nii.gz"],
            "templates": [
                {"image": "{cohort}/images/subject_000.nii.gz", "label": "{cohort}/labels/subject_000.nii.gz"}
            ],
        },
    ),
    "calibrating": Stage(
        BUNDLE,
        [*_SYNTHESIS, "calibrate.json"],
        "calibrating",
        {**_SAMPLING, "confidence_table": "{out}/confidence.json"},
    ),
    "synthesizing": Stage(
        BUNDLE,
        [*_SYNTHESIS, "{whole}/all_accepted.json"],
        "synthesizing",
        {**_OF_SET, "confidence_table": "{whole}/calibrating/confidence.json"},
    ),
    "pretraining": Stage(
        SEG_BUNDLE,
        ["train.json", "pretrain.json"],
        "pretraining",
        {**_SEGMENTER_TRAINING, "synthetic_datalists": ["{whole}/synthesizing/datalist.json"], "ckpt_dir": "{out}"},
    ),
    "segmenter": Stage(
        SEG_BUNDLE,
        ["train.json"],
        "training",
        {**_SEGMENTER_TRAINING, "pretrained": "{whole}/pretraining/pretrained.pt", "ckpt_dir": "{out}/models"},
    ),
    "segmenter_evaluation": Stage(
        SEG_BUNDLE,
        ["train.json", "evaluate.json"],
        "evaluating",
        {**_SEGMENTER, "dataset_dir": "{cohort}", "ckpt_dir": "{whole}/segmenter/models"},
    ),
    "segmenting": Stage(
        SEG_BUNDLE,
        ["inference.json"],
        "run",
        {**_SEGMENTER, "dataset_dir": "{cohort}", "ckpt_dir": "{whole}/segmenter/models"},
    ),
}
"""Stages in the order in which one feeds the next."""
_ALL_ACCEPTED = {
    f"gate#{name}": None
    for name in (
        *("max_label_error_hu", "max_label_sd_ratio", "plausible_hu", "max_score_hu", "min_vessel_contrast"),
        *("min_vessel_continuity", "max_template_copy"),
    )
}


class Runs:
    """Stages run in forked processes.

    Args:
        cohort: of phantoms.
        folder: for what undisturbed runs write.
    """

    def __init__(self, cohort: Path, folder: Path) -> None:
        self.cohort, self.whole = cohort, folder
        self.results: dict[str, Result] = {}
        (folder / "all_accepted.json").write_text(json.dumps(_ALL_ACCEPTED))
        self._starter = subprocess.Popen(
            [sys.executable, "-c", _STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self._starter.stdout.readline() == "ready\n"

    def close(self) -> None:
        """End the process that others are forked from."""
        self._starter.stdin.close()
        self._starter.wait()

    def undisturbed(self, name: str) -> Result:
        """A stage run once without any failure, and before it those that feed it."""
        for stage in list(STAGES)[: list(STAGES).index(name) + 1]:
            if stage not in self.results:
                self.results[stage] = self.run(stage, self.whole / stage)
                assert self.results[stage].code == 0, self.results[stage].said[-4000:]
        return self.results[name]

    def run(self, name: str, out: Path, **failure: Any) -> Result:
        """A stage into a folder.

        Args:
            failure: `kill_after_s` of processor time, or `kill_after_saves` of files; `failing_write` and `code`: from
                which opening of a file to write on it fails, and with what; `most_bytes` that a file may have;
                `bound_by_modes`: the modes of folders hold for root, too.
        """
        places = {"whole": str(self.whole), "cohort": str(self.cohort), "out": str(out)}
        job = {"arguments": STAGES[name].arguments(places), "folder": str(out), **failure}
        self._starter.stdin.write(json.dumps(job) + "\n")
        self._starter.stdin.flush()
        return Result(**json.loads(self._starter.stdout.readline()))


def saved_files(folder: Path | str) -> list[Path]:
    """All that a run has put in place but for logs and what is hidden."""
    hidden, found = (".", "mlflow.db", "mlruns", "mlartifacts"), []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(hidden)]
        found += [Path(root) / name for name in files if not name.startswith(hidden)]
    return sorted(found)


def results(folder: Path) -> dict[str, bytes]:
    """Name -> content of :func:`saved_files`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in saved_files(folder)}
