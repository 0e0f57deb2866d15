"""Checks that frozen dataclasses make of their own fields."""

import operator
from typing import Any

import numpy as np


def set_field(instance: Any, name: str, value: Any) -> None:
    """Sets a field of a frozen dataclass, while it is made."""
    object.__setattr__(instance, name, value)


def check_int(instance: Any, name: str, minimum: int) -> None:
    """Stores the field as a plain int, or raises."""
    value = getattr(instance, name)
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} must be an integer, not {type(value).__name__}") from None
    if number < minimum:
        raise ValueError(f"{name}={number} must be at least {minimum}")
    set_field(instance, name, number)


def check_bool(instance: Any, name: str) -> None:
    """Stores the field as a plain bool, or raises."""
    value = getattr(instance, name)
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}={value!r} must be True or False")
    set_field(instance, name, bool(value))
