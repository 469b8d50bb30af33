"""The engines that headrace is compared with, and how each is run. ``setup_peers.py`` puts them into one folder."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_WORKERS = Path(__file__).parent / "workers"

Q8_0 = "smollm2-q8_0.gguf"
CHECKPOINT = "smollm2-hf"
GENAI_MODEL = "smollm2-genai-int8"
LLAMA_SERVER = "llama-build/bin/llama-server"


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine. In its command lines ``PEERS`` is the folder, ``WORKERS`` that of the workers, ``THREADS`` a number
    and ``CORES`` a list.
    """

    title: str
    raw: str
    """The worker for raw_pairs.py."""
    serve: str | None = None
    target: str = ""
    """Where the server answers, as targets.py has it."""

    def raw_command(self, peers: Path, threads: int) -> list[str]:
        return shlex.split(_filled(self.raw, peers, threads))

    def serve_command(self, peers: Path, threads: int) -> str:
        assert self.serve is not None, f"{self.title} has no server"
        return _filled(self.serve, peers, threads)


def _filled(command: str, peers: Path, threads: int) -> str:
    values = {
        "PEERS": shlex.quote(str(peers)),
        "WORKERS": shlex.quote(str(_WORKERS)),
        "THREADS": str(threads),
        "CORES": ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads])),
    }
    for name, value in values.items():
        command = command.replace(name, value)
    return command


def _vllm(dtype: str) -> Peer:
    return Peer(
        f"vLLM {dtype}",
        f"PEERS/vllm/bin/python WORKERS/vllm_raw.py --model PEERS/{CHECKPOINT} --dtype {dtype} --threads THREADS",
        "VLLM_CPU_KVCACHE_SPACE=2 VLLM_CPU_OMP_THREADS_BIND=CORES HF_HUB_OFFLINE=1"
        f" PEERS/vllm/bin/vllm serve PEERS/{CHECKPOINT} --dtype {dtype} --max-model-len 2048 --max-num-seqs 64"
        " --host 127.0.0.1 --port 8091",
        "openai:127.0.0.1:8091",
    )


PEERS: Mapping[str, Peer] = {
    "llama": Peer(
        "llama.cpp Q8_0",
        f"PEERS/llama/bin/python WORKERS/llama_cpp_raw.py --gguf PEERS/{Q8_0} --threads THREADS",
        f"PEERS/{LLAMA_SERVER} -m PEERS/{Q8_0} -t THREADS -np 32 -c 16384 --port 8090",
        "openai:127.0.0.1:8090",
    ),
    "openvino": Peer(
        "OpenVINO Q8_0",
        f"PEERS/openvino/bin/python WORKERS/openvino_raw.py --gguf PEERS/{Q8_0} --threads THREADS",
    ),
    # Its bfloat16 needs AVX-512.
    "vllm-float32": _vllm("float32"),
    "vllm-bfloat16": _vllm("bfloat16"),
    "genai": Peer(
        "onnxruntime-genai int8",
        f"PEERS/genai/bin/python WORKERS/onnxruntime_genai_raw.py --model PEERS/{GENAI_MODEL} --threads THREADS",
    ),
}
