"""What every loader must hold to: `fastssl check-loader` runs it on anybody's data, the tests on small sets."""
