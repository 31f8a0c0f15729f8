"""The verbs. Libraries are quieted before a verb imports them."""

from modules.quiet import quiet_libraries

quiet_libraries()
