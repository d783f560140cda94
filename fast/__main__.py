"""The command line: python -m fast quantize, bench-layer, explain."""

import importlib
import os
import sys

from .commands import COMMANDS
from .commands.arguments import Parser, fail, lacks_memory, one_of, sentence


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
        code = command.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return fail(name, "interrupted", 130)
    except BrokenPipeError:
        # Who reads has seen enough; Python, too, would flush at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        return fail(name, f"there is too little memory: {sentence(error)}", 1)


if __name__ == "__main__":
    sys.exit(main())
