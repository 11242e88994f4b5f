"""What the user can put right."""

from __future__ import annotations


class EvaluationError(ValueError):
    """What was asked for cannot be run; the message says what is wrong and what to do."""
