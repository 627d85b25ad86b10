"""The multi-GPU config of `structdiff_cardiac` in two processes."""

import unittest

from bundle_test import BundleTest


class TestStructDiffCardiacDist(BundleTest):
    """Training shared by two processes."""

    name = "structdiff_cardiac"

    def test_multi_gpu_train_config(self) -> None:
        """Two processes train one set of weights."""
        self.run_distributed("multi_gpu_train")


if __name__ == "__main__":
    unittest.main()
