"""Image encoders by name, their projection heads, and the batch-normalisation variants they can be trained with."""

from fastssl.models.batchnorm import convert_sync_batchnorm, split_batchnorm
from fastssl.models.encoders import Encoder, list_architectures, make_encoder
from fastssl.models.heads import list_heads, make_head

__all__ = [
    "Encoder",
    "convert_sync_batchnorm",
    "list_architectures",
    "list_heads",
    "make_encoder",
    "make_head",
    "split_batchnorm",
]
