"""Compiles the operators: a shared library that ONNX Runtime loads, not a module that Python imports."""

from setuptools import Extension, setup

SOURCES = ["attention.c", "attention_op.c", "kernel.c", "linear.c", "linear_op.c", "top.c"]

setup(
    ext_modules=[
        Extension(
            "headrace_kernels._operators",
            [f"src/{name}" for name in SOURCES],
            depends=["src/attention.h", "src/kernel.h", "src/linear.h", "src/ort_abi.h", "src/simd.h", "src/top.h"],
            # No contraction: equal operands give equal bits wherever the compiler puts them.
            extra_compile_args=["-std=gnu11", "-O3", "-fvisibility=hidden", "-ffp-contract=off"],
            extra_link_args=["-lm", "-lpthread"],
        )
    ]
)
