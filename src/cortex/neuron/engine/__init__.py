"""The torch engine. `messages`, `sequence` and `scheduler` know no torch; the rest runs in workers.

Importing it sets how the threads of torch's libraries behave: they read it once, when torch loads them.
"""

import os
from typing import Final

_THREADING: Final = {
    # Threads that wait for each other look for 30 µs, then sleep. libgomp's own milliseconds cost a
    # tenfold slower step as soon as another program wants the cores too, and win six percent if none does.
    "GOMP_SPINCOUNT": "2000",
    # numpy, which torch imports, would start threads in the process that workers are forked from.
    "OPENBLAS_NUM_THREADS": "1",
}

for _name, _value in _THREADING.items():
    os.environ.setdefault(_name, _value)
