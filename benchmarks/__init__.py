"""Measurements: `python -m benchmarks.<name>`. Libraries are quieted before any script imports them."""

from modules.quiet import quiet_libraries

quiet_libraries()
