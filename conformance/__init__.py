"""Does a kernel compute what `ref` says? Cases drawn by Hypothesis, exact answers, bounds derived from the hardware's arithmetic.

    python -m conformance --candidate fast
    python -m conformance --candidate mypkg.mykernels

A candidate is anything with functions of ref's names and signatures. Acceptance is the interval test of oracle.py: the exact
answer, plus or minus what an unordered float32 sum may lose, rounded once to the output's dtype. There is no tolerance to set.
"""
