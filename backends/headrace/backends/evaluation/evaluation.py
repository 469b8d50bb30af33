"""Evaluates bundles beside each other: what quantisation costs in quality, and what it brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from headrace.backends.api import BackendContext, StepModel, Tokenizer
from headrace.backends.evaluation.errors import EvaluationError
from headrace.backends.evaluation.quality import Quality, measure_quality
from headrace.backends.evaluation.reference import Reference
from headrace.backends.evaluation.speed import BATCHES, Speed, measure_speed, resident_bytes
from headrace.backends.evaluation.text import cut_windows
from headrace.backends.onnx.bundle import Manifest
from headrace.backends.onnx.model import OnnxModel  # noqa: F401  # its libraries' memory is no model's
from headrace.backends.onnx.plugin import OnnxBackend, OnnxOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What is known of one bundle."""

    name: str
    quantization: str
    digest: str
    num_bytes: int
    """On disk."""
    memory_bytes: int
    """By which the process grew when it was loaded; the cache of streams comes on top."""
    quality: Quality
    speed: Speed | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluations:
    """Bundles, and how they were compared."""

    num_windows: int
    window_tokens: int
    context_tokens: int
    """Of each window, not scored."""
    reference: Evaluation
    models: tuple[Evaluation, ...]


def evaluate(
    reference: Reference,
    manifests: Sequence[Manifest],
    *,
    models_dir: Path,
    text: str,
    num_positions: int,
    repeats: int,
    progress: Callable[[str, float], None],
) -> Evaluations:
    """Loads the reference and the bundles of ``models_dir`` side by side and compares them on at most
    ``num_positions`` tokens of a text. Speed is measured ``repeats`` times, or not at all.

    Raises EvaluationError, or an error of ``headrace.backends.errors`` if a bundle cannot be loaded.
    """
    bundles = [(reference.models_dir, reference.manifest), *((models_dir, manifest) for manifest in manifests)]
    with _all_loaded(bundles, spinning=False, progress=progress) as loaded:
        models = [model for model, _ in loaded]
        tokenizer = models[0].tokenizer
        for model in models[1:]:
            if not _same_tokens(tokenizer, model.tokenizer):
                raise EvaluationError(
                    f"{model.card.name!r} has another vocabulary than {models[0].card.name!r}: they cannot be compared"
                )
        context_length = min(model.card.context_length for model in models)
        windows = cut_windows(text, tokenizer, num_positions=num_positions, context_length=context_length)
        qualities = measure_quality(models, windows, progress=lambda done: progress("comparing predictions", done))
        memories = [memory_bytes for _, memory_bytes in loaded]
    speeds: Sequence[Speed | None] = [None] * len(bundles)
    if repeats:
        # As a server loads them. Where other programs run, threads that wait actively make the comparison above, in
        # which models take turns at every token, twice as long.
        with _all_loaded(bundles, spinning=True, progress=progress) as loaded:
            speeds = measure_speed(
                [model for model, _ in loaded],
                windows.token_ids[0].tolist(),
                repeats=repeats,
                progress=lambda done: progress("measuring speed", done),
            )
    evaluated = [
        Evaluation(
            name=manifest.name,
            quantization=manifest.quantization,
            digest=manifest.digest,
            num_bytes=sum(entry.num_bytes for entry in manifest.files.values()),
            memory_bytes=memory_bytes,
            quality=quality,
            speed=speed,
        )
        for (_, manifest), memory_bytes, quality, speed in zip(bundles, memories, qualities, speeds, strict=True)
    ]
    num_windows, window_tokens = windows.token_ids.shape
    return Evaluations(
        num_windows=num_windows,
        window_tokens=window_tokens,
        context_tokens=windows.num_context,
        reference=evaluated[0],
        models=tuple(evaluated[1:]),
    )


@contextmanager
def _all_loaded(
    bundles: Sequence[tuple[Path, Manifest]], *, spinning: bool, progress: Callable[[str, float], None]
) -> Iterator[list[tuple[StepModel, int]]]:
    """The models, and by how many bytes this process grew with each."""
    options = OnnxOptions(max_running=max(BATCHES), spinning=spinning)
    with ExitStack() as stack:
        loaded = []
        for i, (models_dir, manifest) in enumerate(bundles):
            progress("loading", i / len(bundles))
            before = resident_bytes()
            model = stack.enter_context(closing(OnnxBackend(options, BackendContext(models_dir)).load(manifest.name)))
            loaded.append((model, resident_bytes() - before))
        yield loaded


def _same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give the same ids the same meaning."""
    return (
        one.vocabulary_size == other.vocabulary_size
        and one.encode("").ids == other.encode("").ids
        and all(one.token_bytes(i) == other.token_bytes(i) for i in range(one.vocabulary_size))
    )
