"""Run a command: parse its options, answer bad input in one line, exit with a documented status.

Nothing heavy is imported here, so that --help and bad options are answered within a second.
"""

import argparse
import errno
import gc
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from c2r import InputError
from c2r.options import COMMANDS
from c2r.options.option import Command, Option
from c2r.options.presets import option_words
from c2r.options.types import Flag, Switch

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Above a file that sets every option; a YAML file of a megabyte would take a minute to read.
MAX_CONFIG_BYTES = 30_000
#: Longer messages, such as of an option with a million values, are shortened in the middle.
MAX_MESSAGE = 2000
#: Functions called before an unexpected error is raised; the watchdog adds one that names a dead process.
failure_hooks: list[Callable[[], None]] = []
#: Seconds that the other processes wait with an error, so that the main process reports bad input first.
HEAD_START = 5.0

# ------------------------------------------------------------------------------------------------------------- options


def parse(command: Command, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line over --config FILE.yaml over --preset over the defaults, and check all values.

    Args:
        command: one of `c2r.options`.
        argv: arguments without the program's name; None: those of this process.

    Raises:
        InputError: an unknown option, a bad value, or values that do not fit each other.
        SystemExit: after --help or --help-all.
    """
    parser = _build_parser(command)
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").split("/")[0].lstrip("-")
        option = command.options.get(name)
        if option is None or "expected" not in error.message:
            raise InputError(f"--{name}: {error.message}; see --help") from None
        raise InputError(f"--{name}: has no value; give {option.type}") from None
    if unknown:
        raise InputError(_unknown_option(unknown[0], command))
    given = vars(given)
    for name in ("help", "help_all"):
        if given.pop(name, False):
            print(_build_parser(command, show_all=name == "help_all").format_help(), end="")
            raise SystemExit(0)

    options = command.options
    configured = _read_config(given["config"], command) if "config" in given else {}
    typed = configured | {name: _typed(options[name], text) for name, text in given.items()}
    preset = command.preset(typed)
    values = {name: option.default for name, option in options.items()} | preset | typed
    for name, option in options.items():
        if option.required and values[name] is None:
            raise InputError(f"--{name}: missing; give {option.type}")
    args = argparse.Namespace(**values)
    try:
        command.check(args)
    except InputError as error:
        if getattr(args, "preset", None) is None:
            raise
        raise InputError(f"{error}; --preset {args.preset} has set {option_words(preset)}") from None
    return args


def name_first_words(option: str, argv: Sequence[str] | None = None) -> list[str]:
    """Return the arguments with an option's name before them if they begin with words that belong to no option.

    Args:
        option: name of the option that takes these words.
        argv: arguments without the program's name; None: those of this process.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    return [f"--{option}", *argv] if argv and not argv[0].startswith("-") else argv


def _build_parser(command, show_all=False):
    parser = argparse.ArgumentParser(
        prog=command.prog,
        description=command.description,
        usage=f"{command.prog} [options]",
        allow_abbrev=False,
        add_help=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
    )
    parser.add_argument("-h", "--help", action="store_true", help="show the common options")
    parser.add_argument("--help-all", action="store_true", dest="help_all", help="show all options")
    for title, options in command.groups.items():
        group = parser.add_argument_group(title) if len(command.groups) > 1 else parser
        for option in options:
            shown = option.common or show_all
            group.add_argument(
                f"--{option.name}",
                help=_help_text(option) if shown else argparse.SUPPRESS,
                **_argparse_keywords(option),
            )
    return parser


def _argparse_keywords(option: Option) -> dict[str, Any]:
    # All values stay text here: `_typed` reads them, as it reads those of --config.
    if isinstance(option.type, Flag):
        return {"action": "store_true"}
    if isinstance(option.type, Switch):
        return {"action": argparse.BooleanOptionalAction}
    keywords: dict[str, Any] = {"metavar": option.metavar or option.name.rpartition("_")[2].upper()}
    if option.several:
        keywords["nargs"] = "+"
    if option.repeatable:
        keywords["action"] = "append"
    return keywords


def _help_text(option):
    text = option.help.replace("%", "%%")
    if option.required:
        return f"{text} (required)"
    if option.default is None or option.default is False or isinstance(option.type, Flag) or "default:" in text:
        return text
    return f"{text} (default: {option.default_text})"


def _typed(option: Option, given: Any) -> Any:
    """Return the value that the text given for an option stands for.

    Raises:
        InputError: `--option VALUE: what is wrong; what to do`.
    """
    if isinstance(option.type, Flag | Switch):
        return given
    if isinstance(given, list):
        if not given:  # argparse drops the value of --name=--
            raise InputError(f"--{option.name}: has no value; give {option.type}")
        return [_typed(option, text) for text in given]
    if not given.isascii() or "\0" in given:
        _require_unicode(option, given)
    try:
        return option.type(given)
    except ValueError as error:
        raise InputError(f"--{option.name} {given}: {error}") from None


def _require_unicode(option, text):
    """Refuse a NUL, which no path can have, and bytes that are not UTF-8, which no JSON can hold."""
    with suppress(UnicodeEncodeError):
        if b"\0" not in text.encode():
            return
    raise InputError(f"--{option.name} {text}: is not valid UTF-8; rename the file, or write the value out again")


def _unknown_option(text, command):
    if not text.startswith("-"):
        return f"{text}: not an option; options start with --, see --help"
    name = text.lstrip("-").partition("=")[0]
    elsewhere = [other.prog for other in COMMANDS if name in other.options]
    if elsewhere:
        return f"--{name}: is an option of {' and '.join(elsewhere)}; leave it out here, see --help-all"
    close = get_close_matches(name, [*command.options, "help", "help-all"], 1)
    return f"--{name}: no such option; " + (f"did you mean --{close[0]}?" if close else "see --help-all")


def _read_config(path, command):
    """Return the values of a --config file.

    Raises:
        InputError: it cannot be read, or holds an unknown option or a bad value.
    """
    import yaml

    where = f"--config {path}"
    if not Path(path).is_file():
        raise InputError(f"{where}: no such file; give a YAML file")
    try:
        if Path(path).stat().st_size > MAX_CONFIG_BYTES:
            raise InputError(f"{where}: larger than {MAX_CONFIG_BYTES} bytes; give a file of options")
        # BaseLoader keeps every value as text, to be read as on the command line: `no` is not False, 1e-5 is a number.
        text = Path(path).read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            # A few aliases can stand for gigabytes, and the time to read nested lists grows with their square.
            if isinstance(event, yaml.AliasEvent) or depth > 5:
                raise InputError(f"{where}: uses an alias (*name) or nested lists; write options and plain values")
        loader = yaml.BaseLoader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"{where}: not a list of options; write lines of the form 'option: value'")
        names = [key.value for key, _ in node.value]
        content = loader.construct_document(node)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{where}: cannot be read ({' '.join(str(error).split())}); correct the file") from error
    values = {}
    for name, value in content.items():
        option = command.options.get(name)
        if option is None or name == "config":
            raise InputError(f"{where}: {_unknown_option(f'--{name}', command)}")
        if names.count(name) > 1:
            raise InputError(f"{where}: --{name} is set twice; keep one of the lines")
        try:
            values[name] = _typed_yaml(option, value)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    return values


def _typed_yaml(option, value):
    if isinstance(option.type, Flag | Switch):
        try:
            return {"true": True, "false": False}[str(value).lower()]
        except KeyError:
            raise InputError(f"--{option.name} {value}: not true or false; give one of them") from None
    if value in ("", "null", "~"):
        if option.default is not None or option.required:
            raise InputError(f"--{option.name} {value or 'null'}: has no value; give {option.type}")
        return None
    if option.several or option.repeatable:
        entries = value if isinstance(value, list) else [value]
        if not entries:
            raise InputError(f"--{option.name} []: has no value; give {option.type}")
        return _typed(option, [str(entry) for entry in entries])
    return _typed(option, str(value))


# -------------------------------------------------------------------------------------------------------- run and exit


def run(main: Callable[[], Any]):
    """Run a command's main function. Bad input, a full disk and signals end it with one line, not a traceback."""
    stop_on_signals()
    log_to_stdout()
    # What the imports have made stays until the end: the collector need not look through it again. Data workers, which
    # are forked, then also share its memory.
    gc.freeze()
    gc.enable()
    try:
        main()
    except InputError as error:
        _wait_for_the_main_process()
        # From a data loader's worker the error comes wrapped in the worker's traceback: its last line is the message.
        _exit(error, re.sub(r"^c2r[.\w]*: ", "", str(error).strip().splitlines()[-1]))
    except (OSError, EOFError, RuntimeError) as error:
        # A killed data loader worker breaks its connection first; torch's handler would raise a second error here.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        from c2r.files import UNWRITABLE, write_problem

        if _shared_memory_is_full(error):
            sys.unraisablehook = _ignore  # a data loader that was not completed raises when it is freed
            _exit(
                error,
                "/dev/shm: full, and data loader workers need it; make it larger (docker run --shm-size 8g), or give "
                "--dataloader_num_workers 0",
            )
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            _exit(
                error, f"too many open files ({error.filename or 'ulimit -n'}); raise the limit, as by ulimit -n 4096"
            )
        if str(error).startswith("DataLoader timed out"):
            _exit(
                error,
                f"no batch has arrived ({str(error).partition(chr(10))[0]}): the storage is slow, or a worker has "
                "failed; raise --distributed_timeout_minutes, or give --dataloader_num_workers 0",
            )
        if _is_lost_worker(error):
            first_line = str(error).partition("\n")[0]
            _exit(
                error,
                f"a data loader worker was killed or cannot be reached ({first_line}), perhaps for lack of memory; "
                "lower --dataloader_num_workers and restart with --resume_from_checkpoint latest",
            )
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            verb = "opened" if error.errno == errno.EACCES else "written"
            name = error.filename or "output"
            _exit(error, f"{name}: cannot be {verb} ({write_problem(error, name)}); fix it and restart")
        for hook in failure_hooks:
            hook()
        raise


def check_command_line(command: Command):
    """Answer --help and bad options now: a script calls this before its imports, which take seconds.

    Garbage is not collected until `run`: while the imports make a million objects that stay, it took a fifth of their
    time (measured).
    """
    run(lambda: parse(command))
    gc.disable()


def _exit(error, message):
    """Exit with status 1 and one line."""
    traceback.clear_frames(error.__traceback__)  # ends what has a bar, which would share the line
    if "tqdm" in sys.modules:
        from c2r.bars import close_bars

        close_bars()
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE // 2]} … {message[-MAX_MESSAGE // 2 :]}"
    sys.exit(f"error: {printable(message)}")


def _ignore(unraisable):
    pass


def _wait_for_the_main_process():
    """Give the main process time to report input that is bad for all processes; the launcher then ends this one."""
    if int(os.environ.get("RANK", 0)) > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(HEAD_START)


def _is_lost_worker(error):
    """Return True if a data loader has lost a worker, rather than passed on an error that a worker raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return str(error).startswith("DataLoader worker") or any(frame.name == "_try_get_data" for frame in frames)


def _shared_memory_is_full(error):
    """Return True if a worker found no room for a batch in /dev/shm, or a data loader none for its semaphores."""
    if isinstance(error, OSError):
        frames = traceback.extract_tb(error.__traceback__)
        return error.errno == errno.ENOSPC and Path(frames[-1].filename).name == "synchronize.py"
    return "unable to allocate shared memory" in str(error)


def stop_on_signals():
    """Let SIGTERM and SIGINT end the process at once with EXIT_STOPPED, until the training loop can save.

    A process started by a launcher also gets SIGTERM when its launcher dies; otherwise it would go on writing beside
    the next run.
    """

    def stop(number, frame):
        for handled in SIGNALS:
            signal.signal(handled, signal.SIG_IGN)
        write_error_line(f"stopped by {signal.Signals(number).name}; restart with the same command")
        sys.exit(EXIT_STOPPED)

    for number in SIGNALS:
        signal.signal(number, stop)
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def write_error_line(line: str):
    """Write a line to stderr from a signal handler: print may find the stream's buffer in use, and raise."""
    assert sys.__stderr__ is not None
    os.write(sys.__stderr__.fileno(), f"{line}\n".encode())


# ------------------------------------------------------------------------------------------------------------ messages


def printable(text: str) -> str:
    """Escape control characters, line breaks and direction marks: a stranger's caption could forge a message."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _LineHandler(logging.Handler):
    """Print each message as one line on stdout, above progress bars; warnings with "warning: " before them."""

    def emit(self, record):
        from tqdm import tqdm

        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + printable(self.format(record)))
        sys.stdout.flush()


def log_to_stdout():
    """Print the package's messages: INFO on the main process alone, WARNING and above on all."""
    logger = logging.getLogger("c2r")
    if not any(isinstance(handler, _LineHandler) for handler in logger.handlers):
        logger.addHandler(_LineHandler())
    logger.propagate = False
    # Where bitsandbytes is installed, Diffusers imports it, and it asks on some CPUs for a package that would download
    # a kernel for 4-bit weights. Nothing here has such weights, and no setting declines the kernel.
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
