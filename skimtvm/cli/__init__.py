"""The command line: ``main`` parses, calls the library, prints. Errors become one line and an exit code here only."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from .. import __version__, _torch
from ..errors import SkimError
from .bench import bench_command
from .calibrate import calibrate_command
from .compile import compile_command
from .demo import demo_command
from .inspect import inspect_command
from .log import log_command
from .package import package_command
from .plot import plot_command
from .profile import profile_command
from .prune import prune_command
from .run import run_command
from .serve import serve_command
from .train_demo import train_demo_command
from .tune import tune_command

INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended
CRASHED = 70  # EX_SOFTWARE


class _Main(click.Group):
    """A group that ends every failure in one line on stderr and an exit code, tracebacks only on demand."""

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        arguments = list(sys.argv[1:] if args is None else args)
        debug = bool(os.environ.get("SKIMTVM_DEBUG")) or "--debug" in arguments[:1]
        extra["standalone_mode"] = False
        _torch.own_process()
        interrupted = False

        def interrupt(number: int, frame: Any) -> None:
            nonlocal interrupted
            interrupted = True
            signal.default_int_handler(number, frame)

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files go with the process
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, interrupt)
        try:
            code = super().main(arguments, prog_name or "skimtvm", **extra)
            sys.stdout.flush()
            sys.exit(code if isinstance(code, int) else 0)
        except click.Abort:
            _fail("interrupted", INTERRUPTED, debug)
        except click.ClickException as e:
            if isinstance(e, click.exceptions.NoArgsIsHelpError):
                e.show()
                sys.exit(e.exit_code)
            hint = ""
            if isinstance(e, click.UsageError) and e.ctx is not None:
                hint = f"; see: {e.ctx.command_path} --help"
            _fail(e.format_message().rstrip(".") + hint, e.exit_code, debug)
        except SkimError as e:
            if interrupted:
                _fail("interrupted", INTERRUPTED, debug)
            _fail(str(e), e.exit_code, debug)
        except BrokenPipeError:
            # The reader has enough; the interpreter's own flush at exit must not complain either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except MemoryError:
            _fail("out of memory; use a smaller batch or a machine with more of it", 1, debug)
        except Exception as e:
            if interrupted:  # a foreign function that Ctrl-C met may raise what it likes
                _fail("interrupted", INTERRUPTED, debug)
            reason = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
            hint = "" if debug else "; see the traceback with: skimtvm --debug ..."
            _fail(f"this is a bug in skimtvm, please report it: {reason}{hint}", CRASHED, debug)


def _fail(message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        print(f"skimtvm: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="skimtvm")
@click.option("--debug", is_flag=True, help="Show the traceback of an error (also: SKIMTVM_DEBUG=1).")
def main(debug: bool) -> None:
    """Compile pruned ONNX networks to sparse CPU modules, run and profile them."""


for _command in (
    compile_command,
    run_command,
    serve_command,
    inspect_command,
    profile_command,
    package_command,
    demo_command,
    bench_command,
    prune_command,
    train_demo_command,
    plot_command,
    tune_command,
    calibrate_command,
    log_command,
):
    main.add_command(_command)
