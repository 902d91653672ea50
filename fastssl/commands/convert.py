"""Convert a checkpoint into one that MoCo's scripts read.

fastssl convert seed DISTILLED.pth.tar [OUT]   a SEED checkpoint: its student becomes the query encoder, and its teacher
                                               is dropped, as the small-model project's distill_ckpt2moco_ckpt intends
fastssl convert moco CHECKPOINT OUT            any checkpoint, written as main_moco.py would have saved it; for
                                               moco_align_uniform's with --moco-contr-w alone add --scalar-label

fastssl itself reads SEED checkpoints as they are, both in pretrain --resume PATH --restart and in every evaluation.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastssl.checkpoint import CheckpointError
from fastssl.export import add_scalar_label, export
from fastssl.foreign import load_pretrained


def main(argv: Sequence[str]) -> int:
    """`fastssl convert`."""
    parser = argparse.ArgumentParser(
        "fastssl convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("kind", choices=("seed", "moco"), help="which conversion, see above")
    parser.add_argument("source", help="the checkpoint to read")
    parser.add_argument("out", nargs="?", help="the file to write (default with seed: converted_NAME beside it)")
    parser.add_argument("-a", "--arch", help="the architecture, if the file does not tell")
    add_scalar_label(parser)
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    o = parser.parse_args(list(argv))
    source = Path(o.source)
    if o.kind == "moco" and o.out is None:
        raise ValueError("fastssl convert moco needs a second path: the file to write")
    if o.kind == "seed":
        kind = load_pretrained(source, o.arch)[1].kind
        if not kind.startswith("SEED"):
            raise CheckpointError(f"{source} is not a SEED checkpoint ({kind}): use fastssl convert moco")
    out = o.out or str(source.with_name(f"converted_{source.name}"))
    report, name = export(str(source), out, "moco", arch=o.arch, force=o.force, scalar_label=o.scalar_label)
    print(report)
    print(f"{out}: MoCo's layout, {name}")
    return 0
