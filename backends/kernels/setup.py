"""Compiles the operators: a shared library that ONNX Runtime loads, not a module that Python imports."""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("src")

setup(
    ext_modules=[
        Extension(
            "headrace_kernels._operators",
            sorted(map(str, SOURCES.glob("*.c"))),
            depends=sorted(map(str, SOURCES.glob("*.h"))),
            # No contraction: equal operands give equal bits wherever the compiler puts them.
            extra_compile_args=["-std=gnu11", "-O3", "-fvisibility=hidden", "-ffp-contract=off"],
            extra_link_args=["-lm", "-lpthread"],
        )
    ]
)
