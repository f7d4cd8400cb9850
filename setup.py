"""Builds the CPU kernels, one shared library of all instruction sets, where there is a C++ compiler for them.

Everything else about the package is in pyproject.toml. See docs/decisions/015-cpu-kernels.md.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("kvservice/kernels/cpu/src")
COMMON = ["abi.cpp", "isa.cpp", "threads.cpp"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"]
UNITS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma"],
    "isa_avx512.cpp": AVX512,
    "isa_amx.cpp": [*AVX512, "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16"],
}
DEFINES = {"isa_avx512.cpp": "KV_WITH_AVX512", "isa_amx.cpp": "KV_WITH_AMX"}
# GCC's own AVX-512 headers warn of uninitialised values that are never read.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
# At -O1, or compiling takes minutes.
SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]


class BuildKernels(build_ext):
    """Compiles each instruction set's unit with its own flags. Without a compiler the package does without."""

    def get_ext_filename(self, fullname: str) -> str:
        """A plain shared library: Python loads it with ctypes."""
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, _ext: Extension) -> list[str]:
        """No PyInit function."""
        return []

    def run(self) -> None:
        """Builds, or says why not."""
        if platform.machine() != "x86_64" or platform.system() != "Linux":
            self.warn(
                f"the CPU kernels are for x86-64 Linux; on {platform.system()} {platform.machine()} torch works alone"
            )
            return
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Compiles and links the library."""
        extra = SANITIZE if os.environ.get("KVSERVICE_SANITIZE") else []
        objects, defines = [], []
        for unit, flags in UNITS.items():
            try:
                objects += self._compile(unit, [*FLAGS, *extra, *flags], [])
            except CompileError:
                if unit not in DEFINES:
                    raise
                self.warn(f"this compiler can't build {unit}; the library goes without")
                continue
            if unit in DEFINES:
                defines.append((DEFINES[unit], None))
        for unit in COMMON:
            objects += self._compile(unit, [*FLAGS, *extra], defines)
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=["-pthread", *extra], target_lang="c++"
        )

    def _compile(self, unit: str, flags: list[str], defines: list[tuple[str, None]]) -> list[str]:
        return self.compiler.compile(
            [str(SOURCES / unit)], output_dir=self.build_temp, macros=defines, extra_postargs=flags
        )


setup(
    ext_modules=[
        Extension(
            "kvservice.kernels.cpu.libkvservice_cpu",
            sources=[str(SOURCES / unit) for unit in [*COMMON, *UNITS]],
            depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
            language="c++",
            # A failed build is reported and left out.
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
