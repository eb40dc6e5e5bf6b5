"""Programs: ``causvid NAME`` or, from a clone, ``python -m launch.NAME``."""

import signal
import sys

PROGRAMS = {
    "sample": "generate videos, as a stream of any length or, by the teacher, as a clip",
    "demo": "sample a stream with a prompt switch, and compare student and teacher",
    "serve": "serve a live film and a page that controls it",
    "prepare": "make a recipe's data",
    "train": "train one stage",
    "road": "make all weights of a recipe from scratch",
    "evaluate": "measure a recipe's clips",
    "experiment": "train and measure the rows of an experiment of the paper",
    "vbench": "sample VBench's prompts, score them and compute the totals; drift curves",
    "export": "write the weights of a checkpoint of a run",
    "curves": "draw the training curves of a run",
    "models": "list the published models, with files, licence and settings",
    "convert": "convert published weights, or to published formats",
    "bench": "measure the speed of a stream on this machine",
    "compile": "check whether a program fits a machine, or compile the sampler to a file",
}


def main(name: str | None = None) -> None:
    """Run the program ``name`` with the command line's arguments; None: the program that the first argument names.

    The process ends with the status of :func:`causvid_jax.cli.common.run`; an unknown name ends it with 2.
    """
    try:
        _main(name)
    except (KeyboardInterrupt, SystemExit) as end:
        # From here on another Ctrl-C ends the process at once. An exception while Python exits can crash libraries.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if isinstance(end, SystemExit):
            raise
        print("stopped by Ctrl-C", file=sys.stderr)  # while modules are imported; run() has one of its own
        sys.exit(130)


def _main(name: str | None) -> None:
    import causvid_jax
    from causvid_jax.cli import common
    from causvid_jax.config import suggest

    arguments = sys.argv[1:]
    if name is None:
        name, arguments = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("--help", "-h", "help"):
        width = max(map(len, PROGRAMS))
        lines = "\n".join(f"  {program:<{width}}  {about}" for program, about in PROGRAMS.items())
        print(f"causvid PROGRAM [--flag=value ...]\n\n{lines}\n\ncausvid PROGRAM --help lists its flags.")
        print("causvid --version prints the version.")
        return
    if name == "--version":
        print(f"causvid_jax {causvid_jax.__version__}")
        return
    if name not in PROGRAMS:
        print(f"error: program {name!r} does not exist; {suggest(name, PROGRAMS)}", file=sys.stderr)
        sys.exit(common.BAD_INPUT)
    common.run(name, arguments)
