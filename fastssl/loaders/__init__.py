"""Each loader yields `ImageBatch` in the order of `order.py`; they share a contract (`make.Loader`), not a base."""
