"""Which folders become which packages; everything else is said in pyproject.toml.

The Triton kernels live in ``kernels/`` at the top of the tree and are installed as ``lumiere_fast.kernels``. That
mapping needs ``package_dir``, and with it an editable install needs PEP 660 (``pip install -e .``, setuptools >= 64).
"""

from setuptools import find_packages, setup

KERNELS = "lumiere_fast.kernels"

setup(
    packages=[
        *find_packages(include=["lumiere_fast", "lumiere_fast.*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_packages("kernels")),
    ],
    package_dir={KERNELS: "kernels"},
    # Said here and not through MANIFEST.in, so that what a wheel ships does not depend on what an sdist does.
    include_package_data=False,
    package_data={
        "lumiere_fast": ["py.typed", "weights/**/*.safetensors", "weights/**/*.json"],
        "lumiere_fast.text": ["data/*"],
    },
)
