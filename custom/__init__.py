"""Parts that the configs of the StructDiff bundles name."""

__version__ = "0.5.0"
"""Bundles say in `metadata.json` (`custom_version`) which one they need; `custom.checks.check_version` compares."""
