"""The report of a run: text for a terminal, JSON for machines, a page for people, and what changed since another run."""

from .compare import compare, differences
from .document import SCHEMA, ReportError, document, measured_power, read, write_json
from .page import write_html
from .text import failure, fingerprint, power, progress, summary, table

__all__ = [
    "SCHEMA",
    "ReportError",
    "compare",
    "differences",
    "document",
    "failure",
    "fingerprint",
    "measured_power",
    "power",
    "progress",
    "read",
    "summary",
    "table",
    "write_html",
    "write_json",
]
