"""Beartype with the tests' setting: an `int` is accepted as a `float`, as in PEP 484."""

from beartype import BeartypeConf, beartype

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
