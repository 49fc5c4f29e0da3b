"""What a machine with a GPU is asked: what runs, what is right, how fast; and the fastest tiles.

`make gpu` (`__main__.py`) visits it, in processes that may crash (`guard.py`, `worker.py`): the
CUDA kernels beside their emulator (`crosscheck.py`), the tests' case tables (`proof.py`,
`evidence.py`), the rows of ``bench``. `kernels.py` and `compiled.py` write what is known of each
kernel into docs/evidence.md, `tune.py` finds tiles.
"""
