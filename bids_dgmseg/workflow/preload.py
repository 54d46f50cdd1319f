"""First module of the server from which workers are forked, see `environment.start_workers`.

Importing the libraries creates a million objects and no garbage, and looking for it takes a sixth of the time, and most
of the time in which the server ends. Workers collect garbage again.
"""

import atexit
import gc

gc.disable()
atexit.register(gc.freeze)
