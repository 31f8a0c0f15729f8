"""A run from its settings to its results: job and state, the stages, the choices a machine makes, the loop, the report.

trainer.py tells the story of a run by it; the verbs of modules/commands look at a run, or a part of one, through it.
Libraries are quieted before any of it imports them.
"""

from modules.quiet import quiet_libraries

quiet_libraries()
