"""What the tests of the server share."""

import os
from pathlib import Path

import skimtvm

PACKAGE = Path(skimtvm.__file__).parent.parent


def environment():
    return {**os.environ, "PYTHONPATH": str(PACKAGE)}
