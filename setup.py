"""Packaging of fastssl. The distribution is `fastssl-pretrain`: the name `fastssl` on PyPI is a TLS-certificate SDK."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "fastssl/__init__.py").read_text("utf-8"), re.MULTILINE)[1]

# Top-level folders that are imported as fastssl.<name>. In a clone the relative links fastssl/<name> -> ../<name> do
# that for `python -m` and editable installs; an sdist or a wheel cannot hold links and needs this map.
# kernels/ and data_prep/ must not get an __init__.py: a root package `kernels` would hide Hugging Face's.
LINKED = {f"fastssl.{name}": name for name in ("kernels", "data_prep", "recipes") if (ROOT / name).is_dir()}
OWN = find_namespace_packages(
    include=["fastssl", "fastssl.*"],
    exclude=["*.__pycache__", *LINKED, *(f"{name}.*" for name in LINKED)],
)

REQUIRES = [
    "torch>=2.6",  # training, compile, DDP
    "torchvision>=0.21",  # ResNets, JPEG decoding
    "triton; platform_system == 'Linux'",  # fused GPU kernels
    "numpy>=1.26",  # arrays, order files
    "pillow>=11.2",  # decode any image
    "llvmlite>=0.46",  # the loop around libjpeg-turbo
    "numba>=0.63",  # compiled CPU loops; the first beside that llvmlite
    "tyro>=1.0.13",  # flags from dataclasses; older ones misread `--`
    "PyYAML>=6",  # recipes
    "tqdm>=4.70",  # progress bars; older ones trip over signals
    "tensorboard>=2.14",  # event files
    "matplotlib>=3.8",  # curves and plots
    "scikit-learn>=1.3",  # t-SNE, reference k-NN
    "safetensors>=0.4",  # weights without pickle
    "timm>=1.0.15",  # exact architecture variants
]
EXTRAS = {
    "ffcv": ["ffcv>=1.0.2"],  # only for comparisons; its build needs pkg-config, libturbojpeg and OpenCV 4
    "dali": ["nvidia-dali-cuda120"],
    "dali-cuda13": ["nvidia-dali-cuda130"],
    # NumPy 2.4 turns no array of one number into an index, as the kernels' interpreter of Triton 3.6 asks it to
    "test": ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "ruff==0.17.6", "setuptools>=70.1", "numpy<2.4"],
}
EXTRAS["all"] = [requirement for name in ("ffcv", "dali", "test") for requirement in EXTRAS[name]]

setup(
    name="fastssl-pretrain",
    version=VERSION,
    description="High-throughput self-supervised pretraining (MoCo, alignment + uniformity) of small image encoders",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.15",
    packages=sorted({*OWN, *LINKED}),
    package_dir=LINKED,
    package_data={"fastssl.data_prep": ["*.txt"], "fastssl.recipes": ["*.yaml", "slurm/*"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["fastssl = fastssl.cli:main"]},
)
