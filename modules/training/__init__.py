"""A run from settings to results: job and state, stages, choices made for the machine, training loop, report.

trainer.py is built from these modules; the verbs in modules/commands use them to inspect a run or a part of one.
Importing this package first silences chatty libraries, before any module in it imports them.
"""

from modules.quiet import quiet_libraries

quiet_libraries()
