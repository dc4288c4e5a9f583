"""Command line of Gumbel CL-LoRA: reads configs and hands them to the trainer."""

import argparse
import json
import os
import sys


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; every value given here wins over the config file."""
    parser = argparse.ArgumentParser(
        description="Class-incremental learning with gated LoRA adapters on a frozen ViT.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python main.py --config=exps/quickstart.json\n"
               "  python main.py --config exps/sdlora_c100.json --seed 1993 1994 --set nb_tasks=2")
    parser.add_argument("--config", nargs="+", required=True, metavar="FILE", help="one or several JSON configs, run in turn")
    parser.add_argument("--seed", nargs="+", type=int, metavar="N", help="seeds instead of the config's, a run each")
    parser.add_argument("--device", nargs="+", metavar="NAME", help='"cpu", "auto", or a CUDA device such as 0')
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="set any config key; repeatable; docs/CONFIG.md lists the keys")
    parser.add_argument("--overwrite", action="store_true", help="start over; what the run's folder holds is moved aside")
    parser.add_argument("--dry-run", action="store_true",
                        help="print the resolved config, the split and parameter counts; train and write nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the configs of the command line; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    options = parse(arguments)
    from utils.launch import leave

    return leave(run_configs(options))


def run_configs(options: argparse.Namespace) -> int:
    """Runs the configs, each in this process or in processes of its own; returns the exit status."""
    from utils import launch
    from utils.config import load_config
    from utils.errors import UserError
    from utils.progress import LOGGER
    from utils.signals import Stopped

    flags = {key: value for key in ("seed", "device") if (value := getattr(options, key)) is not None}
    try:
        configs = [load_config(path, options.overrides, **flags) for path in options.config]
        for path, config in zip(options.config, configs, strict=True):
            processes = 1 if options.dry_run else launch.processes_to_start(config.device)
            if processes > 1:
                if status := launch.start(processes, options, path):
                    return status
                continue
            from trainer import describe, run  # loads torch: --help and mistakes in a config are answered without
            from utils.runtime import log_to_console

            log_to_console()
            if not options.dry_run:
                run(config, options.overwrite)
            elif launch.place().rank == 0:
                print(json.dumps(describe(config), indent=1, ensure_ascii=False), flush=True)
    except UserError as error:
        if launch.speaks():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of `| head` has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:  # before training starts, when nothing has been written yet
        return 130
    except Stopped as stop:
        LOGGER.info(f"Stopped by {stop.signal.name}; everything is saved, the same command goes on from here.")
        return stop.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
