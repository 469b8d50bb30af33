"""What an error of a try says of the model, and of what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.backends.errors import (
    BackendError,
    BackendUnavailable,
    HeadraceError,
    InvalidArgument,
    Loading,
    Overloaded,
    ProviderLimited,
    ProviderRefused,
    QueueFull,
    QueueTimeout,
    UnsupportedOption,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """``retry``: the same model is worth another try. ``fallback``: another one is."""

    retry: bool = False
    fallback: bool = False
    is_failure: bool = False
    """Whether the model has failed, rather than the call, or than there was no room."""
    retry_after: float | None = None
    """Seconds, if it is known when to try again."""
    pause: float | None = None
    """Seconds for which the provider asks to be left alone."""


_NEITHER = Judgement()


def judge(error: Exception) -> Judgement:
    """What a backend must not raise is a failure of it."""
    match error:
        case BackendUnavailable(retry_after=seconds):
            pause = _asked(error, seconds)
            return Judgement(retry=True, fallback=True, is_failure=True, retry_after=seconds, pause=pause)
        case ProviderLimited(retry_after=seconds):
            return Judgement(retry=True, fallback=True, retry_after=seconds, pause=_asked(error, seconds))
        case BackendError():
            return Judgement(fallback=True, is_failure=True)
        case QueueFull() | QueueTimeout() | Loading() | UnsupportedOption():
            return Judgement(fallback=True)
        case HeadraceError():
            # Plugins may raise a plain Overloaded; its other kinds are about the caller.
            return Judgement(fallback=True) if type(error) is Overloaded else _NEITHER
        case _:
            return Judgement(fallback=True, is_failure=True)


def _asked(error: HeadraceError, seconds: float | None) -> float | None:
    """``seconds`` if it is the provider who names them, and not our own limits."""
    said = error.provider_status
    return None if said is None or said.status is None else seconds


def combined(route: str, refusals: Sequence[tuple[str, Exception]]) -> Exception:
    """What a call of ``route`` ends with whose every target is out of the question: ``refusals`` says which and why,
    one or more; of one model the last counts. If one of the reasons may pass, the error is one that may.
    """
    by_model = dict(refusals)
    errors = list(by_model.values())
    if len(errors) == 1:
        return errors[0]
    error = _combined(route, errors, "; ".join(f"{name}: {_reason(one)}" for name, one in by_model.items()))
    said = [one.provider_status for one in errors if isinstance(one, HeadraceError) and one.provider_status is not None]
    error.provider_status = said[-1] if said else None
    return error


def _combined(route: str, errors: Sequence[Exception], reasons: str) -> HeadraceError:
    message = f"no model of {route!r} can answer now: {reasons}"
    passing = [error for error in errors if isinstance(error, BackendUnavailable | Overloaded | Loading)]
    waits = [error.retry_after for error in passing if error.retry_after is not None]
    if passing and waits and all(isinstance(error, Overloaded) for error in errors):
        return Overloaded(message, retry_after=min(waits))
    if passing:
        return BackendUnavailable(message, retry_after=min(waits, default=None))
    if all(isinstance(error, ProviderRefused) for error in errors):
        return ProviderRefused(message)
    if not all(isinstance(error, InvalidArgument | UnsupportedOption) for error in errors):
        return BackendError(message)
    fields = {error.field for error in errors if isinstance(error, UnsupportedOption)}
    if len(fields) == 1 and all(isinstance(error, UnsupportedOption) for error in errors):
        return UnsupportedOption(fields.pop(), model=route, backend="route")
    return InvalidArgument("model", f"no model of {route!r} takes this request: {reasons}")


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, HeadraceError) else "it failed in an unexpected way"
