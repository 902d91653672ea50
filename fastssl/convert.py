"""`fastssl convert`: checkpoints of one project made readable by the scripts of another.

fastssl convert seed DISTILLED.pth.tar [OUT]   SEED's student as MoCo's query encoder, its teacher dropped; what the
                                               small-model project's distill_ckpt2moco_ckpt means to write
fastssl convert moco CHECKPOINT OUT            any checkpoint that can be read, as main_moco.py would have saved it

`fastssl pretrain --resume` with --restart, and every evaluation, read SEED's files without conversion.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastssl.checkpoint import CheckpointError
from fastssl.export import export
from fastssl.foreign import load_pretrained


def main(argv: Sequence[str]) -> int:
    """`fastssl convert`."""
    parser = argparse.ArgumentParser(
        "fastssl convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("kind", choices=("seed", "moco"))
    parser.add_argument("source", help="the checkpoint")
    parser.add_argument("out", nargs="?", help="the file to write (seed: converted_NAME beside the checkpoint)")
    parser.add_argument("-a", "--arch", help="architecture, where the file does not tell")
    parser.add_argument("--force", action="store_true", help="replace the file")
    o = parser.parse_args(list(argv))
    source = Path(o.source)
    if o.kind == "moco" and o.out is None:
        raise ValueError("fastssl convert moco needs the name of the file to write")
    if o.kind == "seed":
        kind = load_pretrained(source, o.arch)[1].kind
        if not kind.startswith("SEED"):
            raise CheckpointError(f"{source} is no SEED checkpoint but a {kind}: it needs no conversion")
    out = o.out or str(source.with_name(f"converted_{source.name}"))
    report, name = export(str(source), out, "moco", arch=o.arch, force=o.force)
    print(report)
    print(f"{out}: MoCo's layout, {name}")
    return 0
