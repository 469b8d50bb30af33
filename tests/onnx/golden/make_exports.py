"""Makes the golden exports: tiny random models as Optimum exports them, and what transformers computes with them.

    python tests/onnx/golden/make_exports.py

makes a virtual environment of its own (PyTorch, transformers, Optimum), runs there, and replaces the archives in
``exports/``, or those that are named: each is the folder that ``optimum-cli export onnx`` leaves, and
``expected.json``. Everything is seeded: the same versions give the same files.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Any

from make import PROMPT, REQUIREMENTS, write_tokenizer

HERE = Path(__file__).parent
TARGET = HERE / "exports"

NUM_NEW_TOKENS = 16
PROMPTS = ("A mill", PROMPT, PROMPT + "The wheels are exchangeable, the channel measures.", "1786")
"""Of different lengths, one longer than a chunk."""

TOKENS = 256
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": TOKENS}
LLAMA_SIZES = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": TOKENS}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2_SIZES),
    "gpt_bigcode": ("GPTBigCode", GPT2_SIZES | {"multi_query": True}),
    "gpt_neox": ("GPTNeoX", SIZES | {"intermediate_size": 64, "max_position_embeddings": TOKENS}),
    "opt": ("OPT", SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": TOKENS}),
    "phi": ("Phi", SIZES | {"intermediate_size": 64, "max_position_embeddings": TOKENS}),
    "falcon": ("Falcon", SIZES | {"max_position_embeddings": TOKENS, "multi_query": True}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "seq_length": TOKENS}),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": TOKENS}),
    "llama": ("Llama", LLAMA_SIZES),
    "mistral": ("Mistral", LLAMA_SIZES | {"sliding_window": 20}),
    "qwen2": ("Qwen2", LLAMA_SIZES | {"tie_word_embeddings": True}),
}


def main() -> None:
    if sys.argv[1:2] == ["--here"]:
        for name in sys.argv[2:] or MODELS:
            make(name)
        return
    with tempfile.TemporaryDirectory(prefix="headrace-exports-") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        requirements = (*REQUIREMENTS, "optimum-onnx[onnxruntime]==0.1.0", "onnx==1.23.2", "onnxruntime==1.32.0")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
        subprocess.run([python, Path(__file__).resolve(), "--here", *sys.argv[1:]], check=True)


def make(name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="headrace-export-") as temporary:
        checkpoint, export = Path(temporary) / "checkpoint", Path(temporary) / "export"
        write_checkpoint(name, checkpoint)
        command = [sys.executable, "-m", "optimum.exporters.onnx", "--model", checkpoint]
        subprocess.run([*command, "--task", "text-generation-with-past", export], check=True, capture_output=True)
        write_expected(checkpoint, export)
        archive = TARGET / f"{name}.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(export.iterdir()):
                # Without the time of day, the same files make the same archive.
                file.writestr(zipfile.ZipInfo(path.name), path.read_bytes(), zipfile.ZIP_DEFLATED, 9)
    print(f"{name}: {archive.stat().st_size // 1000} KB")


def write_checkpoint(name: str, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoTokenizer

    kind, settings = MODELS[name]
    num_tokens = write_tokenizer("qwen2" if kind == "Qwen2" else "llama-bpe", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=num_tokens, initializer_range=0.25, **settings, **tokens)
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms begin as ones and biases as zeros: nobody would notice that they are mixed up.
            if parameter.ndim == 1:
                parameter += torch.empty_like(parameter).uniform_(-0.5, 0.5)
            # Half of each float is zeros then, and takes no room in an archive.
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder)


def write_expected(checkpoint: Path, export: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None  # random models end at once
    answers = []
    for text in PROMPTS:
        prompt = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            ids = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NUM_NEW_TOKENS,
                do_sample=False,
                num_beams=1,
            )
            best = model(ids).logits[0, prompt.shape[1] - 1 : -1].topk(2).values
        print(f"  {prompt.shape[1]} tokens, closest decision {(best[:, 0] - best[:, 1]).min():.3f}")
        answers.append(
            {"prompt": text, "prompt_ids": prompt[0].tolist(), "greedy_ids": ids[0, prompt.shape[1] :].tolist()}
        )
    (export / "expected.json").write_text(json.dumps(answers, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
