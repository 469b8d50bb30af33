"""How models and routes are described to callers."""

from __future__ import annotations

from headrace.backends.api import DeterminismClass, ModelCard
from headrace.backends.requests import Sampling
from headrace.server.engine.engine import DEFAULT_TEMPERATURE
from headrace.server.registry import ModelState, Served
from headrace.server.routing.breaker import State
from headrace.server.routing.router import Router
from headrace.server.rpc.application import ServedModel, ServedTarget


def describe(served: Served, default: str | None) -> ServedModel:
    """``default`` is the name of what requests ask for that name no model."""
    engine, model = served.engine, served.model
    is_unwell = served.state is ModelState.READY and served.problem() is not None
    return ServedModel(
        card=served.card,
        backend=served.backend,
        state=ModelState.FAILED if is_unwell else served.state,
        is_default=served.card.name == default,
        determinism=model.determinism if model else DeterminismClass.BEST_EFFORT,
        options=served.capabilities.options | {f"extensions[{name!r}]" for name in served.capabilities.extensions},
        max_n=served.capabilities.max_n,
        max_top_logprobs=served.capabilities.max_top_logprobs,
        max_running=engine.model.num_slots if engine else None,
        vocabulary_size=model.tokenizer.vocabulary_size if model and model.tokenizer else None,
        continuous_batching=engine is not None,
        default_sampling=Sampling(temperature=DEFAULT_TEMPERATURE) if engine else Sampling(),
        prefill_tokens_per_second=engine.runner.speeds.prefill_tokens_per_second if engine else None,
        decode_tokens_per_second=engine.runner.speeds.decode_tokens_per_second if engine else None,
    )


def describe_route(router: Router, name: str, default: str | None) -> ServedModel:
    """As a model that can do what one of its targets can; each promise is what all of them keep."""
    targets = router.targets(name)
    models = [describe(target.served, None) for target in targets]
    state = ModelState.FAILED
    if router.problem(name) is None:
        state = ModelState.READY
    elif any(model.state is ModelState.LOADING for model in models):
        state = ModelState.LOADING
    return ServedModel(
        card=ModelCard(name=name, context_length=max(model.card.context_length for model in models)),
        backend="route",
        state=state,
        is_default=name == default,
        determinism=min(model.determinism for model in models),
        options=frozenset[str]().union(*(model.options for model in models)),
        max_n=max(model.max_n for model in models),
        max_top_logprobs=max(model.max_top_logprobs for model in models),
        continuous_batching=all(model.continuous_batching for model in models),
        targets=tuple(
            ServedTarget(
                model=model,
                weight=(target.options.weight or 1.0) if router.is_weighted(name) else None,
                is_healthy=target.served.problem() is None,
                is_cooling_down=target.state is State.OPEN,
                failures_in_a_row=target.failures_in_a_row,
            )
            for model, target in zip(models, targets, strict=True)
        ),
    )
