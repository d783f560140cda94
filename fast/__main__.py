"""The command line: python -m fast quantize, bench-layer, explain."""

import importlib
import sys

from .commands import COMMANDS
from .commands.arguments import Parser, one_of


def main(argv=None):
    """Run a command and return its exit code.

    0: done. 1: failed on the way. 2: refused before anything was done. 130: interrupted. One sentence on stderr says why.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    known = ", ".join(f"{name} ({what})" for name, what in COMMANDS.items())
    parser = Parser(prog="python -m fast", description="Commands: " + known + ". python -m fast COMMAND --help says more.")
    parser.add_argument("command", type=one_of(COMMANDS), help=", ".join(COMMANDS))
    name = parser.parse_args(argv[:1]).command
    command = importlib.import_module(f"fast.commands.{name.replace('-', '_')}")
    parser = Parser(prog=f"python -m fast {name}", description=command.__doc__)
    command.add_arguments(parser)
    args = parser.parse_args(argv[1:])
    try:
        return command.run(args)
    except KeyboardInterrupt:
        print(f"python -m fast {name}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
