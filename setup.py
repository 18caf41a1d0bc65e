"""Packaging of hpc_neuro: metadata, dependencies and extras live here and nowhere else.

Exact versions that were tested together are in requirements.lock; the CPU build of torch is in constraints-cpu.txt.
"""

from pathlib import Path

from setuptools import find_packages, setup

RUNTIME = [
    "torch>=2.6",
    "deepspeed>=0.16,<0.20",  # its private attributes are used in hpc_neuro/train/deepspeed
    "timm>=1.0.15",
    "huggingface_hub>=0.25",
    "h5py>=3.11",
    "mpi4py>=4.0",
    "mpich>=5.0; sys_platform == 'linux'",  # the wheel that gives mpiexec where the site has no MPI module
    "numpy>=1.26",
    "wandb>=0.19,<0.32",
    "submitit>=1.5.2",
    "pydantic>=2.9",
    "PyYAML>=6",
    "safetensors>=0.4",
    "tensorstore>=0.1.70",
    "tifffile>=2024.8.10",
    "imagecodecs>=2024.6.1",
    "nibabel>=5.2",
    "pynrrd>=1.0",
    "connected-components-3d>=3.18",
    "edt>=3.0",
    "scikit-image>=0.24",
    "scipy>=1.12",
    "matplotlib>=3.8",
    "tqdm>=4.66",
]

TEST = [
    "pytest>=8",
    "pytest-xdist>=3.5",
    "pytest-timeout>=2.3",
    "hypothesis>=6.100",
    "monai>=1.4",
    "morphio>=3.3.9",
    "neurom>=4.0",
    "swcgeom>=0.19",
    "ome-zarr-models>=1.0",
    "zarr>=3.0",
    "moto>=5",  # with flask, an S3 server for the tests of remote stores
    "flask>=3",
    "flask-cors>=5",
    "nbclient>=0.10",  # runs docs/notebooks
    "ipykernel>=6.29",
    "triton>=3.0; platform_machine == 'x86_64' and sys_platform == 'linux'",  # its interpreter runs on a CPU
]

SEARCH = ["optuna>=4.4"]
TEST += SEARCH
LINT = ["ruff>=0.8", "mypy>=1.13", "pre-commit>=4", "types-PyYAML", "types-tqdm", "scipy-stubs"]

DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10"]  # mkdocs 2 has other plugins and themes

setup(
    name="hpc_neuro",
    version="0.1.0",
    description="2D vision-transformer knowledge for 3D neuron reconstruction, trained and run on Slurm clusters",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["hpc_neuro", "hpc_neuro.*", "launch", "launch.*"]),
    package_data={"hpc_neuro": ["py.typed", "assets/*", "assets/student/*"]},
    install_requires=RUNTIME,
    extras_require={
        "test": TEST,
        "lint": LINT,
        "search": SEARCH,
        "docs": DOCS,
        "dev": TEST + LINT + DOCS,
        "viewer": ["neuroglancer>=2.40"],  # its page, for `infer serve OUT viewer=local`
        "napari": ["napari[pyqt6]>=0.9"],
        # Peers that benchmarks compare with, some of them GPL-3; never imported by the core.
        "compare": ["kimimaro>=5.8", "navis>=1.10", "dynamic-network-architectures>=0.4"],
    },
    entry_points={
        "console_scripts": ["hpc-neuro=hpc_neuro.cli:run_process"],
        "napari.manifest": ["hpc_neuro = hpc_neuro.napari_plugin:napari.yaml"],
    },
)
