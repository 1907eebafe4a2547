"""The oldest release of transformers that this package runs with; an older one, which lacks names, is refused."""

import transformers
from packaging.version import Version

OLDEST_TRANSFORMERS = "5.24.0"

if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
    raise ImportError(
        f"TTT-E2E needs transformers {OLDEST_TRANSFORMERS} or later, and this is {transformers.__version__}: "
        f'pip install "transformers>={OLDEST_TRANSFORMERS}"'
    )
