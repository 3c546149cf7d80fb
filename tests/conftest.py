"""Tests run with every annotation of shape and type checked."""

from jaxtyping import install_import_hook

install_import_hook("eqx_q", "beartype.beartype")
