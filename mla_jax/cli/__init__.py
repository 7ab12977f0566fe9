"""The command `mla-jax`. One module a subcommand, each with `register(subparsers)` and `run(args) -> exit status`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

SUBCOMMANDS = ("demo", "layout", "bench", "aot", "serve_demo", "soak", "fuzz", "tune", "verify")


class CommandError(Exception):
    """What the user asked for cannot be done; the message says why and what would help."""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="mla-jax", description="Multi-head latent attention decoding for JAX.")
    subparsers = top.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name in SUBCOMMANDS:
        importlib.import_module(f"mla_jax.cli.{name}").register(subparsers)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. 0: done; 1: it ran and found something wrong; 2: it could not run as asked."""
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except CommandError as error:
        print(f"mla-jax {args.subcommand}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
