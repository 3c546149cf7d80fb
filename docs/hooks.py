"""Equations as MathML when the site is built: browsers draw it without any script."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_page_content(text: str, **_: Any) -> str:
    """Replaces the TeX of a page."""
    text = _INLINE.sub(lambda tex: convert(html.unescape(tex[1])), text)
    return _BLOCK.sub(lambda tex: convert(html.unescape(tex[1]), display="block"), text)
