"""``skimtvm package``: a folder from which a module runs without Python."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command("package", short_help="Make a folder that runs a module without Python.")
@click.argument("module", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option(
    "--source", is_flag=True, help="Ship the C library as source, for CMake to build, even if it builds here."
)
@click.option("--overwrite", is_flag=True, help="Replace the output if it is a bundle.")
def package_command(module: Path, output: Path, source: bool, overwrite: bool) -> None:
    """Put MODULE (.so), TVM's runtime, a C library, its header and a CMake package into one folder."""
    from ..bundle import package

    made = package(module, output, overwrite=overwrite, source=source)
    if not made.compiler and not source:
        print("skimtvm: warning: no C++ compiler here; the C library is in the bundle as source", file=sys.stderr)
    total, own = sum(made.sizes.values()), made.sizes[made.module]
    runtime = sum(size for name, size in made.sizes.items() if name.startswith("lib/libtvm"))
    print(
        f"{output}: {total / 1e6:.1f} MB: module {own / 1e6:.1f}, TVM runtime {runtime / 1e6:.1f}, C library "
        f"{'built with ' + made.compiler if made.compiler else 'as source'}"
    )
