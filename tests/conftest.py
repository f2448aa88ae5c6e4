"""For all tests. Small products of matrices wait longer for threads than they take."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy is imported
