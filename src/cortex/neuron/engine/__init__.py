"""The torch engine. Messages, sequences, blocks and the scheduler know no torch; the rest runs in workers.

Importing it sets how torch's libraries use threads and memory: they read it once, when torch loads them.
"""

import os
from typing import Final

_SETTINGS: Final = {
    # Threads that wait for each other look for some 0.3 ms, longer than the pauses within a step, and then
    # sleep. libgomp's own milliseconds cost a tenfold slower step as soon as another program wants the
    # cores too; a tenth of this costs a third of the speed where none does, as waking is slow in a VM.
    "GOMP_SPINCOUNT": "10000",
    # numpy, which torch imports, would start threads in the process that workers are forked from.
    "OPENBLAS_NUM_THREADS": "1",
    # Weights in huge pages: the matrices of a step are read a tenth faster. The one is for torch's own
    # memory, the other for what FBGEMM and oneDNN take from the C library, which reads it when a program
    # starts: the warm server does after this, and the workers are its children.
    "THP_MEM_ALLOC_ENABLE": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)
