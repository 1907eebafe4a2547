"""A stand-in for a later transformers: `pytest -p later_transformers` makes `generate` call the cache `memory`."""

import re
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader

RENAMED = "transformers.generation.utils"


class _Renaming(SourceFileLoader):
    def get_code(self, fullname):
        source = self.get_data(self.path).decode("utf-8")
        return compile(re.sub(r"\bcache\b", "memory", source), self.path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname != RENAMED:
            return None
        spec = PathFinder.find_spec(fullname, path)
        spec.loader = _Renaming(fullname, spec.origin)
        return spec


assert RENAMED not in sys.modules, "transformers was imported before its stand-in"
sys.meta_path.insert(0, _Finder())
