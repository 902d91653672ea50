"""`python -m fastssl` is the `fastssl` command, for machines whose PATH lacks it."""

from fastssl.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
