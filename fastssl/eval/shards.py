"""Evaluated images from tar shards. Pillow decodes them, as it does a folder's: the same pixels on every device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fastssl.batch import ImageBatch, pack_images
from fastssl.data_prep.decode import decode_image
from fastssl.loaders.bad_images import BadImages
from fastssl.loaders.encoded import open_encoded
from fastssl.loaders.folder_loader import default_workers
from fastssl.loaders.prefetch import Prefetcher


class ShardImages:
    """The shards of one folder, with the interface of `images.Images`.

    class_names: the classes in the order of their labels, when another split has already numbered them.
    Raises ValueError when there is nothing to read, or a class is not among `class_names`.
    """

    def __init__(
        self,
        data: str | os.PathLike,
        device: torch.device | str,
        workers: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        encoded = open_encoded(data, class_names)
        self.class_names, self.label, self.num_images = encoded.class_names, encoded.label, len(encoded.label)
        self.workers = workers or default_workers()
        self._images = BadImages("skip", self.num_images, lambda i: decode_image(encoded.read(i), encoded.name(i)))
        self._prefetcher = Prefetcher(device)

    @property
    def bad_images(self) -> list[str]:
        """The unreadable images met so far, each as "name: reason"."""
        return self._images.messages

    def read(self, shares: Iterator[Tensor], *, replace_bad: bool = False) -> Iterator[ImageBatch]:
        """As `FolderLoader.read`."""
        return self._prefetcher.iterate(self._decode(shares, replace_bad))

    def close(self) -> None:
        """Ends all threads."""
        self._prefetcher.close()

    def _decode(self, shares: Iterator[Tensor], replace_bad: bool) -> Iterator[ImageBatch]:
        def load(i: int) -> tuple[np.ndarray | None, int]:  # pixels, and the index of the image they are of
            return self._images.load_replacing(i) if replace_bad else (self._images.load(i), i)

        with ThreadPoolExecutor(self.workers, thread_name_prefix="fastssl-decode") as pool:
            for share in shares:
                loaded = zip(share.tolist(), pool.map(load, share.tolist()))
                found = [(pixels, i, int(self.label[used])) for i, (pixels, used) in loaded if pixels is not None]
                if found:
                    yield pack_images(*zip(*found))
