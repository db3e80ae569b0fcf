"""What pyproject.toml cannot express; everything else is stated there."""

from setuptools import find_packages, setup

# `kernels` at top level is another project's import name, so ours is installed as `dynconv.kernels`.
# (dynconv/_source_tree.py does the same for a source tree that is imported without being installed.)
setup(
    packages=[
        *find_packages(include=["dynconv", "dynconv.*"]),
        "dynconv.kernels",
        *(f"dynconv.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"dynconv.kernels": "kernels"},
)
