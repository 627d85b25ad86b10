"""The multi-GPU config of `structdiff_seg_cal` in two processes."""

import unittest

from bundle_test import BundleTest


class TestStructDiffSegCalDist(BundleTest):
    """Training shared by two processes."""

    name = "structdiff_seg_cal"

    def test_multi_gpu_train_config(self) -> None:
        """Two processes train one set of weights."""
        self.run_distributed("multi_gpu_train")


if __name__ == "__main__":
    unittest.main()
