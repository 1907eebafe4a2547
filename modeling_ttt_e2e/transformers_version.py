"""Importing this module checks the version of transformers, before anything that an older one lacks is asked for."""

import transformers
from packaging.version import Version

OLDEST_TRANSFORMERS = "5.24.0"

if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
    raise ImportError(
        f"TTT-E2E needs transformers {OLDEST_TRANSFORMERS} or later, and this is {transformers.__version__}: "
        f'pip install "transformers>={OLDEST_TRANSFORMERS}"'
    )
