"""Command line of Gumbel CL-LoRA: reads configs and studies, and hands them to the trainer and the study runner."""

import argparse
import json
import os
import sys

from utils.errors import UserError, sentence_of
from utils.runs import processes
from utils.runs.progress import LOGGER
from utils.runs.signals import Stopped


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; every value given here wins over the config file."""
    parser = argparse.ArgumentParser(
        description="Class-incremental learning with gated LoRA adapters on a frozen ViT.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python main.py --config=exps/quickstart.json\n"
               "  python main.py --config exps/studies/gumbel_grid.json --seed 1993 1994 --set nb_tasks=2")
    parser.add_argument("--config", nargs="+", required=True, metavar="FILE", help="JSON configs or studies, run in turn")
    parser.add_argument("--seed", nargs="+", type=int, metavar="N", help="seeds instead of the config's, a run each")
    parser.add_argument("--device", nargs="+", metavar="NAME", help='"cpu", "auto", or a CUDA device such as 0')
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="set any config key; repeatable; docs/CONFIG.md lists the keys")
    parser.add_argument("--overwrite", action="store_true", help="start over; what the run's folder holds is moved aside")
    parser.add_argument("--dry-run", action="store_true", help="print resolved config, split, parameter counts; write nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs configs and studies; the exit status is 0, 1 (a run failed), 2 (bad input), or 130, 143, 75."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options, status = parse(arguments), 0
    try:
        status = run_all(options, arguments)
    except BrokenPipeError:  # the reader of `| head` has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        if (sentence := sentence_of(error)) is None:
            raise
        if processes.speaks():
            print(f"error: {sentence}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:  # before training starts, when nothing has been written yet
        status = 130
    except Stopped as stop:
        LOGGER.info(f"Stopped by {stop.signal.name}; everything is saved, the same command "
                    f"{'without --overwrite ' * options.overwrite}goes on from here.")
        status = stop.exit_status
    return processes.leave(status)


def run_all(options: argparse.Namespace, arguments: list[str]) -> int:
    """Everything that the command line names, in turn; the highest exit status."""
    from studies.runner import perform  # loads torch, as the next do: --help is answered without
    from studies.study import Study, is_study, load_study
    from trainer import describe, run
    from utils.config import load_config
    from utils.runs.runtime import log_to_console

    flags, this, status = {"seed": options.seed, "device": options.device}, [sys.executable, os.path.abspath(__file__)], 0
    configs = [(load_study if is_study(path) else load_config)(path, options.overrides, **flags) for path in options.config]
    log_to_console()
    for path, config in zip(options.config, configs, strict=True):
        if isinstance(config, Study):
            status = max(status, perform(config, this, options.dry_run, options.overwrite))
        elif options.dry_run:
            if processes.place().rank == 0:
                print(json.dumps(describe(config, options.overwrite), indent=1, ensure_ascii=False), flush=True)
        elif (number := processes.processes_to_start(config.device)) > 1:
            status = max(status, processes.start(number, [*this, *arguments, "--config", path]))  # the last --config counts
        else:
            run(config, options.overwrite)
    return status


if __name__ == "__main__":
    sys.exit(main())
