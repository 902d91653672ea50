"""Checks of the loaders' contract, which `fastssl check-loader` runs on any data and the tests on small data sets."""
