"""Anything as text of a page."""

import html
import re

# Control characters, and those that turn the direction of what follows.
HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def text(value):
    """str(value) for HTML, in an element or in a quoted attribute: markup escaped, what would not show written out.

    >>> text("<b> & '\\x00'")
    '&lt;b&gt; &amp; &#x27;\\\\x00&#x27;'
    """
    return html.escape(HIDDEN.sub(lambda found: f"\\x{ord(found[0]):02x}", str(value)))
