"""Evaluated images from tar shards, decoded on the CPU as a folder's are: the same pixels on every device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastssl.batch import ImageBatch
from fastssl.loaders.encoded import open_encoded
from fastssl.loaders.file_decode import FileDecoder
from fastssl.loaders.folder_loader import default_workers
from fastssl.loaders.prefetch import Prefetcher


class ShardImages:
    """The shards of one folder, with the interface of `images.Images`.

    class_names: the classes in the order of their labels, when another split has already numbered them.
    Raises ValueError when there is nothing to read, or a class is not among `class_names`.
    """

    notices: Sequence[str] = ()

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
        self._prefetcher = Prefetcher(device)
        self._files = FileDecoder(encoded, "skip", self.workers, self._prefetcher)

    @property
    def bad_images(self) -> list[str]:
        """The unreadable images met so far, each as "name: reason"."""
        return self._files.images.messages

    def read(self, shares: Iterator[Tensor], *, replace_bad: bool = False) -> Iterator[ImageBatch]:
        """As `FolderLoader.read`."""
        return self._prefetcher.iterate(self._files.batches(shares, replace_bad))

    def close(self) -> None:
        """Ends all threads."""
        self._prefetcher.close()
