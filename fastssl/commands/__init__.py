"""The commands that only bring parts of the package together: NAME.py is `fastssl NAME`."""
