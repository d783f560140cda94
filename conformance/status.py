"""What can come of a cell, from the best to what never happened."""

STATUSES = {
    "pass": "all examples agree",
    "fail": "an example disagrees",
    "mistrusted": "all examples agree, but too many of their bounds are too wide to tell",
    "unsupported": "the candidate declined every example",
    "undeclared reject": "the candidate declined what it declares",
    "crash": "a call ended its process",
    "timeout": "a call did not return in time",
    "error": "the suite itself failed",
    "xfail": "what failed is waived",
    "xpass": "what is waived did not fail",
    "precondition failed": "this environment does not allow a verdict",
    "blocked": "an example disagrees, and so does an operation that this one is made of",
    "not run": "the run ended before it",
    "not provided": "the candidate has no such function",
}

# Those that make exit code 1.
FAILING = ("fail", "undeclared reject", "crash", "timeout", "error", "xpass", "blocked")

# Those that a candidate is to blame for: what a waiver may cover.
WAIVABLE = ("fail", "undeclared reject", "crash", "timeout")
