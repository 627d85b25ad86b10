"""MONAI Label started with the weights of a study, by an interpreter that only takes down what it is asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from custom.study.bundles import SEGMENTER, find_bundles
from custom.study.serving import serve

FAKE = """#!{python}
import json, pathlib, sys
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(arguments) + "\\n")
if "apps" in arguments:
    pathlib.Path(arguments[-1], "monaibundle").mkdir(parents=True)
sys.exit({code} if "start_server" in arguments else 0)
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "studies").mkdir()
    (tmp_path / "model.pt").write_bytes(b"weights")
    return tmp_path


def fake(place, code=0):
    python = place / "python"
    python.write_text(FAKE.format(python=sys.executable, log=str(place / "log"), code=code))
    python.chmod(0o755)
    return str(python)


def start(place, python, **changed):
    options = {"weights": place / "model.pt", "studies": str(place / "studies"), **changed}
    serve(find_bundles(), python=python, app_dir=place / "app", port=8123, **options)
    return [json.loads(line) for line in (place / "log").read_text().splitlines()]


def test_the_bundle_its_package_and_the_weights_are_served_on_this_machine_alone(place):
    calls = start(place, fake(place))
    assert calls[1][:4] == ["-m", "monailabel.main", "apps", "--download"]
    server = calls[2]
    assert server[server.index("--host") + 1] == "127.0.0.1"
    assert server[server.index("--port") + 1] == "8123"
    assert server[server.index("--studies") + 1] == str(place / "studies")
    model = place / "app/monaibundle/model" / SEGMENTER
    assert (model / "models/model.pt").read_bytes() == b"weights"
    assert (model / "custom/volumes/reading.py").is_file()
    assert (model / "configs/inference.json").is_file()


def test_a_model_that_was_trained_on_there_is_kept(place):
    start(place, fake(place))
    trained = place / "app/monaibundle/model" / SEGMENTER / "models/model.pt"
    trained.write_bytes(b"trained on")
    assert sum("apps" in call for call in start(place, fake(place))) == 1
    assert trained.read_bytes() == b"trained on"


def test_what_is_missing_is_named_with_how_to_get_it(place):
    with pytest.raises(
        FileNotFoundError, match=r"MONAI Label is not installed in .*; in a clone `bash ci/monailabel.sh`"
    ):
        start(place, sys.executable)
    with pytest.raises(FileNotFoundError, match="MONAI Label is not installed"):
        start(place, "/nowhere/python")
    python = fake(place)
    with pytest.raises(FileNotFoundError, match="studies: .* is no folder"):
        start(place, python, studies=str(place / "none"))
    with pytest.raises(FileNotFoundError, match="there are no weights; run the study first"):
        start(place, python, weights=Path(place / "none.pt"))


def test_a_server_that_fails_is_an_error(place):
    with pytest.raises(RuntimeError, match="MONAI Label ended with 7"):
        start(place, fake(place, code=7))
