"""Modules that stand in for libraries which are not installed."""

import sys
import types


def module(monkeypatch, name, **contents):
    """A module of that name, also as an attribute of the package it is in, which must be there."""
    found = types.ModuleType(name)
    found.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, found)
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, found)
    return found
