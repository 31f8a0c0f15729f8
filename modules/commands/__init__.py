"""The verbs of trainer.py. Importing this package silences chatty libraries before a verb imports them."""

from modules.quiet import quiet_libraries

quiet_libraries()
