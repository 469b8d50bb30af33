"""Makes the golden files: tiny random models in Hugging Face's format, and what transformers computes with them.

    python tests/onnx/golden/make.py

makes a virtual environment of its own (PyTorch, transformers), runs there, and replaces the folders beside this file.
Everything is seeded: the same versions give the same files.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

REQUIREMENTS = ("torch==2.13.0", "transformers==4.57.6", "tokenizers==0.22.2", "safetensors==0.8.0", "numpy<3")
HERE = Path(__file__).parent

NUM_NEW_TOKENS = 24
PROMPT = (
    "A headrace is the channel that brings water to a mill wheel: in 1786 the mill at Zürich-Höngg had 3 of them, "
    "and they're kept  clean — or the wheel stops.\n"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.25,
    "attn_implementation": "eager",
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "class": "Llama",
        "tokenizer": "llama-bpe",
        "dtype": "float16",
        "config": {"num_hidden_layers": 2, "rope_theta": 500.0, "rope_scaling": LLAMA3_SCALING},
    },
    "mistral": {
        "class": "Mistral",
        "tokenizer": "sentencepiece",
        "dtype": "bfloat16",
        "config": {"num_hidden_layers": 2, "sliding_window": 20, "head_dim": 16},
    },
    "qwen2": {
        "class": "Qwen2",
        "tokenizer": "qwen2",
        "dtype": "float32",
        "max_shard_size": "60KB",
        "config": {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 1,
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "head_dim": 16,
        },
    },
    "qwen3": {
        "class": "Qwen3",
        "tokenizer": "qwen2",
        "dtype": "bfloat16",
        "config": {"num_hidden_layers": 2, "tie_word_embeddings": True},
    },
    "gemma3": {
        "class": "Gemma3",
        "tokenizer": "gemma",
        "dtype": "bfloat16",
        "config": {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 20,
            "query_pre_attn_scalar": 24,
            "rope_theta": 100_000.0,
            "rope_local_base_freq": 1_000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    },
    "smollm3": {
        "class": "SmolLM3",
        "tokenizer": "llama-bpe",
        "dtype": "bfloat16",
        "config": {"num_hidden_layers": 4, "tie_word_embeddings": True, "head_dim": 16},
    },
}


def main() -> None:
    if sys.argv[1:] == ["--here"]:
        make_all()
        return
    with tempfile.TemporaryDirectory(prefix="headrace-golden-") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        subprocess.run([python, Path(__file__).resolve(), "--here"], check=True)


def make_all() -> None:
    for name, plan in MODELS.items():
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        size = write_tokenizer(plan["tokenizer"], folder)
        write_model(plan, size, folder)
        write_expected(plan, folder)
        for path in folder.iterdir():
            path.chmod(0o644)


def write_tokenizer(kind: str, folder: Path) -> int:
    """Returns the number of tokens."""
    import tokenizers
    from tokenizers import decoders, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    model = tokenizers.models.BPE(byte_fallback=kind in {"sentencepiece", "gemma"}, fuse_unk=False)
    tokenizer = tokenizers.Tokenizer(model)
    text = [(HERE.parents[2] / "LICENSE").read_text(), PROMPT * 20]
    tokens = {"eos_token": SPECIAL[2]}
    if kind in {"sentencepiece", "gemma"}:
        steps = [normalizers.Replace(" ", "▁")]
        undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if kind == "sentencepiece":
            steps.insert(0, normalizers.Prepend("▁"))
            undo.append(decoders.Strip(" ", 1, 0))
        tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(steps), decoders.Sequence(undo)
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        special = ["<pad>", "<eos>", "<bos>", "<unk>", *SPECIAL[1:], *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=448, special_tokens=special, show_progress=False)
        tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    else:
        pattern = WORDS % ("{1,3}" if kind == "llama-bpe" else "")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.normalizer = normalizers.NFC() if kind == "qwen2" else None
        tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, use_regex=False)
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        if kind == "llama-bpe":
            tokens["bos_token"] = SPECIAL[0]
    tokenizer.train_from_iterator(text, trainer)
    description = json.loads(tokenizer.to_str())
    if kind in {"sentencepiece", "gemma"}:
        # The trainer needs words; the models themselves cut none. Bytes are tokens like any other.
        description["pre_tokenizer"] = None
        description["model"] |= {"unk_token": "<unk>", "fuse_unk": True}
        description["added_tokens"] = description["added_tokens"][:6]
    if kind == "llama-bpe":
        description["model"]["ignore_merges"] = True
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
    if "bos_token" in tokens:
        bos = tokens["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **tokens)
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    (folder / "special_tokens_map.json").unlink()
    return len(wrapped)


def write_model(plan: dict[str, Any], num_tokens: int, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoTokenizer

    name = plan["class"]
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    model_class = getattr(transformers, f"{name}ForCausalLM")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # 5 rows that only pad the embedding, as many models have them.
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    torch.manual_seed(0)
    model = model_class(config_class(vocab_size=num_tokens + 5, **SMALL | plan["config"] | tokens))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Norms begin as ones and biases as zeros: nobody would notice that they are mixed up.
            if parameter.ndim == 1:
                parameter += torch.empty_like(parameter).uniform_(-0.5, 0.5)
            if "embed" in parameter_name:
                parameter[num_tokens:] = 0
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.to(getattr(torch, plan["dtype"])).save_pretrained(folder, max_shard_size=plan.get("max_shard_size", "1GB"))


def write_expected(plan: dict[str, Any], folder: Path) -> None:
    import numpy as np
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    model.generation_config.eos_token_id = None  # random models end at once
    padding = list(range(len(tokenizer), model.config.vocab_size))
    with torch.no_grad():
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            suppress_tokens=padding,
        )
        logits = model(ids).logits[0, :, : len(tokenizer)]
    greedy = ids[0, prompt.shape[1] :].tolist()
    best = logits[prompt.shape[1] - 1 : -1].topk(2).values
    print(f"{folder.name}: {prompt.shape[1]} tokens, closest decision {(best[:, 0] - best[:, 1]).min():.3f}")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    expected = {
        "prompt": PROMPT,
        "prompt_ids": prompt[0].tolist(),
        "chat_ids": chat,
        "greedy_ids": greedy,
        "greedy_text": tokenizer.decode(greedy, skip_special_tokens=True),
        # Of each token of prompt and answer but the first, after those before it.
        "logprobs": [round(value, 7) for value in logprobs_of(ids[0], logits)],
    }
    (folder / "expected.json").write_text(json.dumps(expected, ensure_ascii=False, indent=1) + "\n")
    positions = np.arange(3, ids.shape[1], 4)
    save_file({"positions": positions, "logits": logits.numpy()[positions].copy()}, folder / "expected.safetensors")


def logprobs_of(ids: Any, logits: Any) -> list[float]:
    """Natural, of ``ids`` from the second on; ``logits`` are those after each."""
    return logits.double().log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0].tolist()


if __name__ == "__main__":
    main()
