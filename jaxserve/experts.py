"""The command `jaxserve experts`."""

import argparse
import pathlib
import sys


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, or 1 where it cannot be done."""
    options = make_parser().parse_args(arguments)
    from jaxserve.expert_files import read_counts
    from jaxserve.expert_plot import describe, draw

    try:
        counts = read_counts(options.file)
        print(describe(counts))
        output = options.output or options.file.with_suffix(".png")
        draw(counts, output)
    except ModuleNotFoundError:
        print("jaxserve experts: no figure without pip install 'jaxserve[bench]'", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"jaxserve experts: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxserve experts")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plot = commands.add_parser(
        "plot",
        help="a heat map, layer by expert, and how even the load is",
        description="Draw a file of /dump_expert_distribution_record as a heat map, layer by "
        "expert, and print how even the load is. Needs matplotlib: pip install 'jaxserve[bench]'.",
    )
    plot.add_argument("file", metavar="FILE", type=pathlib.Path, help="a .csv or .safetensors")
    plot.add_argument(
        "--output",
        metavar="FILE",
        type=pathlib.Path,
        help="the figure; its suffix says the format (default: FILE with .png)",
    )
    return parser
