"""Benchmarks, run as `python -m benchmarks.<name>`. Libraries are quieted here, before any script imports them."""

from modules.quiet import quiet_libraries

quiet_libraries()
