"""The report of a run: text for a terminal, JSON for machines, a page for people, and what changed since another run."""

from .compare import compare, differences
from .document import SCHEMA, ReportError, document, read, write_json
from .page import write_html
from .text import failure, progress, summary, table

__all__ = [
    "SCHEMA",
    "ReportError",
    "compare",
    "differences",
    "document",
    "failure",
    "progress",
    "read",
    "summary",
    "table",
    "write_html",
    "write_json",
]
