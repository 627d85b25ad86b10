"""Whether configs and this package belong together.

The one module beside the rooms: every version of `custom` has it here, so that a new bundle can refuse an old package
by name, and an old bundle a new one.
"""

from __future__ import annotations

from pathlib import Path

import custom


def check_version(*, needed: str) -> None:
    """Refuses configs and parts of different versions: another `custom` may lie first on the path, or in memory.

    Args:
        needed: `custom_version` of the bundle's metadata.

    Raises:
        ValueError: naming both versions and the folder that was imported.
    """
    if needed != custom.__version__:
        raise ValueError(
            f"custom: version {custom.__version__} was imported from {Path(__file__).parent}, the bundle's "
            f"metadata.json needs custom_version {needed}; use the folder custom/ that came with the bundle, start "
            "elsewhere than in a folder with another custom/, or reinstall the package"
        )
