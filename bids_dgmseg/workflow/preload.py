"""First module of the servers from which workers are forked, see `environment.worker_servers`.

Importing the libraries creates a million objects and no garbage, and looking for it takes a sixth of the time, and most
of the time in which a server ends. Workers collect garbage again.
"""

import atexit
import gc

from bids_dgmseg.errors import skip_last_collections

gc.disable()
atexit.register(skip_last_collections)
