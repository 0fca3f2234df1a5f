"""The command line: what commands there are, how it is entered, and how failures are told.

Nothing heavy is imported before a command needs it.

Exit status: 0 done, 1 failed on the way, 2 wrong usage or config, 130 interrupted.
"""

import errno
import os
import sys
import tempfile
import traceback
from contextlib import suppress

import click

from dpdm import checking_commands, commands, launch, planning_commands
from dpdm.errors import InputError, PeerError, RunError
from dpdm.options import complain
from dpdm.progress import speaks

MEMORY_REMEDY = "lower train.physical_batch_size or sampler.batch_size, or give a smaller network or smaller images"
COMMANDS = (
    commands.demo,
    commands.synthesize_command,
    commands.prepare,
    planning_commands.account,
    planning_commands.tune,
    commands.train,
    commands.release,
    commands.sample,
    checking_commands.fid_stats,
    checking_commands.evaluate,
    checking_commands.audit,
    checking_commands.verify,
)


@click.group(
    commands=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Begin with dpdm demo, or with your own folder: dpdm synthesize FOLDER --epsilon 10 --workdir runs/mine. "
    "The same in steps: prepare, train, release, sample, evaluate. Keys such as train.num_epochs=50 go after --; an "
    "unknown one is refused with the nearest known one.",
)
@click.version_option(package_name="dpdm")
def app() -> None:
    """Private synthetic images: train a diffusion model with differential privacy and share what it draws."""


def main() -> None:
    """Runs the command line and exits."""
    status = run_command(sys.argv[1:])
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Of several processes one that tidied up its threads would now and then abort with all its work done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run_command(arguments: list[str]) -> int:
    """Runs one command; returns its exit status. Every expected failure is one line on standard error."""
    try:
        with launch.group():
            result = app.main(args=arguments, prog_name="dpdm", standalone_mode=False, obj=arguments)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 2
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "dpdm"
        return _fail(f"{error.format_message()} See {command} --help.", 2)
    except InputError as error:
        return _fail(str(error), 2)
    except (click.exceptions.Abort, KeyboardInterrupt):
        if not speaks():
            return 130
        return _fail("Interrupted; what was saved is kept. The same command goes on (dpdm train: add --resume).", 130)
    except PeerError:
        return 1  # the process that failed has said why
    except RunError as error:
        return _fail(str(error), 1)
    except OSError as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # of which click tells the terminal, which is gone
            return 130
        if error.errno == errno.ENOMEM:
            return _fail(f"Not enough memory: {MEMORY_REMEDY}. What was saved is kept.", 1)
        full = "; free some space and go on with the same command" if error.errno == errno.ENOSPC else ""
        return _fail(f"Could not access {error.filename or 'a file'}: {error.strerror or error}{full}.", 1)
    except Exception as error:
        if _is_lack_of_memory(error):
            return _fail(f"Not enough memory ({error}): {MEMORY_REMEDY}. What was saved is kept.", 1)
        return _unexpected(error)


def _fail(message: str, status: int) -> int:
    complain(message)
    return status


def _is_lack_of_memory(error: Exception) -> bool:
    """Whether Python, numpy or torch got no memory; torch has no class of its own for the CPU's."""
    told = ("out of memory", "allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in told)
    )


def _unexpected(error: Exception) -> int:
    """Reports an error that nobody foresaw; its traceback goes to a file, or with DPDM_DEBUG=1 to the terminal."""
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if os.environ.get("DPDM_DEBUG") == "1":
        traceback.print_exc()
        return _fail(what, 1)
    where = "the traceback could not be kept; DPDM_DEBUG=1 shows it"
    with suppress(OSError):  # the disk may be full
        with tempfile.NamedTemporaryFile("w", prefix="dpdm-", suffix=".log", delete=False, encoding="utf-8") as file:
            traceback.print_exc(file=file)
        where = f"the traceback is in {file.name}"
    return _fail(f"Unexpected {what}. What was saved is kept; {where}.", 1)
