"""What can be wrong with an evaluation."""

from __future__ import annotations


class EvaluationError(Exception):
    """A text, a model or a pair of models cannot be evaluated. The message is one line for the operator; it may hold
    paths.
    """
