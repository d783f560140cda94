"""Arguments of commands: refusals name what was given, what is expected, and the nearest right one."""

import argparse
import difflib
import os
import re
import sys

import torch

from ref.format import parse_format

from . import EXIT_CODES

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that names the nearest option where there is none of a name, before it misses any."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, epilog=EXIT_CODES, **options)

    def parse_args(self, args=None, namespace=None):
        known = self._option_string_actions
        for name in (arg.partition("=")[0] for arg in args or () if re.match("--?[A-Za-z]", arg)):
            if name not in known:
                self.error(f"there is no option {name}; the nearest is {nearest(name, [one for one in known if one.startswith('--')])}")
        return super().parse_args(args, namespace)


def nearest(name, known):
    """The one of some names that is most like another."""
    return difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]


def argument(parse):
    """A type for add_argument whose ValueErrors are shown as they are."""

    def parsed(text):
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def one_of(known):
    """A type: one of some names."""

    @argument
    def parse(text):
        if text not in known:
            raise ValueError(f"{text!r} is none of {', '.join(known)}; the nearest is {nearest(text, known)}")
        return text

    return parse


@argument
def device(text):
    """A torch.device that there is."""
    try:
        found = torch.device(text)
    except RuntimeError:
        raise ValueError(f"{text!r} is no device, expected cpu, cuda or cuda:1") from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"{text!r} is no device that there is code for, expected cpu or cuda")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no {text}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs; take --device cpu")
    return found


@argument
def size(text):
    """Bytes, as 500MB or 4GiB."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", text)
    found = int(float(match[1]) * UNITS.get(match[2].upper(), 0)) if match else 0
    if not found:
        raise ValueError(f"{text!r} is no size, expected one as 500MB or 4GiB")
    return found


@argument
def numbers(text):
    """Positive integers, as 1,16,256."""
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", text) or "0" in text.split(","):
        raise ValueError(f"{text!r} is no list of positive numbers, expected one as 1,16,256")
    return [int(number) for number in text.split(",")]


@argument
def number(text):
    """One positive integer."""
    if not re.fullmatch(r"[0-9]+", text) or int(text) == 0:
        raise ValueError(f"{text!r} is no positive number")
    return int(text)


@argument
def pattern(text):
    """A part of a name, or re: and a regular expression."""
    if not text:
        raise ValueError("it is empty, expected a part of a name, or re:...")
    return text


format_name = argument(parse_format)


def fail(command, error, code):
    """Say on stderr, in one line, why a command ends with an exit code, and return that."""
    print(f"python -m fast {command}: {error if isinstance(error, str) else sentence(error)}", file=sys.stderr)
    return code


def lacks_memory(error):
    """Whether an error says that memory did not suffice; torch has a type for it on GPUs only."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def sentence(error):
    """An error as one line."""
    if isinstance(error, ExceptionGroup):
        return f"{error.message}: {'; '.join(map(sentence, error.exceptions))}"
    if isinstance(error, OSError) and error.strerror:
        return f"{os.fspath(error.filename)}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def table(headings, rows, left=1):
    """Aligned columns as lines of text: the first `left` ones flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        cells = (cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        yield "  ".join(cells).rstrip()
