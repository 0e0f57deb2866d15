"""Which modules a list in a quantization config means: names, parts of names, wildcards and regular expressions."""

import fnmatch
import re
from collections.abc import Iterable


def first_match(module: str, patterns: Iterable[str]) -> str | None:
    """The first of ``patterns`` that means ``module``, or None.

    Args:
        module: the full name of a module, e.g. ``model.layers.3.mlp.experts.0.up_proj``.
        patterns: ``re:`` and a regular expression that matches from the start (compressed-tensors); a name with ``*``, ``?``
            or ``[]`` in it, of the module or of one that it is part of (ModelOpt); otherwise whole dot-separated parts of the
            name in a row: ``gate`` means ``mlp.gate``, not ``mlp.gate_proj``.

    Example:
        >>> first_match("model.layers.3.mlp.gate", ["lm_head", "gate"]), first_match("mlp.gate_proj", ["gate"])
        ('gate', None)
        >>> first_match("model.layers.3.mlp.experts.0.up_proj", ["re:.*self_attn.*", "*.mlp.experts"])
        '*.mlp.experts'
    """
    return next((pattern for pattern in patterns if _means(pattern, module)), None)


def _means(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    parts = module.split(".")
    if any(sign in pattern for sign in "*?["):
        return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
    wanted = pattern.strip(".")
    return bool(wanted) and f".{wanted}." in f".{module}."
