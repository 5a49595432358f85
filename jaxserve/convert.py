"""The command `jaxserve convert`. Loads jax when it is called, not before."""

import argparse
import pathlib
import re
import sys
import time

import tqdm

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, or 1 where it cannot be done: then there is no target."""
    options = make_parser().parse_args(arguments)
    import jax

    from jaxserve.converter import convert
    from jaxserve.memory_plan import format_bytes

    jax.config.update("jax_platforms", "cpu")  # an accelerator is somebody else's
    began = time.perf_counter()
    bar = tqdm.tqdm(unit="B", unit_scale=True, desc="Converting", disable=None)

    def on_bytes(count: int, total: int) -> None:
        bar.total = total
        bar.update(count)

    try:
        to, size = convert(
            options.source,
            options.target,
            to=options.to,
            dtype=options.dtype,
            max_file_bytes=options.max_shard_size,
            on_bytes=on_bytes,
        )
    except (OSError, ValueError) as error:
        is_system = isinstance(error, OSError) and error.filename is not None
        words = f"{error.filename}: {error.strerror}" if is_system else error
        print(f"jaxserve convert: {words}", file=sys.stderr)
        return 1
    finally:
        bar.close()
    seconds = time.perf_counter() - began
    print(f"{options.target}: {to}, {format_bytes(size)} in {seconds:.1f} s")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxserve convert",
        description="Write a model's folder with its checkpoint in another format: safetensors as "
        "orbax, and back, bit for bit.",
        epilog="Exit status: 0 it is there, 1 it could not be written, and nothing is.",
    )
    parser.add_argument(
        "source", metavar="SOURCE", type=pathlib.Path, help="folder with config.json and weights"
    )
    parser.add_argument(
        "target", metavar="TARGET", type=pathlib.Path, help="folder to make; not there yet"
    )
    parser.add_argument(
        "--to",
        choices=("orbax", "safetensors"),
        help="format of TARGET (default: the one that SOURCE is not)",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="cast what is floating point (default: as it is)",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        type=parse_size,
        default="5GB",
        help="largest file of weights: 500MB, 5GB (default: 5GB); a tensor is not cut",
    )
    return parser


def parse_size(text: str) -> int:
    """Bytes of `5GB`. Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(r"(\d+) ?([KMG]?)B?", text.strip().upper())
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size, as 500MB or 5GB are")
    return int(match[1]) * UNITS[match[2]]
