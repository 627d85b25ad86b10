"""What the unit tests of all bundles share: a packed bundle, phantoms, and a way to run an entry point."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import package
from bundle_cases import Entry, entries, make_data
from monai.bundle import ConfigWorkflow
from unpacked import SCHEMA, unpack


class BundleTest(unittest.TestCase):
    """Packs the bundle `name` without weights, extracts it, and runs entry points on four phantoms.

    Tests run in the order of their names; each may need what the ones before it wrote.
    """

    name: str

    @classmethod
    def setUpClass(cls) -> None:
        """Make bundle and data once for all tests of a class."""
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        package.build(str(cls.folder / "dist"), without_weights=True)
        cls.root = unpack(cls.folder / f"dist/{cls.name}.zip", cls.folder, SCHEMA).root
        sys.path.insert(0, str(cls.root))
        make_data(cls.folder)

    def entry(self, name: str) -> Entry:
        """An entry point of the bundle."""
        return entries(self.name, self.folder)[name]

    def written(self, entry: Entry) -> None:
        """Assert that an entry point left its files."""
        for file in entry.writes:
            assert (self.folder / file).is_file(), f"{file} was not written"

    def run_entry(self, name: str) -> None:
        """Initialise, check the properties, run and finalise a workflow, as the model zoo does."""
        entry = self.entry(name)
        workflow = ConfigWorkflow(
            config_file=[str(self.root / "configs" / file) for file in entry.configs],
            meta_file=str(self.root / "configs/metadata.json"),
            logging_file=str(self.root / "configs/logging.conf"),
            workflow_type=entry.workflow_type,
            run_id=entry.run_id,
            bundle_root=str(self.root),
            **entry.options,
        )
        workflow.initialize()
        if entry.workflow_type:
            assert workflow.check_properties() == []
        workflow.run()
        workflow.finalize()
        self.written(entry)

    def run_distributed(self, name: str) -> None:
        """Run an entry point in two processes; without GPUs they talk over gloo."""
        entry = self.entry(name)
        configs = [str(self.root / "configs" / file) for file in entry.configs]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle", "run"]
        options = [f"--{key}={value}" for key, value in entry.options.items()]
        command = [
            sys.executable,
            *launch,
            entry.run_id,
            "--config_file",
            str(configs),
            "--bundle_root",
            str(self.root),
        ]
        environment = {**os.environ, "PYTHONPATH": str(self.root)}
        done = subprocess.run(
            [*command, *options], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr[-3000:]
        self.written(entry)
