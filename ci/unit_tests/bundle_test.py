"""What the unit tests of all bundles share: data, and a way to run an entry point. As in the model zoo's own tree, a
bundle lies in `models/NAME` below the folder that the tests are started in."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from monai.bundle import ConfigWorkflow


class BundleTest(unittest.TestCase):
    """Runs entry points of the bundle `name` on four phantoms.

    Tests run in the order of their names; each may need what the ones before it wrote.
    """

    name: str

    @classmethod
    def setUpClass(cls) -> None:
        """Make data once for all tests of a class; the bundle's own `custom` makes them."""
        cls.root = Path("models", cls.name).resolve()
        sys.path.insert(0, str(cls.root))
        from bundle_cases import entries, make_data

        scratch = tempfile.TemporaryDirectory()
        cls.addClassCleanup(scratch.cleanup)
        cls.folder = Path(scratch.name)
        cls.entries = entries(cls.name, cls.folder)
        make_data(cls.folder)

    def written(self, name: str) -> None:
        """Assert that an entry point left its files."""
        for file in self.entries[name].writes:
            assert (self.folder / file).is_file(), f"{file} was not written"

    def run_entry(self, name: str) -> None:
        """Initialise, check the properties, run and finalise a workflow, as the model zoo does."""
        entry = self.entries[name]
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
        self.written(name)

    def run_distributed(self, name: str) -> None:
        """Run an entry point in two processes; without GPUs they talk over gloo."""
        entry = self.entries[name]
        configs = [str(self.root / "configs" / file) for file in entry.configs]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle", "run"]
        command = [
            sys.executable,
            *launch,
            entry.run_id,
            "--config_file",
            str(configs),
            "--bundle_root",
            str(self.root),
        ]
        command += [f"--{key}={value}" for key, value in entry.options.items()]
        environment = {**os.environ, "PYTHONPATH": str(self.root)}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        self.written(name)
