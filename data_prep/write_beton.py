"""`fastssl prep beton`: converts an image folder or tar files to one .beton file, a plain FFCV file."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

from fastssl.data_prep.beton_writer import BLOCK, BetonWriter
from fastssl.data_prep.convert import prepared_images
from fastssl.data_prep.files import partial_files, refuse_existing
from fastssl.data_prep.manifest import Tally, listing_path, make_manifest, manifest_path
from fastssl.data_prep.prepare import Store
from fastssl.data_prep.sources import Selection, open_source
from fastssl.data_prep.work_pool import Work


def write_beton(
    data: str | os.PathLike, out: str | os.PathLike, store: Store, selection: Selection, work: Work, force: bool = False
) -> Tally:
    """Converts `data` to the file `out`, with its listing `out`.images.jsonl and its manifest `out`.json.

    Samples have the order and the labels of the folder loader over the same folder, without the images left out. `out`
    appears last, and only when it is complete.
    Raises ValueError when there is nothing to convert, when `out` exists without `force`, and with on_error="stop" at
    the first image that cannot be used.
    """
    out = Path(out)
    refuse_existing(out, force)
    source = open_source(data, selection)
    listing, manifest = listing_path(out), manifest_path(out)
    with partial_files(listing, manifest, out) as (lines, facts, file):
        tally = Tally(source, lines)
        with closing(BetonWriter(file, len(source))) as writer:
            for image, label in prepared_images(source, store, work, tally):
                writer.add(image, label)
            sums = writer.finish()
        blocks = {"file_bytes": file.seek(0, os.SEEK_END), "block_bytes": BLOCK, "block_sha256": sums}
        facts.write(make_manifest("beton", {**tally.summary(store, selection, listing.name), **blocks}))
    return tally
