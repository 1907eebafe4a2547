"""Packaging of ttt-e2e: one distribution, one import name.

The folders of the repository are mapped below the name `ttt_e2e`, so that `import ttt_e2e` is the model package
`modeling_ttt_e2e/` (which is also what a Hub folder contains) and `ttt_e2e.training` is `training/`.
"""

import re
from pathlib import Path

from setuptools import setup

PACKAGE_FOLDERS = {
    "ttt_e2e": "modeling_ttt_e2e",
    "ttt_e2e.configuration": "configuration",
    "ttt_e2e.storage": "storage",
    "ttt_e2e.data": "data",
    "ttt_e2e.loading": "loading",
    "ttt_e2e.conversion": "conversion",
    "ttt_e2e.training": "training",
    "ttt_e2e.evaluation": "evaluation",
    "ttt_e2e.model_cards": "model_cards",
    "ttt_e2e.cli": "cli",
    # The same files once more, for the console script: what lies below `ttt_e2e` brings the models, and so torch.
    "ttt_e2e_cli": "cli",
    "ttt_e2e.serving": "serving",
    "ttt_e2e.app": "app",
    "ttt_e2e.benchmarks": "benchmarks",
}

# An upper bound stands at the next minor version of a package of which more is used than it documents.
PEFT = "peft<0.22"
# The page.
APP = "gradio<7"
# The site of `make docs`; mkdocs 2 drops the plugins that it is built with.
DOCS = ["mkdocs<2", "mkdocs-material", "mkdocstrings[python]"]
# The server: transformers' own, and what `/metrics` is written with.
SERVE = ["transformers[serving]", "prometheus-client"]
# Kernels of a GPU, which a CUDA build of torch brings; tests run them on the CPU.
TRITON = "triton; sys_platform == 'linux'"
# What `make types`, `make release` and the notebook run.
TOOLS = ["build", "ipykernel", "mypy", "nbclient", "nbformat", "twine"]

FACE = Path(__file__).with_name("modeling_ttt_e2e") / "__init__.py"
VERSION = re.search(r'^__version__ = "(.+)"', FACE.read_text(encoding="utf-8"), re.MULTILINE).group(1)

setup(
    name="ttt-e2e",
    version=VERSION,
    description="End-to-End Test-Time Training (TTT-E2E) for Hugging Face Transformers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The ttt-e2e authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=list(PACKAGE_FOLDERS),
    package_dir=PACKAGE_FOLDERS,
    package_data={
        "ttt_e2e.app": ["*.css"],
        "ttt_e2e.configuration": ["*.yaml", "recipes/*.yaml", "experiments/*.yaml"],
        "ttt_e2e.benchmarks": ["*.yaml", "results/*.json"],
        "ttt_e2e.data": ["*.yaml"],
        "ttt_e2e.evaluation": ["metrics/*/*.py", "harness/*"],
        "ttt_e2e.model_cards": ["*.md"],
    },
    entry_points={"console_scripts": ["ttt-e2e = ttt_e2e_cli.main:app"]},
    install_requires=[
        "torch",
        "transformers>=5.24,<5.25",
        "accelerate",
        "datasets<5.3",
        "evaluate",
        "filelock",
        "fsspec",
        "huggingface_hub",
        "jinja2",
        "numpy",
        "packaging",
        "pyarrow",
        "safetensors",
        "tokenizers",
        "rich",
        "tqdm",
        "typer",
        "pyyaml",
        "matplotlib",
    ],
    extras_require={
        "dev": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "tensorstore",
            "gguf",
            PEFT,
            TRITON,
            "trl",
            "openai",
            "playwright",
            APP,
            *SERVE,
            *DOCS,
            *TOOLS,
        ],
        "app": [APP],
        "docs": DOCS,
        "evaluation": ["lm_eval<0.5"],
        "flash": ["flash-attn"],
        "gguf": ["gguf"],
        "jax": ["tensorstore", "gcsfs"],
        "peft": [PEFT],
        "ray": ["ray[data]"],
        "serve": SERVE,
        "triton": [TRITON],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
