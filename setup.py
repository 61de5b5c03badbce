"""The one part of the package that is compiled; everything else is in pyproject.toml.

Where it cannot be compiled (no compiler, another system) the package installs without it and the plain PyTorch reference does the work;
`tensorpress doctor` says so. TENSORPRESS_NO_NATIVE=1 leaves it out.
"""

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = [
    "-std=c++17",
    "-O3",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-Wno-psabi",
]

native = Extension(
    "tensorpress.kernels.libcpu",
    sources=[
        f"kernels/cpu/{name}.cpp" for name in ("api", "avx2", "avx512", "avx512vl", "avxvnni", "decoder", "portable")
    ],
    depends=sorted(map(str, Path("kernels/cpu").glob("*"))),
    extra_compile_args=FLAGS,
    language="c++",
    optional=True,
)


class Library(build_ext):
    """It is no module of Python's, and has a name that is none: it needs no headers of Python's to be built."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], "libcpu.so.1"))


setup(
    ext_modules=[] if os.environ.get("TENSORPRESS_NO_NATIVE") else [native],
    cmdclass={"build_ext": Library},
)
