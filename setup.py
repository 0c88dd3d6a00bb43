"""Installs ``flagai_altdiff``, FlagAI's import names for it, and the embedded model."""

import os
from pathlib import Path

from setuptools import find_packages, setup

packages = find_packages(include=["flagai_altdiff", "flagai_altdiff.*"], exclude=["flagai_altdiff._shim*"])
package_dir = {"flagai_altdiff.checkpoints": "checkpoints"}
packages.append("flagai_altdiff.checkpoints")
# FLAGAI_ALTDIFF_NO_SHIM=1 leaves out the `flagai` names, for environments that keep the real FlagAI.
if os.environ.get("FLAGAI_ALTDIFF_NO_SHIM") != "1":
    packages += find_packages("flagai_altdiff/_shim")
    package_dir["flagai"] = "flagai_altdiff/_shim/flagai"

_WEB = [
    "fastapi>=0.115",
    "fastapi-offline>=1.7",  # its documentation loads nothing from other hosts
    "uvicorn>=0.34",
    "python-multipart>=0.0.20",
    "prometheus-client>=0.21",
    "gradio>=6.7",
]

setup(
    name="flagai-altdiff",
    version="0.1.0",
    description="AltDiffusion: multilingual text to image, a drop-in home for FlagAI's scripts and checkpoints",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=packages,
    package_dir=package_dir,
    package_data={
        "flagai_altdiff": ["py.typed", "mini/*.safetensors", "web/page/page.css", "web/page/page.js"],
        "flagai_altdiff.checkpoints": ["AltDiffusion-mini/*", "AltCLIP-mini/*"],
    },
    install_requires=[
        "torch>=2.8",
        "transformers>=5.0",
        "pytorch-lightning>=2.5",
        "pydantic>=2.10",
        "omegaconf>=2.3",  # what scripts of LDM's kind read configs with, and hand over
        "einops>=0.8",
        "pillow>=11",
        "tqdm>=4.66",
        "requests>=2.32.2",
        "urllib3>=2.3",
        "filelock>=4.2",
        "numpy>=1.26,<2.4",  # float(array([x])), as FlagAI's scripts write it, is an error from 2.4 on
        "pyyaml>=6",
        "safetensors>=0.5",
        "sentencepiece>=0.2.3",
        "protobuf>=5",
        "tokenizers>=0.22",
    ],
    extras_require={
        "parquet": ["pyarrow>=18"],
        "things": ["resvg-py>=0.5"],
        "tensorboard": ["tensorboardX>=2.6"],
        "openvino": ["openvino>=2025.0"],
        "web": _WEB,
        "ray": ["ray[serve]>=2.40"],
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "diffusers>=0.42",
            "peft>=0.19",
            "pyarrow>=18",
            "resvg-py>=0.5",
            "webdataset>=1.0",
            "tensorboardX>=2.6",
            "openvino>=2025.0",
            "torchsde>=0.2.6",  # what diffusers draws the noise of its SDE samplers with
            *_WEB,
            "openai>=2",  # the clients that the server is tested with
            "webuiapi>=0.9",
            "psutil>=6",
            "types-psutil",
            "ruff",
            "mypy",
            "types-requests",
            "types-tqdm",
            "types-PyYAML",
            "types-protobuf",
        ],
        "bench": ["openvino>=2025.0", "diffusers>=0.42", "accelerate>=1"],
        "browser": ["playwright>=1.50", "axe-playwright-python>=0.1.4"],
        "build": ["build"],
    },
    entry_points={"console_scripts": ["altdiff = flagai_altdiff.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Multimedia :: Graphics",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
